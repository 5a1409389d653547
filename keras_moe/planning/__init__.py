"""What fits on a cluster, and what it costs, before anything runs."""

from keras_moe.planning.cluster import Cluster, cluster_names, load_cluster
from keras_moe.planning.memory import Memory, activation_numbers, memory_of
from keras_moe.planning.model_plan import Group, ModelMemory, ModelPlan
from keras_moe.planning.placing import Placement, place
from keras_moe.planning.planner import Plan, plan
from keras_moe.planning.step_measures import Mixture, StepMeasures, Stored
from keras_moe.planning.traffic import Work
from keras_moe.planning.weak_scaling import Scaling, ScalingPoint, scaling

__all__ = [
    "Cluster",
    "Group",
    "Memory",
    "Mixture",
    "ModelMemory",
    "ModelPlan",
    "Placement",
    "Plan",
    "Scaling",
    "ScalingPoint",
    "StepMeasures",
    "Stored",
    "Work",
    "activation_numbers",
    "cluster_names",
    "load_cluster",
    "memory_of",
    "place",
    "plan",
    "scaling",
]
