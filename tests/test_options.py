"""Every option of every command acts: a list of them, each with the test that looks at what it does."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from transformers import GPT2Config, GPT2LMHeadModel

from training import cli, sweep
from training.benchmark import benchmark

from .conftest import ROOT, byte_tokenizer, tiny_model
from .hub_server import TOKEN, HubServer, read_from


OPTIONS, COMMAND = "tests/test_options.py::", "tests/hub/test_command.py::"
MEASURE, COST = "tests/entropy/test_metric.py::test_measure_matches_naive", "tests/test_cost.py::"
MEASURED = "tests/measurement/test_command.py::"
ATTRIBUTE = "tests/test_attribute_command.py::"
SWITCHES = COMMAND + "test_command_publishes_privately_with_checkpoints_and_loads_all_back"
TEXTS = OPTIONS + "test_options_of_texts_choose_what_is_read"
REVISION = OPTIONS + "test_revision_is_the_one_named"
# by hand: an option that is new needs a row, and the row a test through the command that looks at the effect
TESTED = {
    "train": {
        "recipe": "tests/test_cli.py::test_wrong_name_is_one_line",
        "overrides": "tests/train/test_methods.py::test_finetune_is_a_recipe_by_name",
        "--fields": "tests/test_cli.py::test_fields_are_listed_with_type_default_and_help",
        **dict.fromkeys(
            ("--plan", "--processes", "--flops"), "tests/train/test_distributed.py::test_plan_counts_by_hand"
        ),
    },
    "recipes": {},
    "sweep": {
        "path": "tests/test_sweep.py::test_runs_in_turn_and_together_and_a_failure_stops_no_other",
        "--jobs": OPTIONS + "test_jobs_of_a_sweep_run_at_a_time",
    },
    "compare": {
        "runs_dir": "tests/compare/test_report.py::test_report_has_the_papers_table",
        "--output": "tests/compare/test_report.py::test_report_leaves_out_what_is_not_finished",
        "--docs": OPTIONS + "test_compare_puts_its_tables_into_the_pages",
    },
    "export": dict.fromkeys(
        ("run_dir", "out_dir"), "tests/hub/test_export.py::test_export_loads_outside_the_project_with_equal_logits"
    ),
    "measure": {
        **dict.fromkeys(("model_id", "--dataset", "--max-length", "--device", "--streaming"), MEASURE),
        **dict.fromkeys(("--json", "--heat-map", "--parquet"), MEASURE),
        **dict.fromkeys(("--config", "--split", "--text-column", "--max-samples"), TEXTS),
        **dict.fromkeys(("--private-cost", "--fixed-point"), COST + "test_options_that_measure_had_name_the_verb"),
        **dict.fromkeys(("--stride", "--rolling", "--concatenate"), MEASURED + "test_ways_to_read_act"),
        **dict.fromkeys(
            ("--int8", "--int8-clip", "--markdown"),
            MEASURED + "test_models_stand_side_by_side_with_differences_to_the_first",
        ),
        "--tasks": MEASURED + "test_tasks_are_handed_over_to_lm_eval",
        "--batch-size": OPTIONS + "test_batch_size_is_texts_in_a_forward_pass",
        "--dtype": OPTIONS + "test_dtype_is_the_one_named",
        "--revision": REVISION,
        "--trust-remote-code": OPTIONS + "test_code_that_comes_with_a_model_is_run_only_when_asked",
    },
    "attribute": {
        **dict.fromkeys(("model_id", "text", "--json"), ATTRIBUTE + "test_a_logit_and_its_parts"),
        **dict.fromkeys(("--target", "--against"), ATTRIBUTE + "test_target_and_against_choose_the_logits"),
        **dict.fromkeys(("--neurons", "--lens"), ATTRIBUTE + "test_neurons_and_lens_have_tables"),
        "--linearize": ATTRIBUTE + "test_a_final_norm_is_held_on_demand_in_stock_models_too",
        **dict.fromkeys(("--corrupted", "--real"), ATTRIBUTE + "test_corrupted_text_scores_every_output"),
        "--picture": ATTRIBUTE + "test_picture_is_drawn_of_what_was_asked_for",
        "--revision": REVISION,
    },
    "cost": {
        **dict.fromkeys(
            ("model_ids", "--length", "--batch-size", "--new-tokens", "--json"),
            COST + "test_counts_beside_the_baseline",
        ),
        "--network": COST + "test_models_by_name_stand_beside_the_first",
        **dict.fromkeys(("--steps", "--docs"), COST + "test_steps_and_tables_for_the_docs"),
        **dict.fromkeys(("--fixed-point", "--dataset", "--device"), COST + "test_fewest_bits_of_fixed_point"),
        **dict.fromkeys(("--config", "--split", "--text-column", "--max-samples"), TEXTS),
        "--revision": REVISION,
        "--trust-remote-code": COST + "test_code_that_comes_with_a_model_is_run_only_when_asked",
    },
    "import": {
        **dict.fromkeys(
            ("model_id", "out_dir", "--to-stock"),
            "tests/convert/test_other_checkpoints.py::test_head_of_its_own_is_kept_where_the_configuration_says_tied",
        ),
        "--revision": REVISION,
    },
    "remove-norms": {
        **dict.fromkeys(
            ("model_id", "out_dir", "overrides", "--dataset"),
            "tests/test_remove_norms.py::test_from_the_command_to_the_card",
        ),
        **dict.fromkeys(("--keep-final-norm", "--no-control"), "tests/test_remove_norms.py::test_options_act"),
    },
    "publish": {
        **dict.fromkeys(("runs_dir", "--namespace", "--private", "--checkpoints"), SWITCHES),
        "--dry-run": COMMAND + "test_dry_run_of_the_command_needs_no_token_and_touches_nothing",
        "--seed": COMMAND + "test_seed_of_the_command_is_the_one_that_is_published",
    },
    "benchmark": dict.fromkeys(
        ("sections", "--sizes", "--rounds", "--lengths", "--compiled", "--json", "--docs"),
        OPTIONS + "test_options_of_the_benchmark",
    ),
}


def test_every_option_of_every_command_has_a_test():
    verbs = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    options = {
        verb: {max(action.option_strings, key=len, default=action.dest) for action in parser._actions} - {"--help"}
        for verb, parser in verbs.items()
    }
    assert options == {verb: set(tests) for verb, tests in TESTED.items()}
    for tests in TESTED.values():
        for path, name in (test.split("::") for test in tests.values()):
            assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


# ---- models and texts


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def save_model(folder: Path, tokenizer, layers: int = 1) -> str:
    config = GPT2Config(vocab_size=256, n_embd=16, n_layer=layers, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path, tokenizer):
    return save_model(tmp_path / "model", tokenizer)


@pytest.fixture
def results_of(tmp_path, tmp_path_factory, monkeypatch):
    """Runs a command that writes its results, and gives them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))

    def run(*command: str):
        path = tmp_path / "results.json"
        assert cli.main([*command, "--device", "cpu", "--json", str(path)]) == 0
        return json.loads(path.read_text())

    return run


