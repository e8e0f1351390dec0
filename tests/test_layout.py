"""The house: who imports whom, that each verb loads only what it needs, and that no file grows past what one reads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT


PACKAGES = ("modeling_lnfree", "model_cards", "training")
# from the ground up: a module imports of its own floor and of those below it
FLOORS = (
    (
        "training.catalog",
        "training.effects",
        "training.errors",
        "training.files",
        "training.methods",
        "training.recipe",
        "training.tables",
    ),
    (
        *(
            "training.runs",
            "training.data",
            "training.json_texts",
            "training.texts",
            "training.plots",
            "training.quantities",
        ),
        *("training.encryption", "training.convert", "training.fields", "training.pages"),
        *("training.parametrization", "training.measured", "training.harness"),
    ),
    (
        *("training.train", "training.sweep", "training.compare", "training.hub", "training.measure"),
        *("training.attribute", "training.cost", "training.benchmark", "training.remove_norms"),
    ),
    ("training.cli",),
)
VERBS = FLOORS[2]
METRICS = "modeling_lnfree.metrics"
# which verb runs another
RUNS = {
    ("training.benchmark", "training.train"),
    ("training.remove_norms", "training.train"),
    ("training.remove_norms", "training.hub"),
}
# an entry point for launchers that start a module
ENTRY_POINTS = {"training.train.__main__"}


def modules() -> dict[str, Path]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Names of the project's modules that a module imports, anywhere in its file."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for each in found:
            # of `from .errors import UserError` the module
            while each and each not in MODULES:
                each = each.rpartition(".")[0]
            if each:
                yield each


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}


def room(module: str) -> str | None:
    """The name among `FLOORS` that a module belongs to."""
    return next((name for floor in FLOORS for name in floor if f"{module}.".startswith(f"{name}.")), None)


def floor(module: str) -> int:
    return next((number for number, names in enumerate(FLOORS) if room(module) in names), -1)


def test_every_module_has_a_floor():
    assert [name for name in MODULES if name.startswith("training.") and room(name) is None] == []


def test_no_module_imports_from_a_floor_above():
    above = {f"{name} -> {other}" for name in GRAPH for other in GRAPH[name] if floor(other) > floor(name)}
    assert above == {f"{name} -> training.cli" for name in ENTRY_POINTS}


def test_no_verb_imports_another():
    found = {
        (room(name), room(other))
        for name in GRAPH
        for other in GRAPH[name]
        if room(name) in VERBS and room(other) in VERBS and room(name) != room(other)
    }
    assert found == RUNS


def test_there_is_no_circle():
    # static_order raises CycleError, whose message is the circle
    list(TopologicalSorter(GRAPH).static_order())
    rooms: dict[str, set[str]] = {}
    for name in GRAPH.keys() - ENTRY_POINTS:
        rooms.setdefault(room(name) or name, set()).update(room(other) or other for other in GRAPH[name])
    list(TopologicalSorter({name: others - {name} for name, others in rooms.items()}).static_order())


def test_the_model_family_and_the_cards_stand_alone():
    for name, others in GRAPH.items():
        own = name.split(".")[0]
        if own != "training":
            assert {other.split(".")[0] for other in others} <= {own}, name
        # a metric's folder is copied by itself
        if name.startswith(f"{METRICS}."):
            assert all(f"{other}.".startswith(f"{METRICS}.") for other in others), name


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "scripts"])
def test_no_file_is_above_600_lines(folder):
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {path.name: number for path, number in lines.items() if number > 600} == {}


def run_without(blocked: list[str], *arguments: object) -> subprocess.CompletedProcess:
    """The command in a process of its own in which some packages and modules cannot be imported."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: as if it were not there
import torch
if "torch.distributed.checkpoint" in {blocked!r}:
    # a build of torch without it says so, and transformers does not import it for itself
    torch.distributed.is_available = lambda: False
from training import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_comparing_loads_no_training(variant_runs, tmp_path):
    blocked = ["torch.distributed.checkpoint", "training.train", "torchdata", "evaluate"]
    run = run_without(blocked, "compare", variant_runs, "--output", tmp_path / "report")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "report" / "report.html").is_file()


def test_measuring_needs_no_evaluate(variant_runs, corpus, tmp_path):
    blocked = ["evaluate", "torchdata", "training.train", "training.encryption", "training.compare", "training.hub"]
    arguments = ["measure", variant_runs / "SM+R" / "model", "--dataset", corpus, "--max-samples", "2"]
    run = run_without(blocked, *arguments, "--device", "cpu", "--heat-map", tmp_path / "map.png")
    assert run.returncode == 0, run.stderr
    assert "attention entropy: " in run.stdout


def test_counting_needs_neither_weights_nor_training(variant_runs):
    blocked = ["evaluate", "torchdata", "training.train", "training.compare", "training.hub"]
    run = run_without(blocked, "cost", variant_runs / "SM+R" / "model")
    assert run.returncode == 0, run.stderr
    assert "private cost of one forward pass" in run.stdout


def test_training_without_a_stream_needs_no_torchdata(recipe_values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe_values, "max_steps": 2, "save_steps": 2}))
    blocked = ["torchdata", "evaluate", "training.compare", "training.hub", "training.encryption"]
    run = run_without(blocked, "train", path, f"output_dir={tmp_path / 'run'}")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "results.json").is_file()
