"""Operations of TensorFlow that DTensor expands wrongly, in a form that it does not.

Each acts within the steps of a `DTensorStrategy` only, under every public name that
leads to it: a gate or a layer is written as for one device.

* `top_k`, and sorting, which is made of it: wrong, or the process ends, if operand and
  result have different layouts;
* the scatters: into too few rows, which raises on a CPU and loses values on a GPU;
* `x[:, tf.newaxis]` with axes left out behind a new one: the process ends;
* `reverse`, of which `Bidirectional` is made: refused.
"""

import numpy as np
import tensorflow as tf

from keras_moe import operations
from keras_moe.distribution import compatibility
from keras_moe.distribution.dtensor.variables import (
    by_rows,
    current_mesh,
    replicated,
)


def install() -> None:
    """Makes the changes. To be called once."""
    nn, array = compatibility.raw_nn, compatibility.raw_array
    for stock, function in (
        (nn.top_kv2, _top_k),
        (array.scatter_nd, _scatter_nd),
        (array.tensor_scatter_update, _tensor_scatter),
        (array.tensor_scatter_add, _tensor_scatter),
        (array.strided_slice, _slice),
        (tf.reverse, _reverse),
    ):
        _replace(stock, function)


def _replace(stock, function):
    def operation(*args, **kwargs):
        mesh = current_mesh()
        if mesh is None:
            return stock(*args, **kwargs)
        return function(mesh, stock, *args, **kwargs)

    for module in (tf, *compatibility.operation_modules):
        for name in [name for name, value in vars(module).items() if value is stock]:
            setattr(module, name, operation)


def _top_k(mesh, stock, input, k, **options):
    found = []

    def run(values):
        best, indices = pair = stock(values, k, **options)
        found.append(pair)

        def grad(d_best, _):  # the stock one scatters
            return operations.spread(d_best, indices, values.shape[-1])

        return (best, indices), grad

    values = by_rows(tf.convert_to_tensor(input), mesh)
    # Whole numbers need no gradient, which not every condition could hold.
    pair = (
        tf.custom_gradient(run)(values) if values.dtype.is_floating else run(values)[0]
    )
    best, indices = (by_rows(each, mesh) for each in pair)
    return found[0]._replace(values=best, indices=tf.stop_gradient(indices))


def _scatter_nd(mesh, stock, indices, updates, shape, **options):
    values = [replicated(tf.convert_to_tensor(x), mesh) for x in (indices, updates)]
    return replicated(stock(*values, shape, **options), mesh)


def _tensor_scatter(mesh, stock, tensor, indices, updates, **options):
    values = [
        replicated(tf.convert_to_tensor(x), mesh) for x in (tensor, indices, updates)
    ]
    return replicated(stock(*values, **options), mesh)


def _reverse(mesh, stock, tensor, axis, **options):
    @tf.custom_gradient
    def run(values):
        for each in np.ravel(axis):
            size = values.shape[each]
            if size is None:
                size = tf.shape(values)[each]
            values = tf.gather(values, size - 1 - tf.range(size), axis=int(each))
        return values, lambda gradient: _reverse(mesh, stock, gradient, axis)

    return run(tf.convert_to_tensor(tensor))


_MASKS = tuple(
    f"{name}_mask" for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
)


def _slice(mesh, stock, input, begin, end, strides, **options):
    spans = [tf.get_static_value(each) for each in (begin, end, strides)]
    rank = input.shape.rank
    if (
        not options.get("new_axis_mask")
        or rank is None
        or any(x is None for x in spans)
    ):
        return stock(input, begin, end, strides, **options)
    entries = [
        (*span, *(options.get(mask, 0) >> i & 1 for mask in _MASKS))
        for i, span in enumerate(zip(*spans, strict=True))
    ]
    # Axes left out, at an ellipsis or at the end, are named.
    taken = sum(not (entry[5] or entry[6]) for entry in entries)
    at = next((i for i, entry in enumerate(entries) if entry[5]), len(entries))
    entries[at : at + 1] = [(0, 0, 1, 1, 1, 0, 0, 0)] * (rank - taken)
    (*spans,) = zip(*entries, strict=True)
    options |= {
        mask: sum(bit << i for i, bit in enumerate(bits))
        for mask, bits in zip(_MASKS, spans[3:], strict=True)
    }
    return stock(input, *(list(map(int, each)) for each in spans[:3]), **options)
