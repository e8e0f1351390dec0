"""A comparison as one HTML file that needs no network: tables, and plots that are part of the file."""

import base64
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .callbacks import read_records
from .seeds import configuration, evaluations


TEMPLATE = Path(__file__).parent / "report.html.jinja"


def build_html(
    groups: list[dict[str, Any]],
    runs_of_groups: list[list[dict[str, Any]]],
    unfinished: dict[str, str],
    plot_heat_maps: Callable,
    ranges: list[str],
) -> str:
    """The page: for every setting its tables, and its plots as PNG pictures inside the page."""
    pages = []
    for group, runs in zip(groups, runs_of_groups, strict=True):
        figures = [
            ("Perplexity on the way", "evaluated on a part of the evaluation data", plot_evaluations(runs)),
            ("Gradient norm", "before clipping; the median of every 10 steps", plot_gradient_norms(runs)),
            (
                "Attention entropy by layer",
                "mean over heads on the probe batch; dotted: the largest that a causal head can have",
                plot_layers(
                    runs,
                    "attention_entropy",
                    lambda record: np.mean(record["entropy"], axis=1),
                    "entropy (nats)",
                    limit=float(np.max(runs[0]["attention_entropy"]["max_entropy"])),
                ),
            ),
            (
                "Learned negative slopes",
                "by layer, or the one that all layers share",
                plot_layers(runs, "negative_slope", lambda record: record["slopes"], "slope"),
            ),
            (
                "Norm of the residual stream",
                "behind every layer, mean over tokens",
                plot_layers(runs, "residual_stream", lambda record: record["norm"], "L2 norm", log=True),
            ),
            (
                "Kurtosis of the activations",
                "of the residual stream behind every layer (arXiv 2405.19279): 1 without outlier features",
                plot_layers(runs, "residual_stream", lambda record: record["kurtosis"], "kurtosis", log=True),
            ),
            (
                "Share of zero activations",
                "in the ReLU feed-forward layer of every block",
                plot_layers(runs, "zero_activations", lambda record: record["share"], "share"),
            ),
            (
                "Attention entropy by layer and head",
                "over the whole evaluation part, every run",
                _heat_maps(runs, plot_heat_maps),
            ),
        ]
        pages.append({**group, "figures": [figure for figure in figures if figure[2] is not None]})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(groups=pages, unfinished=unfinished, ranges=ranges)


def _heat_maps(runs: list[dict[str, Any]], plot_heat_maps: Callable) -> str:
    picture = io.BytesIO()
    titles = [f"{configuration(run)}\nseed {run['seed']}" for run in runs]
    plot_heat_maps([run["attention_entropy"] for run in runs], titles, picture)
    return _data_uri(picture)


def _by_configuration(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(configuration(run), []).append(run)
    return found


def plot_evaluations(runs: list[dict[str, Any]]) -> str | None:
    """Perplexity over training tokens: a line a configuration (mean over seeds), and a band from least to largest."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for colour, (name, seeds) in zip(_colours(), _by_configuration(runs).items(), strict=False):
        curves = [evaluations(run) for run in seeds]
        length = min(map(len, curves))
        if length == 0:
            continue
        tokens = [count / 1e6 for count, _ in curves[0][:length]]
        values = np.array([[value for _, value in curve[:length]] for curve in curves])  # (seeds, evaluations)
        axis.plot(tokens, np.exp(np.log(values).mean(0)), color=colour, label=f"{name} ({len(seeds)})", linewidth=1.4)
        axis.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    if not axis.lines:
        return None
    axis.set(xlabel="million training tokens", ylabel="perplexity")
    _make_logarithmic(axis)
    axis.legend(fontsize=8, title="configuration (seeds)", title_fontsize=8)
    return _finish_figure(figure)


def plot_gradient_norms(runs: list[dict[str, Any]]) -> str | None:
    """Gradient norm over steps: the median of every 10 steps, a line a run."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for colour, (name, seeds) in zip(_colours(), _by_configuration(runs).items(), strict=False):
        for index, run in enumerate(seeds):
            records = read_records(run["folder"] / "gradient_norm.jsonl")
            norms = np.array([norm for record in records for norm in record["norms"]])
            medians = [np.median(norms[start : start + 10]) for start in range(0, len(norms), 10)]
            if medians:
                # the last one may be of fewer
                steps = np.minimum(10 * np.arange(1, len(medians) + 1), len(norms))
                axis.plot(steps, medians, color=colour, linewidth=1, label=name if index == 0 else None)
    if not axis.lines:
        return None
    axis.set(xlabel="step", ylabel="gradient norm")
    _make_logarithmic(axis)
    axis.legend(fontsize=8)
    return _finish_figure(figure)


def plot_layers(
    runs: list[dict[str, Any]],
    name: str,
    read: Callable[[dict[str, Any]], Any],
    label: str,
    log: bool = False,
    limit: float | None = None,
) -> str | None:
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
        series = [read_records(run["folder"] / f"{name}.jsonl") for run in seeds]
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
        colours = matplotlib.colormaps["plasma"](np.linspace(0, 0.9, values.shape[1]))
        for layer, colour in enumerate(colours):
            axis.plot(steps, values[:, layer], color=colour, label=f"layer {layer}", linewidth=1.2)
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
    return _finish_figure(figure)


def _make_logarithmic(axis):
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axis.grid(alpha=0.3, which="both")


def _colours() -> Iterator[tuple[float, float, float]]:
    """18 colours, and then those again: no configuration is left out."""
    return itertools.cycle([*matplotlib.colormaps["tab10"].colors, *matplotlib.colormaps["Dark2"].colors])


def _finish_figure(figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return _data_uri(picture)


def _data_uri(picture: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
