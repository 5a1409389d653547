"""What a training step of a model holds, computes and moves, from its graph."""

import math
from typing import Any

import tensorflow as tf

from keras_moe.layers.routing_record import recorded_routing
from keras_moe.planning.step_measures import (
    Mixture,
    StepMeasures,
    Stored,
)
from keras_moe.planning.traced.inference import Inference
from keras_moe.planning.traced.interpreter import Interpreter
from keras_moe.planning.traced.peaks import Peaks
from keras_moe.planning.traced.reduction import PACK, SUM, Reduction
from keras_moe.planning.traced.step import trace_step
from keras_moe.planning.traced.values import Value


def measures_of(model: Any, batch: tuple, optimizer: Any) -> StepMeasures:
    """Traces a step and measures its graph.

    Args:
        model: A built `keras.Model`.
        batch: As for `trace_step`.
        optimizer: As for `trace_step`.

    Returns:
        The `StepMeasures` of one device that has all experts.

    Raises:
        ValueError: The step cannot be traced for such a batch.
    """
    mixtures = _mixtures(model)
    entries = _entries(model)
    with recorded_routing(mixtures, [str(i) for i in range(len(mixtures))]) as records:
        traced = trace_step(model, batch, optimizer, entries)
    values = {
        id(v.value.handle): _value_of(v, entries.get(id(v)))
        for v in (*traced.variables, *traced.slots, *traced.others)
    }
    stacked = {
        v.shape: v.entries for v in values.values() if v.entries and len(v.shape) > 2
    }
    inference = Inference()

    def interpreted(summing):
        found = Interpreter(inference, summing, traced.marks.of_experts)
        found.run(traced.graph, _inputs(traced.graph, values))
        _mark_parts(found.nodes, stacked)
        return found

    interpreter = interpreted(Reduction())
    nodes = interpreter.nodes
    trained = {id(v) for v in model.trainable_variables}
    stored = [_stored(v, entries, id(v) in trained) for v in traced.variables]
    stored_slots = _stored_slots(traced, model, entries)
    measured = [
        _mixture(layer, records[str(i)], interpreter.tensors)
        for i, layer in enumerate(mixtures)
    ]
    backward = _backward(nodes)
    peaks = Peaks(
        lambda summing: interpreted(summing).nodes,
        _backward,
        [
            (mixture, _weights_of(layer, values))
            for layer, mixture in zip(mixtures, measured, strict=True)
            if mixture is not None and mixture.is_sharded
        ],
        traced.marks.has_rows,
    )
    return StepMeasures(
        weights=stored,
        slots=stored_slots,
        input_bytes=sum(_value(s).num_bytes for s in tf.nest.flatten(batch)),
        mixtures=[each for each in measured if each is not None],
        activations=_activations(nodes, backward),
        expert_activations=_expert_activations(nodes, backward),
        peak=peaks.peak,
        work=_work(nodes),
        assumed=sorted(interpreter.assumed),
    )


def _weights_of(layer, values):
    """What is known of the stacked weights of a mixture's experts."""
    weights = getattr(layer.experts, "stacked_weights", ())
    return [values[id(v.value.handle)] for v in weights]


def _value(spec):
    return Value(tuple(spec.shape), spec.dtype, is_kept=True)


def _value_of(variable, entries):
    dtype = tf.as_dtype(variable.dtype)
    return Value(tuple(variable.shape), dtype, is_kept=True, entries=entries)


def _inputs(graph, values):
    captured = {placeholder.name: own for own, placeholder in graph.captures}
    found = []
    for tensor in graph.inputs:
        own = captured.get(tensor.name)
        if own is None:
            found.append(_value(tensor))
        elif tensor.dtype == tf.resource:
            variable = values.get(id(own), Value((), tf.float32, is_kept=True))
            found.append(Value((), tf.resource, variable=variable))
        else:
            value = _value(own)
            value.array = own.numpy() if hasattr(own, "numpy") else None
            found.append(value)
    return found


def _mixtures(model):
    """`MoE`s, in the model and in its layers."""
    return [layer for layer in model._flatten_layers() if hasattr(layer, "on_routing")]


def _entries(model):
    """By `id` of a variable that devices share: its experts, and those of a group."""
    found = {}
    for layer in model._flatten_layers():
        for variable in getattr(layer, "stacked_weights", ()):
            found[id(variable)] = variable.shape[0], getattr(layer, "group_size", 1)
        gating = getattr(layer, "gating", None)
        groups = getattr(layer, "num_groups", None)
        if gating is not None and groups is not None:
            primary = {id(v) for v in getattr(layer.primary_gating, "weights", ())}
            for variable in gating.weights:
                if id(variable) not in primary and variable.shape[0] == groups:
                    found[id(variable)] = groups, 1
    return found


def _stored(variable, entries, trained):
    value = _value_of(variable, entries.get(id(variable)))
    return Stored(variable.path, value.num_bytes, value.entries, trained)


