"""The command `lnfree`: its help, its errors, and what an interruption says."""

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import yaml

from training import cli
from training.recipe import DATA_FIELDS, MODEL_FIELDS, REFUSED, TRAINING_FIELDS, load_recipe

from .conftest import ROOT


def test_every_verb_has_help_with_an_example(capsys):
    def help_of(*verb: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            cli.main([*verb, "--help"])
        return capsys.readouterr().out

    verbs = re.findall(r"^    ([\w-]+)(?: |$)", help_of(), re.MULTILINE)
    assert {
        *("train", "recipes", "sweep", "compare", "export", "measure", "cost", "import", "remove-norms", "publish"),
        *("attribute", "benchmark"),
    } == set(verbs)
    for verb in verbs:
        assert re.search(rf"example:\n  lnfree {verb}( |\n|$)", help_of(verb))


@pytest.mark.parametrize("word", ["--help", "recipes"])
def test_what_only_prints_imports_nothing_heavy(word):
    script = f"import sys\nfrom training import cli\ntry: cli.main(['{word}'])\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_users_error_is_one_line_and_no_traceback():
    command = [
        sys.executable,
        "-m",
        "training.cli",
        "train",
        "quick",
        "learnin_rate=1",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == (
        "lnfree train: error: unknown key 'learnin_rate' in the recipe; the nearest known one is 'learning_rate'\n"
    )


def test_docstrings_that_are_stripped_are_one_line():
    command = [sys.executable, "-OO", "-m", "training.cli", "cost", "SM+R"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == "lnfree cost: error: python -OO strips the docstrings that transformers reads: use -O\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_says_that_it_may_go_on(number, recipe_values, tmp_path):
    path = tmp_path / "recipe.yaml"
    values = {**recipe_values, "max_steps": 100_000, "save_steps": 10, "output_dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "training.cli", "train", str(path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    # as a person would: again, if the first falls into a place where Python cannot raise it; not so soon that it falls
    # into the process's end
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "lnfree train: interrupted; the same command goes on"


def test_recipes_and_sweeps_are_listed_with_one_line_each(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind in ("recipes", "sweeps"):
        for path in (ROOT / "training" / kind).glob("*.yaml"):
            first = path.read_text().splitlines()[0]
            assert first.startswith("# ") and first.endswith((".", ":"))
            assert [line.split(maxsplit=1) for line in lines].count([path.stem, first[2:]]) == 1


def test_fields_are_listed_with_type_default_and_help(capsys):
    assert cli.main(["train", "--fields"]) == 0
    listed = dict(re.findall(r"^(\w+): (.+)\n    ", capsys.readouterr().out, re.MULTILINE))
    assert listed.keys() == (DATA_FIELDS | MODEL_FIELDS | TRAINING_FIELDS) - REFUSED.keys()
    assert listed["block_size"] == "int = 128" and listed["hidden_size"] == "int = 768"
    assert listed["learning_rate"] == "float = 5e-05" and listed["milestones"] == "list[int] | None = None"
    assert listed["lr_scheduler_type"].endswith("= linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a recipe: 'lnfree recipes' lists them"),
        (
            ["train", "quik"],
            "recipe 'quik' is neither a file nor one that 'lnfree recipes' lists; the nearest: quick, ",
        ),
        (["sweep", "stud"], "sweep 'stud' is neither a file nor one that 'lnfree recipes' lists; the nearest: study"),
        (["train", "quick.yaml"], "the recipe quick.yaml cannot be read: "),
        (["train", "./quick"], "the recipe quick cannot be read: "),
        (["train", "quick", "--processes", "2"], "--processes and --flops are of --plan; torchrun starts processes"),
    ],
)
def test_wrong_name_is_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lnfree {arguments[0]}: error: {message}") and error.count("\n") == 1


def test_file_that_is_there_is_no_name(tmp_path, monkeypatch, recipe_values):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quick").model["hidden_size"] == 128
    (tmp_path / "quick").write_text(yaml.safe_dump({**recipe_values, "hidden_size": 64}))
    assert load_recipe("quick").model["hidden_size"] == 64
