"""One face over the strategies: whatever the launcher, the sharding and the number of ranks, the loop sees these verbs.
It knows nothing of objectives, data, or when to save."""

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import AORecipeKwargs
from torch import Tensor, nn

from trainer.config import Training
from trainer.engine import precision
from trainer.engine.fragments import FragmentFiles, snapshot
from trainer.engine.fsdp2 import FullyShardedDataParallel, shard_frozen, share_held
from trainer.engine.ranks import Ranks
from trainer.engine.replicated import Replicated
from trainer.engine.strategy import BuildOptimizer, StepResult, Strategy
from trainer.engine.zero import ZeroConfig, chosen_zero, load_zero, resolve_zero
from trainer.errors import UserError
from trainer.models import LanguageModel

_ANY_HIDDEN_SIZE = 1024  # for a first look at the configuration, before there is a model


class Engine:
    """Ranks, device, precision, gradients and optimizer of one training run."""

    updates: int  # optimizer steps that were applied; skipped ones are not
    shapes: dict[str, tuple[int, ...]]  # of all parameters, tied ones once, as they are before they are sharded

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder = training, folder
        self.updates = 0
        _restore_environment()
        self.on_cpu = not torch.cuda.is_available()
        self._zero_name = chosen_zero(training.engine, os.environ)
        self.strategy_name = self._chosen_strategy()
        self._require_one_precision()
        if self.strategy_name == "fsdp2" and training.optim.backend == "deepspeed":
            raise UserError(
                "optim.backend: deepspeed with engine.strategy: fsdp2",
                "an optimizer that takes DTensors",
                "set optim.backend: torch, or engine.zero for DeepSpeed's",
            )
        precision.require(training.precision, "cpu" if self.on_cpu else "cuda", self.strategy_name)
        precision.set_matmul_precision(training.precision)
        # What disagrees is refused before any process group is formed; the model's size comes in later.
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.zero = self._resolved_zero(world, _ANY_HIDDEN_SIZE) if self._zero_name else None
        if self.zero is not None:
            self._require_rank_for_each_gpu(self.zero, world)
        self._accelerator = self._accelerate()
        self.ranks = Ranks(
            self._accelerator.process_index, self._accelerator.num_processes, training.engine.collective_timeout_s
        )
        self._strategy = self._build_strategy()

    @property
    def world(self) -> int:
        return self.ranks.world

    @property
    def is_main(self) -> bool:
        return self.ranks.is_main

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def model(self) -> nn.Module:
        """What objectives call: the model, wrapped as the strategy needs it."""
        return self._strategy.model

    @property
    def unwrapped(self) -> nn.Module:
        """The model without what the strategy put around it."""
        return self._strategy.module

    @property
    def sharded(self) -> bool:
        """Whether the optimizer sees pieces of tensors instead of whole ones."""
        return self.strategy_name == "fsdp2" or (self.zero is not None and self.zero.stage > 0)

    @property
    def is_given_weights(self) -> bool:
        """Whether `prepare` and `hold_frozen` give this rank the weights of rank 0's model, piece by piece, whatever
        its own holds."""
        cut = self.strategy_name == "fsdp2" or (self.zero is not None and self.zero.cuts_weights)
        return cut and not self.is_main

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's work is done by the CPU beside a GPU."""
        return self.zero is not None and self.zero.offload_optimizer != "none"

    def prepare(self, model: nn.Module, build: BuildOptimizer, hidden_size: int) -> None:
        """Spread the model over the ranks and make its optimizer; from now on `self.model` is the one to call."""
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if self._zero_name:
            self.zero = self._resolved_zero(self.world, hidden_size)
            self._strategy.configure(self.zero)  # type: ignore[attr-defined]
        self._strategy.prepare(model, build)
        if self._training.precision == "fp8":
            precision.require_fp8_layers(self.unwrapped)

    def hold_frozen(self, model: LanguageModel) -> str:
        """Give a model that is never trained its device and a type; where the weights of the one in training are
        spread over the ranks, its blocks are, too. Returns what it came to."""
        dtype = precision.frozen_type(self._training.precision, self.zero is not None and self.zero.converts)
        spread = self.strategy_name == "fsdp2" or (self.zero is not None and self.zero.stage == 3)
        if spread and self.world > 1:
            shard_frozen(model, self.device, self.world, dtype)
        else:
            for parameter in model.parameters():  # not buffers: rotary frequencies stay in float32
                parameter.data = parameter.data.to(dtype)
            model.to(self.device)
        return f"{share_held(model):.0%} of its weights on each rank, {dtype}"

    def begin_step(self, step: int, learning_rate: float, seed: int) -> None:
        """Set what an optimizer step depends on: the learning rate, and dropout's randomness by (seed, step, rank)."""
        for group in self._strategy.optimizer.param_groups:
            group["lr"] = learning_rate
        mixed = np.random.SeedSequence([seed, 0xD809, step, self.ranks.rank]).generate_state(1, np.uint64)[0]
        # Not torch.manual_seed: where no GPU is in use it writes down the call stack for each kind of device, 0.4 ms.
        torch.default_generator.manual_seed(int(mixed >> np.uint64(1)))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(int(mixed >> np.uint64(1)))
        if not self.unwrapped.training:  # after an evaluation; walking through all modules is not free
            self.model.train()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The precision in which forward passes run."""
        return self._strategy.autocast()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, already divided by the counts of all ranks; `last`: exchange them now."""
        self._strategy.backward(loss, last)

    def step(self) -> StepResult:
        """Clip and update, unless gradients are not finite; clear them in any case."""
        result = self._strategy.step()
        self.updates += result.applied
        return result

    def loss_scale(self) -> float | None:
        """fp16: by what the loss is multiplied before backward; else None."""
        return self._strategy.loss_scale()

    def state(self) -> dict[str, Any]:
        """What belongs into a checkpoint beside the fragments, as JSON; equal on all ranks."""
        return {"updates": self.updates, "scaler": self._strategy.scaler_state()}

    def snapshot(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint, copied to host memory. A collective under some strategies."""
        keys = ["weight", *self._strategy.state_keys()]
        return snapshot(self._strategy.fragments(), keys)

    def restore(self, files: FragmentFiles, state: dict[str, Any]) -> None:
        """Take weights and optimizer state from the files of any strategy and number of ranks."""
        keys = self._strategy.state_keys()
        if set(keys) != files.keys - {"weight"}:
            raise UserError(
                f"the checkpoint's optimizer state is {sorted(files.keys - {'weight'})}",
                f"{sorted(keys)}, which this optimizer goes by",
                "take the optimizer that the checkpoint was made with, or <stage>.resume=false",
            )
        files.restore(self._strategy.fragments(), ["weight", *keys])
        self.updates = state["updates"]
        self._strategy.restored(self.updates, state["scaler"])

    def peak_memory_gib(self) -> float | None:
        """Most memory the device has held for tensors; None on CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None

    def described(self) -> dict[str, Any]:
        """What was really launched, for launch.json."""
        types = precision.types(self._training.precision, self.zero is not None and self.zero.converts)
        about = {"ranks": self.world, "strategy": self.strategy_name, "types": types}
        return about | ({"zero": self.zero.name, "deepspeed_config": self.zero.config} if self.zero else {})

    def _resolved_zero(self, world: int, hidden_size: int) -> ZeroConfig:
        assert self._zero_name is not None
        return resolve_zero(
            self._training,
            world,
            hidden_size,
            deepspeed_version(),
            name=self._zero_name,
            raw=load_zero(self._zero_name),
            on_cpu=self.on_cpu,
            run_dir=self._folder,
        )

    def _chosen_strategy(self) -> str:
        asked = self._training.engine.strategy
        if self._zero_name is not None:
            return "deepspeed"
        if asked == "deepspeed":
            raise UserError(
                "engine.strategy: deepspeed without engine.zero", "a config", "set engine.zero, such as zero2"
            )
        if asked == "auto":
            return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else "ddp"
        return asked

    def _require_one_precision(self) -> None:
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        wanted = self._training.precision
        if asked not in ("no", wanted):
            raise UserError(
                f"the launcher was told mixed_precision {asked}, the recipe says precision: {wanted}",
                "one owner of the precision, the recipe",
                "leave mixed_precision out of the launch, or change the recipe",
            )

    @staticmethod
    def _require_rank_for_each_gpu(zero: ZeroConfig, world: int) -> None:
        """UserError where quantized gradients would go astray: DeepSpeed takes all GPUs that it sees for a node's ranks
        (0.19.8, runtime/comm/coalesced_collectives.py)."""
        ranks, seen = int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), torch.cuda.device_count()
        if zero.config["zero_optimization"].get("zero_quantized_gradients") and ranks != seen:
            raise UserError(
                f"zero_quantized_gradients with {ranks} rank(s) on a node that sees {seen} GPUs",
                "a rank for each GPU that is seen",
                "start as many ranks, or leave only their GPUs in CUDA_VISIBLE_DEVICES",
            )

    def _accelerate(self) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have left another
        timeout = timedelta(seconds=self._training.engine.collective_timeout_s)
        for name, value in self._flight_recorder().items():
            os.environ.setdefault(name, value)
        # Without the named backend Accelerate takes CPU ranks for one process (seen with 1.15).
        backend = {"backend": "gloo"} if self.on_cpu and "RANK" in os.environ else {}
        group = InitProcessGroupKwargs(timeout=timeout, **backend)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _form_group_of_attempt("gloo" if self.on_cpu else "nccl", timeout)
        if self.strategy_name == "deepspeed":
            os.environ.setdefault("DS_ACCELERATOR", "cpu" if self.on_cpu else "cuda")
            raw = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}  # replaced before prepare
            group.backend = "gloo" if self.on_cpu else None
            _set_environment_for_deepspeed()
            if self.on_cpu:
                _leave_out_shared_memory()
            return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=raw), kwargs_handlers=[group])
        wanted = self._training.precision
        mixed = wanted if wanted in ("bf16", "fp16", "fp8") and self.strategy_name == "ddp" else "no"
        wrap = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        handlers: list[Any] = [wrap, group]
        if mixed == "fp8":
            # Its default makes new parameters of the weights, which the optimizer does not know.
            handlers.append(AORecipeKwargs(enable_fsdp_float8_all_gather=False))
        return Accelerator(cpu=self.on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)

    def _flight_recorder(self) -> dict[str, str]:
        """What makes NCCL write down, once a collective times out, which collectives each rank was in."""
        return {
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": str(self._folder / "flight-recorder-rank-"),
        }

    def _build_strategy(self) -> Strategy:
        limit = self._training.max_grad_norm
        if self.strategy_name == "deepspeed":
            from trainer.engine.zero_strategy import Zero  # DeepSpeed is an extra, and slow to import

            zero = Zero(self._accelerator, limit)
            assert self.zero is not None
            zero.configure(self.zero)
            return zero
        if self.strategy_name == "fsdp2":
            return FullyShardedDataParallel(self.device, self.world, self._training.precision, limit)
        return Replicated(self._accelerator, limit)


