"""What the mixture costs as a program that XLA has compiled, counted without a GPU.

    python examples/benchmarks/compiled_cost.py

Nothing runs, and no weight is made: the layer is compiled for tensors of the given shapes,
and the text of the compiled program is counted.

* Multiply-adds of all matrix products, against those of a dense layer of equal operations.
* Bytes that the instructions read and write, each its operands and its result; of a gather,
  a slice or a scatter the rows it touches. Against `experts`: the products of the experts
  alone, compiled and counted alike, for rows that lie in order and as many for each
  expert. Also against every weight and activation that the mathematics needs, once
  written and once read by each product, as if all else were fused into the products;
  and against the same where the activation function and its gradient are passes of their
  own over the hidden units, since XLA for the processor fuses nothing into a product.
* The loop for rows beyond an expert's slots turns zero times where routing is even; so the
  multiply-adds of a turn stand in a column of their own, and none in the others.
* Instructions that talk to the host (infeed, outfeed, send, receive, custom calls).

XLA compiles for this processor here. For a GPU it starts from the same program and the same
shapes, and fuses otherwise. `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import keras_moe
from keras_moe import layers

# Names for what is there already.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "while",
}
TO_HOST = {"infeed", "outfeed", "send", "recv", "custom-call"}
# Instructions that read of their first operand only what they give.
PARTIAL = {"gather", "dynamic-slice", "slice"}


class Instruction(NamedTuple):
    """One line of a program: `name = shape opcode(operands), attributes`."""

    opcode: str
    shape: str
    operands: list[str]
    attributes: str
    is_root: bool

    def called(self, key):
        """The name of a computation among the attributes."""
        return re.search(rf"{key}=%([\w.-]+)", self.attributes)[1]

    def dimensions(self, key):
        numbers = re.search(rf"{key}={{([\d,]*)}}", self.attributes)
        return [int(n) for n in numbers[1].split(",") if n] if numbers else []


class Program:
    """The text of a compiled program, taken apart.

    Attributes:
        text: As XLA gives it.
        computations: Its functions, each a dict of instructions by name.
        entry: The name of the one that runs.
    """

    LINE = re.compile(
        r"\s*(ROOT )?%([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w-]+)\((.*)"
    )

    def __init__(self, text):
        self.text = text
        self.computations = {}
        instructions = {}
        for line in text.splitlines():
            start = re.match(r"(ENTRY )?%([\w.-]+) \(.*{$", line)
            found = self.LINE.match(line)
            if start:
                instructions = self.computations[start[2]] = {}
                if start[1]:
                    self.entry = start[2]
            elif found:
                root, name, shape, opcode, rest = found.groups()
                inside, _, attributes = rest.partition(")")
                operands = re.findall(r"%([\w.-]+)", inside)
                if opcode == "parameter":
                    attributes = inside  # its number
                instructions[name] = Instruction(
                    opcode, shape, operands, attributes, bool(root)
                )

    def multiply_adds(self, name=None):
        """Those of all products of a computation, loops left out."""
        own, total = self.computations[name or self.entry], 0
        for each in own.values():
            if each.opcode == "dot":
                left = shapes_of(own[each.operands[0]].shape)[0][1]
                contracted = each.dimensions("lhs_contracting_dims")
                total += elements(each.shape) * math.prod(left[i] for i in contracted)
            elif each.opcode == "convolution":
                raise NotImplementedError("A convolution, which is not counted.")
            elif each.opcode in ("fusion", "call"):
                total += self.multiply_adds(callee(each))
        return total

    def turns(self):
        """Multiply-adds of one turn of every loop, added."""
        loops = (i for own in self.computations.values() for i in own.values())
        loops = (each for each in loops if each.opcode == "while")
        return sum(self.multiply_adds(each.called("body")) for each in loops)

    def bytes(self, name=None):
        """Read and written by the instructions of a computation, loops left out."""
        own, total = self.computations[name or self.entry], 0
        for each in own.values():
            sizes = [size(own[operand].shape) for operand in each.operands]
            if each.opcode in FREE:
                continue
            if each.opcode == "call":
                total += self.bytes(callee(each))
            elif each.opcode == "fusion":
                total += self._bytes_of_fusion(each, sizes)
            elif each.opcode in PARTIAL:
                total += 2 * size(each.shape) + sum(sizes[1:])
            elif each.opcode == "dynamic-update-slice":
                total += 2 * sizes[1]
            elif each.opcode == "scatter":
                total += sizes[1] + 3 * sizes[2]  # reads, adds, writes
            else:
                total += size(each.shape) + sum(sizes)
        return total

    def _bytes_of_fusion(self, fusion, sizes):
        inside = self.computations[callee(fusion)]
        root = next(each for each in inside.values() if each.is_root)
        in_place = root.opcode in ("scatter", "dynamic-update-slice")
        total = size(fusion.shape)
        if in_place:
            update = 2 if root.opcode == "scatter" else 1
            total = 2 * size(inside[root.operands[update]].shape)
        for name, each in inside.items():
            if each.opcode == "parameter" and not (
                in_place and name == root.operands[0]
            ):
                whole = sizes[int(each.attributes)]
                total += min(whole, self._read(inside, name, whole))
        return total

    def _read(self, inside, name, whole):
        """Bytes that a fused computation reads of one of its values."""
        total = 0
        for user_name, user in inside.items():
            if name not in user.operands:
                continue
            if user.opcode in PARTIAL and user.operands[0] == name:
                total += size(user.shape)
            elif user.opcode == "bitcast":
                total += self._read(inside, user_name, whole)
            else:
                return whole
        return total

    def num_to_host(self):
        every = (i for own in self.computations.values() for i in own.values())
        return sum(each.opcode in TO_HOST for each in every)


def callee(instruction):
    return instruction.called("calls" if instruction.opcode == "fusion" else "to_apply")


def shapes_of(text):
    """`f32[2,3]{1,0}`, or a tuple of such, as a list of (type, dimensions)."""
    found = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", text)
    return [(kind, [int(n) for n in sizes.split(",") if n]) for kind, sizes in found]


def elements(text):
    return sum(math.prod(sizes) for _, sizes in shapes_of(text))


def size(text):
    """Bytes of a shape."""
    total = 0
    for kind, sizes in shapes_of(text):
        bits = re.search(r"\d+", kind)
        total += math.prod(sizes) * (int(bits[0]) // 8 if bits else 1)
    return total


def compiled(function, shapes):
    """The program of a function of tensors."""
    function = tf.function(function, jit_compile=True, autograph=False)
    text = function.experimental_get_compiler_ir(*shapes)(stage="optimized_hlo")
    return Program(text)


def compiled_layer(call, layer, x, step):
    """The program of a layer that has no weights yet.

    Args:
        call: Gives outputs and losses for inputs and `training`.
        layer: The layer, built where variables have no values.
        x: `tf.TensorSpec` of the inputs.
        step: `"forward"`, or `"training"`: all gradients, that of the inputs too, for
            the gradient of the outputs, which is given.
    """
    state = [*layer.variables, *getattr(layer, "metrics_variables", ())]
    learnt = [i for i, v in enumerate(state) if v.trainable]

    def run(x, upstream, *values):
        with keras.StatelessScope(state_mapping=list(zip(state, values, strict=True))):
            if step == "forward":
                return call(x, False)[0]
            sources = [x, *(values[i] for i in learnt)]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                outputs, losses = call(x, True)
            ones = [tf.ones_like(loss) for loss in losses]
            gradients = tape.gradient([outputs, *losses], sources, [upstream, *ones])
            # Outputs too: otherwise what only they need would be left out.
            return outputs, gradients

    return compiled(run, [x, x, *(tf.TensorSpec(v.shape, v.dtype) for v in state)])


def without_values(layer, units):
    """Builds a layer whose variables get no memory."""
    with keras.StatelessScope():
        layer.build((None, units))
        # Leaving the scope would draw what has been put off.
        keras.utils.clear_session()
    return layer


def make_mixture(a, num_experts):
    layer = layers.MoE(
        layers.FeedForwardExperts(num_experts, a.hidden_units),
        layers.NoisyTopKGating(k=a.k),
    )
    without_values(layer, a.units)
    return lambda x, training: (layer(x, training=training), layer.losses), layer


def make_dense(a):
    layer = keras.Sequential(
        [
            keras.layers.Dense(a.k * a.hidden_units, "relu", use_bias=False),
            keras.layers.Dense(a.units, use_bias=False),
        ]
    )
    without_values(layer, a.units)
    return lambda x, training: (layer(x, training=training), []), layer


def compiled_experts(a, num_experts, step):
    """The products of the experts alone: rows in order, as many for each."""
    rows = -(-a.tokens * a.k // num_experts)

    def run(x, first, last, upstream):
        with tf.GradientTape() as tape:
            tape.watch([x, first, last])
            outputs = tf.matmul(tf.nn.relu(tf.matmul(x, first)), last)
        if step == "forward":
            return outputs
        # As in the layer.
        return outputs, tape.gradient(outputs, [x, first, last], upstream)

    rows_of = (num_experts, rows, a.units)
    shapes = (rows_of, (num_experts, a.units, a.hidden_units))
    shapes += ((num_experts, a.hidden_units, a.units), rows_of)
    return compiled(run, [tf.TensorSpec(shape) for shape in shapes])


def least_bytes(a, num_experts, step, own_passes=False):
    """Weights and activations, float32, each written once and read by each product.

    With `own_passes` the activation function reads and writes all hidden units, and
    its gradient reads them and their gradients, and writes the latter.
    """
    weights = 2 * num_experts * a.units * a.hidden_units
    tokens, rows = a.tokens * a.units, a.tokens * a.k * a.units
    hidden = a.tokens * a.k * a.hidden_units
    # Tokens to rows, product, hidden units, product, rows to tokens.
    total = weights + 2 * tokens + 4 * rows + 2 * hidden
    if step == "training":
        # Weights read again, gradients written. Upstream gradients of tokens to rows;
        # rows and hidden units again, their gradients, each for two products.
        total += 2 * weights + 2 * tokens + (3 + 1 + 2) * rows + (1 + 3) * hidden
    if own_passes:
        total += (2 + 3 * (step == "training")) * hidden
    return 4 * total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch")
    parser.add_argument("--units", type=int, default=1024, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=4096, help="hidden units of an expert"
    )
    parser.add_argument("--k", type=int, default=2, help="experts for each token")
    parser.add_argument("--texts", help="folder for the programs of the mixture")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.tokens, a.units, a.hidden_units = [4], 64, 16, 32
    tf.get_logger().setLevel("ERROR")
    x = tf.TensorSpec((a.tokens, a.units))
    print(
        f"{a.tokens} tokens, {a.units} units, {a.hidden_units} hidden units, k = {a.k}, "
        f"float32, TensorFlow {tf.__version__}, Keras {keras.__version__}, keras_moe "
        f"{keras_moe.__version__}\n\n| experts | step | multiply-adds / dense "
        "| of a turn of the loop / dense | GB | bytes / experts | bytes / least "
        "| bytes / least, activation by itself | to the host | seconds to compile |"
        "\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for step, passes in (("forward", 1), ("training", 3)):
        dense = compiled_layer(*make_dense(a), x, step).multiply_adds()
        exact = passes * 2 * a.k * a.tokens * a.units * a.hidden_units
        if dense != exact:
            raise RuntimeError(
                f"Counted {dense} multiply-adds of the dense layer: {exact}"
            )
        for num_experts in a.experts:
            begin = time.perf_counter()
            mixture = compiled_layer(*make_mixture(a, num_experts), x, step)
            seconds = time.perf_counter() - begin
            experts = compiled_experts(a, num_experts, step)
            if a.texts:
                name = f"{num_experts}_{step}.hlo"
                (Path(a.texts) / name).write_text(mixture.text)
            print(
                f"| {num_experts} | {step} | {mixture.multiply_adds() / dense:.3f} "
                f"| {mixture.turns() / dense:.4f} | {mixture.bytes() / 1e9:.2f} "
                f"| {mixture.bytes() / experts.bytes():.2f} "
                f"| {mixture.bytes() / least_bytes(a, num_experts, step):.2f} "
                f"| {mixture.bytes() / least_bytes(a, num_experts, step, True):.2f} "
                f"| {mixture.num_to_host()} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
