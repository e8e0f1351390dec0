"""`lnfree publish` from the command to what stands on the Hub: every switch, what it refuses, and what leaves."""

import json
import math
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from modeling_lnfree import LNFreeForCausalLM
from training import cli, runs
from training.errors import UserError
from training.hub import export, publish, verify
from training.hub.publication import Publication
from training.hub.results import write_results

from ..conftest import ROOT
from ..hub_server import TOKEN
from .conftest import MODELS, release


# all that a publication sends away; `code` runs on other machines
CODE = {"configuration_lnfree.py", "modeling_lnfree.py", "parts_lnfree.py"}
MODEL_FILES = CODE | {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "probe/logits.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "results.json", "log_history.json"),
    *("block.png", "curves.png", "heat_map.png"),
    *("attention_entropy.jsonl", "batch_entropy.jsonl", "gradient_norm.jsonl", "outliers.jsonl"),
    *("residual_stream.jsonl", "speed.jsonl"),
}
RESULTS_FILES = {"README.md", "data/gpt2-t16.parquet"}
METRIC_FILES = {
    *("README.md", "app.py", "attention_entropy.py", "entropy.py", "kernel.py", "linear.py", "naive.py"),
    *("reading.py", "record.py", "recorder.py", "requirements.txt", "summary.py", "torchmetric.py", "visibility.py"),
}


# ---- its switches


def test_command_publishes_privately_with_checkpoints_and_loads_all_back(published):
    repositories = published.server.repositories
    assert {id for _, id in repositories} == {
        f"me/{name}" for name in (*MODELS, "lnfree-results", "attention_entropy")
    }
    assert all(repository.private for repository in repositories.values())
    assert all(collection["private"] for collection in published.server.collections.values())
    assert {name: set(published.server.repository(f"me/{name}").branches) for name in MODELS} == {
        MODELS[0]: {"main"},
        MODELS[1]: {"main", "step-4"},
    }
    head, *checked = published.printed.partition("loaded back by id in ")[2].splitlines()
    assert head == "a clean process with an empty cache:" and len(checked) == 5
    assert sum("logits differ by 0; every Auto class; generates" in line for line in checked) == 3
    assert "load_dataset: 12 rows" in checked[3] and "evaluate.load" in checked[4]
    for publication, line in zip(published.folders, checked, strict=True):
        repository = published.server.repository(publication.repo_id, f"{publication.kind}s")
        assert f" {repository.branches[publication.branch][:12]} " in line


def test_dry_run_of_the_command_needs_no_token_and_touches_nothing(server, runs_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs_dir / "SM+R-5", tmp_path / "SM+R-5")
    monkeypatch.delenv("HF_TOKEN")
    assert cli.main(["publish", str(tmp_path), "--namespace", "anyone", "--dry-run"]) == 0
    assert {method for method, _, _ in server.requests} == {"GET"} and not server.repositories
    printed = capsys.readouterr().out
    # without the checkpoints, which were not asked for
    assert f"anyone/{MODELS[1]}: new, public, " in printed and "@step-4" not in printed
    assert "dry run, nothing was pushed" in printed and "loaded back by id" not in printed


def test_seed_of_the_command_is_the_one_that_is_published(server, runs_dir, capsys):
    assert cli.main(["publish", str(runs_dir), "--namespace", "me", "--seed", "7"]) == 1
    assert "seed=7 is not among the finished runs of lnfree-gpt2-sm-ln-g-t16 (seed 5)" in capsys.readouterr().err
    found = [run for run in runs.find_runs(runs_dir)[0] if run.variant == "SM+R"]
    assert {seed: [run.seed for run in publish.choose(found, seed)] for seed in (None, 5, 7)} == {
        **{None: [5], 5: [5], 7: [7]}
    }
    # the lowest, in whatever order they are found
    assert [run.seed for run in publish.choose(found[::-1], 5)] == [5]


# ---- what leaves


def test_files_that_leave_are_these(published):
    expected = [MODEL_FILES, *2 * [MODEL_FILES | {"zero_activations.jsonl"}], RESULTS_FILES, METRIC_FILES]
    for publication, names in zip(published.folders, expected, strict=True):
        assert set(publication.files) == names, publication
    # what runs elsewhere is what stands here
    package = ROOT / "modeling_lnfree"
    for publication in published.folders[:3]:
        for name in CODE:
            assert publication.files[name].read_bytes() == (package / name).read_bytes()
    for name in METRIC_FILES:
        here = package / "metrics" / "attention_entropy" / name
        assert published.folders[4].files[name].read_bytes() == here.read_bytes()


def test_neither_token_nor_path_leaves(published, runs_dir):
    everything = [published.printed, json.dumps(published.server.collections)]
    for repository in published.server.repositories.values():
        for commit in repository.commits:
            everything += [commit.title, *commit.files, *(blob.decode("latin-1") for blob in commit.files.values())]
    for text in everything:
        for secret in (TOKEN, str(runs_dir), str(runs_dir.parent), str(Path.home()) + "/", str(ROOT)):
            assert secret not in text


