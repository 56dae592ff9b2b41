"""The fresh process that measures one model in one backend: cold start, speed of each shape, quality, where nodes ran.
Which models, shapes and inputs, and whether a backend may be measured at all, `bench` decides.

It reads a job file and the arrays beside it, and imports only what its backend needs.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export import energy
from export.generate import Sampling, generate
from export.io_spec import PAIR_STEMS, IoSpec, graph_files, read_spec
from export.provider_audit import audit, sum_of
from export.runners import CPU_PROVIDER, Pair, Runner, open_runner
from export.scores import score
from export.windows import (
    MIN_CPU_SHARE,
    Clock,
    Measurement,
    Settings,
    SystemClock,
    cpu_share,
    measure,
    scheduled_s,
)
from trainer.artifact import write_json
from trainer.errors import UserError
from trainer.export_config import ONNX_FILES

# torch.compile against eager, both fp32: other kernels in another order of addition; 10 times what was seen (1e-6).
_COMPILED_RELATIVE_RMS = 1e-5
# Calls that a percentile needs to be more than the slowest one of them: two beyond p90, one beyond p99.
_FEWEST_CALLS = {90: 20, 99: 100}
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """What one worker does. Arrays lie in `arrays`, an .npz: `cell<i>|<input>`, `quality<i>|<input>` and, for
    masked accuracy, `quality<i>|labels` (-100 where a token is no target), and `prompts<i>`, token ids [B, P]."""

    folder: str
    backend: Any
    cells: int
    quality_batches: int
    metric: str | None
    settings: Settings
    arrays: str
    provider: str
    audited: bool
    prompts: int
    new_tokens: int
    cuda_graphs: bool
    pair: dict[str, Any] | None = None
    """The face of an encoder-decoder, as `asdict` has it: a cell's call is the encoder's and the decoder's first step.
    Reading it from the folder would load transformers and torch into this process, whose memory is measured."""

    @staticmethod
    def read(path: Path) -> "Job":
        record = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**record, "settings": Settings(**record["settings"])})


def main(path: Path) -> None:
    """Do the job in file `path` and write `<path>.result`."""
    job = Job.read(path)
    with np.load(job.arrays) as archive:
        arrays = {name: archive[name] for name in archive.files}
    folder, threads = Path(job.folder), job.settings.threads
    cells = [_named(arrays, f"cell{index}|") for index in range(job.cells)]
    counter, no_energy = (None, "") if job.provider == CPU_PROVIDER else energy.open_counter()
    runner, cold_start_s = open_cold(job, cells[0])
    rows = [measure_row(runner, inputs, job.settings, SystemClock(), counter) for inputs in cells]
    if job.backend == "compile":
        check_compiled(runner, open_runner(folder, "eager", threads, job.provider, _pair_spec(job)), cells)
    batches = [_named(arrays, f"quality{index}|") for index in range(job.quality_batches)]
    value = score(runner, batches, job.metric).value if job.metric else None
    prompts = [arrays[f"prompts{index}"] for index in range(job.prompts)]
    decode = [
        measure_decode(runner, folder, ids_BP, job.new_tokens, job.settings, SystemClock(), counter)
        for ids_BP in prompts
    ]
    graphs = graphs_of(job, runner, cells[0]) if job.audited else []
    del runner  # a device may have no room for two sessions
    audits = [audit(file, job.provider, threads, inputs) for file, inputs in graphs]
    found = asdict(sum_of(audits)) if audits else None
    result = {"rows": rows, "cold_start_s": cold_start_s, "quality": value, "decode": decode, "audit": found}
    write_json(Path(f"{path}.result"), result | {"no_energy": no_energy})


def open_cold(job: Job, inputs: Inputs) -> tuple[Runner | Pair, float | None]:
    """The runner, and seconds from opening it to its first answer; None where others had the CPU meanwhile."""
    spec = _pair_spec(job)
    before, started_s = scheduled_s("self"), time.perf_counter()
    runner = open_runner(Path(job.folder), job.backend, job.settings.threads, job.provider, spec, job.cuda_graphs)
    runner.run(inputs)
    elapsed_s = time.perf_counter() - started_s
    share = cpu_share(before, scheduled_s("self"))
    return runner, elapsed_s if share is None or share >= MIN_CPU_SHARE else None


def graphs_of(job: Job, runner: Runner | Pair, inputs: Inputs) -> list[tuple[Path, Inputs]]:
    """The graph files that a call on `inputs` runs, and what each of them is given."""
    if not isinstance(runner, Pair):
        return [(Path(job.folder, ONNX_FILES[job.backend]), inputs)]
    files = [Path(job.folder, file) for file in graph_files(PAIR_STEMS, job.backend)]
    return list(zip(files, (inputs, runner.feeds(inputs)), strict=True))


def measure_row(
    runner: Runner | Pair, inputs: Inputs, settings: Settings, clock: Clock, counter: energy.Counter | None = None
) -> dict[str, Any]:
    """Measured part of a report row for one batch of inputs; its energy, and the memory on the device, which keeps all
    that was taken since the model was opened, where there is a counter of them."""
    reset_peak_memory()
    found = measure(lambda: runner.run(inputs), settings, clock)
    mask_BT = inputs["attention_mask"]
    batch_size, real_tokens = len(mask_BT), int(mask_BT.sum())
    row = describe(found, batch_size, real_tokens, mask_BT.size) | {"peak_memory_mib": peak_memory_mib()}
    if counter:
        joules = energy.joules_per_call(lambda: runner.run(inputs), counter, clock)
        row |= energy.columns(joules, batch_size, real_tokens) | _taken(counter)
    return row


def _taken(counter: energy.Counter) -> dict[str, float]:
    """Memory on the device, unless others use it: what is taken is all processes'."""
    return {"device_memory_mib": counter.taken_mib()} if counter.users() <= 1 else {}


