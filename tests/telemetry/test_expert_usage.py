import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, telemetry
from keras_moe.layers.routing_record import recorded_routing

FEATURES = 6


def make_moe(**options):
    gating = options.pop("gating", None) or layers.NoisyTopKGating(
        k=2, gate_initializer="glorot_uniform"
    )
    experts = layers.FeedForwardExperts(options.pop("num_experts", 5), 4)
    return layers.MoE(experts, gating, name="moe", **options)


def compiled(*stack, **options):
    model = keras.Sequential([keras.Input((FEATURES,)), *stack])
    # Gates and experts stay as they are, so that expected counts can be formed.
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model


def rows(rng, number):
    return rng.normal(size=(number, FEATURES)).astype("float32")


def counts_by_hand(moe, x):
    """Without noise, from the gate alone."""
    logits = x @ moe.gating.gate_kernel.numpy()
    chosen = np.argsort(-logits, axis=1)[:, :2]
    return np.bincount(chosen.ravel(), minlength=5)


def gates_by_hand(moe, x):
    logits = np.sort(x @ moe.gating.gate_kernel.numpy(), axis=1)[:, -2:]
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def moe():
    return make_moe(gating=layers.TopKGating(k=2))


def test_training_and_validation_are_counted_apart(moe, rng):
    model, usage = compiled(moe), telemetry.ExpertUsage()
    x, valid = rows(rng, 40), rows(rng, 12)
    history = model.fit(
        x,
        x,
        batch_size=8,
        epochs=2,
        validation_data=(valid, valid),
        verbose=0,
        callbacks=[usage],
    ).history
    records = usage.records["moe"]
    assert [r.step for r in records["train"]] == [5, 10]
    assert [r.step for r in records["validation"]] == [5, 10]
    for record in records["train"]:
        np.testing.assert_array_equal(record.totals.counts, counts_by_hand(moe, x))
    for record in records["validation"]:
        np.testing.assert_array_equal(record.totals.counts, counts_by_hand(moe, valid))
    for prefix, data in (("", x), ("val_", valid)):
        counts, gates = counts_by_hand(moe, data), gates_by_hand(moe, data)
        entropy = -(gates * np.log(gates)).sum(1).mean()
        assert history[f"{prefix}moe_gate_entropy"] == pytest.approx(
            [entropy, entropy], rel=1e-5
        )
        assert history[f"{prefix}moe_dead_experts"] == [np.sum(counts == 0)] * 2
        # The layer's own entry and the callback's figure say the same.
        split = "validation" if prefix else "train"
        assert history[f"{prefix}moe_load_cv"][-1] == pytest.approx(
            records[split][-1].figures["load_cv"], rel=1e-5
        )


def test_windows_of_an_interval_hold_their_own_steps(moe, rng):
    model, usage = compiled(moe), telemetry.ExpertUsage(interval=3)
    x = rows(rng, 8 * 8)
    model.fit(x, x, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[usage])
    records = usage.records["moe"]["train"]
    assert [r.step for r in records] == [3, 6, 8, 11, 14, 16]
    for record, (start, end) in zip(
        records[:3], ((0, 24), (24, 48), (48, 64)), strict=True
    ):
        np.testing.assert_array_equal(
            record.totals.counts, counts_by_hand(moe, x[start:end])
        )
        assert record.totals.tokens == end - start


def test_several_steps_in_one_execution(moe, rng):
    model, usage = compiled(moe, steps_per_execution=3), telemetry.ExpertUsage()
    x = rows(rng, 8 * 8)
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[usage])
    (record,) = usage.records["moe"]["train"]
    assert record.step == 8
    np.testing.assert_array_equal(record.totals.counts, counts_by_hand(moe, x))


def test_a_run_that_goes_on_counts_its_steps_on(moe, rng):
    model, usage = compiled(moe), telemetry.ExpertUsage()
    x = rows(rng, 16)
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[usage])
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[usage])
    assert [r.step for r in usage.records["moe"]["train"]] == [2, 4]


