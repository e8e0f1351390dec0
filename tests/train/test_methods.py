"""Training methods of a recipe: penalties on entropy, parametrized weights, starting from a model, training a part."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback

from modeling_lnfree import LNFreeForCausalLM, record_attention_entropy
from training import cli, files, quantities, runs
from training.errors import UserError
from training.methods import METHOD_FIELDS, NORM_REMOVAL_FIELDS
from training.recipe import START_FIELDS, build_recipe
from training.train import batch_entropy, callbacks, loop, trainer

from ..conftest import ROOT, interrupting, one_more_callback, random_ids, tiny_model
from .conftest import weights_of


pytestmark = pytest.mark.usefixtures("own_cache")
ALL_METHODS = {
    "entropy_weight": 0.5,
    "entropy_margin": 0.01,
    "entropy_target_init": 0.3,
    "weight_parametrization": "sigma_reparam",
    "batch_entropy_weight": 0.3,
}


@pytest.fixture(scope="module")
def values(recipe_values):
    return {**recipe_values, "variant": "SM+LN+R"}


def train(tmp_path, values, name, **options):
    """Trains through the command, and gives the run's folder."""
    path = tmp_path / f"{name}.yaml"
    given = {key: value for key, value in {**values, **options}.items() if value is not None}
    path.write_text(yaml.safe_dump({**given, "output_dir": str(tmp_path / name)}))
    assert cli.main(["train", str(path)]) == 0
    return tmp_path / name


def log_of(run_dir):
    return json.loads((run_dir / "log_history.json").read_text())


def differ(ours, theirs):
    assert ours.keys() == theirs.keys()
    return any(not ours[name].equal(theirs[name]) for name in ours)


# ---- options act


OPTIONS = [
    ({"entropy_weight": 0.5}, {"entropy_weight": 5.0}),
    ({"entropy_weight": 0.5, "entropy_margin": 0.0}, {"entropy_margin": 0.6}),
    ({"entropy_weight": 0.5}, {"entropy_target_init": 0.1}),
    ({"entropy_weight": 0.5, "entropy_target_init": 0.1}, {"entropy_target_learned": False}),
    ({"weight_parametrization": "sigma_reparam"}, {"weight_parametrization": "weight_norm"}),
    ({"weight_parametrization": "sigma_reparam"}, {"weight_parametrization": "spectral_norm"}),
    ({"weight_parametrization": "sigma_reparam"}, {"parametrized_projections": ["q_proj", "up_proj"]}),
    ({"weight_parametrization": "sigma_reparam"}, {"parametrization_gain_init": 1.0}),
    ({"batch_entropy_weight": 0.3}, {"batch_entropy_weight": 3.0}),
    ({"batch_entropy_weight": 3.0}, {"batch_entropy_target": 2.0}),
    ({"batch_entropy_weight": 3.0, "batch_entropy_target": 0.5}, {"batch_entropy_floor": 0.6}),
    ({}, {"trainable": "q_proj|norm"}),
]


@pytest.mark.parametrize(("options", "change"), OPTIONS, ids=lambda option: "-".join(option))
def test_every_option_acts_through_the_command(values, tmp_path, options, change):
    short = {**values, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "weight_decay": 0.0}
    with_options = weights_of(train(tmp_path, short, "options", **options))
    assert differ(with_options, weights_of(train(tmp_path, short, "change", **{**options, **change})))
    if options:
        assert differ(with_options, weights_of(train(tmp_path, short, "plain")))