def _stored_slots(traced, model, entries):
    """The optimizer's state, each with the experts of the weight that it is of."""
    prefixes = {v.path.replace("/", "_") + "_": v for v in model.trainable_variables}
    found = []
    for slot in traced.slots:
        name = slot.path.rpartition("/")[2]
        owners = [p for p in prefixes if name.startswith(p)]
        owner = prefixes[max(owners, key=len)] if owners else None
        of = entries.get(id(owner)) if owner is not None else None
        if owner is None:  # made by `add_slot` of an engine
            of = _experts_of_slot(name, slot, model, entries)
        if of is not None and (not slot.shape or slot.shape[0] != of[0]):
            of = None
        found.append(Stored(slot.path, _value_of(slot, of).num_bytes, of, False))
    return found


def _experts_of_slot(name, slot, model, entries):
    """Those of the weight that a slot is named after, if it has a row for each."""
    for variable in model.trainable_variables:
        of = entries.get(id(variable))
        named = name.startswith(f"{variable.name}_")
        if of is not None and named and tuple(slot.shape[:1]) == of[:1]:
            return of
    return None


def _mark_parts(nodes, stacked):
    """Notes which results are as large as the experts of a device are many.

    Such have the shape of a stacked weight, or are parts of one, or are put together
    to one: gradients of single experts.
    """
    for node in nodes:
        for value in node.outputs:
            if value.entries is None and value.shape in stacked:
                value.entries = stacked[value.shape]
        if node.kind in (PACK, SUM):
            node.outputs[0].entries = node.inputs[0].entries
        cut = node.kind in ("Split", "SplitV", "Unpack", "Cast", "Transpose")
        if cut and (first := node.inputs[node.kind == "Split"]).entries is not None:
            for value in node.outputs:
                value.entries = first.entries
    for node in reversed(nodes):
        if node.kind in ("Pack", "ConcatV2") and node.outputs[0].entries is not None:
            for value in node.inputs:
                value.buffer.entries = value.entries = node.outputs[0].entries


def _backward(nodes):
    """`id`s of the nodes of the backward pass, and of what comes after it.

    Gradients that functions define themselves have no name that tells: they wait for
    one that has.
    """
    values: set[int] = set()
    found: set[int] = set()
    for node in nodes:
        if node.kind == "EmptyTensorList":
            continue  # in which loops of the forward pass keep values
        waits = any(id(v) in values for v in node.inputs)
        waits = waits or any(id(each) in found for each in node.after)
        if waits or node.name.startswith("gradient_tape/"):
            found.add(id(node))
            values |= {id(v) for v in node.outputs}
    return found


def _activations(nodes, backward):
    """Bytes that the forward pass makes and the backward pass reads."""
    makers = {id(v): node for node in nodes for v in node.outputs}
    read = {
        id(v.buffer): v.buffer
        for node in nodes
        if id(node) in backward
        for v in node.inputs
    }
    return sum(
        value.allocated
        for value in read.values()
        if not value.is_kept
        and id(value) in makers
        and id(makers[id(value)]) not in backward
    )


def _expert_activations(nodes, backward):
    """Bytes of rows of experts that the forward pass multiplies with their weights."""
    rows = {
        id(v.buffer): v.allocated
        for node in nodes
        if node.multiply_adds
        and id(node) not in backward
        and any(each.entries for each in node.inputs)
        for v in node.inputs
        if not v.entries
    }
    return sum(rows.values())


def _work(nodes):
    """Multiply-adds of experts and of the rest, bytes that move, and operations."""
    work = dict.fromkeys(
        ("dense_multiply_adds", "expert_multiply_adds", "moved_bytes", "operations"), 0
    )
    for node in nodes:
        of_experts = any(v.entries for v in (*node.inputs, *node.outputs))
        kind = "expert" if of_experts else "dense"
        work[f"{kind}_multiply_adds"] += node.multiply_adds
        fresh = [v for v in node.outputs if v.root is None]
        if fresh or not node.outputs:
            work["operations"] += bool(fresh)
            moved = (*node.inputs, *fresh)
            if not node.multiply_adds:
                work["moved_bytes"] += sum(v.num_bytes for v in moved)
    return work


def _mixture(layer, records, tensors):
    """How many rows a mixture sends to its experts."""
    if not records:
        return None
    chosen = records[0].result.expert_indices
    value = tensors.get(chosen.name)
    shape = value.shape if value is not None else tuple(chosen.shape)
    if None in shape:
        return None
    features = layer.input_spec.axes[-1]
    output = layer.compute_output_shape((None, features))[-1]
    rows = math.prod(shape)
    k = getattr(layer, "k", None)
    if not isinstance(k, int) and k is not None:  # a row goes to each group
        rows, features = rows // k[1], features + 2
    experts = layer.experts
    sharded = bool(getattr(experts, "stacked_weights", ()))
    size = tf.as_dtype(layer.compute_dtype).size
    return Mixture(
        layer.name,
        layer.num_experts,
        getattr(experts, "group_size", 1),
        rows,
        (features + output) / 2,
        size,
        sharded,
        bool(getattr(experts, "recompute", False)),
    )
