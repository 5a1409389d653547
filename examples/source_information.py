"""How much trained translation models take from the source sentence.

    python examples/source_information.py runs/translation/model.keras runs/dense/model.keras

For each model and direction the perplexity of the test targets after their own source,
and after the source of another sentence. The difference of the two log losses, nats a
subword, is what the source tells the model; the rest of its perplexity it owes to the
target words before. Models of equal perplexity can differ in it, and then in BLEU.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from gate_noise import encoded, pairs_parser, read_corpus, total_loss


def losses(model, batches):
    """`(2, 2)`: log losses and subwords, after the own and after another source."""
    others = [(tf.roll(source, 1, axis=0), target) for source, target in batches]
    return np.stack([total_loss(model, b) for b in (batches, others)])


def main(arguments=None):
    parser = pairs_parser(__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="model.keras that train-mt wrote")
    arguments = parser.parse_args(arguments)
    corpus = read_corpus(arguments)
    short = {d for d, (s, _) in corpus.pairs["test"].items() if len(s) < 2}
    if short or arguments.sentences < 2:
        parser.error(
            "each direction needs at least 2 test pairs, for a sentence has another's "
            f"source. Received: --sentences {arguments.sentences}, one pair in "
            f"{sorted(short)}. Take more."
        )
    for path in arguments.models:
        model = keras.saving.load_model(path, compile=False)
        pairs = encoded(model, corpus, arguments.sentences)
        rows = {
            direction: losses(model, batches) for direction, batches in pairs.items()
        }
        rows["all"] = sum(rows.values())
        print(f"\n{path}\n")
        print("| direction | own source | another | the source tells |")
        print("|---|---|---|---|")
        for direction, totals in rows.items():
            own, other = totals[:, 0] / totals[:, 1]
            print(
                f"| {direction} | {np.exp(own):.2f} | {np.exp(other):.2f} | "
                f"{other - own:.3f} |"
            )


if __name__ == "__main__":
    main()
