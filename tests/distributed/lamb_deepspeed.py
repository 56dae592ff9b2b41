"""Steps Lamb under DeepSpeed's ZeRO stages on two ranks, told where DeepSpeed put the tensors, and writes the weights.

torchrun --nproc-per-node 2 lamb_deepspeed.py OUT
"""

import sys

import deepspeed
import torch
import torch.distributed as dist

from tests.distributed.lamb_ranks import STEPS, loss_of, optimizer_of, tiny_model
from trainer.engine.lamb import Segments
from trainer.engine.launch import leave

CASES = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 2, offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage 3 in sub-groups": {"stage": 3, "sub_group_size": 30, "stage3_param_persistence_threshold": 0},
}


def segments_of(zero, stage):
    """Where DeepSpeed put the tensors of each flat fp32 tensor of this rank."""
    rank = dist.get_rank()
    if stage < 3:
        shards = zip(zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, strict=True)
        return {flat: _of_one_long_tensor(params, rank * flat.numel(), flat.numel()) for flat, params in shards}
    shards = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    return {flat: _of_shares(params, rank) for flat, params in shards}


def _of_one_long_tensor(params, low, length):
    pieces, at = [], 0
    for index, param in enumerate(params):
        start, stop = max(at, low), min(at + param.numel(), low + length)
        if start < stop:
            pieces.append((index, start - low, stop - low))
        at += param.numel()
    return Segments(tuple(pieces), len(params))


def _of_shares(params, rank):
    pieces, at = [], 0
    for index, param in enumerate(params):
        share = param.partition_numel()
        length = min(param.ds_numel - rank * share, share)
        if length > 0:
            pieces.append((index, at, at + length))
        at += share
    return Segments(tuple(pieces), len(params))


def train(zero, sharded=True):
    model = tiny_model()
    optimizer = optimizer_of(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,  # it is 1.0 by default in 0.19.8
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if sharded:
        optimizer.shard(segments_of(engine.optimizer, zero["stage"]).__getitem__, dist.all_reduce)
    for _ in range(STEPS):
        engine.backward(loss_of(engine))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=zero["stage"] == 3):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(out):
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    results = {name: train(zero) for name, zero in CASES.items()}
    results["not told"] = train(CASES["stage 2"], sharded=False)
    torch.save(results, f"{out}.{dist.get_rank()}")
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
