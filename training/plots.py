"""The pictures of reports: entropies by layer and head, curves over training, costs, and what makes a logit."""

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.typing import ColorType

from modeling_lnfree.attribution import LogitAttribution, LogitLens
from modeling_lnfree.patching import PatchingScores

from .errors import UserError
from .files import read_json, read_records, whole
from .runs import Run


PICTURES = (".png", ".pdf", ".svg")


def check_picture(path: Path | None):
    """Raises UserError for a picture that has no ending of `PICTURES`."""
    if path is not None and path.suffix not in PICTURES:
        raise UserError(f"{path} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")


def save_picture(figure: Figure, path: Path):
    """Writes a figure to a file that is whole or not there, of the kind that its ending names."""
    with whole(path) as aside:
        figure.savefig(aside, format=path.suffix[1:])


class _PlainLogFormatter(LogFormatter):
    """Labels the ticks that `LogFormatter` labels, as 0.5 and not as 5e-01."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_heat_maps(measurements: list[dict[str, Any]], titles: list[str]) -> Figure:
    """
    Attention entropy by layer and head, a panel a measurement, on one scale from 0 to the largest reachable entropy.

    Args:
        measurements: dictionaries with `entropy` and `max_entropy`, each `(layers, heads)`, in nats.
        titles: of the panels.
    """
    rows = -(-len(measurements) // 4)
    columns = -(-len(measurements) // rows)
    limit = max(max(map(max, measurement["max_entropy"])) for measurement in measurements)
    figure = Figure(figsize=(3.1 * columns + 1, 3.4 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(measurements) :]:
        axis.set_visible(False)
    for axis, measurement, title in zip(axes.flat, measurements, titles, strict=False):
        entropy = _grid(measurement)
        image = _draw_map(axis, entropy, limit)
        # a name may have dollars in it
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        if entropy.size <= 64:
            for (layer, head), value in np.ndenumerate(entropy):
                color = "black" if value > 0.6 * limit else "white"
                axis.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label="attention entropy (nats)", shrink=0.9)
    return figure


def plot_steps(
    measurements: list[dict[str, Any]], titles: list[str], steps: list[int], series: dict[str, list[float]]
) -> Figure:
    """
    Attention entropy by layer and head as a film strip, a panel a step on one scale, and below it a curve a quantity.

    Args:
        measurements: dictionaries with `entropy` and `max_entropy`, each `(layers, heads)`, in nats, a step each.
        titles: of the panels.
        steps: in training.
        series: by the name of the quantity, a value a step.
    """
    strips, rows = -(-len(measurements) // 8), max(1, -(-len(series) // 4))
    columns = -(-len(measurements) // strips)
    heights = [1.9 * strips, 2 * rows]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained", dpi=150)
    film, curves = figure.subfigures(2, 1, height_ratios=heights)  # type: ignore[misc]  # two of them
    limit = max(max(map(max, measurement["max_entropy"])) for measurement in measurements)
    axes = film.subplots(strips, columns, squeeze=False)
    for axis in axes.flat[len(measurements) :]:
        axis.set_visible(False)
    for place, (axis, measurement, title) in enumerate(zip(axes.flat, measurements, titles, strict=False)):
        image = _draw_map(axis, _grid(measurement), limit, ticks=6)
        axis.set_title(title, fontsize=9, parse_math=False)
        left, lowest = place % columns == 0, place + columns >= len(measurements)
        axis.set(xlabel="head" * lowest, ylabel="layer" * left)
        axis.tick_params(labelbottom=lowest, labelleft=left)
    film.colorbar(image, ax=axes, label="entropy (nats)")
    order = np.argsort(steps)
    least = min((step for step in steps if step > 0), default=1)
    panels = curves.subplots(rows, 4, squeeze=False)
    for axis in panels.flat[len(series) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(panels.flat, series.items(), strict=False):
        axis.plot(np.array(steps)[order], np.array(values)[order], marker="o", markersize=3)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        # steps like 1, 2, 4, 8, ... would lie in a heap
        if max(steps) > 50 * least:
            axis.set_xscale("symlog", linthresh=least)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
    curves.supxlabel("step", fontsize=9)
    return figure


def _draw_map(axis: Axes, values: np.ndarray, limit: float, *, least: float = 0.0, ticks: int = 12) -> AxesImage:
    """Layers x heads in the colors of a scale from `least` to `limit`."""
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(MaxNLocator(ticks, integer=True))
    return axis.imshow(values, vmin=least, vmax=limit, cmap="viridis", aspect="auto")


def _grid(measurement: dict[str, Any]) -> np.ndarray:
    """Its entropies, `(layers, heads)`; layers may have different numbers of heads."""
    heads = max(map(len, measurement["entropy"]))
    return np.array([[*row, *[np.nan] * (heads - len(row))] for row in measurement["entropy"]])


def plot_overview(measurements: list[dict[str, Any]], names: list[str], bars: dict[str, list[float]]) -> Figure:
    """
    Attention entropy by layer and head, a panel a measurement on one scale, and beside it bars, a line a measurement.

    Args:
        measurements: dictionaries with `entropy` and `max_entropy`, each `(layers, heads)`, in nats.
        names: of the measurements.
        bars: by their title, a value a measurement.
    """
    widths = [1] * len(measurements) + [0.1] + [1.2] * len(bars)
    figure = Figure(figsize=(1.45 * sum(widths) + 0.8, 3), layout="constrained", dpi=150)
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    limit = max(np.max(measurement["max_entropy"]) for measurement in measurements)
    # from the whole nat below: what differs lies near the largest entropy
    least = np.floor(min(np.min(measurement["entropy"]) for measurement in measurements))
    panels = [figure.add_subplot(grid[0, index]) for index in range(len(measurements))]
    for axis, measurement, name in zip(panels, measurements, names, strict=True):
        image = _draw_map(axis, np.array(measurement["entropy"]), limit, least=least, ticks=8)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("head")
        axis.label_outer()
    panels[0].set_ylabel("layer")
    figure.colorbar(image, cax=figure.add_subplot(grid[0, len(panels)]), label="attention entropy (nats)")
    for index, (title, values) in enumerate(bars.items()):
        axis = figure.add_subplot(grid[0, len(panels) + 1 + index])
        drawn = axis.barh(names, values, color=["tab:blue", "tab:orange", "tab:green", "tab:red"])
        texts = [f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in values]
        axis.bar_label(drawn, texts, padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.4)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        if index:
            axis.set_yticklabels([])
    return figure


def plot_seconds(settings: list[list[dict[str, Any]]], titles: list[str]) -> Figure:
    """
    Perplexity against seconds under encryption, a row a setting and a panel a network, with stairs along the frontier.
    Configurations have numbers, the lowest perplexity first, which the legend explains.

    Args:
        settings: of each its configurations, with `perplexity`, and by network `seconds` and `frontier`.
        titles: of the settings.
    """
    networks = list(settings[0][0]["seconds"])
    # a long legend needs its lines
    heights = [max(3.6, 0.8 + 0.17 * len(points)) for points in settings]
    size = (4.2 * len(networks) + 2.4, sum(heights) + 0.3)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(len(settings), len(networks), squeeze=False, sharey="row", height_ratios=heights)
    numbered: list[tuple[Axes, list[tuple[float, float]]]] = []
    for axes, points, title in zip(grid, settings, titles, strict=True):
        points = sorted(
            (point for point in points if np.isfinite(point["perplexity"])), key=lambda point: point["perplexity"]
        )
        for axis, network in zip(axes, networks, strict=True):
            places = [(point["seconds"][network], point["perplexity"]) for point in points]
            for place, point in zip(places, points, strict=True):
                color = "tab:red" if point["frontier"][network] else "tab:gray"
                axis.scatter(*place, s=30, color=color, zorder=3)
            numbered.append((axis, places))
            best = sorted(
                (point["seconds"][network], point["perplexity"]) for point in points if point["frontier"][network]
            )
            stairs = {"drawstyle": "steps-post", "color": "tab:red", "linewidth": 1}
            axis.plot([x for x, _ in best], [y for _, y in best], **stairs)
            axis.set_xlabel(f"seconds of one private pass on {network}")
            axis.grid(alpha=0.3)
            axis.margins(x=0.1, y=0.15)
        # what failed is far above the rest
        if points and points[-1]["perplexity"] > 5 * points[0]["perplexity"]:
            axes[0].set_yscale("log")
        axes[0].set_ylabel("perplexity")
        axes[0].set_title(textwrap.fill(title, 60), fontsize=8, loc="left", parse_math=False)
        names = [f"{number}  {point['configuration']}" for number, point in enumerate(points, start=1)]
        handles = [Line2D([], [], linestyle="none")] * len(names)
        legend = axes[-1].legend(
            *(handles, names), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False, handlelength=0
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    # numbers find their places once the panels have theirs
    figure.draw_without_rendering()
    for axis, places in numbered:
        _number_points(axis, places)
    return figure


def _number_points(axis: Axes, places: list[tuple[float, float]]):
    """A number beside every point, on the side where the others and their numbers are far; above right if all are."""
    to_pixels = axis.figure.dpi / 72
    reach = 16 * to_pixels
    taken = [np.asarray(point) for point in axis.transData.transform(places)] if places else []
    sides = [7 * np.array([np.cos(angle), np.sin(angle)]) for angle in np.pi / 4 * np.array([1, 3, 7, 5, 0, 4, 2, 6])]
    for number, (place, point) in enumerate(zip(places, list(taken), strict=True), start=1):
        others = np.stack([other for other in taken if other is not point] or [np.full(2, np.inf)])

        def room(side, point=point, others=others) -> float:
            return min(reach, np.linalg.norm(others - (point + side * to_pixels), axis=1).min())

        side = max(sides, key=room)
        taken.append(point + side * to_pixels)
        text = axis.annotate(
            *(str(number), place, tuple(side)), textcoords="offset points", ha="center", va="center", fontsize=7
        )
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])


def plot_curves(runs: list[Run], titles: list[str]) -> Figure:
    """
    Training loss of all runs in one panel, then the mean entropy of each layer over the steps, a panel a run.

    Args:
        titles: of the runs; what differs in the seed alone has one color.

    Raises:
        UserError: if a run's log or its record of the entropy cannot be read.
    """
    columns = min(len(runs), 4)
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(3.1 * columns + 1, 3.6 + 2.9 * rows), layout="constrained", dpi=150)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.3] + [1] * rows)
    loss_axis = figure.add_subplot(grid[0, :])
    finite = []
    colors: dict[tuple, ColorType] = defaultdict(_colors().__next__)
    seeds: dict[int, int] = {}
    alike: dict[tuple, list[str]] = {}
    for run in runs:
        alike.setdefault((run.configuration, run.setting), []).append(str(run.seed))
    for run, title in zip(runs, titles, strict=True):
        color = colors[run.configuration, run.setting]
        style = ("-", "--", ":", "-.")[seeds.setdefault(run.seed, len(seeds)) % 4]
        logged = [entry for entry in read_json(run.folder / "log_history.json", list) if "loss" in entry]
        losses = [entry["loss"] for entry in logged]
        # one line of the legend for all seeds of a configuration
        of_all = alike.pop((run.configuration, run.setting), [])
        label = title.replace("\n", ", ")
        if of_all[1:]:
            label = label.replace(f"seed {run.seed}", f"seeds {', '.join(of_all)}")
        steps, label = [entry["step"] for entry in logged], textwrap.fill(label, 44) if of_all else "_"
        loss_axis.plot(steps, losses, color=color, linestyle=style, label=label, linewidth=1.2)
        finite += [loss for loss in losses if np.isfinite(loss)]
    if finite:
        # the first steps, from a uniform prediction, would squeeze the rest
        loss_axis.set_ylim(min(finite) - 0.2, min(finite) + 3)
    loss_axis.set(xlabel="step", ylabel="training loss (nats per token)", title="Training loss")
    loss_axis.legend(fontsize=8, ncols=2)
    loss_axis.grid(alpha=0.3)
    limit = max(np.max(run.attention_entropy["max_entropy"]) for run in runs)
    for index, (run, title) in enumerate(zip(runs, titles, strict=True)):
        axis = figure.add_subplot(grid[1 + index // columns, index % columns])
        path = run.folder / "attention_entropy.jsonl"
        if not (records := read_records(path)):
            raise UserError(f"{path} cannot be read: it has no record")
        by_layer = np.array([np.mean(record["entropy"], axis=1) for record in records])  # (records, layers)
        shades = matplotlib.colormaps["plasma"](np.linspace(0, 0.9, by_layer.shape[1]))
        for layer, color in enumerate(shades):
            axis.plot([r["step"] for r in records], by_layer[:, layer], color=color, label=f"layer {layer}", lw=1.2)
        axis.axhline(limit, color="grey", linestyle=":", linewidth=1)
        axis.set(ylim=(0, 1.05 * limit), xlabel="step", ylabel="entropy (nats)")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if index == 0:
            axis.legend(fontsize=7)
    return figure


def _by_configuration(runs: list[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        # a title that is wider than its panel leaves none
        found.setdefault(textwrap.fill(run.configuration, 40), []).append(run)
    return found


def plot_norm_removal(removed: Run, control: Run | None) -> Figure:
    """
    A run that lost its norms: its loss over steps with the removals marked, beside that of `control`, which kept them;
    the mean deviation before every norm over steps; and by layer and head, before and after, the entropies and the
    weights on the first token, the attention sinks.

    Raises:
        UserError: if what was measured on the way cannot be read.
    """
    records = read_records(removed.folder / "norm_removal.jsonl")
    entropies = read_records(removed.folder / "attention_entropy.jsonl")
    if not records or not entropies:
        raise UserError(f"{removed.folder}: its norm_removal.jsonl or attention_entropy.jsonl has no record")
    figure = Figure(figsize=(12, 7), layout="constrained", dpi=150)
    grid = figure.add_gridspec(2, 4)
    loss_axis, deviation_axis = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2:])
    for run, label in ((removed, "norms removed"), (control, "norms kept")):
        if run is not None:
            logged = [entry for entry in read_json(run.folder / "log_history.json", list) if "loss" in entry]
            loss_axis.plot([entry["step"] for entry in logged], [entry["loss"] for entry in logged], label=label)
    for start in records[-1]["starts"]:
        loss_axis.axvline(start, color="gray", alpha=0.25, linewidth=0.8)
    loss_axis.set(xlabel="step", ylabel="training loss (nats per token)", title="Loss; a line where a norm goes")
    loss_axis.legend(fontsize=8)
    steps = [record["step"] for record in records]
    names = list(records[-1]["deviation"])
    shades = matplotlib.colormaps["plasma"](np.linspace(0, 0.9, len(names)))
    for name, color in zip(names, shades, strict=True):
        style = "--" if name.endswith("input_layernorm") else "-"
        values = [record["deviation"][name][-1] for record in records]
        deviation_axis.plot(steps, values, color=color, linestyle=style, linewidth=1)
    title = "Deviation before every norm (dashed: attention; darker: earlier)"
    deviation_axis.set(xlabel="step", ylabel="mean deviation", title=title)
    deviation_axis.set_yscale("log")
    reachable = float(np.max(removed.attention_entropy["max_entropy"]))
    sinks = [np.array(record["sink_share"]) for record in (entropies[0], entropies[-1])]
    for column, what, maps, limit in (
        (0, "entropy (nats)", [np.array(record["entropy"]) for record in (entropies[0], entropies[-1])], reachable),
        (2, "weight on the first token", sinks, max(map(np.nanmax, sinks))),
    ):
        panels = [figure.add_subplot(grid[1, column + index]) for index in range(2)]
        for axis, weights, title in zip(panels, maps, ("before", "after"), strict=True):
            image = _draw_map(axis, weights, limit)
            axis.set(xlabel="head", ylabel="layer", title=f"Attention {title}")
        figure.colorbar(image, ax=panels, label=what, location="bottom", shrink=0.9)
    return figure


def plot_attribution(
    attribution: LogitAttribution | None = None,
    lens: LogitLens | None = None,
    patching: PatchingScores | None = None,
    tokens: list[str] | None = None,
    names: Callable[[int], str] = str,
    title: str = "",
) -> Figure:
    """
    What is given of the first text, a row each: the parts of the last position's logit by head and by layer; the
    likeliest token by layer and position; and the scores of patching by head, and by layer and position.

    Args:
        tokens: of the text, as they are written below the positions.
        names: token id -> what is written for it.
        title: of the picture.
    """
    rows = [given for given in (attribution, lens, patching) if given is not None]
    height = 3.2 if lens is None else 0.32 * len(lens.tokens) + 1.8
    heights = [height if given is lens else 3.2 for given in rows]
    width = max(10, 0.62 * len(tokens or ()) + 2)
    figure = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=10, parse_math=False)
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)
    for part, given in zip(parts[:, 0], rows, strict=True):
        if isinstance(given, LogitLens):
            _draw_lens(part, given, tokens, names)
        elif isinstance(given, PatchingScores):
            panels = part.subplots(1, 3)
            _draw_signed(panels[0], given.heads[:, :, 0].sum(-1), "heads, over all positions", "head")
            _draw_signed(panels[1], given.heads[:, :, 0].sum(1), "heads of a layer", tokens)
            _draw_signed(panels[2], given.mlps[:, 0], "feed-forward layers", tokens)
        else:
            by_head, by_layer = part.subplots(1, 2)
            _draw_signed(by_head, given.heads[:, :, 0, -1], "logit by head", "head")
            others = {"token": given.token, "position": given.position, "norm's bias": given.final_bias}
            layers = {f"MLP {index}": value for index, value in enumerate(given.mlps)}
            bars = {**layers, "biases": given.biases.sum(0), **others}
            values = [value[0, -1].item() for value in bars.values()]
            by_layer.bar(list(bars), values, color=["tab:red" if value > 0 else "tab:blue" for value in values])
            by_layer.axhline(0, color="black", linewidth=0.8)
            by_layer.tick_params("x", rotation=90)
            by_layer.set_title("logit by feed-forward layer, and the rest", fontsize=10)
    return figure


def _draw_signed(axis, values: torch.Tensor, title: str, columns: str | list[str] | None):
    """Layers x columns, red for what adds and blue for what takes away."""
    limit = values.abs().max().item() or 1.0
    image = axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("layer")
    axis.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    if isinstance(columns, list):
        axis.set_xticks(range(len(columns)))
        axis.set_xticklabels(columns, rotation=90, fontsize=8, parse_math=False)
    else:
        axis.set_xlabel(columns or "position")
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.figure.colorbar(image, ax=axis)


def _draw_lens(part, lens: LogitLens, tokens: list[str] | None, names: Callable[[int], str]):
    axis = part.subplots()
    probabilities = lens.probabilities[:, 0].numpy()
    image = axis.imshow(probabilities, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (row, column), probability in np.ndenumerate(probabilities):
        color = "black" if probability > 0.6 else "white"
        name = names(int(lens.tokens[row, 0, column]))
        axis.text(column, row, name, ha="center", va="center", fontsize=7, color=color, parse_math=False)
    axis.set_title("likeliest next token, read off the residual stream", fontsize=10)
    axis.set_yticks(range(len(probabilities)), ["embeddings", *(f"layer {n}" for n in range(len(probabilities) - 1))])
    if tokens is not None:
        axis.set_xticks(range(len(tokens)))
        axis.set_xticklabels(tokens, rotation=90, fontsize=8, parse_math=False)
    part.colorbar(image, ax=axis, label="probability")


def plot_evaluations(runs: list[Run]) -> Figure | None:
    """Perplexity over training tokens: a line a configuration (mean over seeds), and a band from least to largest."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for color, (name, seeds) in zip(_colors(), _by_configuration(runs).items(), strict=False):
        curves = [run.read_evaluations() for run in seeds]
        length = min(map(len, curves))
        if length == 0:
            continue
        tokens = [count / 1e6 for count, _ in curves[0][:length]]
        values = np.array([[value for _, value in curve[:length]] for curve in curves])  # (seeds, evaluations)
        axis.plot(tokens, np.exp(np.log(values).mean(0)), color=color, label=f"{name} ({len(seeds)})", linewidth=1.4)
        axis.fill_between(tokens, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    if not axis.lines:
        return None
    axis.set(xlabel="million training tokens", ylabel="perplexity")
    _make_logarithmic(axis)
    axis.legend(fontsize=8, title="configuration (seeds)", title_fontsize=8)
    return figure


def plot_gradient_norms(runs: list[Run]) -> Figure | None:
    """Gradient norm over steps: the median of every 10 steps, a line a run."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for color, (name, seeds) in zip(_colors(), _by_configuration(runs).items(), strict=False):
        for index, run in enumerate(seeds):
            records = read_records(run.folder / "gradient_norm.jsonl")
            norms = np.array([norm for record in records for norm in record["norms"]])
            medians = [np.median(norms[start : start + 10]) for start in range(0, len(norms), 10)]
            if medians:
                # the last one may be of fewer
                steps = np.minimum(10 * np.arange(1, len(medians) + 1), len(norms))
                axis.plot(steps, medians, color=color, linewidth=1, label=name if index == 0 else None)
    if not axis.lines:
        return None
    axis.set(xlabel="step", ylabel="gradient norm")
    _make_logarithmic(axis)
    axis.legend(fontsize=8)
    return figure


def plot_layers(
    runs: list[Run],
    name: str,
    read: Callable[[dict[str, Any]], Any],
    label: str,
    log: bool = False,
    limit: float | None = None,
) -> Figure | None:
    """
    A measured quantity over the steps: a panel a configuration, a line a layer (mean over seeds).

    Args:
        name: of the measurement file.
        read: takes the values of the layers out of a record.
        label: of the vertical axis, which all panels share.
        limit: a dotted line.
    """
    panels = {}
    for title, seeds in _by_configuration(runs).items():
        series = [read_records(run.folder / f"{name}.jsonl") for run in seeds]
        length = min(map(len, series))
        if length:
            values = np.array([[read(record) for record in records[:length]] for records in series])
            panels[title] = [record["step"] for record in series[0][:length]], values.mean(0)  # (records, layers)
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns + 1, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, (steps, values)) in zip(axes.flat, panels.items(), strict=False):
        colors = matplotlib.colormaps["plasma"](np.linspace(0, 0.9, values.shape[1]))
        for layer, color in enumerate(colors):
            axis.plot(steps, values[:, layer], color=color, label=f"layer {layer}", linewidth=1.2)
        if limit is not None:
            axis.axhline(limit, color="grey", linestyle=":", linewidth=1)
            axis.set_ylim(0, 1.05 * limit)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if log:
            _make_logarithmic(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    most = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[0]))
    figure.legend(*most.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _make_logarithmic(axis):
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(_PlainLogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axis.grid(alpha=0.3, which="both")


def _colors() -> Iterator[ColorType]:
    """18 colors, and then those again: no configuration is left out."""
    return itertools.cycle([*matplotlib.color_sequences["tab10"], *matplotlib.color_sequences["Dark2"]])
