"""Watches the experts on one device and on several, in a process of its own.

`python -m tests.distribution.usage_child SETTINGS`: SETTINGS is JSON with `devices`.
Prints one line of JSON: records of `ExpertUsage` and logs of `fit`, of both.
"""

import json
import sys

from keras_moe import telemetry
from tests.distribution.child import Case, build, dataset, start, strategy_of


def watch(strategy=None):
    # Weights stay as they are: the counts are then equal, not nearly equal.
    case = Case(options={"learning_rate": 0.0}, examples=72)
    model, usage = build(case, strategy), telemetry.ExpertUsage(interval=2)
    logs = model.fit(
        dataset(case),
        validation_data=dataset(case).take(1),
        verbose=0,
        shuffle=False,
        callbacks=[usage],
    ).history
    records = {
        split: [
            [r.step, *(list(map(float, _flat(part))) for part in r.totals)]
            for r in found
        ]
        for split, found in usage.records["moe"].items()
    }
    return {"records": records, "logs": logs}


def _flat(part):
    return part.ravel() if hasattr(part, "ravel") else [part]


def main():
    settings = json.loads(sys.argv[1])
    start(settings["devices"])
    several = watch(strategy_of(settings["devices"]))
    print("RESULT " + json.dumps([watch(), several]), flush=True)


if __name__ == "__main__":
    main()
