"""Gates that may not run where a token must not see others."""

from collections.abc import Iterable
from typing import Any

import keras


def verify_causal(layers: Iterable[Any], argument: str, of: str) -> None:
    """Raises if a gate among some layers lets a token's experts depend on other tokens.

    Such a gate says `sees_other_tokens = True`.

    Args:
        layers: Layers, gates or what holds some.
        argument: Name of the argument that they were given as.
        of: What they were given to, for the message.

    Raises:
        ValueError: There is such a gate.
    """
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            continue
        for inner in layer._flatten_layers():
            if getattr(inner, "sees_other_tokens", False):
                raise ValueError(
                    f"`{argument}` of {of} must not have a gate by which a token's "
                    "experts depend on later tokens: they would have a part in their "
                    f"own prediction. Received: {inner.name!r}, a "
                    f"{type(inner).__name__}, which compares tokens. Use "
                    "NoisyTopKGating or another gate of which each token chooses by "
                    "itself."
                )
