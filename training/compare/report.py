"""What a comparison shows, as blocks that Markdown and HTML are made of alike."""

import statistics
from typing import Any

from modeling_lnfree.variants import BASELINE

from ..encryption.counting import PROTOCOLS
from ..encryption.tables import BOTH, compare_costs, explain, to_table
from ..tables import Block, Heading, Table
from .group import Group
from .seeds import LEAST_SEEDS, format_interval


# heads of the table of what was measured of finished models, and the names of the quantities
PERPLEXITIES = {"perplexity": "perplexity", "int8 by token": "int8 by token", "int8 by tensor": "int8 by tensor"}
MEASURED_MEANS = {
    "bits per byte": "bits_per_byte",
    "weight on the first key": "sink_share",
    "largest logit": "max_logit",
    "infinity norm": "infinity_norm",
    "outlier dimensions": "outlier_dimensions",
}
QUARTERS = ["[0, max/4)", "[max/4, max/2)", "[max/2, 3max/4)", "[3max/4, max]"]


def build_report(groups: list[Group], unfinished: dict[str, str]) -> list[Block]:
    """The whole report, with the pictures that stand beside it."""
    blocks: list[Block] = [Heading(1, "LNFree: comparison of the variants")]
    for group in groups:
        blocks += [Heading(2, group.title), *describe_group(group)]
    blocks += ["![attention entropy by layer and head](heat_maps.png)", "![curves over training](curves.png)"]
    blocks.append("![perplexity against seconds under encryption](seconds.png)")
    if unfinished:
        named = ", ".join(f"{name} {why}".strip() for name, why in unfinished.items())
        blocks.append(f"Not finished, and left out: {named}.")
    return blocks


def describe_group(group: Group) -> list[Block]:
    """The tables of one setting, and the sentences that go with them."""
    setting, configurations = group.runs[0].setting, group.summary["configurations"]
    blocks: list[Block] = []
    if any(len(row["seeds"]) > 1 for row in configurations):
        blocks += [
            _over_seeds(configurations),
            "Means and intervals over seeds are those of the loss; a perplexity is the exponential of it.",
        ]
    return [
        *blocks,
        *group.notes,
        Heading(3, "Every run"),
        _every_run(group.rows),
        Heading(3, "Mean attention entropy by layer"),
        "Over the evaluation part and over seeds, in nats; the largest of a causal head at "
        f"T={setting.block_size} is {group.rows[0]['max_entropy']:.3f}.",
        _entropy_by_layer(configurations),
        Heading(3, "Under encryption"),
        f"Operations on private data in one forward pass over {setting.block_size} tokens, counted by running it, "
        f"beside {BASELINE} of the same sizes.",
        *describe_costs(group.rows),
        Heading(3, "Perplexity against seconds under encryption"),
        to_table(seconds_rows(group)),
    ]


def describe_costs(rows: list[dict[str, Any]]) -> list[Block]:
    """What the variants among the rows of a setting cost under encryption."""
    costs = {row["variant"]: row["private_cost"] for row in rows}
    named = [(variant, cost["forward"]) for variant, cost in costs.items()]
    tables = compare_costs(named, rows[0]["private_cost"]["baseline"])
    return [*tables, explain(BOTH, [phase for _, phase in named])]


def seconds_rows(group: Group) -> list[dict[str, Any]]:
    """Of every configuration perplexity and seconds, and on which networks none is both better and faster."""
    return [
        {
            "configuration": point["configuration"],
            "perplexity": f"{point['perplexity']:.3f}",
            **{f"s on {name}": seconds for name, seconds in point["seconds"].items()},
            "on the frontier": ", ".join(name for name, best in point["frontier"].items() if best),
        }
        for point in group.seconds()
    ]


def _over_seeds(configurations: list[dict[str, Any]]) -> Table:
    interval = "95 % interval (t)"
    heads = ["configuration", "seeds", "perplexity", interval, f"change against {BASELINE}", interval, "bootstrap"]
    return Table(heads, [summary_row(row) for row in configurations])


