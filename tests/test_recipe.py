"""Recipes: every file parses, and what a person gets wrong is one line that names it."""

import re

import pytest
import yaml
from transformers import TrainingArguments

from training.errors import UserError
from training.recipe import (
    DATA_FIELDS,
    MODEL_FIELDS,
    OLDER_NAMES,
    TRAINING_FIELDS,
    build_recipe,
    load_recipe,
    parent_name,
)

from .conftest import ROOT, every_variant


RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
SMALLEST = {"vocab_size": 300, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


def test_no_key_has_two_meanings():
    assert not DATA_FIELDS & MODEL_FIELDS and not DATA_FIELDS & TRAINING_FIELDS and not MODEL_FIELDS & TRAINING_FIELDS


@every_variant
# a fine-tuned model has the variant that it has
@pytest.mark.parametrize("path", [p for p in RECIPES if "init_from:" not in p.read_text()], ids=lambda path: path.stem)
def test_every_recipe_makes_every_variant(path, variant):
    recipe = load_recipe(path, [f"variant={variant}"])
    preset = "@Stable" if path.stem.endswith("_stable") else ""
    assert recipe.build_config().variant == variant + preset
    assert f"lnfree train {path.stem} " in path.read_text().splitlines()[1]
    arguments = TrainingArguments(**{**recipe.training, "fp16": False, "bf16": False})
    tokens = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * recipe.data.block_size
    if path.stem.startswith(("gpt2", "pythia")):
        # the paper's optimization
        assert tokens * arguments.max_steps == 65536 * 32000
        assert (arguments.learning_rate, arguments.weight_decay, arguments.warmup_steps) == (0.001, 0.1, 0.05)
        assert (arguments.max_grad_norm, arguments.adam_epsilon, arguments.seed) == (1.0, 1e-8, 1337)
        half = "bf16" if path.stem.endswith("_bf16") else "fp16"
        assert recipe.training[half] and recipe.build_config().initializer_range == 0.02


@pytest.mark.parametrize(
    ("stable", "plain", "gain"), [("small_stable", "quick", 12**-0.5), ("gpt2_t128_stable", "gpt2_t128", 24**-0.5)]
)
def test_stable_recipes_differ_in_gains_and_the_optimizer_of_the_layers_alone(stable, plain, gain):
    stable, plain = (load_recipe(RECIPES[0].with_name(f"{name}.yaml"), ["variant=SM+G"]) for name in (stable, plain))
    ours, theirs = stable.to_dict(), plain.to_dict()
    differing = {key for key in ours if ours[key] != theirs.get(key)} - {"output_dir"}
    muon = {"muon_momentum", "muon_adjustment"}
    assert differing == {"preset", "layer_optimizer", "layer_learning_rate", *muon} and ours.keys() == theirs.keys()
    config = stable.build_config()
    assert config.residual_gains == pytest.approx([1, gain, 1, gain]) and not config.residual_gains_trainable
    # one rule for both widths, and one for the initial weights
    width = config.hidden_size
    assert ours["layer_learning_rate"] == pytest.approx(0.012 * 128 / width)
    assert config.initializer_range == pytest.approx(0.02 * (768 / width) ** 0.5, rel=0.01)


def test_recipe_in_bfloat16_is_the_papers_but_for_the_precision():
    ours, theirs = (load_recipe(name, ["output_dir=runs/x"]).to_dict() for name in ("gpt2_t128_bf16", "gpt2_t128"))
    assert (ours.pop("bf16"), theirs.pop("fp16")) == (True, True) and ours == theirs


def test_recipe_of_eight_processes_is_the_papers():
    node, paper = (load_recipe(path) for name in ("node8_", "") for path in RECIPES if path.stem == f"{name}gpt2_t128")
    ours, theirs = (TrainingArguments(**{**recipe.training, "fp16": False, "bf16": False}) for recipe in (node, paper))
    assert 8 * ours.train_batch_size == theirs.train_batch_size * theirs.gradient_accumulation_steps
    assert node.build_config() == paper.build_config() and ours.max_steps == theirs.max_steps
    for name in ("learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_grad_norm"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("name", "backbone", "parameters"),
    [
        ("gpt2_t128", "gpt2", (12, 12, 768)),
        ("pythia70m_t128", "pythia", (6, 8, 512)),
    ],
)
def test_papers_models(name, backbone, parameters):
    config = load_recipe(RECIPES[0].with_name(f"{name}.yaml")).build_config()
    assert config.backbone == backbone
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == parameters
    assert config.biased_projections == ["q_proj", "k_proj"] and config.embedding_dropout == 0.1
    assert config.max_position_embeddings == int(name[-3:])


def test_papers_pythia_at_twice_the_length_has_as_many_tokens_a_step():
    path = next(path for path in RECIPES if path.stem == "pythia70m_t128")
    (command,) = re.findall(r"#   lnfree train pythia70m_t128 (block_size=.*)", path.read_text())
    longer = load_recipe(path, command.split())
    assert longer.data.block_size == longer.build_config().max_position_embeddings == 256
    assert longer.tokens_per_step == load_recipe(path).tokens_per_step == 65_536


def test_preset_is_of_a_variant_that_names_none():
    values = {**SMALLEST, "preset": "Stable"}
    assert build_recipe({**values, "variant": "SM+R"}).build_config().variant == "SM+R@Stable"
    assert build_recipe({**values, "variant": "SM+R@Stable"}).name.startswith("gpt2-sm-r-stable-")
    assert build_recipe({**values, "variant": "SM+R", "preset": None}).build_config().variant == "SM+R"
    with pytest.raises(UserError, match="preset='Stable' has no effect on variant='SM\\+R@QKNorm'"):
        build_recipe({**values, "variant": "SM+R@QKNorm"})
    with pytest.raises(UserError, match="SM\\+R@Sable"):
        build_recipe({**values, "variant": "SM+R", "preset": "Sable"})
    with pytest.raises(UserError, match="preset='Stable' has no effect with init_from"):
        build_recipe({**SMALLEST, "preset": "Stable", "init_from": "gpt2"})


def test_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "variant": "SM+G", "learning_rate": 0.1}))
    recipe = load_recipe(path, ["variant=SM+R", "learning_rate=1e-3", "seed=7", "biased_projections=[v_proj]"])
    assert recipe.data.variant == "SM+R"
    assert recipe.training["learning_rate"] == 0.001
    assert recipe.build_config().biased_projections == ["v_proj"]
    assert recipe.training["output_dir"] == "runs/gpt2-sm-r-t128-seed7"


