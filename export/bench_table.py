"""What a terminal shows of a benchmark. The whole of it stands in report.json, and is drawn by `report`."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Columns = tuple[tuple[str, str, str], ...]
_COLUMNS: Columns = (  # heading, key of a row, format
    ("p50 ms", "p50_ms", ".2f"),
    ("p99 ms", "p99_ms", ".2f"),
    ("tokens/s", "real_tokens_per_s", ",.0f"),
    ("limit", "limit_share", ".0%"),
    ("peak MiB", "peak_memory_mib", ",.0f"),
    ("file MiB", "file_mib", ".1f"),
)
_DEVICE: Columns = (
    ("GPU MiB", "device_memory_mib", ",.0f"),
    ("J/request", "joules_per_request", ".3g"),
    ("J/token", "joules_per_token", ".3g"),
)


def show(report: dict[str, Any]) -> None:
    """Print the report as a table, then why rows are without figures, what is no ranking, and all else line by line."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        _table(report["rows"], _COLUMNS, f"{report['machine']['cpu']}, {report['machine']['threads']} threads")
    )
    if measured := [row for row in report["rows"] if row.get("device_memory_mib") is not None]:
        console.print(_table(measured, _DEVICE, "the whole GPU's"))  # eighty columns have no room for more
    for reason, rows in reasons(report["rows"]).items():
        console.print(f"{', '.join(rows)}: {reason}", markup=False)
    engines = [(row["model"], row["backend"], engine) for row in report["rows"] for engine in row.get("engines", ())]
    instead = [(model, backend, engine["instead"]) for model, backend, engine in engines]
    for model, backend, reason in dict.fromkeys(each for each in instead if each[2]):
        console.print(f"{model} {backend}: {reason}; it was built anew for this place", markup=False)
    for line in dict.fromkeys(map(_describe_build, engines)):
        console.print(line, markup=False)
    for reason in dict.fromkeys(entry["reason"] for entry in report["no_energy"]):
        console.print(f"no energy: {reason}", markup=False)
    console.print(describe_noise(report["noise"]), markup=False)
    for entry in report["quality"]:
        console.print(f"{entry['model']} {entry['backend']}: {entry['metric']} {entry['value']:.4f}")
    for line in (*map(describe_decode, report["decode"]), *map(describe_load, report["load"])):
        console.print(line, markup=False)


def _table(rows: list[dict[str, Any]], columns: Columns, caption: str) -> Table:
    """Rows with some of their figures; of one that is not ok the first figure's place says so."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
    for column in ("model", "backend", "batch"):
        table.add_column(column, no_wrap=True)
    for column, _, _ in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        numbers = [format(row[key], style) if row.get(key) is not None else "" for _, key, style in columns]
        if row["status"] != "ok" and columns is _COLUMNS:
            numbers[0] = row["status"]
        table.add_row(row["model"], row["backend"], _shape(row), *numbers)
    return table


def _describe_build(engine: tuple[str, str, dict[str, Any]]) -> str:
    model, backend, about = engine
    took = "unknown" if about.get("build_s") is None else f"{about['build_s']:.1f} s"
    return f"{model} {backend}: {Path(about['plan']).name} of {about['file_mib']:.1f} MiB, built in {took}"


def describe_decode(row: dict[str, Any]) -> str:
    """One row of generating, in one sentence."""
    about = f"{row['model']} {row['backend']} {row['batch_size']}x{row['prompt_tokens']}+{row['new_tokens']}: "
    if row.get("token_ms") is None:
        return about + f"{row['status']}: {row['reason']}"
    times = f"first token {row['first_token_ms']:.1f} ms, each further {row['token_ms']:.2f} ms"
    energy = f", {row['joules_per_token']:.3g} J a new token" if row.get("joules_per_token") is not None else ""
    shaky = " (unstable)" if row["status"] != "ok" else ""
    return about + f"{times}, {row['tokens_per_s']:,.0f} tokens/s{energy}{shaky}"


def describe_load(entry: dict[str, Any]) -> str:
    """What one server held, in one sentence."""
    about = f"{entry['model']} {entry['backend']}: "
    if entry["status"] == "failed":
        return about + f"failed: {entry['reason']}"
    best, most = entry["highest_rate_per_s"], entry["most_per_s"]
    held = "no rate that was tried holds" if best is None else f"{best:.1f} requests/s hold"
    shaky = f" (unstable: {entry['reason']})" if entry["status"] != "ok" else ""
    return about + f"{held} p99 of {entry['limit_ms']:g} ms; {most:.1f} at the most, with the queue never empty{shaky}"


def reasons(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Why rows are not ok: status and reason, each once, to the rows that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            name = f"{row['model']} {row['backend']} {_shape(row)}"
            about.setdefault(f"{row['status']}: {row['reason']}", []).append(name)
    return about


def describe_noise(noise: dict[str, Any]) -> str:
    """What smaller differences than the noise mean, in one sentence."""
    if noise["relative"] is None:
        return f"noise unknown ({noise['reason']}): rows are not ranked"
    return (f"{noise['model']} {noise['backend']}, measured twice, differed by up to {noise['relative']:.1%} "
            f"at {len(noise['shapes'])} shapes: rows that differ by less are not ranked")  # fmt: skip


def _shape(row: dict[str, Any]) -> str:
    return f"{row['batch_size']}x{row['sequence_length']}" + (" real" if row["lengths"] == "real" else "")
