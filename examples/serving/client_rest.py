"""Asks a served language model over REST, with nothing but the standard library.

    python examples/serving/client_rest.py "She was"
    python examples/serving/client_rest.py --signature score "She was very well ."

Needs a running server, see docker-compose.yml, and a model exported with strings.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request


def ask(url, signature, inputs, timeout=60):
    """The answer of the server: outputs by name, as lists."""
    body = json.dumps({"signature_name": signature, "inputs": inputs}).encode()
    request = urllib.request.Request(
        url, body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)["outputs"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", help="texts to send")
    parser.add_argument(
        "--server", default="http://localhost:8501", help="address of the server"
    )
    parser.add_argument("--model", default="language_model", help="name of the model")
    parser.add_argument(
        "--signature", choices=("generate", "score"), default="generate"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="temperature of the samples"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument(
        "--max-new-tokens", type=int, default=40, help="tokens to generate, at most"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    a = parser.parse_args(argv)
    url = f"{a.server}/v1/models/{a.model}:predict"
    rows = len(a.texts)
    inputs = {"text": a.texts}
    if a.signature == "generate":
        inputs = {
            "prompt": a.texts,
            "temperature": [a.temperature] * rows,
            "top_k": [a.top_k] * rows,
            "max_new_tokens": [a.max_new_tokens] * rows,
            "seed": list(range(a.seed, a.seed + rows)),
        }
    try:
        outputs = ask(url, a.signature, inputs)
    except urllib.error.HTTPError as error:
        print(f"error: {error.code} {error.read().decode()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: no answer from {url}: {error}", file=sys.stderr)
        return 1
    for row, text in enumerate(a.texts):
        if a.signature == "generate":
            print(outputs["text"][row])
        else:
            print(
                f"{outputs['log_prob'][row]:9.2f}  perplexity "
                f"{outputs['perplexity'][row]:8.1f}  {text}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
