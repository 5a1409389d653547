"""The configurations of the paper, by name."""

import dataclasses
import math
from typing import Any

from keras_moe import checks
from keras_moe.layers.hierarchical_gating import verify_groups
from keras_moe.models.middle import GATINGS, KINDS, verify_levels

EXPERT_OPTIMIZERS = ("adam", "factored_adam")
_MAY_BE_0 = (
    "lstm_layers num_experts shared_units constant_steps encoder_lstms decoder_lstms"
)
_CHOICES = {
    "kind": ("language_model", "translation"),
    "middle": KINDS,
    "gating": GATINGS,
    "expert_optimizer": EXPERT_OPTIMIZERS,
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """One configuration: what the model is, and how it was trained.

    Two kinds: a `"language_model"` (appendices C and D) is embedding, LSTM,
    `middle`, LSTM, softmax; a `"translation"` model (appendix E) is an encoder
    of `encoder_lstms` and a decoder of `decoder_lstms` layers, each with a
    mixture `middle` after its `moe_after[...]`-th LSTM, and attention.

    Attributes:
        name: Str. Its name, see `preset_names`.
        kind: `"language_model"` or `"translation"`.
        vocabulary_size: Int. Words; of wordpieces shared by source and target
            for translation.
        units: Int. Width of every layer's output.
        lstm_units: Int or None. LSTM cells, projected to `units`; None means
            `units` and no projection.
        lstm_layers: Int. LSTMs of a language model outside `middle`: 1 or 2.
        middle: Str. A `kind` of `middle_layers`.
        num_experts: Int. Experts of one mixture; 0 without.
        num_groups: Int or None. First-level branching a of a hierarchical
            mixture; None is flat.
        k: Tuple. `(k,)`, or `(groups, experts in each)` for a hierarchical one.
        hidden_units: Int. Hidden units of one expert.
        shared_units: Int. Hidden units of an expert that every token passes.
        gating: `"noisy_top_k"`, `"balanced"` (appendix F) or another gate of
            `make_mixture`.
        noise: `"learned"` or a float, the standard deviation of the noise of noisy
            gates.
        recompute: Bool. Whether hidden activations are computed again in the
            backward pass (appendix D).
        expert_optimizer: `"adam"` or `"factored_adam"` (appendix D).
        dropout: Float. The paper's DropProb.
        loss_weight: Float. Weight of the importance and the load loss.
        batch_tokens: Int. Words of a batch over all devices.
        training_steps: Int or None. Steps the paper trained; None: not stated.
        warmup_steps: Int. Steps of linear rise of the learning rate.
        constant_steps: Int. Steps at the highest rate after that.
        num_sampled: Int or None. Candidates of the sampled softmax in training;
            None trains the full softmax.
        num_devices: Int or None. GPUs (K40) the paper trained on.
        encoder_lstms: Int. LSTMs of the encoder of a translation model.
        decoder_lstms: Int. LSTMs of its decoder.
        moe_after: Tuple. After how many LSTMs of encoder and decoder the
            mixture stands.
        reported: Dict of the paper's figures, in millions but for those in
            billions: `operations_m`, `parameters_m`, `total_b`, `tflops`,
            `perplexity`.
        assumed: Tuple of the names of attributes that the paper leaves open.

    Raises:
        ValueError: An attribute is out of range, or the sizes do not fit.
    """

    name: str
    kind: str = "language_model"
    vocabulary_size: int = 793_471
    units: int = 512
    lstm_units: int | None = None
    lstm_layers: int = 2
    middle: str = "moe"
    num_experts: int = 0
    num_groups: int | None = None
    k: tuple[int, ...] = (4,)
    hidden_units: int = 1024
    shared_units: int = 0
    gating: str = "noisy_top_k"
    noise: Any = "learned"
    recompute: bool = False
    expert_optimizer: str = "adam"
    dropout: float = 0.1
    loss_weight: float = 0.1
    batch_tokens: int = 300_000
    training_steps: int | None = 27_000
    warmup_steps: int = 1_000
    constant_steps: int = 0
    num_sampled: int | None = 8_192
    num_devices: int | None = 16
    encoder_lstms: int = 0
    decoder_lstms: int = 0
    moe_after: tuple[int, ...] = ()
    reported: dict[str, float] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ("num_sampled",)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.type == int | None and value is not None):
                least = int(field.name not in _MAY_BE_0.split())
                value = checks.verify_int(value, field.name, least)
            elif field.type == tuple[int, ...] and len(value):
                value = checks.verify_units(value, field.name)
            elif field.name in _CHOICES:
                checks.verify_choice(value, field.name, _CHOICES[field.name])
            object.__setattr__(self, field.name, value)
        if self.noise != "learned":
            checks.verify_number(
                self.noise, "noise", rest=", which may be 'learned', too."
            )
        checks.verify_rate(self.dropout, "dropout")
        checks.verify_weight(self.loss_weight, "loss_weight")
        if self.middle == "moe":
            verify_levels(self.k, self.num_groups)
            if self.num_groups is None:
                checks.verify_k(self.k[0], self.num_experts)
            else:
                verify_groups(self.num_experts, self.num_groups, self.k)

    @property
    def gate_matrices(self) -> int:
        """Matrices of a gate: one more where it learns its noise."""
        return 2 if (self.gating, self.noise) == ("noisy_top_k", "learned") else 1

    @property
    def group_size(self) -> int:
        """Experts of one group; all experts of a flat mixture."""
        return self.num_experts // (self.num_groups or 1)

    @property
    def experts_per_token(self) -> int:
        """Experts that one token meets in one mixture."""
        return math.prod(self.k) if self.middle == "moe" else 0

    @property
    def num_mixtures(self) -> int:
        """Mixtures in the model."""
        if self.middle != "moe":
            return 0
        return 1 if self.kind == "language_model" else len(self.moe_after)


