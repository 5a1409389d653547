"""The versions that the engines need: narrower than those of the core.

The engines reach inside TensorFlow and Keras (`compatibility`), which a minor version
may change without a word. Everything else uses public names only.
"""

import keras
import tensorflow as tf

TENSORFLOW, KERAS = "2.20", "3.15"


def verify_versions(what: str) -> None:
    """Raises where an engine would reach inside versions it was not checked with.

    Args:
        what: What asks for an engine.

    Raises:
        ValueError: TensorFlow or Keras has another minor version than is needed.
    """
    found = (tf.__version__, keras.__version__)
    if [".".join(each.split(".")[:2]) for each in found] != [TENSORFLOW, KERAS]:
        raise ValueError(
            f"`{what}` needs TensorFlow {TENSORFLOW} and Keras {KERAS}, whose insides "
            "are used to share experts among devices. Received: TensorFlow "
            f"{found[0]} and Keras {found[1]}. Run `pip install "
            f'"tensorflow=={TENSORFLOW}.*" "keras=={KERAS}.*"`, or build the model '
            "outside of any strategy, for one device."
        )
