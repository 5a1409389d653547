"""Every operation of every signature is one that a stock CPU server can run."""

from pathlib import Path

import keras
import pytest
from tensorflow.core.protobuf import saved_model_pb2

import keras_moe
from keras_moe import data, layers, models
from tests.serving.test_c_api import FEATURES, mixtures
from tests.serving.test_translate import translator


def allowed(name):
    path = Path(__file__).with_name(f"{name}_operations.txt")
    return set(path.read_text().split())


# Operations of inference: arithmetic, shapes, control flow, reading of variables and
# tables, assertions, restoring. Anything else needs a thought before it is added.
CORE = allowed("core")
TEXT = allowed("text")
# Of `generate` alone: drawn from the seed that the request brings.
SEEDED = {
    "BitwiseOr",
    "LeftShift",
    "StatelessRandomGetKeyCounter",
    "StatelessRandomUniformFullIntV2",
    "StatelessRandomUniformV2",
}
# What only saving and loading may do.
LOADING = {
    "AssignVariableOp",
    "MergeV2Checkpoints",
    "RestoreV2",
    "SaveV2",
    "ShardedFilename",
    "LookupTableImportV2",
    "LookupTableExportV2",
}


def meta_graph(path):
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((path / "saved_model.pb").read_bytes())
    (found,) = saved.meta_graphs
    return found


def reached(graph, nodes, names):
    """Operations that are needed to compute the named nodes, functions included."""
    functions = {f.signature.name: f for f in graph.library.function}
    by_name = {node.name: node for node in nodes}
    ops, attributes, seen, todo = set(), [], set(), []

    def visit_function(name):
        if name not in seen:
            seen.add(name)
            for node in functions[name].node_def:
                visit(node)

    def visit(node):
        ops.add(node.op)
        assert "GPU" not in node.device, (node.name, node.device)
        for key, value in node.attr.items():
            attributes.append((node.op, key, value))
            for function in (value.func, *value.list.func):
                if function.name:
                    visit_function(function.name)

    todo = [name.split(":")[0] for name in names]
    done = set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        visit(by_name[name])
        todo += [i.lstrip("^").split(":")[0] for i in by_name[name].input]
    return ops, attributes


def audit(path):
    found = meta_graph(path)
    graph = found.graph_def
    for name, signature in found.signature_def.items():
        if name == "__saved_model_init_op":
            continue
        outputs = [info.name for info in signature.outputs.values()]
        ops, attributes = reached(graph, graph.node, outputs)
        permitted = (CORE | TEXT) - LOADING
        if name == "generate":
            permitted |= SEEDED
        assert ops <= permitted, (name, sorted(ops - permitted))
        for op, key, value in attributes:
            assert not (key == "_XlaMustCompile" and value.b), (name, op)
        for info in (*signature.inputs.values(), *signature.outputs.values()):
            assert info.dtype
            shape = info.tensor_shape
            assert not shape.unknown_rank, (name, info.name)
            assert shape.dim[0].size == -1, (name, info.name)
    # Nor does anything hide in functions that no signature calls.
    everything = {node.op for node in graph.node}
    everything |= {n.op for f in graph.library.function for n in f.node_def}
    bad = (
        "PyFunc",
        "EagerPyFunc",
        "Cudnn",
        "Xla",
        "Random",
        "Multinomial",
        "Collective",
    )
    assert not [op for op in everything if op.startswith(bad)]
    return set(found.signature_def) - {"__saved_model_init_op"}


@pytest.mark.parametrize("name", mixtures())
def test_mixtures(name, tmp_path):
    inputs = keras.Input((None, FEATURES), name="x")
    layer = mixtures()[name]
    path = keras_moe.serving.export(keras.Model(inputs, layer(inputs)), tmp_path)
    routing = {"routing"} if isinstance(layer, layers.MoE) else set()
    assert audit(path) == {"serving_default"} | routing


@pytest.mark.parametrize(
    ("sampled", "with_text"),
    [
        (5, True),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for case in ((None, False), (None, True), (5, False))
        ),
    ],
)
def test_language_models(with_text, sampled, tmp_path):
    vocabulary = data.Vocabulary.from_tokens([list("abcdefgh")])
    middle = layers.MoE(layers.FeedForwardExperts(5, hidden_units=8))
    model = models.MoELanguageModel(
        len(vocabulary), 8, middle=middle, num_sampled=sampled
    )
    model.build((None, None))
    path = keras_moe.serving.export(
        model, tmp_path, text=vocabulary if with_text else None
    )
    assert audit(path) == {"serving_default", "score", "generate", "routing"}


@pytest.mark.slow
def test_translation_models(tmp_path):
    path = keras_moe.serving.export(translator(), tmp_path)
    assert audit(path) == {"serving_default", "routing", "translate"}


def test_noise_would_be_found(tmp_path):
    class Noisy(layers.NoisyTopKGating):
        def call(self, inputs, mask=None, training=None):
            return super().call(inputs, mask=mask, training=True)

    inputs = keras.Input((None, FEATURES), name="x")
    layer = layers.MoE(layers.FeedForwardExperts(5, 8), Noisy(k=2))
    path = keras_moe.serving.export(keras.Model(inputs, layer(inputs)), tmp_path)
    with pytest.raises(AssertionError, match="Random"):
        audit(path)
