"""Kills real ranks at random instants, saving included, and holds what comes out against runs that were never killed.

    python tests/benchmarks/kill_drill.py [--kills 50] [--out FILE]

Plain training, ZeRO-2 and ZeRO-3 on two gloo ranks, a checkpoint after every step, every other attempt saving in the
background. Reported: how many attempts were killed and resumed, and whether all weights are equal at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer.artifact import versions
from trainer.config import Recipe
from trainer.prepare import run as prepare

ROOT = Path(__file__).parents[2]
FORKED = ROOT / "tests" / "distributed" / "forked.py"
STRATEGIES = {"ddp": [], "zero2": ["pretrain.engine.zero=zero2"], "zero3": ["pretrain.engine.zero=zero3"]}
WITHIN_S = {"ddp": 0.5, "zero2": 1.0, "zero3": 2.0}  # after an attempt's first line, so that a few steps are taken


def tree(folder: Path, steps: int) -> dict:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "run_dir": str(folder),
        "prepare": {
            "sources": [{"type": "stdlib", "on_bad_document": "skip"}],
            "tokenizer": {"type": "wordpiece", "vocab_size": 1024, "max_training_mib": 2.0},
            "validation_fraction": 0.03,
        },
        "pretrain": {
            "model": {"architecture": "bert", "config": config},
            "objective": {"name": "masked_lm"},
            "data": {"sequence_length": 32},
            "max_steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "eval_every_steps": 50,
            "eval_sequences": 16,
            "log_every_steps": 1,
            "save_every_steps": 1,
        },
    }


def drill(root: Path, strategy: str, kills: int, steps: int) -> dict:
    """One strategy: `kills` attempts that are killed, one that ends, and an unbroken run."""
    paths = {}
    for name in ("broken", "unbroken"):
        folder = root / f"{strategy}-{name}"
        folder.mkdir()
        (folder / "prepare").symlink_to(root / "data" / "prepare")
        paths[name] = root / f"{strategy}-{name}.json"
        paths[name].write_text(json.dumps(tree(folder, steps)))
    metrics = root / f"{strategy}-broken" / "pretrain" / "metrics.jsonl"
    arguments = ["pretrain", str(paths["broken"]), *STRATEGIES[strategy]]
    background = ["pretrain.checkpoint.asynchronous=true"]
    delays = np.random.default_rng(17).uniform(0.0, WITHIN_S[strategy], size=kills)
    plan = [
        {"ranks": 2, "arguments": arguments + background * (n % 2), "kill": {"file": str(metrics), "delay_s": delay}}
        for n, delay in enumerate(delays)
    ]
    plan += [{"ranks": 2, "arguments": arguments}]
    plan += [{"ranks": 2, "arguments": ["pretrain", str(paths["unbroken"]), *STRATEGIES[strategy]]}]
    (root / "plan.json").write_text(json.dumps(plan))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(FORKED), str(root / "plan.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    codes = json.loads(done.stdout.splitlines()[-1])
    weights = [load_file(root / f"{strategy}-{n}" / "pretrain" / "model" / "model.safetensors") for n in paths]
    events = [json.loads(line)["event"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    return {
        "killed": sum(code == [-9, -9] for code in codes[:-2]),
        "ended_by_itself": [code for code in codes[:-2] if code != [-9, -9]],
        "last_attempt_and_unbroken_run": codes[-2:],
        "resumed": events.count("resume"),
        "broken_checkpoints": done.stderr.count("is broken ("),
        "steps": steps,
        "weights_equal_bit_for_bit": all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items()),
    }


def main() -> None:
    """Run the drill for every strategy and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare(Recipe.model_validate(tree(root / "data", 1)))
        results = {name: drill(root, name, arguments.kills, arguments.steps) for name in STRATEGIES}
    report = {
        "command": f"python tests/benchmarks/kill_drill.py --kills {arguments.kills} --steps {arguments.steps}",
        "versions": versions(),
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
