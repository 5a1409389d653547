"""What travels between the gate (router), the dispatcher and the experts.

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

import warnings
from typing import Any, NamedTuple

import tensorflow as tf


def at_least_float32(*dtypes: Any) -> tf.DType:
    """float64 if one of the types is that, else float32: what sums and softmaxes take."""
    exact = any(tf.as_dtype(dtype) == tf.float64 for dtype in dtypes)
    return tf.float64 if exact else tf.float32


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


class DispatchPlan:
    """Which token goes to which expert, and where its answer comes back.

    The base of the plans of `keras_moe.functional`: `SortedPlan` and `RaggedPlan`
    drop nothing, `CapacityPlan` has static shapes, `SlotPlan` both. Every plan has

    Attributes:
        token_indices: int32, the token in every row of the experts.
        counts: `(E,)` int32. Rows of each expert that hold a token.
        positions: int32. The row that holds the answer for each assignment.
        expert_indices: int32, shape of `positions`. The expert of each assignment.
        overflow: `()` int32. Assignments dropped for want of capacity.
    """

    __slots__ = ()

    token_indices: tf.Tensor
    counts: tf.Tensor
    positions: tf.Tensor
    expert_indices: tf.Tensor
    overflow: tf.Tensor

    def dispatch(self, inputs: tf.Tensor) -> tf.Tensor:
        """Copies tokens `(N, D)` to the rows of their experts."""
        raise NotImplementedError

    def combine(
        self, expert_outputs: tf.Tensor, gates: tf.Tensor, num_tokens: Any = None
    ) -> tf.Tensor:
        """Sums the answers of each token's experts, weighted by its gates."""
        raise NotImplementedError


class _GatingFields(NamedTuple):
    gates: tf.Tensor
    expert_indices: tf.Tensor
    statistics: GateStatistics
    token_indices: Any
    auxiliary_losses: tuple[tf.Tensor, ...]
    choices_kept: tuple[tf.Tensor, ...]


class GatingResult(_GatingFields):
    """What a gating layer returns: which experts take a token, and their weights.

    Attributes:
        gates: Float `(N, K)`, or `(M,)` if tokens have different numbers of
            experts. Weight of each assignment.
        expert_indices: int32 within [0, E), shape of `gates`. The expert of each
            assignment. -1 stands for none where shapes are static: under XLA, on GPUs
            and on a mesh of devices.
        statistics: The `GateStatistics` of the batch.
        token_indices: `(M,)` int32, ascending: the token of each assignment. Left
            out, `()`, for gates of shape `(N, K)`.
        auxiliary_losses: Losses of the gate's own, each `()` float and weighted
            already; the surrounding layer adds them as they are, in training. Usually
            none.
        choices_kept: What `functional.choices_kept` gives, where the gate has added
            noise to its logits; otherwise left out, `()`.
    """

    __slots__ = ()

    def __new__(
        cls,
        gates: Any,
        expert_indices: Any,
        statistics: Any,
        token_indices: Any = (),
        auxiliary_losses: tuple = (),
        choices_kept: tuple = (),
    ):
        if isinstance(expert_indices, DispatchPlan):
            plan = expert_indices
            _deprecated(
                "A GatingResult made of a plan",
                "GatingResult(gates, expert_indices, statistics), or "
                "functional.make_gating_result",
            )
            expert_indices = plan.expert_indices
            if expert_indices.shape.rank == 1:
                token_indices = tf.gather(plan.token_indices, plan.positions)
        return super().__new__(
            cls,
            gates,
            expert_indices,
            statistics,
            token_indices,
            auxiliary_losses,
            choices_kept,
        )

    @property
    def is_ragged(self) -> bool:
        """Whether tokens have different numbers of experts."""
        return not isinstance(self.token_indices, tuple)

    @property
    def plan(self) -> DispatchPlan:
        """Deprecated: the dropless plan of these assignments.

        Write `functional.make_plan(result)`, or read `expert_indices` and
        `token_indices`, which stand in the result itself.
        """
        from keras_moe.functional import make_plan

        _deprecated(
            "GatingResult.plan",
            "result.expert_indices, or functional.make_plan(result)",
        )
        return make_plan(self)


def _deprecated(what: str, instead: str) -> None:
    warnings.warn(
        f"{what} is deprecated. Write {instead}.", DeprecationWarning, stacklevel=3
    )
