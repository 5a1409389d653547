"""What stands between the LSTMs of the paper's models: mixtures, dense baselines."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import checks
from keras_moe.layers.balanced_gating import BalancedGating
from keras_moe.layers.dropout import Dropout
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.gating import SoftmaxGating, TopKGating
from keras_moe.layers.hierarchical_moe import HierarchicalMoE
from keras_moe.layers.loss_free_gating import LossFreeGating
from keras_moe.layers.moe import MoE
from keras_moe.layers.noisy_gating import NoisyTopKGating
from keras_moe.layers.switch_gating import SwitchGating

KINDS = ("moe", "moe_1_wide", "moe_1_deep", "4xlstm", "none")
GATINGS = ("noisy_top_k", "top_k", "loss_free", "switch", "balanced")


def verify_levels(k, num_groups):
    """Raises unless `k` has a number for each level of gates."""
    if len(k) != (1 if num_groups is None else 2):
        raise ValueError(
            "`k` must have one number, or two with `num_groups`. Received: "
            f"k={k}, num_groups={num_groups}. Give one for each level."
        )


def make_mixture(
    hidden_units: int,
    num_experts: int,
    k: Sequence[int],
    *,
    num_groups: int | None = None,
    gating: str = "noisy_top_k",
    loss_weight: float = 0.1,
    noise: Any = "learned",
    activation: Any = "sigmoid",
    recompute: bool = False,
    shared_units: int = 0,
    units: int | None = None,
    expert_dropout: float = 0.0,
    scaling_factor: float = 1.0,
    name: str = "moe",
) -> keras.layers.Layer:
    """A mixture of experts with one hidden layer, flat or hierarchical.

    Args:
        hidden_units: Int. Hidden units of one expert.
        num_experts: Int. Number of experts.
        k: `(k,)`, or `(groups, experts in each)` with `num_groups`.
        num_groups: Int or None. Groups of a hierarchical mixture. Defaults to
            `None`: flat.
        gating: One of `GATINGS`; in a hierarchical mixture that of the groups, and
            within them gates are noisy top-k. Defaults to `"noisy_top_k"`.
        loss_weight: Float. Weight of the importance loss, and of the load loss where
            the load has a gradient; that of its own loss for `"switch"`; not used by
            `"loss_free"`. Defaults to `0.1`.
        noise: `noise_stddev` of noisy gates. Defaults to `"learned"`.
        activation: Activation of the combined output. Defaults to `"sigmoid"`.
        recompute: Bool. See `FeedForwardExperts`. Defaults to `False`.
        shared_units: Int. Hidden units of an expert that every token passes, beside
            those that the gate chooses. Defaults to `0`: no such expert.
        units: Int or None. Width of its output, needed with `shared_units`. Defaults
            to `None`.
        expert_dropout: Float. Share of the hidden units of every expert that is
            dropped in training, of the shared one too. Defaults to `0.0`.
        scaling_factor: Float above 0. Factor of all gates, of those of the groups in a
            hierarchical mixture. Gates that sum to 1 divide what a step of Adam does
            to the answer by k, compared with a dense layer: a factor of about k takes
            that back. Defaults to `1.0`: the paper's gates.
        name: Str. Name of the layer. Defaults to `"moe"`.

    Raises:
        ValueError: `gating` is unknown, a size is out of range, `k` does not fit
            `num_groups`, `units` is missing, or the gate takes no `scaling_factor`.
    """
    checks.verify_choice(gating, "gating", GATINGS)
    k = checks.verify_units(k, "k")
    verify_levels(k, num_groups)
    if noise != "learned" and gating != "noisy_top_k" and num_groups is None:
        raise ValueError(
            "`noise` is that of noisy gates. Received: "
            f"noise={noise!r}, gating={gating!r}. Leave it out, or pass "
            'gating="noisy_top_k".'
        )
    gate = _make_gate(gating, k[0], loss_weight, noise, scaling_factor)
    options: dict[str, Any] = {
        "importance_loss_weight": 0.0 if gating in _OWN_BALANCE else loss_weight,
        "load_loss_weight": loss_weight if gating == "noisy_top_k" else 0.0,
        "activation": activation,
        "shared_experts": _shared_expert(shared_units, units, expert_dropout),
        "name": name,
    }
    experts = FeedForwardExperts(
        num_experts, hidden_units, recompute=recompute, dropout=expert_dropout
    )
    if num_groups is None:
        return MoE(experts, gate, **options)
    is_default = gating == "noisy_top_k" and scaling_factor == 1.0
    primary = None if is_default else gate
    return HierarchicalMoE(
        experts, num_groups, k=k, primary_gating=primary, noise_stddev=noise, **options
    )


def _shared_expert(shared_units, units, dropout):
    if checks.verify_int(shared_units, "shared_units", 0) == 0:
        return None
    units = checks.verify_positive_int(units, "units")
    hidden = keras.layers.Dense(shared_units, activation="relu", use_bias=False)
    dropped = [Dropout(dropout)] if dropout else []
    output = keras.layers.Dense(units, use_bias=False)
    return keras.Sequential([hidden, *dropped, output], name="shared_expert")


# Gates that need no importance loss: they have a loss or a bias of their own.
_OWN_BALANCE = ("loss_free", "switch")


def _make_gate(gating, k, loss_weight, noise, scaling_factor):
    if gating == "balanced":
        if scaling_factor != 1.0:
            raise ValueError(
                "`scaling_factor` must be 1 with gating='balanced'. Received: "
                f"scaling_factor={scaling_factor}. Leave it out, or pass another gate."
            )
        return BalancedGating(k)
    factor = {"scaling_factor": scaling_factor}
    if gating == "noisy_top_k":
        return NoisyTopKGating(k, noise_stddev=noise, **factor)
    if gating == "switch":
        if k != 1:
            raise ValueError(
                f"`k` must be 1 with gating='switch'. Received: k={k}. Pass 1, or "
                "another gate."
            )
        return SwitchGating(switch_loss_weight=loss_weight, **factor)
    kinds = {"top_k": TopKGating, "loss_free": LossFreeGating}
    return kinds[gating](k, **factor)


def middle_layers(
    kind: str,
    *,
    units: int,
    hidden_units: int,
    num_experts: int = 4,
    k: int = 4,
    loss_weight: float = 0.1,
    gating: str = "noisy_top_k",
    noise: Any = "learned",
    activation: Any = "sigmoid",
    shared_units: int = 0,
    expert_dropout: float = 0.0,
    scaling_factor: float = 1.0,
    num_mixtures: int = 1,
) -> list[keras.layers.Layer]:
    """Layers for `MoELanguageModel(middle=...)`, mixture or dense baseline.

    All but `"none"` take about `k * 2 * units * hidden_units` multiply-adds a
    token (`"4xlstm"`: two LSTMs of `units`, equal at the paper's sizes,
    `hidden_units = 2 * units` and `k = 4`).

    Args:
        kind: One of

            * `"moe"`: `num_experts` experts with one hidden layer, and a gate;
            * `"moe_1_wide"`: one expert, hidden layer of `k * hidden_units`, and
              `shared_units` more;
            * `"moe_1_deep"`: one expert, hidden layers of `hidden_units`, as
              many as give equal operations (4 at the paper's sizes);
            * `"4xlstm"`: two more LSTMs;
            * `"none"`: nothing.
        units: Width of the model.
        hidden_units: Hidden units of one expert.
        num_experts: Number of experts, for `"moe"`. Defaults to `4`.
        k: Experts for each token. Defaults to `4`.
        loss_weight: Weight of the importance loss, and of the load loss where the
            load has a gradient. Defaults to `0.1`.
        gating: Gate of `"moe"`, see `make_mixture`. Defaults to `"noisy_top_k"`.
        noise: `noise_stddev` of noisy gates. Defaults to `"learned"`.
        activation: Activation of the output of a mixture, or of one expert.
            Defaults to `"sigmoid"`.
        shared_units: Hidden units of an expert that every token passes, see
            `make_mixture`. Defaults to `0`.
        expert_dropout: Share of the hidden units of every expert, or of the one,
            that is dropped in training. Defaults to `0.0`.
        scaling_factor: Factor of all gates, see `make_mixture`. Defaults to `1.0`.
        num_mixtures: Int. How many mixtures, or dense experts, one after the other;
            operations are then so many times as large. Defaults to `1`.

    Returns:
        A list of new layers.

    Raises:
        ValueError: `kind` or `gating` is unknown, or a size is out of range, or there
            are to be several mixtures of a kind that has none.

    Reference:
        Shazeer et al. 2017, appendix C.1.
    """
    units = checks.verify_positive_int(units, "units")
    hidden_units = checks.verify_positive_int(hidden_units, "hidden_units")
    k = checks.verify_positive_int(k, "k")
    names = names_of(kind, num_mixtures)
    if kind == "moe":
        return [
            make_mixture(
                hidden_units,
                num_experts,
                (k,),
                gating=gating,
                loss_weight=loss_weight,
                noise=noise,
                activation=activation,
                shared_units=shared_units,
                units=units,
                expert_dropout=expert_dropout,
                scaling_factor=scaling_factor,
                name=name,
            )
            for name in names
        ]
    if kind in ("moe_1_wide", "moe_1_deep"):
        sizes: int | list[int] = k * hidden_units + shared_units
        if kind == "moe_1_deep":
            k_of_all = k + shared_units / hidden_units
            sizes = [hidden_units] * num_deep_layers(units, hidden_units, k_of_all)
        return [
            single_expert(sizes, name, activation, expert_dropout) for name in names
        ]
    if kind == "4xlstm":
        return [
            keras.layers.LSTM(units, return_sequences=True, return_state=True)
            for _ in range(2)
        ]
    return []


def names_of(kind, num_mixtures):
    """Names of so many layers of a kind of `middle_layers`."""
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}. Received: kind={kind!r}.")
    num_mixtures = checks.verify_positive_int(num_mixtures, "num_mixtures")
    if num_mixtures > 1 and kind in ("4xlstm", "none"):
        raise ValueError(
            "`num_mixtures` must be 1 where there is none. Received: num_mixtures="
            f"{num_mixtures}, kind={kind!r}. Leave it out, or pass another kind."
        )
    return [kind, *(f"{kind}_{i + 2}" for i in range(num_mixtures - 1))]


def num_deep_layers(units, hidden_units, k):
    """Hidden layers of `"moe_1_deep"`, for the operations of k experts."""
    # units * h + (layers - 1) * h * h + h * units = k * 2 * units * h
    return 1 + max(0, round((k - 1) * 2 * units / hidden_units))


def gate_units(num_experts, k, num_groups=None, gating="noisy_top_k", noise="learned"):
    """Hidden units of a dense expert that cost a token what the gates do.

    Args:
        num_experts: Int. Experts of the mixture.
        k: As for `make_mixture`.
        num_groups: As for `make_mixture`. Defaults to `None`.
        gating: As for `make_mixture`. Defaults to `"noisy_top_k"`.
        noise: As for `make_mixture`: learned, it is a matrix more. Defaults to
            `"learned"`.
    """
    with_noise = 2 if noise == "learned" else 1
    matrices = with_noise if gating == "noisy_top_k" else 1
    # Within groups gates are noisy.
    columns = gate_columns(num_experts, k, num_groups, matrices, with_noise)
    return round(columns / 2)


def gate_columns(num_experts, k, num_groups, matrices, matrices_within):
    """Columns of the gates' matrices that one token meets.

    Args:
        num_experts: Int. Experts of the mixture.
        k: As for `make_mixture`.
        num_groups: As for `make_mixture`.
        matrices: Int. Matrices of the gate, of that of the groups if there are any.
        matrices_within: Int. Those of a gate within a group.
    """
    if num_groups is None:
        return matrices * num_experts
    return matrices * num_groups + matrices_within * k[0] * (num_experts // num_groups)


def single_expert(
    hidden_units: int | Sequence[int],
    name: str,
    activation: Any = "sigmoid",
    dropout: float = 0.0,
) -> MoE:
    """One expert with a gate that is constantly 1: a dense layer."""
    return MoE(
        FeedForwardExperts(1, hidden_units, dropout=dropout),
        SoftmaxGating(),
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
        activation=activation,
        name=name,
    )