def test_every_method_has_a_test_that_it_acts():
    tested = {name for pair in OPTIONS for option in pair for name in option}
    # those of norms that are taken out are tested in test_norm_removal.py
    assert tested | {*NORM_REMOVAL_FIELDS} | {"init_from"} == {*METHOD_FIELDS, *START_FIELDS}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entropy_weight": 0.0}, "entropy_weight must be finite and more than 0, got 0.0"),
        ({"entropy_weight": 1.0, "entropy_margin": 1.5}, r"entropy_margin must be in \[0, 1\], got 1.5"),
        ({"entropy_weight": 1.0, "entropy_target_init": -1.0}, r"entropy_target_init must be in \[0, 1\], got -1.0"),
        ({"entropy_margin": 0.1}, "entropy_margin=0.1 has no effect without entropy_weight"),
        ({"batch_entropy_floor": 0.1}, "batch_entropy_floor=0.1 has no effect without batch_entropy_weight"),
        ({"parametrized_projections": ["q_proj"]}, "has no effect without weight_parametrization"),
        ({"weight_parametrization": "spectral"}, "weight_parametrization"),
        (
            {"weight_parametrization": "weight_norm", "parametrization_gain_init": 1.0},
            "parametrization_gain_init=1.0 has no effect with weight_parametrization='weight_norm'",
        ),
        ({"weight_parametrization": "sigma_reparam", "fsdp_size": 2}, r"train with fsdp_size=1 \(DDP\)"),
        ({"entropy_weight": 1.0, "fsdp_size": 2}, "entropy_weight=1.0 needs whole weights"),
        ({"batch_entropy_weight": 1.0, "per_device_train_batch_size": 1}, "at least 2, since a single sequence has"),
        ({"trainable": "("}, r"trainable='\(' is no regular expression"),
        ({"variant": None}, "variant must be given unless init_from is"),
        ({"init_from": "gpt2"}, "hidden_size, .*vocab_size cannot be given with init_from: the model of gpt2"),
        ({"init_from": "not an id"}, "'not an id' is neither a folder nor an id of the Hub"),
    ],
)
def test_what_would_have_no_effect_is_refused(recipe_values, values, message):
    with pytest.raises(UserError, match=message):
        build_recipe({**recipe_values, **values})


