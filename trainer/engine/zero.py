"""DeepSpeed configs: which one a run uses, its "auto"s filled from the recipe, its contradictions refused.
Only reads and checks; handing the result to Accelerate is the engine's business.

A config holds sharding, offload and communication; batch, accumulation, clipping, precision and optimizer are the
recipe's. DeepSpeed passes over unknown top-level keys, and over each "auto" that is left: both are errors here.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import EngineConfig, Optim, Training, nearest_multiples
from trainer.engine.zero_facts import (
    DEPRECATED_ZERO_KEYS,
    FIXED,
    NOT_HERE,
    REMOVED_KEYS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
    Case,
    known_wrong,
)
from trainer.errors import UserError

_SHIPPED = Path(__file__).parents[2] / "deepspeed_configs"  # beside the package, in a checkout as in site-packages
_AUTO = "auto"
_NEVER_STEPS = 2**31 - 1  # steps_per_print that DeepSpeed's progress lines never reach

_SECTIONS = ("bf16", "fp16", "torch_autocast", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_HALF = {"bf16": "bf16", "fp8": "bf16", "fp16": "fp16"}  # fp8 layers multiply inside a bf16 model
_DTYPES = {
    spelling: name
    for name, spellings in {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "float16", "half")}.items()
    for spelling in (*spellings, *(f"torch.{spelling}" for spelling in spellings))
}
# Settings of `accelerate launch` that compete with a config and with the recipe (accelerate/utils/launch.py, 1.15).
_COMPETING = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
)


@dataclass(frozen=True)
class ZeroConfig:
    """A DeepSpeed config with no "auto" left in it."""

    name: str  # of a shipped config, or the path as it was given
    stage: int
    offload_optimizer: str  # none, cpu or nvme
    offload_param: str
    config: dict[str, Any]  # what DeepSpeed gets

    @property
    def cuts_weights(self) -> bool:
        """Whether our strategy cuts parameters up, one by one; where they are offloaded DeepSpeed does."""
        return self.stage == 3 and self.offload_param == "none"

    @property
    def converts(self) -> bool:
        """Whether DeepSpeed makes the model's own weights bf16 or fp16, where the recipe asks for one of them."""
        return not self.config.get("torch_autocast", {}).get("enabled", False)

    @property
    def autocasts(self) -> str | None:
        """bf16 or fp16 where DeepSpeed casts as it goes, else None."""
        section = self.config.get("torch_autocast", {})
        return _DTYPES[section["dtype"]] if section.get("enabled") else None


# ---- which config ----------------------------------------------------------------------------------------------


def chosen_zero(engine: EngineConfig, environ: Mapping[str, str]) -> str | None:
    """The DeepSpeed config of this run: the recipe's `engine.zero`, or the one that the launcher names; None: none.

    Raises UserError where recipe and launcher say different things. Accelerate sets ACCELERATE_USE_DEEPSPEED itself
    once it has a DeepSpeed plugin, so `environ` is to be the environment that the process was started with.
    """
    launched = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    launched = None if launched == "none" else launched
    if launched is not None or _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        _check_launcher(engine, launched, environ)
    if engine.zero is not None and _is_on(environ, "ACCELERATE_USE_FSDP"):
        raise UserError(
            f"the recipe says engine.zero: {engine.zero}, the launcher says FSDP",
            "one strategy",
            "launch without FSDP, or take engine.zero out and set engine.strategy: fsdp2",
        )
    if engine.zero is None and launched is None and engine.strategy == "deepspeed":
        raise UserError(
            "engine.strategy is deepspeed, and neither the recipe nor the launcher names a DeepSpeed config",
            f"one of: {', '.join(_names())}, or the path of a JSON",
            "set engine.zero, such as zero2",
        )
    return engine.zero if engine.zero is not None else launched


def _check_launcher(engine: EngineConfig, launched: str | None, environ: Mapping[str, str]) -> None:
    """UserError where `accelerate launch` was told something about DeepSpeed that the recipe contradicts."""
    said = f"DeepSpeed with {launched}" if launched else "DeepSpeed"
    if engine.strategy in ("ddp", "fsdp2"):
        raise UserError(
            f"the launcher says {said}, the recipe says engine.strategy: {engine.strategy}",
            "one strategy",
            "launch without DeepSpeed, or set engine.strategy: deepspeed",
        )
    competing = [f"{name}={environ[name]}" for name in _COMPETING if name in environ]
    if competing:
        raise UserError(
            f"the launcher says {said}, and {', '.join(competing)}",
            "accumulation and clipping from the recipe, stage and offload from a DeepSpeed JSON",
            "take these settings out of the launch; name a JSON by deepspeed_config_file or the recipe's engine.zero",
        )
    if launched is None and engine.zero is None:
        raise UserError(
            "the launcher says DeepSpeed, and neither it nor the recipe names a DeepSpeed config",
            f"one of: {', '.join(_names())}, or the path of a JSON",
            "set engine.zero in the recipe, or deepspeed_config_file in the launcher's YAML",
        )
    if launched is not None and engine.zero is not None and load_zero(launched) != load_zero(engine.zero):
        raise UserError(
            f"the launcher names the DeepSpeed config {launched}, the recipe says engine.zero: {engine.zero}, "
            "and they are not the same",
            "one config",
            "take one of the two away",
        )


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("true", "1")


