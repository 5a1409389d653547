"""What the experts do: callbacks, metrics and scores."""

from keras_moe.telemetry.expert_specialization import ExpertSpecialisation
from keras_moe.telemetry.expert_usage import ExpertUsage, UsageRecord
from keras_moe.telemetry.information import (
    LabelInformation,
    label_information,
    mutual_information,
)
from keras_moe.telemetry.metrics import Perplexity
from keras_moe.telemetry.specialization import Context, Specialization
from keras_moe.telemetry.statistics import UsageTotals, usage_statistics
from keras_moe.telemetry.translation import translation_scores

__all__ = [
    "Context",
    "ExpertSpecialisation",
    "ExpertUsage",
    "LabelInformation",
    "Perplexity",
    "Specialization",
    "UsageRecord",
    "UsageTotals",
    "label_information",
    "mutual_information",
    "translation_scores",
    "usage_statistics",
]
