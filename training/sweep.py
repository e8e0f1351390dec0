"""
Many runs from one YAML file: what is not finished is trained, each run in its own process and in a folder named from
its configuration. It may be interrupted anywhere and any number of times; the same command goes on.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .catalog import find_file, read_values
from .errors import UserError
from .files import read_records
from .recipe import Recipe, load_recipe
from .runs import LOCK, RESULTS, check_same_recipe, read_results


LOG = "train.log"
# which Recipe.name has already
KEYS_OF_THE_NAME = {"recipe", "variant", "seed", "block_size"}


@dataclass
class Job:
    """One run of a sweep: its command, its folder, and how far it is."""

    folder: Path
    command: list[str]
    max_steps: int
    state: str = "waiting"  # waiting, running, elsewhere, finished, failed
    reason: str = ""
    slot: int = 0
    process: subprocess.Popen | None = None

    @property
    def step(self) -> int:
        """The last step that is known of; its loss was logged."""
        if self.state == "finished":
            return self.max_steps
        records = read_records(self.folder / "speed.jsonl")
        return records[-1]["step"] if records else 0

    def describe(self) -> str:
        if self.state == "finished":
            return f"finished, perplexity {read_results(self.folder)['perplexity']:.3f}"
        if self.state == "failed":
            return f"failed, step {self.step} of {self.max_steps}: {self.reason} ({self.folder / LOG})"
        return "running in another process" if self.state == "elsewhere" else self.state


def sweep(path: str | Path, jobs: int = 1) -> Path:
    """
    Trains the runs of a sweep that are not finished, `jobs` at a time. A run that fails does not stop the others.

    Args:
        path: a name of `SWEEPS`, or a YAML file.
        jobs: runs at a time.

    Returns:
        The folder of the runs.

    Raises:
        UserError: before any run is started, for a sweep or a recipe in it that a person has to mend; afterwards, if
            a run failed.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    runs_dir, all_jobs = load_sweep(path)
    print(f"{len(all_jobs)} runs in {runs_dir}, {jobs} at a time", flush=True)
    progress = _Progress(all_jobs)
    try:
        while _advance(all_jobs, jobs):
            progress.show()
            time.sleep(0.5)
    finally:
        _stop([job.process for job in all_jobs if job.process is not None and job.state == "running"])
    progress.show_results()
    failed = [job for job in all_jobs if job.state == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(all_jobs)} runs failed; the same command tries them again")
    print(f"all runs are finished; lnfree compare {runs_dir}")
    return runs_dir


def load_sweep(path: str | Path) -> tuple[Path, list[Job]]:
    """
    The folder of a sweep, and a job for each of its runs, all checked.

    Raises:
        UserError: for a file that is no sweep, a recipe that is wrong (it names the run), two runs that would share
            a folder, and a folder that holds a run of another recipe.
    """
    path = find_file(path, "sweep")
    values = read_values(path, "sweep")
    if not isinstance(values.get("grids"), list):
        raise UserError(f"the sweep {path} must have a list 'grids', got {values.get('grids')!r}")
    runs_dir = Path(values.pop("output_dir", None) or f"runs/{path.stem}")
    grids = values.pop("grids")
    recipes: dict[Path, Recipe] = {}
    jobs = []
    for number, grid in enumerate(grids):
        if not isinstance(grid, dict):
            raise UserError(f"grids[{number}] of {path} must be lines of 'key: value', got {grid!r}")
        axes = [[(key, value) for value in (axis if isinstance(axis, list) else [axis])] for key, axis in grid.items()]
        for point in product(*axes):
            try:
                job, recipe = _load_job(path.parent, runs_dir, {**values, **dict(point)}, set(grid) - KEYS_OF_THE_NAME)
            except UserError as error:
                named = ", ".join(f"{key}={value}" for key, value in point)
                raise UserError(f"grids[{number}] of {path}, {named}: {error}") from None
            if job.folder not in recipes:
                recipes[job.folder] = recipe
                jobs.append(job)
            elif recipes[job.folder].to_dict() != recipe.to_dict():
                raise UserError(f"grids[{number}] of {path}: another recipe has the folder {job.folder} too")
    if not jobs:
        raise UserError(f"the sweep {path} has no runs: its grids are empty")
    return runs_dir, jobs


def _load_job(base: Path, runs_dir: Path, values: dict[str, Any], named_keys: set[str]) -> tuple[Job, Recipe]:
    if "output_dir" in values:
        raise UserError("output_dir is of the whole sweep; a run's folder is named from its configuration")
    if not isinstance(values.get("recipe"), str):
        raise UserError(f"recipe must be a name, or a path from the sweep's folder, got {values.get('recipe')!r}")
    recipe_path = find_file(values["recipe"], "recipe", base)
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "recipe"]
    recipe = load_recipe(recipe_path, overrides)
    suffixes = [re.sub(r"[^\w.-]+", "-", f"{key}-{json.dumps(values[key])}").strip("-") for key in sorted(named_keys)]
    folder = runs_dir / "-".join([recipe.name, *suffixes])
    overrides.append(f"output_dir={json.dumps(str(folder))}")
    recipe.training["output_dir"] = str(folder)
    max_steps = recipe.build_arguments().max_steps
    if max_steps < 1:
        raise UserError("a sweep needs a budget: max_steps or train_tokens")
    check_same_recipe(folder, recipe)
    # -P: a user's folder may hold modules of the same names
    command = [sys.executable, "-P", "-m", "training.train", str(recipe_path), *overrides]
    return Job(folder, command, max_steps), recipe


