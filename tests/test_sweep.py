"""Sweeps: which runs a file means, and that they survive anything."""

import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from training import cli, runs, sweep
from training.catalog import RECIPES
from training.errors import UserError
from training.recipe import build_recipe, load_recipe
from training.train import checkpoints, loop, trainer

from .conftest import ROOT


STUDY = ROOT / "training" / "sweeps" / "study.yaml"
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """The runs' processes find the project from anywhere, and add up in the same order as the test's own process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_sweep(tmp_path, recipe_values):
    return functools.partial(write_sweep_into, tmp_path, recipe_values)


def write_sweep_into(folder: Path, recipe_values, grids, **common) -> Path:
    """A sweep of tiny runs, and the recipe that it takes."""
    values = {**recipe_values, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    content = {"recipe": "base.yaml", "output_dir": str(folder / "runs"), **common, "grids": grids}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "sweep.yaml"


def names(path) -> list[str]:
    return [run.folder.name for run in sweep.load_sweep(path)[1]]


# ---- which runs


def test_grids_are_products_in_folders_named_from_the_configuration(write_sweep):
    path = write_sweep(
        [
            {"seed": [1, 2], "variant": ["SM+LN+G", "SM+R"]},
            {"variant": "SM+LR-layer", "decay_slopes": [True, False]},
            {"variant": "SM+R", "learning_rate": [0.001, 3.0e-4], "block_size": [16, 32]},
            {"variant": "SM+R", "seed": 1},
        ],
        max_steps=6,
    )
    assert names(path) == [
        "gpt2-sm-ln-g-t16-seed1",
        "gpt2-sm-r-t16-seed1",
        "gpt2-sm-ln-g-t16-seed2",
        "gpt2-sm-r-t16-seed2",
        "gpt2-sm-lr-layer-t16-seed1337-decay_slopes-true",
        "gpt2-sm-lr-layer-t16-seed1337-decay_slopes-false",
        "gpt2-sm-r-t16-seed1337-learning_rate-0.001",
        "gpt2-sm-r-t32-seed1337-learning_rate-0.001",
        "gpt2-sm-r-t16-seed1337-learning_rate-0.0003",
        "gpt2-sm-r-t32-seed1337-learning_rate-0.0003",
    ]


def test_command_of_a_run_makes_its_recipe(write_sweep):
    path = write_sweep([{"variant": "SM+R", "learning_rate": 1e-05, "biased_projections": [["v_proj"]]}], seed=5)
    _, [run] = sweep.load_sweep(path)
    assert run.command[:4] == [sys.executable, "-P", "-m", "training.train"]
    recipe = load_recipe(run.command[4], run.command[5:])
    assert (recipe.data.variant, recipe.training["seed"], recipe.training["learning_rate"]) == ("SM+R", 5, 1e-05)
    assert recipe.build_config().biased_projections == ["v_proj"] and recipe.training["output_dir"] == str(run.folder)


def test_recipe_of_a_sweep_goes_by_name_or_by_a_path_from_its_folder(write_sweep, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    _, [job] = sweep.load_sweep(write_sweep([{"variant": "SM+R"}], recipe="quick"))
    assert "gpt2-sm-r-t128-seed1337" in job.folder.name and str(RECIPES / "quick.yaml") in job.command
    _, [job] = sweep.load_sweep(write_sweep([{"variant": "SM+R"}]))
    assert "gpt2-sm-r-t16-seed1337" in job.folder.name and str(tmp_path / "base.yaml") in job.command
    with pytest.raises(UserError, match="grids.0. of .*, variant=SM.R: recipe 'quik' is neither .* nearest: quick"):
        sweep.load_sweep(write_sweep([{"variant": "SM+R"}], recipe="quik"))


def test_budget_in_tokens_is_one_for_all_contexts(write_sweep):
    path = write_sweep([{"block_size": [16, 32]}], train_tokens=16 * 4 * 10)
    assert [run.max_steps for run in sweep.load_sweep(path)[1]] == [10, 5]


def test_study_is_the_one_that_it_says():
    _, runs = sweep.load_sweep(STUDY)
    recipes = [load_recipe(run.command[4], run.command[5:]) for run in runs]
    settings = {(recipe.build_config().backbone, recipe.data.block_size) for recipe in recipes}
    assert settings == {("gpt2", 128), ("pythia", 128), ("pythia", 256)}
    assert {recipe.data.train_tokens for recipe in recipes} == {819_200}
    assert len({run.folder for run in runs}) == len(runs)
    main = [recipe for run, recipe in zip(runs, recipes, strict=True) if re.search(r"seed\d+$", run.folder.name)]
    counts = Counter((recipe.build_config().backbone, recipe.data.block_size, recipe.data.variant) for recipe in main)
    of_the_paper, others = (
        ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R"),
        ("SM+LR0.01", "SM+LR0.1", "SM+LR-layer", "SM+LR-global"),
    )
    assert counts == {
        **{(*setting, variant): 3 for setting in settings for variant in of_the_paper},
        **{("gpt2", 128, variant): 1 for variant in others},
    }


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_stable_study_is_the_one_that_it_says():
    _, runs = sweep.load_sweep("stable")
    recipes = [load_recipe(run.command[4], run.command[5:]) for run in runs]
    # the rates were chosen with seed 2
    assert 2 not in {recipe.training["seed"] for recipe in recipes}
    seen = Counter(
        (recipe.build_config().variant, recipe.data.layer_optimizer, recipe.data.layer_learning_rate)
        for recipe in recipes
    )
    adamw, rates = ("adamw", None), {"SM+LN+G": 0.006, "SM+LN+R": 0.006}
    assert seen == {
        **{(f"{variant}@Stable", "muon", 0.012): 10 for variant in ("SM+G", "SM+R", "SM+LN+G")},
        **{(variant, "muon", rate): 5 for variant, rate in rates.items()},
        ("SM+LN+R@Stable", "muon", 0.012): 5,
        **{(variant, *adamw): 5 for variant in ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")},
        **{(variant, "muon", 0.012): 3 for variant in ("SM+G", "SM+R")},
        **{(f"{variant}@Stable", *adamw): 3 for variant in ("SM+G", "SM+R")},
    }
    assert {recipe.training["max_steps"] * recipe.tokens_per_step for recipe in recipes} == {819_200}


WRONG = [
    (
        {"grids": [{"variant": "SM+R", "learnin_rate": 1}]},
        "grids\\[0\\].*variant=SM\\+R.*'learnin_rate'.*'learning_rate'",
    ),
    ({"grids": [{"variant": ["SM+R", "SM+X"]}]}, "grids\\[0\\] of .*, variant=SM\\+X: variant must be"),
    ({"grids": [{}, {"optim": "foo"}]}, "grids\\[1\\] of .*optim=foo"),
    ({"grids": [{"max_steps": [5, -1]}]}, "needs a budget: max_steps or train_tokens"),
    ({"grids": [{"output_dir": "x"}]}, "output_dir is of the whole sweep"),
    ({"grids": [{"recipe": ["base.yaml", "none.yaml"]}]}, "recipe=none.yaml.*cannot be read"),
    ({"grids": [{"recipe": 3}]}, "recipe must be a name, or a path from the sweep's folder, got 3"),
    ({"grids": ["SM+R"]}, "grids\\[0\\] .* got 'SM\\+R'"),
    ({"grids": [{"variant": []}]}, "has no runs"),
    ({"grids": {"variant": "SM+R"}}, "must have a list 'grids'"),
    ({"grids": [{"variant": "SM+R"}], "sed": 3}, "unknown key 'sed'"),
    ({"grids": [{"seed": 1}, {"seed": 1, "recipe": "other.yaml"}]}, "grids\\[1\\].*another recipe has the folder"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_sweep_is_one_line_before_any_run_starts(write_sweep, tmp_path, content, message):
    path = write_sweep(**content)
    values = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**values, "learning_rate": 1.0}))
    with pytest.raises(UserError, match=message) as caught:
        sweep.sweep(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_changed_recipe_of_a_run_that_is_there_is_an_error(write_sweep):
    path = write_sweep([{"variant": "SM+R"}])
    _, [run] = sweep.load_sweep(path)
    (run.folder / "checkpoint-4").mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(load_recipe(run.command[4], run.command[5:]).to_dict()))
    assert len(sweep.load_sweep(path)[1]) == 1
    with pytest.raises(UserError, match="holds a run with max_steps=8, this recipe has 9"):
        sweep.load_sweep(write_sweep([{"variant": "SM+R"}], max_steps=9))
    with pytest.raises(UserError, match="--jobs must be at least 1, got 0"):
        sweep.sweep(path, jobs=0)


# ---- running


def table(runs_dir: Path) -> dict[str, tuple]:
    """Everything by which a sweep's result is judged, to the last bit."""
    found = {}
    for path in sorted(runs_dir.glob("*/results.json")):
        results = json.loads(path.read_text())
        weights = {
            name: value.numpy().tobytes() for name, value in load_file(path.parent / "model/model.safetensors").items()
        }
        records = [(path.parent / name).read_text() for name in ("attention_entropy.jsonl", "gradient_norm.jsonl")]
        found[path.parent.name] = (results["eval_loss"], results["attention_entropy"], weights, records)
    return found