# ---- reading ---------------------------------------------------------------------------------------------------


def load_zero(name_or_path: str) -> dict[str, Any]:
    """The tree of a DeepSpeed JSON, given as a file or as the name of one that ships with lmworks."""
    path = _find(name_or_path)
    try:
        tree = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_once_each, parse_constant=_reject_constant
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}", "JSON, without comments") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8", "JSON in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a readable file") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}", "each key once, and finite numbers") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not an object", "a DeepSpeed config")
    return tree


def _find(name: str) -> Path:
    shipped = _SHIPPED / f"{name}.json"
    if Path(name).is_file():
        return Path(name)
    if name in _names():
        return shipped
    close = difflib.get_close_matches(Path(name).stem, _names(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"no DeepSpeed config {name!r}{hint}",
        f"one of: {', '.join(_names())}, or the path of a JSON",
        "check the path; a relative one is seen from the working directory",
    )


def _names() -> list[str]:
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"duplicate key {', '.join(twice)}")
    return tree


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


# ---- resolving -------------------------------------------------------------------------------------------------


class _Draft:
    """A config on its way from JSON to DeepSpeed: dotted keys into it, and what was found to be wrong."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.tree: dict[str, Any] = copy.deepcopy(dict(raw))
        self.problems: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        node: Any = self.tree
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def put(self, key: str, value: Any) -> None:
        *parents, last = key.split(".")
        node = self.tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value

    def settle(self, key: str, value: Any, owner: str) -> None:
        """Fill a key that is missing or "auto"; a value that is there must be the same."""
        found = self.get(key, _AUTO)
        if found == _AUTO:
            self.put(key, value)
        elif found != value or isinstance(found, bool) != isinstance(value, bool):
            self.problems.append(f"{key}: {json.dumps(found)} here, {json.dumps(value)} by the recipe ({owner})")

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"{key}: {json.dumps(self.get(key))}, but {why}")

    def fail_if_wrong(self, name: str) -> None:
        if self.problems:
            plural = "s" if len(self.problems) > 1 else ""
            raise UserError(
                "\n".join(
                    [
                        f"{len(self.problems)} problem{plural} in DeepSpeed config {name}:",
                        *(f"  {line}" for line in self.problems),
                    ]
                ),
                do='write "auto" for what the recipe owns; deepspeed_configs/README.md says what a config may say',
            )


def resolve_zero(
    training: Training,
    world: int,
    hidden_size: int,
    deepspeed_version: str,
    *,
    name: str,
    raw: Mapping[str, Any],
    on_cpu: bool,
    run_dir: Path,
) -> ZeroConfig:
    """`raw` with every "auto" filled, for `world` ranks and a model of `hidden_size`.

    Raises one UserError with all that is wrong: keys DeepSpeed does not know, numbers that contradict the recipe, and
    settings that this version of DeepSpeed is known to compute wrongly.
    """
    draft = _Draft(raw)
    _check_shape(draft)
    draft.fail_if_wrong(name)
    stage = draft.get("zero_optimization.stage")
    _check_keys(draft)
    _settle_batch(draft, training, world)
    _settle_precision(draft, training.precision, stage)
    _settle_sizes(draft, hidden_size)
    offload_optimizer, offload_param = _settle_offload(draft, stage, training, run_dir)
    _settle_optimizer(draft, training.optim, offload_optimizer)
    _check_zeropp(draft, world, stage, on_cpu)
    _check_version(draft, deepspeed_version, training, stage, on_cpu)
    if draft.get("steps_per_print", _AUTO) == _AUTO:
        draft.put("steps_per_print", _NEVER_STEPS)
    if "timers" not in draft.tree:  # they have the GPU waited for in every forward, for lines that are never printed
        draft.put("timers.throughput.enabled", False)
    draft.problems += [f'{key}: "auto", but the recipe has nothing for it' for key in _autos(draft.tree)]
    draft.fail_if_wrong(name)
    return ZeroConfig(name, stage, offload_optimizer, offload_param, draft.tree)


def _check_shape(draft: _Draft) -> None:
    """What the other checks stand on: sections are objects, and there is a stage."""
    for key in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if draft.get(key, _AUTO) is None:  # DeepSpeed takes null for "none", Accelerate 1.15 fails on it
            draft.tree["zero_optimization"].pop(key.split(".")[1])
    for key in ("zero_optimization", *_SECTIONS):
        if not isinstance(draft.get(key, {}), dict):
            draft.refuse(key, "it is an object")
    stage = draft.get("zero_optimization.stage")
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        draft.refuse("zero_optimization.stage", "it is 0, 1, 2 or 3")


def _check_keys(draft: _Draft) -> None:
    zero = {f"zero_optimization.{key}" for key in ZERO_KEYS}
    for key in [*draft.tree, *(f"zero_optimization.{key}" for key in draft.tree["zero_optimization"])]:
        last = key.rpartition(".")[2]
        if key in REMOVED_KEYS:
            draft.problems.append(f"{key}: DeepSpeed has removed this (0.19.8 refuses it); take it out")
        elif key in NOT_HERE:
            draft.problems.append(f"{key}: not for a config: {NOT_HERE[key]}; take it out")
        elif key != last and last in DEPRECATED_ZERO_KEYS:
            draft.problems.append(f"{key}: an old name; write {DEPRECATED_ZERO_KEYS[last]}")
        elif key not in TOP_LEVEL_KEYS | zero:
            draft.problems.append(f"{key}: unknown key{_nearest(last, ZERO_KEYS if key != last else TOP_LEVEL_KEYS)}")
    for key, (value, why) in FIXED.items():
        if draft.get(key, value) != value:
            draft.refuse(key, f"{why}: {json.dumps(value)}")


def _nearest(found: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; DeepSpeed has none like it"


def _settle_batch(draft: _Draft, training: Training, world: int) -> None:
    at_once = training.micro_batch_size * world
    draft.settle("train_batch_size", training.global_batch_size, "global_batch_size")
    draft.settle("train_micro_batch_size_per_gpu", training.micro_batch_size, "micro_batch_size")
    if training.global_batch_size % at_once:
        draft.problems.append(
            f"global_batch_size {training.global_batch_size} does not divide over {world} rank(s) x micro_batch_size "
            f"{training.micro_batch_size}; nearest: {nearest_multiples(training.global_batch_size, at_once)}"
        )
        draft.put("gradient_accumulation_steps", 1)
    else:
        owner = f"global_batch_size / {world} rank(s) / micro_batch_size"
        draft.settle("gradient_accumulation_steps", training.global_batch_size // at_once, owner)
    draft.settle("gradient_clipping", training.max_grad_norm or 0.0, "max_grad_norm")


def _settle_precision(draft: _Draft, precision: str, stage: int) -> None:
    """Without ZeRO, and where the config says so, torch_autocast makes the precision; else the bf16 or fp16 section.

    At stage 0 these sections would wrap the optimizer into one that, when it is built, takes a step with zero gradients
    (0.19.8: deepspeed/runtime/fp16/unfused_optimizer.py and fused_optimizer.py, initialize_optimizer_states): Adam then
    counts its steps from 1 on, and decayed weights have shrunk.
    """
    half, owner = _HALF.get(precision), f"precision: {precision}"
    by_autocast = stage == 0 or draft.get("torch_autocast.enabled") in (True, _AUTO)
    for section in ("bf16", "fp16"):
        if stage == 0 and half == section and draft.get(f"{section}.enabled") is True:
            draft.refuse(
                f"{section}.enabled",
                "at stage 0 DeepSpeed then steps the optimizer once before the first batch; "
                'write "auto": torch_autocast takes its place',
            )
        else:
            draft.settle(f"{section}.enabled", half == section and not by_autocast, owner)
    if not by_autocast:
        return
    draft.settle("torch_autocast.enabled", half is not None, owner)
    dtype = draft.get("torch_autocast.dtype", _AUTO)
    if half is None and dtype == _AUTO:
        draft.tree["torch_autocast"].pop("dtype", None)
    elif dtype == _AUTO:
        draft.put("torch_autocast.dtype", {"bf16": "bfloat16", "fp16": "float16"}[half or ""])
    elif half is not None and _DTYPES.get(dtype) != half:
        draft.settle("torch_autocast.dtype", half, owner)


def _settle_sizes(draft: _Draft, hidden_size: int) -> None:
    """Bucket sizes in elements, by transformers' rule (integrations/deepspeed.py, trainer_config_finalize)."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, elements in sizes.items():
        if draft.get(f"zero_optimization.{key}") == _AUTO:
            draft.put(f"zero_optimization.{key}", elements)


