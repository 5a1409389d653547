"""Asks a served language model over gRPC, with the stock `tensorflow-serving-api`.

    pip install keras-moe[serving]
    python examples/serving/client_grpc.py "She was"

Needs a running server, see docker-compose.yml, and a model exported with strings.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc


def make_request(model, signature, inputs):
    """A `PredictRequest` of arrays by name."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def ask(stub, request, timeout=60):
    """The answer of the server: arrays by name."""
    answer = stub.Predict(request, timeout)
    return {name: tf.make_ndarray(value) for name, value in answer.outputs.items()}


def generation(texts, *, temperature, top_k, max_new_tokens, seed):
    """Inputs of the signature `generate`; row r draws with `seed + r`."""
    rows = len(texts)
    return {
        "prompt": np.array([text.encode() for text in texts], object),
        "temperature": np.full(rows, temperature, "float32"),
        "top_k": np.full(rows, top_k, "int32"),
        "max_new_tokens": np.full(rows, max_new_tokens, "int32"),
        "seed": np.arange(seed, seed + rows, dtype="int64"),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", help="texts to send")
    parser.add_argument(
        "--server", default="localhost:8500", help="address of the server"
    )
    parser.add_argument("--model", default="language_model", help="name of the model")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="temperature of the samples"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument(
        "--max-new-tokens", type=int, default=40, help="tokens to generate, at most"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    a = parser.parse_args(argv)
    inputs = generation(
        a.texts,
        temperature=a.temperature,
        top_k=a.top_k,
        max_new_tokens=a.max_new_tokens,
        seed=a.seed,
    )
    with grpc.insecure_channel(a.server) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            answer = ask(stub, make_request(a.model, "generate", inputs))
        except grpc.RpcError as error:
            print(f"error: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    for text in answer["text"]:
        print(text.decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
