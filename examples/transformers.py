"""Transformers with mixtures of experts, beside dense ones of equal operations.

    python examples/transformers.py                      # both, some minutes
    python examples/transformers.py --task language      # what language is a string?
    python examples/transformers.py --task text          # which word comes next?

`language`: an encoder reads strings of user interfaces, character by character, and says
which of seven languages they are in. `text`: a causal model with rotary positions reads
three novels, gives the perplexity of others of their chapters, and writes a line with
cached keys and values. Both corpora come with the package.

In the mixture every second block has 8 experts, of which a token meets 2; the network of
its dense twin is as wide as those 2 together.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_moe

EXPERTS, K = 8, 2


def blocks(settings, mixed, causal):
    """The blocks of one model, every second with a mixture, or all of them dense."""
    made = []
    for index in range(settings.blocks):
        moe = None
        if mixed and index % 2:
            moe = keras_moe.layers.MoE(
                keras_moe.layers.FeedForwardExperts(
                    EXPERTS, settings.hidden_units // K, activation="gelu"
                ),
                keras_moe.layers.NoisyTopKGating(k=K),
                importance_loss_weight=0.01,
                load_loss_weight=0.01,
            )
        made.append(
            keras_moe.layers.MoETransformerBlock(
                settings.heads,
                moe,
                feed_forward=None if moe else settings.hidden_units,
                causal=causal,
                max_wavelength=10000.0,
                dropout=0.1,
            )
        )
    return made


def languages(settings):
    """Accuracy of an encoder and of its dense twin."""
    corpus = keras_moe.data.load_translation_corpus()
    names = sorted({name for d in corpus.directions for name in d.split("-", 1)})
    splits = {split: strings(corpus, split, names) for split in ("train", "test")}
    characters = sorted(set("".join(splits["train"][0])))
    numbers = {c: i for i, c in enumerate(characters, start=2)}  # 0 padding, 1 unknown

    def encoded(split):
        texts, labels = splits[split]
        ids = np.zeros((len(texts), settings.length), "int32")
        for row, text in zip(ids, texts, strict=True):
            known = [numbers.get(c, 1) for c in text[: settings.length]]
            row[: len(known)] = known
        return ids, np.array(labels)

    train, test = encoded("train"), encoded("test")
    print(f"{len(train[1])} strings to learn from, {len(test[1])} others, {names}")
    for mixed in (True, False):
        keras.utils.set_random_seed(settings.seed)
        inputs = keras.Input((settings.length,), dtype="int32")
        x = keras.layers.Embedding(len(characters) + 2, settings.units, mask_zero=True)(
            inputs
        )
        for block in blocks(settings, mixed, causal=False):
            x = block(x)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.GlobalAveragePooling1D()(x)  # without the padding
        model = keras.Model(inputs, keras.layers.Dense(len(names))(x))
        model.compile(
            keras.optimizers.Adam(settings.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        seconds = fit(model, train, settings, "accuracy")
        found = model.evaluate(*test, batch_size=256, verbose=0, return_dict=True)
        describe(mixed, model, seconds, f"accuracy {found['accuracy']:.3f}")


def strings(corpus, split, names):
    """Strings of a split, each once, in an order of their own; number of the language."""
    found = {}
    for direction, sides in corpus.pairs[split].items():
        for name, side in zip(direction.split("-", 1), sides, strict=True):
            found.update((text, names.index(name)) for text in side)
    texts = sorted(found)
    np.random.default_rng(0).shuffle(texts)
    return texts, [found[text] for text in texts]


def novels(settings):
    """Perplexity of a causal model and of its dense twin; a line of text."""
    corpus = keras_moe.data.load_text_corpus(min_count=settings.min_count)
    train = corpus.dataset("train", settings.batch_size, settings.length).repeat()
    test = corpus.dataset("test", settings.batch_size, settings.length)
    print(f"{len(corpus.vocabulary)} words, {corpus.num_tokens('train')} to learn from")
    for mixed in (True, False):
        keras.utils.set_random_seed(settings.seed)
        model = keras_moe.models.MoETransformerLanguageModel(
            len(corpus.vocabulary),
            blocks(settings, mixed, causal=True),
            units=settings.units,
            tied=True,
            dropout=0.1,
        )
        model.compile(
            keras.optimizers.Adam(settings.learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        seconds = fit(model, train, settings)
        loss = model.evaluate(test, verbose=0, return_dict=True)["loss"]
        describe(mixed, model, seconds, f"perplexity {np.exp(loss):.1f}")
        if not mixed:
            continue
        tokens = next(iter(test))[0]
        for name, (experts, _) in model.routing(tokens).items():
            counts = np.bincount(experts[experts >= 0], minlength=EXPERTS)
            shares = " ".join(f"{share:.0%}" for share in counts / counts.sum())
            print(f"  shares of the experts of {name}: {shares}")
        start = corpus.vocabulary.encode(["<eos>", "She", "was"])
        line = model.generate([start], settings.words, temperature=0.8, seed=1)[0]
        print(f"  {corpus.vocabulary.to_text(line[1:])}")


def fit(model, data, settings, metric="loss"):
    """Trains for so many steps and returns the seconds."""
    started = time.perf_counter()
    if isinstance(data, tuple):
        epochs = max(1, settings.steps * settings.batch_size // len(data[0]))
        rows = settings.steps * settings.batch_size // epochs
        inputs, labels = (part[:rows] for part in data)
        history = model.fit(
            inputs, labels, settings.batch_size, epochs=epochs, verbose=0
        )
    else:
        history = model.fit(
            data, steps_per_epoch=settings.steps, verbose=0, shuffle=False
        )
    print(f"  {metric} in training {history.history[metric][-1]:.3f}", flush=True)
    return time.perf_counter() - started


def describe(mixed, model, seconds, result):
    kind = "mixture" if mixed else "dense"
    print(
        f"{kind}: {result}; {model.count_params() / 1e3:.0f} thousand weights, "
        f"{seconds:.0f} s of training",
        flush=True,
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["language", "text"], help="one of the two")
    parser.add_argument("--steps", type=int, default=300, help="of training, each")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of a model")
    parser.add_argument("--units", type=int, default=64, help="width of a model")
    parser.add_argument(
        "--hidden-units", type=int, default=256, help="dense, or 2 experts"
    )
    parser.add_argument("--heads", type=int, default=4, help="heads of the attention")
    parser.add_argument("--length", type=int, default=48, help="characters or words")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=0.003, help="of Adam")
    parser.add_argument(
        "--min-count", type=int, default=5, help="of rarer words: <unk>"
    )
    parser.add_argument("--words", type=int, default=40, help="to write")
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.steps, settings.units, settings.hidden_units = 3, 8, 16
        settings.min_count, settings.length, settings.words = 200, 64, 5
    for task in [settings.task] if settings.task else ["language", "text"]:
        print(f"\n=== {task} ===", flush=True)
        (languages if task == "language" else novels)(settings)


if __name__ == "__main__":
    main()