def as_preset(value: Any) -> Preset:
    """A `Preset`, or the one of a name."""
    return value if isinstance(value, Preset) else preset(value)


def _flat(name, num_experts, **options):
    return Preset(name, num_experts=num_experts, **options)


def _hierarchical(name, num_experts, num_groups, **options):
    return Preset(
        name, num_experts=num_experts, num_groups=num_groups, k=(2, 2), **options
    )


def _reported(operations, parameters, total, tflops, perplexity):
    values = {
        "operations_m": operations,
        "parameters_m": parameters,
        "total_b": total,
        "tflops": tflops,
        "perplexity": perplexity,
    }
    return {key: value for key, value in values.items() if value is not None}


def _one_billion_words():
    """Table 7 (and table 1): the 1-billion-word benchmark."""
    r = _reported
    lstm: dict[str, Any] = {"middle": "none", "lstm_layers": 1}
    large: dict[str, Any] = {"units": 1024, "num_devices": 32}
    branching = ("num_sampled", "num_groups")
    return [
        Preset(
            "lstm_512_512",
            lstm_units=512,
            **lstm,
            reported=r(2.4, 2.4, 0.8, None, 54.1),
        ),
        Preset(
            "lstm_1024_512",
            lstm_units=1024,
            **lstm,
            reported=r(4.7, 4.7, 0.8, None, 48.2),
        ),
        Preset(
            "lstm_2048_512",
            lstm_units=2048,
            **lstm,
            reported=r(9.4, 9.4, 0.8, 1.21, 44.7),
        ),
        Preset("4xlstm_512", middle="4xlstm", reported=r(8.4, 8.4, 0.8, 1.07, 46.0)),
        Preset(
            "moe_1_wide", middle="moe_1_wide", reported=r(8.4, 8.4, 0.8, 1.29, 46.1)
        ),
        Preset(
            "moe_1_deep", middle="moe_1_deep", reported=r(8.4, 8.4, 0.8, 1.29, 45.7)
        ),
        _flat("moe_4", 4, reported=r(8.4, 8.4, 0.8, 0.52, 45.0)),
        _flat("moe_32", 32, reported=r(8.4, 37.8, 0.9, 0.87, 39.7)),
        _flat("moe_256", 256, reported=r(8.6, 272.9, 1.1, 0.81, 35.7)),
        _hierarchical("moe_256_h", 256, 16, reported=r(8.4, 272.9, 1.1, 0.89, 36.0)),
        _hierarchical(
            "moe_1024_h",
            1024,
            16,
            dropout=0.2,
            reported=r(8.5, 1079.0, 1.9, 0.90, 34.6),
        ),
        _hierarchical(
            "moe_4096_h",
            4096,
            16,
            dropout=0.2,
            reported=r(8.9, 4303.4, 5.1, 0.74, 34.1),
        ),
        Preset(
            "2xlstm_8192_1024",
            lstm_units=8192,
            middle="none",
            dropout=0.25,
            **large,
            reported=r(151.0, 151.0, 1.8, 1.09, 34.7),
        ),
        _hierarchical(
            "moe_34m",
            1024,
            32,
            hidden_units=2048,
            dropout=0.3,
            **large,
            reported=r(33.8, 4313.9, 6.0, 1.22, 31.3),
            assumed=branching,
        ),
        _hierarchical(
            "moe_143m",
            256,
            32,
            lstm_units=4096,
            hidden_units=8192,
            dropout=0.4,
            **large,
            reported=r(142.7, 4371.1, 6.0, 1.56, 28.0),
            assumed=branching,
        ),
    ]


