"""Schedules; every optimizer that runs here against its paper's formulas in float64; what is chosen and refused."""

import copy
import importlib
import math
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.reference_optimizers import DECAY, SETTINGS, adamw, assert_close, groups_of, lamb, problem, train
from trainer.config import Optim, Schedule
from trainer.engine.lamb import _BUNDLE_ELEMENTS, Lamb, _squared_norms
from trainer.engine.optim import build_optimizer, learning_rate_at
from trainer.errors import UserError

RECIPE = {"learning_rate": SETTINGS["lr"], "beta1": SETTINGS["betas"][0], "beta2": SETTINGS["betas"][1]}
RECIPE |= {"epsilon": SETTINGS["eps"], "weight_decay": DECAY}


def maker(name, backend, said=None, device_type="cpu", offload=False, sharded=False):
    """Makes the optimizer of a recipe from parameter groups."""
    optim = Optim(name=name, backend=backend, **RECIPE)
    say = print if said is None else said.append
    where = {"device_type": device_type, "offload": offload, "sharded": sharded}
    return lambda groups: build_optimizer(optim, groups, say, **where)


def test_linear_rises_and_falls():
    schedule = Schedule(name="linear", warmup_steps=4)
    rates = [learning_rate_at(step, 1.0, schedule, 12) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[12] == 0.0


def test_cosine_ends_at_its_floor():
    schedule = Schedule(name="cosine", warmup_steps=0, min_ratio=0.1)
    assert learning_rate_at(0, 2.0, schedule, 100) == 2.0
    assert learning_rate_at(50, 2.0, schedule, 100) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate_at(100, 2.0, schedule, 100) == pytest.approx(0.2)
    assert learning_rate_at(25, 2.0, schedule, 100) == pytest.approx(2 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))


def test_warmup_stable_decay_is_flat_between():
    schedule = Schedule(name="warmup_stable_decay", warmup_steps=2, decay_steps=4)
    rates = [learning_rate_at(step, 1.0, schedule, 12) for step in range(12)]
    assert rates[2:9] == [1.0] * 7
    assert rates[9:] == pytest.approx([0.75, 0.5, 0.25])


def test_constant_stays():
    assert learning_rate_at(10**6, 3e-4, Schedule(name="constant"), 10) == 3e-4


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "torch_foreach", "auto"])
def test_adamw_is_that_of_the_paper(backend):
    assert_close(train(maker("adamw", backend), *problem()), adamw(*problem(), **SETTINGS))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("bundle_elements", [2**22, 600], ids=["one bundle", "several bundles"])
def test_lamb_is_that_of_the_paper(monkeypatch, backend, bundle_elements):
    monkeypatch.setitem(_BUNDLE_ELEMENTS, "cpu", bundle_elements)
    assert_close(train(maker("lamb", backend), *problem()), lamb(*problem(), **SETTINGS))


class WithoutBiasCorrection(Lamb):
    def _updates(self, params, weights, group):
        for param in params:
            self._state_of(param)["step"].fill_(1e9)
        return super()._updates(params, weights, group)


class RatioOverTheGroup(Lamb):
    def _ratios(self, params, cut, weights, updates):
        whole = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (weights, updates)]
        return super()._ratios(params, cut, [whole[0]], [whole[1]]) * len(weights)


class DecayInsideTheMoments(Lamb):
    def _updates(self, params, weights, group):
        for param, weight in zip(params, weights, strict=True):
            param.grad = param.grad + group["weight_decay"] * weight
        return super()._updates(params, weights, group | {"weight_decay": 0.0})


class RatioWithoutDecayToo(Lamb):
    def _update(self, params, group):
        super()._update(params, group | {"weight_decay": group["weight_decay"] or 1e-30})


class NoRatio(Lamb):
    def _ratios(self, params, cut, weights, updates):
        return [torch.tensor(1.0)] * len(weights)


FAULTS = [WithoutBiasCorrection, RatioOverTheGroup, DecayInsideTheMoments, RatioWithoutDecayToo, NoRatio]


@pytest.mark.parametrize("faulty", FAULTS)
def test_a_planted_fault_is_no_lamb(faulty):
    with pytest.raises(AssertionError, match="not close"):
        assert_close(train(lambda groups: faulty(groups, **SETTINGS), *problem()), lamb(*problem(), **SETTINGS))


def test_decay_inside_the_moments_is_no_adamw():
    with pytest.raises(AssertionError, match="not close"):
        assert_close(
            train(lambda groups: torch.optim.Adam(groups, **SETTINGS), *problem()), adamw(*problem(), **SETTINGS)
        )


