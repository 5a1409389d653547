"""Training on several devices is training on one: losses, weights, state."""

import pytest

from tests.distribution import children
from tests.distribution.children import ADAM, SEVERAL_DEVICES

pytestmark = pytest.mark.slow

SGD = {"optimizer": "SGD", "options": {"learning_rate": 0.5}}
RATE = {"learning_rate": 0.01}
FLAT, HIERARCHICAL, BALANCED = (
    {"layer": layer} for layer in ("flat", "hierarchical", "balanced")
)
SEVEN = {"num_experts": 7}

CLIPPED_ADAM = {**ADAM, "options": {**ADAM["options"], "global_clipnorm": 0.1}}

OPTIMIZERS = [
    {"optimizer": "Adafactor", "options": RATE},
    {"optimizer": "AdamW", "options": {**RATE, "weight_decay": 0.05, "use_ema": True}},
    {"optimizer": "RMSprop", "options": RATE},
    {"optimizer": "Lion", "options": {"learning_rate": 0.003}},
    {"optimizer": "Nadam", "options": RATE},
    {"optimizer": "Ftrl", "options": {"learning_rate": 0.1}},
    {"optimizer": "LossScaleOptimizer", "options": RATE},
]
CLIPPED = [
    {"optimizer": "Adam", "options": {**RATE, "gradient_accumulation_steps": 4}},
    CLIPPED_ADAM,
    {"optimizer": "SGD", "options": {"learning_rate": 0.5, "clipnorm": 0.05}},
]


def assert_equal(cases, results):
    for case, result in zip(cases, results, strict=True):
        assert result["start"] == 0.0, case
        # The run must have learned something, or its end says nothing.
        assert result["moved"] > 0.01, case
        assert result["losses"] <= 1e-5, (case, result)
        assert result["weights"] <= 1e-5, (case, result)
        kept = result["choices_kept"]
        assert result["choices_kept_here"] == pytest.approx(kept, abs=1e-5), case
        dropped = result["overflow"]
        assert result["overflow_here"] == pytest.approx(dropped, abs=1e-6), case
        assert ("capacity" in case) == bool(dropped and min(dropped) > 0.0), case


def assert_equal_on_devices(num_devices, cases):
    assert_equal(cases, children.run("child", {"devices": num_devices, "cases": cases}))


@pytest.mark.parametrize("num_devices", SEVERAL_DEVICES)
@children.cases(
    usual=[{**ADAM, **SEVEN}, {**SGD, **HIERARCHICAL, **SEVEN}],
    others=[SGD, {**ADAM, **HIERARCHICAL}],
)
def test_mixtures_train_as_on_one_device(num_devices, cases):
    assert_equal_on_devices(num_devices, cases)


# Within a block of a transformer.
BLOCKS = {"model": "transformer", "mask": True}


@children.cases(
    usual=[{**SGD, **SEVEN, **BLOCKS, "steps": 6}],
    others=[{**ADAM, **SEVEN, "layer": "gated", "steps": 6}],
)
def test_experts_of_a_user_are_sharded_too(cases):
    assert_equal_on_devices(2, cases)


# In the last batch one device has no row.
LAST = {**ADAM, "steps": 6, "mask": True, "examples": 25}


@children.cases(
    usual=[
        {**LAST, **SEVEN, "layer": "shared"},
        {**LAST, **SEVEN, "computation": "chosen"},
    ],
    others=[
        {**LAST, **SEVEN, **HIERARCHICAL, "dropout": 0.3, "int8": True},
        {**LAST, **SEVEN, "layer": "low rank"},  # with dropout
    ],
)
def test_experts_beside_shared_ones_and_chosen_ones_alone(cases):
    assert_equal_on_devices(2, cases)


@children.cases(
    usual=[{**LAST, "layer": "hierarchical by half"}],
    others=[{**LAST, **SEVEN, "layer": "several gates"}],
)
def test_gates_with_inputs_of_their_own_and_several_gates(cases):
    assert_equal_on_devices(2, cases)


SHORT = {"steps": 6}


