"""What is known of DeepSpeed: the keys of its configs, and the versions that compute something silently wrong.
What follows for a run is `zero`'s business."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the installed DeepSpeed reads (0.19.8: deepspeed/runtime/config.py and what it calls); a test compares.
TOP_LEVEL_KEYS = _words(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc
    dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensorboard
    tensor_parallel timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """
)
# Fields and aliases of DeepSpeedZeroConfig (0.19.8: deepspeed/runtime/zero/config.py), but for the deprecated ones.
ZERO_KEYS = _words(
    """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
    elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance
    memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer offload_param
    overlap_comm override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
    prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
    stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_max_live_parameters
    stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
    use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """
)
# _REMOVED_TOP_LEVEL_CONFIG_KEYS and _REMOVED_ZERO_CONFIG_KEYS of 0.19.8's deepspeed/runtime/config.py.
REMOVED_KEYS = _words(
    """
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients zero_optimization.mics_hierarchical_params_gather
    zero_optimization.mics_shard_size zero_optimization.zeropp_loco_param
    """
)
DEPRECATED_ZERO_KEYS = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer and offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
# DeepSpeed knows these keys, and they are not a config's to say here.
NOT_HERE = {
    "optimizer": "the recipe owns it (optim)",
    "scheduler": "the recipe owns it (schedule)",
    "bfloat16": "the old name of bf16",
    "autotuning": "the recipe owns the numbers that it changes",
    "data_efficiency": "the recipe owns the order of the data",
    "expert_parallel": "ranks are data-parallel here",
    "pipeline": "ranks are data-parallel here",
    "sequence_parallel_size": "ranks are data-parallel here",
    "tensor_parallel": "ranks are data-parallel here",
}
# Keys with one value that the engine and the recipe's promises (fp32 master weights, averaged gradients) stand on.
FIXED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, "the engine says where a step ends"),
    "gradient_allreduce_op": ("mean", "the engine counts on gradients averaged over ranks"),
    "zero_optimization.compute_grad_norm": (True, "the norm is reported, and clipped to"),
    "fp16.fp16_master_weights_and_grads": (False, "master weights are fp32"),
    "bf16.bf16_master_weights_and_grads": (False, "master weights are fp32"),
    "bf16.bf16_optimizer_states": (False, "optimizer state is fp32"),
}


class Case(NamedTuple):
    """What decides whether a fault of DeepSpeed's touches a run."""

    stage: int
    bf16: bool  # weights and gradients in bf16, DeepSpeed's `bf16` section
    autocast: str | None  # dtype of torch_autocast, where that makes the precision
    accumulates_in_fp32: bool  # data_types.grad_accum_dtype
    offload_optimizer: bool
    accumulation: int
    contiguous_gradients: bool
    overlap_comm: bool
    compiled: bool
    on_cpu: bool


class KnownWrong(NamedTuple):
    """Versions of DeepSpeed, from `first` to before `fixed`, that compute something else than was asked, silently."""

    first: str
    fixed: str
    touches: Callable[[Case], bool]
    what: str
    thread: str


# Releases were read off the tags that hold the fixing commit, except where the entry says otherwise.
KNOWN_WRONG = (
    KnownWrong("0.17.6", "0.18.3", lambda case: case.stage == 2, "ZeRO-2 gradients are too small", "DeepSpeed#7718"),
    KnownWrong(
        "0.18.3",
        "0.19.8",  # assumed: the thread was closed by PR 8245 after 0.19.5, and its release was not found
        lambda case: case.stage == 2 and case.bf16,
        "ZeRO-2 in bf16 reduces the gradients of a module that runs twice in a step wrongly",
        "DeepSpeed#8224",
    ),
    KnownWrong(
        "0.15.2",  # PR 6550 brought it
        "0.19.0",
        lambda case: case.stage in (1, 2) and case.offload_optimizer and case.accumulation > 1,
        "ZeRO-1/2 with an offloaded optimizer drops micro-batches of an accumulated step",
        "DeepSpeed#7967, #7981",
    ),
    KnownWrong(
        "0.18.6",  # the oldest that the thread tried
        "0.19.0",
        lambda case: case.stage == 1 and case.bf16 and case.accumulates_in_fp32 and not case.offload_optimizer,
        "ZeRO-1 in bf16 with grad_accum_dtype fp32 leaves the last micro-batch out of the average over ranks",
        "DeepSpeed#7985",
    ),
    KnownWrong(
        "0",
        "0.19.3",
        lambda case: case.stage in (1, 2) and case.overlap_comm and case.compiled,
        "ZeRO-1/2 with overlap_comm reduces gradients of compiled models before they are there",
        "DeepSpeed#8061, #8080",
    ),
    KnownWrong(
        "0",
        "0.18.6",
        lambda case: case.stage == 0 and case.bf16,
        "bf16 without ZeRO divides gradients by a loss scale that was never applied, and never clears them",
        "DeepSpeed#7837, #7839",
    ),
    KnownWrong(
        "0",
        "0.18.0",
        lambda case: case.stage == 0 and case.autocast == "fp16",
        "torch_autocast in fp16 without ZeRO scales no loss, so small gradients vanish",
        "DeepSpeed#7619",
    ),
    KnownWrong(
        "0",
        "0.19.8",  # not in the tag 0.19.5, in the source of 0.19.8
        lambda case: case.stage in (1, 2) and case.on_cpu and not case.contiguous_gradients,
        "ZeRO-1/2 on CPU with contiguous_gradients: false skips the all-reduce of gradients",
        "DeepSpeed#8382",
    ),
)


def known_wrong(version: str, case: Case) -> list[KnownWrong]:
    """The entries of KNOWN_WRONG that touch a run with this version."""
    return [
        wrong
        for wrong in KNOWN_WRONG
        if _release(wrong.first) <= _release(version) < _release(wrong.fixed) and wrong.touches(case)
    ]


def _release(version: str) -> tuple[int, ...]:
    """0.19.8+cu12 -> (0, 19, 8)"""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
