"""Runs of one setting side by side: rows, notes, and what the report and the pages make of them."""

import json

import pytest

from modeling_lnfree import LNFreeConfig
from training.compare.group import compare_group
from training.compare.report import build_report, tables_for_docs
from training.runs import Run
from training.tables import Table

from .test_seeds import fake_run


def grouped(tmp_path, perplexities: dict[tuple[str, int], float]) -> list[Run]:
    found = []
    for (variant, seed), perplexity in perplexities.items():
        run = fake_run(tmp_path, variant, seed, perplexity)
        entropy = {**run.attention_entropy, "max_entropy": [[2.0, 2.0]] * 2, "head_distribution": [0, 0, 0, 1]}
        entropy["nan_count"] = [seed, 10]
        more = {"eval_tokens": 5, "parameters": 6, "attention_entropy": entropy}
        sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        (run.folder / "model").mkdir()
        LNFreeConfig.from_variant(variant, **sizes, max_position_embeddings=8).save_pretrained(run.folder / "model")
        named = {"backbone": "gpt2", "block_size": 8, "dataset": "x"}
        found.append(Run(run.folder, {**run.results, **more, **named}))
    return found


def test_change_of_a_run_is_against_the_baseline_of_its_own_seed(tmp_path):
    measured = {("SM+LN+G", 1): 100.0, ("SM+LN+G", 2): 200.0, ("SM+R", 1): 110.0, ("SM+R", 2): 180.0, ("SM+R", 3): 9.0}
    group = compare_group(grouped(tmp_path, measured), [])
    rows = {(row["variant"], row["seed"]): row for row in group.rows}
    changes = [rows[key]["change_percent"] for key in measured]
    assert changes == [0, 0, pytest.approx(10), pytest.approx(-10), None]
    assert [rows[key]["nan_count"] for key in measured] == [11, 12, 11, 12, 13]
    assert rows["SM+R", 2]["entropy_by_layer"] == [1.5, 2.0]


def test_report_says_of_each_run_what_it_measured(tmp_path):
    group = compare_group(grouped(tmp_path, {("SM+LN+G", 1): 100.0, ("SM+R", 1): 110.0, ("SM+R", 2): 180.0}), [])
    blocks = build_report([group], {"half": "", "broken": "is unstable at step 3"})
    [runs_of] = [block for block in blocks if isinstance(block, Table) and "NaNs" in block.heads]
    rows = [dict(zip(runs_of.heads, row, strict=True)) for row in runs_of.rows]
    assert [row["NaNs"] for row in rows] == ["11", "11", "12"]
    assert [row["change"] for row in rows] == ["+0.00 %", "+10.00 %", ""]
    assert [row["seed"] for row in rows] == ["1", "1", "2"] and rows[0]["evaluation tokens"] == "5"
    assert rows[0]["heads in [3max/4, max]"] == "100 %" and rows[0]["heads in [0, max/4)"] == "0 %"
    assert blocks[-1] == "Not finished, and left out: half, broken is unstable at step 3."


def test_notes_name_who_is_ahead(tmp_path):
    found = grouped(tmp_path, {(variant, seed): 5.0 for variant in ("SM+G", "SM+R") for seed in (1, 2)})
    curves = {"SM+G": [9, 8, 7, 6], "SM+R": [8, 9, 6, 5]}
    for run in found:
        # the second seed the other way round
        values = curves[run.variant] if run.seed == 1 else curves[{"SM+G": "SM+R", "SM+R": "SM+G"}[run.variant]]
        log = [{"step": step, "eval_perplexity": value} for step, value in zip((10, 20, 30, 40), values, strict=True)]
        (run.folder / "log_history.json").write_text(json.dumps(log))
    notes = compare_group(found, []).notes
    assert [note.partition("in the evaluations on the way ")[2] for note in notes if note.startswith("Seed ")] == [
        "SM+R is ahead of SM+G for good from 3,000 tokens on.",
        "SM+G is ahead of SM+R for good from 3,000 tokens on.",
    ]


def test_stream_of_a_configuration_is_the_largest_of_its_seeds(tmp_path):
    found = grouped(tmp_path, {("SM+R", seed): 5.0 for seed in (1, 2)})
    for run, norms in zip(found, ([30.0, 20.0], [40.0, 10.0]), strict=True):
        # the largest of all measurements, and the kurtosis of the last one
        records = [{"step": i, "norm": [1.0, norm], "kurtosis": [norm / 10, 1.0]} for i, norm in enumerate(norms)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (run.folder / "residual_stream.jsonl").write_text(text)
    [row] = tables_for_docs([compare_group(found, [])])["overview"][0]
    assert (row["stream"], row["kurtosis"], row["seeds"]) == (40.0, 2.0, 2)


def test_page_has_the_perplexity_of_each_of_three_seeds_and_the_mean_of_more(tmp_path):
    few = {("SM+R", seed): 5.0 * seed for seed in (1, 2, 3)}
    many = {("SM+G", seed): 5.0 * seed for seed in (1, 2, 3, 4)}
    rows, _ = tables_for_docs([compare_group(grouped(tmp_path, {**few, **many}), [])])["perplexity"]
    found = {row["configuration"]: row["perplexity"] for row in rows}
    assert found == {"SM+R": [5.0, 10.0, 15.0], "SM+G": pytest.approx((5.0 * 10.0 * 15.0 * 20.0) ** (1 / 4))}


def test_rates_of_a_variant_are_compared_over_the_seeds_that_have_all_of_them(tmp_path):
    found = []
    for rate, perplexities in {
        0.003: {("SM+R", 1): 9.0, ("SM+R", 2): 8.0, ("SM+G", 2): 4.0},
        0.006: {("SM+R", 1): 4.0, ("SM+R", 2): 2.0, ("SM+R", 3): 1.0, ("SM+G", 2): 5.0, ("SM+LN+G", 2): 3.0},
        0.012: {("SM+R", 1): 1.0, ("SM+R", 2): 16.0},
    }.items():
        (tmp_path / str(rate)).mkdir()
        runs = grouped(tmp_path / str(rate), perplexities)
        found += [
            Run(run.folder, {**run.results, "recipe": {**run.recipe, "layer_learning_rate": rate}}) for run in runs
        ]
    # one by AdamW at the rate of all the rest
    found += grouped(tmp_path, {("SM+LN+R", 2): 1.0})
    rows, _ = tables_for_docs([compare_group(found, [])])["rates"]
    assert sorted(rows, key=lambda row: row["variant"]) == [
        {"variant": "SM+G", "at 0.003": 4.0, "at 0.006": pytest.approx(5.0), "at 0.012": None, "best": "0.003"},
        {
            **{"variant": "SM+R", "at 0.003": pytest.approx(72**0.5), "at 0.006": pytest.approx(8**0.5)},
            **{"at 0.012": pytest.approx(4.0), "best": "0.006"},
        },
    ]
