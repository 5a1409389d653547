"""Requests that a server runs before it takes others."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

_FILE = "assets.extra/tf_serving_warmup_requests"
# More of them fail the load of the model (TensorFlow Serving).
_MOST_RECORDS = 1000


def verify_warmup(
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    signatures: Mapping[str, Any],
) -> list[tuple[str, dict[str, tf.Tensor]]]:
    """Runs every request, for one that fails would keep a server from loading.

    Args:
        requests: Pairs of a signature's name and its inputs by name.
        signatures: Concrete functions by name.

    Returns:
        The requests with tensors of the right types.

    Raises:
        ValueError: There are too many, or a request names an unknown signature
            or other inputs than it has, or fails.
    """
    if len(requests) > _MOST_RECORDS:
        raise ValueError(
            f"`warmup` must hold at most {_MOST_RECORDS} requests. Received: "
            f"{len(requests)}. A few of typical sizes are enough."
        )
    verified = []
    for name, inputs in requests:
        if name not in signatures:
            raise ValueError(
                "`warmup` must name exported signatures. Received: "
                f"{name!r}. Use one of {sorted(signatures)}."
            )
        specs = tf.nest.flatten(signatures[name].structured_input_signature)
        wanted = {spec.name: spec for spec in specs}
        if set(inputs) != set(wanted):
            raise ValueError(
                f"A request of `warmup` for {name!r} must have the inputs "
                f"{sorted(wanted)}. Received: {sorted(inputs)}."
            )
        try:
            tensors = {
                key: tf.convert_to_tensor(value, wanted[key].dtype)
                for key, value in inputs.items()
            }
            signatures[name](*(tensors[spec.name] for spec in specs))
        except (tf.errors.OpError, TypeError, ValueError) as error:
            raise ValueError(
                f"A request of `warmup` for {name!r} must run. Received: "
                f"{dict(inputs)!r}, which fails: {error}"
            ) from error
        verified.append((name, tensors))
    return verified


def write_warmup(
    path: str | os.PathLike,
    model_name: str,
    requests: Sequence[tuple[str, Mapping[str, tf.Tensor]]],
) -> Path:
    """Writes the requests where TensorFlow Serving looks for them.

    Args:
        path: Folder of a SavedModel.
        model_name: Str. Name that the server knows the model by.
        requests: From `verify_warmup`.

    Returns:
        Path of the file, a TFRecord of `PredictionLog`.

    Raises:
        ImportError: tensorflow-serving-api is not installed.
    """
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            "`warmup` needs tensorflow-serving-api. Received: none installed. Run "
            "`pip install keras-moe[serving]`, or export without `warmup`."
        ) from error
    file = Path(path) / _FILE
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for name, inputs in requests:
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model_name
            request.model_spec.signature_name = name
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())
    return file
