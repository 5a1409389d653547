"""The clients ask a server of the stock protocol that runs an exported model.

The server is a stand-in: `tensorflow_model_server` is not installed by pip. Requests and
answers are those of its API.
"""

import http.server
import json
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  (registers the operations of the model)
from google.protobuf import text_format
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tensorflow_serving.config import model_server_config_pb2

import keras_moe
from keras_moe import data, layers, models

SERVING = Path(__file__).parent.parent.parent / "examples" / "serving"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    vocabulary = data.Vocabulary.from_tokens([list("abcdefgh")])
    middle = layers.MoE(layers.FeedForwardExperts(5, hidden_units=8))
    model = models.MoELanguageModel(len(vocabulary), 8, middle=middle)
    model.build((None, None))
    return keras_moe.serving.export(
        model, tmp_path_factory.mktemp("model"), text=vocabulary
    )


@pytest.fixture(scope="module")
def signatures(path):
    return tf.saved_model.load(str(path)).signatures


def run(script, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, str(SERVING / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )


def test_grpc(signatures):
    class Servicer(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            assert request.model_spec.name == "language_model"
            function = signatures[request.model_spec.signature_name]
            inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
            try:
                outputs = function(**{k: tf.constant(v) for k, v in inputs.items()})
            except tf.errors.InvalidArgumentError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            answer = predict_pb2.PredictResponse()
            for name, value in outputs.items():
                answer.outputs[name].CopyFrom(tf.make_tensor_proto(value.numpy()))
            return answer

    server = grpc.server(futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        Servicer(), server
    )
    port = server.add_insecure_port("localhost:0")
    server.start()
    address = ("--server", f"localhost:{port}")
    try:
        answered = run("client_grpc.py", "a b", "c", *address, "--max-new-tokens", 4)
        assert answered.returncode == 0, answered.stderr
        lines = answered.stdout.splitlines()
        assert lines[0].startswith("a b")
        refused = run("client_grpc.py", "a", *address, "--max-new-tokens", 0)
        assert refused.returncode == 1
        assert "INVALID_ARGUMENT" in refused.stderr
        assert "max_new_tokens" in refused.stderr
    finally:
        server.stop(None)
    assert run("client_grpc.py", "a", *address).returncode == 1


def test_rest(signatures):
    dtypes = {"temperature": tf.float32, "seed": tf.int64}
    dtypes |= {"text": tf.string, "prompt": tf.string}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/models/language_model:predict"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            inputs = {
                k: tf.constant(v, dtypes.get(k, tf.int32))
                for k, v in body["inputs"].items()
            }
            outputs = signatures[body["signature_name"]](**inputs)
            plain = {
                k: [x.decode() for x in v.numpy()]
                if v.dtype == tf.string
                else v.numpy().tolist()
                for k, v in outputs.items()
                if k not in ("tokens", "token_log_probs")
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"outputs": plain}).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = ("--server", f"http://localhost:{server.server_port}")
    try:
        answered = run("client_rest.py", "a b", *address)
        assert answered.returncode == 0, answered.stderr
        assert answered.stdout.startswith("a b")
        scored = run("client_rest.py", "a b", *address, "--signature", "score")
        assert "perplexity" in scored.stdout
    finally:
        server.shutdown()
        server.server_close()
    refused = run("client_rest.py", "a b", *address)
    assert refused.returncode == 1
    assert "no answer" in refused.stderr


def test_load_generator_draws_latencies(path, tmp_path):
    ran = run(
        "load_generator.py", "--saved-model", path, "--requests", 20, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert "20 requests of 1 texts" in ran.stdout
    assert (tmp_path / "latency.png").stat().st_size > 5000


def test_the_configuration_is_what_the_server_parses():
    config = model_server_config_pb2.ModelServerConfig()
    text_format.Parse((SERVING / "models.config").read_text(), config)
    (model,) = config.model_config_list.config
    compose = (SERVING / "docker-compose.yml").read_text()
    assert model.name == "language_model"
    assert f":{model.base_path}:ro" in compose
