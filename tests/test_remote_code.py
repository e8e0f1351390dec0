"""What is copied to the Hub stands alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from modeling_lnfree import (
    LNFreeForCausalLM,
    LNFreeForSequenceClassification,
    LNFreeForTokenClassification,
    LNFreeModel,
)

from .conftest import ROOT, tiny_config


PACKAGE = ROOT / "modeling_lnfree"


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file; a relative one keeps its dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(f".{node.module}" if node.level else node.module.split(".")[0])
    return names


REMOTE_CODE = ("configuration_lnfree.py", "modeling_lnfree.py", "parts_lnfree.py")


@pytest.mark.parametrize("name", REMOTE_CODE)
def test_remote_code_imports_nothing_that_a_user_lacks(name):
    allowed = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}
    assert imports(PACKAGE / name) - allowed <= {".configuration_lnfree", ".parts_lnfree"}


@pytest.mark.parametrize(
    "model_class",
    [LNFreeModel, LNFreeForCausalLM, LNFreeForSequenceClassification, LNFreeForTokenClassification],
)
def test_every_save_carries_the_code_and_names_every_class(model_class, tmp_path):
    model_class(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == sorted(REMOTE_CODE)
    for name in REMOTE_CODE:
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_checkpoint_of_the_trainer_puts_the_code_where_it_is_pushed_from(tmp_path):
    model = LNFreeForCausalLM(tiny_config())
    rows = [{"input_ids": [2, 3], "labels": [2, 3]}] * 2
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / REMOTE_CODE[0]).write_text("# a file of the user's\n")
    for folder in (tmp_path / "run", mine):
        arguments = TrainingArguments(folder, max_steps=1, save_steps=1, disable_tqdm=True, use_cpu=True)
        Trainer(model, arguments, train_dataset=rows).train()
        assert (folder / "checkpoint-1" / "config.json").is_file()
    for name in REMOTE_CODE:
        assert (tmp_path / "run" / name).read_bytes() == (PACKAGE / name).read_bytes()
    assert [path.name for path in mine.glob("*.py")] == [REMOTE_CODE[0]]
    assert (mine / REMOTE_CODE[0]).read_text() == "# a file of the user's\n"


@pytest.mark.parametrize("folder", ["checkpoint-3", "checkpoint-best", "model", "my-checkpoint-3"])
def test_saving_a_model_writes_into_the_named_folder_alone(folder, tmp_path):
    LNFreeForCausalLM(tiny_config()).save_pretrained(str(tmp_path / folder))
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_too_old_a_transformers_is_a_clear_error(tmp_path):
    script = (
        f"import sys, transformers\nsys.path.insert(0, {str(PACKAGE)!r})\ntransformers.__version__ = '5.17.9'\n"
        "import configuration_lnfree"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ImportError: LNFree models need transformers 5.18 or newer, found 5.17.9: pip install -U transformers"
    )
