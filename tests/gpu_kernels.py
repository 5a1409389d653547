"""What a graph would do on a GPU, told without one.

TensorFlow's wheel registers its kernels for GPUs on every machine. So each node of a
graph can be looked up: whether there is a kernel for its types, and which of its
arguments that kernel reads in the memory of the host.
"""

import collections

import keras
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, rewriter_config_pb2
from tensorflow.python.framework import kernels, op_def_registry
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.training.saver import export_meta_graph

import keras_moe

# What comes from outside, or is known before the graph runs: on either side.
FREE = {"Const", "Placeholder", "VarHandleOp", "NoOp"}
LOOPS = ("While", "StatelessWhile")
BRANCHES = ("If", "StatelessIf", "Case", "StatelessCase")


def training_graph(
    layer: keras.layers.Layer,
    shape: tuple,
    masked: bool = False,
    optimizer: keras.optimizers.Optimizer | None = None,
):
    """`GraphDef` of a step of training on a GPU: loss, gradients, and new weights."""
    layer.build(shape)
    if optimizer is not None:
        optimizer.build(layer.trainable_variables)

    def step(x, mask):
        weights = [v.value for v in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask if masked else None)
            loss = tf.reduce_mean(tf.square(tf.cast(y, tf.float32)))
            loss += sum(layer.losses)
        gradients = tape.gradient(loss, [x, *weights])
        if optimizer is not None:
            optimizer.apply(gradients[1:], layer.trainable_variables)
        return loss, gradients

    return _traced(step, layer, shape)


def inference_graph(layer: keras.layers.Layer, shape: tuple, masked: bool = False):
    """`GraphDef` of a call on a GPU."""
    layer.build(shape)

    def call(x, mask):
        return layer(x, training=False, mask=mask if masked else None)

    return _traced(call, layer, shape)


def _traced(function, layer, shape):
    signature = [
        tf.TensorSpec(shape, layer.compute_dtype),
        tf.TensorSpec(shape[:-1], tf.bool),
    ]
    traced = tf.function(function, input_signature=signature, autograph=False)
    with keras_moe.serving.gpu_operations():
        return _optimized(traced.get_concrete_function())


def _optimized(function):
    """The graph that TensorFlow makes of it to run it, loops left as they are."""
    graph = function.graph.as_graph_def()
    for nodes in (graph.node, *(f.node_def for f in graph.library.function)):
        for node in nodes:
            if node.op in (*LOOPS, *BRANCHES):
                node.attr["_lower_using_switch_merge"].b = False
    meta = export_meta_graph(graph_def=graph, graph=function.graph)
    kept = meta_graph_pb2.CollectionDef()
    kept.node_list.value.extend(t.name for t in function.inputs + function.outputs)
    kept.node_list.value.extend(op.name for op in function.graph.control_outputs)
    meta.collection_def["train_op"].CopyFrom(kept)
    meta.collection_def["variables"].Clear()
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.min_graph_nodes = -1
    # Otherwise operations are fused into those of this machine's processor.
    off = rewriter_config_pb2.RewriterConfig.OFF
    options.remapping = options.layout_optimizer = off
    options.function_optimization = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    return tf_optimizer.OptimizeGraph(config, meta)


def num_nodes(graph) -> int:
    """Nodes of a graph, those of its loops too."""
    return len(graph.node) + sum(len(body) for body in _bodies(graph))


def faults(graph) -> collections.Counter:
    """What keeps a GPU waiting, and how often it stands in the graph.

    Returns:
        Counts of `"Operation [types]"` without a kernel, and of
        `"Operation.argument <- Operation"`: an argument that the host reads, and the
        GPU computes.
    """
    found = collections.Counter()
    for nodes in (graph.node, *_bodies(graph)):
        found.update(_faults_of(nodes))
    return found


def _faults_of(nodes):
    nodes = {node.name: _Node(node) for node in nodes}
    for this in nodes.values():
        if not this.has_kernel:
            yield f"{this.op} [{this.types}]"
            continue
        for (argument, at), source in zip(this.inputs, this.sources, strict=True):
            name, _, index = source.partition(":")
            producer = nodes[name]
            if at == "host" and producer.place_of_output(int(index or 0)) == "device":
                yield f"{this.op}.{argument} <- {producer.op}"