def test_digits_in_quotes_are_a_number_only_where_a_number_is_meant():
    values = {"dataset_config": "2019", "run_name": "007", "learning_rate": "1e-3", "initializer_range": "2e-2"}
    recipe = build_recipe({**SMALLEST, **values})
    assert (recipe.data.dataset_config, recipe.training["run_name"]) == ("2019", "007")
    assert recipe.training["learning_rate"] == 0.001 and recipe.build_config().initializer_range == 0.02


WRONG = [
    ({"learnin_rate": 1}, "unknown key 'learnin_rate'.*'learning_rate'"),
    ({"hiden_size": 8}, "unknown key 'hiden_size'.*'hidden_size'"),
    ({"variants": "SM+R"}, "unknown key 'variants'.*'variant'"),
    ({"variant": "SM+X"}, "variant must be.*'SM\\+X'"),
    ({"max_steps": "many"}, "max_steps.*int.*many"),
    ({"learning_rate": "fast"}, "learning_rate.*float.*fast"),
    ({"block_size": 12.5}, "block_size.*int"),
    ({"block_size": 1}, "block_size must be at least 2, got 1"),
    ({"logging_steps": 0}, "logging_steps must be at least 1, got 0"),
    # of the steps, as the Trainer has it
    ({"save_steps": 0.5, "logging_steps": 0.25}, "logging_steps must be at least 1, got 0.25"),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps must be at least 1, got 0"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"seed": 2**32}, "seed must be less than 2\\*\\*32, got 4294967296"),
    ({"learning_rate": float("nan")}, "learning_rate must be finite and more than 0, got nan"),
    ({"num_train_epochs": 0}, "num_train_epochs must be finite and more than 0, got 0"),
    ({"vocab_size": "300"}, "vocab_size.*int.*'300'"),
    ({"dtype": "float16"}, "unknown key 'dtype'"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last is not supported in a recipe: the evaluation is over"),
    ({"fsdp": "full_shard"}, "fsdp is not supported in a recipe: fsdp_size"),
    # with a cache, documents would not be separated
    ({"use_cache": True}, "use_cache is not supported in a recipe: training keeps no cache"),
    ({"batch_eval_metrics": True}, "batch_eval_metrics is not supported in a recipe"),
    ({"prediction_loss_only": True}, "prediction_loss_only is not supported in a recipe"),
    ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False is not supported in a recipe"),
    ({"bf16_full_eval": True}, "bf16_full_eval is not supported in a recipe: .*saved in half precision"),
    ({"fp16_full_eval": True}, "fp16_full_eval is not supported in a recipe: .*saved in half precision"),
    ({"label_names": ["labels"]}, "label_names is not supported in a recipe"),
    ({"use_liger_kernel": True}, "use_liger_kernel is not supported in a recipe"),
    ({"accelerator_config": {"split_batches": True}}, "split_batches is not supported in a recipe"),
    ({"eos_token_id": 7}, "eos_token_id must be left out of a recipe: it is the tokenizer's; got 7"),
    ({"pad_token_id": 0}, "pad_token_id must be left out of a recipe: it is the tokenizer's; got 0"),
    ({"max_steps": 0}, "max_steps must be at least 1"),
    ({"output_dir": None}, "output_dir must be a folder, got None"),
    ({"output_dir": ""}, "output_dir must be a folder, got ''"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end"),
    ({"push_to_hub": True, "hub_model_id": "me/x"}, "push_to_hub is not supported in a recipe.*'lnfree publish'"),
    ({"hub_token": "hf_of_somebody"}, "hub_token is not supported in a recipe: (?!.*hf_of_somebody)"),
    ({"metric_for_best_model": "loss"}, "metric_for_best_model is not supported in a recipe: variants are compared"),
    ({"save_strategy": "best"}, "save_strategy='best' is not supported in a recipe: variants are compared at equal"),
    ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be in \\[0, 1\\), got 1.0"),
    ({"label_smoothing_factor": -0.1}, "label_smoothing_factor must be in \\[0, 1\\), got -0.1"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"eval_fraction": 1.5}, "eval_fraction must be in \\(0, 1\\), got 1.5"),
    ({"hidden_size": 9}, "num_attention_heads must divide hidden_size=9"),
    ({"vocab_size": 100}, "vocab_size of at least 258.*got 100"),
    ({"negative_slope": 0.1}, "negative_slope is an option of hidden_act='leaky_relu'"),
    ({"block_size": 64, "max_position_embeddings": 32}, "block_size=64 is longer than max_position_embeddings=32"),
    ({"save_steps": 15, "logging_steps": 10}, "save_steps must be a multiple of logging_steps.*15.*10"),
    ({"shuffle_buffer": 7}, "shuffle_buffer=7 has no effect without streaming=True"),
    ({"decay_slopes": True}, "decay_slopes=True has no effect without a learned slope"),
    ({"rope_theta": 5e5}, "rope_theta=500000.0 has no effect without position_embedding_type='rotary'"),
    ({"partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0 has no effect without position_embedding_type"),
    ({"norm_alpha_init": 0.8}, "norm_alpha_init=0.8 has no effect without a norm of type dyt or derf"),
    ({"variant": "SM+R-noLNf", "layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06 has no effect without a norm that"),
    ({"norm_position": "peri"}, "norm_position=peri has no effect without norms in the layers"),
    ({"variant": "SM+R@PostLN"}, "preset PostLN has no effect without norms in the layers, got SM\\+R@PostLN"),
    ({"intermediate_size": 24, "mlp_type": "none"}, "intermediate_size=24 has no effect without feed-forward layers"),
    ({"classifier_dropout": 0.1}, "classifier_dropout is not supported in a recipe: it is of a classifier"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True has no effect without dataloader_n"),
    ({"hub_strategy": "end"}, "hub_strategy is not supported in a recipe: .*'lnfree publish'"),
    ({"do_train": True}, "do_train is not supported in a recipe: every run trains"),
    ({"remove_unused_columns": False}, "remove_unused_columns is not supported in a recipe"),
    ({"compile_layers": True, "torch_compile_mode": "default"}, "compile_layers=True and torch_compile_mode=default"),
]
# fields that another one switches off: each with what brings it to act
IDLE = [
    ({"eval_steps": 2, "eval_strategy": "epoch"}, {"eval_strategy": "steps"}),
    ({"eval_delay": 2}, {"eval_strategy": "epoch"}),
    ({"eval_sequences": 2}, {"eval_strategy": "steps"}),
    ({"eval_sequences": 2}, {"eval_on_start": True}),
    ({"save_strategy": "no", "save_total_limit": 3}, {"save_strategy": "steps"}),
    ({"save_strategy": "no", "save_only_model": True}, {"save_strategy": "steps"}),
    ({"save_strategy": "epoch", "save_steps": 1000}, {"save_strategy": "steps"}),
    ({"save_strategy": "no", "milestones": [1000]}, {"save_strategy": "epoch"}),
    ({"eval_fraction": 0.2, "eval_dataset": "e.jsonl"}, {"eval_dataset": None}),
    ({"num_train_epochs": 2.0, "max_steps": 5}, {"max_steps": -1}),
    ({"num_train_epochs": 2.0, "train_tokens": 5000}, {"train_tokens": None}),
    ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}),
    ({"activation_checkpointing_kwargs": {"use_reentrant": False}}, {"activation_checkpointing": True}),
    ({"adam_beta2": 0.9, "optim": "sgd"}, {"optim": "adamw_torch"}),
    ({"optim_args": "momentum=0.9"}, {"optim": "sgd"}),
    ({"dataloader_in_order": False}, {"dataloader_num_workers": 1}),
    ({"run_name": "mine"}, {"report_to": "tensorboard"}),
    ({"project": "mine"}, {"report_to": ["trackio"]}),
]


@pytest.mark.parametrize(("values", "acting"), IDLE, ids=lambda v: "-".join(v))
def test_field_that_another_switches_off_is_told(values, acting):
    (line,) = build_recipe({**SMALLEST, **values}).idle
    names = {*values, *(OLDER_NAMES.get(name, name) for name in values)}
    assert re.match(rf"({'|'.join(f'{name}=' for name in names)}).* has no effect without ", line)
    assert build_recipe({**SMALLEST, **values, **acting}).idle == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_fields_of_the_recipes_that_come_along_all_act(path):
    start = ["init_from=openai-community/gpt2"] if path.stem == "remove_norms" else []
    assert load_recipe(path, start).idle == []


def test_what_has_an_effect_is_taken():
    for values in (
        {"variant": "SM+LR-layer", "decay_slopes": True},
        {"position_embedding_type": "rotary", "rope_theta": 5e5, "partial_rotary_factor": 1.0},
        {"variant": "SM+DyT+G", "norm_alpha_init": 0.8},
    ):
        assert values.items() <= build_recipe({**SMALLEST, **values}).to_dict().items()


@pytest.mark.parametrize(("values", "message"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_wrong_recipe_is_one_clear_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        build_recipe({**SMALLEST, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "key: value"),
        ("a: [", "cannot be read: while parsing"),
        ("? [a]\n: 1", "cannot be read: TypeError: unhashable"),
        ("seed: 1\nvariant: SM+R\nseed: 2", "'seed' is given twice.* line 3"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_numbers_with_an_exponent_are_numbers_at_any_depth(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr_scheduler_kwargs: {min_lr: 1e-4, name: '1e-4', text: 1e}\nlearning_rate: 2e-3\n")
    recipe = load_recipe(path, ["vocab_size=300", "adam_epsilon=-1E-3", "optim_args=a=1e-3"])
    assert recipe.training["lr_scheduler_kwargs"] == {"min_lr": 0.0001, "name": "1e-4", "text": "1e"}
    assert (recipe.training["learning_rate"], recipe.training["adam_epsilon"]) == (0.002, -0.001)


def test_override_without_a_value():
    with pytest.raises(UserError, match="key=value, got 'variant'"):
        load_recipe(RECIPES[0], ["variant"])


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        *("train_tokens", "eval_sequences", "entropy_steps", "entropy_sequences", "shuffle_buffer", "fsdp_size"),
        *("layer_base_width", "per_device_train_batch_size", "per_device_eval_batch_size", "save_steps", "eval_steps"),
        *("gradient_accumulation_steps", "logging_steps"),
    ],
)
def test_number_that_must_be_at_least_one(name, value):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got {value}"):
        build_recipe({**SMALLEST, name: value})
    if name != "shuffle_buffer":  # of a stream alone
        assert build_recipe({**SMALLEST, "logging_steps": 1, "save_steps": 1, name: 1}).to_dict()[name] == 1


@pytest.mark.parametrize("value", [0.0, -1e-3, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["learning_rate", "layer_learning_rate", "num_train_epochs"])
def test_number_that_must_be_finite_and_more_than_zero(name, value):
    with pytest.raises(UserError, match=f"{name} must be finite and more than 0, got {value}"):
        build_recipe({**SMALLEST, name: value})


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_share_that_is_held_out_is_in_between(value):
    with pytest.raises(UserError, match=f"eval_fraction must be in .0, 1., got {value}"):
        build_recipe({**SMALLEST, "eval_fraction": value})


def test_arguments_of_the_trainer_are_those_of_this_project():
    arguments = build_recipe({**SMALLEST, "max_grad_norm": 0.25, "adam_beta2": 0.5}).build_arguments()
    # a NaN in the loss shows, and is not replaced by the running mean
    assert arguments.logging_nan_inf_filter is False
    assert (arguments.max_grad_norm, arguments.adam_beta2, arguments.seed) == (0.25, 0.5, 1337)
    with pytest.raises(UserError, match="fp16=True needs an accelerator: .*; bf16=True works"):
        build_recipe({**SMALLEST, "fp16": True, "use_cpu": True}).build_arguments()
    assert build_recipe({**SMALLEST, "bf16": True, "use_cpu": True}).build_arguments().bf16


def test_longest_position_is_the_block_unless_it_is_named():
    assert build_recipe({**SMALLEST, "block_size": 32}).build_config().max_position_embeddings == 32
    named = build_recipe({**SMALLEST, "block_size": 32, "max_position_embeddings": 48})
    assert named.build_config().max_position_embeddings == 48


def test_run_that_is_started_from_is_its_model(tmp_path):
    run = tmp_path / "a run"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    recipe = build_recipe({"init_from": str(run), "embedding_dropout": 0.3})
    assert recipe.data.init_from == recipe.data.tokenizer == str(run / "model") and recipe.data.variant is None
    assert recipe.name == "a-run-tuned-t128-seed1337"
    assert (parent_name(str(run / "model")), parent_name("owner/model")) == ("a run", "owner/model")
    assert build_recipe({"init_from": str(run), "tokenizer": "owner/other"}).data.tokenizer == "owner/other"
