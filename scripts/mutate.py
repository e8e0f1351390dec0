"""
Plants defects and tells which of them the tests do not see:

    .venv/bin/python scripts/mutate.py [--only WORD ...] [--jobs N]

A line of tests/defects.jsonl is one defect: `file`, the text `old` that stands in it once, `new` in its place, and
`test`, the node id that is expected to fail then, or several; or `equivalent`, why none could. Each is planted in a
copy of the tree, never in the tree itself. The tests must pass in a copy without a defect first.

torch, transformers and what else takes seconds are imported once: every defect has a process of its own that is forked
from there, before anything of the project is loaded.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


# of all that the tests import, what takes time and is not the project's
PRELOADED = (
    *("pytest", "hypothesis", "torch", "transformers", "datasets", "evaluate", "safetensors.torch"),
    *("matplotlib.figure", "scipy.stats", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt_neox.modeling_gpt_neox"),
    *("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.export"),
    "torch.nn.attention.flex_attention",
)
# seconds of one defect; what does not end is seen
LONGEST = 600
OTHER_MODULES = 70


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, default=Path(__file__).parents[1] / "tests" / "defects.jsonl")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="defects whose line has one of these")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="defects at a time (default: 1)")
    parser.add_argument("--preload", nargs="*", default=PRELOADED, metavar="MODULE", help="imported once, for all")
    options = parser.parse_args(argv)
    # the tree is that in whose folder tests/ the list lies
    root = options.list.resolve().parents[1]
    lines = options.list.read_text(encoding="utf-8").splitlines()
    defects = [json.loads(line) for line in lines if line.strip() and any(word in line for word in options.only)]
    wrong = [problem for defect in defects if (problem := find_problem(root, defect))]
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    if wrong or not defects:
        print(f"{len(wrong)} of {len(defects)} defects cannot be planted")
        return 1
    planted = [defect for defect in defects if "equivalent" not in defect]
    for module in options.preload:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="lnfree-defects-") as aside:
        copies = [copy_tree(root, Path(aside) / str(job)) for job in range(max(1, options.jobs))]
        unseen = run_all(planted, copies)
    for defect in unseen:
        print(f"NOT SEEN by {', '.join(tests_of(defect))}: {describe(defect)}")
    print(f"{len(planted) - len(unseen)} of {len(planted)} seen, {len(defects) - len(planted)} equivalent")
    return 1 if unseen else 0


def find_problem(root: Path, defect: dict) -> str | None:
    """What forbids to plant a defect."""
    path = root / defect["file"]
    number = path.read_text(encoding="utf-8").count(defect["old"]) if path.is_file() else 0
    if number != 1:
        return f"{number} times, and not once, in {describe(defect)}"
    if defect["old"] == defect["new"] or ("test" in defect) == ("equivalent" in defect):
        return f"needs another text, and either a test or a reason: {describe(defect)}"
    return None


def describe(defect: dict) -> str:
    return f"{defect['file']}: {defect['old']!r} -> {defect['new']!r}"


def tests_of(defect: dict) -> list[str]:
    return [defect["test"]] if isinstance(defect["test"], str) else defect["test"]


def copy_tree(root: Path, copy: Path) -> Path:
    """A copy of what git tracks or would, as it is in the working tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy / name)
    return copy


def run_all(defects: list[dict], copies: list[Path]) -> list[dict]:
    """Those that are not seen; ends the process if the tests fail without a defect."""
    whole = start(copies[0], sorted({test for defect in defects for test in tests_of(defect)}))
    whole.join()
    check(copies[0], whole.exitcode == 0)
    waiting, free, unseen = list(defects), list(copies), []
    running: dict[Any, tuple[BaseProcess, dict, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            defect, copy = waiting.pop(0), free.pop()
            plant(copy, defect)
            process = start(copy, tests_of(defect))
            running[process.sentinel] = (process, defect, copy, time.monotonic())
        ended = wait(list(running), timeout=1)
        for sentinel, (process, defect, copy, began) in list(running.items()):
            seconds = time.monotonic() - began
            if sentinel not in ended and seconds < LONGEST:
                continue
            process.kill()
            process.join()
            check(copy, process.exitcode != OTHER_MODULES)
            if process.exitcode == 0:
                unseen.append(defect)
            print(f"{'seen' if process.exitcode else 'NOT SEEN':8} {seconds:5.1f} s  {describe(defect)}", flush=True)
            restore(copy, defect)
            free.append(running.pop(sentinel)[2])
    return unseen


def start(copy: Path, tests: list[str]) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, tests))
    process.start()
    return process


def check(copy: Path, is_right: bool):
    if not is_right:
        log = (copy.parent / f"{copy.name}.log").read_text(encoding="utf-8", errors="replace")
        sys.exit(f"{log[-6000:]}\nthe tests do not pass without a defect, or not with the modules of the copy")


def plant(copy: Path, defect: dict):
    path = copy / defect["file"]
    shutil.copyfile(path, copy.parent / f"{copy.name}.original")
    path.write_text(path.read_text(encoding="utf-8").replace(defect["old"], defect["new"]), encoding="utf-8")


def restore(copy: Path, defect: dict):
    shutil.copyfile(copy.parent / f"{copy.name}.original", copy / defect["file"])


def run_tests(copy: Path, tests: list[str]):
    """In a forked process: the tests of a copy, by its own modules; ends it by pytest's status, or `OTHER_MODULES`."""
    log = os.open(copy.parent / f"{copy.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    # a file that changes twice in a second would be taken for its earlier bytes
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    import pytest

    temporary = copy.parent / f"{copy.name}.tmp"
    # what is imported already cannot be rewritten, and what fails need not be explained
    options = ("-x", "-q", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={temporary}")
    status = pytest.main([*tests, *options])
    packages = {path.parent.name for path in copy.glob("*/__init__.py")}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in packages and file and not Path(file).is_relative_to(copy):
            print(f"{name} was loaded from {file}")
            status = OTHER_MODULES
    sys.stdout.flush()
    os._exit(int(status))


if __name__ == "__main__":
    sys.exit(main())
