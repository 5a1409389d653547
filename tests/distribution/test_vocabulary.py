"""Words shared out among devices: the results of one device, and no table travels."""

import collections

import numpy as np
import pytest

from tests import helpers
from tests.distribution import children
from tests.distribution.vocabulary_operations_child import (
    CANDIDATES,
    COUNTS,
    arrays,
    weights_of,
)
from tests.oracles import sampled_softmax as oracle

pytestmark = pytest.mark.slow

# In every second batch, of one example, all devices but one have no row.
UNEVEN = {"examples": 25, "steps": 20}
PLAIN = {"middle": False}
RATE = {"learning_rate": 0.01}
CLIPPED_ADAM = {**children.ADAM["options"], "global_clipnorm": 0.1}
CLIPPED_ADAM = {**children.ADAM, "options": CLIPPED_ADAM}
SGD = {"optimizer": "SGD", "options": {"learning_rate": 0.5, "clipnorm": 0.05}}
# Adam hardly sees by what all gradients are multiplied.
CLIPPED_SGD = {"learning_rate": 0.5, "momentum": 0.5, "global_clipnorm": 0.1}
CLIPPED_SGD = {"optimizer": "SGD", "options": CLIPPED_SGD}
SAMPLED = {**CLIPPED_SGD, **PLAIN, **UNEVEN, "num_sampled": 7}
# On one device it is TensorFlow's kernel, whose 1 - beta_2 is rounded: 6e-6 of a move, and
# more of what is computed with all weights.
FACTORED = {**CLIPPED_ADAM, **UNEVEN, "optimizer": "FactoredAdam", "steps": 6}
AVERAGED = {"weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 3}
AVERAGED = {**AVERAGED, **RATE, "gradient_accumulation_steps": 2}
AVERAGED = {**PLAIN, **UNEVEN, "optimizer": "AdamW", "options": AVERAGED}
SMOOTHED = {"loss": "smoothed"}  # of logits, which are then made
WITH_ACCURACY = {"metrics": ["perplexity", "accuracy"]}  # likewise


def run(settings, module="vocabulary_child"):
    return children.run(module, {"engine": "mirrored", **settings}, timeout=1500)


def assert_equal(devices, cases, **settings):
    assert_results(cases, run({"devices": devices, "cases": cases, **settings}))


def assert_results(cases, results):
    for case, result in zip(cases, results, strict=True):
        assert result["start"] == 0.0, case
        assert result["moved"] > 0.01, case
        limit = 3e-5 if case["optimizer"] == "FactoredAdam" else 1e-5
        for name in ("losses", "weights", "figures", "predicted"):
            assert result[name] <= limit, (name, case, result)


@pytest.mark.parametrize(
    ("devices", "cases"),
    [
        (3, [SAMPLED]),
        pytest.param(2, [SAMPLED, FACTORED], marks=pytest.mark.exhaustive),
        pytest.param(3, [{**FACTORED, **WITH_ACCURACY}], marks=pytest.mark.exhaustive),
        pytest.param(4, [SAMPLED, FACTORED], marks=pytest.mark.exhaustive),
    ],
    ids=["3", "2 all", "3 more", "4 all"],
)
def test_training_is_that_of_one_device(devices, cases):
    assert_equal(devices, cases)


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_train_as_one_device(devices):
    cases = [{**SAMPLED, "steps": 6}, {**CLIPPED_ADAM, **UNEVEN, **PLAIN, "steps": 6}]
    settings = {"engine": "mirrored", "devices": devices, "cases": cases}
    for results in children.run_workers("vocabulary_child", settings, timeout=900):
        assert_results(cases, results)


# DTensor cannot accumulate gradients.
ON_MESH = [
    {**CLIPPED_SGD, **PLAIN, **UNEVEN},
    {**FACTORED, **PLAIN, **WITH_ACCURACY, "num_sampled": 7},
]


# With the full softmax `test_checkpoints` has it in the usual run.
@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_training_on_a_mesh_is_that_of_one_device(devices):
    assert_equal(devices, ON_MESH, engine="dtensor")


@pytest.mark.exhaustive
def test_two_clients_of_a_mesh_train_as_one_device():
    cases = [{**SAMPLED, "examples": 24, "steps": 6}]
    settings = {"engine": "dtensor", "devices": 1, "cases": cases}
    for results in children.run_workers(
        "vocabulary_child", settings, timeout=900, who=children.clients_of
    ):
        assert_results(cases, results)


@pytest.mark.exhaustive
def test_other_models_on_a_mesh():
    cases = [
        {**SGD, **UNEVEN, **PLAIN, "model": "tied transformer"},
        {**CLIPPED_ADAM, **UNEVEN, "examples": 24},
    ]
    assert_equal(2, cases, engine="dtensor")


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [2, 4])
def test_other_optimizers_losses_and_models(devices):
    cases = [
        {**SGD, **UNEVEN, "model": "tied transformer"},
        {**SGD, **UNEVEN, **PLAIN, "model": "transformer"},
        {**SGD, **UNEVEN, "model": "translation"},
        {**AVERAGED, **SMOOTHED},
        {**SAMPLED, **WITH_ACCURACY, "optimizer": "Adam", "options": RATE},
        {**SAMPLED, "stateful": True, "examples": 24, "steps": 6},
    ]
    assert_equal(devices, cases)


@pytest.mark.exhaustive
def test_words_are_shared_among_all_whatever_the_groups_of_experts():
    assert_equal(4, [{**CLIPPED_ADAM, **UNEVEN}], group_size=2)


