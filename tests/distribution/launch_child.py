"""Launches processes of `failure_child`, and prints the exit status."""

import json
import sys
import time

from keras_moe import distribution


def main():
    settings = json.loads(sys.argv[1])
    start = time.monotonic()
    child = ["-m", "tests.distribution.failure_child", sys.argv[1]]
    status = distribution.launch(child, settings["workers"], settings["logs"])
    seconds = time.monotonic() - start
    print("RESULT " + json.dumps({"status": status, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
