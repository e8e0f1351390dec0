"""Finished runs -> the paper's table (Markdown, JSON, HTML), heat maps of attention entropy, curves over training."""

import functools
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import BASELINE, variant_order

from ..encryption.counting import count_operations
from ..errors import UserError
from ..files import read_json, read_records, write_atomically
from ..pages import check_docs, machine, write_table
from ..plots import plot_curves, plot_heat_maps, run_title
from ..runs import RESULTS, baseline_of, configuration, read_results, setting_of, why_unstable
from .page import RANGES, build_html, cost_lines
from .seeds import LEAST_SEEDS, summarise


def compare(runs_dir: str | Path, output: str | Path | None = None, docs: str | Path | None = None) -> Path:
    """
    Compares the finished runs below a folder; writes `report.md`, `report.html` (one file, for a browser),
    `comparison.json`, `heat_maps.png`, `curves.png`.

    Args:
        runs_dir: folder whose subfolders are runs.
        output: folder of the report; `runs_dir/report` by default.
        docs: folder `docs` of a checkout, in whose pages the tables that have the name of `runs_dir` are replaced.

    Returns:
        The path of `report.md`.

    Raises:
        UserError: if there is no such folder or no finished run, or a file of one cannot be read.
    """
    runs_dir = Path(runs_dir)
    if docs is not None:
        check_docs(docs)
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not a folder")
    folders = sorted(path.parent for path in runs_dir.glob("*/recipe.yaml"))
    runs = [{"folder": folder, **read_results(folder)} for folder in folders if (folder / RESULTS).is_file()]
    unfinished = {folder.name: why_unstable(folder) for folder in folders if not (folder / RESULTS).is_file()}
    if not runs:
        raise UserError(f"no finished run in {runs_dir}: none of its subfolders has a {RESULTS}")
    runs.sort(key=lambda run: (setting_of(run), variant_order(run["variant"]), configuration(run), run["seed"]))
    runs_of_groups = [list(group) for _, group in groupby(runs, key=setting_of)]
    groups = [_compare_group(group) for group in runs_of_groups]
    for group, runs_of_group, differing in zip(groups, runs_of_groups, _differing(runs_of_groups), strict=True):
        backbone, block_size, dataset, tokens, _ = setting_of(runs_of_group[0])
        title = f"{backbone}, T={block_size}, {dataset}, {tokens:,} training tokens"
        group["title"] = ", ".join([title, *differing])
        for run in runs_of_group:
            run["differing"] = differing

    output = Path(output) if output is not None else runs_dir / "report"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}") from None
    measurements, titles = [run["attention_entropy"] for run in runs], [run_title(run) for run in runs]
    plot_heat_maps(measurements, titles).savefig(output / "heat_maps.png")
    plot_curves(runs).savefig(output / "curves.png")
    write_atomically(output / "comparison.json", json.dumps({"groups": groups, "unfinished": unfinished}, indent=1))
    report = _markdown(groups, unfinished)
    write_atomically(output / "report.md", report)
    page = build_html(groups, runs_of_groups, unfinished)
    write_atomically(output / "report.html", page)
    if docs is not None:
        origin = {
            "machine": machine(runs[0]["hardware"]),
            "versions": runs[0]["versions"],
            "commit": runs[0]["commit"],
        }
        for name, (rows, formats) in _tables(groups).items():
            name = f"{runs_dir.resolve().name}-{name}"
            write_table(docs, name, rows, f"lnfree compare {runs_dir}", formats, **origin)
    print(report)
    print(f"report: {output / 'report.md'}, and for a browser {output / 'report.html'}")
    return output / "report.md"


def _differing(runs_of_groups: list[list[dict[str, Any]]]) -> list[list[str]]:
    """Of each setting the fields, as `key=value`, in which settings of the same backbone, T and tokens differ."""
    settings = [setting_of(runs[0]) for runs in runs_of_groups]
    found = []
    for *named, decisive in settings:
        alike = [json.loads(other[-1]) for other in settings if list(other[:-1]) == named]
        ours = json.loads(decisive)
        differing = [key for key in ours if any(other.get(key) != ours[key] for other in alike)]
        found.append([f"{key}={ours[key]}" for key in differing])
    return found