def measure_decode(
    runner: Runner | Pair,
    folder: Path,
    prompts_BP: np.ndarray,
    new_tokens: int,
    settings: Settings,
    clock: Clock,
    counter: energy.Counter | None = None,
) -> dict[str, Any]:
    """Generating greedily: time to the first token, and for each further one, from medians of one token and of all.
    Joules are of whole texts, and of their new tokens, prompt included; memory is what the process holds at the most by
    then, earlier rows' buffers too."""
    spec, prompts = read_spec(folder), prompts_BP.tolist()

    def generating(count: int) -> Measurement:
        return measure(lambda: generate(runner, spec, prompts, Sampling(count)), settings, clock)

    reset_peak_memory()
    row, batch_size = describe_decode(generating(1), generating(new_tokens), len(prompts_BP), new_tokens), len(prompts)
    row["peak_memory_mib"] = peak_memory_mib()
    if counter:
        joules = energy.joules_per_call(lambda: generate(runner, spec, prompts, Sampling(new_tokens)), counter, clock)
        row |= energy.columns(joules, batch_size, batch_size * new_tokens) | _taken(counter)
    return row


def describe_decode(first: Measurement, whole: Measurement, batch_size: int, new_tokens: int) -> dict[str, Any]:
    """Both measurements as columns; no times where either had too few windows with the CPU."""
    row: dict[str, Any] = {
        "status": "ok" if first.stable and whole.stable else "unstable",
        "reason": first.reason or whole.reason,
        "cpu_share": round(min(first.lowest_share, whole.lowest_share), 3),
    }
    if not (first.calls_s.size and whole.calls_s.size):
        return row
    first_s, whole_s = float(np.median(first.calls_s)), float(np.median(whole.calls_s))
    return row | {
        "first_token_ms": first_s * 1e3,
        "token_ms": (whole_s - first_s) / (new_tokens - 1) * 1e3,
        "tokens_per_s": batch_size * new_tokens / whole_s,
    }


def describe(found: Measurement, batch_size: int, real_tokens: int, padded_tokens: int) -> dict[str, Any]:
    """A measurement as report columns; no speeds where too few windows had the CPU to say anything.

    An unstable row shows what its last windows gave, so that a reader sees the size of things; it is marked, and
    never ranked beside a stable one.
    """
    row: dict[str, Any] = {
        "status": "ok" if found.stable else "unstable",
        "reason": found.reason,
        "cpu_share": round(found.lowest_share, 3),
        "windows": len(found.windows),
        "contended_windows": found.contended,
    }
    if not found.calls_s.size:
        return row
    calls_s = found.calls_s
    return row | {
        "p50_ms": float(np.median(calls_s)) * 1e3,
        "p90_ms": _tail_ms(calls_s, 90),
        "p99_ms": _tail_ms(calls_s, 99),
        "calls": len(calls_s),
        "samples_per_s": batch_size * len(calls_s) / calls_s.sum(),
        "real_tokens_per_s": real_tokens * len(calls_s) / calls_s.sum(),
        "padded_tokens_per_s": padded_tokens * len(calls_s) / calls_s.sum(),
        "padded_tokens": padded_tokens,
        "padding": 1 - real_tokens / padded_tokens,
    }


def _tail_ms(calls_s: np.ndarray, percentile: int) -> float | None:
    """A high percentile of the calls in ms; None where fewer than `_FEWEST_CALLS` would make it up."""
    return float(np.percentile(calls_s, percentile)) * 1e3 if len(calls_s) >= _FEWEST_CALLS[percentile] else None


def check_compiled(compiled: Runner, eager: Runner, cells: list[Inputs]) -> None:
    """Raise UserError if torch.compile changed the model's results on any measured batch."""
    for inputs in cells:
        actual = compiled.run(inputs)
        for name, source in eager.run(inputs).items():
            error = float(np.sqrt(np.square(actual[name] - source).mean() / np.square(source).mean()))
            if not error <= _COMPILED_RELATIVE_RMS:
                raise UserError(
                    f"compiled {name} differs from the eager one by relative_rms {error:.2g} at {source.shape}",
                    f"at most {_COMPILED_RELATIVE_RMS:g}",
                )


def reset_peak_memory() -> None:
    """Begin a new high-water mark of this process's memory (Linux: proc_pid_clear_refs(5), value 5)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def peak_memory_mib() -> float | None:
    """Most memory that this process had resident since the last reset (VmHWM); None where Linux does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def _pair_spec(job: Job) -> IoSpec | None:
    return IoSpec.of_record(job.pair) if job.pair else None


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> Inputs:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:  # `bench` puts the last line into the report
        print(str(error).replace("\n", "; "), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
