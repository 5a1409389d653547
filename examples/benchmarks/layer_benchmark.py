"""The MoE layer against a dense layer of equal operations, and against other packages.

    python examples/benchmarks/layer_benchmark.py --picture layer.png
    python examples/benchmarks/layer_benchmark.py --peers    # tf-models-official, keras-hub
    python examples/benchmarks/layer_benchmark.py --products # the experts' products alone
    python examples/benchmarks/layer_benchmark.py --bound --optimizer adam
    python examples/benchmarks/layer_benchmark.py --optimizer factored_adam

The dense feed-forward layer has k times the hidden units of an expert, so it spends the
same multiply-adds on a token as k experts: it is what a mixture could cost at best on one
device. How near a machine lets it come to that depends on how fast it reads the weights of
many experts: the limit beside it is the longer of the time of the dense layer and of the
time that the memory takes for the weights (`bandwidth.py`). `--products` compares with what no
layer can leave out, the products of the experts, done by NumPy one expert at a time with as
many threads as there are cores. `--optimizer` adds a step that ends with the optimizer's.
`--bound` says how near the dense layer a mixture could come at all: the products of each
expert with an equal number of rows, by TensorFlow, then what the memory takes to put the
gradients together and for the optimizer, one after the other since both want the same cores.
The two sides alternate in one run; a ratio above 1 means the mixture is faster.
`--quick` is a tiny run that only shows that everything works.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# One thread a product: the threads of `make_products` are over experts.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import bandwidth
import keras
import numpy as np
import tensorflow as tf
from alternating import compare, make_steps

from keras_moe import layers, optimizers
from keras_moe.functional import expert_products

HEADER = (
    "| experts | step | {other} (ms) | mixture (ms) | {other} / mixture | quartiles |{more}"
    "\n|---|---|---|---|---|---|{lines}"
)
LIMIT = {"more": bandwidth.HEADER.format("mixture"), "lines": bandwidth.LINES}
OPTIMIZERS = {
    "sgd": keras.optimizers.SGD,
    "adam": keras.optimizers.Adam,
    "factored_adam": optimizers.FactoredAdam,
}


def make_mixture(num_experts, units, hidden_units, k, optimizer=None):
    layer = layers.MoE(
        layers.FeedForwardExperts(num_experts, hidden_units),
        layers.NoisyTopKGating(k=k),
    )
    layer.build((None, units))
    # Columns of equal norm route about as evenly as a gate trained with the losses.
    kernel = layer.gating.gate_kernel
    kernel.assign(0.1 * tf.math.l2_normalize(tf.random.normal(kernel.shape), axis=0))

    def call(x, training):
        return layer(x, training=training), layer.losses

    return make_steps(call, layer.trainable_variables, made(optimizer))


def made(optimizer):
    """A new one of that name; rates that leave the weights as they are, nearly."""
    return optimizer and OPTIMIZERS[optimizer](1e-6)


def make_dense(units, hidden_units, k, optimizer=None):
    model = keras.Sequential(
        [
            keras.layers.Dense(k * hidden_units, "relu", use_bias=False),
            keras.layers.Dense(units, use_bias=False),
        ]
    )
    model.build((None, units))

    def call(x, training):
        return model(x, training=training), []

    return make_steps(call, model.trainable_variables, made(optimizer))


def make_products(num_experts, tokens, units, hidden_units, k):
    """The experts' products alone: rows lie in order, without gate, dispatch, combine."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, dtype="float32")

    first = random(num_experts, units, hidden_units)
    last = random(num_experts, hidden_units, units)
    rows = random(num_experts, tokens * k // num_experts, units)
    pool = ThreadPoolExecutor(os.cpu_count())

    def forward(_):
        def run(e):
            hidden = rows[e] @ first[e]
            return np.maximum(hidden, 0, out=hidden) @ last[e]

        return list(pool.map(run, range(num_experts)))

    def training(_):
        # As a step does it, gradients of the kernels are new arrays each time.
        d_first, d_last = np.empty_like(first), np.empty_like(last)

        def run(e):
            hidden = rows[e] @ first[e]
            np.maximum(hidden, 0, out=hidden)
            d_outputs = hidden @ last[e]  # stands for the gradient of the outputs
            np.matmul(hidden.T, d_outputs, out=d_last[e])
            d_hidden = d_outputs @ last[e].T
            d_hidden *= hidden > 0
            np.matmul(rows[e].T, d_hidden, out=d_first[e])
            return d_hidden @ first[e].T

        return list(pool.map(run, range(num_experts)))

    return {"forward": forward, "training": training}


def make_bare(num_experts, tokens, units, hidden_units, k):
    """The same by TensorFlow's fastest products: nothing is put together or given back."""
    rows = tokens * k // num_experts
    shapes = (1, rows, units), (1, units, hidden_units), (1, hidden_units, units)
    experts = [
        [tf.random.normal(shape) for shape in shapes] for _ in range(num_experts)
    ]

    def first_of(tensors):
        return tf.add_n([tf.reshape(each, [-1])[0] for each in tensors])

    @tf.function
    def forward(_):
        return first_of(
            expert_products.times(expert_products.times(x, first), last)
            for x, first, last in experts
        )

    @tf.function
    def training(_):
        made = []
        for x, first, last in experts:
            hidden = expert_products.times(x, first)
            dy = expert_products.times(hidden, last)  # stands for a gradient
            made.append(expert_products.gradient_of_kernel(hidden, dy, last))
            d_hidden = expert_products.gradient_of_rows(dy, last)
            made.append(expert_products.gradient_of_kernel(x, d_hidden, first))
        return first_of(made)

    return {"forward": forward, "training": training}


def make_tf_models(num_experts, units, hidden_units, k, tokens):
    """tf-models-official: experts choose, capacity for k experts a token on average."""
    from official.nlp.modeling.layers import moe

    layer = moe.MoeLayer(
        moe.FeedForwardExperts(num_experts, hidden_units, activation=tf.nn.relu),
        moe.ExpertsChooseMaskedRouter(num_experts),
        train_capacity_factor=float(k),
        eval_capacity_factor=float(k),
    )

    def call(x, training):
        outputs = layer(tf.reshape(x, [1, tokens, units]), training=training)
        return outputs, layer.losses

    call(tf.zeros((tokens, units)), True)
    return make_steps(call, layer.trainable_variables)


def make_keras_hub(num_experts, units, hidden_units, k, tokens):
    """keras-hub's Mixtral block. Its experts have three matrices instead of two."""
    from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

    layer = MixtralSparseMoeBlock(units, 2 * hidden_units // 3, num_experts, k)

    def call(x, training):
        x = tf.reshape(x, [1, tokens, units])
        return layer(x, training=training)[0], layer.losses

    layer.build((1, tokens, units))
    return make_steps(call, layer.trainable_variables)


def row(name, other, mixture, x, pairs, memory_s=None):
    """Prints one row, with a limit if the time of the memory is given; its ratio."""
    (other_s, mixture_s), (low, middle, high) = compare(other, mixture, (x,), pairs)
    limit = ""
    if memory_s is not None:
        limit = bandwidth.cells(mixture_s, other_s, memory_s)
    print(
        f"| {name} | {other_s * 1e3:.1f} | {mixture_s * 1e3:.1f} | {middle:.2f} "
        f"| {low:.2f} - {high:.2f} |{limit}",
        flush=True,
    )
    return middle


def against_dense(a):
    memory = bandwidth.measure(a.threads, a.quick)
    print(f"{memory}\n")
    print(HEADER.format(other="dense", **LIMIT))
    x = tf.random.normal((a.tokens, a.units))
    dense = make_dense(a.units, a.hidden_units, a.k, a.optimizer)
    ratios = {}
    for num_experts in a.experts:
        mixture = make_mixture(num_experts, a.units, a.hidden_units, a.k, a.optimizer)
        num_bytes = bandwidth.weight_bytes(num_experts, a.units, a.hidden_units)
        for step in dense:
            start = time.perf_counter()
            mixture[step](x)
            first = time.perf_counter() - start
            ratios[num_experts, step] = row(
                f"{num_experts} | {step}",
                dense[step],
                mixture[step],
                x,
                a.pairs,
                memory.least_seconds(
                    step, num_bytes, a.optimizer if step == "update" else None
                ),
            )
            if num_experts == max(a.experts):
                print(f"<!-- first call of {step}: {first:.1f} s -->", flush=True)
    return ratios


def against_bound(a):
    memory = bandwidth.measure(a.threads, a.quick)
    print(
        f"{memory}\n\n| experts | step | dense (ms) | products (ms) | memory (ms) "
        "| at best, dense / mixture | mixture (ms) | dense / mixture |\n"
        + "|---" * 8
        + "|"
    )
    x = tf.random.normal((a.tokens, a.units))
    dense = make_dense(a.units, a.hidden_units, a.k, a.optimizer)
    for num_experts in a.experts:
        mixture = make_mixture(num_experts, a.units, a.hidden_units, a.k, a.optimizer)
        bare = make_bare(num_experts, a.tokens, a.units, a.hidden_units, a.k)
        size = bandwidth.weight_bytes(num_experts, a.units, a.hidden_units)
        for step in dense:
            products = bare["forward" if step == "forward" else "training"]
            # Pairs of dense and products, and of dense and mixture, in turns.
            (dense_s, products_s), _ = compare(dense[step], products, (x,), a.pairs)
            (_, mixture_s), ratios = compare(dense[step], mixture[step], (x,), a.pairs)
            memory_s = memory.seconds_after_products(
                step, size, a.optimizer if step == "update" else None
            )
            print(
                f"| {num_experts} | {step} | {dense_s * 1e3:.1f} | {products_s * 1e3:.1f} "
                f"| {memory_s * 1e3:.1f} | {dense_s / (products_s + memory_s):.2f} "
                f"| {mixture_s * 1e3:.1f} | {ratios[1]:.2f} |",
                flush=True,
            )


def against_products(a):
    print(HEADER.format(other="products", more="", lines=""))
    x = tf.random.normal((a.tokens, a.units))
    for num_experts in a.experts:
        mixture = make_mixture(num_experts, a.units, a.hidden_units, a.k)
        products = make_products(num_experts, a.tokens, a.units, a.hidden_units, a.k)
        for step in ("forward", "training"):
            name = f"{num_experts} | {step}"
            row(name, products[step], mixture[step], x, a.pairs)


def against_peers(a):
    tokens, small = a.tokens, min(a.tokens, 512)
    for name, make, experts, k, n, steps in (
        ("tf-models-official", make_tf_models, 32, a.k, tokens, ("training",)),
        ("keras-hub", make_keras_hub, 64, 2, small, ("forward",)),
    ):
        print(
            f"\n{n} tokens, k = {k}\n\n" + HEADER.format(other=name, more="", lines="")
        )
        x = tf.random.normal((n, a.units))
        experts = min(experts, max(a.experts))
        try:
            peer = make(experts, a.units, a.hidden_units, k, n)
        except ImportError as error:
            print(f"| not installed: {error} | | | | | |")
            continue
        mixture = make_mixture(experts, a.units, a.hidden_units, k)
        for step in steps:
            row(f"{experts} | {step}", peer[step], mixture[step], x, a.pairs)


def draw(ratios, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for step in dict.fromkeys(step for _, step in ratios):
        points = [(e, ratio) for (e, s), ratio in ratios.items() if s == step]
        axes.plot(*zip(*points, strict=True), marker="o", label=step)
    axes.axhline(1.0, color="grey", linewidth=1, label="dense layer")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({e for e, _ in ratios}), sorted({e for e, _ in ratios}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("number of experts")
    axes.set_ylabel("speed relative to the dense layer")
    axes.set_title("Mixture of k experts against a dense layer of equal operations")
    axes.title.set_fontsize(10)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--experts",
        type=int,
        nargs="+",
        default=[4, 32, 64, 256],
        help="numbers of experts",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--units", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=1024, help="hidden units of an expert"
    )
    parser.add_argument("--k", type=int, default=4, help="experts for each token")
    parser.add_argument(
        "--pairs", type=int, default=7, help="pairs of alternating measurements"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--optimizer",
        choices=list(OPTIMIZERS),
        help="measure a step with its update too",
    )
    parser.add_argument("--threads", type=int, help="at most; default: one a core")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--peers", action="store_true", help="compare with packages")
    against.add_argument(
        "--products", action="store_true", help="compare with bare products by NumPy"
    )
    against.add_argument(
        "--bound", action="store_true", help="how near the dense layer it could come"
    )
    parser.add_argument("--picture", help="file to draw the ratios to")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.threads:
        tf.config.threading.set_intra_op_parallelism_threads(a.threads)
        tf.config.threading.set_inter_op_parallelism_threads(a.threads)
    if a.quick:
        a.experts, a.tokens, a.units, a.hidden_units, a.pairs = [4, 8], 64, 8, 12, 2
    keras.utils.set_random_seed(a.seed)
    print(
        f"{a.tokens} tokens, {a.units} units, {a.hidden_units} hidden units, k = {a.k}, "
        f"{a.pairs} pairs, TensorFlow {tf.__version__}, "
        f"{a.threads or os.cpu_count()} threads\n"
    )
    for chosen, compared in (
        (a.peers, against_peers),
        (a.products, against_products),
        (a.bound, against_bound),
    ):
        if chosen:
            compared(a)
            return
    ratios = against_dense(a)
    if a.picture:
        draw(ratios, a.picture)


if __name__ == "__main__":
    main()