@pytest.mark.slow
def test_dead_experts_and_overflow_are_seen(rng):
    moe = make_moe(gating=layers.TopKGating(k=2, gate_initializer="zeros"))
    model, usage = compiled(moe), telemetry.ExpertUsage()
    x = rows(rng, 16)
    logs = model.fit(x, x, verbose=0, callbacks=[usage]).history
    # All logits tie: experts 0 and 1 take everything, each half the weight.
    assert logs["moe_dead_experts"] == [3]
    assert logs["moe_gate_entropy"] == pytest.approx([np.log(2)])
    assert logs["moe_max_over_mean_load"] == pytest.approx([2.5])
    keras.utils.clear_session()
    moe = make_moe(
        gating=layers.TopKGating(k=2, gate_initializer="zeros"), capacity_factor=1.0
    )
    model, usage = compiled(moe), telemetry.ExpertUsage()
    model.fit(x, x, verbose=0, callbacks=[usage])
    # Capacity ceil(2 * 16 / 5) = 7 of 16 tokens for each of two experts.
    figures = usage.records["moe"]["train"][0].figures
    assert figures["overflow"] == pytest.approx(18 / 32)


@pytest.mark.slow
def test_every_kind_of_mixture_is_watched(rng):
    experts = layers.FeedForwardExperts(6, 4)
    tree = layers.HierarchicalMoE(experts, num_groups=3, k=(2, 1), name="tree")
    balanced = layers.MoE(
        layers.FeedForwardExperts(4, 4), layers.BalancedGating(k=2), name="balanced"
    )
    dense = layers.MoE(layers.FeedForwardExperts(1, 4), layers.SoftmaxGating())
    model, usage = compiled(tree, balanced, dense), telemetry.ExpertUsage()
    x = rows(rng, 16)
    model.fit(x, x, batch_size=16, verbose=0, callbacks=[usage])
    assert set(usage.records) == {"tree", "balanced"}  # one expert: nothing to see
    record = usage.records["balanced"]["train"][0]
    np.testing.assert_array_equal(record.totals.counts, [8.0] * 4)
    record = usage.records["tree"]["train"][0]
    assert record.totals.counts.sum() == 32
    assert 0 < record.figures["gate_entropy"] <= np.log(2) + 1e-6


@pytest.mark.slow
def test_a_recurrent_mixture_is_watched_without_entropy(rng):
    inputs = keras.Input((3, FEATURES))
    outputs = layers.MoELSTM(4, 5, layers.NoisyTopKGating(k=2), name="moe")(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    usage = telemetry.ExpertUsage()
    x, y = rng.normal(size=(8, 3, FEATURES)), rng.normal(size=(8, 4))
    logs = model.fit(x, y, batch_size=8, verbose=0, callbacks=[usage]).history
    assert usage.records["moe"]["train"][0].totals.counts.sum() == 8 * 3 * 2
    assert "moe_dead_experts" in logs
    assert "moe_gate_entropy" not in logs


def test_noise_of_training_is_in_the_counts(rng):
    moe = make_moe()
    model, usage = compiled(moe), telemetry.ExpertUsage()
    x = rows(rng, 64)
    model.fit(x, x, batch_size=64, verbose=0, callbacks=[usage])
    seen = usage.records["moe"]["train"][0].totals.counts
    assert seen.sum() == 128
    assert np.any(seen != counts_by_hand(moe, x))


@pytest.mark.slow
def test_the_counts_are_those_of_the_routing(rng):
    moe = make_moe()
    model, usage = compiled(moe), telemetry.ExpertUsage()
    x = rows(rng, 32)
    model.fit(x, x, verbose=0)
    model.evaluate(x, x, verbose=0, callbacks=[usage])
    with recorded_routing([moe]) as records:
        model(x)
    statistics = records["moe"][0].result.statistics
    (record,) = usage.records["moe"]["validation"]
    assert record.step == 1
    np.testing.assert_array_equal(record.totals.counts, statistics.counts)
    np.testing.assert_allclose(
        record.totals.importance, statistics.importance, rtol=1e-5
    )


def test_memory_stays_bounded_and_nothing_is_lost(moe, rng):
    model = compiled(moe)
    usage = telemetry.ExpertUsage(interval=1, max_records=4)
    x = rows(rng, 13 * 4)
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[usage])
    records = usage.records["moe"]["train"]
    assert len(records) <= 4
    assert records[-1].step == 13
    total = sum(record.totals.counts for record in records)
    np.testing.assert_array_equal(total, counts_by_hand(moe, x))