def _advance(all_jobs: list[Job], jobs: int) -> bool:
    """Looks at what runs, starts what may be started; False once there is nothing left to do."""
    for job in all_jobs:
        if job.process is not None and job.state == "running":
            status = job.process.poll()
            if status is not None:
                job.state, job.reason = _outcome(job, status)
        elif job.state in ("waiting", "elsewhere"):
            # a process that outlived its sweep, or that of another one, trains it: it is left to that
            if (job.folder / RESULTS).is_file():
                job.state = "finished"
            else:
                job.state = "elsewhere" if _is_claimed(job.folder) else "waiting"
    active = [job for job in all_jobs if job.state in ("running", "elsewhere")]
    waiting = [job for job in all_jobs if job.state == "waiting"]
    for job in waiting[: max(0, jobs - len(active))]:
        job.slot = min(set(range(jobs)) - {other.slot for other in active if other.state == "running"})
        _start(job, jobs)
        active.append(job)
    return bool(active)


def _outcome(job: Job, status: int) -> tuple[str, str]:
    # by this process, or by another one that kept it from training
    if (job.folder / RESULTS).is_file():
        return "finished", ""
    if _is_claimed(job.folder):
        # another sweep was quicker
        return "elsewhere", ""
    lines = [line for line in (job.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines() if line]
    if status < 0:
        return "failed", f"killed by {signal.Signals(-status).name}"
    return "failed", lines[-1].removeprefix("lnfree train: error: ") if lines else f"exit {status}"


def _is_claimed(folder: Path) -> bool:
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _start(job: Job, jobs: int):
    # more threads than cores make every one of them wait for the others
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if "," in devices:
        # one GPU a run: left to itself, the Trainer takes them all
        environment["CUDA_VISIBLE_DEVICES"] = devices.split(",")[job.slot % len(devices.split(","))]
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("a", encoding="utf-8") as log:
            job.process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        job.state = "running"
    except OSError as error:
        job.state, job.reason = "failed", f"{job.folder} cannot be written: {error.strerror}"


def _stop(processes: list[subprocess.Popen]):
    """Ends what still runs; every run goes on later from its last whole checkpoint."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Progress:
    """
    What the terminal shows: a line for each thing that happens, and a table of what runs now, which a terminal draws
    over and over, and a file receives once a minute.
    """

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.live = sys.stdout.isatty()
        self.states = ["waiting"] * len(jobs)
        self.drawn, self.drawn_at = 0, -math.inf
        self.began: tuple[int, float] | None = None

    def show(self):
        if self.began is None:
            self.began = self._steps(), time.monotonic()
        events = []
        for index, job in enumerate(self.jobs):
            if job.state != self.states[index]:
                self.states[index] = job.state
                events.append(f"{job.folder.name}: {job.describe()}")
        if self.live:
            print(f"\033[{self.drawn}A\033[J" if self.drawn else "", end="")
        for event in events:
            print(event)
        if self.live or time.monotonic() - self.drawn_at >= 60:
            lines = self._table()
            print("\n".join(lines))
            self.drawn, self.drawn_at = len(lines), time.monotonic()
        sys.stdout.flush()

    def _table(self) -> list[str]:
        active = [job for job in self.jobs if job.state in ("running", "elsewhere")]
        done = sum(job.state in ("finished", "failed") for job in self.jobs)
        width = max((len(job.folder.name) for job in active), default=0)
        lines = [f"  {job.folder.name:<{width}}  step {job.step} of {job.max_steps}" for job in active]
        lines.append(f"  {done} of {len(self.jobs)} runs done, {self._time_left()} left")
        columns = shutil.get_terminal_size().columns
        return [line[: columns - 1] for line in lines] if self.live else lines

    def _steps(self) -> int:
        return sum(job.step for job in self.jobs)

    def _time_left(self) -> str:
        """By the steps that all runs together made in this session."""
        if self.began is None:
            return "unknown time"
        step, moment = self.began
        made = self._steps() - step
        if made <= 0:
            return "unknown time"
        left = sum(job.max_steps - job.step for job in self.jobs if job.state != "failed")
        minutes = round(left * (time.monotonic() - moment) / made / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"

    def show_results(self):
        width = max(len(job.folder.name) for job in self.jobs)
        for job in self.jobs:
            print(f"{job.folder.name:<{width}}  {job.describe()}")