def deepspeed_version() -> str:
    """Version of the installed DeepSpeed; UserError if there is none."""
    from importlib import metadata

    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError(
            "engine.zero, but DeepSpeed is not installed", "it", "pip install 'lmworks[deepspeed]'"
        ) from None


def _form_group_of_attempt(backend: str, timeout: timedelta) -> None:
    """Under a launcher that restarts its ranks (torchrun --max-restarts), each attempt meets under a name of its own.

    All attempts share the launcher's store. Without such a name a new attempt finds the addresses of ranks that died
    there, and fails or hangs (torch 2.13: "connection reset by peer").
    """
    if dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(attempt, store),  # pyright: ignore[reportPrivateImportUsage]
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )


def _leave_out_shared_memory() -> None:
    """On CPUs DeepSpeed would compile an all-reduce through shared memory first, a minute with g++, which only its
    inference calls (0.19.8, comm/torch.py)."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


_set_here: set[str] = set()  # variables of this process's environment that an Engine has set


def _set_environment_for_deepspeed() -> None:
    """DeepSpeed forms a process group even for one process, and asks the environment who it is at every turn."""
    wanted = {"ACCELERATE_USE_DEEPSPEED": "true"}
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        wanted |= alone
    _set_here.update(name for name in wanted if name not in os.environ)
    os.environ.update(wanted)


def _restore_environment() -> None:
    """What an earlier run in this process set, and Accelerate with it, would bind the next one too."""
    for name in _set_here:
        os.environ.pop(name, None)
    _set_here.clear()
