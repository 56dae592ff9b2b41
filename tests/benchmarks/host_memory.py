"""Most host memory of each rank while a model is made and cut up over two of them, under ZeRO-3 and FSDP2.

    python tests/benchmarks/host_memory.py [--out FILE]

GPT-2 with 354M parameters, 1.32 GiB in float32. Ranks are on the CPU here, so that the pieces they keep count too:
weights, and under ZeRO-3 their float32 copy and gradients. On GPUs only what is made on the host would.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

SIZE = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50304}
WAYS = {"zero3": {"zero": "zero3"}, "fsdp2": {"strategy": "fsdp2"}}


def peak_gib() -> float:
    """Most memory that this process has held so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def be_rank(way: str, folder: Path) -> None:
    """Makes the model and gives it to the engine; leaves its figures in the folder."""
    from transformers import AutoConfig

    from trainer.config import Training
    from trainer.engine.engine import Engine
    from trainer.engine.launch import leave
    from trainer.engine.optim import build_optimizer
    from trainer.models import LanguageModel, count_parameters, decay_groups, from_config

    batch = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 1}
    training = Training.model_validate({**batch, "engine": WAYS[way]})
    engine = Engine(training, folder)
    figures: dict[str, Any] = {"imports_gib": peak_gib()}
    model = from_config(AutoConfig.for_model("gpt2", **SIZE), causal=True, seed=0, blank=engine.is_given_weights)
    figures |= {"parameters": count_parameters(model), "model_made_gib": peak_gib()}
    engine.prepare(
        LanguageModel(model),
        lambda module: build_optimizer(
            training.optim, decay_groups(module, 0.01), print, device_type="cpu", offload=False, sharded=True
        ),
        SIZE["n_embd"],
    )
    figures["prepared_gib"] = peak_gib()
    (folder / f"{way}-{engine.ranks.rank}").write_text(json.dumps(figures))
    engine.ranks.wait()
    leave(0)


def measure(way: str, folder: Path) -> list[dict[str, Any]]:
    """Each rank's figures."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, "--rank-of", way, "--folder", str(folder)], env=environment, check=True)
    return [json.loads((folder / f"{way}-{rank}").read_text()) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-of", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        be_rank(arguments.rank_of, arguments.folder)
    from trainer.artifact import versions, write_json
    from trainer.environment import launch_command

    with tempfile.TemporaryDirectory() as folder:
        results = {way: measure(way, Path(folder)) for way in WAYS}
    report = {"command": launch_command(), "versions": versions(), "model": SIZE, "results": results}
    print(json.dumps(report, indent=2))
    if arguments.out:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