def summary_row(row: dict[str, Any]) -> list[str]:
    """The cells of one configuration over its seeds."""
    interval, change = row["perplexity_interval"], row["change"]
    cells = [row["configuration"], str(len(row["seeds"])), f"{row['perplexity']:.3f}"]
    cells.append("" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}")
    cells.append("0" if row["is_baseline"] else "" if change is None else f"{change['mean']:+.2f} %")
    if change is not None and len(change["by_seed"]) < len(row["seeds"]):
        # the others have no run of the baseline
        cells[-1] += f" ({len(change['by_seed'])} of the seeds)"
    for name in ("t_interval", "bootstrap_interval"):
        cells.append("" if change is None or change[name] is None else format_interval(change[name]))
    return cells


def _every_run(rows: list[dict[str, Any]]) -> Table:
    heads = ["configuration", "seed", "perplexity", "change", "evaluation tokens", "parameters", "NaNs"]
    cells = [
        [
            row["configuration"],
            str(row["seed"]),
            f"{row['perplexity']:.3f}",
            "" if row["change_percent"] is None else f"{row['change_percent']:+.2f} %",
            f"{row['eval_tokens']:,}",
            f"{row['parameters']:,}",
            str(row["nan_count"]),
            *(f"{100 * share:.0f} %" for share in row["head_distribution"]),
        ]
        for row in rows
    ]
    return Table([*heads, *(f"heads in {quarter}" for quarter in QUARTERS)], cells)


def _entropy_by_layer(configurations: list[dict[str, Any]]) -> Table:
    layers = max(len(row["entropy_by_layer"]) for row in configurations)
    rows = [[row["configuration"], *(f"{value:.2f}" for value in row["entropy_by_layer"])] for row in configurations]
    return Table(["configuration", *(f"layer {layer}" for layer in range(layers))], rows)


def tables_for_docs(groups: list[Group]) -> dict[str, tuple[list[dict[str, Any]], dict[str, str]]]:
    """Rows and formats of the tables for the docs: what every configuration reaches, pairs, entropies by layer."""
    results, pairs, entropies, seconds, rates = [], [], [], [], []
    for group in groups:
        setting = {"setting": group.title} if len(groups) > 1 else {}
        for row in group.summary["configurations"]:
            named = {**setting, "configuration": row["configuration"]}
            reached = [run.perplexity for run in group.runs if run.configuration == row["configuration"]]
            seeds = ", ".join(map(str, row["seeds"]))
            # of many seeds the mean (exp of the mean loss), and each of them is in the small file of all runs
            perplexity = reached if len(reached) <= LEAST_SEEDS else row["perplexity"]
            results.append({**named, "seeds": seeds, "perplexity": perplexity, **_change(row["change"])})
            layers = enumerate(row["entropy_by_layer"])
            entropies.append({**named, **{f"layer {layer}": entropy for layer, entropy in layers}})
        seconds += [{**setting, **row} for row in seconds_rows(group)]
        rates += [{**setting, **row} for row in _rate_rows(group)]
        for pair in group.summary["pairs"]:
            named = {"first": pair["first"], "against": pair["second"], "pairs": len(pair["change"]["by_seed"])}
            pairs.append({**setting, **named, **_change(pair["change"])})
    formats = {"perplexity": "{:.3f}", "change": "{:+.2f} %", "95 % interval": "{:+.2f} to {:+.2f} %"}
    tables = {"perplexity": (results, formats), "pairs": (pairs, formats), "entropy": (entropies, {})}
    tables |= {"seconds": (seconds, {}), "rates": (rates, {})}
    overview = [
        row for group in groups for row in _overview_rows(group, {"setting": group.title} if len(groups) > 1 else {})
    ]
    tables["overview"] = (overview, {**formats, "perplexity": "{:.2f}", "kurtosis": "{:.2f}"})
    found = [row for group in groups for row in _measured_rows(group)]
    digits = dict.fromkeys(PERPLEXITIES, "{:.3f}")
    tables["measured"] = (found, {**digits, "bits per byte": "{:.4f}", "outlier dimensions": "{:.1f}"})
    return {name: table for name, table in tables.items() if table[0]}


