"""What the share of choices that noise leaves costs a training step of `MoE`.

    python examples/benchmarks/choices_kept_benchmark.py

A step of one mixture (outputs, all losses, all gradients), in turn with the share
counted and without; and the share by itself, of logits of the same shape. `--quick` is
a tiny run that only shows that everything works.
"""

import argparse
import os
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from alternating import compare, make_steps

from keras_moe import functional, layers


def training_step(a, counted):
    """A function of the tokens, of a mixture of its own."""
    keras.utils.set_random_seed(0)
    layer = layers.MoE(
        layers.FeedForwardExperts(a.experts, a.hidden_units),
        layers.NoisyTopKGating(k=a.k, gate_initializer="glorot_uniform"),
    )
    layer.build((None, a.width))

    def call(x, training):
        if counted:
            return layer(x, training=training), layer.losses
        with mock.patch.object(functional, "choices_kept", return_value=()):
            return layer(x, training=training), layer.losses

    variables = [variable.value for variable in layer.trainable_variables]
    return make_steps(call, variables)["training"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden-units", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.tokens, a.width, a.hidden_units, a.experts, a.pairs = 32, 8, 8, 6, 3
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(a.tokens, a.width)), tf.float32)
    sides = [training_step(a, counted) for counted in (True, False)]
    (_, step), ratios = compare(*sides, [x], a.pairs)

    logits = tf.constant(rng.normal(size=(a.tokens, a.experts)), tf.float32)
    _, chosen = functional.top_k_gating(rng.normal(size=logits.shape), a.k)
    share = tf.function(lambda logits: functional.choices_kept(logits, chosen))
    nothing = tf.function(lambda logits: logits[0, 0])
    (alone, idle), _ = compare(share, nothing, [logits], max(a.pairs, 20))
    print(
        f"{a.tokens} tokens, {a.width} wide, {a.experts} experts, k={a.k}, "
        f"{a.hidden_units} hidden units, {a.pairs} pairs; milliseconds\n\n"
        "| step | share of choices by itself | of a step | with / without, quartiles |\n"
        "|---|---|---|---|\n"
        f"| {step * 1e3:.0f} | {(alone - idle) * 1e3:.2f} | {(alone - idle) / step:.2%} "
        f"| {ratios[0]:.3f}, {ratios[1]:.3f}, {ratios[2]:.3f} |"
    )


if __name__ == "__main__":
    main()
