"""The maths of the paper as pure functions: tensors in, tensors out."""

from keras_moe.functional.attention import (
    attention_keys,
    attention_scores,
    dot_product_attention,
    masked_softmax,
    rotary_embedding,
)
from keras_moe.functional.biased_choice import balanced_bias, biased_gating
from keras_moe.functional.boundary import checked as _checked
from keras_moe.functional.capacity import (
    CapacityDispatcher,
    CapacityPlan,
    expert_capacity,
    make_capacity_plan,
)
from keras_moe.functional.dispatching import (
    Dispatcher,
    Mixed,
    RaggedPlan,
    SortedPlan,
    combine,
    dispatch,
    gates_of_rows,
    make_dispatch_plan,
    make_plan,
    mix_by_plan,
)
from keras_moe.functional.expert_choice import (
    expert_choice_capacity,
    expert_choice_gating,
)
from keras_moe.functional.experts import (
    default_computation,
    mix_experts,
    run_experts,
    verify_computation,
)
from keras_moe.functional.feed_forward import (
    feed_forward_experts,
    feed_forward_network,
    gated_network,
    mix_feed_forward_experts,
)
from keras_moe.functional.full_softmax import cross_entropy
from keras_moe.functional.gating import (
    largest_logits,
    make_gating_result,
    noise_stddev,
    noisy_logits,
    noisy_top_k_gating,
    prob_in_top_k,
    softmax_gating,
    top_k_gating,
)
from keras_moe.functional.hierarchical import (
    hierarchical_gates,
    hierarchical_load,
)
from keras_moe.functional.losses import (
    choices_kept,
    cv_squared,
    expert_counts,
    gate_entropy,
    importance,
    importance_loss,
    load,
    load_loss,
    max_over_mean,
    router_z_loss,
    switch_loss,
)
from keras_moe.functional.lstm import lstm_step
from keras_moe.functional.random import normal_rows, uniform_rows
from keras_moe.functional.recurrent import (
    MoELSTMResult,
    mixed_product,
    moe_lstm,
    verify_recurrent_gating,
)
from keras_moe.functional.sampled_softmax import (
    log_uniform_candidates,
    sampled_cross_entropy,
    unbiased_candidates,
)
from keras_moe.functional.second_choice import second_choice_gating
from keras_moe.functional.selection import make_selection_result
from keras_moe.functional.slot_runs import run_in_slots
from keras_moe.functional.static_slots import (
    SlotPlan,
    StaticDispatcher,
    make_plan_here,
    make_slot_plan,
    slot_sizes,
)
from keras_moe.functional.strict_balance import (
    batchwise_mask,
    masked_gating,
    threshold_loss,
    threshold_mask,
    tokens_per_expert,
)
from keras_moe.functional.unrolled import unrolled_moe_lstm

__all__ = [
    "CapacityDispatcher",
    "CapacityPlan",
    "Dispatcher",
    "Mixed",
    "MoELSTMResult",
    "RaggedPlan",
    "SlotPlan",
    "SortedPlan",
    "StaticDispatcher",
    "attention_keys",
    "attention_scores",
    "balanced_bias",
    "batchwise_mask",
    "biased_gating",
    "choices_kept",
    "combine",
    "cross_entropy",
    "cv_squared",
    "default_computation",
    "dispatch",
    "dot_product_attention",
    "expert_capacity",
    "expert_choice_capacity",
    "expert_choice_gating",
    "expert_counts",
    "feed_forward_experts",
    "feed_forward_network",
    "gate_entropy",
    "gated_network",
    "gates_of_rows",
    "hierarchical_gates",
    "hierarchical_load",
    "importance",
    "importance_loss",
    "largest_logits",
    "load",
    "load_loss",
    "log_uniform_candidates",
    "lstm_step",
    "make_capacity_plan",
    "make_dispatch_plan",
    "make_gating_result",
    "make_plan",
    "make_plan_here",
    "make_selection_result",
    "make_slot_plan",
    "masked_gating",
    "masked_softmax",
    "max_over_mean",
    "mix_by_plan",
    "mix_experts",
    "mix_feed_forward_experts",
    "mixed_product",
    "moe_lstm",
    "noise_stddev",
    "noisy_logits",
    "noisy_top_k_gating",
    "normal_rows",
    "prob_in_top_k",
    "rotary_embedding",
    "router_z_loss",
    "run_experts",
    "run_in_slots",
    "sampled_cross_entropy",
    "second_choice_gating",
    "slot_sizes",
    "softmax_gating",
    "switch_loss",
    "threshold_loss",
    "threshold_mask",
    "tokens_per_expert",
    "top_k_gating",
    "unbiased_candidates",
    "uniform_rows",
    "unrolled_moe_lstm",
    "verify_computation",
    "verify_recurrent_gating",
]