class _Node:
    """A node, and where a GPU keeps what it takes and gives.

    Attributes:
        inputs: Name and place of each tensor it takes.
        sources: The output that each of these is.
    """

    def __init__(self, node):
        self.op = node.op
        self.sources = [each for each in node.input if each[0] != "^"]
        self.types = _types_of(node)
        definition = op_def_registry.get(node.op)
        assert definition is not None, f"{node.op} has not been inlined"
        inputs = list(_arguments(node, definition.input_arg))
        outputs = list(_arguments(node, definition.output_arg))
        on_host = _host_arguments(node, self.types)
        self.has_kernel = on_host is not None or node.op in FREE
        placed_on_host = "CPU" in node.device

        def place(argument, kind):
            if node.op in FREE or kind in (types_pb2.DT_RESOURCE, types_pb2.DT_VARIANT):
                return None
            if placed_on_host:
                return "host"
            if node.op in LOOPS and kind == types_pb2.DT_INT32:
                return "host"  # as those of the loop's own operations
            return "host" if argument in (on_host or ()) else "device"

        self.inputs = [(argument, place(argument, kind)) for argument, kind in inputs]
        self._outputs = [place(argument, kind) for argument, kind in outputs]

    def place_of_output(self, index):
        return self._outputs[index] if self.has_kernel else "host"


def _arguments(node, definitions):
    """Name and type of each tensor of a list of arguments."""
    for argument in definitions:
        if argument.type_list_attr:
            kinds = node.attr[argument.type_list_attr].list.type
        else:
            kinds = [argument.type or node.attr[argument.type_attr].type]
            if argument.number_attr:
                kinds = kinds * node.attr[argument.number_attr].i
        for kind in kinds:
            yield argument.name, kind


def _types_of(node):
    """The types that decide about the kernel, as text."""
    found = []
    for name, attr in sorted(node.attr.items()):
        kinds = list(attr.list.type) or ([attr.type] if attr.type else [])
        if kinds and not name.startswith("_"):
            names = dict.fromkeys(tf.as_dtype(kind).name for kind in kinds)
            found.append(f"{name}={'/'.join(names)}")
    return " ".join(found)


_kernels_of: dict = {}


def _host_arguments(node, types):
    """Arguments that a GPU's kernel reads or writes on the host; None without kernel."""
    if (node.op, types) not in _kernels_of:
        registered = kernels.get_registered_kernels_for_op(node.op).kernel
        # The default stands in only where there is none for GPUs.
        fitting = [
            kernel
            for kind in ("GPU", "DEFAULT")
            for kernel in registered
            if kernel.device_type == kind and not kernel.label and _fits(kernel, node)
        ]
        found = set(fitting[0].host_memory_arg) if fitting else None
        _kernels_of[node.op, types] = found
    return _kernels_of[node.op, types]


def _fits(kernel, node):
    for constraint in kernel.constraint:
        allowed = constraint.allowed_values.list.type
        attr = node.attr[constraint.name]
        if allowed and not set(attr.list.type or [attr.type]) <= set(allowed):
            return False
    return True


def _bodies(graph):
    """Nodes of the functions that loops and branches of a graph call."""
    functions = {f.signature.name: f for f in graph.library.function}
    found, todo = {}, list(graph.node)
    while todo:
        node = todo.pop()
        for name, attr in node.attr.items():
            for called in (attr.func.name, *(f.name for f in attr.list.func)):
                if called in functions and called not in found:
                    decides = node.op in LOOPS and name == "cond"
                    found[called] = _body(functions[called], decides)
                    todo += functions[called].node_def
    return found.values()


def _body(function, decides):
    """Nodes of a function, arguments and results among them, named as in a graph."""
    nodes, outputs = [], {}
    for argument in function.signature.input_arg:
        node = tf.compat.v1.NodeDef(name=argument.name, op="_Arg")
        node.attr["T"].type = argument.type
        nodes.append(node)
    for node in function.node_def:
        copy = tf.compat.v1.NodeDef()
        copy.CopyFrom(node)
        nodes.append(copy)
        at = 0
        for argument in op_def_registry.get(node.op).output_arg:
            for i, _ in enumerate(_arguments(node, [argument])):
                outputs[f"{node.name}:{argument.name}:{i}"] = f"{node.name}:{at}"
                at += 1
    for argument in function.signature.output_arg:
        # The host decides whether a loop goes on.
        op = "LoopCond" if decides else "_Retval"
        node = tf.compat.v1.NodeDef(name=f"result_{argument.name}", op=op)
        if not decides:
            node.attr["T"].type = argument.type
        node.input.append(function.ret[argument.name])
        nodes.append(node)
    for node in nodes:
        sources = [outputs.get(each, each) for each in node.input]
        del node.input[:]
        node.input.extend(sources)
    return nodes