@children.cases(
    usual=[{**SGD, **SHORT, **SEVEN, "layer": "hash", "mask": True}],
    others=[
        {**SGD, **SHORT, "layer": "stock"},
        {**SGD, **SHORT, "layer": "groups by hash"},
    ],
)
def test_gates_of_a_user_work_as_on_one_device(cases):
    assert_equal_on_devices(2, cases)


UNEVEN = {"examples": 25, "mask": True}


@pytest.mark.parametrize("num_devices", SEVERAL_DEVICES)
@children.cases(
    usual=[{**ADAM, **SEVEN, **UNEVEN, **HIERARCHICAL, "capacity": 0.8}],
    others=[
        {**SGD, **SEVEN, **UNEVEN, "capacity": 0.8},
        {**SGD, **UNEVEN, "layer": "second by lot", "capacity": 1.0},
        # Tokens have different numbers of experts.
        {**SGD, **UNEVEN, "layer": "above", "capacity": 0.6},
    ],
)
def test_a_capacity_drops_what_one_device_drops(num_devices, cases):
    # In every second batch, of one example, all devices but one have none.
    assert_equal_on_devices(num_devices, cases)


@pytest.mark.parametrize("num_devices", SEVERAL_DEVICES)
@children.cases(
    usual=[{**SGD, **UNEVEN, "layer": "list", "num_experts": 5}],
    others=[{**SGD, **SHORT, "layer": "list", "num_experts": 3, "nested": True}],
)
def test_experts_of_any_kind(num_devices, cases):
    # Batch statistics, dropout and losses of their own are those of one device.
    assert_equal_on_devices(num_devices, cases)


@pytest.mark.parametrize("num_devices", SEVERAL_DEVICES)
@children.cases(
    usual=[{**SGD, **SHORT, "layer": "plain list", "capacity": 0.8}],
    others=[
        {**CLIPPED_ADAM, **SHORT, **UNEVEN, "layer": "groups of a list"},
        {**CLIPPED_ADAM, **SEVEN, **UNEVEN, "layer": "own experts"},
    ],
)
def test_experts_of_any_kind_in_groups_and_with_a_capacity(num_devices, cases):
    assert_equal_on_devices(num_devices, cases)


@pytest.mark.parametrize(
    "num_devices", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 4))]
)
@children.cases(
    # Counts of all steps and devices move its bias.
    usual=[{**SGD, **SHORT, **UNEVEN, "layer": "recurrent", "later": True}],
    others=[
        {**SGD, **SEVEN, **SHORT, **UNEVEN, "layer": "cell"},
        {**ADAM, **SEVEN, **UNEVEN, "layer": "cell", "backwards": True},
        {**SGD, **SHORT, **UNEVEN, "layer": "cell", "later": True, "unroll": True},
        {**SGD, **SHORT, **UNEVEN, "layer": "stacked cells"},
        {**SGD, **SHORT, **UNEVEN, "layer": "attending cell"},
        {**SGD, **SEVEN, **UNEVEN, "layer": "recurrent"},
        {**CLIPPED_ADAM, **SHORT, **UNEVEN, "layer": "recurrent"}
        | {"backwards": True, "segments": 2},
    ],
)
def test_a_mixture_within_a_recurrence(num_devices, cases):
    assert_equal_on_devices(num_devices, cases)


# The last batch has 5 rows.
FIVE = {"examples": 29, "mask": True}


@children.cases(
    usual=[{**ADAM, **BALANCED, **SEVEN, "mask": True, "later": True}],
    others=[
        # Steps of two batches.
        {**FIVE, "layer": "loss-free", "optimizer": "Adam"}
        | {"options": {**RATE, "gradient_accumulation_steps": 2}},
        {**ADAM, **BALANCED},
        {**SGD, **SEVEN, **FIVE, "layer": "expert choice"},
        {**SGD, **FIVE, "layer": "second by lot"},
    ],
)
def test_balanced_gates_see_the_global_batch(cases):
    assert_equal_on_devices(3, cases)


@children.cases(usual=OPTIMIZERS[:1], others=OPTIMIZERS[1:])
def test_every_optimizer(cases):
    assert_equal_on_devices(2, cases)


