"""What a run shows on the way, how it ends when it is unstable, and its checkpoints when they are damaged."""

import json
import math
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainingArguments

from modeling_lnfree import LNFreeForCausalLM
from training import files, quantities, runs
from training.errors import UserError
from training.recipe import build_recipe
from training.train import callbacks, checkpoints, loop, stability

from ..conftest import interrupting, one_more_callback, random_ids, tiny_model
from .conftest import measure, weights_of


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def values(recipe_values):
    return {**recipe_values, "variant": "SM+R", "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, own_cache, values):
    """A finished run that was never interrupted."""
    return loop.train(build_recipe({**values, "output_dir": str(tmp_path_factory.mktemp("runs") / "unbroken")}))


def train_with(values, callback: type[TrainerCallback]) -> Path:
    with one_more_callback(callback):
        return loop.train(build_recipe(values))


def assert_same_result(ours: Path, theirs: Path):
    weights, expected = weights_of(ours), weights_of(theirs)
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)
    results = [runs.read_results(folder) for folder in (ours, theirs)]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
    assert results[0]["attention_entropy"] == results[1]["attention_entropy"]
    for name in ("attention_entropy", "residual_stream", "zero_activations", "gradient_norm"):
        records = [files.read_records(folder / f"{name}.jsonl") for folder in (ours, theirs)]
        assert records[0] == records[1], name
    logs = [json.loads((folder / "log_history.json").read_text()) for folder in (ours, theirs)]
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]


# ---- quantities


@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
def test_residual_stream_matches_float64_hidden_states(backbone):
    model, probe = tiny_model("SM+R", backbone), random_ids(3, 17)
    record, scalars = measure(quantities.ResidualStream(), model, probe)
    states: list[torch.Tensor] = []
    layers = model.double().model.layers
    hooks = [
        layer.register_forward_hook(lambda module, args, output: states.append(output.detach())) for layer in layers
    ]
    model(probe)
    for hook in hooks:
        hook.remove()
    for layer, state in enumerate(states):
        state = state.reshape(-1, state.shape[-1])  # (tokens, D)
        norm = torch.tensor([row.norm() for row in state]).mean().item()
        root_mean_squares = torch.stack([column.square().mean().sqrt() for column in state.T])
        kurtosis = ((root_mean_squares**4).mean() / (root_mean_squares**2).mean() ** 2).item()
        assert record["norm"][layer] == scalars[f"residual_stream/layer_{layer}/norm"] == pytest.approx(norm, rel=1e-5)
        assert record["kurtosis"][layer] == pytest.approx(kurtosis, rel=1e-5)


def test_kurtosis_of_one_outlier_feature_is_the_hidden_size():
    model = tiny_model("SM+R", num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, 5] = 3.0
    record, _ = measure(quantities.ResidualStream(), model, random_ids(2, 9))
    assert record == {"norm": [3.0], "kurtosis": [32.0]}


def test_zero_activations_match_the_pre_activations_below_zero():
    model, probe = tiny_model("SM+LN+R"), random_ids(2, 11)
    record, _ = measure(quantities.ZeroActivations(), model, probe)
    projected: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output: projected.append(output))
    model(probe)
    assert record["share"] == pytest.approx([(output <= 0).double().mean().item() for output in projected])


def test_one_forward_pass_serves_all_quantities():
    model = tiny_model("SM+LR-layer").train()
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(module.training))
    watched = [quantities.ResidualStream(), quantities.NegativeSlope()]
    callback = callbacks.MeasurementCallback(None, watched, {"input_ids": random_ids(2, 8)}, 1, Path("unused"))
    measured = callback.describe(callback.measure(model), model)
    assert passes == [False] and model.training and not model.model.layers[0]._forward_hooks
    assert [set(record) for record, _ in measured.values()] == [
        {
            *("entropy", "max_entropy", "head_distribution", "nan_count", "inf_count"),
            *("max_logit", "sink_share", "spectral_gap"),
        },
        {"norm", "kurtosis"},
        {"slopes"},
    ]