def _hundred_billion_words():
    """Table 8: the 100-billion-word corpus."""
    r = _reported
    # The vocabulary is not stated; the totals imply 75,000 to 110,000 words.
    common: dict[str, Any] = {
        "vocabulary_size": 100_000,
        "batch_tokens": 2_500_000,
        "training_steps": 40_000,
        "num_devices": 32,
        "assumed": ("num_sampled", "vocabulary_size", "dropout", "loss_weight"),
    }
    saving: dict[str, Any] = {"recompute": True, "expert_optimizer": "factored_adam"}
    rows = [
        (256, 32, 32, r(8.4, 272.9, 0.4, 1.11, 35.3)),
        (1024, 32, 32, r(8.5, 1079.0, 1.2, 1.14, 32.7)),
        (4096, 64, 32, r(8.6, 4303.4, 4.4, 1.07, 30.9)),
        (16384, 128, 32, r(8.8, 17201.0, 17.3, 0.96, 29.7)),
        (65536, 256, 64, r(9.2, 68791.0, 68.9, 0.72, 28.9)),
        (131072, 256, 128, r(9.7, 137577.6, 137.7, 0.30, 29.2)),
    ]
    found = [
        Preset(
            "4xlstm_512_100b",
            middle="4xlstm",
            **common,
            reported=r(8.4, 8.4, 0.1, 1.23, 47.0),
        ),
        _flat("moe_32_100b", 32, **common, reported=r(8.4, 37.8, 0.1, 0.83, 40.4)),
    ]
    for experts, groups, devices, reported in rows:
        # A name that table 7 has too gets the corpus added.
        suffix = "_100b" if experts <= 4096 else ""
        found.append(
            _hierarchical(
                f"moe_{experts}_h{suffix}",
                experts,
                groups,
                **{**common, "num_devices": devices},
                **saving,
                reported=reported,
            )
        )
    return found


def _translation():
    """Sections 5.3 and 5.4, appendix E."""
    common: dict[str, Any] = {
        "kind": "translation",
        "vocabulary_size": 32_768,
        "lstm_units": 2048,
        "lstm_layers": 0,
        "hidden_units": 2048,
        "gating": "balanced",
        "dropout": 0.4,
        "loss_weight": 0.01,
        "batch_tokens": 64 * 16_000,
        "training_steps": None,
        "warmup_steps": 2_000,
        "constant_steps": 8_000,
        "num_sampled": None,
        "num_devices": 64,
        "encoder_lstms": 3,
        "decoder_lstms": 2,
        "moe_after": (2, 1),
        "assumed": ("vocabulary_size", "num_groups", "num_sampled"),
    }
    reported = {"operations_m": 85.0, "total_b": 8.7}
    return [
        Preset("mt_no_experts", middle="none", **common),
        _flat("mt_moe_32", 32, **common, reported={"operations_m": 85.0}),
        _hierarchical(
            "mt_moe_512_h", 512, 16, **common, reported={"operations_m": 85.0}
        ),
        _hierarchical("mt_moe_2048_h", 2048, 32, **common, reported=reported),
        _flat(
            "mt_moe_multilingual",
            512,
            **{
                **common,
                "k": (2,),
                "hidden_units": 8192,
                "gating": "noisy_top_k",
                "assumed": ("vocabulary_size", "dropout", "num_sampled"),
            },
            reported={"operations_m": 102.0, "total_b": 8.7},
        ),
    ]


_PRESETS = {
    row.name: row
    for row in (*_one_billion_words(), *_hundred_billion_words(), *_translation())
}


def preset_names() -> list[str]:
    """Names of all presets, in the order of the paper's tables."""
    return list(_PRESETS)


def preset(name: str) -> Preset:
    """The configuration of the paper with this name.

    Rows of table 7 have the paper's names in lower case with underscores, those
    of table 8 likewise, with `_100b` added where table 7 has the name as well.
    Translation models begin with `mt_`.

    Args:
        name: One of `preset_names()`.

    Returns:
        The `Preset`.

    Raises:
        ValueError: There is no preset of that name.

    Example:

    >>> keras_moe.models.preset("moe_4096_h").num_experts
    4096

    Reference:
        Shazeer et al. 2017, tables 1, 7 and 8, appendices C, D and E.
    """
    if name not in _PRESETS:
        raise ValueError(
            f"`name` must be a preset of the paper. Received: name={name!r}. Pass one "
            f"of {', '.join(_PRESETS)}."
        )
    return _PRESETS[name]