def _settle_offload(draft: _Draft, stage: int, training: Training, run_dir: Path) -> tuple[str, str]:
    """Devices of optimizer state and parameters. Two runs on a node get two folders below the NVMe path, because
    DeepSpeed removes what it finds where it swaps to (swap_tensor/partitioned_param_swapper.py)."""
    devices = []
    for part, lowest in (("optimizer", 1), ("param", 3)):
        section = f"zero_optimization.offload_{part}"
        device = draft.get(f"{section}.device", "none")
        devices.append(device)
        needed = 3 if device == "nvme" else lowest
        if device not in ("none", "cpu", "nvme"):
            draft.refuse(f"{section}.device", "it is none, cpu or nvme")
        elif device != "none" and stage < needed:
            draft.refuse(f"{section}.device", f"that needs stage {needed} or higher; the stage is {stage}")
        if device == "nvme":
            _settle_nvme(draft, f"{section}.nvme_path", training.engine.nvme_path, run_dir)
        elif draft.get(f"{section}.nvme_path") == _AUTO:
            draft.get(section).pop("nvme_path")
    return devices[0], devices[1]


def _settle_nvme(draft: _Draft, key: str, nvme_path: Path | None, run_dir: Path) -> None:
    is_open = draft.get(key, _AUTO) == _AUTO
    if nvme_path is None and is_open:
        draft.problems.append(f"{key}: needs the recipe's engine.nvme_path, a folder on a node's own NVMe drive")
        draft.put(key, None)
    elif nvme_path is not None and is_open:
        digest = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:8]
        draft.put(key, str(nvme_path / f"{run_dir.name}-{digest}"))
    elif nvme_path is not None:
        draft.settle(key, str(nvme_path), "engine.nvme_path")


