"""A comparison as one HTML file that needs no network: tables, and plots that are part of the file."""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ..plots import plot_evaluations, plot_gradient_norms, plot_heat_maps, plot_layers, plot_seconds
from .group import Group
from .report import describe_group


TEMPLATE = Path(__file__).parent / "report.html.jinja"


def build_html(groups: list[Group], unfinished: dict[str, str]) -> str:
    """The page: for every setting its tables, and its plots as PNG pictures inside the page."""
    pages = []
    for group in groups:
        runs = group.runs
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
                    limit=float(np.max(runs[0].attention_entropy["max_entropy"])),
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
                    [run.attention_entropy for run in runs],
                    [f"{run.configuration}\nseed {run.seed}" for run in runs],
                ),
            ),
            (
                "Perplexity against seconds under encryption",
                "of one private forward pass; the line joins what nothing else is both better and faster than",
                plot_seconds([group.seconds()], [group.seconds_title]),
            ),
        ]
        drawn = [(title, caption, _data_uri(figure)) for title, caption, figure in figures if figure is not None]
        pages.append({"title": group.title, "blocks": describe_group(group), "figures": drawn})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(groups=pages, unfinished=unfinished)


def _data_uri(figure: Figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
