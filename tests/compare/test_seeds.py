"""What several seeds show."""

import itertools
import json
import math
import runpy
import statistics

import numpy as np
import pytest
import scipy.stats

from training.compare import seeds
from training.compare.report import summary_row
from training.errors import UserError
from training.runs import Run

from ..conftest import ROOT


def fake_run(tmp_path, variant, seed, perplexity, evaluated=(), **recipe):
    folder = tmp_path / f"{variant}-{seed}"
    folder.mkdir()
    log = [{"step": step, "eval_perplexity": value} for step, value in evaluated]
    (folder / "log_history.json").write_text(json.dumps([*log, {"step": 40, "eval_perplexity": perplexity}]))
    results = {
        **{"variant": variant, "seed": seed, "perplexity": perplexity, "recipe": recipe},
        **{"train_tokens": 4000, "train_steps": 40},
        "attention_entropy": {"entropy": [[1.0, 2.0], [seed, seed]]},
    }
    return Run(folder, results)


def test_intervals_and_paired_changes_over_seeds(tmp_path):
    perplexities = {"SM+LN+G": (100, 110, 120), "SM+G": (130, 140, 150), "SM+R": (120, 133, 141)}
    runs = [
        fake_run(tmp_path, variant, seed, value)
        for variant, values in perplexities.items()
        for seed, value in zip((1, 2, 3), values, strict=True)
    ]
    summary = seeds.summarize(runs)
    by_name = {row["configuration"]: row for row in summary["configurations"]}
    # Student's t with 2 degrees of freedom: 4.3027
    losses = [math.log(value) for value in (130, 140, 150)]
    half = 4.302653 * statistics.stdev(losses) / math.sqrt(3)
    mean = statistics.mean(losses)
    assert by_name["SM+G"]["perplexity"] == pytest.approx(math.exp(mean))
    ends = [math.exp(mean - half), math.exp(mean + half)]
    assert by_name["SM+G"]["perplexity_interval"] == pytest.approx(ends, rel=1e-6)
    assert by_name["SM+G"]["entropy_by_layer"] == [1.5, 2.0] and by_name["SM+LN+G"]["change"] is None
    changes = [100 * (120 / 130 - 1), 100 * (133 / 140 - 1), 100 * (141 / 150 - 1)]
    [pair] = summary["pairs"]
    assert (pair["first"], pair["second"]) == ("SM+R", "SM+G")
    assert list(pair["change"]["by_seed"].values()) == pytest.approx(changes)
    logs = np.log1p(np.array(changes) / 100)
    assert pair["change"]["mean"] == pytest.approx(100 * np.expm1(np.mean(logs)))
    # all 27 resamples of three values, each as likely as the others: the quantiles of their means
    means = sorted(100 * np.expm1(np.mean(sample)) for sample in itertools.product(logs, repeat=3))
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf").tolist()
    assert pair["change"]["bootstrap_interval"] == pytest.approx(expected)


def test_ways_to_train_the_layers_are_configurations_of_one_setting(tmp_path):
    muon = {"layer_optimizer": "muon", "muon_momentum": 0.95, "muon_adjustment": "match_rms_adamw"}
    ways = {
        "SM+LN+G": ({"layer_optimizer": "adamw"}, (100, 110)),
        "SM+LN+G, muon": (muon, (90, 92)),
        "SM+LN+G, muon 0.01": ({**muon, "layer_learning_rate": 0.01}, (91, 90)),
        # the lowest, but over one seed only
        "SM+LN+G, muon 0.02, muon_momentum=0.9": ({**muon, "layer_learning_rate": 0.02, "muon_momentum": 0.9}, (50,)),
        "SM+R@Stable, muon 0.01": ({**muon, "layer_learning_rate": 0.01}, (80, 85)),
        "SM+G@Stable, muon 0.01": ({**muon, "layer_learning_rate": 0.01}, (88, 85)),
        "SM+G@Stable": ({}, (70, 70)),
        "SM+LN+G@Stable": ({}, (56, 60)),
        "SM+R, adamw, layer_base_width=64": ({"layer_base_width": 64}, (60, 60)),
    }
    seen = []
    for index, (name, (recipe, perplexities)) in enumerate(ways.items()):
        (tmp_path / str(index)).mkdir()
        for seed, value in enumerate(perplexities):
            run = fake_run(tmp_path / str(index), name.split(",")[0], seed, value, **recipe)
            seen.append(Run(run.folder, {**run.results, "backbone": "gpt2", "block_size": 8, "dataset": "x"}))
    assert len({run.setting for run in seen}) == 1
    summary = seeds.summarize(seen)
    rows = {row["configuration"]: row for row in summary["configurations"]}
    assert list(rows) == list(ways)
    assert [name for name, row in rows.items() if row["is_baseline"]] == ["SM+LN+G, muon 0.01"]
    assert rows["SM+LN+G, muon 0.01"]["change"] is None
    assert list(rows["SM+R@Stable, muon 0.01"]["change"]["by_seed"].values()) == pytest.approx(
        [100 * (80 / 91 - 1), 100 * (85 / 90 - 1)]
    )
    # all else alike, also with LayerNorm under a preset
    assert [(pair["first"], pair["second"]) for pair in summary["pairs"]] == [
        ("SM+R@Stable, muon 0.01", "SM+G@Stable, muon 0.01"),
        ("SM+G@Stable", "SM+LN+G@Stable"),
        # an optimizer against none that is named
        ("SM+G@Stable, muon 0.01", "SM+G@Stable"),
        ("SM+LN+G, muon", "SM+LN+G"),
        ("SM+LN+G, muon 0.01", "SM+LN+G"),
        ("SM+LN+G, muon 0.02, muon_momentum=0.9", "SM+LN+G"),
    ]
    assert list(summary["pairs"][1]["change"]["by_seed"].values()) == pytest.approx([25, 100 * (70 / 60 - 1)])


