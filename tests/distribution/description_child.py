"""What a model on several devices holds where, and what its step exchanges."""

import collections
import json
import math
import sys

import tensorflow as tf

import keras_moe
from tests.distribution import child


def step_of(model, strategy, case):
    """The graph of one training step on all replicas."""
    batches = strategy.experimental_distribute_dataset(child.dataset(case))

    @tf.function
    def step(batch):
        return strategy.run(model.train_step, args=(batch,))

    return step.get_concrete_function(next(iter(batches))).graph


def operations(graph):
    yield from graph.get_operations()
    for function in graph._functions.values():
        yield from operations(function.graph) if hasattr(function, "graph") else ()


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    strategy = child.strategy_of(settings["devices"], settings.get("group_size"))
    found = collections.defaultdict(dict)
    for layer in ("hierarchical", "flat"):
        case = child.Case(
            num_experts=settings["num_experts"], layer=layer, optimizer="Adam"
        )
        model = child.build(case, strategy)
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
        graph = step_of(model, strategy, case)
        named = [op for op in operations(graph) if op.type.startswith("Collective")]
        # Members of a group have no part in the exchange.
        named = [op for op in named if "Group" not in op.type]
        found["collectives"][layer] = collections.Counter(op.type for op in named)
        # Among how many devices.
        found["members"][layer] = collections.Counter(
            f"{op.type} {tf.get_static_value(op.inputs[1])}" for op in named
        )
        # The optimizer gathers the rows of the embedding's gradient, as for every
        # model that is replicated.
        shapes = [
            op.inputs[0].shape
            for op in named
            if op.type == "CollectiveGatherV2" and "adam/" not in op.name
        ]
        # An unknown shape counts as too large.
        found["largest_gather"][layer] = max(
            shape.num_elements() or 10**9 for shape in shapes
        )
        found["gradient_sums"][layer] = [
            op.inputs[0].shape.num_elements()
            for op in named
            if op.type == "CollectiveReduceV2" and "adam/" in op.name
        ]
        found["replicated_sizes"][layer] = sum(
            math.prod(v.shape)
            for v in model.trainable_variables
            if not hasattr(v, "parts") and "embedding" not in v.path
        )
        found["largest_other_sum"][layer] = max(
            op.inputs[0].shape.num_elements() or 10**9
            for op in named
            if op.type == "CollectiveReduceV2" and "adam/" not in op.name
        )
    tokens = child.BATCH * child.TIME
    description = keras_moe.distribution.describe(model, num_tokens=tokens)
    print(description)
    experts = [v for v in model.trainable_variables if hasattr(v, "parts")]
    slots = [v for v in model.optimizer.variables if hasattr(v, "parts")]

    def by_device(variables):
        return [
            sum(4 * v.parts[i].shape.num_elements() for v in variables)
            for i in range(settings["devices"])
        ]

    found |= {
        "parts": [
            list(v.parts[i].shape) for i in range(settings["devices"]) for v in experts
        ],
        "part_bytes": by_device(experts),
        "slot_part_bytes": by_device(slots),
        "shares": [
            {**s._asdict(), "entries": [s.entries.start, s.entries.stop]}
            for s in description.shares
        ],
        "traffic": description.traffic,
        "gradient_traffic": description.gradient_traffic,
        "text": str(description),
    }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
