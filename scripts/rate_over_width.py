"""
Where the best rate of the layers' matrices lies at other widths and depths, from the runs of the sweep of this name:

    lnfree sweep rate_over_width && .venv/bin/python scripts/rate_over_width.py --docs docs

Draws the loss over the rate, and over the rate times width / 128: under the rule 1 / width the second has the lowest
points of all curves at one place.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.errors import UserError
from training.pages import check_docs, format_head, format_row, origin_of, write_table
from training.recipe import load_recipe
from training.runs import Run, find_runs


BASE_WIDTH = 128
Curves = dict[tuple[int, int], dict[float, float]]


def read_curves(runs: list[Run], unstable: list[Path]) -> Curves:
    """Of each width and depth the evaluation loss in nats at each rate, by rising rate; NaN of an unstable run."""
    curves: Curves = {}
    found = [(run.recipe, run.results["eval_loss"]) for run in runs]
    found += [(load_recipe(folder / "recipe.yaml").to_dict(), math.nan) for folder in unstable]
    for recipe, loss in found:
        size = recipe["hidden_size"], recipe["num_hidden_layers"]
        curves.setdefault(size, {})[recipe["layer_learning_rate"]] = loss
    return {size: dict(sorted(curves[size].items())) for size in sorted(curves)}


def plot(curves: Curves) -> Figure:
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = {width: f"C{index}" for index, width in enumerate(dict.fromkeys(width for width, _ in curves))}
    top = max(loss for losses in curves.values() for loss in losses.values() if not math.isnan(loss)) + 0.1
    for (width, layers), losses in curves.items():
        line = "-" if layers == min(depth for _, depth in curves) else "--"
        for panel, factor in zip(panels, (1.0, width / BASE_WIDTH), strict=True):
            label = f"width {width}, {layers} layers"
            rates = [rate * factor for rate in losses]
            panel.plot(rates, list(losses.values()), line, marker="o", ms=4, color=colors[width], label=label)
            fallen = [rate * factor for rate, loss in losses.items() if math.isnan(loss)]
            panel.plot(fallen, [top] * len(fallen), "x", color=colors[width])
    for panel, head in zip(panels, ("rate", f"rate x width / {BASE_WIDTH}"), strict=True):
        panel.set(xscale="log", xlabel=head)
        ticks = sorted({rate for line in panel.get_lines() for rate in line.get_xdata()})
        panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks], fontsize=8)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats); x: unstable")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _cell(loss: float | None) -> float | str | None:
    return "unstable" if loss is not None and math.isnan(loss) else loss


def main():
    """Prints the losses, and writes them with the picture into the docs where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/rate_over_width"), metavar="RUNS_DIR")
    parser.add_argument("--docs", metavar="DIR", help="the checkout's docs, whose table rate-over-width is written")
    arguments = parser.parse_args()
    try:
        if arguments.docs is not None:
            check_docs(arguments.docs)
        runs, unstable = find_runs(arguments.runs)
        curves = read_curves(runs, [arguments.runs / name for name, reason in unstable.items() if reason])
    except UserError as error:
        sys.exit(f"rate_over_width: {error}")
    scaled = sorted({rate * width / BASE_WIDTH for (width, _), losses in curves.items() for rate in losses})
    rows: list[dict[str, Any]] = [
        {
            "width": str(width),
            "layers": str(layers),
            **{f"{rate:g} x {BASE_WIDTH} / width": _cell(losses.get(rate * BASE_WIDTH / width)) for rate in scaled},
        }
        for (width, layers), losses in curves.items()
    ]
    print(*format_head(rows[0]), *(format_row(row) for row in rows), sep="\n")
    print(*(f"{name}: not finished" for name, reason in unstable.items() if not reason), sep="\n")
    if arguments.docs is not None:
        command = "python scripts/rate_over_width.py"
        write_table(arguments.docs, "rate-over-width", rows, command, **origin_of(runs[0].results))
        plot(curves).savefig(Path(arguments.docs) / "rate_over_width.png", dpi=110)


if __name__ == "__main__":
    main()
