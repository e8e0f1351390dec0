"""What is copied to the Hub stands alone, and who may import whom."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["configuration_lnfree.py", "modeling_lnfree.py"])
def test_remote_code_imports_nothing_that_a_user_lacks(name):
    allowed = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}
    assert imports(PACKAGE / name) - allowed <= {".configuration_lnfree"}


def test_data_flows_one_way():
    for path in PACKAGE.rglob("*.py"):
        assert not imports(path) & {"training", "model_cards"}, path
    for path in (PACKAGE / "metrics").rglob("*.py"):
        assert not imports(path) & {"modeling_lnfree", ".modeling_lnfree", ".configuration_lnfree"}, path
    for path in (ROOT / "model_cards").glob("*.py"):
        assert not imports(path) & {"training", "modeling_lnfree"}, path


@pytest.mark.parametrize(
    "model_class",
    [LNFreeModel, LNFreeForCausalLM, LNFreeForSequenceClassification, LNFreeForTokenClassification],
)
def test_every_save_carries_the_code_and_names_every_class(model_class, tmp_path):
    model_class(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    for name in ("configuration_lnfree.py", "modeling_lnfree.py"):
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


def test_checkpoint_puts_the_code_where_the_trainer_pushes_from(tmp_path):
    model = LNFreeForCausalLM(tiny_config())
    names = ("configuration_lnfree.py", "modeling_lnfree.py")
    for folder in ("checkpoint-best", "model", "my-checkpoint-3"):
        model.save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "checkpoint-3", is_main_process=False)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    (tmp_path / names[0]).write_text("# of an older version\n")
    model.save_pretrained(str(tmp_path / "checkpoint-3"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()
    before = [(tmp_path / name).stat().st_mtime_ns for name in names]
    model.save_pretrained(tmp_path / "checkpoint-4")
    assert [(tmp_path / name).stat().st_mtime_ns for name in names] == before


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