def test_weights_are_those_of_the_run_and_of_its_checkpoint(published, runs_dir):
    sources = [runs_dir / "SM+LN+G-5" / "model", runs_dir / "SM+R-5" / "model", runs_dir / "SM+R-5" / "checkpoint-4"]
    for publication, source in zip(published.folders, sources, strict=False):
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (publication.folder, source))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
        probe = load_file(publication.folder / "probe" / "logits.safetensors")
        logits = LNFreeForCausalLM.from_pretrained(source).eval()(probe["input_ids"]).logits
        torch.testing.assert_close(logits.detach(), probe["logits"], atol=1e-6, rtol=1e-5)


def test_clients_read_that_a_model_caches_and_how_long_a_text_may_be(published):
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    for publication in published.folders[:3]:
        read = {name: json.loads((publication.folder / name).read_text()) for name in names}
        assert read["config.json"].get("use_cache", True) is True
        assert read["generation_config.json"]["max_length"] == 16
        assert read["tokenizer_config.json"]["model_max_length"] == 16


def test_recipe_and_results_that_leave_say_no_local_path_and_all_else(published, runs_dir):
    run = runs.Run.load(runs_dir / "SM+R-5")
    results = json.loads((published.folders[1].folder / "results.json").read_text())
    recipe = dict(run.recipe)
    del recipe["output_dir"]
    assert Path(recipe["dataset"]).is_absolute()
    named = {"dataset": Path(recipe["dataset"]).name}
    assert results == {**run.results, **named, "recipe": {**recipe, **named}}


def test_every_local_path_of_a_recipe_is_a_name_in_the_export(runs_dir, tmp_path):
    results = runs.Run.load(runs_dir / "SM+R-5").results
    places = {name: tmp_path / f"of {name}" for name in ("dataset", "eval_dataset", "tokenizer")}
    for place in places.values():
        place.touch()
    local = {name: str(place) for name, place in places.items()}
    recipe = {**results["recipe"], **local, "init_from": str(tmp_path / "parent"), "output_dir": str(tmp_path)}
    left = {**results, "dataset": local["dataset"], "base_model": "parent", "recipe": recipe}
    left = export._without_local_paths(left)
    assert str(tmp_path) not in json.dumps(left)
    assert {name: left["recipe"][name] for name in places} == {name: f"of {name}" for name in places}
    assert (left["dataset"], left["recipe"]["init_from"]) == ("of dataset", "parent")
    # what is no path is an id, and stays one
    ids = {name: f"owner/{name}" for name in places}
    assert export._without_local_paths({**results, "recipe": {**recipe, **ids}})["recipe"].items() >= ids.items()


def test_rows_of_the_results_are_those_of_the_runs(published, runs_dir):
    folder = published.folders[3].folder
    rows = load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train").to_list()
    expected = []
    for run in runs.find_runs(runs_dir)[0]:
        entropy = run.attention_entropy
        same = {name: run.results[name] for name in ("variant", "backbone", "block_size", "seed", "perplexity")}
        same |= {name: run.results[name] for name in ("train_tokens", "train_steps", "parameters")}
        for layer in range(2):
            for head in range(2):
                row = {**same, "model": run.model_name, "dataset": Path(run.results["dataset"]).name, "layer": layer}
                row |= {"head": head, "entropy": entropy["entropy"][layer][head]}
                row |= {"max_entropy": entropy["max_entropy"][layer][head]}
                expected.append({**row, "layer_nan_count": entropy["nan_count"][layer]})
    assert rows == expected


def test_cards_explain_the_words_of_all_that_they_compare(published):
    for publication in published.folders[:3]:
        words = "SM softmax attention, LN LayerNorm, G GELU, R ReLU"
        assert words in (publication.folder / "README.md").read_text()


def test_nans_of_each_layer_are_in_the_results(runs_dir, tmp_path):
    run = runs.Run.load(runs_dir / "SM+R-5")
    run.results["attention_entropy"] |= {"nan_count": [3, 7], "max_entropy": [[1.0, 2.0], [3.0, 4.0]]}
    write_results([run], "me", tmp_path / "results")
    rows = load_dataset("parquet", data_files=str(tmp_path / "results/data/*.parquet"), split="train")
    assert [(row["layer"], row["layer_nan_count"]) for row in rows] == [(0, 3), (0, 3), (1, 7), (1, 7)]
    assert rows["max_entropy"] == [1.0, 2.0, 3.0, 4.0]


# ---- checks that refuse


