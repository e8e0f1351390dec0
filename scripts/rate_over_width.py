"""
Where the best rate of the layers' matrices lies at other widths and depths, from the runs of the sweep of this name:

    lnfree sweep rate_over_width && .venv/bin/python scripts/rate_over_width.py --docs docs

Draws the loss over the rate, and over the rate times width / 128: under the rule 1 / width the second has the lowest
points of all curves at one place.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.errors import UserError
from training.pages import check_docs, format_head, format_row, machine, write_table
from training.runs import Run, find_runs


BASE_WIDTH = 128
Curves = dict[tuple[int, int], dict[float, float]]


def read_curves(runs: list[Run]) -> Curves:
    """Of each width and depth the evaluation loss in nats at each rate, by rising rate."""
    curves: Curves = {}
    for run in runs:
        size = run.config.hidden_size, run.config.num_hidden_layers
        curves.setdefault(size, {})[run.recipe["layer_learning_rate"]] = run.results["eval_loss"]
    return {size: dict(sorted(curves[size].items())) for size in sorted(curves)}


def plot(curves: Curves) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (width, layers), losses in curves.items():
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "linestyle": "-" if layers == 6 else "--"}
        style |= {"color": f"C{[size[0] for size in dict.fromkeys((w, 0) for w, _ in curves)].index(width)}"}
        for panel, factor in zip(panels, (1.0, width / BASE_WIDTH), strict=True):
            rates = [rate * factor for rate in losses]
            panel.plot(rates, list(losses.values()), label=f"width {width}, {layers} layers", **style)
    for panel, head in zip(panels, ("rate", f"rate x width / {BASE_WIDTH}"), strict=True):
        panel.set(xscale="log", xlabel=head)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats)")
    panels[0].legend(fontsize=8)
    return figure


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
        curves = read_curves(runs)
    except UserError as error:
        sys.exit(f"rate_over_width: {error}")
    scaled = sorted({rate * width / BASE_WIDTH for (width, _), losses in curves.items() for rate in losses})
    rows: list[dict[str, Any]] = [
        {
            "width": str(width),
            "layers": str(layers),
            **{f"{rate:g} x {BASE_WIDTH} / width": losses.get(rate * BASE_WIDTH / width) for rate in scaled},
        }
        for (width, layers), losses in curves.items()
    ]
    print(*format_head(rows[0]), *(format_row(row) for row in rows), sep="\n")
    print(*(f"{name}: {reason or 'not finished'}" for name, reason in unstable.items()), sep="\n")
    if arguments.docs is not None:
        first = runs[0].results
        origin = {"versions": first["versions"], "commit": first["commit"], "machine": machine(first["hardware"])}
        write_table(arguments.docs, "rate-over-width", rows, "python scripts/rate_over_width.py", **origin)
        plot(curves).savefig(Path(arguments.docs) / "rate_over_width.png", dpi=110)


if __name__ == "__main__":
    main()
