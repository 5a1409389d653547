"""What experts that are made of products with kernels share.

Kernels and biases with their rules; low-rank additions to kernels (LoRA); kernels of
eight bits.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.functional.feed_forward import taking_one
from keras_moe.functional.kernels import Kernel, merged
from keras_moe.layers.base_experts import Experts
from keras_moe.layers.expert_rules import kernels_for_update
from keras_moe.layers.tracking import track_entries
from keras_moe.types import at_least_float32


class KernelExperts(Experts):
    """Experts whose weights are kernels, with or without biases.

    The base of `FeedForwardExperts` and `GatedExperts`, which say which kernels there
    are and what is computed with them. Arguments are documented there.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        output_units: int | None,
        activation: Any,
        use_bias: bool,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
        frozen_experts: Sequence[int],
        recompute: bool,
        computation: str | None,
        lora_rank: int | None,
        lora_alpha: float | None,
        **kwargs: Any,
    ):
        super().__init__(
            num_experts,
            output_units=output_units,
            recompute=recompute,
            computation=computation,
            frozen_experts=frozen_experts,
            **kwargs,
        )
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        if lora_rank is not None:
            lora_rank = self._verify_lora(lora_rank, "lora_rank")
        self.lora_rank: Any = lora_rank
        self.lora_alpha: Any = _alpha(lora_alpha, lora_rank)
        self.kernels: list[Any] = []
        self.biases: list[Any] = []
        # Of each kernel, where there are such weights.
        self.kernel_scales: list[Any] = []
        self.lora_kernels_a: list[Any] = []
        self.lora_kernels_b: list[Any] = []

    @property
    def lora_enabled(self) -> bool:
        """Whether low-rank additions are trained in place of the kernels."""
        return len(self.lora_kernels_a) > 0

    def add_kernels(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Adds kernels, each followed by its bias; to be called in `build`, once.

        Args:
            shapes: Shape of one expert's kernel, `(in, out)`, for each name, such as
                `kernel_0` or `output_kernel`: its bias is `bias_0` or `output_bias`.
        """
        self.kernels, self.biases, self.kernel_scales = [], [], []
        self.lora_kernels_a, self.lora_kernels_b = [], []
        is_quantized = self.quantization_mode is not None
        if is_quantized:
            _verify_int8(self, self.quantization_mode)
        for name, shape in shapes.items():
            if is_quantized:
                self.kernels.append(self._add_int8_kernel(name, shape))
            else:
                self.kernels.append(
                    self.add_expert_weight(
                        name,
                        shape,
                        self.kernel_initializer,
                        regularizer=self.kernel_regularizer,
                        constraint=self.kernel_constraint,
                    )
                )
            if self.use_bias:
                self.biases.append(
                    self.add_expert_weight(
                        name.replace("kernel", "bias"),
                        shape[1:],
                        self.bias_initializer,
                        regularizer=self.bias_regularizer,
                        constraint=self.bias_constraint,
                    )
                )

        if is_quantized:
            self._is_quantized = True
            self._add_scales()
        if self.lora_rank is not None:
            self._add_lora(self.lora_rank, "he_uniform", "zeros")

    def for_update(self, values):
        if not self._has_own_network() or self._beside_kernels():
            return values
        return kernels_for_update(values, self.stacked_weights, self.kernels)

    def _has_own_network(self):
        """Whether `network` is the package's, and not that of a subclass."""
        return getattr(type(self).network, "takes_kernels", False)

    def _network(self):
        return taking_one(self.compute) if self._has_own_network() else self.compute

    def compute(self, rows, *weights):
        beside = {id(weight) for weight in self._beside_kernels()}
        if not beside:
            return self.network(rows, *weights)
        given = {id(v): w for v, w in zip(self.stacked_weights, weights, strict=True)}
        kernels = {
            id(variable): self._kernel(i, lambda v: given[id(v)])
            for i, variable in enumerate(self.kernels)
        }
        if not self._has_own_network():
            kernels = {key: merged(k, rows.dtype) for key, k in kernels.items()}
        own = [id(v) for v in self.stacked_weights if id(v) not in beside]
        return self.network(rows, *(kernels.get(key, given[key]) for key in own))

    def _kernel(self, i, value_of):
        """Kernel i with what is beside it, each through `value_of`."""
        kernel = Kernel(value_of(self.kernels[i]))
        if self.kernel_scales:
            kernel = kernel._replace(scale=value_of(self.kernel_scales[i]))
        if not self.lora_enabled:
            return kernel
        a, b = self.lora_kernels_a[i], self.lora_kernels_b[i]
        factor = float(self.lora_alpha) / float(self.lora_rank)
        return kernel._replace(low_rank=(value_of(a), value_of(b)), factor=factor)

    def _beside_kernels(self):
        return [*self.kernel_scales, *self.lora_kernels_a, *self.lora_kernels_b]

    # Low-rank adaptation, as of `keras.layers.Dense`.

    def enable_lora(
        self,
        rank: int,
        *,
        a_initializer: Any = "he_uniform",
        b_initializer: Any = "zeros",
        lora_alpha: float | None = None,
    ) -> None:
        """Trains a low-rank addition to every kernel instead of the kernel (LoRA).

        $W = W_0 + \\frac{\\alpha}{r} A B$ for every expert and kernel, with A `(in, r)`
        and B `(r, out)` of its own. The kernels are frozen, biases are not. Files hold
        the sum, as those of `keras.layers.Dense`; a `tf.train.Checkpoint` all parts.

        Args:
            rank: Int, r.
            a_initializer: Initial value of one expert's A. Defaults to `"he_uniform"`.
            b_initializer: Initial value of one expert's B. Defaults to `"zeros"`.
            lora_alpha: Float or None. None means `rank`. Defaults to `None`.

        Raises:
            ValueError: The layer is not built, or has a `kernel_constraint`; it is the
                second call; `rank` or `lora_alpha` is not positive.

        Reference:
            Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv
            2106.09685, equation 3.
        """
        name = type(self).__name__
        if not self.built:
            raise ValueError(
                f"`enable_lora` needs a built layer. Received: {name} {self.name!r}, "
                "which is not. Call the model on a batch first, or pass `lora_rank` to "
                "the constructor."
            )
        if self.lora_enabled:
            raise ValueError(
                "`enable_lora` may be called once. Received: a second call for "
                f"{self.name!r}, of rank {self.lora_rank}. Save and load the model, "
                "which adds what was learned to the kernels."
            )
        rank = self._verify_lora(rank, "rank")
        self.lora_alpha = _alpha(lora_alpha, rank)
        self._tracker.unlock()
        try:
            self._add_lora(rank, a_initializer, b_initializer)
        finally:
            self._tracker.lock()

    def _verify_lora(self, rank, name):
        if self.kernel_constraint is not None:
            raise ValueError(
                "`kernel_constraint` must be None with low-rank additions, whose sum "
                f"with a kernel is never made. Received: {self.kernel_constraint!r} "
                f"with rank {rank}. Leave it out."
            )
        return checks.verify_positive_int(rank, name)

    def _add_lora(self, rank, a_initializer, b_initializer):
        self.lora_rank = rank
        options: dict[str, Any] = {
            "regularizer": self.kernel_regularizer,
            # As in Keras: half precision would lose small steps.
            "dtype": at_least_float32(tf.as_dtype(self.variable_dtype)).name,
        }
        for kernel in self.kernels:
            _, rows, columns = kernel.shape
            parts = (
                (self.lora_kernels_a, "a", (rows, rank), a_initializer),
                (self.lora_kernels_b, "b", (rank, columns), b_initializer),
            )
            for found, part, shape, initializer in parts:
                name = f"lora_{kernel.name}_{part}"
                found.append(
                    self.add_expert_weight(name, shape, initializer, **options)
                )
            kernel.trainable = False

    # Kernels of eight bits.

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Keeps the kernels in eight bits, with a scale for each column of an expert.

        Products are those of the layer's compute type with the kernel $V / s$ of whole
        numbers V, at most 127, and scales s: only weights are rounded, no inputs (`Dense`
        rounds both). An element of a kernel moves by at most 1/254 of the largest one of
        its column, so an element of a product with x by at most $\\|x\\|_1 / 254$ times
        that. Kernels then take a quarter of the memory of float32, and are not trained;
        `enable_lora` trains beside them. Compile the model again.

        Args:
            mode: `"int8"`.
            type_check: Not used: subclasses may be quantized. Defaults to `True`.
            config: What Keras makes of `mode`. Defaults to `None`.

        Raises:
            NotImplementedError: Another mode, or a `weight_quantizer` of one's own.
        """
        _verify_int8(self, mode, config)
        self._is_quantized = True
        for i, old in enumerate(self.kernels):
            value, scale = quantized(old.numpy())
            place = [each is old for each in self.stacked_weights].index(True)
            new = self._add_int8_kernel(old.name, old.shape[1:])
            new.assign(value)
            weights, rules = list(self.stacked_weights), list(self._rules)
            weights[place] = weights.pop()
            rules[place] = rules.pop()
            kernels = list(self.kernels)
            kernels[i] = new
            self.stacked_weights, self._rules, self.kernels = weights, rules, kernels
            track_entries(self, "stacked_weights")
            self._untrack_variable(old)
            scales = self._add_scale(old.name, old.shape[2])
            scales.assign(scale)
            self.kernel_scales.append(scales)
        policy = keras.dtype_policies.get(self.dtype_policy)  # type: ignore[has-type]
        if policy.quantization_mode is None:
            self.dtype_policy = keras.dtype_policies.get(f"{mode}_from_{policy.name}")

    def _add_int8_kernel(self, name, shape):
        return self.add_expert_weight(
            name, shape, "zeros", dtype="int8", trainable=False
        )

    def _add_scales(self):
        for kernel in self.kernels:
            scale = self._add_scale(kernel.name, kernel.shape[2])
            self.kernel_scales.append(scale)

    def _add_scale(self, name, columns):
        return self.add_expert_weight(
            f"{name}_scale", (columns,), "ones", trainable=False
        )

    def _int8_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    # Files hold whole kernels.
    def save_own_variables(self, store):
        if not self._beside_kernels():
            super().save_own_variables(store)
            return
        for i, (variable, place) in enumerate(self._in_files()):
            if self.lora_enabled and place is not None:
                kernel, is_scale = place
                value = self._whole_kernel(kernel)
                if self.kernel_scales:
                    value = quantized(value)[int(is_scale)]
                store[str(i)] = value
            else:
                store[str(i)] = variable

    def load_own_variables(self, store):
        if not self._beside_kernels():
            super().load_own_variables(store)
            return
        expected = self._in_files()
        if len(store.keys()) != len(expected):
            raise ValueError(
                f"{type(self).__name__} {self.name!r} expects {len(expected)} weights "
                f"of a file. Received: {len(store.keys())}. Files hold whole kernels, "
                "and their scales if they are of eight bits."
            )
        for i, (variable, _) in enumerate(expected):
            variable.assign(store[str(i)])
        # What was learned is in the kernels; A still has a gradient.
        for b in self.lora_kernels_b:
            b.assign(np.zeros(b.shape))

    def _in_files(self):
        """Variables in their order in files, each with its place: `(kernel, is scale)`."""
        beside = {id(variable) for variable in self._beside_kernels()}
        places = {id(v): (i, False) for i, v in enumerate(self.kernels)}
        places |= {id(v): (i, True) for i, v in enumerate(self.kernel_scales)}
        own = [v for v in self.stacked_weights if id(v) not in beside]
        stacked = {id(variable) for variable in self.stacked_weights}
        tracked = [*self._trainable_variables, *self._non_trainable_variables]
        others = [v for v in tracked if id(v) not in stacked]
        return [(v, places.get(id(v))) for v in (*own, *self.kernel_scales, *others)]

    def _whole_kernel(self, i):
        kernel = self._kernel(i, lambda v: tf.constant(v.numpy()))
        return merged(kernel, kernel.low_rank[0].dtype).numpy()

    def kernels_first(self, weights: Sequence) -> tuple:
        """The weights that `network` gets, all kernels before all biases."""
        step = 2 if self.use_bias else 1  # a bias follows each kernel
        return (*weights[::step], *(weights[1::2] if self.use_bias else ()))

    def get_config(self):
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
        }


def quantized(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers V, `(E, in, out)` int8, and scales s, `(E, out)`: V / s is near."""
    value, scale = keras.quantizers.abs_max_quantize(kernel, axis=-2, to_numpy=True)
    return np.asarray(value), np.asarray(scale)[:, 0]


def _alpha(value, rank):
    """`lora_alpha`; None is the rank, with which the additions count as they are."""
    if value is None:
        return rank
    rest = ". With 0 nothing would be learned; None means the rank."
    return checks.verify_number(value, "lora_alpha", "(0, inf)", rest)


def _verify_int8(layer, mode, config=None):
    kind = type(layer).__name__
    if mode != "int8":
        raise NotImplementedError(
            f"`mode` of `quantize` of {kind} must be 'int8'. Received: mode={mode!r}. "
            "Its kernels stay as they are."
        )
    if getattr(config, "weight_quantizer", None) is not None:
        raise NotImplementedError(
            f"`config` of `quantize` of {kind} must not have a `weight_quantizer`: "
            "scales are those of each column of an expert. Received: "
            f"{config.weight_quantizer!r}. Leave it out."
        )