def test_runs_in_turn_and_together_and_a_failure_stops_no_other(write_sweep, tmp_path, capsys):
    grids = [{"variant": ["SM+R", "SM+LN+G"]}, {"learning_rate": 1e30, "max_grad_norm": 0.0}]
    path = write_sweep(grids)
    assert cli.main(["sweep", str(path), "--jobs", "2"]) == 1
    out, err = capsys.readouterr()
    broken = "gpt2-sm-r-t16-seed1337-learning_rate-1e-30-max_grad_norm-0.0"
    assert re.search(rf"^{re.escape(broken)} +failed, step \d of 8: .* is unstable at step \d, layer 0: ", out, re.M)
    assert err == "lnfree sweep: error: 1 of 3 runs failed; the same command tries them again\n"
    # what a process of its own trains is what a call trains
    finished = table(tmp_path / "runs")
    assert list(finished) == ["gpt2-sm-ln-g-t16-seed1337", "gpt2-sm-r-t16-seed1337"]
    recipe = load_recipe(tmp_path / "base.yaml", ["variant=SM+R", f"output_dir={tmp_path / 'here' / 'run'}"])
    loop.train(recipe)
    assert table(tmp_path / "here")["run"] == finished["gpt2-sm-r-t16-seed1337"]

    # a finished run is never run again, one that another process holds is left to it
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("gpt2-*-seed1337/*.json*")}
    lock = FileLock(tmp_path / "runs" / broken / ".lock")
    lock.acquire()
    _, runs = sweep.load_sweep(path)
    assert sweep._advance(runs, jobs=2) and [run.state for run in runs] == ["finished", "finished", "elsewhere"]
    lock.release()
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_every_job_has_a_gpu_and_its_share_of_the_cores(write_sweep, monkeypatch):
    _, runs = sweep.load_sweep(write_sweep([{"seed": [1, 2, 3, 4]}]))
    started: list[dict] = []

    class Process:
        returncode = 1

        def __init__(self, command, env, **kwargs):
            self.running = True
            started.append({key: env[key] for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")})

        def poll(self):
            return None if self.running else self.returncode

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 13)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    monkeypatch.delenv("OMP_NUM_THREADS")
    sweep._advance(runs, jobs=3)
    # the second one ends, and the fourth takes its place
    runs[1].process.running = False
    sweep._advance(runs, jobs=3)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in started] == ["2", "5", "7", "5"]
    assert {environment["OMP_NUM_THREADS"] for environment in started} == {"4"}
    assert [run.state for run in runs] == ["running", "failed", "running", "running"]


