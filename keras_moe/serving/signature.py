"""What all signatures have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_moe.layers.routing_record import RoutingRecord, routing_tensors
from keras_moe.runtime import only_plain


def signature(
    specs: Sequence[tf.TensorSpec], function: Callable[..., dict], name: str
) -> Any:
    """A `tf.function` to export.

    Args:
        specs: Of the inputs, with their names.
        function: Takes the inputs in that order and returns named outputs.
        name: Name of the signature.

    Returns:
        The function, which refuses inputs of another rank or size.
    """

    def checked(*given):
        if only_plain():  # other runtimes fix the rank themselves
            return function(*given)
        # The loader checks the type of what it is fed, but not the shape.
        return function(
            *(
                tf.ensure_shape(value, spec.shape)
                for value, spec in zip(given, specs, strict=True)
            )
        )

    checked.__name__ = name
    return tf.function(checked, input_signature=list(specs), autograph=False)


class UnseenRoutingError(ValueError):
    """The routing of a model cannot be looked at."""


def routing_outputs(records: dict[str, list[RoutingRecord]]) -> dict[str, tf.Tensor]:
    """Outputs of a signature `routing`.

    Args:
        records: From `recorded_routing`, of the graph that is being traced.

    Returns:
        `<name>_experts` and `<name>_gates` of every mixture, see
        `routing_tensors`. Further calls of a layer get a number at the end.

    Raises:
        UnseenRoutingError: A mixture ran inside a loop or another function, or none
            ran at all.
    """
    outputs = {}
    for name, calls in records.items():
        for i, record in enumerate(calls):
            if record.leading_shape.graph is not tf.compat.v1.get_default_graph():
                raise UnseenRoutingError(
                    f"`routing` cannot look at {name!r}: it runs inside a loop or "
                    "another function of the model. Leave 'routing' out of "
                    "`signatures`."
                )
            suffix = f"_{i}" if i else ""
            experts, gates = routing_tensors(record)
            outputs[f"{name}_experts{suffix}"] = experts
            outputs[f"{name}_gates{suffix}"] = gates
    if not outputs:
        raise UnseenRoutingError(
            f"`routing` must have mixtures to look at. Received: {list(records)}, none "
            "of which the model calls. Leave 'routing' out of `signatures`."
        )
    return outputs
