"""The runs of one setting, side by side."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_lnfree import LNFreeForCausalLM

from ..encryption.counting import PROTOCOLS, count_operations, totals
from ..encryption.prices import NETWORKS
from ..files import read_records
from ..runs import Run, find_baseline
from .seeds import LEAST_SEEDS, format_interval, summarize


@dataclass
class Group:
    """
    The runs of one setting, and what they show.

    Args:
        runs: in the paper's order.
        differing: the fields, as `key=value`, in which this setting differs from others of its backbone, T and tokens.
        rows: a dictionary a run: its figures, and their change against the baseline of the same seed.
        summary: over seeds, as `summarize` returns it.
        notes: what the pairs show, and where learned slopes ended, in sentences.
    """

    runs: list[Run]
    differing: list[str]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    notes: list[str]

    @property
    def title(self) -> str:
        setting = self.runs[0].setting
        title = (
            f"{setting.backbone}, T={setting.block_size}, {setting.dataset}, {setting.train_tokens:,} training tokens"
        )
        return ", ".join([title, *self.differing])

    @property
    def run_titles(self) -> list[str]:
        """A title for each run by which it is told from all others."""
        return [run.describe(*self.differing) for run in self.runs]

    @property
    def seconds_title(self) -> str:
        return f"{self.title}; {PROTOCOLS[0].name}"

    def seconds(self) -> list[dict[str, Any]]:
        """
        Of every configuration its perplexity over seeds, and for each network the seconds of one private forward pass
        by the first cost model, and whether no other is both better and faster: `seconds` and `frontier`.
        """
        (protocol, *_) = PROTOCOLS
        costs = {row["configuration"]: row["private_cost"]["forward"]["estimates"][protocol.name] for row in self.rows}
        points = []
        for row in self.summary["configurations"]:
            cost = costs[row["configuration"]]
            seconds = {line.name: line.seconds(cost["rounds"], cost["bytes_per_party"]) for line in NETWORKS.values()}
            points.append({"configuration": row["configuration"], "perplexity": row["perplexity"], "seconds": seconds})
        for point in points:
            point["frontier"] = {
                name: math.isfinite(point["perplexity"])
                and not any(
                    other["perplexity"] <= point["perplexity"]
                    and other["seconds"][name] <= seconds
                    and (other["perplexity"], other["seconds"][name]) != (point["perplexity"], seconds)
                    for other in points
                )
                for name, seconds in point["seconds"].items()
            }
        return points

    def to_dict(self) -> dict[str, Any]:
        """As `comparison.json` holds it."""
        setting = self.runs[0].setting._asdict()
        del setting["fields"]
        return {
            **setting,
            "rows": self.rows,
            "summary": self.summary,
            "notes": self.notes,
            "title": self.title,
            "seconds": self.seconds(),
        }


def compare_group(runs: list[Run], differing: list[str]) -> Group:
    """The rows of one setting; changes are against SM+LN+G of the same seed."""
    perplexity: dict[tuple[str | None, int], float]
    perplexity = {(run.configuration, run.seed): run.perplexity for run in runs}
    summary, compared = summarize(runs), find_baseline(runs)
    # no seed changes them
    examples = {run.configuration: run for run in runs}
    costs = {name: _private_cost(run) for name, run in examples.items()}
    rows = []
    for run in runs:
        baseline, measured = perplexity.get((compared, run.seed)), run.attention_entropy
        stream = read_records(run.folder / "residual_stream.jsonl")
        rows.append(
            {
                "variant": run.variant,
                "configuration": run.configuration,
                "seed": run.seed,
                "perplexity": run.perplexity,
                "change_percent": None if baseline is None else 100 * (run.perplexity / baseline - 1),
                "eval_tokens": run.results["eval_tokens"],
                "parameters": run.results["parameters"],
                "entropy_by_layer": np.mean(measured["entropy"], axis=1).tolist(),
                "max_entropy": float(np.mean(measured["max_entropy"])),
                "head_distribution": measured["head_distribution"],
                "nan_count": sum(measured["nan_count"]),
                # on the way, and at the end: the largest of the layers
                "largest_stream": max((max(record["norm"]) for record in stream), default=None),
                "kurtosis": max(stream[-1]["kurtosis"]) if stream else None,
                "private_cost": costs[run.configuration],
            }
        )
    return Group(runs, differing, rows, summary, _notes(summary, runs))


def _notes(summary: dict[str, Any], runs: list[Run]) -> list[str]:
    """What the pairs show, and where learned slopes ended, in sentences."""
    notes = []
    for pair in summary["pairs"]:
        first, second, change = pair["first"], pair["second"], pair["change"]
        number = len(change["by_seed"])
        note = f"{first} against {second}, paired over {number} seed{'s' if number > 1 else ''}: "
        by_seed = ", ".join(f"seed {seed} {percent:+.2f} %" for seed, percent in change["by_seed"].items())
        note += f"{change['mean']:+.2f} % perplexity ({by_seed}; "
        if number < LEAST_SEEDS:
            note += f"fewer than {LEAST_SEEDS} seeds: no interval)."
        elif change["t_interval"] is None:
            note += "not all finite: no interval)."
        else:
            note += (
                f"95 % interval: {format_interval(change['t_interval'])} by t, "
                f"{format_interval(change['bootstrap_interval'])} by bootstrap, which is too narrow with few seeds)."
            )
        notes.append(note)
        for seed, lead in pair["ahead"].items():
            leader, behind = (first, second) if lead["first_leads"] else (second, first)
            notes.append(
                f"Seed {seed}: in the evaluations on the way {leader} is ahead of {behind} for good from "
                f"{lead['from_tokens']:,} tokens on."
            )
    for run in runs:
        if records := read_records(run.folder / "negative_slope.jsonl"):
            first, last = (
                ", ".join(f"{slope:.4f}" for slope in record["slopes"]) for record in (records[0], records[-1])
            )
            notes.append(f"{run.configuration}, seed {run.seed}: negative slopes from {first} to {last}.")
    return notes


def _private_cost(run: Run) -> dict[str, Any]:
    """Totals of one forward pass over one sequence, and those of SM+LN+G with these sizes."""
    counts = count_operations(LNFreeForCausalLM, run.config, length=run.setting.block_size)
    forward = totals(counts["forward"])
    return {"forward": forward, "baseline": counts["baseline"]["forward"] if "baseline" in counts else forward}
