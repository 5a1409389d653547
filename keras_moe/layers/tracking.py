"""What `tf.train.Checkpoint` sees of a layer."""

from typing import Any


def track_entries(owner: Any, name: str) -> None:
    """Makes the entries of a list reachable from the layer or model that holds it.

    Keras wraps a list in a type of its own, into which TensorFlow does not look: what
    stands in lists alone would be left out of a `tf.train.Checkpoint`, in silence. As
    attributes the entries are in it. Keras' files visit lists first and nothing twice,
    so they stay as they are.

    Args:
        owner: The layer or model.
        name: Name of the attribute that holds the list, which is complete.
    """
    for index, entry in enumerate(getattr(owner, name)):
        setattr(owner, f"_{name}_{index}", entry)
