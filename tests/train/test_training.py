"""Training, comparison and export from end to end, on a corpus and models that take seconds."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_lnfree import LNFreeForCausalLM
from modeling_lnfree.likelihood import to_perplexity
from training import cli, data, files, runs
from training.errors import UserError
from training.recipe import build_recipe
from training.train import callbacks, loop, stability, trainer

from ..conftest import ROOT, interrupting, one_more_callback


pytestmark = pytest.mark.usefixtures("own_cache")


def eval_blocks(values):
    recipe = build_recipe(values)
    documents = data.load_documents(recipe.data, recipe.training["seed"])
    tokenizer = data.load_tokenizer(recipe.data, documents["train"], recipe.model["vocab_size"])
    return data.tokenize_blocks(documents, tokenizer, recipe.data)["eval"]["input_ids"][:]


# ---- what a run measures


def test_perplexity_is_exp_of_summed_nll_over_all_tokens(variant_runs, recipe_values):
    blocks = eval_blocks(recipe_values)
    model = LNFreeForCausalLM.from_pretrained(variant_runs / "SM+R" / "model").eval().double()
    with torch.no_grad():
        log_probs = model(blocks).logits.log_softmax(-1)[:, :-1]
    nll = -log_probs.gather(-1, blocks[:, 1:, None]).sum().item()
    results = runs.read_results(variant_runs / "SM+R")
    assert results["eval_tokens"] == blocks[:, 1:].numel()
    assert results["perplexity"] == pytest.approx(math.exp(nll / blocks[:, 1:].numel()), rel=1e-5)


def test_perplexity_of_a_loss_that_is_too_large_for_one_is_infinite():
    assert to_perplexity(1e4) == math.inf


def naive_entropy(model_dir, blocks):
    model = LNFreeForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval().double()
    with torch.no_grad():
        attentions = torch.stack(model(blocks, output_attentions=True).attentions)  # (layers, batch, heads, T, T)
    return -torch.special.xlogy(attentions, attentions).sum(-1).mean((1, 3))


def test_entropy_of_the_evaluation_part_matches_float64_maps(variant_runs, recipe_values):
    measured = runs.read_results(variant_runs / "SM+R")["attention_entropy"]
    expected = naive_entropy(variant_runs / "SM+R" / "model", eval_blocks(recipe_values))
    torch.testing.assert_close(torch.tensor(measured["entropy"]).double(), expected, atol=2e-5, rtol=0)
    largest = sum(math.log(i + 1) for i in range(16)) / 16
    assert torch.tensor(measured["max_entropy"]).allclose(torch.tensor(largest))
    shares = [((expected / largest * 4).floor().clamp(max=3) == i).double().mean().item() for i in range(4)]
    assert measured["head_distribution"] == pytest.approx(shares)
    assert measured["nan_count"] == [0, 0]


def test_probe_is_measured_at_the_start_every_n_steps_and_at_the_end(variant_runs, recipe_values):
    records = files.read_records(variant_runs / "SM+R" / "attention_entropy.jsonl")
    assert [record["step"] for record in records] == [0, 3, 6, 8]
    expected = naive_entropy(variant_runs / "SM+R" / "model", eval_blocks(recipe_values)[:5])
    torch.testing.assert_close(torch.tensor(records[-1]["entropy"]).double(), expected, atol=2e-5, rtol=0)


def test_measurements_go_through_the_trainers_log(variant_runs):
    log = json.loads((variant_runs / "SM+LR-layer" / "log_history.json").read_text())
    entropies = {entry["step"]: entry for entry in log if "attention_entropy/mean" in entry}
    slopes = {entry["step"]: entry for entry in log if "negative_slope/1" in entry}
    assert sorted(entropies) == sorted(slopes) == [0, 3, 6, 8]
    records = files.read_records(variant_runs / "SM+LR-layer" / "attention_entropy.jsonl")
    for record in records:
        assert entropies[record["step"]]["attention_entropy/layer_1/head_0"] == record["entropy"][1][0]
        assert entropies[record["step"]]["attention_nan_count/layer_1"] == 0
    slope_records = files.read_records(variant_runs / "SM+LR-layer" / "negative_slope.jsonl")
    assert slope_records[0]["slopes"] == pytest.approx([0.01, 0.01])
    assert slope_records[-1]["slopes"][0] != slope_records[0]["slopes"][0]
    # measuring takes no step's loss out of the log
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8]


def test_measuring_changes_nothing(variant_runs, recipe_values, tmp_path):
    values = {**recipe_values, "variant": "SM+R", "entropy_steps": 1, "output_dir": str(tmp_path)}
    loop.train(build_recipe(values))
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, variant_runs / "SM+R"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_nan_in_the_attention_is_counted_and_never_a_number(variant_runs):
    model = LNFreeForCausalLM.from_pretrained(variant_runs / "SM+R" / "model").eval()
    model.model.layers[1].self_attn.q_proj.weight.data[:8] = math.nan  # the first of two heads
    probe = torch.randint(300, (3, 16))
    callback = callbacks.MeasurementCallback(None, [], {"input_ids": probe}, 1, Path("unused"))
    record, scalars = callback.describe(callback.measure(model), model)["attention_entropy"]
    assert math.isnan(record["entropy"][1][0]) and record["nan_count"][1] > 0 == record["nan_count"][0]
    assert math.isfinite(record["entropy"][0][0]) and math.isnan(scalars["attention_entropy/layer_1/mean"])


@pytest.mark.parametrize("decay", [False, True])
def test_weight_decay_reaches_learned_slopes_only_when_asked(recipe_values, decay, tmp_path):
    class Groups(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                found.update({names[id(parameter)]: group["weight_decay"] for parameter in group["params"]})

    found = {}
    with one_more_callback(Groups):
        values = {**recipe_values, "variant": "SM+LN+LR-global", "decay_slopes": decay, "max_steps": 1}
        loop.train(build_recipe({**values, "output_dir": str(tmp_path)}))
    assert found["model.learned_slope.negative_slope"] == (0.1 if decay else 0.0)
    for name, value in found.items():
        if name != "model.learned_slope.negative_slope":
            assert value == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name


# ---- interruption


def test_finished_run_is_left_as_it_is_and_another_recipe_is_refused(variant_runs, recipe_values, capsys):
    values = {**recipe_values, "variant": "SM+R", "output_dir": str(variant_runs / "SM+R")}
    before = (variant_runs / "SM+R" / "results.json").stat().st_mtime_ns
    loop.train(build_recipe(values))
    assert "is finished: perplexity" in capsys.readouterr().out
    assert (variant_runs / "SM+R" / "results.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a run with learning_rate=0.01, this recipe has 0.02"):
        loop.train(build_recipe({**values, "learning_rate": 0.02}))


def test_run_does_not_replace_what_is_no_run(recipe_values, tmp_path):
    for name in ("model", "checkpoint-5"):
        thesis = tmp_path / name / name / "thesis.tex"
        thesis.parent.mkdir(parents=True)
        thesis.touch()
        with pytest.raises(UserError, match=f"{name} is not a run's folder: it holds a model or checkpoints"):
            loop.train(build_recipe({**recipe_values, "output_dir": str(tmp_path / name)}))
        assert thesis.exists()


def test_data_that_changed_since_the_checkpoint_is_an_error(recipe_values, corpus, tmp_path):
    (tmp_path / "documents.jsonl").write_text(corpus.read_text())
    values = {**recipe_values, "dataset": str(tmp_path / "documents.jsonl"), "output_dir": str(tmp_path / "run")}
    with one_more_callback(interrupting(6)), pytest.raises(KeyboardInterrupt):
        loop.train(build_recipe(values))
    (tmp_path / "documents.jsonl").write_text("".join(corpus.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="checkpoint-4 was trained on other data"):
        loop.train(build_recipe(values))
    (tmp_path / "documents.jsonl").write_text(corpus.read_text())
    loop.train(build_recipe(values))


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (slice(80, None), "", "stopped at step 0 of 8: the dataset has no more blocks to train on"),
        (slice(0, 80), "{", "the data of step 1 cannot be read: JSON parse error"),
    ],
    ids=["all in the evaluation", "broken"],
)
def test_stream_that_ends_or_breaks_is_no_finished_run(recipe_values, corpus, tmp_path, rows, more, message):
    documents = data.load_documents(build_recipe(recipe_values).data, 0)
    data.load_tokenizer(build_recipe(recipe_values).data, documents["train"], 300).save_pretrained(tmp_path / "bpe")
    lines = corpus.read_text().splitlines(keepends=True)
    for name, part in {"train-0": lines[rows], "train-1": [*lines[rows], more], "validation": lines[80:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    values = {**recipe_values, "dataset": str(tmp_path), "tokenizer": str(tmp_path / "bpe"), "streaming": True}
    with pytest.raises(UserError, match=message):
        loop.train(build_recipe({**values, "output_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run" / "results.json").exists()


def test_everything_is_on_the_disk_before_it_gets_its_name(recipe_values, tmp_path, monkeypatch):
    flushed, left_out = set(), []
    fsync, replace = os.fsync, os.replace

    def note(file):
        flushed.add(os.fstat(file).st_ino)
        fsync(file)

    def check(source, target):
        files = [path for path in [Path(source), *Path(source).rglob("*")] if path.is_file()]
        left_out.extend(path for path in files if path.stat().st_ino not in flushed)
        named.append(Path(target).name)
        replace(source, target)

    named: list[str] = []
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(loop.os, "replace", check)
    run_dir = loop.train(build_recipe({**recipe_values, "output_dir": str(tmp_path / "run")}))
    assert {"recipe.yaml", "checkpoint-4", "checkpoint-8", "model", "results.json"} <= set(named)
    assert not [path for path in left_out if run_dir in path.parents]


def test_failure_in_a_checkpoint_is_of_the_disk_only_if_torch_could_not_write(recipe_values, tmp_path, monkeypatch):
    values = {**recipe_values, "output_dir": str(tmp_path)}
    full = "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"
    for message, error in (("CUDA error: out of memory", RuntimeError), (full, UserError)):

        def fail(*args, message=message, **kwargs):
            raise RuntimeError(message)

        with monkeypatch.context() as patch, pytest.raises(error, match=re.escape(message)) as caught:
            patch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", fail)
            loop.train(build_recipe(values))
        assert ("cannot be written" in str(caught.value)) == (error is UserError)


def test_one_process_trains_on_one_gpu(recipe_values, monkeypatch):
    finish = loop.TrainingArguments.__post_init__

    def see_four(self):
        finish(self)
        self._n_gpu = 4

    monkeypatch.setattr(loop.TrainingArguments, "__post_init__", see_four)
    arguments = build_recipe(recipe_values).build_arguments()
    assert arguments.n_gpu == 1 and arguments.train_batch_size == recipe_values["per_device_train_batch_size"]


@pytest.mark.parametrize(
    ("report_to", "message"),
    [("bogus", "bogus is not supported, only .*wandb"), ("tensorboard", "requires tensorboard")],
)
def test_reporting_that_cannot_be_done_is_told_before_the_data(recipe_values, report_to, message, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match=message):
        build_recipe({**recipe_values, "report_to": report_to}).build_arguments()


@pytest.mark.parametrize("moment", ["after a checkpoint", "in the middle of a checkpoint"])
def test_run_killed_resumes_bitwise(variant_runs, recipe_values, tmp_path, moment):
    path = tmp_path / "recipe.yaml"
    run_dir = tmp_path / "run"
    path.write_text(yaml.safe_dump({**recipe_values, "variant": "SM+R", "output_dir": str(run_dir)}))
    # kills itself: at step 6, or with the second checkpoint's model written and its optimizer not
    script = f"""
