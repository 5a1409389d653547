"""Graphs for GPUs: every operation has a kernel, and the host waits for next to nothing.

No GPU is needed, see `tests.gpu_kernels`.
"""

import keras
import pytest

from keras_moe import layers, operations
from keras_moe.functional import static_slots
from tests import gpu_kernels

# A few numbers that the host has to know, each once in a pass or a turn.
ALLOWED = {
    # How many blocks spill beyond the slots, once for each loop.
    "StatelessWhile.input <- Cast",
    "While.input <- Cast",
    # Two whole numbers of Keras' generator; `StatelessRandomGetKeyCounter` runs there.
    "StatelessRandomGetKeyCounter.seed <- Cast",
}
# The loop over time keeps what its backward pass needs in lists, and indices of lists
# are on the host.
ALLOWED_IN_RECURRENCE = ("TensorList",)
FEATURES = 16
KNOWN, UNKNOWN = (4, 32, FEATURES), (None, None, FEATURES)


def moe(num_experts=8, gating=None, *, recompute=False, **options):
    experts = layers.FeedForwardExperts(num_experts, 32, recompute=recompute)
    return layers.MoE(experts, gating or layers.NoisyTopKGating(k=2), **options)


def unexplained(graph, is_recurrent=False):
    found = set(gpu_kernels.faults(graph)) - ALLOWED
    allowed = ALLOWED_IN_RECURRENCE if is_recurrent else ()
    return {text for text in found if not text.startswith(allowed)}


def with_capacity():
    return moe(capacity_factor=1.5, evaluation_capacity_factor=2.0)


def of_layers(**options):
    experts = [keras.layers.Dense(FEATURES, "relu") for _ in range(4)]
    return layers.MoE(
        layers.ExpertList(experts), layers.NoisyTopKGating(k=2), **options
    )


# Name: how to make it, input shape, policy, options of the trace.
ROWS = {
    "default": (moe, KNOWN, "float32", {}),
    "half precision, unknown batch": (moe, UNKNOWN, "mixed_bfloat16", {}),
    "masked": (moe, UNKNOWN, "float32", {"masked": True}),
    "capacity, masked": (with_capacity, UNKNOWN, "mixed_bfloat16", {"masked": True}),
}
SLOW = {
    "unknown batch": (moe, UNKNOWN, "float32", {}),
    "half precision": (moe, KNOWN, "mixed_bfloat16", {}),
    "masked, half precision": (moe, KNOWN, "mixed_bfloat16", {"masked": True}),
    "with Adam": (moe, UNKNOWN, "mixed_bfloat16", {"optimizer": keras.optimizers.Adam}),
    "k=1": (
        lambda: moe(gating=layers.NoisyTopKGating(k=1, normalization="all")),
        UNKNOWN,
        "mixed_bfloat16",
        {},
    ),
    "512 experts": (lambda: moe(512), UNKNOWN, "mixed_bfloat16", {}),
    "1024 experts": (lambda: moe(1024), UNKNOWN, "mixed_bfloat16", {}),
    "capacity": (with_capacity, UNKNOWN, "float32", {}),
    "capacity, known batch": (with_capacity, KNOWN, "mixed_bfloat16", {}),
    "ExpertList, capacity": (
        lambda: of_layers(capacity_factor=1.5, evaluation_capacity_factor=2.0),
        UNKNOWN,
        "float32",
        {"masked": True},
    ),
    "recomputed": (lambda: moe(recompute=True), UNKNOWN, "mixed_bfloat16", {}),
    "BalancedGating": (
        lambda: moe(gating=layers.BalancedGating(k=2), load_loss_weight=0.0),
        UNKNOWN,
        "mixed_bfloat16",
        {},
    ),
    "BalancedGating, masked": (
        lambda: moe(gating=layers.BalancedGating(k=2), load_loss_weight=0.0),
        UNKNOWN,
        "float32",
        {"masked": True},
    ),
    "ExpertChoiceGating, masked": (
        lambda: moe(gating=layers.ExpertChoiceGating()),
        UNKNOWN,
        "mixed_bfloat16",
        {"masked": True},
    ),
    "GShardGating": (
        lambda: moe(gating=layers.GShardGating()),
        UNKNOWN,
        "mixed_bfloat16",
        {},
    ),
    "LossFreeGating": (
        lambda: moe(gating=layers.LossFreeGating(2, num_groups=2)),
        UNKNOWN,
        "mixed_bfloat16",
        {},
    ),
    "HierarchicalMoE": (
        lambda: layers.HierarchicalMoE(layers.FeedForwardExperts(16, 32), 4),
        UNKNOWN,
        "mixed_bfloat16",
        {},
    ),
    "HierarchicalMoE, 1024 experts": (
        lambda: layers.HierarchicalMoE(layers.FeedForwardExperts(1024, 32), 32),
        KNOWN,
        "mixed_bfloat16",
        {},
    ),
    "MoELSTM": (
        lambda: layers.MoELSTM(FEATURES, 8, return_sequences=True),
        UNKNOWN,
        "mixed_bfloat16",
        {},
    ),
}
TABLE = [
    *(pytest.param(row, id=name) for name, row in ROWS.items()),
    *(pytest.param(row, id=name, marks=pytest.mark.slow) for name, row in SLOW.items()),
]