def test_run_that_another_sweep_started_first_is_no_failure(write_sweep):
    path = write_sweep([{"variant": "SM+R"}])
    _, [run] = sweep.load_sweep(path)
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        sweep._start(run, jobs=1)
        assert run.process.wait(timeout=120) == 1
        assert sweep._outcome(run, 1) == ("elsewhere", "")
    assert sweep._outcome(run, 1)[1].startswith("another process is training in ")


def test_progress_tells_the_time_left(write_sweep, monkeypatch, capsys):
    _, runs = sweep.load_sweep(write_sweep([{"seed": [1, 2, 3]}], max_steps=100))
    moments = itertools.count(step=10)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(moments))
    progress = sweep._Progress(runs)
    runs[0].state = "running"
    progress.show()
    assert "0 of 3 runs done, unknown time left" in capsys.readouterr().out
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "speed.jsonl").write_text('{"step": 50}\n')
    # 50 steps in 10 s; 250 are left
    progress.began = (0, next(moments))
    assert progress._table() == ["  gpt2-sm-r-t16-seed1  step 50 of 100", "  0 of 3 runs done, 0 h 01 min left"]
    # 200 are left when it fails, and its 50 were made
    runs[0].state = "failed"
    progress.began = (0, next(moments))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: progress.began[1] + 60)
    assert progress._table() == ["  1 of 3 runs done, 0 h 04 min left"]


