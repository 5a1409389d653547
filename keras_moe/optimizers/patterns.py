"""Weights by regular expressions on their paths, for arguments of optimizers."""

import re
from collections.abc import Sequence
from typing import Any

from keras_moe import checks


def verify_patterns(patterns: Any) -> tuple[str, ...]:
    """Returns `factored`, or raises unless it is a list of regular expressions."""
    valid = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    try:
        for pattern in patterns if valid else ():
            re.compile(pattern)
    except (re.error, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            "`factored` must be None or a list of regular expressions. Received: "
            f"factored={patterns!r}. Pass e.g. ['experts/kernel']."
        )
    return tuple(patterns)


def verify_factors(factors: Any) -> dict[str, float]:
    """Returns `learning_rate_factors`, or raises unless they are factors of patterns."""
    try:
        patterns = {} if factors is None else dict(factors)
        verify_patterns(list(patterns))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`learning_rate_factors` must be None or a dict of regular expression to "
            f"factor. Received: learning_rate_factors={factors!r}. Pass e.g. "
            "{'_experts': 0.5}."
        ) from error
    name, rest = "learning_rate_factors", ". Pass 1 for the rate as it is."
    return {p: checks.verify_number(f, name, rest=rest) for p, f in patterns.items()}


def matched(pattern: str, var_list: Sequence[Any], name: str) -> list[Any]:
    """The variables whose path a pattern matches, at least one."""
    matched = [v for v in var_list if re.search(pattern, v.path)]
    if not matched:
        raise ValueError(
            f"`{name}` must match weights of the model. Received: {pattern!r}, which "
            f"matches none of {[v.path for v in var_list]}. Correct it or leave it out."
        )
    return matched
