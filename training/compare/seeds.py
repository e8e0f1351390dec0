"""What several seeds show: means, intervals, paired differences, and from how many tokens on one variant is ahead."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from modeling_lnfree.configuration_lnfree import read_variant
from modeling_lnfree.variants import rename_variant

from ..errors import UserError
from ..runs import Run, find_baseline


LEAST_SEEDS = 3


def summarize(runs: list[Run]) -> dict[str, Any]:
    """
    Statistics of the runs of one setting, as JSON has them.

    Returns:
        `configurations`: perplexity (exp of the mean loss over seeds, and of its 95 % interval by Student's t), change
        against SM+LN+G in percent (paired by seed; `find_baseline`), and the entropy by layer. `pairs`: the same
        paired change of ReLU against GELU without and with LayerNorm, of SM+R and SM+G against SM+LN+G with the same
        preset, all else alike, and of what names an optimizer or a method against what names none, and by seed from
        how many tokens on which of them is ahead. An interval is None with fewer than 3 seeds.

    Raises:
        UserError: for two runs of one configuration and seed, of which one would hide the other.
    """
    by_configuration: dict[str, dict[int, Run]] = {}
    for run in runs:
        earlier = by_configuration.setdefault(run.configuration, {}).setdefault(run.seed, run)
        if earlier is not run:
            raise UserError(
                f"{earlier.folder} and {run.folder} are the same run, {run.configuration} with seed {run.seed}: move "
                "one of them away"
            )
    baseline = find_baseline(runs)
    configurations = []
    for name, seeds in by_configuration.items():
        losses = np.log([run.perplexity for run in seeds.values()])
        entropies = [np.mean(run.attention_entropy["entropy"], axis=1) for run in seeds.values()]
        configurations.append(
            {
                "configuration": name,
                "seeds": sorted(seeds),
                "perplexity": float(np.exp(np.mean(losses))),
                "perplexity_interval": _transform_ends(np.exp, t_interval(losses)),
                "is_baseline": name == baseline,
                "change": paired_change(seeds, by_configuration.get(baseline or "", {})) if name != baseline else None,
                "entropy_by_layer": np.mean(entropies, axis=0).tolist(),
            }
        )
    pairs = [
        {
            "first": first,
            "second": second,
            "change": paired_change(by_configuration[first], by_configuration[second]),
            "ahead": ahead(by_configuration[first], by_configuration[second]),
        }
        for first, second in _counterparts(by_configuration)
        if second in by_configuration
    ]
    return {"configurations": configurations, "pairs": [pair for pair in pairs if pair["change"] is not None]}


def _counterparts(by_configuration: dict[str, dict[int, Run]]) -> list[tuple[str, str]]:
    """
    Configurations that differ in one word: ReLU and GELU; with a preset no norm and LayerNorm with GELU; what names
    an optimizer or a method and what names none.
    """
    variants = {name: next(iter(seeds.values())).variant for name, seeds in by_configuration.items()}
    words = {name: read_variant(variant) for name, variant in variants.items()}
    # without a norm first
    ordered = sorted(variants, key=lambda name: words[name]["norm"] != "")
    pairs = [(name, {"act": "G"}) for name in ordered if words[name]["act"] == "R"]
    plain = [name for name in ordered if words[name]["preset"] and not words[name]["norm"]]
    # what changes are against has LayerNorm without a preset alone
    pairs += [(name, {"norm": "LN", "act": "G"}) for name in plain]
    # whatever follows the variant in a configuration is the same in both
    named = [(name, name.replace(variants[name], rename_variant(variants[name], **other), 1)) for name, other in pairs]
    return named + [(name, variants[name]) for name in ordered if name != variants[name]]


def paired_change(ours: dict[int, Run], theirs: dict[int, Run]) -> dict[str, Any] | None:
    """
    Change of the perplexity from `theirs` to `ours` in percent, by seed, and that of the mean loss with two 95 %
    intervals; None if they share no seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    # in nats, where changes add up and no interval reaches a perplexity below 0
    changes = np.log([ours[seed].perplexity / theirs[seed].perplexity for seed in seeds])
    return {
        "by_seed": dict(zip(map(str, seeds), map(_to_percent, changes), strict=True)),
        "mean": _to_percent(np.mean(changes)),
        "t_interval": _transform_ends(_to_percent, t_interval(changes)),
        "bootstrap_interval": _transform_ends(_to_percent, bootstrap_interval(changes)),
    }


def format_interval(percent: list[float]) -> str:
    """The two ends of an interval of changes: `-1.20 to +0.34 %`."""
    return f"{percent[0]:+.2f} to {percent[1]:+.2f} %"


def _to_percent(nats: float | np.floating) -> float:
    return float(100 * np.expm1(nats))


def _transform_ends(function: Callable[[float], float], interval: list[float] | None) -> list[float] | None:
    return None if interval is None else [float(function(end)) for end in interval]


def t_interval(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """95 % interval of the mean by Student's t; None with fewer than 3 values, or if one is not finite."""
    if len(values) < LEAST_SEEDS or not np.isfinite(values).all():
        return None
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean; None with fewer than 3 values, or if one is not finite."""
    if len(values) < LEAST_SEEDS or not np.isfinite(values).all():
        return None
    result = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(0)
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def ahead(ours: dict[int, Run], theirs: dict[int, Run]) -> dict[str, Any]:
    """
    By seed, who has the lower perplexity at the last common evaluation on the way, and the training tokens of the
    first evaluation from which on that stays so; seeds without two common evaluations are left out.
    """
    found = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        first, second = dict(ours[seed].read_evaluations()), dict(theirs[seed].read_evaluations())
        tokens = sorted(first.keys() & second.keys())
        if len(tokens) < 2:
            continue
        leads = [first[count] < second[count] for count in tokens]
        changed = [index for index in range(1, len(leads)) if leads[index] != leads[index - 1]]
        found[str(seed)] = {"first_leads": leads[-1], "from_tokens": tokens[changed[-1] if changed else 0]}
    return found
