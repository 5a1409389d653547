"""A child process that answers through TensorFlow's C API, as NumPy arrays."""

import base64
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import tensorflow as tf

LOADER = Path(__file__).with_name("c_api_loader.py")


class Child:
    """One exported model in a process without site-packages.

    Raises `RuntimeError` with TensorFlow's message where it refuses.
    """

    def __init__(self, directory, libraries=()):
        package = Path(tf.__file__).parent
        environment = {
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": str(package),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "TF_XLA_FLAGS": "--tf_xla_auto_jit=-1",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        self.process = subprocess.Popen(
            [
                "python3",
                "-I",
                "-S",
                str(LOADER),
                str(package / "libtensorflow_cc.so.2"),
                str(directory),
                *libraries,
            ],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    def close(self):
        self.process.communicate()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the child died: {self.process.stderr.read()}")
        result = json.loads(line)
        if "error" in result:
            raise RuntimeError(result["error"])
        return result

    def ask(self, signature, *, repeat=1, **inputs):
        """The whole answer of the child."""
        request = {
            "signature": signature,
            "inputs": {name: encode(value) for name, value in inputs.items()},
            "repeat": repeat,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __call__(self, signature, **inputs):
        """Outputs by name; two runs must agree in every bit."""
        result = self.ask(signature, repeat=2, **inputs)
        assert result["identical"]
        return {name: decode(value) for name, value in result["outputs"].items()}


def encode(value):
    array = np.asarray(value)
    shape = list(array.shape)
    if array.dtype.kind in "OSU":
        texts = [t.encode() if isinstance(t, str) else t for t in array.ravel()]
        data = [base64.b64encode(text).decode() for text in texts]
        return {"dtype": tf.string.as_datatype_enum, "shape": shape, "data": data}
    dtype = tf.as_dtype(array.dtype).as_datatype_enum
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": dtype, "shape": shape, "data": data}


def decode(value):
    dtype = tf.as_dtype(value["dtype"])
    if dtype == tf.string:
        texts = [base64.b64decode(text) for text in value["data"]]
        array = np.empty(len(texts), object)
        array[:] = texts
    else:
        array = np.frombuffer(base64.b64decode(value["data"]), dtype.as_numpy_dtype)
    return array.reshape(value["shape"])
