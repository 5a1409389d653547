"""Loads a server with requests and draws how long the answers took.

    python examples/serving/load_generator.py --requests 500 --concurrency 8

Every worker sends its next request when the last one is answered. Without a server, for a
look at the model alone, the C++ loader answers instead, one request at a time:

    python examples/serving/load_generator.py --saved-model runs/language_model/saved_model/1
"""

import argparse
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from tqdm import tqdm

TEXTS = (
    "She was very well .",
    "It is a truth universally acknowledged",
    "He had never been so happy in his life , and he said so .",
    "No",
)


def server(a):
    """A function that sends one request to a running server."""
    import grpc
    from client_grpc import ask, make_request
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    stub = prediction_service_pb2_grpc.PredictionServiceStub(
        grpc.insecure_channel(a.server)
    )

    def send(texts):
        inputs = {"text": np.array([text.encode() for text in texts], object)}
        ask(stub, make_request(a.model, "score", inputs))

    return send


def loader(a):
    """The same through the C++ loader in a child process, one after the other."""
    import tensorflow_text
    from c_api_child import Child

    libraries = Path(tensorflow_text.__file__).parent / "python" / "ops"
    child = Child(a.saved_model, [str(libraries / "_regex_split_ops.so")])
    lock = threading.Lock()

    def send(texts):
        with lock:
            child.ask("score", text=list(texts))

    return send


def measure(send, a):
    """Seconds that each request took, and all of them together."""
    rng = np.random.default_rng(a.seed)
    batches = rng.choice(TEXTS, (a.requests, a.rows))
    for rows in range(3):  # the first ones build what the others use
        send(batches[rows % a.requests])

    def timed(texts):
        start = time.perf_counter()
        send(texts)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(a.concurrency) as pool:
        answers = pool.map(timed, batches)
        seconds = list(tqdm(answers, total=a.requests, unit="request", disable=a.quiet))
    return np.array(seconds), time.perf_counter() - start


def draw(milliseconds, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(milliseconds, bins=40, color="tab:blue", alpha=0.8)
    for percent, style in (50, "-"), (95, "--"), (99, ":"):
        value = np.percentile(milliseconds, percent)
        axes.axvline(value, color="black", linestyle=style, linewidth=1.2)
        axes.plot([], [], "k" + style, label=f"{percent} %: {value:.1f} ms")
    axes.set_xlabel("Latency of a request (ms)")
    axes.set_ylabel("Requests")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--server", default="localhost:8500", help="address of the server"
    )
    parser.add_argument("--model", default="language_model", help="name of the model")
    parser.add_argument("--saved-model", help="ask the C++ loader, not a server")
    parser.add_argument("--requests", type=int, default=500, help="requests to send")
    parser.add_argument("--rows", type=int, default=1, help="texts of a request")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time")
    parser.add_argument(
        "--picture", default="latency.png", help="file to draw the latencies to"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    a = parser.parse_args(argv)
    if min(a.requests, a.rows, a.concurrency) < 1:
        parser.error("--requests, --rows and --concurrency must be at least 1")
    sys.path.insert(0, str(Path(__file__).parent))
    send = loader(a) if a.saved_model else server(a)
    seconds, total = measure(send, a)
    milliseconds = 1e3 * seconds
    print(
        f"{a.requests} requests of {a.rows} texts, {a.concurrency} at a time: "
        f"{a.requests * a.rows / total:.0f} texts a second; latency "
        + ", ".join(
            f"{p} % {np.percentile(milliseconds, p):.1f} ms" for p in (50, 95, 99)
        )
    )
    draw(milliseconds, a.picture)
    print(f"Picture: {a.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