# The shapes that arguments have in common, see `boundary`.
_SHAPES = {
    "attention_keys": "key_kernel:DU scale:U memory:BSD",
    "attention_scores": "query:BTQ keys:BSU query_kernel:QU",
    "balanced_bias": "bias:E counts:E",
    "biased_gating": "logits:NE bias:E",
    "choices_kept": "clean_logits:NE expert_indices:NK#E mask:N?",
    "combine": "gates:~",
    "cross_entropy": "logits:NV targets:N#V",
    "dispatch": "inputs:ND",
    "dot_product_attention": "query:BTQH keys:BSGH values:BSGV mask:...?",
    "expert_choice_gating": "logits:NE mask:N?",
    "expert_counts": "expert_indices:~#-E",
    "feed_forward_experts": "kernels:F.. biases:F. counts:F#",
    "gate_entropy": "gates:~ mask:N?",
    "gates_of_rows": "gates:~",
    "hierarchical_gates": "secondary_gates:MK secondary_indices:MK# primary_gates:M "
    "group_indices:M#",
    "hierarchical_load": "secondary_load:GB primary_load:G group_counts:G#+",
    "importance": "expert_indices:~#-E gates:~",
    "load": "prob_in_top_k:NE mask:N?",
    "make_capacity_plan": "expert_indices:~#-E mask:N?",
    "make_dispatch_plan": "expert_indices:~#E token_indices:M#",
    "make_plan_here": "expert_indices:NK#-E",
    "make_slot_plan": "expert_indices:NK#-E mask:N?",
    "rotary_embedding": "x:.TQH positions:.T#",
    "run_in_slots": "inputs:ND gates:~",
    "make_selection_result": "gates:NE selected:NE? load:E mask:N?",
    "make_gating_result": "expert_indices:~#-E gates:~ token_indices:M# load:E mask:N?",
    "masked_gating": "logits:NE mask:NE?",
    "mix_experts": "inputs:ND gates:~",
    "mix_feed_forward_experts": "inputs:ND gates:~ kernels:F.. biases:F.",
    "mixed_product": "inputs:ND kernels:EDO gates:~",
    "moe_lstm": "inputs:TBD h:BU c:BU kernels:ERZ bias:Z mask:TB?",
    "unrolled_moe_lstm": "inputs:TBD h:BU c:BU bias:Z mask:TB?",
    "noisy_logits": "clean_logits:~ stddev:~ noise:~",
    "noisy_top_k_gating": "clean_logits:~ raw_noise:~ noise:~",
    "normal_rows": "seed:S#",
    "prob_in_top_k": "noisy_logits:~ clean_logits:~ stddev:~",
    "router_z_loss": "logits:NE mask:N?",
    "sampled_cross_entropy": "kernel:VD bias:V inputs:ND targets:N#V candidates:C#V "
    "expected_counts:C",
    "switch_loss": "probabilities:NE counts:E#+ mask:N?",
    "second_choice_gating": "logits:NE uniform:N",
    "threshold_loss": "gates:NE selected:NE?",
    "unbiased_candidates": "drawn:C# expected_counts:C",
    "uniform_rows": "seed:S#",
}
for _name in __all__:
    if not isinstance(globals()[_name], type):
        globals()[_name] = _checked(globals()[_name], _SHAPES.get(_name, ""))
