"""Makes the mistakes of users on two devices and prints what they are told."""

import json
import sys
import warnings
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from tests.distribution import child

INPUTS = np.ones((8, 4), "float32")


def build(**options):
    layer = keras_moe.layers.MoE(
        keras_moe.layers.FeedForwardExperts(4, 8),
        keras_moe.layers.NoisyTopKGating(k=2),
        **options,
    )
    return keras.Sequential([keras.Input((4,)), layer])


def fit(model):
    model.fit(INPUTS, INPUTS, verbose=0)


def built_outside(strategy):
    model = build()
    with strategy.scope():
        outer = keras.Sequential([keras.Input((4,)), model])
        outer.compile("sgd", "mse")
    fit(outer)


def other_strategy(strategy):
    with strategy.scope():
        model = build()
    other = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    step = tf.function(lambda x: other.run(model, args=(x,)))
    step(tf.constant(INPUTS))


def compiled_with(**options):
    def make(strategy):
        with strategy.scope():
            model = build()
            model.compile("sgd", "mse", **options)
        fit(model)

    return make


def xla(strategy):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled_with(jit_compile=True)(strategy)


def lamb(strategy):
    with strategy.scope():
        model = build()
        model.compile(keras.optimizers.Lamb(), "mse")
    fit(model)


def built_in_replica(strategy):
    with strategy.scope():
        layer = keras_moe.layers.MoE(
            keras_moe.layers.FeedForwardExperts(4, 8),
            keras_moe.layers.NoisyTopKGating(k=2),
        )
    tf.function(lambda x: strategy.run(layer, args=(x,)))(tf.constant(INPUTS))


def in_a_loop(make_cell):
    """A recurrence of Keras whose cell asks the other replicas in every step."""

    def train(strategy):
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input((3, 4)), keras.layers.RNN(make_cell())]
            )
            model.compile("sgd", "mse")
        model.fit(np.ones((8, 3, 4), "float32"), INPUTS, verbose=0)

    return train


def counting_cell():
    return keras_moe.layers.MoELSTMCell(4, 3, keras_moe.layers.LossFreeGating(k=2))


class CellWithMixture(keras.layers.Layer):
    """The state is what a mixture makes of input and state."""

    state_size = output_size = 4

    def __init__(self):
        super().__init__()
        self.moe = keras_moe.layers.MoE(
            keras_moe.layers.FeedForwardExperts(3, 8), keras_moe.layers.TopKGating(k=2)
        )

    def build(self, input_shape):
        self.moe.build(input_shape)

    def call(self, inputs, states):
        state = self.moe(inputs + states[0])
        return state, [state]


def in_scope_of(kind):
    """A strategy that cannot be made on this machine: only its class counts."""

    def make(_):
        strategy = mock.Mock(spec=kind, num_replicas_in_sync=2)
        strategy.__class__ = kind
        with (
            mock.patch.object(tf.distribute, "has_strategy", return_value=True),
            mock.patch.object(tf.distribute, "get_strategy", return_value=strategy),
        ):
            experts = keras_moe.layers.FeedForwardExperts(4, 8)
            keras_moe.layers.MoE(experts).build((None, 4))

    return make


def plain(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
        model.compile(keras.optimizers.Adam(clipnorm=1.0), "mse")
    fit(model)


def dense_eager(strategy):
    """A layer of this package without experts."""
    strategy = child.strategy_of(strategy.num_replicas_in_sync)
    with strategy.scope():
        layer = keras_moe.layers.CachedAttention(2, 2)
        model = keras.Sequential([keras.Input((3, 4)), layer])
        model.compile(keras.optimizers.Adam(clipnorm=1.0), "mse", run_eagerly=True)
    x = np.ones((10, 3, 4), "float32")
    model.fit(x, x, batch_size=4, verbose=0)


def second_strategy(strategy):
    """Another model, of other shapes, under another strategy of the process."""
    other = child.strategy_of(strategy.num_replicas_in_sync)
    with other.scope():
        model = keras.Sequential([build(), keras.layers.Dense(7)])
        model.compile("sgd", "mse")
    model.fit(INPUTS, np.ones((8, 7), "float32"), verbose=0)


def devices_in_other_order(_):
    other = tf.distribute.MirroredStrategy(["CPU:1", "CPU:0"])
    with other.scope():
        build()


def size_of(value, build_first=False):
    def make(strategy):
        if build_first:
            strategy = child.strategy_of(strategy.num_replicas_in_sync)
            with strategy.scope():
                build()
        keras_moe.distribution.set_expert_parallel_size(strategy, value)

    return make


def size_of_kind(kind, value=1):
    """Only the class of the strategy counts."""

    def make(_):
        strategy = mock.Mock(spec=kind, num_replicas_in_sync=value)
        strategy.__class__ = kind
        keras_moe.distribution.set_expert_parallel_size(strategy, value)

    return make


def words(optimizer=None, build_first=False):
    """Shares words out, before a model is built or after it."""

    def make(strategy):
        strategy = child.strategy_of(strategy.num_replicas_in_sync)
        if not build_first:
            keras_moe.distribution.shard_vocabulary(strategy)
        with strategy.scope():
            model = keras_moe.models.MoELanguageModel(5, 4)
            model.build((None, 3))
            if optimizer is not None:
                optimizer.build(model.trainable_variables)
        keras_moe.distribution.shard_vocabulary(strategy)

    return make


def words_of_kind(kind):
    def make(_):
        strategy = mock.Mock(spec=kind, num_replicas_in_sync=2)
        strategy.__class__ = kind
        keras_moe.distribution.shard_vocabulary(strategy)

    return make


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    strategy = child.strategy_of(settings["devices"])
    cases = {
        "built_outside": built_outside,
        "other_strategy": other_strategy,
        "xla": xla,
        "eager": compiled_with(run_eagerly=True),
        "steps_per_execution": compiled_with(steps_per_execution=4),
        "parameter_server": in_scope_of(tf.distribute.ParameterServerStrategy),
        "tpu": in_scope_of(tf.distribute.TPUStrategy),
        "lamb": lamb,
        "built_in_replica": built_in_replica,
        "plain": plain,
        "dense_eager": dense_eager,
        "second_strategy": second_strategy,
        "device_order": devices_in_other_order,
        "size_3": size_of(3),
        "size_0": size_of(0),
        "size_float": size_of(1.0),
        "size_later": size_of(1, build_first=True),
        "size_as_before": size_of(2, build_first=True),
        "size_parameter_server": size_of_kind(tf.distribute.ParameterServerStrategy, 2),
        "size_one_device": size_of_kind(tf.distribute.OneDeviceStrategy),
        "size_dtensor": size_of_kind(keras_moe.distribution.DTensorStrategy, 2),
    }
    adam = keras_moe.optimizers.FactoredAdam
    cases |= {
        "counts_in_a_loop": in_a_loop(counting_cell),
        "mixture_in_a_loop": in_a_loop(CellWithMixture),
        "words_later": words(build_first=True),
        "words_untouched": words(adam(untouched_rows="keep")),
        "words_factored": words(adam(factored=["embeddings"])),
        "words_adafactor": words(keras.optimizers.Adafactor()),
        "words_lamb": words(keras.optimizers.Lamb()),
        "words_parameter_server": words_of_kind(tf.distribute.ParameterServerStrategy),
        "words_again": words(),
    }
    found = {}
    for name, make in cases.items():
        found[name] = "", ""
        keras.utils.clear_session()  # not within a scope, which it would break
        try:
            make(strategy)
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
