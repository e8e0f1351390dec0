"""`lnfree measure` of several models and revisions: tables, pictures, standard output, and what Ctrl-C keeps."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from transformers import GPT2LMHeadModel

from modeling_lnfree import measure
from training import cli, harness
from training.errors import UserError
from training.measured import find_steps, name_models, report, tabulate_measured
from training.plots import plot_steps

from ..conftest import ROOT
from ..hub_server import TOKEN, HubServer, read_from
from .naive import TEXTS, make, make_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two models and texts, one of them too long and one empty."""
    folder = tmp_path_factory.mktemp("work")
    for name, family in (("one", "gpt2"), ("two", "llama")):
        make(family).save_pretrained(folder / name)
        make_tokenizer(eos_token="b").save_pretrained(folder / name)
    rows = [*TEXTS, "abc" * 30, ""]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(work)


def run(*arguments):
    return cli.main(["measure", *map(str, arguments), "--dataset", "texts.jsonl", "--streaming", "--device", "cpu"])


def test_models_stand_side_by_side_with_differences_to_the_first(tmp_path, capsys):
    files = [tmp_path / name for name in ("m.json", "m.md", "m.png")]
    options = ["--int8", "--int8-clip", 0.9, "--json", files[0], "--markdown", files[1], "--heat-map", files[2]]
    assert run("one", "two", *options) == 0
    told, page = capsys.readouterr().out, files[1].read_text()
    first, second = json.loads(files[0].read_text())
    assert (first["model"], second["model"]) == ("one", "two")
    for label, values, digits in (
        ("perplexity", [first["perplexity"], second["perplexity"]], 3),
        ("bits per byte", [first["bits_per_byte"], second["bits_per_byte"]], 4),
        ("largest attention logit", [result["summary"]["max_logit"] for result in (first, second)], 2),
        ("perplexity, int8 by token", [result["int8"]["by token"]["perplexity"] for result in (first, second)], 3),
        ("perplexity, int8 by tensor", [result["int8"]["by tensor"]["perplexity"] for result in (first, second)], 3),
    ):
        cells = [f"{values[0]:,.{digits}f}", f"{values[1]:,.{digits}f} ({values[1] - values[0]:+,.{digits}f})"]
        assert f"| {label} | {cells[0]} | {cells[1]} |" in page
        assert re.search(rf"^{re.escape(label)} +{re.escape(cells[0])} +{re.escape(cells[1])}$", told, re.MULTILINE)
    assert "| perplexity, int8 by tensor, clipped at 0.9 | " in page
    left = (
        "1 of 7 texts are longer than max_length=64 tokens: the rest of them is left out; --stride and --rolling read"
    )
    assert told.count(left) == 2 and page.count(left) == 2 and page.count("1 of 7 texts are without a token") == 2
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_standard_output_holds_the_results_and_nothing_else(option):
    command = [sys.executable, "-m", "training.cli", "measure", "one", "--dataset", "texts.jsonl", "--streaming"]
    command += ["--rolling", "--max-length", "8", option] + ["-"] * (option == "--json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if option == "--json":
        found = json.loads(done.stdout)
        assert (found["rolling"], found["max_length"], found["truncated_texts"]) == (True, 8, 0)
    else:
        assert done.stdout.startswith(
            "# Measured\n\n6 texts of texts.jsonl; windows of 8 tokens, rolling.\n\n|  | one |"
        )
    assert "attention entropy: " in done.stderr


def test_ways_to_read_act(capsys):
    found = {}
    for options in ([], ["--stride", "4"], ["--rolling"], ["--concatenate"]):
        assert run("one", "--max-length", 8, *options, "--json", "-") == 0
        found["".join(options[:1])] = json.loads(capsys.readouterr().out)
    assert {way: result["truncated_texts"] for way, result in found.items()} == {
        **{"": 4, "--stride": 0, "--rolling": 0, "--concatenate": 0}
    }
    assert len({result["perplexity"] for result in found.values()}) == 4
    assert found["--rolling"]["predicted_tokens"] == found["--rolling"]["num_tokens"]
    assert found["--concatenate"]["num_texts"] == 1 and found["--stride"]["stride"] == 4
    said = {way: report([result])[1] for way, result in found.items()}
    assert said == {
        "": "6 texts of texts.jsonl; windows of 8 tokens.",
        "--stride": "6 texts of texts.jsonl; windows of 8 tokens, each 4 behind the last.",
        "--rolling": "6 texts of texts.jsonl; windows of 8 tokens, rolling.",
        "--concatenate": "All texts as one of texts.jsonl; windows of 8 tokens.",
    }


def test_revisions_of_a_model_are_a_film_strip_with_curves(tmp_path, monkeypatch):
    began = time.monotonic()
    with HubServer().running() as server:
        read_from(server, monkeypatch, tmp_path / "hub")
        api = HfApi(endpoint=server.endpoint, token=TOKEN)
        api.create_repo("me/model")
        for step in (8, 16, 128):
            torch.manual_seed(step)
            model = make("gpt2")
            with torch.no_grad():
                model.transformer.h[0].attn.c_attn.weight.mul_(step / 16)
            model.save_pretrained(tmp_path / str(step))
            make_tokenizer().save_pretrained(tmp_path / str(step))
            api.create_branch("me/model", branch=f"step-{step}")
            api.upload_folder(repo_id="me/model", folder_path=tmp_path / str(step), revision=f"step-{step}")
        revisions = ["step-8", "step-128", "step-16"]
        outputs = ["--json", tmp_path / "m.json", "--heat-map", tmp_path / "m.pdf"]
        assert run("me/model", "--revision", *revisions, *outputs) == 0
        # and from Python
        texts = [json.loads(line)["text"] for line in Path("texts.jsonl").read_text().splitlines()]
        found = measure("me/model", texts, revision="step-16", device="cpu")
    results = json.loads((tmp_path / "m.json").read_text())
    assert [result["revision"] for result in results] == revisions and find_steps(results) == [8, 128, 16]
    assert len({result["perplexity"] for result in results}) == 3
    assert found.perplexity == pytest.approx(results[2]["perplexity"], rel=1e-6)
    assert tabulate_measured(results).heads == ["", "model@step-8", "model@step-128", "model@step-16"]
    assert (tmp_path / "m.pdf").read_bytes().startswith(b"%PDF")
    # nothing is prepared of a stream, and a measurement lasts no longer than the whole of it
    assert not list((tmp_path / "datasets").rglob("*.arrow"))
    assert all(0 < result["seconds"] < time.monotonic() - began for result in results)


def test_a_film_strip_names_its_axes_and_spreads_steps_that_double():
    one = {"entropy": [[1.0, 0.5]], "max_entropy": [[2.0, 2.0]]}
    for steps, scale in (([2**n for n in range(11)], "symlog"), ([0, *range(10, 110, 10)], "linear")):
        figure = plot_steps([one] * 11, list(map(str, steps)), steps, {"perplexity": [9.0 - n / 2 for n in range(11)]})
        film, curves = figure.subfigs
        panels = film.axes[:12]
        assert [axis.get_visible() for axis in panels] == [True] * 11 + [False]
        # the last panel of the first row has none below it
        assert [axis.get_xlabel() for axis in panels[:11]] == [""] * 5 + ["head"] * 6
        assert [axis.get_ylabel() for axis in panels[:11]] == [*["layer", *[""] * 5], *["layer", *[""] * 4]]
        assert curves.axes[0].get_xscale() == scale


def test_names_tell_models_apart():
    def results(*sources):
        return [{"model": model, "revision": revision} for model, revision in sources]

    assert name_models(results(("a/x", None), ("b/y", "main"))) == ["x", "y@main"]
    assert name_models(results(("a/x", None), ("b/x", None))) == ["a/x", "b/x"]
    assert find_steps(results(("x", "main"), ("x", "step-4"))) == [0, 1]
    assert find_steps(results(("x", "one-4"), ("x", "two-4"))) == [0, 1]
    assert find_steps(results(("x", "step1000"), ("x", "v2-step-4"))) == [1000, 4]


def interrupt_after(number, monkeypatch, by=signal.SIGINT):
    """An interruption while the model reads its `number`-th batch of texts, behind the check that it is causal."""
    forward, passes = GPT2LMHeadModel.forward, []

    def watched(self, *args, **kwargs):
        passes.append(self)
        if len(passes) == number + 1:
            signal.raise_signal(by)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watched)
    return passes


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_what_was_read(by, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(by)
    passes = interrupt_after(2, monkeypatch, by)
    outputs = ["--json", tmp_path / "m.json", "--parquet", tmp_path / "m.parquet", "--heat-map", tmp_path / "m.png"]
    assert run("one", "--batch-size", 2, "--int8", *outputs) == 130
    assert len(passes) == 3
    output = capsys.readouterr()
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["interrupted"] and (found["num_texts"], found["num_tokens"]) == (4, 13 + 2 + 10 + 1)
    assert "int8" not in found and found["attention_entropy"]["num_queries"] == found["num_tokens"]
    assert "interrupted: what was read until then, 26 tokens, is measured" in output.out
    assert output.err.endswith("lnfree measure: interrupted\n")
    assert sorted(path.name for path in tmp_path.glob("m.*")) == ["m.json", "m.parquet", "m.png"]
    # and it is as ever afterwards
    assert signal.getsignal(by) is before


def test_int8_of_some_texts_is_not_kept(tmp_path, monkeypatch):
    # the measurement itself is over after four batches of the seven texts
    passes = interrupt_after(5, monkeypatch)
    assert run("one", "--batch-size", 2, "--int8", "--json", tmp_path / "m.json") == 130
    found = json.loads((tmp_path / "m.json").read_text())
    assert len(passes) == 6 and found["interrupted"] and found["num_texts"] == 6 and "int8" not in found


def test_figures_of_a_text_in_windows_follow_one_another(work, tmp_path):
    assert run("one", "--max-length", 8, "--rolling", "--batch-size", 2, "--parquet", tmp_path / "m.parquet") == 0
    first = pq.read_table(tmp_path / "m.parquet").to_pylist()[0]
    model, tokenizer = GPT2LMHeadModel.from_pretrained(work / "one").eval(), make_tokenizer(eos_token="b")
    tokens = [tokenizer.eos_token_id, *tokenizer(TEXTS[0])["input_ids"]]
    # 13 tokens: eight from the token that ends a text, and five with three before them
    with torch.no_grad():
        logits = [model(torch.tensor([part])).logits[0].log_softmax(-1) for part in (tokens[:8], tokens[5:13])]
    expected = [-logits[0][i, tokens[i + 1]].item() for i in range(8)]
    expected += [-logits[1][i - 5, tokens[i + 1]].item() for i in range(8, 13)]
    assert first["nll"] == pytest.approx(expected, abs=1e-5) and first["num_tokens"] == 13
    assert len(first["position_entropy"][0]) == 16


def test_models_before_the_one_that_fails_are_kept(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    assert run("one", tmp_path / "broken", "--json", tmp_path / "m.json") == 1
    assert "broken' cannot be measured" in capsys.readouterr().err
    (found,) = json.loads((tmp_path / "m.json").read_text())
    assert found["model"] == "one" and not found["interrupted"]


TASK = """task: letters
dataset_path: json
dataset_kwargs:
  data_files: {folder}/choices.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{first}}}}"
doc_to_choice: ["c", "d"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.mark.slow  # imports the harness
@pytest.mark.filterwarnings("default")
def test_tasks_are_handed_over_to_lm_eval(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lnfree[clients]'")
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps({"first": letter}) + "\n" for letter in "efgh"))
    (tmp_path / "letters.yaml").write_text(TASK.format(folder=tmp_path))
    assert run("one", "--tasks", tmp_path / "letters.yaml", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["letters"]
    model, tokenizer = make("gpt2"), make_tokenizer()
    with torch.no_grad():
        logits = torch.stack(
            [model(torch.tensor([tokenizer(letter)["input_ids"]])).logits[0, -1] for letter in "efgh"]
        )
    places = tokenizer("cd")["input_ids"]
    assert found["acc"] == pytest.approx((logits[:, places].argmax(-1) == 0).double().mean().item())
    with pytest.raises(UserError, match="lm-eval has no task nonsense: 'lm-eval ls tasks' lists them"):
        harness.check_tasks(f"{tmp_path / 'letters.yaml'}, nonsense")


def test_tasks_need_lm_eval_and_say_so_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run("one", "--tasks", "hellaswag") == 1
    error = capsys.readouterr().err
    assert error == (
        "lnfree measure: error: --tasks hands over to lm-eval, which is not installed: pip install 'lnfree[clients]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "two", "--parquet", "f.parquet"], "parquet_path is of one model"),
        (["one", "two", "--revision", "a", "b"], "several revisions are of one model, got 2 models"),
        (["one", "--revision", "a"], "revision='a' is of the Hub, and one is a folder"),
        (["one", "--json", "-", "--markdown"], "must be two files, got the standard output for both"),
        (["one", "--stride", "65"], "stride must be in 1 to 64, the length of a window, got 65"),
        (["one", "--stride", "4", "--rolling"], "stride and rolling are two ways to read a long text"),
        (["one", "--int8-clip", "0"], "int8_clip must be a quantile above 0 and at most 1, got 0.0"),
        (["one", "--tasks", ","], "tasks must name tasks of lm-eval"),
        (["one", "./three"], "model './three' is neither a folder nor an id of the Hub"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(arguments, message, capsys):
    assert run(*arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lnfree measure: error: ")]
    assert len(error) == 1 and message in error[0]
