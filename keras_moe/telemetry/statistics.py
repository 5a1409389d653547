"""How evenly experts are used, from what was counted."""

from typing import NamedTuple

import numpy as np

from keras_moe import checks


class UsageTotals(NamedTuple):
    """What was counted of one mixture over some batches.

    Attributes:
        importance: `(E,)` float64, sum of the gates of each expert.
        counts: `(E,)` float64, tokens of each expert, before any were dropped.
        overflow: Float. Assignments dropped for want of capacity.
        entropy: Float. Sum of the entropies of the tokens' gates.
        tokens: Float. Tokens in `entropy`, 0 if it is not known.
        choices_kept: Float. Sum of the shares of their choices that a gate's noise
            leaves tokens (`functional.choices_kept`).
        noisy_tokens: Float. Tokens in `choices_kept`, 0 if there was no noise.
    """

    importance: np.ndarray
    counts: np.ndarray
    overflow: float = 0.0
    entropy: float = 0.0
    tokens: float = 0.0
    choices_kept: float = 0.0
    noisy_tokens: float = 0.0

    def since(self, before: "UsageTotals | None") -> "UsageTotals":
        """What was counted after `before`; all of it if counting began again."""
        if before is None or np.any(self.counts < before.counts):
            return self
        return UsageTotals(*map(np.subtract, self, before))

    def plus(self, other: "UsageTotals") -> "UsageTotals":
        """Both together."""
        return UsageTotals(*map(np.add, self, other))


def usage_statistics(
    totals: UsageTotals, has_capacity: bool = False
) -> dict[str, float]:
    """Figures that say how evenly experts are used.

    Args:
        totals: `UsageTotals`.
        has_capacity: Bool. Whether tokens may have been dropped. Defaults to
            `False`.

    Returns:
        Dict of

        * `importance_cv`, `load_cv`: coefficients of variation (population
          standard deviation over mean) of the importance and of the true counts;
        * `max_over_mean_load`: counts of the busiest expert over the mean;
        * `dead_experts`: number of experts without a single token;
        * `gate_entropy`: mean entropy of a token's gates in nats, from 0 (one
          expert has all the weight) to log k; only if it is known;
        * `choices_kept`: share of the choices without noise that the noise of the
          gate leaves, from about k over the number of experts (it draws by lot) to 1;
          only if there was noise;
        * `overflow`: share of the assignments dropped; only with `has_capacity`.

        All are 0 if nothing was counted.

    Example:

    >>> totals = keras_moe.telemetry.UsageTotals(np.ones(4), np.array([4, 2, 2, 0.0]))
    >>> found = keras_moe.telemetry.usage_statistics(totals)
    >>> found["max_over_mean_load"], found["dead_experts"]
    (2.0, 1)

    Reference:
        Shazeer et al. 2017, section 4 and table 6.
    """
    for name, value in zip(totals._fields, totals, strict=True):
        for number in np.asarray(value).ravel().tolist():
            checks.verify_number(number, name)
    counts = np.asarray(totals.counts, np.float64)
    figures: dict[str, float] = {
        "importance_cv": _variation(np.asarray(totals.importance, np.float64)),
        "load_cv": _variation(counts),
        "max_over_mean_load": _ratio(counts.max(), counts.mean()),
        "dead_experts": int(np.sum(counts == 0)),
    }
    if totals.tokens:
        figures["gate_entropy"] = float(totals.entropy / totals.tokens)
    if totals.noisy_tokens:
        figures["choices_kept"] = float(totals.choices_kept / totals.noisy_tokens)
    if has_capacity:
        figures["overflow"] = _ratio(totals.overflow, counts.sum())
    return figures


def _variation(values):
    return _ratio(values.std(), values.mean())


def _ratio(numerator, denominator):
    return float(numerator / denominator) if denominator else 0.0
