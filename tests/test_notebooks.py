"""The notebooks of docs: what they show is there, they name no machine, and a slow test runs them."""

import ast
import importlib
import json
import os
import re
import shutil
import sys

import pytest

from .conftest import ROOT


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def plain(source):
    """Without what IPython alone understands."""
    return re.sub(r"^( *)[%!].*", r"\1pass", source, flags=re.MULTILINE)


def test_there_are_three_and_pages_name_them():
    pages = [(ROOT / "docs" / name).read_text() for name in ("entropy.md", "interpretability.md", "encryption.md")]
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert any(f"(notebooks/{path.name})" in page for page in pages), path.name


@every_notebook
def test_a_notebook_is_whole_and_shows_what_it_computed(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # what a reader with another machine could not follow
    elsewhere = r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users)/|index-url|https?://(?!arxiv)"
    assert not re.search(elsewhere, path.read_text())


@every_notebook
def test_a_notebook_imports_what_there_is_and_begins_with_its_installation(path):
    sources = [source_of(cell) for cell in code_cells(json.loads(path.read_text()))]
    assert "find_spec" in sources[0] and "scripts/setup.sh" in sources[0]
    for source in sources:
        for node in ast.walk(ast.parse(plain(source))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@every_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join(source_of(cell) for cell in cells if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert targets and all((path.parent / target).exists() for target in targets)


def source_of(cell):
    return "".join(cell["source"])


def kinds_of_outputs(notebook):
    """Of every cell, what it shows."""
    return [[sorted(output.get("data", ["text"])) for output in cell["outputs"]] for cell in code_cells(notebook)]


@pytest.mark.slow  # trains small models
@pytest.mark.filterwarnings("default")
@every_notebook
def test_a_notebook_runs_from_its_first_cell_to_its_last(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="scripts/test_slow.sh installs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    copy = shutil.copy(path, tmp_path)
    # the kernel is this Python, whatever others are registered
    kernel = tmp_path / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    before = nbformat.read(copy, as_version=4)
    nbformat.validate(before)
    after = nbformat.read(copy, as_version=4)
    where = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(after, timeout=600, kernel_name="python3", resources=where).execute()
    assert kinds_of_outputs(after) == kinds_of_outputs(before)
