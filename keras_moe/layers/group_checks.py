"""Checks of the arguments of a mixture of two levels."""

from collections.abc import Sequence

import numpy as np

from keras_moe import checks
from keras_moe.functional.gating import NORMALIZATIONS
from keras_moe.layers.gate_contract import verify_gating


def verify_two_ks(k):
    if np.shape(k) != (2,):
        raise ValueError(
            "`k` must be two ints: groups for each token, and experts in each "
            f"group. Received: k={k!r}."
        )
    return (checks.verify_k(k[0]), checks.verify_k(k[1]))


def two_normalizations(normalization):
    """That of the primary gate and that of the secondary gates."""
    if isinstance(normalization, str):
        normalization = (normalization, normalization)
    if not isinstance(normalization, Sequence) or len(normalization) != 2:
        raise ValueError(
            '`normalization` must be "selected" or "all", or two of these, for the '
            "primary gate and for the secondary gates. Received: "
            f"normalization={normalization!r}."
        )
    for each in normalization:
        checks.verify_choice(each, "normalization", NORMALIZATIONS)
    return tuple(normalization)


def verify_groups(num_experts, num_groups, k):
    if num_experts % num_groups:
        raise ValueError(
            "`num_experts` must be a multiple of `num_groups`. Received: "
            f"num_experts={num_experts}, num_groups={num_groups}. Every group has "
            "the same number of experts."
        )
    group_size = num_experts // num_groups
    if k[0] > num_groups or k[1] > group_size:
        raise ValueError(
            "`k` must be at most the number of groups and their size. Received: "
            f"k={tuple(k)}, num_groups={num_groups}, {group_size} experts a group. "
            "Lower `k` or add experts."
        )


def share_num_groups(primary_gating, num_groups):
    verify_gating(primary_gating, "primary_gating")
    stated = getattr(primary_gating, "num_experts", None)
    if stated is None:
        primary_gating.num_experts = num_groups
    elif stated != num_groups:
        raise ValueError(
            "`primary_gating` must gate as many experts as there are groups. "
            f"Received: primary_gating.num_experts={stated}, num_groups={num_groups}."
        )
