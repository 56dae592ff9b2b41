"""Draws the report's pictures from a run's results: losses, throughput, latency, quality against latency, size, load.
Which pictures a run has depends on what it measured; where they are shown is left to `report`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from export.noise import difference
from export.results import (
    STAGES,
    Results,
    Row,
    Trained,
    compared_shape,
    full_rows,
    is_verified,
    measured,
    noise_of,
    rows_at,
)

_COLOURS = {"teacher": "#33508a", "student": "#d1600a"}
_OTHER_COLOURS = ("#4d8057", "#8a4f7d", "#6b6b6b", "#a08420")
_LINES = ("o-", "s--", "^-.", "d:")
_STYLE = {"dpi": 130, "layout": "constrained"}
_INK, _GRID = "#2b2f36", "#dfe3e8"
_SMOOTHING_POINTS = 25  # a curve is averaged over about this many pieces; assumed, for the eye only
LOWER_IS_BETTER = ("perplexity", "loss", "bits_per_byte")


def draw_all(found: Results, folder: Path) -> dict[str, Path]:
    """Write every picture that the results allow into `folder`; name to path."""
    figures: dict[str, Callable[[Results], Figure | None]] = {
        "loss": loss,
        "throughput": throughput,
        "latency": latency,
        "quality": quality,
        "size": size,
        "load": load,
    }
    drawn = {}
    for name, draw in figures.items():
        figure = draw(found)
        if figure is not None:
            drawn[name] = folder / f"{name}.png"
            # without Software and time of day in the file, equal results give equal bytes
            figure.savefig(drawn[name], metadata={"Software": None})
    return drawn


def loss(found: Results) -> Figure | None:
    """Training loss (smoothed) and validation loss of each model against tokens seen."""
    trained = [one for one in found.trained.values() if one.metrics.eval or one.metrics.train]
    if not trained:
        return None
    figure, (axes,) = _figure(1)
    for one in trained:
        colour = _colour(one.name)
        tokens, values = _series(one.metrics.train, "tokens", comparable_loss(one))
        if len(tokens):
            axes.plot(tokens, values, color=colour, alpha=0.22, linewidth=0.9)
            axes.plot(tokens, smooth(values), color=colour, linewidth=1.7, label=f"{one.name}, training (smoothed)")
        tokens, values = _series(one.metrics.eval, "tokens", "loss")
        axes.plot(tokens, values, "o--", color=colour, markersize=5, linewidth=0.9, label=f"{one.name}, validation")
    _finish(axes, "Loss", "tokens trained on", "nats per target token")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(frameon=False)
    return figure


def throughput(found: Results) -> Figure | None:
    """Real tokens a second against tokens seen."""
    series = {one.name: _series(one.metrics.train, "tokens", "tokens_per_s") for one in found.trained.values()}
    series = {name: points for name, points in series.items() if len(points[0])}
    if not series:
        return None
    figure, (axes,) = _figure(1, height=3.2)
    for name, (tokens, values) in series.items():
        label = f"{name}, median {EngFormatter(places=1)(float(np.median(values)))}"
        axes.plot(tokens, values, color=_colour(name), linewidth=1.5, label=label)
    _finish(axes, "Training throughput", "tokens trained on", "real tokens/s")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def latency(found: Results) -> Figure | None:
    """Median latency of each model in each backend, one panel for each (batch, sequence) of the grid."""
    rows = full_rows(found)
    shapes = sorted({(row["batch_size"], row["sequence_length"]) for row in rows})
    if not any(measured(row, "p50_ms") is not None for row in rows):
        return None
    columns = min(2, len(shapes))
    figure, panels = _figure(columns, -(-len(shapes) // columns), height=3.1)
    for axes, (batch, length) in zip(panels, shapes, strict=False):
        models = _models(rows)
        _bars(axes, {model: rows_at(found, model, batch, length) for model in models}, "p50_ms")
        _finish(axes, f"batch {batch} × {length} tokens", "", "median latency, ms")
        axes.margins(y=0.18)
    for axes in panels[len(shapes) :]:
        axes.set_axis_off()
    if any(row["status"] == "unstable" and measured(row, "p50_ms") is not None for row in rows):
        panels[0].bar([0], [0], color="white", edgecolor=_INK, hatch="///", label="unstable")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def quality(found: Results) -> Figure | None:
    """Quality against latency at the compared shape; verified points that no other one beats in both are joined."""
    points, shape = quality_points(found), compared_shape(found)
    if not points or shape is None:
        return None
    metric = points[0]["metric"]
    figure, (axes,) = _figure(1, height=3.9)
    front = pareto_front(points, noise_of(found) or 0.0)
    axes.plot([p["ms"] for p in front], [p["value"] for p in front], color=_INK, linewidth=1, alpha=0.5, zorder=1)
    for point in points:
        on_front, colour = point in front, _colour(point["model"])
        face = colour if on_front else "white"
        axes.scatter(point["ms"], point["value"], s=64, facecolor=face, edgecolor=colour, linewidth=1.6, zorder=2)
    _label_points(axes, points)
    arrow = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    title = f"Quality against latency, batch {shape[0]} × {shape[1]} tokens (filled: on the Pareto front)"
    _finish(axes, title, "median latency, ms (lower is better)", f"{metric.replace('_', ' ')} ({arrow})")
    axes.set_xlim(left=0, right=max(point["ms"] for point in points) * 1.2)
    axes.margins(y=0.15)
    if metric in LOWER_IS_BETTER:
        axes.invert_yaxis()
    return figure


def size(found: Results) -> Figure | None:
    """Bytes on disk that each backend loads."""
    rows = found.bench["rows"] if found.bench else []
    firsts = {(row["model"], row["backend"]): row for row in reversed(rows) if measured(row, "file_mib") is not None}
    if not firsts:
        return None
    figure, (axes,) = _figure(1, height=3.2)
    ordered = [row for row in rows if row is firsts.get((row["model"], row["backend"]))]
    _bars(axes, {model: [row for row in ordered if row["model"] == model] for model in _models(ordered)}, "file_mib")
    _finish(axes, "Size on disk", "", "MiB")
    axes.margins(y=0.18)
    axes.legend(frameon=False)
    return figure


def load(found: Results) -> Figure | None:
    """99th percentile of what requests waited against the rate at which they arrived, with the limit."""
    entries = [entry for entry in (found.bench["load"] if found.bench else []) if load_curve(entry)]
    if not entries:
        return None
    figure, (axes,) = _figure(1, height=3.6)
    for index, entry in enumerate(entries):
        rates, p99_ms = zip(*load_curve(entry), strict=True)
        label = f"{_plain(entry['model'])} {entry['backend'].replace('_', ' ')}"
        label += " (unstable)" if entry["status"] != "ok" else ""
        style = _LINES[index % len(_LINES)]
        axes.plot(rates, p99_ms, style, color=_colour(entry["model"]), linewidth=1.4, markersize=4, label=label)
    limit_ms = entries[0]["limit_ms"]
    axes.axhline(limit_ms, color=_INK, linewidth=0.9, linestyle=":", label=f"limit, {limit_ms:g} ms")
    _finish(axes, "Open-loop load", "requests/s, arriving at random", "99th percentile of the wait, ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def load_curve(entry: Row) -> list[tuple[float, float]]:
    """(rate, p99 in ms) of each point whose 99th percentile was answered at all."""
    return [(point["rate_per_s"], point["p99_ms"]) for point in entry["points"] if point["p99_ms"] is not None]


def comparable_loss(one: Trained) -> str:
    """The training column that is the same quantity as the validation loss.

    A student's `loss` is the weighted sum of its terms; its cross entropy with the true targets is `loss_hard`.
    """
    return "loss_hard" if one.stage == STAGES["student"] else "loss"


def quality_points(found: Results) -> list[Row]:
    """(model, backend, ms, metric, value) of every verified, stable row at the compared shape that has a quality."""
    shape = compared_shape(found)
    if found.bench is None or shape is None:
        return []
    values = {(entry["model"], entry["backend"]): entry for entry in found.bench["quality"]}
    points = []
    for model in _models(found.bench["rows"]):
        for row in rows_at(found, model, *shape):
            entry = values.get((model, row["backend"]))
            if entry and row["status"] == "ok" and row.get("p50_ms") is not None and is_verified(found, row):
                point = {"model": model, "backend": row["backend"], "ms": row["p50_ms"]}
                points.append(point | {"metric": entry["metric"], "value": entry["value"]})
    return points


def pareto_front(points: Sequence[Row], noise: float = 0.0) -> list[Row]:
    """Points that no other one beats, fastest first: by quality without being slower, or by speed at no less quality.

    Latencies within the noise of each other count as one.
    """
    sign = -1.0 if points and points[0]["metric"] in LOWER_IS_BETTER else 1.0

    def beats(one: Row, other: Row) -> bool:
        better = sign * (one["value"] - other["value"])
        tied = difference(one["ms"], other["ms"]) <= noise
        faster = one["ms"] < other["ms"] and not tied
        return (better >= 0 and faster) or (better > 0 and tied)

    ordered = sorted(points, key=lambda point: (point["ms"], -sign * point["value"]))
    return [point for point in ordered if not any(beats(other, point) for other in ordered)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average with the start's bias divided out (Kingma & Ba 2015, section 3), same length."""
    keep = max(0.0, 1.0 - _SMOOTHING_POINTS / max(len(values), 1))
    weights = 1.0 - keep ** np.arange(1, len(values) + 1) if keep else np.ones(len(values))
    total, averages = 0.0, []
    for value in values:
        total = keep * total + (1.0 - keep) * value
        averages.append(total)
    return np.asarray(averages) / weights