def test_zero_weights_and_zero_updates_have_no_ratio():
    """A tensor of zeros moves by the plain update; one without gradient and weight stays, and nothing becomes NaN."""
    parameters = [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = Lamb([{"params": parameters, "weight_decay": DECAY}], **SETTINGS)
    parameters[0].grad, parameters[1].grad = torch.ones(4, 3), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((4, 3), -SETTINGS["lr"]), rtol=1e-5, atol=0)
    assert torch.equal(parameters[1].detach(), torch.zeros(2, 2))


def test_norms_of_large_tensors_are_right():
    """torch's own norm of four million numbers is off by more than this on CPUs."""
    tensors = [torch.randn(2**22, generator=torch.Generator().manual_seed(0)), torch.ones(3, 5), torch.empty(0, 4)]
    squares = _squared_norms(tensors, torch.device("cpu"))
    torch.testing.assert_close(squares[0].double(), tensors[0].double().square().sum(), rtol=2e-7, atol=0)
    assert squares[1:].tolist() == [pytest.approx(15.0), 0.0]


def test_the_layout_of_a_gradient_does_not_matter():
    """A gradient that lies transposed in memory; the fused kernel goes by memory."""
    weights, gradients, decays = problem()
    transposed = [[gradient.t().contiguous().t() if gradient.ndim == 2 else gradient for gradient in at_step]
                  for at_step in gradients]  # fmt: skip
    assert not transposed[0][0].is_contiguous()
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Lamb(groups_of(parameters, decays), **SETTINGS)
    for at_step in transposed:
        for parameter, gradient in zip(parameters, at_step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert_close(parameters, lamb(weights, gradients, decays, **SETTINGS))


def test_a_tensor_without_gradient_is_left_alone_and_a_closure_is_called():
    used, unused = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Lamb([used, unused], **SETTINGS)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 6.0
    assert not torch.equal(used.detach(), torch.ones(3, 2)) and torch.equal(unused.detach(), torch.ones(3, 2))
    assert unused not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(name, tmp_path):
    """Also where `step` comes back as one object for all tensors, or as a number: DeepSpeed's loading does both."""
    weights, gradients, decays = problem()
    half = len(gradients) // 2
    whole = train(maker(name, "torch"), weights, gradients, decays)
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = maker(name, "torch")(groups_of(parameters, decays))

    def go_on(optimizer, some_gradients):
        for at_step in some_gradients:
            for parameter, gradient in zip(parameters, at_step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    go_on(optimizer, gradients[:half])
    names = {key for state in optimizer.state.values() for key in state}
    assert names == {"step", "exp_avg", "exp_avg_sq"}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    at_half = [parameter.detach().clone() for parameter in parameters]
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    shared = torch.tensor(float(half))
    for step in (None, shared, half) if name == "lamb" else (None,):
        again = maker(name, "torch")(groups_of(parameters, decays))
        again.load_state_dict(copy.deepcopy(loaded))
        for state in again.state.values() if step is not None else ():
            state["step"] = step
        with torch.no_grad():
            torch._foreach_copy_(parameters, at_half)
        go_on(again, gradients[half:])
        assert all(torch.equal(one, other) for one, other in zip(parameters, whole, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.timeout(1800)  # g++ takes half a minute for each on an idle machine, and minutes on a busy one
def test_deepspeeds_cpu_optimizers_are_those_of_the_paper():
    """FusedAdam as it is on CPUs and CPUAdam, both compiled at first use."""
    expected = adamw(*problem(), **SETTINGS)
    for offload, kind in ((False, "FusedAdam"), (True, "DeepSpeedCPUAdam")):
        seen = []

        def make(groups, offload=offload, seen=seen):
            try:
                seen.append(maker("adamw", "deepspeed", offload=offload)(groups))
            except UserError as error:
                pytest.skip(str(error))
            return seen[0]

        got = train(make, *problem())
        assert type(seen[0]).__name__ == kind
        assert_close(got, expected)
    with pytest.raises(UserError, match="DeepSpeed's FusedLion cannot be built here"):
        maker("lion", "auto")(groups_of([torch.nn.Parameter(torch.ones(2))], [0.0]))


# ---- choice ----------------------------------------------------------------------------------------------------


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """Plants a package of Apex's shape, whose optimizers are AdamW and keep what they were given; returns a call that
    plants it as NVIDIA's, as one without kernels, or as another project."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)
    source = "\n".join(
        ["import torch"]
        + [f"class {name}(torch.optim.AdamW):\n    def __init__(self, groups, **given):\n        "
           "super().__init__(groups)\n        self.given = given" for name in ("FusedAdam", "FusedLAMB")]
    )  # fmt: skip

    def plant(kind):
        folder = tmp_path / "apex" / "optimizers"
        folder.mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").touch()
        (folder / "__init__.py").write_text(source)
        if kind != "other":
            (folder / "fused_adam.py").touch()
        if kind == "nvidia":
            (tmp_path / "amp_C.py").touch()
        importlib.invalidate_caches()

    yield plant
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


def parameters():
    return [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "weight_decay": DECAY}]


ON_GPU, ON_SHARDS = {"device_type": "cuda"}, {"device_type": "cuda", "sharded": True}


@pytest.mark.parametrize(
    ("name", "where", "kind", "because"),
    [
        ("adamw", {}, "AdamW", "one kernel for all tensors"),
        ("adamw", ON_GPU, "FusedAdam", "NVIDIA's fused kernels"),
        ("adamw", ON_SHARDS, "AdamW", "one kernel for all tensors"),
        ("lamb", {}, "Lamb", "norms are those of whole tensors"),
        ("lamb", ON_GPU, "FusedLAMB", "NVIDIA's fused kernels"),
        ("lamb", ON_SHARDS, "Lamb", "norms are those of whole tensors"),
        ("lamb", ON_GPU | {"offload": True}, "Lamb", "norms are those of whole tensors"),
    ],
)
def test_auto_takes_the_fastest_and_says_so_once(apex, name, where, kind, because):
    apex("nvidia")
    said = []
    assert type(maker(name, "auto", said, **where)(parameters())).__name__ == kind
    (line,) = said
    assert line.startswith("optimizer backend auto: ") and because in line


@pytest.mark.parametrize("kind", ["other", "without kernels", None])
@pytest.mark.parametrize(("name", "ours"), [("adamw", torch.optim.AdamW), ("lamb", Lamb)])
def test_auto_on_a_gpu_without_nvidias_apex_is_torch(apex, kind, name, ours):
    if kind:
        apex(kind)
    assert type(maker(name, "auto", **ON_GPU)(parameters())) is ours


def test_an_asked_backend_is_taken_without_a_word(apex):
    apex("nvidia")
    said = []
    for backend, name in (("torch", "AdamW"), ("torch_foreach", "AdamW"), ("apex", "FusedAdam")):
        optimizer = maker("adamw", backend, said, **ON_GPU)(parameters())
        assert type(optimizer).__name__ == name
        assert bool(optimizer.defaults["fused"]) == (backend == "torch")
    assert said == []


def test_apexs_lamb_does_not_clip_by_itself(apex):
    apex("nvidia")
    given = maker("lamb", "apex", **ON_GPU)(parameters()).given
    expected = {"max_grad_norm": math.inf, "use_nvlamb": False, "bias_correction": True, "adam_w_mode": True}
    assert given == expected | SETTINGS


@pytest.mark.parametrize(
    ("name", "backend", "where", "found", "do"),
    [
        ("lion", "torch", {}, "torch with optim.name: lion", "deepspeed"),
        ("lion", "apex", ON_GPU, "apex with optim.name: lion", "deepspeed"),
        ("lamb", "torch_foreach", {}, "torch_foreach with optim.name: lamb", "auto"),
        ("adamw", "apex", {}, "tensors are on the cpu device", "auto"),
        ("adamw", "apex", ON_GPU | {"offload": True}, "offloaded to the CPU", "auto"),
        ("adamw", "apex", ON_SHARDS, "counts a step too often", "deepspeed"),
        ("lamb", "apex", ON_SHARDS, "norms of flat shards", "auto"),
        ("lamb", "deepspeed", ON_SHARDS, "norms of flat shards", "auto"),
        ("lamb", "deepspeed", {}, "tensors are on the cpu device", "auto"),
    ],
)
def test_what_would_be_wrong_is_refused(apex, name, backend, where, found, do):
    apex("nvidia")
    with pytest.raises(UserError) as caught:
        maker(name, backend, **where)(parameters())
    assert found in str(caught.value) and do in str(caught.value).splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "found", "do"),
    [
        (None, "apex is not installed", "Do: build NVIDIA's from github.com/NVIDIA/apex"),
        ("other", "another project", "Do: pip uninstall apex; build NVIDIA's"),
        ("without kernels", "without its CUDA kernels", "Do: build NVIDIA's"),
    ],
)
def test_a_missing_or_wrong_apex_is_named(apex, kind, found, do):
    if kind:
        apex(kind)
    with pytest.raises(UserError) as caught:
        maker("adamw", "apex", **ON_GPU)(parameters())
    assert found in str(caught.value) and do in str(caught.value)


@pytest.mark.parametrize(("name", "backend"), [("adamw", "deepspeed"), ("lion", "auto"), ("lamb", "deepspeed")])
def test_a_missing_deepspeed_is_named(monkeypatch, name, backend):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="DeepSpeed is not installed(.|\n)*lmworks\\[deepspeed\\]"):
        maker(name, backend, **ON_GPU)(parameters())
