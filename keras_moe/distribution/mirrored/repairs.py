"""Repairs that `fit` needs under the mirrored strategies.

Of Keras 3.15.1 and TensorFlow 2.20.0. `tests/distribution/test_repairs.py` does without
them and fails when one is no longer needed.
"""

import functools

import tensorflow as tf

from keras_moe.distribution import compatibility, lost_workers

_MIRRORED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)
_installed = False


def install() -> None:
    """Makes the repairs. The second call does nothing."""
    global _installed
    if not _installed:
        install_symbolic_build()
        install_reduction()
        install_untuned_batches()
        install_lost_workers()
    _installed = True


def _in_many_processes(strategy):
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def install_symbolic_build() -> None:
    """Builds a model from a batch of one replica.

    Keras takes the mean of the batches of all replicas, only for its shape and type.
    That turns token ids into floats and fails for batches of different sizes; with
    several processes it passes values on that still belong to replicas.
    """
    kind = compatibility.TensorFlowTrainer
    stock = kind._maybe_symbolic_build

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self._distribute_strategy
        if not isinstance(strategy, _MIRRORED):
            return stock(self, iterator, data_batch)
        if iterator is not None:
            for _, _, batches in iterator:
                data_batch = tf.nest.map_structure(
                    lambda value: strategy.experimental_local_results(value)[0],
                    next(batches),
                )
                break
        with strategy.scope():
            self._symbolic_build(data_batch=data_batch)
        return None

    kind._maybe_symbolic_build = _maybe_symbolic_build


def install_reduction() -> None:
    """Takes the mean of the replicas' metrics, which are scalars.

    Keras asks for that of their first axis, which they do not have.
    """
    module = compatibility.trainer_module
    stock = module.reduce_per_replica

    def reduce_per_replica(values, strategy, reduction):
        if _in_many_processes(strategy) and reduction in ("auto", "mean"):
            return tf.nest.map_structure(
                lambda value: strategy.reduce("MEAN", value, axis=None), values
            )
        return stock(values, strategy, reduction)

    module.reduce_per_replica = reduce_per_replica


def install_untuned_batches() -> None:
    """Hands batches to devices by pipelines that nothing tunes.

    They only make a batch ahead. A thread that tunes one may sleep on when `fit` has done
    with it, and `fit` waits for that: as long again as it has run, a minute at most.
    """
    module = compatibility.device_iterators
    stock = module._create_device_dataset
    options = tf.data.Options()
    options.autotune.enabled = False

    @functools.wraps(stock)
    def _create_device_dataset(*args, **kwargs):
        return stock(*args, **kwargs).with_options(options)

    module._create_device_dataset = _create_device_dataset


def install_lost_workers() -> None:
    """Lets the error of a lost worker end in a line that says which it was.

    TensorFlow names it in the midst of many lines, or not at all.
    """
    for name in ("fit", "evaluate", "predict"):
        _name_lost_workers(compatibility.TensorFlowTrainer, name)


def _name_lost_workers(kind, name):
    stock = getattr(kind, name)

    @functools.wraps(stock)
    def named(self, *args, **kwargs):
        try:
            return stock(self, *args, **kwargs)
        except tf.errors.OpError as error:
            lost = lost_workers.describe(error, self._distribute_strategy)
            if lost is not None and lost not in error.message:
                error._message = f"{error.message}\n{lost}"
            raise

    setattr(kind, name, named)
