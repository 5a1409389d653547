"""Mixtures on a GPU against dense layers of equal operations.

    python examples/benchmarks/gpu_benchmark.py            # everything, on the GPU
    python examples/benchmarks/gpu_benchmark.py --only layer --dtypes mixed_bfloat16
    python examples/benchmarks/gpu_benchmark.py --profile profile.md

`layer`: `MoE` against a dense feed-forward layer with k times the hidden units, forward and
training (all gradients, that of the inputs too), each as a plain graph and compiled by XLA.
`model`: a step of the language model in `fit`, with 64 experts in the middle, against the
same with a dense layer of equal operations. `torch`: the mixture by PyTorch's sort and
grouped product, in a process of its own, where it is installed.

The sides take turns in one process. Ratios are the time of the dense side, plain graph, over
that of the side, turn by turn; above 1 the side is faster. `--profile` writes the time of
every kernel of one training step instead. Without a GPU all runs on the processor, and says
so: the figures then say nothing of a GPU. `--quick` is a tiny run that only shows that
everything works.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import alternating  # noqa: F401  (quiets TensorFlow)
import keras
import numpy as np
import tensorflow as tf

import keras_moe
from keras_moe import layers


def start():
    """The name of what is measured. GPUs then take memory as they need it."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus:
        return "NO GPU: the processor, whose figures say nothing of a GPU"
    details = tf.config.experimental.get_device_details(gpus[0])
    return details.get("device_name", "a GPU without a name")


def take_turns(sides, rounds, repeat):
    """Milliseconds of every side, one number a round.

    The calls of a turn follow each other; reading the last result waits for all.
    """
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            for _ in range(repeat):
                result = side()
            np.asarray(result)
            times[name].append((time.perf_counter() - begin) / repeat * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def print_rows(label, times, reference):
    for name, ms in times.items():
        ratio = "no reference"
        if reference in times:
            low, middle, high = np.percentile(times[reference] / ms, [25, 50, 75])
            ratio = f"{middle:.2f} | {low:.2f} - {high:.2f}"
        print(f"| {label} | {name} | {np.median(ms):.2f} | {ratio} |", flush=True)


def make_mixture(a, experts):
    layer = layers.MoE(experts, layers.NoisyTopKGating(k=a.k))
    layer.build((None, a.units))
    # Columns of equal norm route about as evenly as a gate trained with the losses.
    kernel = layer.gating.gate_kernel
    kernel.assign(0.1 * tf.math.l2_normalize(tf.random.normal(kernel.shape), axis=0))
    return lambda x, training: (layer(x, training=training), layer.losses), layer


def make_dense(a):
    model = keras.Sequential(
        [
            keras.layers.Dense(a.k * a.hidden_units, "relu", use_bias=False),
            keras.layers.Dense(a.units, use_bias=False),
        ]
    )
    model.build((None, a.units))
    return lambda x, training: (model(x, training=training), []), model


def make_step(call, layer, x, step, is_compiled):
    """A function without arguments that gives one number, made of all results."""
    sources = [x, *(v.value for v in layer.trainable_variables)]

    def forward():
        return tf.reduce_sum(tf.cast(call(x, False)[0], tf.float32))

    def training():
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs, losses = call(x, True)
            total = tf.reduce_mean(tf.square(tf.cast(outputs, tf.float32)))
            total += sum(tf.cast(loss, tf.float32) for loss in losses)
        gradients = tape.gradient(total, sources)
        # Read whole: XLA leaves out what nobody reads.
        return tf.add_n([tf.nn.l2_loss(tf.cast(g, tf.float32)) for g in gradients])

    function = {"forward": forward, "training": training}[step]
    return tf.function(function, jit_compile=is_compiled, autograph=False)


def layer_sides(a, num_experts, step):
    x = tf.random.normal((a.tokens, a.units))
    x = tf.cast(x, keras.config.dtype_policy().compute_dtype)
    experts = layers.FeedForwardExperts(num_experts, a.hidden_units)
    made = {"dense": make_dense(a), "mixture": make_mixture(a, experts)}
    return {
        f"{name}, {how}": make_step(call, layer, x, step, how == "XLA")
        for name, (call, layer) in made.items()
        for how in ("graph", "XLA")
    }


def measure_layer(a):
    print(
        f"\n{a.tokens} tokens, {a.units} units, {a.hidden_units} hidden units, k = {a.k}"
        "\n\n| type | experts | step | side | ms | dense graph / side | quartiles |"
        "\n|---|---|---|---|---|---|---|"
    )
    for dtype in a.dtypes:
        for num_experts in a.experts:
            for step in ("forward", "training"):
                keras.config.set_dtype_policy(dtype)
                keras.utils.set_random_seed(0)
                sides = layer_sides(a, num_experts, step)
                label = f"{dtype} | {num_experts} | {step}"
                sides = {n: side for n, side in sides.items() if works(label, n, side)}
                print_rows(label, take_turns(sides, a.rounds, a.repeat), "dense, graph")
                del sides
                gc.collect()


def works(label, name, side):
    """Whether a side runs, twice; if memory, say, does not do, a row says so."""
    try:
        results = [float(np.asarray(side())) for _ in range(2)]
    except (tf.errors.OpError, ValueError) as error:
        print(f"| {label} | {name} | {type(error).__name__} | | |", flush=True)
        return False
    if not np.all(np.isfinite(results)):
        raise RuntimeError(f"{label} {name} gave {results}.")
    return True


def make_model(a, middle, is_compiled):
    keras.utils.set_random_seed(0)
    middle = keras_moe.models.middle_layers(
        middle,
        units=a.model_units,
        hidden_units=a.model_hidden_units,
        num_experts=a.model_experts,
        k=4,
    )
    model = keras_moe.models.MoELanguageModel(
        a.vocabulary, a.model_units, middle=middle, stateful=False
    )
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=is_compiled,
    )
    return model


