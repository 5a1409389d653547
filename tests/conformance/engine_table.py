"""What each layer runs on: the cells of a table, each of them run.

`python -m tests.conformance.engine_table` prints the table for
`docs/guides/distribution.md`; with names of columns, theirs alone, and how far weights
are apart. A cell is "yes" where 20 steps end with the weights of one device, or "no" where
a `ValueError` refuses the layer; anything else is a failure. Gates have a table of their
own, `router_table`.
"""

import sys

from tests.distribution import children

# Rows of `descriptors`, and one of the child, by their names in the guide; in parts, each
# of which is one process.
MIXTURES = {
    "`MoE`": "MoE",
    "`MoE` of `GatedExperts`, with shared experts": "MoE with shared experts",
    "`MoE` of your `Experts`": "MoE of a user's gated experts",
    "`MoE` of an `ExpertList`": "MoE of an ExpertList",
    "`HierarchicalMoE`": "HierarchicalMoE",
    "`MultiGateMoE`": "MultiGateMoE",
}
RECURRENCES = {
    "`MoELSTM`": "MoELSTM",
    "`MoELSTMCell` in a `keras.layers.RNN`": "MoELSTMCell",
    "`ProjectedLSTMCell` in a `keras.layers.RNN`": "ProjectedLSTMCell",
    "`AttentionLSTM`": "AttentionLSTM",
}
BLOCKS = {
    "`MultiplicativeAttention`": "MultiplicativeAttention",
    "`CachedAttention`": "CachedAttention",
    "`MoETransformerBlock`": "MoETransformerBlock",
    "`MoETransformerBlock` with an encoder": (
        "MoETransformerBlock, dense with an encoder, post-norm"
    ),
    "`SampledSoftmax`": "SampledSoftmax",
}
MODELS = {
    "`MoELanguageModel`": "MoELanguageModel",
    "`MoELanguageModel`, sampled": "MoELanguageModel, sampled",
    "`MoETransformerLanguageModel`": "MoETransformerLanguageModel",
    "`MoETranslator`": "MoETranslator",
}
PARTS = {
    "mixtures": MIXTURES,
    "recurrences": RECURRENCES,
    "blocks": BLOCKS,
    "models": MODELS,
}
ROWS = {name: row for part in PARTS.values() for name, row in part.items()}
COLUMNS = {
    "`MirroredStrategy`": {"engine": "mirrored", "devices": 2},
    "`MirroredStrategy`, 2 x 2": {
        "engine": "mirrored",
        "devices": 4,
        "expert_parallel_size": 2,
    },
    "`MultiWorkerMirroredStrategy`": {"engine": "processes", "devices": 1},
    "mesh": {"engine": "mesh", "devices": 2},
    "mesh, 2 x 2": {"engine": "mesh", "devices": 4, "expert_parallel_size": 2},
}


def results(settings, names):
    """What the child found of each row, in the order of their names."""
    settings = {**settings, "rows": [ROWS[name] for name in names]}
    if settings["engine"] == "processes":
        # All processes end with the same.
        found, *_ = children.run_workers("engine_table_child", settings, timeout=1500)
    else:
        found = children.run("engine_table_child", settings, timeout=1500)
    return [found[ROWS[name]] for name in names]


def cell(result):
    """Yes or no, if that is what the result is."""
    if "refused" in result:
        assert "Received" in result["refused"], result
        return "no"
    assert result["start"] == 0.0, result
    # The run must have learned something, or its end says nothing.
    assert result["moved"] > 1e-3, result
    assert result["losses"] <= 1e-5, result
    assert result["weights"] <= 1e-5, result
    return "yes"


def main():
    columns = sys.argv[1:] or [*COLUMNS]
    found = {
        column: dict(zip(ROWS, results(COLUMNS[column], [*ROWS]), strict=True))
        for column in columns
    }
    for column, rows in found.items():
        for name, result in rows.items():
            print(f"{column}: {name}: {result.get('weights', 'refused')}")
    print(f"| layer | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name in ROWS:
        cells = " | ".join(cell(found[column][name]) for column in columns)
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