def _settle_optimizer(draft: _Draft, optim: Optim, offload_optimizer: str) -> None:
    """Let the recipe's optimizer through: DeepSpeed knows a list of tested ones (0.19.8: runtime/zero/utils.py), and
    with an offloaded state Accelerate 1.15 puts DeepSpeedCPUAdam in the place of whatever it gets."""
    if optim.name == "lamb" or (optim.name == "lion" and optim.backend != "deepspeed"):
        draft.settle("zero_allow_untested_optimizer", True, f"optim.name: {optim.name}")
    if offload_optimizer != "none":
        draft.settle("zero_force_ds_cpu_optimizer", False, f"optim: {optim.name} is to stay what it is")


def _check_zeropp(draft: _Draft, world: int, stage: int, on_cpu: bool) -> None:
    """ZeRO++ (Wang et al. 2023, arXiv:2306.10209): groups of ranks, and quantized communication by GPU kernels."""
    group = draft.get("zero_optimization.zero_hpz_partition_size", 1)
    if isinstance(group, int) and group > 1 and world % min(group, world):
        draft.refuse("zero_optimization.zero_hpz_partition_size", f"{world} ranks do not divide into groups of {group}")
    quantized = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    used = [key for key in quantized if draft.get(f"zero_optimization.{key}") is True]
    if stage < 3:
        for key in [*used, *(["zero_hpz_partition_size"] if group != 1 else [])]:
            draft.refuse(f"zero_optimization.{key}", f"that needs stage 3; the stage is {stage}")
    elif on_cpu:
        for key in used:
            draft.refuse(f"zero_optimization.{key}", "DeepSpeed quantizes on GPUs only")
    if draft.get("zero_optimization.zero_quantized_weights") is True and draft.get("torch_autocast.enabled") is True:
        draft.refuse("zero_optimization.zero_quantized_weights", "it does not go with torch_autocast")


def _check_version(draft: _Draft, version: str, training: Training, stage: int, on_cpu: bool) -> None:
    case = Case(
        stage=stage,
        bf16=draft.get("bf16.enabled") is True,
        autocast=_DTYPES.get(draft.get("torch_autocast.dtype")) if draft.get("torch_autocast.enabled") else None,
        accumulates_in_fp32=draft.get("data_types.grad_accum_dtype") in ("fp32", "float32", "torch.float32", "float"),
        offload_optimizer=draft.get("zero_optimization.offload_optimizer.device", "none") != "none",
        accumulation=draft.get("gradient_accumulation_steps"),
        contiguous_gradients=draft.get("zero_optimization.contiguous_gradients", True) is not False,
        overlap_comm=draft.get("zero_optimization.overlap_comm", stage == 3) is True,
        compiled=training.compile,
        on_cpu=on_cpu,
    )
    draft.problems += [
        f"DeepSpeed {version}: {wrong.what} ({wrong.thread}); install {wrong.fixed} or newer"
        for wrong in known_wrong(version, case)
    ]


def _autos(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose value is still "auto"."""
    if isinstance(node, dict):
        return [key for name, child in node.items() for key in _autos(child, f"{prefix}.{name}" if prefix else name)]
    return [prefix] if node == _AUTO else []