def test_unknown_projection_and_decisive_fields(values, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    method = {"weight_parametrization": "sigma_reparam", "parametrized_projections": ["query"]}
    path.write_text(yaml.safe_dump({**values, **method, "output_dir": str(tmp_path / "run")}))
    assert cli.main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert (
        "parametrized_projections must be of down_proj, k_proj, o_proj, q_proj, up_proj, v_proj, got 'query'" in error
    )
    assert set(START_FIELDS) <= runs.SETTING_FIELDS


# ---- what is logged and kept


@pytest.fixture(scope="module")
def method_run(tmp_path_factory, own_cache, values):
    """A run with all methods that was never interrupted."""
    return train(tmp_path_factory.mktemp("methods"), values, "run", **ALL_METHODS)


def test_run_with_all_methods_is_an_ordinary_one(method_run, values):
    weights = weights_of(method_run)
    plain = LNFreeForCausalLM(build_recipe(values).build_config())
    assert weights.keys() == {name for name in plain.state_dict() if name != "lm_head.weight"}
    assert runs.read_results(method_run)["parameters"] == plain.num_parameters()
    losses = [entry for entry in log_of(method_run) if "loss" in entry]
    assert len(losses) == 4
    for entry in losses:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert entry["entropy_penalty"] > 0 and entry["batch_entropy_factor"] > 0
    assert losses[-1]["entropy_target"] != losses[0]["entropy_target"]
    assert losses[-1]["batch_entropy_target"] != losses[0]["batch_entropy_target"]


def test_checkpoint_holds_an_ordinary_model_and_what_its_weights_are_made_of(method_run):
    [checkpoint] = method_run.glob("checkpoint-8")
    assert not any("parametrizations" in name for name in load_file(checkpoint / "model.safetensors"))
    own = load_file(checkpoint / trainer.PARAMETRIZATION)
    assert sum(name.endswith(".gain") for name in own) == sum(name.endswith(".u") for name in own) == 12
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert state["entropy_targets"].shape == (2, 2) and state["batch_entropy_targets"].shape == (2,)
    # u and v follow the weight by one step of the power iteration a step
    for name, original in own.items():
        if name.endswith(".original"):
            u, v = (own[name.replace("original", f"0.{part}")] for part in "uv")
            sigma = torch.linalg.matrix_norm(original.double(), 2).item()
            assert 0.7 * sigma < (u @ original @ v).item() <= sigma * (1 + 1e-6)
    # the finished model is that of the last checkpoint
    ids = random_ids(2, 16)
    logits = [LNFreeForCausalLM.from_pretrained(f).eval()(ids).logits for f in (checkpoint, method_run / "model")]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


def test_interrupted_run_with_all_methods_resumes_bitwise(method_run, values, tmp_path):
    recipe = build_recipe({**values, **ALL_METHODS, "output_dir": str(tmp_path)})
    with one_more_callback(interrupting(6)), pytest.raises(KeyboardInterrupt):
        loop.train(recipe)
    loop.train(recipe)
    assert_equal_runs(tmp_path, method_run)


def assert_equal_runs(ours, theirs):
    assert not differ(weights_of(ours), weights_of(theirs))
    assert not differ(*(load_file(folder / "checkpoint-8" / trainer.PARAMETRIZATION) for folder in (ours, theirs)))
    states = [torch.load(f / "checkpoint-8" / "optimizer.pt", weights_only=True) for f in (ours, theirs)]
    for name in ("entropy_targets", "batch_entropy_targets"):
        assert states[0][name].equal(states[1][name])
    for name in ("attention_entropy", "entropy_bound", "batch_entropy", "gradient_norm"):
        assert files.read_records(ours / f"{name}.jsonl") == files.read_records(theirs / f"{name}.jsonl"), name
    keys = ("loss", "entropy_penalty", "entropy_target", "batch_entropy_factor")
    logs = [[[e[key] for key in keys] for e in log_of(folder) if "loss" in e] for folder in (ours, theirs)]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_killed_run_with_all_methods_resumes_bitwise(method_run, values, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **ALL_METHODS, "output_dir": str(tmp_path / "run")}))
    script = f"""
import os, signal
from training.train import callbacks, loop
from training.recipe import load_recipe

measure = callbacks.MeasurementCallback.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    measure(self, args, state, control, **kwargs)
    if state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
callbacks.MeasurementCallback.on_step_end = on_step_end
loop.train(load_recipe({str(path)!r}))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    command = [sys.executable, "-m", "training.train", str(path)]
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_runs(tmp_path / "run", method_run)


def test_two_processes_equal_one(values, tmp_path):
    shared = {
        **values,
        "entropy_weight": 5.0,
        "entropy_margin": 0.01,
        "entropy_target_init": 0.3,
        "weight_parametrization": "sigma_reparam",
        "embedding_dropout": 0.0,
        # Adam would make much of the rounding of gradients that are near 0
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "entropy_sequences": 6,
        "use_cpu": True,
    }
    one = train(tmp_path, shared, "one", per_device_train_batch_size=8)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**shared, "output_dir": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    run = subprocess.run(
        [*command, "training.train", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    two = tmp_path / "two"
    weights = weights_of(one)
    for name, tensor in weights_of(two).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)
    for key in ("entropy_penalty", "entropy_target"):
        found, expected = ([entry[key] for entry in log_of(folder) if "loss" in entry] for folder in (two, one))
        assert found == pytest.approx(expected, rel=1e-4), key
    for name, key in (("batch_entropy", "entropy"), ("entropy_bound", "bound")):
        found, expected = (files.read_records(folder / f"{name}.jsonl") for folder in (two, one))
        assert len(found) == len(expected) > 1
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=1e-3, atol=1e-5)


# ---- parametrized weights


def test_gains_have_no_weight_decay_and_frozen_weights_no_gain(values, tmp_path):
    found = {}

    class Groups(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                found.update({names.get(id(p), "targets"): group["weight_decay"] for p in group["params"]})

    with one_more_callback(Groups):
        options = {**ALL_METHODS, "trainable": "(q|down)_proj.weight", "max_steps": 1, "output_dir": str(tmp_path)}
        loop.train(build_recipe({**values, **options}))
    assert found.pop("targets") == 0
    assert len(found) == 8 and all(
        decay == (0 if name.endswith("gain") else values["weight_decay"]) for name, decay in found.items()
    )


# ---- the bound of the entropy


@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("fields", [{}, {"softmax_temperature": 0.3, "num_key_value_heads": 2}], ids=str)
def test_measured_entropy_is_never_below_the_bound(backbone, packed, scale, fields):
    fields = {**fields, "initializer_range": scale, "biased_projections": ["q_proj", "k_proj"]}
    model = tiny_model("SM+LN+G", backbone, **fields)
    assert quantities.EntropyBound.holds(model.config)
    probe = {"input_ids": random_ids(3, 12), "use_cache": False}
    if packed:
        probe["position_ids"] = torch.tensor([[*range(5), *range(7)]] * 3)
    quantity = quantities.EntropyBound()
    with torch.no_grad(), record_attention_entropy(model) as record, quantity.watch(model):
        model(**probe)
    values, scalars = quantity.measure(model)
    bound = torch.tensor(values["bound"])
    assert (record.entropy >= bound - 1e-5).all() and (bound >= 0).all()
    if scale == 0.02 and not packed and not model.config.softmax_temperature:
        # near uniform
        assert (bound > 0.05 * record.max_entropy).all()
    weight = model.model.layers[2].mlp.up_proj.weight
    assert scalars["spectral_norm/layer_2/mlp.up_proj"] == pytest.approx(torch.linalg.svdvals(weight)[0].item())
    assert scalars["entropy_bound/layer_1/mean"] == pytest.approx(bound[1].mean().item())


def test_bound_is_left_out_where_the_projections_do_not_bound_the_scores():
    for fields in ({"normalized_projections": ["k_proj"]}, {"softmax_clipping": 2.0, "attn_implementation": "eager"}):
        assert not quantities.EntropyBound.holds(tiny_model("SM+G", **fields).config)
    assert quantities.EntropyBound.holds(tiny_model("SM+G", normalized_projections=["v_proj"]).config)


# ---- batch entropy


def naive_batch_entropy(states):
    total = 0.0
    for neuron in states.double().reshape(len(states), -1).T:
        mean = neuron.sum() / len(neuron)
        variance = ((neuron - mean) ** 2).sum() / (len(neuron) - 1)
        total = total + 0.5 * torch.log(math.pi * math.e * variance + 1)
    return total / states[0].numel()


def test_batch_entropy_of_gaussians_and_behind_every_layer():
    states = 0.7 * torch.randn(20_000, 2, 3)
    expected = 0.5 * math.log(math.pi * math.e * 0.7**2 + 1)
    assert quantities.batch_entropy(states).item() == pytest.approx(expected, rel=0.01)
    model, probe = tiny_model("SM+R"), random_ids(5, 7)
    callback = callbacks.MeasurementCallback(
        None, [quantities.BatchEntropy()], {"input_ids": probe}, 1, Path("unused")
    )
    values, scalars = callback.describe(callback.measure(model), model)["batch_entropy"]
    hidden = model(probe, output_hidden_states=True).hidden_states[1:-1]
    for layer, states in enumerate(hidden):
        assert values["entropy"][layer] == pytest.approx(naive_batch_entropy(states).item(), rel=1e-5)
        assert scalars[f"batch_entropy/layer_{layer}"] == values["entropy"][layer]
    # one sequence has none
    callback.probe = {"input_ids": probe[:1]}
    assert callback.describe(callback.measure(model), model)["batch_entropy"] == ({"entropy": []}, {})


def test_batch_entropy_loss_matches_float64_and_its_floor_stops_the_targets():
    model, ids = tiny_model("SM+LN+R", embedding_dropout=0.0).train(), random_ids(4, 6)
    penalty = batch_entropy.BatchEntropyLoss(model, weight=0.5, target=0.7, floor=0.4)
    with torch.no_grad():
        penalty.targets[:] = torch.tensor([0.7, -0.6, 0.3])
    with penalty.watch():
        outputs = model(ids, output_hidden_states=True)
    factor = penalty.factor()
    factor.backward()
    states = []
    for layer in model.double().model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    model(ids)
    expected = [naive_batch_entropy(state) for state in states]
    differences = [h - target for h, target in zip(expected, (0.7, 0.6, 0.4), strict=True)]
    assert factor.item() == pytest.approx(0.5 * sum(d.item() ** 2 for d in differences) / 3, rel=1e-5)
    slopes = [-0.5 * 2 / 3 * d.item() * sign for d, sign in zip(differences, (1, -1, 0), strict=True)]
    assert penalty.targets.grad.tolist() == pytest.approx(slopes, rel=1e-4)
    assert outputs.loss is None and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    with penalty.watch():
        model(ids[:1])
    assert penalty.factor().item() == 0


# ---- from a model


@pytest.fixture(scope="module")
def parent(tmp_path_factory, own_cache, values):
    return train(tmp_path_factory.mktemp("parent"), {**values, "seed": 3}, "first")


MODEL_KEYS = ("variant", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")


def tuning(values, **options):
    return {**{key: value for key, value in values.items() if key not in MODEL_KEYS}, **options}


def test_fine_tuned_run_starts_from_the_model_and_comes_back(parent, values, tmp_path):
    started = {}

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            started.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    (tmp_path / "runs").mkdir()
    options = tuning(values, init_from=str(parent), hidden_dropout=0.1, learning_rate=1e-3)
    with one_more_callback(Start):
        run_dir = train(tmp_path / "runs", options, "tuned")
    expected = weights_of(parent)
    assert all(started[name].equal(tensor) for name, tensor in expected.items())
    assert differ(weights_of(run_dir), expected)
    results = runs.read_results(run_dir)
    assert (results["variant"], results["base_model"]) == ("SM+LN+R", "first")
    assert LNFreeForCausalLM.from_pretrained(run_dir / "model").config.hidden_dropout == 0.1
    # as every run: compared, and exported with its parent's name and without a local path
    assert cli.main(["compare", str(tmp_path / "runs")]) == 0
    assert cli.main(["export", str(run_dir), str(tmp_path / "export")]) == 0
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.base_model is None and "It was fine-tuned from first." in card.content
    for path in (tmp_path / "export").rglob("*"):
        if path.suffix in (".md", ".json", ".yaml"):
            assert str(parent) not in path.read_text(), path
    # a name that says so by itself
    assert build_recipe(options).training["output_dir"] == "runs/first-tuned-t16-seed1337"


def test_only_what_is_trainable_changes(parent, values, tmp_path):
    before = weights_of(parent)
    for trainable, is_trained in (
        ("norms", lambda name: "norm" in name),
        (r"layers\.1\..*(q|k)_proj", lambda name: "layers.1." in name and ("q_proj" in name or "k_proj" in name)),
    ):
        options = tuning(values, init_from=str(parent), trainable=trainable)
        after = weights_of(train(tmp_path, options, f"run-{len(trainable)}"))
        changed = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
        assert changed == {name for name in before if is_trained(name)}


def test_stock_llama_is_a_start(parent, values, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    stock = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    stock.save_pretrained(tmp_path / "llama")
    options = tuning(values, tokenizer=str(parent / "model"), init_from=str(tmp_path / "llama"), trainable="norms")
    run_dir = train(tmp_path, options, "tuned", learning_rate=1e-9, max_steps=1, weight_decay=0.0)
    ids = random_ids(2, 16)
    logits = LNFreeForCausalLM.from_pretrained(run_dir / "model").eval()(ids).logits
    torch.testing.assert_close(logits, stock(ids).logits, rtol=0, atol=1e-5)
    results = runs.read_results(run_dir)
    assert (results["variant"], results["base_model"]) == ("SM+RMS+S", "llama")


def test_stock_model_is_a_start_and_what_does_not_fit_is_told(parent, values, tmp_path, capsys):
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    stock.save_pretrained(tmp_path / "stock")
    options = tuning(values, tokenizer=str(parent / "model"), init_from=str(tmp_path / "stock"))
    run_dir = train(tmp_path, options, "tuned", learning_rate=1e-9, max_steps=1, weight_decay=0.0)
    ids = random_ids(2, 16)
    logits = LNFreeForCausalLM.from_pretrained(run_dir / "model").eval()(ids).logits
    torch.testing.assert_close(logits, stock.eval()(ids).logits, rtol=0, atol=1e-5)
    assert runs.read_results(run_dir)["base_model"] == "stock"
    capsys.readouterr()
    wrong = (
        ({"block_size": 17}, "block_size=17 is longer than the max_position_embeddings=16"),
        ({"trainable": "gate"}, "trainable='gate' is found in no parameter of"),
        ({"init_from": str(tmp_path)}, f"model '{tmp_path}' cannot be loaded"),
    )
    for number, (change, message) in enumerate(wrong):
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump({**options, **change, "output_dir": str(tmp_path / f"wrong-{number}")}))
        assert cli.main(["train", str(path)]) == 1
        assert message in capsys.readouterr().err
    # norms of a model that has none in its layers
    with pytest.raises(UserError, match=r"trainable='norms': .*SM\+R.* has no norms in its layers"):
        loop.train(
            build_recipe({**values, "variant": "SM+R", "trainable": "norms", "output_dir": str(tmp_path / "x")})
        )


def test_finetune_is_a_recipe_by_name(parent, values, tmp_path, capsys):
    changes = [f"{key}={json.dumps(value)}" for key, value in tuning(values).items()]
    assert cli.main(["train", "--plan", "finetune", f"init_from={parent}", *changes]) == 0
    parameters = runs.read_results(parent)["parameters"]
    assert f"SM+LN+R on gpt2, {parameters:,} parameters" in capsys.readouterr().out
    assert cli.main(["train", "finetune", f"init_from={parent}", f"output_dir={tmp_path}", *changes]) == 0
    assert runs.read_results(tmp_path)["base_model"] == "first"


def test_loss_that_is_logged_is_the_models_own(values, tmp_path):
    short = {**values, "max_steps": 3, "logging_steps": 3, "save_strategy": "no", "embedding_dropout": 0.0}
    short |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    plain, run = train(tmp_path, short, "plain"), train(tmp_path, short, "run", batch_entropy_weight=3.0)
    (theirs,), (ours,) = ([entry for entry in log_of(folder) if "loss" in entry] for folder in (plain, run))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    # weights that stand still: the factor is that of each pass alike, and not their sum
    record = files.read_records(run / "batch_entropy.jsonl")[0]["entropy"]
    expected = 3.0 * sum((h - 0.5) ** 2 for h in record) / len(record)
    assert ours["batch_entropy_factor"] == pytest.approx(expected, rel=0.3)
