"""How evenly the experts of a mixture named "moe" are used in training."""

import numpy as np

from keras_moe.layers.routing_record import recorded_routing


def balance_in_training(model, batches):
    """Statistics of table 6: in training mode, over several batches.

    Args:
        model: Has a mixture named "moe".
        batches: What the model is called with.

    Returns:
        Dict of the means over the batches of `importance_cv`, `load_cv` and
        `max_over_mean` (of the smooth load), `count_cv` and `count_max_over_mean` (of
        the true counts); and of `least_count` and `most_count`, the fewest and the most
        tokens of an expert in a batch.
    """
    moe = model.get_layer("moe")
    rows, counts = [], []
    for batch in batches:
        with recorded_routing([moe]) as records:
            model(batch, training=True)
        statistics = records["moe"][0].result.statistics
        importance = np.asarray(statistics.importance, "float64")
        load = np.asarray(statistics.load, "float64")
        counts.append(np.asarray(statistics.counts))
        rows.append(
            [
                _cv(importance),
                _cv(load),
                load.max() / load.mean(),
                _cv(counts[-1]),
                counts[-1].max() / counts[-1].mean(),
            ]
        )
    names = (
        "importance_cv",
        "load_cv",
        "max_over_mean",
        "count_cv",
        "count_max_over_mean",
    )
    return {
        **dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True)),
        "least_count": int(np.min(counts)),
        "most_count": int(np.max(counts)),
    }


def _cv(values):
    return float(values.std() / values.mean())
