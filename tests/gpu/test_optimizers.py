"""Optimizers with CUDA kernels against their papers' formulas in float64, each skipped with a reason where missing."""

import pytest
import torch

from tests.reference_optimizers import DECAY, SETTINGS, adamw, assert_close, groups_of, lamb, lion, problem, train
from trainer.config import Optim
from trainer.engine.lamb import Lamb
from trainer.engine.optim import build_optimizer
from trainer.environment import apex_kind
from trainer.errors import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def train_with(name, backend, offload=False):
    """The weights after the steps of the problem; skipped where DeepSpeed or its op is missing."""
    optim = Optim(
        name=name,
        backend=backend,
        learning_rate=SETTINGS["lr"],
        weight_decay=DECAY,
        beta1=SETTINGS["betas"][0],
        beta2=SETTINGS["betas"][1],
        epsilon=SETTINGS["eps"],
    )

    def make(groups):
        try:
            return build_optimizer(optim, groups, print, device_type="cuda", offload=offload, sharded=False)
        except UserError as error:
            pytest.skip(str(error))

    return train(make, *problem(), device="cpu" if offload else "cuda")


@pytest.mark.parametrize("backend", ["torch", "torch_foreach", "deepspeed"])
def test_adamw(backend):
    assert_close(train_with("adamw", backend), adamw(*problem(), **SETTINGS))


@pytest.mark.skipif(apex_kind() != "nvidia", reason=f"NVIDIA's Apex with its kernels is not here: {apex_kind()}")
@pytest.mark.parametrize(("name", "formula"), [("adamw", adamw), ("lamb", lamb)])
def test_apex(name, formula):
    assert_close(train_with(name, "apex"), formula(*problem(), **SETTINGS))


def test_our_lamb():
    assert_close(train_with("lamb", "torch"), lamb(*problem(), **SETTINGS))


@pytest.mark.parametrize("offload", [False, True])
def test_lion(offload):
    assert_close(train_with("lion", "deepspeed", offload), lion(*problem(), **SETTINGS))


def test_offloaded_adamw():
    assert_close(train_with("adamw", "deepspeed", offload=True), adamw(*problem(), **SETTINGS))


def test_lamb_never_waits_for_the_gpu():
    """From the second step on: the first makes the state."""
    weights, gradients, decays = problem(steps=1)
    parameters = [torch.nn.Parameter(weight.cuda()) for weight in weights]
    optimizer = Lamb(groups_of(parameters, decays), **SETTINGS)
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient.cuda()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