def _compare_group(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of one setting; changes are against SM+LN+G of the same seed."""
    perplexity = {(configuration(run), run["seed"]): run["perplexity"] for run in runs}
    summary, compared = summarise(runs), baseline_of(runs)
    rows = []
    for run in runs:
        baseline = perplexity.get((compared, run["seed"]))
        entropy = np.array(run["attention_entropy"]["entropy"])  # (layers, heads)
        config = json.dumps(read_json(run["folder"] / "model" / "config.json"))
        rows.append(
            {
                "variant": run["variant"],
                "configuration": configuration(run),
                "seed": run["seed"],
                "perplexity": run["perplexity"],
                "change_percent": None if baseline is None else 100 * (run["perplexity"] / baseline - 1),
                "eval_tokens": run["eval_tokens"],
                "parameters": run["parameters"],
                "entropy_by_layer": entropy.mean(1).tolist(),
                "max_entropy": float(np.mean(run["attention_entropy"]["max_entropy"])),
                "head_distribution": run["attention_entropy"]["head_distribution"],
                "nan_count": sum(run["attention_entropy"]["nan_count"]),
                "private_cost": _private_cost(config, run["block_size"]),
            }
        )
    first = runs[0]
    setting = {key: first[key] for key in ("backbone", "block_size", "dataset", "train_tokens")}
    return {**setting, "rows": rows, "summary": summary, "notes": _notes(summary, runs)}


def _notes(summary: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
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
                f"95 % interval: {_percent(change['t_interval'])} by t, {_percent(change['bootstrap_interval'])} by "
                "bootstrap, which is too narrow with few seeds)."
            )
        notes.append(note)
        for seed, lead in pair["ahead"].items():
            leader, behind = (first, second) if lead["first_leads"] else (second, first)
            notes.append(
                f"Seed {seed}: in the evaluations on the way {leader} is ahead of {behind} for good from "
                f"{lead['from_tokens']:,} tokens on."
            )
    for run in runs:
        if records := read_records(run["folder"] / "negative_slope.jsonl"):
            first, last = (
                ", ".join(f"{slope:.4f}" for slope in record["slopes"]) for record in (records[0], records[-1])
            )
            notes.append(f"{configuration(run)}, seed {run['seed']}: negative slopes from {first} to {last}.")
    return notes


def _percent(interval: list[float]) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f} %"


@functools.cache
def _private_cost(config: str, length: int) -> dict[str, Any]:
    """Totals of one forward pass over one sequence, from a config.json, and those of SM+LN+G with these sizes."""
    counts = count_operations(LNFreeForCausalLM, LNFreeConfig.from_dict(json.loads(config)), length=length)
    forward = {name: counts["forward"][name] for name in ("total", "estimate")}
    return {"forward": forward, "baseline": counts["baseline"]["forward"] if "baseline" in counts else forward}


def _markdown(groups: list[dict[str, Any]], unfinished: dict[str, str]) -> str:
    lines = ["# LNFree: comparison of the variants", ""]
    for group in groups:
        rows = group["rows"]
        lines += [f"## {group['title']}", ""]
        configurations = group["summary"]["configurations"]
        if any(len(row["seeds"]) > 1 for row in configurations):
            lines += [
                "| configuration | seeds | perplexity | 95 % interval (t) | change | 95 % interval (t) | bootstrap |",
                "|---" * 7 + "|",
                *map(_summary_row, configurations),
                "",
                "Means and intervals over seeds are those of the loss; a perplexity is the exponential of it.",
                "",
            ]
        lines += [
            "| configuration | seed | perplexity | change | evaluation tokens | parameters | NaNs | "
            + " | ".join(f"heads in {name}" for name in RANGES)
            + " |",
            "|---" * (7 + len(RANGES)) + "|",
        ]
        for row in rows:
            change = "" if row["change_percent"] is None else f"{row['change_percent']:+.2f} %"
            shares = " | ".join(f"{100 * share:.0f} %" for share in row["head_distribution"])
            lines.append(
                f"| {row['configuration']} | {row['seed']} | {row['perplexity']:.3f} | {change} | "
                f"{row['eval_tokens']:,} | {row['parameters']:,} | {row['nan_count']} | {shares} |"
            )
        lines += [line for note in group["notes"] for line in ("", note)]
        layers = max(len(row["entropy_by_layer"]) for row in rows)
        lines += [
            "",
            f"Mean attention entropy by layer over the evaluation part, in nats; the largest of a causal head at "
            f"T={group['block_size']} is {rows[0]['max_entropy']:.3f}:",
            "",
            "| configuration | seed | " + " | ".join(f"layer {layer}" for layer in range(layers)) + " |",
            "|---" * (2 + layers) + "|",
        ]
        for row in rows:
            values = " | ".join(f"{value:.2f}" for value in row["entropy_by_layer"])
            lines.append(f"| {row['configuration']} | {row['seed']} | {values} |")
        lines += [
            "",
            f"Under encryption: operations on private data in one forward pass over {group['block_size']} tokens, "
            f"counted by running it, beside {BASELINE} of the same sizes:",
            "",
            *cost_lines(rows),
            "",
        ]
    lines += ["![attention entropy by layer and head](heat_maps.png)", "", "![curves over training](curves.png)", ""]
    if unfinished:
        told = ", ".join(f"{name} {why}".strip() for name, why in unfinished.items())
        lines += [f"Not finished, and left out: {told}.", ""]
    return "\n".join(lines)


def _tables(groups: list[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], dict[str, str]]]:
    """Rows and formats of the tables for the docs: what every configuration reaches, pairs, entropies by layer."""
    results, pairs, entropies = [], [], []
    for group in groups:
        setting = {"setting": group["title"]} if len(groups) > 1 else {}
        for row in group["summary"]["configurations"]:
            named = {**setting, "configuration": row["configuration"]}
            reached = [each["perplexity"] for each in group["rows"] if each["configuration"] == row["configuration"]]
            seeds = ", ".join(map(str, row["seeds"]))
            results.append({**named, "seeds": seeds, "perplexity": reached, **_change(row["change"])})
            layers = enumerate(row["entropy_by_layer"])
            entropies.append({**named, **{f"layer {layer}": entropy for layer, entropy in layers}})
        for pair in group["summary"]["pairs"]:
            named = {"first": pair["first"], "against": pair["second"], "pairs": len(pair["change"]["by_seed"])}
            pairs.append({**setting, **named, **_change(pair["change"])})
    formats = {"perplexity": "{:.3f}", "change": "{:+.2f} %", "95 % interval": "{:+.2f} to {:+.2f} %"}
    tables = {"perplexity": (results, formats), "pairs": (pairs, formats), "entropy": (entropies, {})}
    return {name: table for name, table in tables.items() if table[0]}


def _change(change: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "change": None if change is None else change["mean"],
        "95 % interval": None if change is None else change["t_interval"],
    }


def _summary_row(row: dict[str, Any]) -> str:
    interval, change = row["perplexity_interval"], row["change"]
    cells = [row["configuration"], str(len(row["seeds"])), f"{row['perplexity']:.3f}"]
    cells.append("" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}")
    cells.append("0" if row["is_baseline"] else "" if change is None else f"{change['mean']:+.2f} %")
    if change is not None and len(change["by_seed"]) < len(row["seeds"]):
        # the others have no run of SM+LN+G
        cells[-1] += f" ({len(change['by_seed'])} of the seeds)"
    for name in ("t_interval", "bootstrap_interval"):
        cells.append("" if change is None or change[name] is None else _percent(change[name]))
    return "| " + " | ".join(cells) + " |"