def _bars(axes: Axes, rows_of: dict[str, list[Row]], column: str) -> None:
    """Grouped bars, a group for each backend; a row without the number says its status instead."""
    backends = list(dict.fromkeys(row["backend"] for rows in rows_of.values() for row in rows))
    width = 0.8 / max(len(rows_of), 1)
    for index, (model, rows) in enumerate(rows_of.items()):
        shift = (index - (len(rows_of) - 1) / 2) * width
        colour, label = _colour(model), _plain(model)
        for row in rows:
            place, value = backends.index(row["backend"]) + shift, measured(row, column)
            if value is None:
                axes.annotate(row["status"], (place, 0), (0, 3), textcoords="offset points", rotation=90,
                              ha="center", va="bottom", fontsize=7, color=colour)  # fmt: skip
                continue
            shaky = column == "p50_ms" and row["status"] != "ok"
            axes.bar(place, value, width * 0.94, color="white" if shaky else colour, edgecolor=colour,
                     hatch="///" if shaky else None, label=label)  # fmt: skip
            axes.annotate(f"{value:.3g}", (place, value), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
            label = "_again"  # matplotlib leaves labels with an underscore out of the legend
    axes.set_xlim(-0.6, len(backends) - 0.4)  # also where the outermost backends have no bar
    axes.set_xticks(range(len(backends)), [backend.replace("_", " ") for backend in backends])


def _label_points(axes: Axes, points: Sequence[Row]) -> None:
    """Write each point's name beside it; points of nearly equal quality get their names above and below in turn."""
    for index, point in enumerate(sorted(points, key=lambda p: (p["ms"], p["value"]))):
        offset, place = ((8, 5), "bottom") if index % 2 else ((8, -5), "top")
        text = f"{_plain(point['model'])} {point['backend'].replace('_', ' ')}"
        axes.annotate(text, (point["ms"], point["value"]), offset, textcoords="offset points", fontsize=8, va=place,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})  # fmt: skip


def _figure(columns: int, rows: int = 1, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.6, height * rows), **_STYLE)
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa1ab")
    axes.tick_params(colors=_INK, labelsize=8.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _series(rows: Sequence[Row], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns x and y of the rows that have both, as two float arrays of equal length."""
    pairs = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return tuple(np.asarray(pairs, dtype=float).reshape(-1, 2).T)  # type: ignore[return-value]


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _colour(model: str) -> str:
    return _COLOURS.get(model) or _OTHER_COLOURS[sum(model.encode()) % len(_OTHER_COLOURS)]


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