# On a mesh rows are those of all devices; it divides six of them, and not five.
@pytest.fixture(
    scope="module",
    params=[
        ("mirrored", 3, [4, 0, 5]),
        ("dtensor", 3, [6]),
        pytest.param(("mirrored", 4, [1, 3, 2, 6]), marks=pytest.mark.exhaustive),
        pytest.param(("dtensor", 3, [5]), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def operations(request):
    engine, devices, rows = request.param
    settings = {"engine": engine, "devices": devices, "rows": rows}
    return sum(rows), run(settings, "vocabulary_operations_child")


@pytest.mark.parametrize("name", ["rows", "scores", "losses", "sampled", "exact"])
def test_operations_equal_the_oracle(operations, name):
    number, found = operations
    ids, targets, inputs, table, kernel, bias = arrays(number)
    columns = (kernel.T, bias, inputs)
    rows = (kernel, bias, inputs)
    function, given = {
        "rows": (lambda w, _: w[ids], (table, inputs)),
        "scores": (lambda w, b, x: x @ w + b, columns),
        "losses": (lambda w, b, x: oracle.cross_entropy(x, w.T, b, targets), columns),
        "exact": (lambda w, b, x: oracle.cross_entropy(x, w, b, targets), rows),
        "sampled": (
            lambda w, b, x: oracle.sampled_cross_entropy(
                x, w, b, targets, CANDIDATES, COUNTS
            ),
            rows,
        ),
    }[name]
    expected = function(*given)
    np.testing.assert_allclose(found[name]["value"], expected, rtol=1e-12, atol=1e-12)
    weights = weights_of(expected.shape)
    wanted = helpers.oracle.numerical_gradients(
        lambda *arrays: float(np.sum(weights * function(*arrays))), list(given)
    )
    for gradient, each in zip(found[name]["gradients"], wanted, strict=True):
        np.testing.assert_allclose(gradient, each, rtol=1e-4, atol=1e-6)


def test_no_word_raises_on_replicas_and_a_mesh_draws_candidates(operations):
    _, found = operations
    if "no word" in found:  # a mesh does not look
        assert len(found["no word"]) == 2
        for said in found["no word"]:
            assert "is not in [0" in said, said
        return
    first, second = found["drawn"]
    for ids, counts in (first, second):
        assert len(set(ids)) == 8
        assert set(ids) <= set(range(50))
        assert 0 < min(counts) <= max(counts) <= 1
    assert first != second


# Of a step of training on a replica, besides the sum of the other weights' gradients.
# Full: lengths and ids of the embedding, lengths twice, targets, hidden rows, what is told
# of scores, and rows forward and backward; the loss and its count, the gradient of losses
# and the norm. Sampled: lengths and ids twice, candidates and their counts, rows
# forward and backward of embedding and targets, and rows of candidates likewise.
COUNTED = [
    {"all_gather": 7, "all_to_all": 3, "all_reduce": 3},
    {"all_gather": 6, "all_to_all": 4, "all_reduce": 4},
]


def exchanged_by(engine, sampled=(None, 50)):
    """What steps exchange on three devices, for two sizes of the vocabulary."""
    cases = [
        {**CLIPPED_ADAM, **PLAIN, "words": words, "num_sampled": number}
        for number in sampled
        for words in (600, 1201)
    ]
    settings = {"engine": engine, "devices": 3, "exchanged": True, "cases": cases}
    return run(settings)


@pytest.fixture(scope="module")
def exchanged():
    return exchanged_by("mirrored")


@pytest.mark.parametrize("kind", [0, 1], ids=["full", "sampled"])
def test_what_travels_does_not_grow_with_the_vocabulary(exchanged, kind):
    small, large = exchanged[2 * kind : 2 * kind + 2]
    assert small["fit"] == large["fit"]
    assert small["evaluate"] == large["evaluate"]
    names = [name for name, _ in small["fit"] if name != "all_reduce_gradients"]
    assert collections.Counter(names) == COUNTED[kind]


@pytest.mark.parametrize(
    "sampled", [None, pytest.param(50, marks=pytest.mark.exhaustive)]
)
def test_what_travels_on_a_mesh_does_not_grow_with_the_vocabulary(sampled):
    small, large = exchanged_by("dtensor", [sampled])
    for step in ("fit", "evaluate"):
        assert small[step] == large[step]
        assert min(number for _, number in small[step]) > 0  # of numbers, all known
    # Embedding, kernel and bias, each with two slots of Adam: 401 words, of which two are
    # padding on the last device.
    held = [
        (layout, num_bytes)
        for _, _, shape, layout, num_bytes in large["variables"]
        if 1201 in shape
    ]
    parts = [(["expert", "unsharded"], 401 * 64), (["unsharded", "expert"], 401 * 64)]
    assert sorted(held) == sorted([*parts, (["expert"], 401 * 4)] * 3)


def test_devices_hold_their_words_and_the_state_for_them(exchanged):
    found = exchanged[1]
    # Embedding, kernel and bias, each with two slots of Adam: 401, 400, 400 words.
    assert len(found["parts"]) == 9
    for parts, shape in zip(found["parts"], found["tables"], strict=True):
        features = 1 if len(shape) == 1 else 16
        assert parts == [401 * features, 400 * features, 400 * features]
    of_words = [s for s in found["shares"] if s[1] in (401 * 64, 400 * 64)]
    assert [s[2] for s in of_words] == [2 * s[1] for s in of_words]
    assert len(of_words) == 3