def test_every_quantity_is_in_the_trainers_log_and_in_its_file(run_dir):
    log = json.loads((run_dir / "log_history.json").read_text())
    trained = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in trained] == [2, 4, 6, 8]
    for entry in trained:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert entry["grad_norm"] > 0 and entry["learning_rate"] >= 0
    norms = [norm for record in files.read_records(run_dir / "gradient_norm.jsonl") for norm in record["norms"]]
    assert len(norms) == 8 and norms[1::2] == [entry["grad_norm"] for entry in trained]
    speeds = files.read_records(run_dir / "speed.jsonl")
    assert [record["step"] for record in speeds] == [2, 4, 6, 8]
    assert all(record["tokens_per_second"] > 0 and 0 < record["mfu"] < 1 for record in speeds)
    logged = {key for entry in log for key in entry}
    assert {"speed/mfu", "residual_stream/layer_1/kurtosis", "zero_activations/layer_0"} <= logged
    assert {"attention_entropy/share_of_heads_in_quarter_3", "attention_nan_count/layer_1"} <= logged


def test_measuring_the_machine_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert callbacks.peak_flops(torch.device("cpu"), torch.float32) > 1e6
    assert torch.get_rng_state().equal(before)


def test_flops_of_a_token_are_those_that_torch_counts(monkeypatch, tmp_path):
    model, probe = tiny_model("SM+R", "pythia"), random_ids(1, 64)
    model.set_attn_implementation("eager")
    monkeypatch.setattr(callbacks, "peak_flops", lambda device, dtype: 1.0)
    callback = callbacks.SpeedCallback(64, 64, tmp_path / "speed.jsonl", None)
    state = type("State", (), {"is_world_process_zero": True, "global_step": 0})
    callback.on_train_begin(TrainingArguments(str(tmp_path)), state, None, model=model)
    with FlopCounterMode(display=False) as counter:
        model(probe, labels=probe).loss.backward()
    assert callback.token_share * 64 == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("precision", "dtype"), [({}, "float32"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16")]
)
def test_utilization_is_of_all_machines_in_the_precision_of_the_training(precision, dtype, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(callbacks, "peak_flops", lambda device, dtype: asked.append(dtype) or 1e6)
    shares = []
    for processes in (1, 4):
        args = SimpleNamespace(**{"bf16": False, "fp16": False, "world_size": processes, **precision})
        callback = callbacks.SpeedCallback(64, 64, tmp_path / "speed.jsonl", None)
        state = SimpleNamespace(is_world_process_zero=True, global_step=0)
        callback.on_train_begin(args, state, None, model=tiny_model("SM+R"))
        shares.append(callback.token_share)
    assert shares[0] == pytest.approx(4 * shares[1]) and asked == [getattr(torch, dtype)] * 2


def test_tokens_per_second_count_the_wait_for_data(monkeypatch, tmp_path):
    trainer = SimpleNamespace(data_seconds=0.0, log=lambda logs: None)
    callback = callbacks.SpeedCallback(64, 64, tmp_path / "speed.jsonl", trainer)
    callback.token_share = 0.001
    args, control = SimpleNamespace(logging_steps=1), SimpleNamespace(should_log=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=2)
    # steps of a second; before them waits of 3 seconds and of 1, and between them an evaluation
    moments = iter([3.0, 4.0, 50.0, 51.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(moments))
    for waited in (3.0, 4.0):
        trainer.data_seconds = waited
        callback.on_step_begin(args, state, control)
        state.global_step += 1
        callback.on_step_end(args, state, control)
    speeds = [record["tokens_per_second"] for record in files.read_records(tmp_path / "speed.jsonl")]
    assert speeds == [64 / 4, 64 / 2]


def test_evaluations_on_the_way_take_blocks_spread_over_the_evaluation_part(values, tmp_path):
    blocks = loop._select_evenly(list_dataset(range(10)), 4)
    assert blocks["number"] == [0, 2, 5, 7]
    assert loop._select_evenly(list_dataset(range(3)), 4)["number"] == [0, 1, 2]
    run = loop.train(build_recipe({**values, "eval_sequences": 3, "output_dir": str(tmp_path)}))
    log = [entry for entry in json.loads((run / "log_history.json").read_text()) if "eval_loss" in entry]
    assert [entry["step"] for entry in log] == [4, 8, 8]
    results = runs.read_results(run)
    assert log[-1]["eval_loss"] == results["eval_loss"] != log[-2]["eval_loss"]
    assert results["eval_tokens"] > 3 * 15


def list_dataset(numbers):
    return Dataset.from_dict({"number": list(numbers)})


def test_budget_in_tokens_gives_the_steps(values):
    recipe = build_recipe({**values, "train_tokens": 1000, "gradient_accumulation_steps": 2})
    assert recipe.training["max_steps"] == math.ceil(1000 / (2 * 4 * 16))
    assert build_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()


# ---- instability


def planting(step: int, name: str):
    class Plant(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                model.get_parameter(name).data.view(-1)[7] = math.nan

    return Plant


@pytest.mark.parametrize(
    ("step", "seen_at", "kept"),
    # at step 4 before a checkpoint, which must not be written
    [(1, 2, None), (4, 4, None), (5, 6, "checkpoint-4"), (8, 8, "checkpoint-4")],
)
def test_nan_planted_in_a_weight_ends_the_run_with_layer_and_step(values, tmp_path, step, seen_at, kept):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(stability.UnstableRunError) as caught:
        train_with({**values, "entropy_steps": 100, "output_dir": str(tmp_path)}, planting(step, name))
    assert f"is unstable at step {seen_at}, layer 1: " in str(caught.value) and "\n" not in str(caught.value)
    assert f"1 of the 1,024 entries of {name} are not finite" in str(caught.value)
    report = json.loads((tmp_path / "instability.json").read_text())
    assert (report["step"], report["layer"], report["last_checkpoint"]) == (seen_at, 1, kept)
    assert [path.name for path in runs.list_checkpoints(tmp_path)] == ([kept] if kept else [])
    assert not (tmp_path / "results.json").exists()


def test_run_goes_on_from_its_last_sound_checkpoint(values, run_dir, tmp_path):
    values = {**values, "output_dir": str(tmp_path)}
    with pytest.raises(stability.UnstableRunError):
        train_with(values, planting(5, "model.layers.0.self_attn.q_proj.weight"))
    assert_same_result(loop.train(build_recipe(values)), run_dir)
    assert not (tmp_path / "instability.json").exists()


def test_attention_that_is_not_finite_ends_the_run(values, tmp_path):
    class Infinite(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            # weights that are finite, and scores that are not
            if state.global_step == 3:
                model.model.layers[1].self_attn.q_proj.weight.data.fill_(3e38)

    with pytest.raises(stability.UnstableRunError) as caught:
        train_with({**values, "entropy_steps": 3, "output_dir": str(tmp_path)}, Infinite)
    assert "is unstable at step 3, layer 1: " in str(caught.value)
    assert "in the attention of the probe batch" in str(caught.value) and "q_proj" in str(caught.value)


def test_end_of_a_run_tells_the_stream_by_layer_and_what_to_try(values, tmp_path):
    plant = planting(5, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(stability.UnstableRunError) as caught:
        train_with({**values, "entropy_steps": 2, "output_dir": str(tmp_path)}, plant)
    records = files.read_records(tmp_path / "residual_stream.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4]
    for step, record in zip((2, 4), records[1:], strict=True):
        told = f"behind each layer at step {step}: {record['norm'][0]:.3g} {record['norm'][1]:.3g};"
        assert told in str(caught.value)
    assert "at step 0:" not in str(caught.value)
    # 5 % of 8 steps
    advice = "try a longer warm-up than 1 steps, a learning_rate below 0.01, or the preset @Stable"
    assert advice in str(caught.value)
    report = json.loads((tmp_path / "instability.json").read_text())
    assert report["stream"] == records[1:] and report["advice"].startswith(advice)
    # what earlier versions wrote
    del report["stream"], report["advice"]
    assert runs.describe_instability(report).endswith("the last sound checkpoint is checkpoint-4")


def test_stream_far_beyond_that_of_layernorm_is_told_while_the_run_goes_on(values, tmp_path, capsys):
    class Grow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            # the stream is the position's, 16 wide; 50 is the root mean square that is told, 200 the norm
            sizes = {1: 190.0, 2: 210.0, 3: 220.0, 4: 2500.0}
            model.model.embed_positions.weight.data.fill_(sizes.get(state.global_step, 2600.0) / 4)

    values = {**values, "entropy_steps": 1, "max_steps": 6, "learning_rate": 1e-6, "logging_steps": 2}
    values |= {"initializer_range": 1e-4, "output_dir": str(tmp_path), "eval_strategy": "no"}
    run = train_with(values, Grow)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    norms = {record["step"]: record["norm"] for record in files.read_records(run / "residual_stream.jsonl")}
    assert [norms[step][1] for step in (1, 2, 4)] == pytest.approx([190, 210, 2500], rel=0.01)
    assert len(told) == 2
    layer = norms[2].index(max(norms[2]))
    assert f"step 2: the stream behind layer {layer} has a norm of {norms[2][layer]:.3g}, far more than" in told[0]
    assert "step 4: " in told[1]
    assert "try a longer warm-up than 1 steps, a learning_rate below 1e-06, or the preset @Stable" in told[0]
    # with norms in the blocks nothing comes of it, and there is no preset to try
    callback = stability.StabilityCallback(tmp_path, tiny_model("SM+LN+R"))
    callback.args, callback.warmup_steps = SimpleNamespace(learning_rate=0.1), 7
    callback.look_at_stream(1, {"residual_stream/layer_0/norm": 1e9})
    assert not capsys.readouterr().out
    assert callback.advise() == "try a longer warm-up than 7 steps, a learning_rate below 0.1"


def test_gradient_that_is_not_finite_is_located_in_the_backward_pass(values, tmp_path):
    class Gradient(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.layers[0].mlp.down_proj.register_full_backward_hook(
                    lambda module, inputs, outputs: (inputs[0] * math.inf,)
                )

    with pytest.raises(stability.UnstableRunError) as caught:
        train_with({**values, "output_dir": str(tmp_path)}, Gradient)
    assert "is unstable at step 3, layer 0: the gradient norm is nan; in the backward pass" in str(caught.value)
    assert "layers.0.mlp.up_proj.weight" in str(caught.value)


def sound_callback(tmp_path) -> stability.StabilityCallback:
    callback = stability.StabilityCallback(tmp_path, tiny_model("SM+R"))
    callback.args, callback.warmup_steps = SimpleNamespace(learning_rate=0.1), 7
    return callback


@pytest.mark.parametrize(
    ("logs", "seen"),
    [
        ({"loss": math.inf}, "the loss is inf"),
        ({"eval_loss": math.nan}, "the eval_loss is nan"),
        ({"attention_nan_count/layer_1": 3}, ", layer 1: 3 NaN weights in the attention of the probe batch"),
        ({"attention_inf_count/layer_2": 5}, ", layer 2: 5 infinite scores in the attention of the probe batch"),
    ],
)
def test_what_is_logged_and_not_finite_ends_a_run(logs, seen, tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = SimpleNamespace(global_step=11)
    sound_callback(tmp_path).on_log(None, state, None, logs={"loss": 1.0, "attention_inf_count/layer_0": 0})
    with pytest.raises(stability.UnstableRunError) as caught:
        sound_callback(tmp_path).on_log(None, state, None, logs=logs)
    assert seen in str(caught.value) and "the last sound checkpoint is checkpoint-10" in str(caught.value)


def watch_norms(tmp_path, norms, warmup_steps=0, scaled=False) -> int | None:
    """The step at which a run with these gradient norms ends."""
    model = tiny_model("SM+R")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * (1 + (parameter is model.model.layers[2].mlp.up_proj.weight))
    callback = stability.StabilityCallback(tmp_path, model)
    state = type("State", (), {"is_world_process_zero": True, "global_step": 0, "max_steps": len(norms)})
    callback.on_train_begin(TrainingArguments(str(tmp_path), warmup_steps=warmup_steps, use_cpu=True), state, None)
    batch = {"input_ids": random_ids(1, 5), "labels": random_ids(1, 5)}
    for step, norm in enumerate(norms, start=1):
        try:
            callback.check_gradient(step, torch.tensor(norm, dtype=torch.float64), batch, scaled)
        except stability.UnstableRunError as error:
            assert scaled or not math.isfinite(norm) or "layer 2: the median gradient norm" in str(error)
            return step
    return None


def test_rule_for_gradient_norms_far_outside_their_history(tmp_path):
    calm = [1 + 0.1 * math.sin(step) for step in range(150)]
    median = statistics.median(calm)
    assert watch_norms(tmp_path, calm) is None
    # one outlier, or nine, end nothing; six of the last ten do
    assert watch_norms(tmp_path, [*calm, 1e6, *calm]) is None
    assert watch_norms(tmp_path, [*calm, *[25 * median] * 9]) == 150 + 6
    assert watch_norms(tmp_path, [*calm, *[15 * median] * 50]) is None
    # no history yet; a warm-up is no history
    assert watch_norms(tmp_path, [*[1.0] * 50, *[1e3] * 20]) is None
    assert watch_norms(tmp_path, [*calm, *[25 * median] * 20], warmup_steps=100) is None
    # fp16's scaler leaves out the steps that are not finite
    assert watch_norms(tmp_path, [1.0, math.inf, 1.0], scaled=True) is None
    assert watch_norms(tmp_path, [1.0, math.inf, 1.0]) == 2


def test_history_of_gradient_norms_outlives_a_resumption(tmp_path):
    norms = [float(step) for step in range(1, 131)]
    files.append_record(tmp_path / "gradient_norm.jsonl", {"step": 100, "norms": norms[:100]})
    files.append_record(tmp_path / "gradient_norm.jsonl", {"step": 130, "norms": norms[100:]})
    callback = stability.StabilityCallback(tmp_path, tiny_model())
    state = type("State", (), {"is_world_process_zero": True, "global_step": 100, "max_steps": 200})
    callback.on_train_begin(TrainingArguments(str(tmp_path), warmup_steps=10), state, None)
    assert callback.norms == norms[10:100]
    # another process than the first, which drops what was measured after the checkpoint, may be quicker than that one
    files.append_record(tmp_path / "gradient_norm.jsonl", {"step": 130, "norms": norms[100:]})
    callback = stability.StabilityCallback(tmp_path, tiny_model())
    state.is_world_process_zero = False
    callback.on_train_begin(TrainingArguments(str(tmp_path), warmup_steps=10), state, None)
    assert callback.norms == norms[10:100]


# ---- checkpoints


def test_run_resumed_twice_equals_an_unbroken_one_bitwise(values, run_dir, tmp_path):
    values = {**values, "output_dir": str(tmp_path)}
    for step in (3, 7, 5):
        with pytest.raises(KeyboardInterrupt):
            train_with(values, interrupting(step))
        if step == 7:
            # so that the second resumption starts before the first one's checkpoint
            assert [path.name for path in runs.list_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert_same_result(loop.train(build_recipe(values)), run_dir)


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


DAMAGE = {
    "bit flipped in the weights": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "bit flipped in the optimizer": lambda folder: flip_a_bit(folder / "optimizer.pt"),
    "truncated": lambda folder: (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-9]),
    "emptied, as after a power cut": lambda folder: (folder / "rng_state.pth").write_bytes(b""),
    "file missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut short": lambda folder: (folder / "manifest.json").write_text('{"model.safe'),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[1]"),
}


def test_run_killed_after_its_last_checkpoint_only_evaluates_again(values, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    loop.train(build_recipe({**values, "output_dir": str(tmp_path / "run")}))
    assert_same_result(tmp_path / "run", run_dir)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_told_and_the_one_before_taken(values, run_dir, tmp_path, damage, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    damage(tmp_path / "run" / "checkpoint-8")
    assert checkpoints.find_damage(tmp_path / "run" / "checkpoint-4") is None
    loop.train(build_recipe({**values, "output_dir": str(tmp_path / "run")}))
    assert "checkpoint-8 is damaged and removed: " in capsys.readouterr().out
    assert_same_result(tmp_path / "run", run_dir)


def test_every_bit_of_a_checkpoint_is_seen(run_dir, tmp_path):
    shutil.copytree(run_dir / "checkpoint-4", tmp_path / "checkpoint-4")
    names = sorted(path.name for path in (tmp_path / "checkpoint-4").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        path = tmp_path / "checkpoint-4" / name
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert checkpoints.find_damage(tmp_path / "checkpoint-4") is not None, (name, position)
        path.write_bytes(whole)
    assert checkpoints.find_damage(tmp_path / "checkpoint-4") is None


def test_without_a_whole_checkpoint_the_run_starts_again(values, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for folder in runs.list_checkpoints(tmp_path / "run"):
        flip_a_bit(folder / "model.safetensors")
    assert checkpoints.last_whole_checkpoint(tmp_path / "run") is None
    assert_same_result(loop.train(build_recipe({**values, "output_dir": str(tmp_path / "run")})), run_dir)


def test_milestones_are_kept_beside_the_newest(values, tmp_path):
    values = {**values, "save_steps": 2, "save_total_limit": 1, "milestones": [2, 6]}
    run = loop.train(build_recipe({**values, "output_dir": str(tmp_path)}))
    assert [path.name for path in runs.list_checkpoints(run)] == [f"checkpoint-{step}" for step in (2, 6, 8)]
    with pytest.raises(UserError, match="milestones must be multiples of save_steps=2, got 3"):
        build_recipe({**values, "milestones": [3]})


@pytest.mark.parametrize(("kept", "left"), [(None, 3), (-1, 3), (0, 3), (1, 1), (2, 2), (5, 3)])
def test_only_a_limit_above_0_removes_checkpoints(tmp_path, kept, left):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.remove_old_checkpoints(tmp_path, kept, ())
    assert [path.name for path in runs.list_checkpoints(tmp_path)] == [
        f"checkpoint-{step}" for step in (2, 4, 10)[3 - left :]
    ]


def test_model_of_a_checkpoint_loads(run_dir):
    model = LNFreeForCausalLM.from_pretrained(run_dir / "checkpoint-8")
    final = load_file(run_dir / "model" / "model.safetensors")
    assert all(value.equal(final[name]) for name, value in model.state_dict().items() if name in final)


def test_last_byte_of_a_large_file_of_a_checkpoint_is_seen(tmp_path):
    folder = tmp_path / "checkpoint-4"
    (folder / "inside").mkdir(parents=True)
    path = folder / "inside" / "model.safetensors"
    content = bytearray(3 * 2**20 + 7)
    path.write_bytes(content)
    checkpoints.write_manifest(folder)
    assert checkpoints.find_damage(folder) is None
    for position in (0, 2**20 + 1, len(content) - 1):
        content[position] ^= 1
        path.write_bytes(content)
        assert checkpoints.find_damage(folder) == "the content of inside/model.safetensors has changed"
        content[position] ^= 1


def test_measurements_after_a_step_are_dropped_and_those_cut_short_left_out(tmp_path):
    path = tmp_path / "speed.jsonl"
    for step in (2, 4, 6):
        files.append_record(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 8')
    assert [record["step"] for record in files.read_records(path)] == [2, 4, 6]
    files.drop_records_after(path, 4)
    assert [record["step"] for record in files.read_records(path)] == [2, 4]
    # a run that begins again measures its first step again too
    files.append_record(path, {"step": 0})
    files.drop_records_after(path, 0)
    assert files.read_records(path) == []
