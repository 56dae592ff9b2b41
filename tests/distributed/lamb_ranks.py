"""Steps Lamb on two ranks, over ZeRO's flat shards and over FSDP2's DTensors, and writes the weights it comes to.

torchrun --nproc-per-node 2 lamb_ranks.py OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.zero_shards import train_rank
from tests.reference_optimizers import DECAY, SETTINGS, groups_of
from trainer.engine import lamb
from trainer.engine.launch import leave

STEPS = 10


def tiny_model():
    """Rows of unequal norm that two ranks cannot share evenly, and a last layer of which the second has nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight *= torch.linspace(0.1, 2.0, len(layer.weight))[:, None]
    return model


def optimizer_of(model):
    parameters = list(model.parameters())
    return lamb.Lamb(groups_of(parameters, [DECAY if p.ndim > 1 else 0.0 for p in parameters]), **SETTINGS)


def loss_of(model):
    """On one batch, the same on every rank."""
    inputs = torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
    return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()


def train(model):
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return optimizer


def train_fsdp2():
    model = tiny_model()
    fully_shard(model)
    optimizer = train(model)
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {kind: train_rank(kind, rank, 2, dist.all_reduce) for kind in ("zero1", "zero3")}
    results["unsynchronised zero1"] = train_rank("zero1", rank, 2, lambda squares: None)
    lamb._BUNDLE_ELEMENTS["cpu"] = 40  # of the tiny model's on a rank: several collectives a step
    results["fsdp2"] = train_fsdp2()
    lamb._sum_over_mesh = lambda squares, param: None
    results["unsynchronised fsdp2"] = train_fsdp2()
    torch.save(results, f"{out}.{rank}")
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