@pytest.fixture
def configured(tmp_path):
    """A data set of two configurations, each with two splits and two columns of texts; the lengths tell them apart."""
    folder = tmp_path / "data"
    folder.mkdir()
    card = {"configs": []}
    for length, (name, split) in enumerate([(n, s) for n in ("one", "two") for s in ("train", "test")], 2):
        rows = [{"first": "a" * length + end, "second": "b" * (9 + length) + end} for end in "xyz"]
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("one", "two"):
        files = [{"split": split, "path": f"{name}-{split}.jsonl"} for split in ("train", "test")]
        card["configs"].append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return str(folder)


def test_options_of_texts_choose_what_is_read(model, configured, results_of):
    given = {"--config": "two", "--split": "train", "--text-column": "second", "--max-samples": "2"}
    for changes, tokens in (
        ({}, 2 * 14),
        ({"--config": "one"}, 2 * 12),
        ({"--split": "test"}, 2 * 15),
        ({"--text-column": "first"}, 2 * 5),
        ({"--max-samples": "1"}, 14),
    ):
        options = [word for option in {**given, **changes}.items() for word in option]
        command = ["measure", model, "--dataset", configured, *options]
        assert results_of(*command)["num_tokens"] == tokens, changes
        if changes in ({}, {"--config": "one"}):
            assert results_of(*command, "--streaming")["num_tokens"] == tokens
    # where the split is not named, it is the test one here: there is no validation
    options = ["--config", "two", "--text-column", "second"]
    assert results_of("measure", model, "--dataset", configured, *options)["num_tokens"] == 3 * 15
    # the same texts, and no others: no two perplexities are alike
    perplexities = {}
    for changes in ({}, *({name: None} for name in given)):
        named = {**given, **changes}
        named |= {"--config": "one"} if named["--config"] is None else {}
        named |= {"--text-column": "first"} if named["--text-column"] is None else {}
        options = [word for name, value in named.items() if value is not None for word in (name, value)]
        perplexities[str(changes)] = results_of("measure", model, "--dataset", configured, *options)["perplexity"]
    assert len({f"{perplexity:.6g}" for perplexity in perplexities.values()}) == 5
    options = [word for option in given.items() for word in option]
    bits = results_of("cost", model, "--fixed-point", "--dataset", configured, *options)["fixed_point"]
    assert bits["perplexity"] == pytest.approx(perplexities["{}"], rel=1e-6)