def test_a_change_says_how_many_seeds_it_is_over(tmp_path):
    runs = [fake_run(tmp_path, "SM+LN+G", seed, 10.0) for seed in (1, 2)]
    runs += [fake_run(tmp_path, "SM+R", seed, 9.0) for seed in (1, 2, 3)]
    baseline, row = seeds.summarize(runs)["configurations"]
    assert summary_row(row)[:5] == ["SM+R", "3", "9.000", "9.000 to 9.000", "-10.00 % (2 of the seeds)"]
    assert summary_row(baseline) == ["SM+LN+G", "2", "10.000", "", "0", "", ""]


def test_the_same_run_twice_is_an_error(tmp_path):
    run = fake_run(tmp_path, "SM+R", 1, 10.0)
    with pytest.raises(UserError, match="SM\\+R-1 and .*copy are the same run, SM\\+R with seed 1"):
        seeds.summarize([run, Run(tmp_path / "copy", run.results)])


def test_fewer_than_three_seeds_give_no_interval(tmp_path):
    runs = [fake_run(tmp_path, variant, seed, 10.0 + seed) for variant in ("SM+R", "SM+G") for seed in (1, 2)]
    summary = seeds.summarize(runs)
    assert all(row["perplexity_interval"] is None for row in summary["configurations"])
    assert summary["pairs"][0]["change"]["t_interval"] is summary["pairs"][0]["change"]["bootstrap_interval"] is None
    # only seeds that both have are paired
    assert seeds.paired_change({1: runs[0]}, {2: runs[1]}) is None
    assert seeds.t_interval([1.0, math.inf, 2.0]) is seeds.bootstrap_interval([1.0, math.nan, 2.0]) is None


def test_crossing_is_the_first_evaluation_from_which_the_lead_stays(tmp_path):
    gelu = fake_run(tmp_path, "SM+G", 1, 5, [(10, 9), (20, 8), (30, 7), (40, 6)])
    relu = fake_run(tmp_path, "SM+R", 1, 4, [(10, 8), (20, 9), (30, 6), (40, 5)])
    never = fake_run(tmp_path, "SM+LN+R", 1, 4, [(10, 10), (20, 9), (30, 9), (40, 9)])
    assert seeds.ahead({1: relu}, {1: gelu}) == {"1": {"first_leads": True, "from_tokens": 3000}}
    assert seeds.ahead({1: never}, {1: gelu}) == {"1": {"first_leads": False, "from_tokens": 1000}}
    assert seeds.ahead({1: fake_run(tmp_path, "SM+LN+G", 1, 4)}, {1: gelu}) == {}


def test_intervals_of_a_pair_are_of_two_kinds(tmp_path):
    perplexities = {"SM+G": (130, 140, 150, 170), "SM+R": (120, 133, 141, 171)}
    seen = [
        fake_run(tmp_path, variant, seed, value)
        for variant, values in perplexities.items()
        for seed, value in enumerate(values)
    ]
    [pair] = seeds.summarize(seen)["pairs"]
    changes = np.log(np.array(perplexities["SM+R"]) / np.array(perplexities["SM+G"]))
    ends = scipy.stats.t.interval(0.95, 3, loc=changes.mean(), scale=scipy.stats.sem(changes))
    expected = [100 * np.expm1(end) for end in ends]
    assert pair["change"]["t_interval"] == pytest.approx(expected)
    width, other = (np.ptp(pair["change"][name]) for name in ("t_interval", "bootstrap_interval"))
    assert other < width


def test_course_of_a_difference_is_that_of_the_logged_losses(tmp_path):
    gap = {10: 0.5, 20: -0.25, 30: 0.1}
    runs = []
    for variant, sign in (("SM+R", 1), ("SM+G", 0), ("SM+LN+R", 0)):
        for seed in (1, 2, 3):
            run = fake_run(tmp_path, variant, seed, 9.0)
            # each seed at a level of its own, and a little off the common gap
            log = [{"step": step, "loss": 5 + seed + sign * (nats + (seed - 2) / 100)} for step, nats in gap.items()]
            (run.folder / "log_history.json").write_text(json.dumps([*log, {"step": 30, "eval_loss": 7.0}]))
            runs.append(run)
    script = runpy.run_path(str(ROOT / "scripts" / "difference_over_tokens.py"))
    [(pair, course)] = script["follow"](runs).items()
    assert pair == "SM+R against SM+G" and list(course) == [1000, 2000, 3000]
    # Student's t with 2 degrees of freedom, of a standard error of 0.01 / sqrt(3)
    half = 4.3027 * 0.01 / math.sqrt(3)
    for found, nats in zip(course.values(), gap.values(), strict=True):
        assert found == pytest.approx([100 * math.expm1(nats + off) for off in (0, -half, half)], abs=1e-2)
    assert script["follow"](runs[:5]) == {}


def test_course_of_a_difference_is_that_of_the_docs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["difference_over_tokens.py"])
    runpy.run_path("scripts/difference_over_tokens.py", run_name="__main__")
    assert capsys.readouterr().out.rstrip() in (ROOT / "docs" / "stability.md").read_text()
    monkeypatch.setattr("sys.argv", ["difference_over_tokens.py", "docs/stability.md"])
    with pytest.raises(SystemExit, match="difference_over_tokens: docs/stability.md is no parquet file of runs"):
        runpy.run_path("scripts/difference_over_tokens.py", run_name="__main__")
