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

from .conftest import ROOT


def test_every_verb_has_help_with_an_example(capsys):
    def help_of(*verb: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            cli.main([*verb, "--help"])
        return capsys.readouterr().out

    verbs = re.findall(r"^    (\w+)(?: |$)", help_of(), re.MULTILINE)
    assert {"train", "sweep", "compare", "export", "measure", "import", "publish", "benchmark"} == set(verbs)
    for verb in verbs:
        assert f"example:\n  lnfree {verb} " in help_of(verb)


def test_help_imports_nothing_heavy():
    script = "import sys\nfrom training import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_users_error_is_one_line_and_no_traceback():
    command = [
        sys.executable,
        "-m",
        "training.cli",
        "train",
        str(ROOT / "training/recipes/quick.yaml"),
        "learnin_rate=1",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == (
        "lnfree train: error: unknown key 'learnin_rate' in the recipe; the nearest known one is 'learning_rate'\n"
    )


def test_interrupted_training_says_that_it_may_go_on(recipe_values, tmp_path):
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
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "lnfree train: interrupted; the same command goes on"