def test_variants_of_one_seed_see_the_same_batches(recipe_values, tmp_path, monkeypatch):
    batches: list[list] = []
    step = trainer.LNFreeTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        batches[-1].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.LNFreeTrainer, "training_step", training_step)
    for index, (variant, seed) in enumerate([("SM+LN+G", 1), ("SM+LR-layer", 1), ("SM+LN+G", 2)]):
        batches.append([])
        values = {**recipe_values, "variant": variant, "seed": seed, "output_dir": str(tmp_path / str(index))}
        loop.train(build_recipe(values))
    assert len(batches[0]) == 8 and batches[0] == batches[1] != batches[2]


# ---- interruption

GRIDS = [{"seed": [1, 2], "variant": ["SM+LN+G", "SM+R"]}]


def start_sweep(path: Path, log) -> subprocess.Popen:
    """In a session of its own, as in a terminal; a shell's background job would ignore Ctrl-C, and so its runs."""
    return subprocess.Popen(
        [sys.executable, "-m", "training.cli", "sweep", str(path), "--jobs", "2"],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, seconds: float = 300) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


LENGTH = {"max_steps": 200, "save_steps": 10, "eval_steps": 50}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, own_cache, recipe_values):
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        sweep.sweep(write_sweep_into(folder, recipe_values, GRIDS, **LENGTH), jobs=2)
    return table(folder / "runs")


@pytest.fixture
def long_sweep(write_sweep, unbroken):
    """A sweep of some seconds a run, and the table of one that was never interrupted."""
    return write_sweep(GRIDS, **LENGTH), unbroken


