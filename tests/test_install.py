"""An installed project registers its classes with the Auto classes when it is imported, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from modeling_lnfree import LNFreeForCausalLM

from .conftest import ROOT, byte_tokenizer, tiny_config


LOCAL = """
import transformers
from transformers import pipeline
names = ("AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
         "AutoModelForTokenClassification")
for folder in ("with_code", "without_code"):
    for name in names:
        loaded = getattr(transformers, name).from_pretrained(folder)
        ours = type(loaded).__module__.startswith("modeling_lnfree.") and type(loaded).__name__.startswith("LNFree")
        assert ours or name == "AutoTokenizer", (folder, name, type(loaded))
    generate = pipeline("text-generation", folder)
    assert type(generate.model).__module__ == "modeling_lnfree.modeling_lnfree"
    assert generate("def f", max_new_tokens=3)[0]["generated_text"].startswith("def f")
import modeling_lnfree
model = transformers.AutoModelForCausalLM.from_pretrained("with_code")
assert type(model) is modeling_lnfree.LNFreeForCausalLM
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes run: one saved model, with the code files beside it and without them."""
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer().save_pretrained(folder / "with_code")
    LNFreeForCausalLM(tiny_config(vocab_size=256)).save_pretrained(folder / "with_code")
    shutil.copytree(folder / "with_code", folder / "without_code", ignore=shutil.ignore_patterns("*.py"))
    return folder


def run(code: str, folder: Path, python: str | Path = sys.executable):
    """In a process that has the project neither in its folder nor in its environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([python, "-I", "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process


def test_importing_the_project_registers_the_type(folder):
    run(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport modeling_lnfree\n{LOCAL}", folder)


@pytest.mark.slow  # builds the project
@pytest.mark.parametrize("option", [[], ["--editable"]], ids=["plain", "editable"])
def test_pip_installs_and_removes_it(option, folder, tmp_path):
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=unwanted)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    # everything but the project from here
    (site_packages / "base.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", *option, source], check=True)
    run(f"import modeling_lnfree\n{LOCAL}", folder, python)
    shutil.rmtree(source)  # an editable install that has lost its folder stays silent
    assert run("import transformers", folder, python).stderr == ""
    subprocess.run([*pip, "uninstall", "--yes", "lnfree"], check=True, capture_output=True)
    assert not [path for path in site_packages.rglob("*lnfree*") if "__pycache__" not in path.parts]
