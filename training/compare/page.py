"""A comparison as one HTML file that needs no network: tables, and plots that are part of the file."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ..encryption.counting import comparison
from ..plots import plot_evaluations, plot_gradient_norms, plot_heat_maps, plot_layers
from ..runs import configuration


TEMPLATE = Path(__file__).parent / "report.html.jinja"
RANGES = ["[0, max/4)", "[max/4, max/2)", "[max/2, 3max/4)", "[3max/4, max]"]


def build_html(
    groups: list[dict[str, Any]], runs_of_groups: list[list[dict[str, Any]]], unfinished: dict[str, str]
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
                plot_heat_maps(
                    [run["attention_entropy"] for run in runs],
                    [f"{configuration(run)}\nseed {run['seed']}" for run in runs],
                ),
            ),
        ]
        drawn = [(title, caption, _data_uri(figure)) for title, caption, figure in figures if figure is not None]
        cost = _blocks(cost_lines(group["rows"]))
        pages.append({**group, "figures": drawn, "cost": cost})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(groups=pages, unfinished=unfinished, ranges=RANGES)


def cost_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: what the variants among the rows of a setting cost under encryption."""
    costs = {row["variant"]: row["private_cost"] for row in rows}  # no seed changes them
    named = [(variant, cost["forward"]) for variant, cost in costs.items()]
    return comparison(named, rows[0]["private_cost"]["baseline"])


def _blocks(lines: list[str]) -> list[str | list[list[str]]]:
    """Tables of Markdown as rows of cells, without the line below the heads, and paragraphs as they are."""
    blocks = []
    for block in "\n".join(lines).split("\n\n"):
        rows = [line.strip("| ").split(" | ") for line in block.split("\n")]
        blocks.append([rows[0], *rows[2:]] if block.startswith("|") else block)
    return blocks


def _data_uri(figure: Figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
