"""What a step of each optimizer that is here costs over the tensors of a BERT-base and of a GPT-2, against torch's
fused AdamW. Run by hand: python tests/benchmarks/optimizer_step.py [--out results.json]; no test depends on it.

All implementations share weights and gradients, keep their own state, and take their windows in turn, round after
round, so that whatever else the machine does hits all of them alike. The roofline: AdamW reads weight, gradient and two
moments in fp32 and writes all but the gradient, 28 bytes a parameter, at the bandwidth of scaling a tensor in place in
the same round. (Not of a copy: a CPU reads what a copy overwrites, too, and so moves half as much again.)
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export.bench import describe_machine
from export.windows import MIN_CPU_SHARE, Settings, SystemClock, Window, take_window
from trainer.artifact import versions, write_json
from trainer.config import Optim
from trainer.engine.optim import build_optimizer
from trainer.environment import gpus
from trainer.errors import UserError
from trainer.models import decay_groups

ROUNDS, MOST_ROUNDS, WINDOW_S = 8, 60, 1.0
ADAMW_BYTES = 28
BASELINE, SCALING = "adamw torch", "scaling in place"
IMPLEMENTATIONS = (  # name, backend, state on the CPU
    ("adamw", "torch", False),
    ("adamw", "torch_foreach", False),
    ("adamw", "apex", False),
    ("adamw", "deepspeed", False),
    ("adamw", "deepspeed", True),
    ("lamb", "torch", False),
    ("lamb", "apex", False),
    ("lamb", "deepspeed", False),
    ("lion", "deepspeed", False),
)


def main() -> None:
    """Measure both models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--models", nargs="+", choices=["bert-base", "gpt2"], default=["bert-base", "gpt2"])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {
        "command": "python tests/benchmarks/optimizer_step.py --out results.json",
        "device": device.type,
        "machine": describe_machine(torch.get_num_threads()),
        "gpus": gpus(),
        "versions": versions(),
        "method": f"rounds until {arguments.rounds} count for each implementation, {MOST_ROUNDS} at most; in each a "
        f"window of {WINDOW_S} s of every implementation in turn; windows with less than {MIN_CPU_SHARE:.0%} of the "
        "CPU time wanted are not counted; speedup is the median over rounds of the time of torch's fused AdamW over "
        f"the implementation's; of_roofline is the median over rounds of the time that {ADAMW_BYTES} bytes a parameter "
        "take at the bandwidth of scaling in place (bytes read plus written) over the implementation's",
    }
    for model in arguments.models:
        results[model] = measure_model(model, device, arguments.rounds)
    if arguments.out:
        write_json(arguments.out, results)


def measure_model(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Rows of all implementations over the tensors of one model."""
    module = build(name).to_empty(device=device)
    module.tie_weights()  # undone by to_empty
    parameters = list(module.parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
    count = sum(parameter.numel() for parameter in parameters)
    calls, missing = step_calls(module, device)
    source = torch.ones(count, device=device)
    calls[SCALING] = partial(source.mul_, 1.0)
    taken = interleave({label: waiting(call, device) for label, call in calls.items()}, rounds)
    bandwidth = [2 * source.nbytes / window.median_s for window in taken[SCALING] if counts(window)]
    rows = [describe(label, taken, count) for label in calls if label != SCALING]
    for row in [*rows, *missing]:
        print(name, row, flush=True)
    gb_per_s = float(np.median(bandwidth)) / 1e9 if bandwidth else None
    return {"parameters": count, "tensors": len(parameters), "scaling_gb_per_s": gb_per_s, "rows": rows + missing}


def build(name: str) -> Any:
    """A model without memory behind its tensors."""
    import transformers

    with torch.device("meta"):
        if name == "bert-base":
            return transformers.BertForMaskedLM(transformers.BertConfig())
        return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def step_calls(module: torch.nn.Module, device: torch.device) -> tuple[dict[str, Callable[[], Any]], list[dict]]:
    """The `step` of each implementation that can be built here, and rows that say why the others cannot."""
    calls: dict[str, Callable[[], Any]] = {}
    missing = []
    for name, backend, offload in IMPLEMENTATIONS:
        label = f"{name} {backend}" + (" CPU" if offload else "")
        if offload and device.type != "cpu":
            missing.append({"implementation": label, "missing": "steps on the CPU; measured where that is the device"})
            continue
        optim = Optim(name=name, backend=backend, learning_rate=1e-6)
        groups = decay_groups(module, optim.weight_decay)
        try:
            optimizer = build_optimizer(optim, groups, print, device_type=device.type, offload=offload, sharded=False)
        except UserError as error:
            missing.append({"implementation": label, "missing": str(error).splitlines()[0]})
            continue
        calls[label] = optimizer.step
    return calls, missing


def waiting(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The call, over only when the device is done with it."""

    def done() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return done


def interleave(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Window]]:
    """Windows of each call, one a round in turn, until enough rounds count for all."""
    settings, clock = Settings(torch.get_num_threads(), WINDOW_S, max_windows=3, stability=0.1), SystemClock()
    taken: dict[str, list[Window]] = {label: [] for label in calls}
    for call in calls.values():  # makes state, fills caches
        call()
        call()
    while len(taken[SCALING]) < MOST_ROUNDS and min(len(counted(taken, label)) for label in calls) < rounds:
        for label, call in calls.items():
            taken[label].append(take_window(call, settings, clock))
    return taken


def counts(window: Window) -> bool:
    return window.cpu_share >= MIN_CPU_SHARE


def counted(taken: dict[str, list[Window]], label: str) -> list[tuple[Window, Window, Window]]:
    """Windows of the baseline, the scaling and this implementation in rounds in which all three had the CPU."""
    rounds = zip(taken[BASELINE], taken[SCALING], taken[label], strict=True)
    return [windows for windows in rounds if all(map(counts, windows))]


def describe(label: str, taken: dict[str, list[Window]], parameters: int) -> dict[str, Any]:
    """One row: time a step, ratio to torch's fused AdamW, share of the roofline, over the rounds that count."""
    rounds = counted(taken, label)
    row: dict[str, Any] = {"implementation": label, "rounds": len(rounds), "contended": len(taken[label]) - len(rounds)}
    if not rounds:
        return row
    times_ms = [own.median_s * 1e3 for _, _, own in rounds]
    ratios = [base.median_s / own.median_s for base, _, own in rounds]
    # scaling moves 8 bytes a parameter in its time
    shares = [scaling.median_s * ADAMW_BYTES / 8 / own.median_s for _, scaling, own in rounds]
    return row | {
        "median_ms": float(np.median(times_ms)),
        "best_window_ms": min(times_ms),
        "speedup": float(np.median(ratios)),
        "speedup_range": [min(ratios), max(ratios)],
        "of_roofline": float(np.median(shares)),
        "lowest_cpu_share": min(window.cpu_share for windows in rounds for window in windows),
    }


if __name__ == "__main__":
    main()
