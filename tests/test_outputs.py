"""What a command writes: plain files only, never over what it reads, and results that are told where it cannot."""

import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from training import cli
from training.errors import UserError
from training.files import check_outputs, to_json

from .conftest import ROOT, byte_tokenizer


TEXTS = ["hello world", "another text", "a" * 50, ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("outputs") / "a$\\frac$é"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder.parent / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


@pytest.fixture
def work(folder, monkeypatch):
    """The arguments of a measurement that leaves no cache, in whose folder the texts are."""
    monkeypatch.chdir(folder.parent)
    return ["measure", str(folder), "--dataset", "texts.txt", "--text-column", "text", "--streaming"]


def make(kind: str, path: Path):
    if kind == "link":
        path.with_name("target").write_text("kept")
        path.symlink_to("target")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("name", ["json_path", "heat_map_path", "parquet_path"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_what_is_no_plain_file_is_left_as_it_is(kind, name, tmp_path):
    path = Path("/dev/null") if kind == "device" else tmp_path / "out"
    make(kind, path)
    before = path.lstat().st_mode
    with pytest.raises(UserError, match=f"{name} must be a new or a plain file, got {path}, which is a {kind}"):
        check_outputs({name: path})
    assert path.lstat().st_mode == before
    assert kind != "link" or (tmp_path / "target").read_text() == "kept"


def test_inputs_are_not_overwritten(work, folder, capsys):
    for output in ("texts.txt", "./texts.txt", str(folder / "config.json")):
        before = Path(output).read_bytes()
        assert cli.main([*work, "--json", output]) == 1
        assert f"json_path must not overwrite what is read, got {Path(output)}" in capsys.readouterr().err
        assert Path(output).read_bytes() == before
    os.link("texts.txt", "same.txt")
    with pytest.raises(UserError, match="must not overwrite what is read"):
        check_outputs({"json_path": "same.txt"}, inputs=["texts.txt"])
    os.unlink("same.txt")


def test_two_outputs_do_not_share_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="parquet_path and json_path must be two files, got out for both"):
        check_outputs({"json_path": tmp_path / "out", "heat_map_path": None, "parquet_path": "./out"})
    Path("one").write_text("")
    os.link("one", "two")
    with pytest.raises(UserError, match="must be two files"):
        check_outputs({"json_path": "one", "parquet_path": "two"})


@pytest.mark.parametrize("path", ["", "-"])
def test_no_file_is_made_of_what_is_no_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"parquet_path must be a file, got '{path}'"):
        check_outputs({"parquet_path": path})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["a" * 250, "texts.txt/out", "a\0b"])
def test_place_that_takes_no_file_is_told_before_the_work(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        check_outputs({"json_path": path})
    assert sorted(os.listdir()) == ["texts.txt"]


def test_numbers_that_are_not_finite_are_null():
    document = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": "NaN", "e": True}}
    assert json.loads(to_json(document), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None, 2]],
        "b": {"c": None, "d": "NaN", "e": True},
    }


def test_texts_that_were_cut_or_left_out_are_told(work, capsys, tmp_path):
    outputs = {"--json": "out.json", "--heat-map": "out.png", "--parquet": "out.parquet"}
    options = [part for option, name in outputs.items() for part in (option, str(tmp_path / name))]
    assert cli.main([*work, *options]) == 0
    told = capsys.readouterr().out
    assert "1 of 4 texts are longer than max_length=40 tokens: the rest of them is left out" in told
    assert "1 of 4 texts are without a token: left out" in told
    assert json.loads((tmp_path / "out.json").read_text())["num_tokens"] == 11 + 12 + 40
    assert pq.read_table(tmp_path / "out.parquet")["num_tokens"].to_pylist() == [11, 12, 40]
    assert sorted(os.listdir(tmp_path)) == sorted(outputs.values())


def start(work, *options: str, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "training.cli", *work, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes, **kwargs)


def test_results_are_told_where_they_cannot_be_written(work, tmp_path):
    # as on a full disk: a file that is longer than 512 bytes cannot be written
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))}
    names = {"--json": "out.json", "--heat-map": "out.png", "--parquet": "out.parquet"}
    options = [f"{option}={tmp_path / name}" for option, name in names.items()]
    with start(work, *options, **limit) as process:
        out, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in error
    # ASCII is all that this terminal has
    assert re.search(r"a\$\\frac\$.* on 3 texts of texts.txt: perplexity \d+", out) and "xe9" in out
    last = error.splitlines()[-1]
    assert last.startswith("lnfree measure: error: ") and all(
        f"{name} cannot be written: " in last for name in names.values()
    )
    assert not list(tmp_path.iterdir())


def test_closed_output_is_no_error_and_files_are_written(work, tmp_path):
    with start(work, f"--json={tmp_path / 'out.json'}") as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in error and "error" not in error.lower().replace("stderr", "")
    assert json.loads((tmp_path / "out.json").read_text())["num_texts"] == 3


def test_working_folder_that_is_gone_is_one_line(work, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(work) == 1
    assert capsys.readouterr().err == "lnfree measure: error: the working folder is gone: go to another\n"
