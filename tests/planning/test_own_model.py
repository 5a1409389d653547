"""Plans of models of one's own, against counts made by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, models, optimizers, planning, runtime
from keras_moe.functional import experts as computing
from keras_moe.functional import ops
from keras_moe.planning.model_plan import memory_of_group
from keras_moe.planning.traced import operations, own_model
from keras_moe.planning.traced.interpreter import Node
from keras_moe.planning.traced.liveness import simulate
from keras_moe.planning.traced.values import Value

CLUSTER = planning.Cluster("c", "d", 8, 16, 1, 0.5, 100, 2, 4, 20.0)


def dense(optimizer="adam"):
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(128), keras.layers.Dense(32)]
    )
    if optimizer:
        model.compile(optimizer, "mse")
    return model


def mixture(num_experts=8):
    experts = layers.FeedForwardExperts(num_experts, 64)
    moe = layers.MoE(experts, layers.TopKGating(k=2))
    model = keras.Sequential([keras.Input((32,)), moe, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


@pytest.fixture(scope="module")
def mixed():
    """A model with eight experts, and its plan on four devices."""
    model = mixture()
    return model, plan(model, num_devices=4)


def bytes_of(variables):
    return sum(np.asarray(v).nbytes for v in variables)


def plan(model, **options):
    return planning.plan(model, CLUSTER, **{"batch_size": 256, **options})


def test_two_layers_by_hand():
    found = plan(dense(), num_devices=1)
    memory = found.memory
    # 64 * 128 + 128 + 128 * 32 + 32 numbers.
    assert memory.weights == memory.gradients == 4 * 12_448
    # Two of Adam for each, its learning rate and its count of steps (int64).
    assert memory.slots == 2 * 4 * 12_448 + 4 + (8 if _counts_in_int64() else 4)
    # Inputs and targets.
    assert memory.inputs == 4 * 256 * (64 + 32)
    # Read by the backward pass: the hidden layer, the outputs, and scalars of the loss,
    # which take 256 bytes each.
    hidden, outputs = 4 * 256 * 128, 4 * 256 * 32
    assert hidden + outputs <= memory.activations <= hidden + outputs + 8 * 256
    # The products of the forward pass, of the kernels' gradients, and of that of the
    # hidden layer: nobody wants that of the inputs.
    first, second = 256 * 64 * 128, 256 * 128 * 32
    assert found.measures.work["dense_multiply_adds"] == 2 * first + 3 * second
    assert found.measures.work["expert_multiply_adds"] == 0
    assert found.measures.mixtures == []
    # At the most: hidden layer, its gradient, outputs and the second kernel's.
    assert 2 * hidden <= memory.step <= 2 * hidden + outputs + 2 * 4 * 12_448


def _counts_in_int64():
    optimizer = keras.optimizers.SGD()
    optimizer.build([])
    return np.asarray(optimizer.iterations).nbytes == 8


def test_more_examples_take_more_of_what_grows_with_them():
    one, two = (plan(dense(), num_devices=1, batch_size=n).memory for n in (256, 512))
    assert two.variables_and_slots == one.variables_and_slots
    assert two.inputs == 2 * one.inputs
    np.testing.assert_allclose(two.activations, 2 * one.activations, rtol=0.01)


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, optimizers.FactoredAdam])
def test_weights_and_slots_are_those_of_the_model(kind):
    model = dense()
    found = plan(model, num_devices=1, optimizer=kind(0.1))
    assert found.memory.weights == bytes_of(model.variables)
    real = kind()
    real.build(model.trainable_variables)
    assert found.memory.slots == bytes_of(real.variables)
    assert found.optimizer == kind.__name__
    assert not model.optimizer.built  # the model's own is as it was


def test_experts_are_shared_and_the_rest_is_not(mixed):
    model, found = mixed
    assert list(found.groups) == [1, 2, 4]
    experts = bytes_of(model.layers[0].experts.weights)
    rest = bytes_of(model.variables) - experts
    for size, group in found.groups.items():
        assert group.memory.weights == rest + experts // size
        trained = bytes_of(model.trainable_variables) - experts + experts // size
        assert group.memory.gradients == trained
        assert 0 < group.memory.slots - 2 * trained <= 16  # counters besides
    # Eight experts on three devices: three on the busiest.
    three = memory_of_group(found.measures, 3, 3, 1.0)
    assert three.weights == rest + experts * 3 // 8
    # Twelve tokens of 256 * 2 rows go away four times: three quarters of four devices.
    assert found.groups[4].exchange_bytes == 4 * 512 * 32 * 4 * 3 // 4
    assert found.groups[1].exchange_bytes == 0
    # What every group has copies of is summed over the groups.
    copies = bytes_of(model.trainable_variables) - experts
    assert found.groups[1].reduction_bytes == round(1.5 * (copies + experts))
    assert found.groups[4].reduction_bytes == round(1.5 * copies)


def test_factored_slots_of_experts_are_shared():
    model = mixture()
    one, four = (
        plan(
            model,
            num_devices=n,
            optimizer=optimizers.FactoredAdam(0.1),
            expert_parallel_size=n,
        ).memory.slots
        for n in (1, 4)
    )
    # Rows and columns of 32 and 64 numbers for both kernels of eight experts, of which
    # a device has two.
    experts = 4 * 8 * 2 * (32 + 64)
    assert one - four == experts * 3 // 4


def test_products_of_experts_by_hand(mixed):
    # 512 rows: two products of 32 * 64 forward, two for the weights, and one for the
    # hidden units; the gradient of the inputs nobody wants.
    work = mixed[1].measures.work
    assert work["expert_multiply_adds"] == 5 * 512 * 32 * 64
    # Rows of the inputs and of hidden units; an expert's take whole units of 256 bytes.
    rows = mixed[1].measures.expert_activations
    assert 4 * 512 * (32 + 64) <= rows <= 4 * 512 * (32 + 64) + 8 * 2 * 256


@pytest.mark.slow
def test_experts_are_computed_as_a_device_with_so_many_computes_them(monkeypatch):
    # One device computes eight experts in blocks; four or fewer one by one.
    monkeypatch.setitem(computing._MOST_UNROLLED, runtime.device_type(), 4)
    model = mixture()
    own = model.layers[0].experts
    found = plan(model, num_devices=4, expert_parallel_size=4)
    assert own.computation is None  # as it was
    said = {}
    for computation in ("blocks", "unrolled"):
        own.computation = computation
        said[computation] = plan(model, num_devices=4, expert_parallel_size=4)
    own.computation = None
    blocks, unrolled = said["blocks"], said["unrolled"]
    assert found.groups[1] == blocks.groups[1] != unrolled.groups[1]
    assert found.groups[2] == unrolled.groups[2] != blocks.groups[2]
    assert found.groups[4] == unrolled.groups[4] != blocks.groups[4]
    assert found.measures.work == unrolled.measures.work
    assert found.most_batch_size == unrolled.most_batch_size
    # More than can be traced one by one in reasonable time are planned as on one device.
    assert own_model._one_by_one(model, 4) == (own,)
    monkeypatch.setattr(own_model, "_MOST_ONE_BY_ONE", 7)
    assert own_model._one_by_one(model, 4) == ()


def test_rows_travel_while_experts_begin(mixed):
    """Two arrays of rows are there besides, and only then."""
    model, found = mixed
    sent = 4 * 512 * 32  # 512 rows of 32 numbers
    peak = found.measures.peak
    # So many that nothing else matters; then twice as many.
    assert peak(4, 4, 2000.0) - peak(4, 4, 1000.0) == 2 * 1000 * sent
    assert peak(1, 4, 2000.0) == peak(1, 4, 1000.0)  # they stay where they are
    # After the mixture comes more than is on the way within it.
    wide = keras.Sequential([model.layers[0], keras.layers.Dense(2000)])
    wide.build((None, 32))
    wide.compile("sgd", "mse")
    peak = plan(wide, num_devices=4).measures.peak
    assert peak(4, 4, 1.5) == peak(4, 4, 1.0)


def test_gradients_wait_for_those_of_all_devices():
    width = 256
    layer = keras.layers.Dense(width, use_bias=False)
    model = keras.Sequential([keras.Input((width,)), layer])
    for _ in range(3):
        model.add(keras.layers.Dense(width, use_bias=False))
    model.compile("sgd", "mse")
    kernel = 4 * width * width
    one, two, four = (
        plan(model, num_devices=n, batch_size=2, expert_parallel_size=1).memory.step
        for n in (1, 2, 4)
    )
    # The gradients of four kernels, and all of them once more in a row. What else
    # there is are rows of 2 * 256 numbers and scalars.
    assert 8 * kernel <= two <= 8.2 * kernel
    assert four == two  # however many devices sum them
    # On one device a kernel is updated before the next gradient is there, and the step
    # of SGD takes the buffer of the gradient.
    assert one <= 4.2 * kernel


def test_experts_of_a_group_are_summed_with_their_like(mixed):
    model, found = mixed
    experts = bytes_of(model.layers[0].experts.weights)
    big = experts // 4  # of two of eight experts
    # Four devices with all experts each: all gradients, twice. In two groups of two each
    # has half of the experts, and sums their gradients with one other.
    tiny = plan(model, num_devices=4, batch_size=2, expert_parallel_size=1).measures
    alone, pairs, together = (tiny.peak(n, 4, 1.0) for n in (1, 2, 4))
    assert 2 * experts <= alone <= 2.5 * experts
    assert experts <= pairs <= 1.3 * experts
    assert together < 2 * big  # nobody else has these: they are not summed


def test_rows_of_tables_are_gathered_from_all_devices():
    table = keras.layers.Embedding(10, 64)
    model = keras.Sequential([keras.Input((8,), dtype="int32"), table])
    model.compile("sgd", "mse")
    peaks = [
        plan(model, num_devices=n, expert_parallel_size=1).memory.step for n in (32, 64)
    ]
    # 256 * 8 rows of 64 numbers and their index (int32) of each of 32 more devices;
    # the step of SGD may be in their buffer or in one of its own.
    rows = 32 * 256 * 8
    assert rows * 4 * 65 <= peaks[1] - peaks[0] <= 2 * rows * 4 * 65


@pytest.mark.slow
def test_recomputing_keeps_fewer_activations():
    model = mixture(num_experts=4)
    kept = plan(model, num_devices=1, batch_size=2048)
    recomputed = plan(model, num_devices=1, batch_size=2048, recompute=True)
    # Two rows a token of 64 hidden units.
    saved = kept.memory.activations - recomputed.memory.activations
    np.testing.assert_allclose(saved, 4 * 2 * 2048 * 64, rtol=0.05)
    assert not model.layers[0].experts.recompute
    assert kept.other_memory == recomputed.memory


@pytest.mark.slow
def test_a_recurrent_layer_keeps_its_steps():
    model = keras.Sequential(
        [keras.Input((None, 16)), keras.layers.LSTM(32, return_sequences=True)]
    )
    model.compile("sgd", "mse")
    less, more = (
        plan(model, num_devices=1, batch_size=64, sequence_length=n) for n in (8, 16)
    )
    # Of every step four gates, the new state and its tangent, the output.
    step = 4 * 64 * 32
    added = more.memory.activations - less.memory.activations
    assert 8 * 7 * step <= added <= 8 * 12 * step


def test_a_buffer_that_nobody_needs_is_taken_over():
    def value(size, **options):
        return Value((size,), tf.float32, **options)

    x = value(1024, is_kept=True)
    a, b, c, d = (value(1024) for _ in range(4))
    first = Node("a", "MatMul", [x], [a], [])
    second = Node("b", "Relu", [a], [b], [], takes_over=range(1))
    third = Node("c", "MatMul", [b], [c], [])
    last = Node("d", "Sub", [b, c], [d], [], takes_over=range(2))
    size = 4 * 1024
    # b lies in a's buffer, d in one of both.
    found = simulate([first, second, third, last], lambda v: v.allocated)
    assert found.peak == 2 * size
    # If a is needed later, b has its own, and c comes on top.
    later = Node("e", "Add", [a, d], [value(1024)], [], takes_over=range(2))
    found = simulate([first, second, third, last, later], lambda v: v.allocated)
    assert found.peak == 3 * size
    third.temporary = 512
    found = simulate([first, second, third, last, later], lambda v: v.allocated)
    assert found.peak == 3 * size + 512
    found = simulate(
        [first, second, third, last, later], lambda v: v.allocated, more={id(third): 64}
    )
    assert found.peak == 3 * size + 512 + 64


def test_a_scatter_copies_what_it_adds_to():
    with tf.Graph().as_default() as graph:
        x = tf.linalg.matmul(tf.zeros([64, 64]), tf.zeros([64, 64]))
        y = tf.tensor_scatter_nd_add(x, [[1], [5]], tf.ones([2, 64]))
        ops.add_at(tf.tanh(y), [[1], [5]], tf.ones([2, 64]))
    kinds = {op.type: operations.may_take_over(op) for op in graph.get_operations()}
    assert list(kinds["TensorScatterAdd"]) == []
    assert list(kinds["Tanh"]) == [0]
    assert list(kinds["ScatterNdNonAliasingAdd"]) == [0]


@pytest.mark.slow
def test_models_of_every_kind_can_be_planned():
    inputs = {"a": keras.Input((8,), name="a"), "b": keras.Input((4,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    two = keras.Model(inputs, {"y": keras.layers.Dense(2, name="y")(joined)})
    assert plan(two, num_devices=1).memory.inputs == 4 * 256 * 12
    assert plan(dense(None), num_devices=1).optimizer == "Adam"
    middle = layers.MoE(layers.FeedForwardExperts(4, 16))
    language = models.MoELanguageModel(50, 8, middle=middle)
    language.build((None, None))
    language.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    found = plan(language, num_devices=2, batch_size=4, sequence_length=8)
    assert found.measures.num_experts == 4
    assert found.measures.mixtures[0].rows == 3 * 4 * 8  # k=3 of four
    given = np.zeros((4, 8), "int32")
    assert plan(
        language, num_devices=2, batch_size=None, batch=(given, given)
    ).memory == (found.memory)


@pytest.mark.slow
def test_advice_says_what_helps():
    small = planning.Cluster("c", "d", 4, 0.0009, 1, 0.5, 100, 2)
    model = mixture()
    found = planning.plan(model, small, batch_size=2048)
    text = " ".join(found.advice)
    assert not found.fits
    assert "does not fit on 4 x d" in text
    assert f"about {found.most_batch_size:,} examples a device fit" in text
    fitting = planning.plan(
        model,
        small,
        batch_size=found.most_batch_size,
        expert_parallel_size=found.expert_parallel_size,
    )
    assert 0.8 <= fitting.memory.peak / found.usable_memory <= 1.1
    roomy = planning.plan(model, CLUSTER, batch_size=64)
    assert "it fits on 8 x d" in roomy.advice[0]
    assert roomy.most_batch_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": None}, "batch_size=None for inputs of"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"expert_parallel_size": 3}, "expert_parallel_size=3, num_devices=8"),
        ({"optimizer": "fastest"}, "optimizer='fastest'"),
        ({"batch_tokens": 8}, "batch_tokens=8 for a model"),
        ({"batch": np.zeros((4, 65), "float32")}, "its step fails"),
        ({"num_devices": 0}, "num_devices=0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(dense(), **options)


def test_models_that_cannot_be_planned_are_refused():
    with pytest.raises(ValueError, match="built=False"):
        plan(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match="batch_size=4 for a preset"):
        planning.plan("moe_256", batch_size=4)
    sequences = keras.Sequential([keras.Input((None, 4)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="sequence_length=None"):
        plan(sequences)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs["x"])

    own = Own()
    own({"x": np.zeros((2, 3), "float32")})
    with pytest.raises(ValueError, match="batch=None for 'own'"):
        plan(own)
    spec = {"x": tf.TensorSpec((256, 3))}
    assert plan(own, batch=(spec,), num_devices=1).memory.inputs == 4 * 256 * 3