@pytest.mark.parametrize("row", TABLE)
def test_training_stays_on_the_gpu(row):
    make, shape, policy, options = row
    keras.config.set_dtype_policy(policy)
    options = {name: value for name, value in options.items()}
    if "optimizer" in options:
        options["optimizer"] = options["optimizer"]()
    layer = make()
    graph = gpu_kernels.training_graph(layer, shape, **options)
    assert not unexplained(graph, isinstance(layer, layers.MoELSTM))


@pytest.mark.parametrize("row", TABLE)
def test_inference_stays_on_the_gpu(row):
    make, shape, policy, options = row
    keras.config.set_dtype_policy(policy)
    layer = make()
    graph = gpu_kernels.inference_graph(layer, shape, options.get("masked", False))
    assert not unexplained(graph, isinstance(layer, layers.MoELSTM))


@pytest.mark.parametrize("num_experts", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_the_graph_does_not_grow_with_the_number_of_experts(num_experts):
    few, many = (
        gpu_kernels.training_graph(moe(number), UNKNOWN) for number in (8, num_experts)
    )
    # Fewer if a size is the same number as another.
    assert gpu_kernels.num_nodes(many) <= gpu_kernels.num_nodes(few)


@pytest.mark.parametrize("name", ["top_k", "sum_by_expert", "sum_of_rows"])
def test_the_guard_sees_a_stock_operation(monkeypatch, name):
    stock = getattr(operations.Operations, name)
    monkeypatch.setattr(operations.StaticOperations, name, stock)
    assert unexplained(gpu_kernels.training_graph(moe(), UNKNOWN))


def test_the_guard_sees_rows_whose_number_depends_on_the_data(monkeypatch):
    monkeypatch.setattr(
        static_slots.StaticDispatcher, "make_plan", static_slots.Dispatcher().make_plan
    )
    assert unexplained(gpu_kernels.training_graph(moe(), UNKNOWN))


@pytest.mark.parametrize(
    ("shape", "masked"),
    [(UNKNOWN, True), pytest.param(KNOWN, False, marks=pytest.mark.slow)],
)
def test_any_layers_wait_once_for_the_numbers_of_their_rows(shape, masked):
    # How many rows each expert has, all of them at once, and nothing else.
    numbers = "Cast.x <- Cast"
    for graph in (
        gpu_kernels.inference_graph(of_layers(), shape, masked),
        gpu_kernels.training_graph(of_layers(), shape, masked),
    ):
        found = gpu_kernels.faults(graph)
        assert found.pop(numbers) == 1
        assert set(found) <= ALLOWED
