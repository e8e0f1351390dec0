"""
How far ReLU is from GELU along the training: the change of the perplexity of the training batches, which are the same
ones for a seed, over the tokens seen.

    .venv/bin/python scripts/difference_over_tokens.py --docs docs

Reads the runs of the sweep stable from docs/data/stable.parquet, or another such file of `lnfree compare`.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.compare.archive import unpack
from training.compare.seeds import summarize, t_interval
from training.errors import UserError
from training.files import read_json
from training.pages import check_docs, format_head, format_row, origin_of, write_table
from training.runs import Run, find_runs


# shares of the training at which the table has a column
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
# of a pair by tokens: the mean over seeds in percent, and its 95 % interval by Student's t
Course = dict[int, list[float]]


def read_losses(run: Run) -> dict[int, float]:
    """The logged losses of the training batches in nats, by the tokens seen until then."""
    tokens_per_step = run.results["train_tokens"] // run.results["train_steps"]
    log = read_json(run.folder / "log_history.json", list)
    return {entry["step"] * tokens_per_step: entry["loss"] for entry in log if "loss" in entry}


def follow(runs: list[Run]) -> dict[str, Course]:
    """For each configuration with ReLU that has one with GELU beside it, in three seeds at least, its course."""
    losses: dict[str, dict[int, dict[int, float]]] = {}
    for run in runs:
        losses.setdefault(run.configuration, {})[run.seed] = read_losses(run)
    courses = {}
    for pair in summarize(runs)["pairs"]:
        first, second = pair["first"], pair["second"]
        if second != first.replace("+R", "+G", 1) or pair["change"]["t_interval"] is None:
            continue
        seeds = sorted(losses[first].keys() & losses[second].keys())
        tokens = set.intersection(*(set(losses[name][seed]) for name in (first, second) for seed in seeds))
        course = {}
        for count in sorted(tokens):
            changes = [losses[first][seed][count] - losses[second][seed][count] for seed in seeds]
            course[count] = [float(100 * np.expm1(nats)) for nats in (np.mean(changes), *(t_interval(changes) or ()))]
        courses[f"{first} against {second}"] = course
    return courses


def to_rows(courses: dict[str, Course]) -> list[dict[str, Any]]:
    """A row a pair, with the tokens as columns."""
    tokens = sorted(set.intersection(*map(set, courses.values())))
    shown = [min(tokens, key=lambda count: abs(count - share * tokens[-1])) for share in SHARES]
    return [{"pair": pair, **{f"{count:,}": course[count] for count in shown}} for pair, course in courses.items()]


def plot(courses: dict[str, Course]) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    for pair, course in courses.items():
        mean, low, high = zip(*course.values(), strict=True)
        [line] = panel.plot(list(course), mean, label=pair)
        panel.fill_between(list(course), low, high, color=line.get_color(), alpha=0.15, lw=0)
    panel.axhline(0, color="black", lw=0.8)
    panel.set(xlabel="training tokens", ylabel="change of the perplexity of the batches (%)\nbelow 0: ReLU is ahead")
    panel.xaxis.set_major_formatter(lambda count, place: f"{count:,.0f}")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    return figure


def main():
    """Prints the table, and writes it with the picture into the docs where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("docs/data/stable.parquet"), metavar="FILE")
    parser.add_argument("--docs", metavar="DIR", help="the checkout's docs, where table and picture are written")
    arguments = parser.parse_args()
    try:
        if arguments.docs is not None:
            check_docs(arguments.docs)
        with tempfile.TemporaryDirectory() as folder:
            unpack(arguments.runs, Path(folder))
            runs, _ = find_runs(folder)
            courses = follow(runs)
        if not courses:
            raise UserError(f"{arguments.runs} has no three seeds of a variant with ReLU and of that with GELU")
    except UserError as error:
        sys.exit(f"difference_over_tokens: {error}")
    rows = to_rows(courses)
    formats = {head: "{:+.1f} ({:+.1f} to {:+.1f})" for head in rows[0] if head != "pair"}
    print(*format_head(rows[0]), *(format_row(row, formats) for row in rows), sep="\n")
    if arguments.docs is not None:
        command = "python scripts/difference_over_tokens.py"
        write_table(arguments.docs, "difference-over-tokens", rows, command, formats, **origin_of(runs[0].results))
        plot(courses).savefig(Path(arguments.docs) / "difference_over_tokens.png", dpi=110)


if __name__ == "__main__":
    main()
