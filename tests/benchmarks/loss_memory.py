"""What the loss over a large vocabulary costs: memory and time of all logits at once, in parts, and of Liger's kernel.

    python tests/benchmarks/loss_memory.py [--vocabulary 32768 131072] [--targets 8192] [--hidden 1024] [--out FILE]

Forward and backward of head and cross entropy on random hidden states, each case in a fresh process, in bf16 on a GPU
and in float32 on a CPU. Memory is what is there at the peak beyond inputs and weights: the allocator's own figure on a
GPU, resident memory on a CPU. Time is the median of the calls after the first two: by the clock on a GPU, CPU seconds
of the process on a CPU, which others on the machine disturb less. Each case carries its ratio to `full` of the run.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALLS = 5


def measure(case: str, vocabulary: int, targets: int, hidden: int) -> dict:
    """Peak bytes beyond inputs, bytes kept from forward to backward, seconds of a call, and the loss as a check."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from trainer.heads import _PART_BYTES, WHOLE, CrossEntropy, Head, LossPlan, nothing, sums_over_targets

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    linear = torch.nn.Linear(hidden, vocabulary, bias=False, device=device)
    hidden_ND = torch.randn(targets, hidden, device=device, requires_grad=True)
    score = CrossEntropy(torch.randint(vocabulary, (targets,), device=device))
    parts = math.ceil(4 * targets * vocabulary / _PART_BYTES)
    plan = {"full": WHOLE, "chunked": LossPlan(parts), "liger": LossPlan(parts, liger=True)}[case]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return sums_over_targets(Head(nothing, linear), hidden_ND, score, plan)["loss"]

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def call() -> float:
        began = clock()
        forward().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    linear.weight.grad, hidden_ND.grad = torch.zeros_like(linear.weight), torch.zeros_like(hidden_ND)
    before = memory(device)[0]
    times_s = [call() for _ in range(CALLS + 2)][2:]
    extra = memory(device)[1] - before
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    ours = {tensor.untyped_storage().data_ptr() for tensor in (linear.weight, hidden_ND)}
    return {
        "peak_mib": round(extra / 2**20, 1),
        "kept_for_backward_mib": round(sum(n for at, n in kept.items() if at not in ours) / 2**20, 1),
        "seconds": round(statistics.median(times_s), 4),
        "loss": loss.item() / targets,
        "parts": plan.parts,
    }


def memory(device) -> tuple[int, int]:
    """Bytes in use now, and at the peak so far."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_fresh_process(arguments: argparse.Namespace, case: str, vocabulary: int) -> dict:
    """One case; what went wrong instead of figures where it cannot run here."""
    sizes = ["--vocabulary", vocabulary, "--targets", arguments.targets, "--hidden", arguments.hidden]
    command = [sys.executable, __file__, "--case", case, *map(str, sizes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, vocabulary: int) -> dict:
    """All cases of one vocabulary, with their ratios to `full`."""
    rows = {case: in_fresh_process(arguments, case, vocabulary) for case in ("full", "chunked", "liger")}
    for case, row in rows.items():
        if case != "full" and "failed" not in row and "failed" not in rows["full"]:
            whole = rows["full"]
            row["ratio_to_full"] = {
                "peak": round(row["peak_mib"] / whole["peak_mib"], 3),
                "time": round(row["seconds"] / whole["seconds"], 3),
                "loss": row["loss"] / whole["loss"],
            }
        print(vocabulary, case, row, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--targets", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=["full", "chunked", "liger"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.vocabulary[0], arguments.targets, arguments.hidden)))
        return
    sys.path.insert(0, str(ROOT))
    from trainer.artifact import versions
    from trainer.environment import gpus, processor

    result = {
        "command": f"python tests/benchmarks/loss_memory.py --targets {arguments.targets} --hidden {arguments.hidden}",
        "device": gpus()[:1] or processor(),
        "versions": versions(),
        "targets": arguments.targets,
        "hidden_size": arguments.hidden,
        "results": {str(vocabulary): compare(arguments, vocabulary) for vocabulary in arguments.vocabulary},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