@pytest.mark.slow
def test_sweep_killed_at_twenty_random_moments_ends_with_the_unbroken_table(long_sweep, tmp_path):
    path, expected = long_sweep
    generator = random.Random(0)
    steps_at_kills: list[int] = []

    def last_write() -> int:
        return max((file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/*.jsonl")), default=0)

    with (tmp_path / "log").open("w") as log:
        while len(steps_at_kills) < 20:
            before = last_write()
            process = start_sweep(path, log)
            # every fifth kill falls anywhere, the others while runs are trained, saved and evaluated
            if len(steps_at_kills) % 5 == 0:
                time.sleep(generator.uniform(0, 10))
            else:
                assert wait_for(lambda: last_write() != before or process.poll() is not None)  # noqa: B023
                time.sleep(generator.uniform(0, 3))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                steps_at_kills.append(sum(run.step for run in sweep.load_sweep(path)[1]))
            else:
                # all was done before the twentieth kill: begin another one
                assert process.returncode == 0, (tmp_path / "log").read_text()
                assert table(tmp_path / "runs") == expected
                os.rename(tmp_path / "runs", tmp_path / f"runs-{len(steps_at_kills)}")
        process = start_sweep(path, log)
        assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert table(tmp_path / "runs") == expected
    # the kills fell into the work
    assert len({step for step in steps_at_kills if step > 0}) >= 8, steps_at_kills


@pytest.mark.slow
def test_runs_that_outlive_their_killed_sweep_are_left_to_end(long_sweep, tmp_path):
    path, expected = long_sweep
    with (tmp_path / "log").open("w") as log:
        process = start_sweep(path, log)
        assert wait_for(lambda: len(list((tmp_path / "runs").glob("*/speed.jsonl"))) == 2)
        # stopped, so that no run ends before the next sweep looks
        os.killpg(process.pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        next_sweep = start_sweep(path, log)
        assert wait_for(lambda: "running in another process" in (tmp_path / "log").read_text())
        os.killpg(process.pid, signal.SIGCONT)
        assert next_sweep.wait(timeout=600) == 0
    assert table(tmp_path / "runs") == expected


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interrupted_sweep_ends_its_runs_and_goes_on(long_sweep, tmp_path, signal_number):
    path, expected = long_sweep
    with (tmp_path / "log").open("w") as log:
        process = start_sweep(path, log)
        assert wait_for(lambda: any((tmp_path / "runs").glob("*/checkpoint-*")))
        # Ctrl-C reaches the whole foreground, a termination the sweep alone
        (os.killpg if signal_number == signal.SIGINT else os.kill)(process.pid, signal_number)
        assert process.wait(timeout=60) == 130
        assert (tmp_path / "log").read_text().splitlines()[-1] == "lnfree sweep: interrupted; the same command goes on"
        # nothing runs on: every lock is free
        assert not any(sweep._is_claimed(folder) for folder in (tmp_path / "runs").iterdir())
        assert start_sweep(path, log).wait(timeout=600) == 0
    assert table(tmp_path / "runs") == expected


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("NOT TESTED: a disk of 20 MB cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_is_one_line_and_keeps_the_last_whole_checkpoint(write_sweep, small_disk, tmp_path, capsys):
    # a checkpoint of some 4 MB, all of them kept
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "save_steps": 2, "max_steps": 40, "save_total_limit": None}
    path = write_sweep([{"variant": ["SM+R"]}], **sizes, output_dir=str(small_disk))
    assert cli.main(["sweep", str(path)]) == 1
    [run_dir] = small_disk.iterdir()
    written = runs.list_checkpoints(run_dir)
    assert 1 <= len(written) < 20 and checkpoints.find_damage(written[-1]) is None
    last = (run_dir / "train.log").read_text().splitlines()[-1]
    out = capsys.readouterr().out
    assert f"the last whole checkpoint is {written[-1].name}" in last and "cannot be written" in last, last
    assert f"the last whole checkpoint is {written[-1].name}" in out
    # with room again, the same command goes on and ends as on a large disk
    subprocess.run(["mount", "-o", "remount,size=900m", str(small_disk)], check=True)
    assert cli.main(["sweep", str(path)]) == 0
    assert cli.main(["sweep", str(write_sweep([{"variant": ["SM+R"]}], **sizes))]) == 0
    assert list(table(small_disk).values()) == list(table(tmp_path / "runs").values())


@pytest.mark.slow
def test_read_only_folder_is_one_line(write_sweep, small_disk, capsys):
    path = write_sweep([{"variant": "SM+R"}], output_dir=str(small_disk / "runs"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli.main(["sweep", str(path)]) == 1
    assert "cannot be written: Read-only file system" in capsys.readouterr().out
    recipe = load_recipe(path.with_name("base.yaml"), [f"output_dir={small_disk / 'run'}"])
    with pytest.raises(UserError, match="output_dir=.* cannot be written: Read-only file system"):
        loop.train(recipe)


def test_values_that_are_nothing_are_values(write_sweep):
    """Zero, false and null reach the recipe of their run, and are in the name of its folder."""
    path = write_sweep(
        [
            {"weight_decay": [0, 0.1], "variant": "SM+R"},
            {"decay_slopes": [False, True], "variant": "SM+LR-layer"},
            {"eval_sequences": [None, 3], "variant": "SM+G"},
        ]
    )
    _, jobs = sweep.load_sweep(path)
    recipes = {job.folder.name.split("seed1337-")[1]: load_recipe(job.command[4], job.command[5:]) for job in jobs}
    assert [recipes[f"weight_decay-{value}"].training["weight_decay"] for value in ("0", "0.1")] == [0, 0.1]
    assert [recipes[f"decay_slopes-{value}"].data.decay_slopes for value in ("false", "true")] == [False, True]
    assert [recipes[f"eval_sequences-{value}"].data.eval_sequences for value in ("null", "3")] == [None, 3]


def test_folder_of_a_sweep_is_named_from_its_file(write_sweep):
    path = write_sweep([{"variant": "SM+R"}])
    values = yaml.safe_load(path.read_text())
    del values["output_dir"]
    path.with_name("study-of-mine.yaml").write_text(yaml.safe_dump(values))
    folder, [job] = sweep.load_sweep(path.with_name("study-of-mine.yaml"))
    assert folder == Path("runs/study-of-mine") and job.folder.parent == folder


def test_how_a_run_ended_is_told(write_sweep):
    _, [job] = sweep.load_sweep(write_sweep([{"variant": "SM+R"}]))
    job.folder.mkdir(parents=True)
    log = job.folder / "train.log"
    log.write_text("a line\nlnfree train: error: no room\n\n")
    assert sweep._outcome(job, 1) == ("failed", "no room")
    assert sweep._outcome(job, -9) == ("failed", "killed by SIGKILL")
    log.write_text("")
    assert sweep._outcome(job, 3) == ("failed", "exit 3")
    # a status of 0 without results is no success
    assert sweep._outcome(job, 0)[0] == "failed"
    (job.folder / "results.json").write_text('{"perplexity": 12.3456}')
    assert sweep._outcome(job, 0) == ("finished", "")
    # it was kept from training by another process, which is done meanwhile
    assert sweep._outcome(job, 1) == ("finished", "")
    job.state = "finished"
    assert job.describe() == "finished, perplexity 12.346" and job.step == 8
