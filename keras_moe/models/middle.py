"""What stands between the LSTMs of the paper's language models."""

import keras

from keras_moe import checks
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.gating import SoftmaxGating
from keras_moe.layers.moe import MoE
from keras_moe.layers.noisy_gating import NoisyTopKGating

KINDS = ("moe", "moe_1_wide", "moe_1_deep", "4xlstm", "none")


def middle_layers(
    kind: str,
    *,
    units: int,
    hidden_units: int,
    num_experts: int = 4,
    k: int = 4,
    loss_weight: float = 0.1,
) -> list[keras.layers.Layer]:
    """Layers for `MoELanguageModel(middle=...)`, mixture or dense baseline.

    All but `"none"` take about `k * 2 * units * hidden_units` multiply-adds a
    token (`"4xlstm"`: two LSTMs of `units`, equal at the paper's sizes,
    `hidden_units = 2 * units` and `k = 4`).

    Args:
        kind: One of

            * `"moe"`: `num_experts` experts with one hidden layer, noisy top-k
              gating;
            * `"moe_1_wide"`: one expert, hidden layer of `k * hidden_units`;
            * `"moe_1_deep"`: one expert, hidden layers of `hidden_units`, as
              many as give equal operations (4 at the paper's sizes);
            * `"4xlstm"`: two more LSTMs;
            * `"none"`: nothing.
        units: Width of the model.
        hidden_units: Hidden units of one expert.
        num_experts: Number of experts, for `"moe"`. Defaults to `4`.
        k: Experts for each token. Defaults to `4`.
        loss_weight: Weight of the importance loss and of the load loss.
            Defaults to `0.1`.

    Returns:
        A list of new layers.

    Raises:
        ValueError: `kind` is unknown or a size is out of range.

    Reference:
        Shazeer et al. 2017, appendix C.1.
    """
    units = checks.verify_positive_int(units, "units")
    hidden_units = checks.verify_positive_int(hidden_units, "hidden_units")
    k = checks.verify_positive_int(k, "k")
    if kind == "moe":
        return [
            MoE(
                FeedForwardExperts(num_experts, hidden_units),
                NoisyTopKGating(k=k),
                importance_loss_weight=loss_weight,
                load_loss_weight=loss_weight,
                activation="sigmoid",
                name="moe",
            )
        ]
    if kind == "moe_1_wide":
        return [_single_expert(k * hidden_units, kind)]
    if kind == "moe_1_deep":
        layers = num_deep_layers(units, hidden_units, k)
        return [_single_expert([hidden_units] * layers, kind)]
    if kind == "4xlstm":
        return [
            keras.layers.LSTM(units, return_sequences=True, return_state=True)
            for _ in range(2)
        ]
    if kind == "none":
        return []
    raise ValueError(f"`kind` must be one of {KINDS}. Received: kind={kind!r}.")


def num_deep_layers(units, hidden_units, k):
    """Hidden layers of `"moe_1_deep"`, for the operations of k experts."""
    # units * h + (layers - 1) * h * h + h * units = k * 2 * units * h
    return 1 + max(0, round((k - 1) * 2 * units / hidden_units))


def _single_expert(hidden_units, name):
    """One expert with a gate that is constantly 1: a dense layer."""
    return MoE(
        FeedForwardExperts(1, hidden_units),
        SoftmaxGating(),
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
        activation="sigmoid",
        name=name,
    )
