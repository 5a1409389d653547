"""What the experts do: callbacks, metrics and scores."""

import warnings
from typing import Any

from keras_moe.telemetry.expert_contexts import Context, ExpertContexts
from keras_moe.telemetry.expert_specialization import ExpertSpecialization
from keras_moe.telemetry.expert_usage import ExpertUsage, UsageRecord
from keras_moe.telemetry.information import (
    LabelInformation,
    label_information,
    mutual_information,
)
from keras_moe.telemetry.metrics import Perplexity
from keras_moe.telemetry.statistics import UsageTotals, usage_statistics
from keras_moe.telemetry.translation import translation_scores

__all__ = [
    "Context",
    "ExpertContexts",
    "ExpertSpecialization",
    "ExpertUsage",
    "LabelInformation",
    "Perplexity",
    "UsageRecord",
    "UsageTotals",
    "label_information",
    "mutual_information",
    "translation_scores",
    "usage_statistics",
]

_RENAMED = {
    "ExpertSpecialisation": ExpertSpecialization,
    "Specialization": ExpertContexts,
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(
        f"telemetry.{name} is deprecated. Write telemetry.{new.__name__}.",
        DeprecationWarning,
        stacklevel=2,
    )
    return new