import os, signal, sys
from transformers import Trainer
from training import files
from training.train import callbacks
from training.train import loop
from training.recipe import load_recipe

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if {moment!r} == "after a checkpoint":
    measure = callbacks.MeasurementCallback.on_step_end
    def on_step_end(self, args, state, control, **kwargs):
        measure(self, args, state, control, **kwargs)
        if state.global_step == 6:
            kill()
    callbacks.MeasurementCallback.on_step_end = on_step_end
else:
    save = Trainer._save_optimizer_and_scheduler
    def save_or_die(self, folder):
        kill() if "checkpoint-8" in folder else save(self, folder)
    Trainer._save_optimizer_and_scheduler = save_or_die
loop.train(load_recipe({str(path)!r}))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [folder.name for folder in run_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (run_dir / "results.json").exists()
    command = [sys.executable, "-m", "training.train", str(path)]
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run_dir, variant_runs / "SM+R"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    results = [runs.read_results(folder) for folder in (run_dir, variant_runs / "SM+R")]
    for key in ("eval_loss", "perplexity", "attention_entropy", "train_tokens"):
        assert results[0][key] == results[1][key], key
    records = [files.read_records(folder / "attention_entropy.jsonl") for folder in (run_dir, variant_runs / "SM+R")]
    assert records[0] == records[1]


def test_diverged_run_ends_with_a_report_and_is_told_by_compare(variant_runs, recipe_values, tmp_path):
    values = {**recipe_values, "variant": "SM+G-noLNf", "learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(stability.UnstableRunError, match="is unstable at step 3, layer 0: the gradient"):
        loop.train(build_recipe({**values, "output_dir": str(tmp_path / "run")}))
    (tmp_path / "SM+R").symlink_to(variant_runs / "SM+R")
    assert cli.main(["compare", str(tmp_path)]) == 0
    assert "is unstable at step 3, layer 0" in (tmp_path / "report" / "report.md").read_text()


def test_damaged_files_of_a_run_are_told(variant_runs, recipe_values, tmp_path):
    values = {**recipe_values, "variant": "SM+R", "output_dir": str(tmp_path / "SM+R")}
    shutil.copytree(variant_runs / "SM+R", tmp_path / "SM+R")
    # as after a power cut
    for damaged in ("", "[]", "3"):
        (tmp_path / "SM+R" / "results.json").write_text(damaged)
        with pytest.raises(UserError, match="results.json cannot be read: .*; remove it, and the run ends again"):
            loop.train(build_recipe(values))
    (tmp_path / "SM+R" / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match="recipe.yaml must be lines of 'key: value', got NoneType"):
        loop.train(build_recipe(values))


def test_wrong_training_argument_claims_no_folder(recipe_values, tmp_path):
    with pytest.raises(UserError, match="foo"):
        loop.train(build_recipe({**recipe_values, "optim": "foo", "output_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_folder_in_use_and_folder_that_cannot_be_written(recipe_values, tmp_path):
    values = {**recipe_values, "output_dir": str(tmp_path / "run")}
    with loop._claim(tmp_path / "run", build_recipe(values)):
        with pytest.raises(UserError, match="another process is training in"):
            loop.train(build_recipe(values))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir=.* cannot be written"):
        loop.train(build_recipe({**values, "output_dir": str(tmp_path / "file" / "run")}))


@pytest.mark.slow
def test_two_processes_by_torchrun_measure_the_same_entropy(recipe_values, tmp_path):
    values = {**recipe_values, "variant": "SM+R", "embedding_dropout": 0.0, "use_cpu": True, "entropy_sequences": 6}
    outputs = []
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        batch = {"per_device_train_batch_size": 4 // processes, "output_dir": str(run_dir)}
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump({**values, **batch}))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "-m",
            "training.train",
        ]
        run = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append((runs.read_results(run_dir), files.read_records(run_dir / "attention_entropy.jsonl")))
    (one, one_records), (two, two_records) = outputs
    assert one["train_tokens"] == two["train_tokens"] == 8 * 4 * 16
    # of which the last batches do not fill both processes
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    for ours, theirs in zip(one_records, two_records, strict=True):
        torch.testing.assert_close(torch.tensor(ours["entropy"]), torch.tensor(theirs["entropy"]), atol=1e-4, rtol=0)