def _rate_rows(group: Group) -> list[dict[str, Any]]:
    """
    Of every variant whose layers were trained at several rates, its perplexity at each, over the seeds that have all
    of them (exp of the mean loss), and the rate of the lowest.
    """
    found: dict[str, dict[float, dict[int, float]]] = {}
    for run in group.runs:
        if (rate := run.recipe.get("layer_learning_rate")) is not None:
            found.setdefault(run.variant, {}).setdefault(rate, {})[run.seed] = run.perplexity
    reached = {}
    for variant, by_rate in found.items():
        seeds = set.intersection(*map(set, by_rate.values()))
        if seeds and len(by_rate) > 1:
            reached[variant] = {
                rate: statistics.geometric_mean(by_rate[rate][seed] for seed in seeds) for rate in by_rate
            }
    rates = sorted({rate for perplexities in reached.values() for rate in perplexities})
    return [
        {
            "variant": variant,
            **{f"at {rate:g}": perplexities.get(rate) for rate in rates},
            "best": f"{min(perplexities, key=perplexities.__getitem__):g}",
        }
        for variant, perplexities in reached.items()
    ]


def _overview_rows(group: Group, setting: dict[str, str]) -> list[dict[str, Any]]:
    """
    A row for each configuration, the lowest perplexity first: what it reaches, the entropies of its first and last
    layer, its residual stream, and what it costs under encryption by the first cost model.
    """
    rows = []
    for row, point in zip(group.summary["configurations"], group.seconds(), strict=True):
        runs = [each for each in group.rows if each["configuration"] == row["configuration"]]
        cost = runs[0]["private_cost"]["forward"]["estimates"][PROTOCOLS[0].name]
        streams, kurtoses = (
            [each[name] for each in runs if each[name] is not None] for name in ("largest_stream", "kurtosis")
        )
        rows.append(
            {
                **setting,
                "configuration": row["configuration"],
                "seeds": len(row["seeds"]),
                "perplexity": row["perplexity"],
                **_change(row["change"]),
                "entropy, first": row["entropy_by_layer"][0],
                "last": row["entropy_by_layer"][-1],
                "kurtosis": max(kurtoses, default=None),
                "stream": max(streams, default=None),
                "parameters": runs[0]["parameters"],
                "rounds": cost["rounds"],
                "MB": cost["bytes_per_party"] / 1e6,
                **{f"s on {name}": seconds for name, seconds in point["seconds"].items()},
            }
        )
    return sorted(rows, key=lambda row: row["perplexity"])


def _measured_rows(group: Group) -> list[dict[str, Any]]:
    """
    Of every configuration, the lowest perplexity first, what `lnfree measure --int8` found of its models: the mean
    over those that were measured; a perplexity is the exponential of the mean loss.
    """
    rows = []
    for configuration in group.summary["configurations"]:
        name = configuration["configuration"]
        found = [run.measured for run in group.runs if run.configuration == name and run.measured]
        if found:
            rows.append(
                {
                    "configuration": name,
                    "seeds": len(found),
                    **{head: _mean_loss(found, key) for head, key in PERPLEXITIES.items()},
                    **{head: statistics.fmean(each[key] for each in found) for head, key in MEASURED_MEANS.items()},
                }
            )
    return sorted(rows, key=lambda row: row["perplexity"])


def _mean_loss(found: list[dict[str, Any]], key: str) -> float | None:
    values = [each[key] for each in found if key in each]
    return statistics.geometric_mean(values) if values else None


def _change(change: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "change": None if change is None else change["mean"],
        "95 % interval": None if change is None else change["t_interval"],
    }
