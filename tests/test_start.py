"""The commands work wherever they are started, whatever modules of the same names lie there."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT
from .hub_server import TOKEN, HubServer


VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)


@pytest.fixture
def hostile(tmp_path):
    """A folder of a user's, whose own modules end every process that imports one of them."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("training", "data", "model_cards", "modeling_lnfree", "recipe", "errors", "plots"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py of the current folder')\n")
    return folder


def run(folder: Path, *command: str | Path, **environment: str) -> str:
    """Runs a command in the folder, without what tells Python where to look; returns all that it printed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    inherited |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, f"{command}: {process.stdout}"
    return process.stdout


def write_sweep(folder: Path, recipe_values: dict):
    """A recipe and a sweep of one run in the folder."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe_values, "max_steps": 2, "save_steps": 2}))
    sweep = {"recipe": "recipe.yaml", "output_dir": "runs", "grids": [{"variant": ["SM+R"]}]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))


def test_a_sweep_in_a_hostile_folder(hostile, recipe_values):
    lnfree = [sys.executable, "-P", "-m", "training.cli"]
    installed = importlib.metadata.version("lnfree")
    assert run(hostile, *lnfree, "--version", PYTHONPATH=str(ROOT)) == f"lnfree {installed}\n"
    write_sweep(hostile, recipe_values)
    assert "all runs are finished" in run(hostile, *lnfree, "sweep", "sweep.yaml", PYTHONPATH=str(ROOT))
    # the folder is hostile indeed
    with pytest.raises(AssertionError, match="imported training.py of the current folder"):
        run(hostile, sys.executable, "-m", "training.cli", "--version", PYTHONPATH=str(ROOT))


def test_a_shell_completes_verbs_and_options():
    pytest.importorskip("argcomplete")
    asked = {"lnfree comp": "compare", "lnfree export --he": "--help", "lnfree measure --stre": "--streaming"}
    for typed, expected in asked.items():
        environment = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed))}
        # what a shell's completion function does: the answer comes by descriptor 8
        command = f"{sys.executable} -m training.cli 8>&1 9>/dev/null >/dev/null"
        answer = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert answer.stdout.strip() == expected, (typed, answer)


@pytest.mark.slow  # builds the wheel, and starts every command
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_wheel_in_a_hostile_folder(installer, hostile, recipe_values, tmp_path):
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=unwanted)
    pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob("lnfree-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_dir = tmp_path / "venv" / "bin"
    python = bin_dir / "python"
    if installer == "pip":
        subprocess.run([python, "-I", "-m", "pip", "--quiet", "install", "--no-deps", wheel], check=True)
    else:
        uv = [sys.executable, "-I", "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel]
        subprocess.run(uv, check=True)
    # everything but the project from here
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site_packages / "base.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))

    lnfree = bin_dir / "lnfree"
    for package in ("modeling_lnfree", "training", "model_cards"):
        assert (site_packages / package / "py.typed").is_file()
    assert run(hostile, lnfree, "--version") == f"lnfree {VERSION}\n"
    assert "VERB" in run(hostile, lnfree, "--help")
    assert "quickstart" in run(hostile, lnfree, "recipes")
    assert "memory" in run(hostile, lnfree, "train", "quickstart", "--plan")
    assert "learning_rate" in run(hostile, lnfree, "train", "--fields")
    write_sweep(hostile, recipe_values)
    run(hostile, lnfree, "sweep", "sweep.yaml", "--jobs", "2")
    (run_dir,) = (hostile / "runs").glob("*/")
    torchrun = [python, "-P", "-m", "torch.distributed.run", "--no-python", "--nproc_per_node", "2"]
    trained = run(hostile, *torchrun, lnfree, "train", "recipe.yaml", "variant=SM+G", f"output_dir={run_dir}-two")
    assert "2 processes" in trained
    assert "SM+G" in run(hostile, lnfree, "compare", "runs")
    assert (hostile / "runs" / "report" / "report.html").is_file()
    assert "bit by bit" in run(hostile, lnfree, "export", run_dir, "export")
    corpus = recipe_values["dataset"]
    assert "perplexity" in run(hostile, lnfree, "measure", "export", "--dataset", corpus, "--max-samples", "4")
    assert "softmax" in run(hostile, lnfree, "cost", "export")
    with HubServer().running() as server:
        hub = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        run(hostile, lnfree, "publish", "runs", "--namespace", "me", "--dry-run", **hub)
    # it starts children of its own
    run(hostile, lnfree, "benchmark", "start", "--rounds", "1", "--json", "benchmark.json")
