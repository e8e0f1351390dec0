"""What models were measured to be, side by side: as a table, and as pictures."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from modeling_lnfree.measurement import QUANTITIES

from .plots import plot_heat_maps, plot_steps
from .tables import Block, Heading, Table


def name_models(results: list[dict[str, Any]]) -> list[str]:
    """Of each the last part of its name, or all of it where others have the same; and its revision."""
    names = [Path(result["model"]).name for result in results]
    counts = Counter(zip(names, (result["revision"] for result in results), strict=True))
    full = [
        result["model"] if counts[name, result["revision"]] > 1 else name
        for result, name in zip(results, names, strict=True)
    ]
    return [
        name if result["revision"] is None else f"{name}@{result['revision']}"
        for result, name in zip(results, full, strict=True)
    ]


def tabulate_measured(results: list[dict[str, Any]]) -> Table:
    """A row a quantity, a column a model; behind the first, each number's difference to the first model's."""
    rows = []
    found = [list_figures(result) for result in results]
    for label, digits in {label: digits for figures in found for label, (_, digits) in figures.items()}.items():
        values = [figures[label][0] if label in figures else None for figures in found]
        rows.append(
            [label, *(_cell(value, values[0] if place else None, digits) for place, value in enumerate(values))]
        )
    return Table(["", *name_models(results)], rows)


def _cell(value: float | None, first: float | None, digits: int) -> str:
    if value is None:
        return ""
    # NaN is what one of two does not have
    difference = math.nan if first is None else value - first
    return f"{value:,.{digits}f}" + ("" if math.isnan(difference) else f" ({difference:+,.{digits}f})")


def list_figures(result: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """The numbers of a model, each with its digits, by their labels in a table."""
    figures = {quantity.label: (result["summary"][quantity.name], quantity.digits) for quantity in QUANTITIES}
    for way, likelihood in result.get("int8", {}).items():
        figures[f"perplexity, int8 {way}"] = (likelihood["perplexity"], 3)
    for task, metrics in result.get("tasks", {}).items():
        figures |= {f"{task}, {metric}": (value, 4) for metric, value in metrics.items()}
    return {"parameters": (result["parameters"], 0), **figures}


def describe(result: dict[str, Any]) -> str:
    """What was read of how many texts, and the entropies of one model, in lines."""
    entropy = result["attention_entropy"]
    shares = ", ".join(f"{100 * share:.0f} %" for share in entropy["head_distribution"])
    return "\n".join(
        [
            f"{result['model']} on {result['num_texts']:,} texts of {result['dataset']}: "
            f"perplexity {result['perplexity']:.3f} over {result['predicted_tokens']:,} tokens, "
            f"{result['bits_per_byte']:.4f} bits per byte",
            f"attention entropy: {entropy['mean_entropy']:.3f} nats; by layer "
            + ", ".join(f"{value:.2f}" for value in entropy["layer_entropy"])
            + f"; heads in the quarters of their largest entropy: {shares}",
            *notes(result),
        ]
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What was not read or not measured, a sentence each."""
    total = f"{result['num_texts'] + result['skipped_texts']:,} texts are"
    found = []
    if result["interrupted"]:
        found.append(f"interrupted: what was read until then, {result['num_tokens']:,} tokens, is measured")
    if result["truncated_texts"]:
        cut = f"longer than max_length={result['max_length']} tokens: the rest of them is left out"
        found.append(f"{result['truncated_texts']:,} of {total} {cut}; --stride and --rolling read on")
    if result["skipped_texts"]:
        found.append(f"{result['skipped_texts']:,} of {total} without a token: left out")
    return [*found, *(f"not measured: {reason}" for reason in result["unmeasured"])]


def report(results: list[dict[str, Any]]) -> list[Block]:
    """A page: the setting, the table, and what was left out."""
    first = results[0]
    what = "all texts as one" if first["concatenate"] else f"{first['num_texts']:,} texts"
    setting = f"windows of {first['max_length']:,} tokens"
    if first["stride"] is not None:
        setting += f", each {first['stride']:,} behind the last"
    if first["rolling"]:
        setting += ", rolling"
    blocks: list[Block] = [
        Heading(1, "Measured"),
        f"{what.capitalize()} of {first['dataset']}; {setting}.",
        tabulate_measured(results),
    ]
    for name, result in zip(name_models(results), results, strict=True):
        if left := notes(result):
            blocks.append(f"{name}: {'; '.join(left)}")
    return blocks


def find_steps(results: list[dict[str, Any]]) -> list[int]:
    """The training steps in the names of revisions, as of `step-1000`; their places, where not all have one."""
    found = [re.search(r"(\d+)\D*$", str(result["revision"])) for result in results]
    steps = [int(match[1]) for match in found if match is not None]
    return steps if len(set(steps)) == len(results) else list(range(len(results)))


def draw(results: list[dict[str, Any]]) -> Figure:
    """
    The entropies by layer and head, side by side on one scale; of revisions of one model a film strip, and below it
    every quantity over their steps.
    """
    entropies = [result["attention_entropy"] for result in results]
    names = name_models(results)
    if results[0]["revision"] is None or len(results) == 1:
        dataset = f"{Path(results[0]['dataset']).name}, {results[0]['num_tokens']:,} tokens"
        return plot_heat_maps(entropies, [f"{name}\n{dataset}" if len(names) == 1 else name for name in names])
    series: dict[str, list[float]] = {}
    for label in list_figures(results[0]):
        values = [list_figures(result).get(label, (float("nan"), 0))[0] for result in results]
        # what does not change is no curve
        if len(set(values)) > 1:
            series[label] = values
    return plot_steps(entropies, [str(result["revision"]) for result in results], find_steps(results), series)