def measure_model(a):
    shape = (2, a.steps * a.batch, a.time_steps)
    tokens = np.random.default_rng(0).integers(3, a.vocabulary, shape, "int32")
    data = tf.data.Dataset.from_tensor_slices(tuple(tokens))
    data = data.batch(a.batch, drop_remainder=True).prefetch(2)
    print(
        f"\n{a.batch} x {a.time_steps} tokens, {a.model_units} units, "
        f"{a.model_experts} experts of {a.model_hidden_units} hidden units, k = 4, Adam"
        "\n\n| type | side | ms a step | dense graph / side | quartiles |"
        "\n|---|---|---|---|---|"
    )
    for dtype in a.dtypes:
        keras.config.set_dtype_policy(dtype)
        sides = {}
        for name, middle in (("dense", "moe_1_wide"), ("mixture", "moe")):
            for how, is_compiled in (("graph", False), ("XLA", True)):
                model = make_model(a, middle, is_compiled)
                sides[f"{name}, {how}"] = fitting(model, data)
        for side in sides.values():  # traces; seeds of later models clear caches
            side()
        times = take_turns(sides, a.rounds, 1)
        times = {name: ms / a.steps for name, ms in times.items()}
        print_rows(dtype, times, "dense, graph")


def fitting(model, data):
    def fit():
        return model.fit(data, verbose=0).history["loss"][-1]

    return fit