def test_batch_size_is_texts_in_a_forward_pass(model, configured, results_of, monkeypatch):
    sizes = []
    forward = GPT2LMHeadModel.forward

    def watched(self, input_ids, **kwargs):
        sizes.append(len(input_ids))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watched)
    texts = ["--dataset", configured, "--config", "one", "--text-column", "first"]
    found = [results_of("measure", model, *texts, "--batch-size", size) for size in ("1", "2")]
    # the first pass of each looks whether the model is causal
    assert sizes == [2, 1, 1, 1, 2, 2, 1]
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-6)
    sizes.clear()
    results_of("cost", model, "--fixed-point", *texts, "--batch-size", "2")
    assert sizes[1:3] == [2, 1]


def test_dtype_is_the_one_named(model, configured, results_of):
    texts = ["--dataset", configured, "--config", "one", "--text-column", "first"]
    found = {dtype: results_of("measure", model, *texts, "--dtype", dtype) for dtype in ("float32", "bfloat16")}
    assert {dtype: results["dtype"] for dtype, results in found.items()} == {name: name for name in found}
    assert found["float32"]["perplexity"] != found["bfloat16"]["perplexity"]


def test_code_that_comes_with_a_model_is_run_only_when_asked(tmp_path, tokenizer, configured, results_of, capsys):
    folder = tmp_path / "remote"
    tiny_model("SM+R", vocab_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "configuration_lnfree.py"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('model_type": "lnfree"', 'model_type": "unknown_to_all"')
                                   .replace('model_type = "lnfree"', 'model_type = "unknown_to_all"'))  # fmt: skip
    command = ["measure", str(folder), "--dataset", configured, "--config", "one", "--text-column", "first"]
    assert cli.main(command) == 1 and "trust_remote_code" in capsys.readouterr().err
    assert results_of(*command, "--trust-remote-code")["model_type"] == "unknown_to_all"