def test_tensorboard_holds_scalars_and_histograms(moe, rng, tmp_path):
    model = compiled(moe)
    usage = telemetry.ExpertUsage(tmp_path, interval=2)
    x = rows(rng, 32)
    model.fit(x, x, batch_size=8, validation_data=(x, x), verbose=0, callbacks=[usage])
    scalars, histograms = read_events(tmp_path / "train")
    record = usage.records["moe"]["train"][1]
    assert scalars["moe/load_cv", 4] == pytest.approx(record.figures["load_cv"])
    assert ("moe/gate_entropy", 2) in scalars
    buckets = histograms["moe/load_over_mean", 4]
    assert buckets[:, 2].sum() == 5  # one entry for each expert
    relative = record.totals.counts / record.totals.counts.mean()
    assert buckets[0, 0] == pytest.approx(relative.min())
    assert buckets[-1, 1] == pytest.approx(relative.max())
    scalars, histograms = read_events(tmp_path / "validation")
    assert ("moe/dead_experts", 4) in scalars
    assert ("moe/importance_over_mean", 4) in histograms


def read_events(folder):
    scalars, histograms = {}, {}
    (path,) = folder.glob("events.out.tfevents.*")
    for serialized in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(serialized.numpy())
        for value in event.summary.value:
            array = tf.make_ndarray(value.tensor)
            kept = scalars if array.ndim == 0 else histograms
            kept[value.tag, event.step] = array if array.ndim else float(array)
    return scalars, histograms


@pytest.mark.slow
def test_the_picture_shows_the_loads(moe, rng, tmp_path):
    picture = tmp_path / "usage.png"
    model = compiled(moe)
    usage = telemetry.ExpertUsage(interval=1, picture=picture)
    x = rows(rng, 32)
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[usage])
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    # Another use of the experts is another picture.
    moe.gating.gate_kernel.assign(-moe.gating.gate_kernel)
    usage = telemetry.ExpertUsage(interval=1, picture=picture)
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[usage])
    assert picture.read_bytes() != first


def test_errors(rng):
    with pytest.raises(ValueError, match="interval=0"):
        telemetry.ExpertUsage(interval=0)
    with pytest.raises(ValueError, match="max_records=1"):
        telemetry.ExpertUsage(max_records=1)
    model = compiled(keras.layers.Dense(FEATURES))
    x = rows(rng, 4)
    with pytest.raises(ValueError, match="with 0 of them"):
        model.fit(x, x, verbose=0, callbacks=[telemetry.ExpertUsage()])
    with pytest.raises(ValueError, match="0 records"):
        telemetry.ExpertUsage().draw("nowhere.png")


def fit_with_noise(rng, noise, epochs=3, **options):
    """Logits that favour expert 0 by 1, under noise of a given size."""
    gating = layers.NoisyTopKGating(k=1, normalization="all", seed=0)
    moe = make_moe(gating=gating, **options)
    model, usage = compiled(moe, run_eagerly=True), telemetry.ExpertUsage()
    x = rng.uniform(0.5, 1.5, size=(400, FEATURES)).astype("float32")
    gate, scale = np.zeros((FEATURES, 5)), np.full((FEATURES, 5), noise / FEATURES)
    gate[:, 0] = 1.0 / FEATURES
    gating.gate_kernel.assign(gate)
    gating.noise_kernel.assign(scale)
    model.fit(
        x,
        x,
        batch_size=400,
        epochs=epochs,
        validation_data=(x, x),
        verbose=0,
        callbacks=[usage],
    )
    return usage


def test_a_gate_that_chooses_by_its_noise_is_warned_of_once(rng):
    # Without noise expert 0 takes all of 5: a variation of sqrt(5 - 1) = 2.
    message = (
        r"moe: .*even in training \(load_cv=0\.\d+\).*val_moe_load_cv=2\.00.*"
        r"max_over_mean_load=5\.0, moe_choices_kept=0\.\d+\).*noise_epsilon"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        fit_with_noise(rng, noise=20.0, epochs=5)
    assert len([w for w in caught if "noise_epsilon" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match=message):
        fit_with_noise(rng, noise=20.0, epochs=1)


def test_a_gate_that_chooses_by_the_token_is_not_warned_of(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_with_noise(rng, noise=-20.0)  # next to no noise: uneven in both