@children.cases(usual=CLIPPED[:1], others=CLIPPED[1:])
def test_clipping_and_accumulation_act_on_the_global_gradient(cases):
    assert_equal_on_devices(2, cases)


FACTORS = {"learning_rate_factors": {"_experts": 0.5, "_gating": 3.0}}
FACTORED = {"learning_rate": 0.01, "global_clipnorm": 0.05, **FACTORS}


@children.cases(
    usual=[{"optimizer": "FactoredAdam", "options": FACTORED, "use_bias": True}],
    # All rank-2 weights factored too: their state is the same on every device.
    others=[
        {"optimizer": "FactoredAdam", "options": {"factored": ["kernel"]}}
        | {"num_experts": 7, "steps": 15}
    ],
)
def test_factored_state_is_sharded_as_the_experts_are(cases):
    assert_equal_on_devices(2, cases)


@pytest.mark.exhaustive  # on a mesh it is in the usual run
def test_synchronized_normalization_before_and_after():
    normalized = {**ADAM, "normalized": True}
    assert_equal_on_devices(2, [{**normalized, **HIERARCHICAL}, normalized])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            {"examples": 29, "mask": True, "use_bias": True, "later": True},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param({**SEVEN, "examples": 25}, marks=pytest.mark.exhaustive),
        {**HIERARCHICAL, "examples": 25, "later": True},
    ],
)
def test_batches_that_do_not_divide(case):
    # The last batch of each pass has 5 rows, or 1: then two devices have none.
    assert_equal_on_devices(3, [{**ADAM, **case}])


@pytest.mark.parametrize(
    "layer", [HIERARCHICAL, pytest.param(FLAT, marks=pytest.mark.exhaustive)]
)
def test_more_devices_than_experts_or_groups(layer):
    assert_equal_on_devices(3, [{**ADAM, **layer, "num_experts": 2}])


def test_translation_models():
    # Rows of different lengths: replicas have different numbers of tokens.
    assert_equal_on_devices(
        2, [{**ADAM, **HIERARCHICAL, "model": "translation", "steps": 10}]
    )


@pytest.mark.exhaustive
def test_in_float64_nothing_on_the_way_has_fewer_digits():
    # Dropout, noise, masks, the loss over all replicas, the norm of all gradients.
    case = {**CLIPPED_ADAM, **HIERARCHICAL, "model": "translation", "dtype": "float64"}
    result = children.run("child", {"devices": 2, "cases": [{**case, "steps": 5}]})[0]
    assert result["moved"] > 0.001
    assert result["losses"] <= 1e-13, result
    assert result["weights"] <= 1e-11, result


@pytest.mark.parametrize(
    "cases",
    [
        [{**CLIPPED_ADAM, **BALANCED}],
        pytest.param(
            [{**SGD, **HIERARCHICAL}, {**ADAM, **SEVEN}, {**ADAM, "normalized": True}],
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            [
                {**SGD, **SEVEN, "capacity": 0.8, "examples": 25},
                {**SGD, "layer": "list", "num_experts": 3, "steps": 6},
                {**SGD, **SEVEN, "layer": "recurrent", "steps": 6},
                {**SGD, **SEVEN, "layer": "cell", "steps": 6},
            ],
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["1", "2", "3"],
)
def test_several_processes(cases):
    for results in children.run_workers("child", {"devices": 1, "cases": cases}):
        assert_equal(cases, results)


@pytest.mark.exhaustive
def test_many_steps_do_not_hang():
    assert_equal_on_devices(4, [{**SGD, "steps": 100}])


@pytest.mark.exhaustive
def test_many_more_steps_do_not_hang():
    assert_equal_on_devices(4, [{**SGD, "steps": 100, "repeats": 4}])


def test_regularizers_constraints_and_frozen_experts_are_those_of_one_device():
    case = {"optimizer": "AdamW", "options": {**RATE, "weight_decay": 0.1}}
    assert_equal_on_devices(
        2, [{**case, "num_experts": 5, "use_bias": True, "rules": True, "steps": 5}]
    )
