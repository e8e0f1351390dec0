"""Norms taken out while a model is fine-tuned: the wrapped model, its schedule, and what is folded at the end."""

import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from training import cli
from training.errors import UserError
from training.files import read_records
from training.methods import NORM_REMOVAL_FIELDS
from training.recipe import build_recipe
from training.runs import read_results
from training.train import loop
from training.train.norm_removal import RemovableNorm, Removal, fold, plan_removals, wrap_norms

from ..conftest import every_backbone, interrupting, one_more_callback, random_ids, tiny_model


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def removed(model: LNFreeForCausalLM, removals: list[Removal], constant: float = 1.7) -> LNFreeForCausalLM:
    """The wrapped model with these parts gone, each for a constant of its own."""
    for index, removal in enumerate(removals):
        norm = model.get_submodule(removal.name)
        norm.share[removal.part], norm.deviation[removal.part] = 0.0, constant + 0.3 * index
    return model


def naive_logits(model: LNFreeForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The wrapped model by its definition, in float64, from its parameters and constants alone."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def norm(states, name, part=0):
        states = states - states.mean(-1, keepdim=True)
        deviation = (states.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        constant = state[f"{name}.deviation"][part]
        share = state[f"{name}.share"][part]
        scaled = states / deviation if share == 1 else states / constant
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(states, name):
        return states @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def rotate(states):
        if config.position_embedding_type != "rotary":
            return states
        size = config.rotary_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = torch.arange(states.shape[2], dtype=torch.float64)[:, None] / config.rope_theta**exponents
        angles = torch.cat([angles, angles], -1)
        turned, left = states[..., :size], states[..., size:]
        half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
        return torch.cat([turned * angles.cos() + half * angles.sin(), left], -1)

    states = state["model.embed_tokens.weight"][input_ids]
    if config.position_embedding_type == "learned":
        states = states + state["model.embed_positions.weight"][: input_ids.shape[1]]
    mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"

        def attention(x, layer=layer):
            query_key, value = (norm(x, f"{layer}.input_layernorm", part) for part in (0, 1))
            q, k, v = (
                linear(read, f"{layer}.self_attn.{name}_proj").unflatten(-1, (heads, width)).transpose(1, 2)
                for name, read in (("q", query_key), ("k", query_key), ("v", value))
            )
            scores = (rotate(q) @ rotate(k).mT / width**0.5).masked_fill(~mask, -torch.inf)
            return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")

        def mlp(x, layer=layer):
            x = linear(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.up_proj")
            return linear(x.relu(), f"{layer}.mlp.down_proj")

        if config.parallel_residual:
            states = states + attention(states) + mlp(states)
        else:
            states = states + attention(states)
            states = states + mlp(states)
    final = norm(states, "model.norm") if "model.norm.share" in state else states
    return final @ state["lm_head.weight"].T


def wrapped(backbone: str, **fields) -> LNFreeForCausalLM:
    torch.manual_seed(3)
    model = tiny_model("SM+LN+R", backbone, **fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return wrap_norms(model, keep_final_norm=False)


@every_backbone
def test_before_the_first_removal_logits_are_the_originals(backbone):
    torch.manual_seed(3)
    model = tiny_model("SM+LN+R", backbone).eval()
    input_ids = random_ids(2, 11)
    expected = model(input_ids).logits
    torch.testing.assert_close(wrap_norms(model, keep_final_norm=False)(input_ids).logits, expected, atol=1e-5, rtol=0)


@every_backbone
def test_after_each_removal_the_model_equals_a_naive_computation(backbone):
    model = wrapped(backbone)
    removals = [removal for _, removal in plan_removals(model.config.num_hidden_layers, 1, [1, 1, 1, 1], False)]
    assert len(removals) == 3 * model.config.num_hidden_layers + 1
    input_ids = random_ids(2, 9)
    seen = []
    for number in range(len(removals) + 1):
        logits = removed(model, removals[:number])(input_ids).logits.double()
        torch.testing.assert_close(logits, naive_logits(model, input_ids), atol=1e-4, rtol=1e-4)
        seen.append(logits)
    # each removal changes something
    assert all((after - before).abs().max() > 1e-3 for before, after in zip(seen, seen[1:], strict=False))


@every_backbone
@pytest.mark.parametrize("keep", [False, True], ids=["all", "but-the-final"])
def test_folded_model_equals_the_wrapped_one(backbone, keep):
    torch.manual_seed(3)
    model = wrapped(backbone) if not keep else None
    if keep:
        model = wrap_norms(tiny_model("SM+LN+R", backbone).eval(), keep_final_norm=True)
    layers = model.config.num_hidden_layers
    removed(model, [removal for _, removal in plan_removals(layers, 1, [1, 1, 1, 1], keep)])
    input_ids = random_ids(2, 9)
    expected = model(input_ids).logits
    model.generation_config.max_length = 17
    folded = fold(model)
    assert folded.config.variant == ("SM+R" if keep else "SM+R-noLNf")
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(torch.nn.LayerNorm) == int(keep) and RemovableNorm not in kinds
    torch.testing.assert_close(folded(input_ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert folded.generation_config.max_length == 17 and not folded.training
    assert folded.half()(input_ids).logits.isfinite().all()


def test_a_model_of_constant_deviations_loses_nothing():
    """One token, one position, and weights of 0: every stream has the same deviation, which the running mean finds."""
    model = wrapped("gpt2", embedding_dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    input_ids = torch.full((2, 1), 7)
    expected = model(input_ids).logits
    model.train()
    model(input_ids)
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, RemovableNorm)]
    for norm in norms:
        norm.end_step()
        norm.share.zero_()
    torch.testing.assert_close(fold(model)(input_ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [False, True], ids=["all", "but-the-final"])
def test_rms_norms_of_a_llama_fold_too(keep):
    """By the stock class with its norms replaced by the constants, in float64."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LNFreeConfig.from_variant("SM+RMS+S", backbone="llama", **sizes, **heads, initializer_range=0.2)
    model = LNFreeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    stock = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rms_norm_eps=config.layer_norm_eps, hidden_act="silu"))
    stock.load_state_dict(model.state_dict())
    stock = stock.double().eval()
    wrap_norms(model, keep_final_norm=keep)
    removals = [removal for _, removal in plan_removals(2, 1, [1, 1, 1, 1], keep)]
    removed(model, removals)
    constants = {(removal.name, removal.part): 1.7 + 0.3 * index for index, removal in enumerate(removals)}
    for index, layer in enumerate(stock.model.layers):
        name = f"model.layers.{index}"
        mlp = layer.post_attention_layernorm.weight / constants[f"{name}.post_attention_layernorm", 0]
        layer.post_attention_layernorm.forward = lambda states, scale=mlp: states * scale
        weight = layer.input_layernorm.weight
        layer.input_layernorm.forward = lambda states: states
        for letter, part in (("q", 0), ("k", 0), ("v", 1)):
            scale = weight / constants[f"{name}.input_layernorm", part]
            projection = getattr(layer.self_attn, f"{letter}_proj")
            projection.register_forward_pre_hook(lambda module, args, scale=scale: (args[0] * scale,))
    if not keep:
        final = stock.model.norm.weight / constants["model.norm", 0]
        stock.model.norm.forward = lambda states: states * final
    input_ids = random_ids(2, 9)
    expected = stock(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits.double(), expected, atol=1e-4, rtol=1e-4)
    folded = fold(model)
    assert folded.config.variant == ("SM+S" if keep else "SM+S-noLNf") and folded.config.backbone == "llama"
    assert folded.config.biased_projections == []
    torch.testing.assert_close(folded(input_ids).logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_running_mean_is_over_all_tokens_of_a_step_and_stands_still_once_removed():
    norm = RemovableNorm(torch.nn.LayerNorm(8), skip_first=True).train()
    streams = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    deviations = (streams.double().var(-1, unbiased=False) + 1e-5).sqrt()[..., 1:]  # position 0 is left out
    means = [deviations[:2].mean(), deviations[2].mean()]
    norm(streams[0]), norm(streams[1]), norm.end_step()
    torch.testing.assert_close(norm.deviation.double(), means[0][None], atol=1e-6, rtol=0)
    norm(streams[2]), norm.end_step()
    after = 0.9 * means[0] + 0.1 * means[1]
    torch.testing.assert_close(norm.deviation.double(), after[None], atol=1e-6, rtol=0)
    norm.share.zero_()
    norm(100 * streams[2]), norm.end_step()
    torch.testing.assert_close(norm.deviation.double(), after[None], atol=1e-6, rtol=0)
    norm.eval()
    norm(streams[0])
    assert norm.seen.tolist() == [0, 0]


@every_backbone
def test_position_0_is_left_out_of_the_constants_of_every_norm(backbone):
    model = wrap_norms(tiny_model("SM+LN+R", backbone), keep_final_norm=False, skip_first=True).train()
    inputs = {}
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, RemovableNorm)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach().double()}))
    model(random_ids(2, 7))
    for name, norm in norms.items():
        norm.end_step()
        deviations = (inputs[name].var(-1, unbiased=False) + 1e-5).sqrt()
        for found in norm.deviation.double():
            torch.testing.assert_close(found, deviations[:, 1:].mean(), atol=1e-6, rtol=1e-5)
            assert (found - deviations.mean()).abs() > 1e-5, name


def test_removals_go_in_the_published_order():
    planned = plan_removals(2, 20, [2, 2, 3, 4], keep_final_norm=False)
    assert [(step, removal.name.removeprefix("model."), removal.part) for step, removal in planned] == [
        (20, "layers.0.post_attention_layernorm", 0),
        (22, "layers.1.post_attention_layernorm", 0),
        (24, "layers.0.input_layernorm", 0),
        (26, "layers.1.input_layernorm", 0),
        (29, "layers.0.input_layernorm", 1),
        (32, "layers.1.input_layernorm", 1),
        (36, "norm", 0),
    ]
    assert len(plan_removals(2, 20, [2, 2, 3, 4], keep_final_norm=True)) == 6


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(UserError, match="norm_type='none'"):
        wrap_norms(tiny_model("SM+R"), keep_final_norm=False)
    for fields, message in (
        ({"norm_position": "peri"}, "norm_position one of 'pre', .* got 'peri'"),
        ({"attention_gate_init": 0.5}, "attention_gate_init one of None, .* got 0.5"),
        ({"identity_projections": ["v_proj"]}, r"identity_projections one of .* got \['v_proj'\]"),
        ({"mlp_type": "fused"}, "mlp_type one of 'two_layer', 'gated', .* got 'fused'"),
        ({"per_layer_config": {1: {"mlp_type": "none"}}}, "mlp_type one of .* got 'none'"),
    ):
        with pytest.raises(UserError, match=message):
            wrap_norms(
                LNFreeForCausalLM(LNFreeConfig(norm_type="layernorm", **SIZES, **fields)), keep_final_norm=False
            )
    with pytest.raises(UserError, match="layers.1.input_layernorm.*not removed"):
        fold(wrapped("gpt2"))


# ---- runs


@pytest.fixture(scope="module")
def parent(recipe_values, own_cache, tmp_path_factory):
    """A finished run of a model with norms."""
    folder = tmp_path_factory.mktemp("parents") / "with_norms"
    loop.train(build_recipe({**recipe_values, "variant": "SM+LN+R", "save_strategy": "no", "output_dir": str(folder)}))
    return folder


@pytest.fixture(scope="module")
def removal_values(recipe_values, parent):
    kept = ("dataset", "eval_fraction", "block_size", "per_device_train_batch_size", "disable_tqdm", "use_cpu")
    values = {name: recipe_values[name] for name in kept if name in recipe_values}
    steps = {"max_steps": 12, "logging_steps": 1, "save_steps": 4, "remove_norms_from": 3, "embedding_dropout": 0.1}
    return {**values, **steps, "init_from": str(parent), "remove_norms_gaps": [1, 1, 1, 1], "learning_rate": 1e-3}


def run(values: dict, folder) -> dict[str, torch.Tensor]:
    """By the command; the weights at the end."""
    folder.mkdir()
    path = folder / "recipe.yaml.in"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run")}))
    assert cli.main(["train", str(path)]) == 0
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def removed_weights(removal_values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("removed") / "whole"
    return folder / "run", run(removal_values, folder)


def test_a_run_ends_as_an_ordinary_model_without_norms(removed_weights, parent):
    folder, weights = removed_weights
    results = read_results(folder)
    assert results["variant"] == "SM+R-noLNf" and results["base_model"] == "with_norms"
    assert not [name for name in weights if "norm" in name or "share" in name or "deviation" in name]
    records = read_records(folder / "norm_removal.jsonl")
    # seven parts of two layers, one a step from step 3 on
    assert [sum(value == 0 for shares in r["share"].values() for value in shares) for r in records] == [
        *(0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7)
    ]
    assert all(math.isfinite(value) for r in records for values in r["deviation"].values() for value in values)
    model = LNFreeForCausalLM.from_pretrained(folder / "model").eval()
    input_ids = random_ids(2, 8)
    assert model(input_ids).logits.isfinite().all()
    assert results["perplexity"] < 3 * read_results(parent)["perplexity"]


def test_an_interrupted_run_goes_on_bit_by_bit(removal_values, removed_weights, tmp_path):
    recipe = {**removal_values, "output_dir": str(tmp_path / "run")}
    with one_more_callback(interrupting(5, 7, 10)):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                loop.train(build_recipe(recipe))
        loop.train(build_recipe(recipe))
    folder, expected = removed_weights
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)
    assert read_records(tmp_path / "run" / "norm_removal.jsonl") == read_records(folder / "norm_removal.jsonl")


OPTIONS = [
    {"remove_norms_from": 4},
    {"remove_norms_gaps": [0, 2, 1, 1]},
    {"remove_norms_taper": 2},
    {"remove_norms_tolerance": 1e-6},
    {"remove_norms_auxiliary_weight": 5.0},
    {"remove_norms_skip_first": True},
    {"keep_final_norm": True},
]


@pytest.mark.parametrize("change", OPTIONS, ids=lambda change: next(iter(change)))
def test_every_option_acts_through_the_command(change, removal_values, removed_weights, tmp_path):
    weights = run({**removal_values, "save_strategy": "no", **change}, tmp_path / "changed")
    expected = removed_weights[1]
    assert weights.keys() != expected.keys() or any(not weights[name].equal(expected[name]) for name in expected)
    assert ("model.norm.weight" in weights) == ("keep_final_norm" in change)


def test_every_option_has_a_test_that_it_acts():
    assert {name for change in OPTIONS for name in change} == {*NORM_REMOVAL_FIELDS}


def test_with_a_tolerance_the_next_norm_waits_for_the_loss(removal_values, tmp_path):
    """One so large that the loss is always back, and one so small that it never is: then they go at the end."""
    starts = {}
    for tolerance in (100.0, 1e-6):
        values = {**removal_values, "save_strategy": "no", "remove_norms_tolerance": tolerance, "learning_rate": 1e-9}
        run(values, tmp_path / str(tolerance))
        starts[tolerance] = read_records(tmp_path / str(tolerance) / "run" / "norm_removal.jsonl")[-1]["starts"]
    assert starts[100.0] == [3, 4, 5, 6, 7, 8, 9]
    assert starts[1e-6][0] == 3 and starts[1e-6][-1] <= 12 and starts[1e-6] > starts[100.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_from": None, "variant": "SM+LN+R", "vocab_size": 300}, "needs init_from: a trained model that has"),
        ({"remove_norms_from": 1}, "remove_norms_from must be at least 2, got 1"),
        ({"remove_norms_gaps": [1, 2]}, r"must be four numbers of steps.* got \[1, 2\]"),
        ({"remove_norms_taper": -1}, "remove_norms_taper must be in .* got -1"),
        ({"remove_norms_tolerance": 0.0}, "remove_norms_tolerance must be finite and more than 0, got 0.0"),
        ({"remove_norms_auxiliary_weight": 1.0, "keep_final_norm": True}, "no effect with keep_final_norm=True"),
        ({"remove_norms_from": None, "keep_final_norm": True, "remove_norms_gaps": [2, 2, 3, 2]}, "no effect without"),
        ({"trainable": "norms"}, "trainable='norms' and remove_norms_from do not go together"),
        ({"weight_parametrization": "weight_norm"}, "='weight_norm' and remove_norms_from do not go together"),
        ({"remove_norms_gaps": [1, -1, 1, 1]}, r"must be four numbers of steps.* got \[1, -1, 1, 1\]"),
        ({"remove_norms_tolerance": math.inf}, "remove_norms_tolerance must be finite and more than 0, got inf"),
        ({"remove_norms_tolerance": math.nan}, "remove_norms_tolerance must be finite and more than 0, got nan"),
        ({"remove_norms_auxiliary_weight": math.nan}, "remove_norms_auxiliary_weight must be in .* got nan"),
        ({"fsdp_size": 2}, "remove_norms_from=3 needs whole weights and an optimizer in every process"),
        ({"max_steps": -1}, "needs a budget"),
    ],
)
def test_wrong_options_are_refused_before_any_work(change, message, removal_values):
    with pytest.raises(UserError, match=message):
        build_recipe({**removal_values, **change})


def test_a_schedule_that_does_not_end_is_refused_before_training(removal_values, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    # what tapers off is there until the last step of it
    for steps, taper, last in ((8, 0, 9), (10, 2, 11)):
        values = {**removal_values, "max_steps": steps, "remove_norms_taper": taper}
        path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / f"run-{taper}")}))
        assert cli.main(["train", str(path)]) == 1
        assert f"the last of 7 norms is gone at step {last}, and max_steps is {steps}" in capsys.readouterr().err


def test_what_was_refused_does_not_keep_its_folder(removal_values, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    for steps, said in ((8, "max_steps is 8"), (7, "max_steps is 7")):
        path.write_text(yaml.safe_dump({**removal_values, "max_steps": steps, "output_dir": str(tmp_path / "run")}))
        assert cli.main(["train", str(path)]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("times", "ends"), [(900.0, False), (1100.0, True), (math.nan, True)])
def test_a_norm_that_explodes_ends_the_run_by_its_name(times, ends, removal_values, tmp_path, capsys):
    """More than a thousand times the first deviation, planted before the second log."""

    class Plant(TrainerCallback):
        def on_log(self, args, state, control, model=None, logs=None, **kwargs):
            if state.global_step == 2 and "loss" in logs:
                norm = model.model.layers[1].post_attention_layernorm
                first = read_records(tmp_path / "run" / "norm_removal.jsonl")[0]["deviation"]
                norm.deviation.fill_(times * first["model.layers.1.post_attention_layernorm"][0])

    path = tmp_path / "recipe.yaml"
    values = {**removal_values, "max_steps": 9, "save_strategy": "no"}
    path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "run")}))
    with one_more_callback(Plant):
        assert cli.main(["train", str(path)]) == int(ends)
    said = "is unstable at step 2: the mean deviation before model.layers.1.post_attention_layernorm is "
    told = capsys.readouterr().err
    assert (said in told and "layers.1.post_attention_layernorm is the norm that exploded" in told) == ends


def test_shares_taper_off_along_a_cosine(removal_values, tmp_path):
    run({**removal_values, "save_strategy": "no", "remove_norms_taper": 3, "max_steps": 13}, tmp_path / "tapered")
    records = read_records(tmp_path / "tapered" / "run" / "norm_removal.jsonl")
    shares = [record["share"]["model.layers.0.post_attention_layernorm"][0] for record in records]
    # from step 3 on, over three steps and gone in the fourth
    expected = [1.0, 1.0, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3)), *[0.0] * 8]
    assert shares == pytest.approx(expected, abs=1e-6)


def test_a_norm_that_is_left_is_not_folded():
    model = wrapped("gpt2")
    with pytest.raises(UserError, match="model.norm are not removed: train for more steps"):
        fold(model)
    removals = [removal for _, removal in plan_removals(3, 2, [1, 1, 1, 1], keep_final_norm=False)]
    removed(model, removals)
    model.model.norm.share[0] = 1e-6
    with pytest.raises(UserError, match="model.norm is not removed: train for more steps"):
        fold(model)


@pytest.mark.parametrize("final", ["rmsnorm", "dyt", "derf"])
def test_a_final_norm_of_another_kind_is_not_removed(final):
    with pytest.raises(UserError, match=f"all layernorm or all rmsnorm, got .*final_norm_type='{final}'"):
        wrap_norms(tiny_model("SM+LN+R", final_norm_type=final), keep_final_norm=False)