def measure_torch(a):
    """The rows of `torch_side`, from a process with libraries of its own."""
    command = [sys.executable, __file__, "--torch-side"]
    for name in ("tokens", "units", "hidden-units", "k", "rounds", "repeat"):
        command += [f"--{name}", str(getattr(a, name.replace("-", "_")))]
    command += ["--experts", *map(str, a.experts)]
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print()
    if ran.returncode == 0:
        print(ran.stdout.strip(), flush=True)
    else:
        last = (ran.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        print(f"PyTorch's side was not measured: {last}", flush=True)


def torch_side(a):
    """The mixture in PyTorch, bfloat16: a sort, grouped products, gathers."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"{error}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {"device": device, "dtype": torch.bfloat16}
    card = torch.cuda.get_device_name() if device == "cuda" else "NO GPU: the processor"
    print(
        f"PyTorch {torch.__version__}, {card}, bfloat16\n\n| experts | step | ms |"
        "\n|---|---|---|"
    )
    x = torch.randn(a.tokens, a.units, requires_grad=True, **made)
    for num_experts in a.experts:
        gate = torch.randn(a.units, num_experts, **made)
        gate = (0.1 * torch.nn.functional.normalize(gate, dim=0)).requires_grad_()
        first = 0.03 * torch.randn(num_experts, a.units, a.hidden_units, **made)
        last = 0.03 * torch.randn(num_experts, a.hidden_units, a.units, **made)
        weights = [gate, first.requires_grad_(), last.requires_grad_()]
        for name, training in (("forward", False), ("training", True)):
            step = torch_step(torch, a.k, x, *weights, training)
            step = torch.enable_grad()(step) if training else torch.no_grad()(step)
            for _ in range(3):
                float(step())
            times = []
            for _ in range(a.rounds):
                begin = time.perf_counter()
                for _ in range(a.repeat):
                    result = step()
                float(result)
                times.append((time.perf_counter() - begin) / a.repeat * 1e3)
            print(f"| {num_experts} | {name} | {np.median(times):.2f} |", flush=True)


def torch_step(torch, k, x, gate, first, last, training):
    num_experts = gate.shape[1]

    def step():
        logits, chosen = torch.topk((x @ gate).float(), k, dim=-1)
        gates = logits.softmax(-1).to(x.dtype)
        chosen = chosen.reshape(-1)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=num_experts).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(x[order // k], first, offs=ends).relu()
        answers = torch._grouped_mm(hidden, last, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        outputs = (answers[back].reshape(len(x), k, -1) * gates[..., None]).sum(1)
        if not training:
            return outputs.float().sum()
        gradients = torch.autograd.grad(
            outputs.float().square().mean(), [x, gate, first, last]
        )
        return sum(gradient.float().square().sum() for gradient in gradients)

    return step


def write_profile(a, path):
    """Time of every kernel in training steps of the mixture, as Markdown."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    lines = []
    for dtype in a.dtypes:
        for num_experts in a.experts:
            for how in ("graph", "XLA"):
                keras.config.set_dtype_policy(dtype)
                keras.utils.set_random_seed(0)
                side = layer_sides(a, num_experts, "training")[f"mixture, {how}"]
                for _ in range(3):
                    np.asarray(side())
                with tempfile.TemporaryDirectory() as folder:
                    with tf.profiler.experimental.Profile(folder):
                        for _ in range(a.repeat):
                            np.asarray(side())
                    space = xplane_pb2.XSpace()
                    for file in Path(folder).rglob("*.xplane.pb"):
                        space.MergeFromString(file.read_bytes())
                lines += [f"\n## {dtype}, {num_experts} experts, {how}\n"]
                lines += kernel_table(space, a.repeat)
    Path(path).write_text(
        "\n".join([f"# Kernels of a training step: {a.device}", *lines])
    )
    print(f"Profile: {path}")


def kernel_table(space, steps, most=40):
    """Rows of the events on GPUs; of all threads of the processor without one."""
    on_gpu = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    planes = on_gpu or [plane for plane in space.planes if "CPU" in plane.name]
    totals = {}
    for plane in planes:
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # the same time again, by module and by operation
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                number, duration = totals.get(name, (0, 0))
                totals[name] = number + 1, duration + event.duration_ps
    rows = sorted(totals.items(), key=lambda item: -item[1][1])
    if not rows:
        return ["The profiler saw nothing."]
    what = (
        "kernel or copy" if on_gpu else "event of the processor (they contain others)"
    )
    table = [f"| {what} | calls a step | µs a step |", "|---|---|---|"]
    for name, (number, duration) in rows[:most]:
        name = name.replace("|", " ")[:100]
        table.append(
            f"| {name} | {number / steps:.1f} | {duration / 1e6 / steps:.1f} |"
        )
    rest = rows[most:]
    calls = sum(number for _, (number, _) in rest) / steps
    duration = sum(duration for _, (_, duration) in rest) / 1e6 / steps
    return [*table, f"| {len(rest)} others | {calls:.1f} | {duration:.1f} |"]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def add(name, default, text, **kwargs):
        kwargs.setdefault("type", type(default))
        parser.add_argument(name, default=default, help=text, **kwargs)

    parts = ["layer", "model", "torch"]
    add("--only", parts, "parts to run", nargs="+", choices=parts, type=str)
    types = ["mixed_bfloat16", "float32"]
    add("--dtypes", types, "dtype policies", nargs="+", type=str)
    add("--experts", [8, 64, 256], "experts of the layer", nargs="+", type=int)
    add("--tokens", 16384, "tokens of the layer")
    add("--units", 1024, "width of the layer")
    add("--hidden-units", 4096, "hidden units of an expert of the layer")
    add("--k", 2, "experts for each token of the layer")
    add("--rounds", 7, "turns of every side")
    add("--repeat", 5, "calls of a turn")
    add("--model-experts", 64, "experts of the model")
    add("--model-units", 512, "width of the model")
    add("--model-hidden-units", 1024, "hidden units of an expert of the model")
    add("--vocabulary", 10_000, "words of the model")
    add("--batch", 128, "sequences in a batch of the model")
    add("--time-steps", 32, "words of a sequence")
    add("--steps", 20, "training steps of a turn of the model")
    parser.add_argument("--profile", help="file for a table of kernels, no ratios")
    parser.add_argument("--torch-side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    return parser


def main():
    a = make_parser().parse_args()
    if a.quick:
        a.experts, a.tokens, a.units, a.hidden_units = [4], 64, 16, 32
        a.rounds, a.repeat, a.dtypes = 2, 2, ["float32"]
        a.model_experts, a.model_units, a.model_hidden_units = 8, 8, 8
        a.vocabulary, a.batch, a.time_steps, a.steps = 20, 4, 4, 2
    if a.torch_side:
        torch_side(a)
        return
    a.device = start()
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    print(
        f"{a.device}; TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_moe "
        f"{keras_moe.__version__}; TF32 {'on' if tf32 else 'off'}; {a.rounds} rounds",
        flush=True,
    )
    if a.profile:
        write_profile(a, a.profile)
        return
    # PyTorch first, while this process holds no memory of the GPU.
    for part, measure in (
        ("torch", measure_torch),
        ("layer", measure_layer),
        ("model", measure_model),
    ):
        if part in a.only:
            measure(a)


if __name__ == "__main__":
    main()
