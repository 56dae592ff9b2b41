"""What the tests of DeepSpeed configs share: a recipe, and shipped configs with changes, resolved for it."""

from pathlib import Path

from trainer.config import Training
from trainer.engine.zero import load_zero, resolve_zero

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "deepspeed_configs"
SHIPPED = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero_infinity", "zeropp")


def training(**keys):
    return Training(**{"max_steps": 1, "global_batch_size": 16, "micro_batch_size": 2, "precision": "bf16"} | keys)


def resolve(name, recipe=None, *, raw=None, world=2, version="0.19.8", on_cpu=False, run_dir=Path("/runs/a")):
    recipe = recipe or training(engine={"nvme_path": Path("/nvme")})
    raw = load_zero(name) if raw is None else raw
    return resolve_zero(recipe, world, 64, version, name=name, raw=raw, on_cpu=on_cpu, run_dir=run_dir)


def changed(name, changes):
    """A shipped config with dotted keys set."""
    tree = load_zero(name)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
