"""How much of what trained gates choose is noise.

    python -m keras_moe train-mt --output-dir runs/translation
    python examples/gate_noise.py runs/translation/model.keras

For each noisy gate of a translation model, over test pairs: the standard deviation of its
noise, the spread of its logits without noise, and how many of the choices without noise
the noise leaves as they were. Then the perplexity without noise in the gates, as at
inference, and with it, as in training (no dropout in either). A gate whose noise is as
large as the spread of its logits has not learnt to choose: its load is even in training
because it is drawn by lot, and uneven at inference.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_moe import data, functional
from keras_moe.data.translation import split_direction
from keras_moe.layers import NoisyTopKGating


class Observed:
    """Stands before a gate's `call`: notes its inputs, and may turn on its noise."""

    def __init__(self, gating):
        self.gating = gating
        self.call = gating.call
        self.noisy = False
        self.rows = []
        self.kept = np.zeros(2)  # shares of choices, summed, and tokens
        gating.call = self

    def __call__(self, inputs, mask=None, training=None, noise=None):
        if not self.noisy:
            self.rows.append(self._measure(inputs))
        return self.call(inputs, mask=mask, training=self.noisy)

    def _measure(self, inputs):
        """`(tokens, 2)`: noise, spread of the logits; counts the choices kept."""
        gating = self.gating
        clean = tf.matmul(inputs, gating.gate_kernel)
        if gating.use_bias:
            clean += gating.gate_bias
        stddev = gating.noise_stddev_of(inputs)
        noise = gating.draw_noise(tf.shape(clean)[0])
        noisy = functional.noisy_logits(clean, stddev, noise)
        _, chosen = functional.top_k_gating(noisy, gating.k)
        self.kept += np.array(functional.choices_kept(clean, chosen))
        columns = [tf.reduce_mean(stddev, axis=1), tf.math.reduce_std(clean, axis=1)]
        return tf.stack(columns, axis=1).numpy()


def total_loss(model, batches):
    """Log losses of all subwords and their number, ends of sentences included."""
    log_prob = sum(model.score(*batch).numpy().sum() for batch in batches)
    return np.array([-log_prob, sum((t.numpy() != 0).sum() for _, t in batches)])


def perplexity(model, batches):
    """Of all subwords."""
    loss, subwords = total_loss(model, batches)
    return np.exp(loss / subwords)


def encoded(model, corpus, sentences, batch_size=100):
    """Batches of test pairs as ids by direction, at most `sentences` of each."""
    batches = {direction: [] for direction in corpus.pairs["test"]}
    for direction, pairs in corpus.pairs["test"].items():
        language = split_direction(direction)[1]
        # Evenly spread: files may be sorted by length.
        step = max(1, len(pairs[0]) // sentences)
        sources, targets = (list(side[::step])[:sentences] for side in pairs)
        # Of about equal size, so that no batch has a single row by accident.
        for rows in np.array_split(
            np.arange(len(sources)), -(-len(sources) // batch_size)
        ):
            texts = [sources[i] for i in rows]
            source = model.vocabulary.encode_source(texts, [language] * len(texts))
            target = model.vocabulary.encode_target([targets[i] for i in rows])
            batches[direction].append((source.to_tensor(), target.to_tensor()))
    return batches


def pairs_parser(description):
    """A parser with the options that say which test pairs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data-dir", help="as for train-mt")
    parser.add_argument("--directions", help="as for train-mt")
    parser.add_argument(
        "--sentences", type=int, default=200, help="test pairs of each direction"
    )
    return parser


def read_corpus(arguments):
    """What the options of `pairs_parser` name."""
    directions = arguments.directions and arguments.directions.split(",")
    return data.load_translation_corpus(arguments.data_dir, directions=directions)


def main(arguments=None):
    parser = pairs_parser(__doc__.splitlines()[0])
    parser.add_argument("model", help="model.keras that train-mt wrote")
    arguments = parser.parse_args(arguments)
    keras.utils.set_random_seed(1)
    model = keras.saving.load_model(arguments.model, compile=False)
    found = encoded(model, read_corpus(arguments), arguments.sentences)
    batches = [batch for direction in found.values() for batch in direction]
    observed = {
        layer.name: Observed(layer.gating)
        for layer in model.moe_layers
        if isinstance(layer.gating, NoisyTopKGating) and layer.gating.has_noise
    }
    if not observed:
        raise SystemExit(f"{arguments.model} has no noisy gate.")
    results = {"no noise": perplexity(model, batches)}
    print("| gate | noise | spread of logits | choices that the noise leaves |")
    print("|---|---|---|---|")
    for name, gate in observed.items():
        noise, spread = np.concatenate(gate.rows).mean(axis=0)
        kept = gate.kept[0] / gate.kept[1]
        print(f"| {name} | {noise:.2f} | {spread:.2f} | {kept:.0%} |")
    for name, gate in observed.items():
        gate.noisy = True
        results[f"noise in {name}"] = perplexity(model, batches)
        gate.noisy = False
    print("\n| | perplexity |\n|---|---|")
    for title, value in results.items():
        print(f"| {title} | {value:.3f} |")


if __name__ == "__main__":
    main()