def test_revision_is_the_one_named(tmp_path, tokenizer, configured, results_of, monkeypatch):
    """Two revisions of one repository, with another number of layers each."""
    with HubServer().running() as server:
        read_from(server, monkeypatch, tmp_path / "hub")
        api = HfApi(endpoint=server.endpoint, token=TOKEN)
        api.create_repo("me/two")
        for layers, branch in ((1, "main"), (2, "other")):
            folder = save_model(tmp_path / branch, tokenizer, layers)
            if branch != "main":
                api.create_branch("me/two", branch=branch)
            api.upload_folder(repo_id="me/two", folder_path=folder, revision=branch)
        texts = ["--dataset", configured, "--config", "one", "--text-column", "first"]
        for layers, options in ((1, []), (2, ["--revision", "other"])):
            measured = results_of("measure", "me/two", *texts, *options)
            assert len(measured["attention_entropy"]["entropy"]) == layers
            counted = results_of("cost", "me/two", *options)["private_cost"]
            assert len(counted["forward"]["layers"]) == layers
            # its tokenizer comes from there too
            bits = results_of("cost", "me/two", "--fixed-point", *texts, *options)["fixed_point"]
            assert bits["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-4)
            attributed = tmp_path / "attributed.json"
            command = ["attribute", "me/two", "a", "--linearize", "--json", str(attributed)]
            assert cli.main([*command, *options]) == 0
            assert sum("MLP" in name for name in json.loads(attributed.read_text())["parts"]) == layers
            out = tmp_path / f"imported-{layers}"
            assert cli.main(["import", "me/two", str(out), *options]) == 0
            assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == layers


# ---- sweeps, pages, benchmark


def test_jobs_of_a_sweep_run_at_a_time(tmp_path, recipe_values, monkeypatch, capsys):
    """Processes that fail at once stand for those that train."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe_values))
    grids = {"recipe": "base.yaml", "output_dir": str(tmp_path / "runs"), "grids": [{"seed": [1, 2, 3, 4, 5]}]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(grids))
    alive, most, threads = [], [], set()

    class Process(subprocess.Popen):
        def __init__(self, command, env, **kwargs):
            alive.append(self)
            most.append(len(alive))
            threads.add(env["OMP_NUM_THREADS"])

        def poll(self):
            alive.remove(self)
            return 1

        def __del__(self):
            pass

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for jobs in (1, 3):
        most.clear(), threads.clear()
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--jobs", str(jobs)]) == 1
        assert "5 of 5 runs failed; the same command tries them again" in capsys.readouterr().err
        assert (len(most), max(most), threads) == (5, jobs, {str(12 // jobs)})


@pytest.fixture
def docs(tmp_path):
    """A folder of pages, beside which a README stands."""
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("none\n")
    return tmp_path / "docs"


def test_compare_puts_its_tables_into_the_pages(variant_runs, docs, tmp_path, capsys):
    (tmp_path / "four").mkdir()
    for variant in ("SM+LN+G", "SM+R"):
        (tmp_path / "four" / variant).symlink_to(variant_runs / variant)
    page = docs / "results.md"
    page.write_text("before\n<!-- table four-perplexity -->\n<!-- end -->\nafter\n")
    assert cli.main(["compare", str(tmp_path / "four"), "--docs", str(docs)]) == 0
    results = json.loads((variant_runs / "SM+R" / "results.json").read_text())
    text = page.read_text()
    assert f"| SM+R | 1337 | {results['perplexity']:.3f} |" in text and text.startswith("before") and "after" in text
    data = json.loads((docs / "data" / "four-perplexity.json").read_text())
    assert (data["commit"], data["versions"]) == (results["commit"], results["versions"])
    assert results["hardware"] in data["machine"] and data["command"] == f"lnfree compare {tmp_path / 'four'}"
    assert cli.main(["compare", str(tmp_path / "four"), "--docs", str(tmp_path)]) == 1
    assert "--docs must be the folder docs of a checkout" in capsys.readouterr().err


def test_options_of_the_benchmark(docs, tmp_path, monkeypatch, capsys):
    """Sections that tell their settings stand for those that measure."""
    told = []

    def section(name):
        def run(settings):
            told.append((name, settings))
            yield {"size": settings.sizes[0], "value": 1.5}

        return name.title(), run

    monkeypatch.setattr(benchmark, "SECTIONS", {name: section(name) for name in ("one", "two", "three")})
    (docs / "speed.md").write_text("<!-- table two-gpt2 -->\n<!-- end -->\n")
    path = tmp_path / "figures.json"
    options = ["--sizes", "gpt2", "quick", "--rounds", "3", "--lengths", "16", "32", "--compiled"]
    command = ["benchmark", "two", "one", *options, "--json", str(path), "--docs", str(docs)]
    assert cli.main(command) == 0
    assert [name for name, _ in told] == ["two", "one"]
    for _, settings in told:
        assert (settings.sizes, settings.rounds, settings.lengths) == (["gpt2", "quick"], 3, [16, 32])
        assert settings.compiled
    document = json.loads(path.read_text())
    assert document["sections"] == {name: [{"size": "gpt2", "value": 1.5}] for name in ("two", "one")}
    assert document["rounds"] == 3 and "medians of 3 rounds" in capsys.readouterr().out
    page = (docs / "speed.md").read_text()
    assert "| gpt2 | 1.50 |" in page and "`lnfree benchmark two --sizes gpt2 --rounds 3 --compiled`" in page
    told.clear()
    assert cli.main(["benchmark"]) == 0
    assert [name for name, _ in told] == ["one", "two", "three"] and not told[0][1].compiled
    assert (told[0][1].sizes, told[0][1].rounds) == (["quick"], 7)