@pytest.mark.parametrize(
    ("difference", "accepted"),
    [(0.0, True), (0.9e-5 * 4, True), (1.1e-5 * 4, False), (1.0, False), (math.nan, False), (math.inf, False)],
)
def test_logits_that_differ_from_the_trained_ones_are_refused(difference, accepted, server, monkeypatch, capsys):
    """The process that loads back is stood in for by what it may find; what it does is in the test above."""

    def find(script, arguments, folder, **environment):
        found = {"difference": difference, "scale": 4.0, "generated": "x"}
        # the second of two is looked at too
        arguments[1].write_text(json.dumps([{**found, "difference": 0.0}, found]))

    monkeypatch.setattr(verify, "find_failure", find)
    pair = [Publication(f"me/{name}", "model", Path(), commit="0" * 40) for name in ("first", "second")]
    if accepted:
        verify.verify(HfApi(), pair)
        assert f"logits differ by {difference:.1g}" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=f"published, but me/second has logits that differ by {difference:.3g}"):
            verify.verify(HfApi(), pair)


def test_loaded_back_is_the_commit_that_was_pushed(server, monkeypatch):
    asked = []

    def find(script, arguments, folder, **environment):
        asked.extend(json.loads(arguments[0].read_text()))
        return "enough"

    monkeypatch.setattr(verify, "find_failure", find)
    published = (
        Publication("me/x", "model", Path(), commit="1" * 40),
        Publication("me/y", "space", Path(), commit="2" * 40),
    )
    with pytest.raises(UserError, match="published, but not as it should be: enough"):
        verify.verify(HfApi(), published)
    assert [(item["repo_id"], item["revision"], item["kind"]) for item in asked] == [
        *(("me/x", "1" * 40, "model"), ("me/y", "2" * 40, "space"))
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_that_is_not_finite_is_not_exported_and_nothing_is_written(value, runs_dir, tmp_path, capsys):
    shutil.copytree(runs_dir / "SM+R-5", tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][3, 2] = value
    save_file(weights, path, metadata={"format": "pt"})
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    error = "its weight model.layers.1.mlp.down_proj.weight has NaN or infinite entries"
    assert error in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "exists and is not an export; name a new folder"),
        (".", "exists and is not an export; name a new folder"),
        ("empty/run", "holds the run itself; name a new folder"),
        ("file/below", "cannot be written: "),
    ],
)
def test_export_that_would_lose_something_is_refused(place, message, runs_dir, tmp_path, capsys):
    run = shutil.copytree(runs_dir / "SM+R-5", tmp_path / "empty" / "run")
    # as an earlier export would have
    (run / "heat_map.png").touch()
    (tmp_path / "file").write_text("mine")
    assert cli.main(["export", str(run), str(tmp_path / place)]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and (run / "model").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_change_on_the_card_is_against_the_baseline_of_the_same_seed(runs_dir):
    def run(variant, seed, perplexity):
        loaded = runs.Run.load(runs_dir / "SM+R-5")
        return runs.Run(loaded.folder, {**loaded.results, "variant": variant, "seed": seed, "perplexity": perplexity})

    measured = {
        ("SM+LN+G", 5): 100.0,
        ("SM+LN+G", 7): 200.0,
        ("SM+R", 5): 110.0,
        ("SM+R", 7): 180.0,
        ("SM+G", 9): 50.0,
    }
    rows = export._compare([run(*which, perplexity) for which, perplexity in measured.items()])
    assert [row["change"] for row in rows] == pytest.approx([0, 0, 10, -10, None])
    assert [(row["name"], row["seed"], row["perplexity"]) for row in rows[2:4]] == [
        *(("lnfree-gpt2-sm-r-t16", 5, 110.0), ("lnfree-gpt2-sm-r-t16", 7, 180.0))
    ]
    assert rows[0]["parameters"] == runs.Run.load(runs_dir / "SM+R-5").results["parameters"]


def test_one_digit_that_changed_is_a_change(server, small):
    """Files of equal size: one that git has, and one that the large-file storage has."""
    release(small)
    digits = {"README.md": small[0].folder / "README.md", "data": next(small[0].folder.glob("data/*"))}
    for path in digits.values():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    release(small)
    repository = server.repository("me/lnfree-results", "datasets")
    for path in digits.values():
        assert repository.files[path.relative_to(small[0].folder).as_posix()] == path.read_bytes()
    assert len(repository.commits) == 3 and re.fullmatch("v0.2.0.post1", max(repository.tags, key=len))


@pytest.mark.parametrize("largest", [40_000, 50_000], ids=["weights", "curves"])
def test_export_to_a_disk_that_takes_no_more_is_one_line(largest, runs_dir, tmp_path, capfd):
    """By a limit of the size of files; a full disk fails in the same calls."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        status = cli.main(["export", str(runs_dir / "SM+R-5"), str(tmp_path / "exports" / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lnfree export: error: ")]
    assert status == 1 and f"{tmp_path / 'exports' / 'out'} cannot be written: " in line
    assert "too large" in line and not list((tmp_path / "exports").iterdir())
