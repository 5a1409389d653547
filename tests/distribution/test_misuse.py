"""What cannot work on several devices says so, with the remedy."""

import pytest

from tests.distribution import children


@pytest.fixture(scope="module")
def messages():
    return children.run("misuse_child", {"devices": 2})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("built_outside", ("built outside", "with strategy.scope()")),
        ("other_strategy", ("2 replicas", "Build the model again")),
        ("eager", ("run_eagerly=True", "leave it False")),
        ("steps_per_execution", ("steps_per_execution=4", "set it to 1")),
        ("parameter_server", ("must be a MirroredStrategy", "outside of any")),
        ("tpu", ("must be a MirroredStrategy", "outside of any")),
        ("lamb", ("Lamb", "Use Adam")),
        ("built_in_replica", ("before `strategy.run`", "scope of the strategy")),
        ("device_order", ("order of their numbers", "CPU:1", "ascending")),
        ("size_3", ("`size` must divide", "size=3 for 2 replicas", "[1, 2]")),
        ("size_0", ("`size` must be a whole number of at least 1", "size=0")),
        ("size_float", ("`size` must be a whole number", "size=1.0")),
        ("size_later", ("size=1 after experts were built for 2", "right after")),
        ("size_parameter_server", ("must be a MirroredStrategy",)),
        ("words_later", ("`shard_vocabulary` must be called before", "right after")),
        ("words_untouched", ("'decay'", "untouched_rows='keep'", "embeddings")),
        ("words_factored", ("FactoredAdam", "of shape (5, 4)", "Factor the kernels")),
        ("words_adafactor", ("experts or words", "do not shard the vocabulary")),
        ("words_lamb", ("Lamb", "Use Adam")),
        ("words_parameter_server", ("must be a MirroredStrategy",)),
        ("counts_in_a_loop", ("within a loop", "unroll=True", "`MoELSTM`")),
        ("mixture_in_a_loop", ("within a loop", "a `MoE`", "unroll=True")),
        ("size_dtensor", ("create_mesh(..., expert_parallel_size=2)",)),
    ],
)
def test_misuse_is_a_clear_error(messages, case, parts):
    kind, text = messages[case]
    assert kind == "ValueError", messages[case]
    for part in parts:
        assert part in text, text


@pytest.mark.slow
def test_xla_is_not_used_and_keras_says_so(messages):
    kind, text = messages["xla"]
    assert kind == "UserWarning"
    assert "jit_compile=False" in text


@pytest.mark.slow
def test_models_without_experts_train_as_before(messages):
    assert messages["plain"] == ["", ""]
    assert messages["dense_eager"] == ["", ""]


@pytest.mark.slow
def test_a_size_may_be_set_again_and_that_of_one_device_is_1(messages):
    assert messages["size_as_before"] == ["", ""]
    assert messages["size_one_device"] == ["", ""]
    assert messages["words_again"] == ["", ""]


@pytest.mark.slow
def test_a_process_may_have_several_strategies(messages):
    assert messages["second_strategy"] == ["", ""]
