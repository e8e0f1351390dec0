"""The command that plants defects: it sees what a test sees, tells what none does, and leaves the tree as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


DEFECT = {"file": "package/thing.py", "old": "a + b", "new": "a - b", "test": "tests/test_thing.py::test_sum"}


@pytest.fixture
def tree(tmp_path):
    """A project of one module, with a test that sees one of its two functions."""
    files = {
        "package/__init__.py": "",
        "package/thing.py": "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a\n",
        "tests/test_thing.py": "from package.thing import add, double\n\n\n"
        "def test_sum():\n    assert add(1, 2) == 3 and double(0) == 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def plant(tree: Path, *defects: dict, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    (tree / "tests" / "defects.jsonl").write_text("".join(json.dumps(defect) + "\n" for defect in defects))
    before = {path: path.read_bytes() for path in tree.glob("package/*.py")}
    command = [sys.executable, ROOT / "scripts" / "mutate.py", "--list", tree / "tests" / "defects.jsonl"]
    run = subprocess.run([*command, *options, "--preload"], capture_output=True, text=True)
    assert before == {path: path.read_bytes() for path in tree.glob("package/*.py")}
    return run.returncode, (run.stdout + run.stderr).splitlines()


def test_defect_is_seen_or_told(tree):
    unseen = {**DEFECT, "old": "2 * a", "new": "3 * a"}
    equal = {"file": "package/thing.py", "old": "2 * a", "new": "a + a", "equivalent": "the same"}
    status, lines = plant(tree, DEFECT, unseen, equal, options=("--jobs", "2"))
    assert status == 1 and lines[-1] == "1 of 2 seen, 1 equivalent"
    assert lines[-2] == "NOT SEEN by tests/test_thing.py::test_sum: package/thing.py: '2 * a' -> '3 * a'"
    status, lines = plant(tree, DEFECT, unseen, equal, options=("--only", "a - b"))
    assert status == 0 and len(lines) == 2 and lines[-1] == "1 of 1 seen, 0 equivalent"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "a * b"}, "0 times, and not once, in package/thing.py: 'a * b' -> 'a - b'"),
        ({"old": "a"}, "times, and not once, in package/thing.py: 'a' -> 'a - b'"),
        ({"file": "package/none.py"}, "0 times, and not once, in package/none.py"),
        ({"new": "a + b"}, "needs another text, and either a test or a reason"),
        ({"equivalent": "why"}, "needs another text, and either a test or a reason"),
    ],
)
def test_defect_that_cannot_be_planted_is_refused(tree, change, message):
    status, lines = plant(tree, {**DEFECT, **change})
    assert status == 1 and message in lines[0] and lines[-1] == "1 of 1 defects cannot be planted"


def test_tests_that_the_defects_of_this_project_name_exist():
    for line in (ROOT / "tests" / "defects.jsonl").read_text().splitlines():
        named = json.loads(line).get("test", [])
        for path, _, name in (test.partition("::") for test in ([named] if isinstance(named, str) else named)):
            assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_tests_that_fail_by_themselves_see_nothing(tree):
    (tree / "tests" / "test_thing.py").write_text("def test_sum():\n    assert False\n")
    status, lines = plant(tree, DEFECT)
    assert status == 1 and "the tests do not pass without a defect" in lines[-1]
    status, lines = plant(tree, {**DEFECT, "test": "tests/test_thing.py::test_other"})
    assert status == 1 and "the tests do not pass without a defect" in lines[-1]
