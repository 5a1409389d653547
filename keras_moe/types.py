"""Tuples that travel between the gate, the dispatcher and the experts.

Axis letters, used in docstrings and as suffixes of local names:

===  ==========================================================
N    tokens: the flattened batch (all leading axes, all time steps)
D    features of a token (model width)
E    experts
K    experts chosen for one token
M    assignments, one for each (token, chosen expert) pair
C    capacity: slots of one expert (static plans only)
H    hidden units of an expert
G    groups of a hierarchical mixture
R    replicas
===  ==========================================================
"""

from typing import NamedTuple

import tensorflow as tf


class GateStatistics(NamedTuple):
    """What the balancing losses and the reports need to know of a batch.

    Attributes:
        importance: `(E,)` float. Sum of the gates of each expert over the
            tokens (equation 6).
        load: `(E,)` float. Smooth estimate of the number of tokens of each
            expert (equation 10) where the gate is noisy and `k < num_experts`;
            otherwise the hard counts as floats, which carry no gradient.
        counts: `(E,)` int32. True number of tokens chosen for each expert.
    """

    importance: tf.Tensor
    load: tf.Tensor
    counts: tf.Tensor


class CountedStatistics(GateStatistics):
    """`GateStatistics` whose load is the hard counts: nothing to make a loss of."""

    __slots__ = ()

    def _replace(self, **changes):
        kind = GateStatistics if "load" in changes else CountedStatistics
        return kind(**{**self._asdict(), **changes})


class DispatchPlan(NamedTuple):
    """Which token goes to which expert, and where its answer comes back.

    The rank of `token_indices` tells the two kinds of plan apart. A dropless
    plan lists assignments sorted by expert; its shapes depend on the data. A
    capacity plan gives every expert the same number of slots, so that all
    shapes are static, and drops what does not fit.

    Attributes:
        token_indices: int32. Dropless: `(M,)`, the token of every assignment,
            sorted by expert and, within an expert, by token. Capacity:
            `(E, C)`, the token in every slot, `-1` where a slot is empty.
        counts: `(E,)` int32. Rows of each expert that hold a token.
        positions: int32. The row that holds the answer for each assignment,
            counted over all experts (over all slots in a capacity plan, with
            `-1` for a dropped assignment). `(N, K)` if each token has exactly
            K assignments; `(M,)` in token order if their number varies.
        expert_indices: int32, shape of `positions`. The chosen expert of each
            assignment.
        overflow: `()` int32. Assignments dropped for want of capacity; always
            0 in a dropless plan.
    """

    token_indices: tf.Tensor
    counts: tf.Tensor
    positions: tf.Tensor
    expert_indices: tf.Tensor
    overflow: tf.Tensor


class GatingResult(NamedTuple):
    """What a gating layer returns.

    Attributes:
        gates: float, shape of `plan.positions`. Weight of each assignment.
        plan: The `DispatchPlan`.
        statistics: The `GateStatistics` of the batch.
        auxiliary_losses: Losses of the gate's own, each `()` float and weighted
            already; the surrounding layer adds them as they are. Usually none.
    """

    gates: tf.Tensor
    plan: DispatchPlan
    statistics: GateStatistics
    auxiliary_losses: tuple[tf.Tensor, ...] = ()
