"""What decides that runs are one: that a finished run is the recipe's, of one setting, and of one configuration."""

import json
from dataclasses import asdict

import pytest
import yaml

from training import cli, runs
from training.errors import UserError
from training.files import read_json, read_records
from training.methods import METHOD_FIELDS
from training.recipe import DATA_FIELDS, LAYER_FIELDS, MODEL_FIELDS, DataArguments, build_recipe
from training.runs import SETTING_FIELDS, Run

from .compare.test_seeds import fake_run


# by hand, each with a value that is not the default: what a result depends on beside configuration, seed, backbone,
# length, data and budget, by which runs are told apart in comparisons and releases
MODEL_OF_A_SETTING = {
    **{"vocab_size": 9, "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1},
    **{"num_key_value_heads": 2, "head_dim": 3, "max_position_embeddings": 7, "position_embedding_type": "rotary"},
    **{"partial_rotary_factor": 0.5, "rope_theta": 9.0, "rope_parameters": {"rope_type": "linear"}},
    **{"parallel_residual": True, "tie_word_embeddings": False, "norm_alpha_init": 0.3, "norm_position": "post"},
    **{"layer_norm_eps": 0.1, "mlp_type": "gated", "biased_projections": [], "normalized_projections": ["q_proj"]},
    **{"identity_projections": ["v_proj"], "zero_init_projections": ["q_proj"], "attention_gains": [1.0, 1.0, 0.0]},
    **{"attention_gate_init": 0.2, "softmax_temperature": 2.0, "attn_logit_softcapping": 3.0, "softmax_clipping": 1.0},
    **{"attention_multiplier": 0.1, "residual_gains": [1.0, 0.5, 1.0, 0.5], "residual_gains_trainable": False},
    **{"embedding_multiplier": 2.0, "logits_multiplier": 0.5, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    **{"hidden_dropout": 0.3, "initializer_range": 0.5, "classifier_dropout": 0.3},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "per_layer_config": {0: {"mlp_type": "none"}}},
}
TRAINING_OF_A_SETTING = {
    **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "learning_rate": 0.5, "weight_decay": 0.0},
    **{"warmup_steps": 9, "lr_scheduler_type": "cosine", "max_grad_norm": 0.0, "optim": "sgd", "adam_beta1": 0.1},
    **{"adam_beta2": 0.1, "adam_epsilon": 0.1, "fp16": True, "bf16": True, "lr_scheduler_kwargs": {"min_lr": 0.1}},
    **{"optim_args": "a=1", "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0},
}
DATA_OF_A_SETTING = {
    **{"dataset_config": "other", "eval_dataset": "other", "eval_fraction": 0.4, "text_column": "other"},
    **{"tokenizer": "other", "streaming": True, "separate_documents": True, "init_from": "other", "trainable": "q"},
}
OF_A_SETTING = {**MODEL_OF_A_SETTING, **TRAINING_OF_A_SETTING, **DATA_OF_A_SETTING}
# what names a configuration within a setting, each with a value that is not the default
OF_A_CONFIGURATION = {
    **{"decay_slopes": True, "layer_optimizer": "muon", "layer_learning_rate": 0.5, "layer_base_width": 9},
    **{"muon_momentum": 0.5, "muon_adjustment": "original"},
    **{"entropy_weight": 0.5, "entropy_margin": 0.1, "entropy_target_init": 0.1, "entropy_target_learned": False},
    **{"weight_parametrization": "weight_norm", "parametrized_projections": ["q_proj"]},
    **{"parametrization_gain_init": 0.5, "batch_entropy_weight": 0.5, "batch_entropy_target": 0.1},
    **{"batch_entropy_floor": 0.1, "remove_norms_from": 9, "remove_norms_gaps": [1, 1, 1, 1]},
    **{"remove_norms_taper": 3, "remove_norms_tolerance": 0.1, "remove_norms_auxiliary_weight": 0.1},
    **{"remove_norms_skip_first": True, "keep_final_norm": True},
}
# of the model what a variant's name says, and of the data what is not decisive, or a part of a setting by itself
NAMED_BY_THE_VARIANT = {"slope_sharing", "negative_slope", "hidden_act", "norm_type", "final_norm_type"}
NOT_DECISIVE = {
    *("variant", "preset", "dataset", "block_size", "train_tokens"),  # in a setting's own fields, or in the variant
    *("shuffle_buffer", "eval_sequences", "entropy_steps", "entropy_sequences", "milestones", "fsdp_size"),
    *("fused_loss", "compile_layers", "attn_implementation"),  # how it is computed
}


def test_lists_hold_every_field():
    assert set(OF_A_SETTING) == SETTING_FIELDS
    assert set(MODEL_OF_A_SETTING) == MODEL_FIELDS - NAMED_BY_THE_VARIANT
    assert set(OF_A_CONFIGURATION) == {*LAYER_FIELDS, *METHOD_FIELDS, "decay_slopes"}
    assert {*DATA_OF_A_SETTING, *OF_A_CONFIGURATION, *NOT_DECISIVE} == DATA_FIELDS


def run_of(tmp_path, **changes) -> Run:
    named = {"backbone": "gpt2", "block_size": 16, "dataset": "stdlib", "train_tokens": 64, "variant": "SM+R"}
    recipe = {**asdict(DataArguments()), "hidden_size": 16, "learning_rate": 0.1, "weight_decay": 0.1, **changes}
    return Run(tmp_path, {**named, **{k: v for k, v in changes.items() if k in named}, "seed": 1, "recipe": recipe})


@pytest.mark.parametrize("field", [*OF_A_SETTING, "backbone", "block_size", "dataset", "train_tokens"])
def test_field_of_a_setting_sets_runs_apart(field, tmp_path):
    value = {**OF_A_SETTING, "backbone": "pythia", "block_size": 8, "dataset": "x", "train_tokens": 9}[field]
    plain, other = run_of(tmp_path), run_of(tmp_path, **{field: value})
    assert plain.setting != other.setting and plain.configuration == other.configuration
    assert run_of(tmp_path, **{field: value}).setting == other.setting


@pytest.mark.parametrize("field", OF_A_CONFIGURATION)
def test_field_of_a_configuration_names_it_and_leaves_the_setting(field, tmp_path):
    plain, other = run_of(tmp_path), run_of(tmp_path, **{field: OF_A_CONFIGURATION[field]})
    assert plain.setting == other.setting and plain.configuration == "SM+R" != other.configuration


@pytest.mark.parametrize(
    "field", sorted(NOT_DECISIVE - {"variant", "preset", "dataset", "block_size", "train_tokens"})
)
def test_what_only_looks_on_decides_nothing(field, tmp_path):
    plain, other = run_of(tmp_path), run_of(tmp_path, **{field: 7})
    assert (plain.setting, plain.configuration) == (other.setting, other.configuration)


def test_a_run_of_before_a_field_had_the_effect_of_its_default(tmp_path):
    run = run_of(tmp_path)
    older = {key: value for key, value in run.recipe.items() if key not in DATA_FIELDS}
    older = Run(tmp_path, {**run.results, "recipe": older})
    assert (older.setting, older.configuration) == (run.setting, run.configuration)


# ---- finished runs


CHANGES = {
    **{name: value for name, value in DATA_OF_A_SETTING.items() if name not in ("init_from", "streaming")},
    **{"trainable": "q_proj", "block_size": 8, "dataset": "other.jsonl", "variant": "SM+G", "eval_sequences": 3},
    **{"entropy_steps": 9, "entropy_sequences": 9, "milestones": [4]},
    **{"hidden_size": 32, "num_hidden_layers": 1, "embedding_dropout": 0.3, "initializer_range": 0.2},
    **{"learning_rate": 0.5, "weight_decay": 0.0, "max_steps": 4, "seed": 7, "warmup_steps": 3, "optim": "sgd"},
    # keys that the finished run's recipe did not have
    **{"max_grad_norm": 0.5, "adam_beta1": 0.5, "bf16": True, "dataloader_num_workers": 1, "run_name": "x"},
    **{"gradient_accumulation_steps": 2, "lr_scheduler_kwargs": {"last_epoch": -1}, "layer_optimizer": "muon"},
    **{"entropy_weight": 0.5, "weight_parametrization": "weight_norm", "batch_entropy_weight": 0.5},
}


@pytest.mark.parametrize("field", CHANGES)
def test_finished_run_is_not_taken_for_another_recipe(field, recipe_values, tmp_path, capsys):
    values = {**recipe_values, "output_dir": str(tmp_path / "run"), "variant": "SM+R"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(build_recipe(values).to_dict()))
    (tmp_path / "run" / "results.json").write_text(json.dumps({"perplexity": 7.0}))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(path)]) == 0
    assert "run is finished: perplexity 7.000" in capsys.readouterr().out
    path.write_text(yaml.safe_dump({**values, field: CHANGES[field]}))
    assert cli.main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    # Muon's defaults are written out, and one of them comes first
    assert f"holds a run with {field}=" in error or field == "layer_optimizer" and "holds a run with " in error


def test_a_recipe_that_has_a_key_less_is_another_one(recipe_values, tmp_path, capsys):
    values = {**recipe_values, "output_dir": str(tmp_path / "run"), "variant": "SM+R"}
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(build_recipe(values).to_dict()))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if key != "warmup_steps"}))
    assert cli.main(["train", str(path)]) == 1
    assert "holds a run with warmup_steps=0.05, this recipe has None" in capsys.readouterr().err


def test_baseline_is_the_best_of_those_with_the_most_seeds(tmp_path):
    def run(number, seed, perplexity, **recipe):
        (tmp_path / f"{number}-{seed}").mkdir()
        return fake_run(tmp_path / f"{number}-{seed}", "SM+LN+G", seed, perplexity, **recipe)

    several = [run(0, seed, 10.0 + seed) for seed in (1, 2)]
    several += [run(1, seed, 9.0 + seed, layer_learning_rate=0.5) for seed in (1, 2)]
    several += [run(2, 1, 1.0, layer_learning_rate=0.7)]
    assert runs.find_baseline(several) == "SM+LN+G, adamw 0.5"
    assert runs.find_baseline(several[:2] + several[4:]) == "SM+LN+G"
    assert runs.find_baseline([]) is None


def test_recipe_of_an_older_version_is_the_same_run(recipe_values, tmp_path):
    values = {**recipe_values, "output_dir": str(tmp_path / "run"), "variant": "SM+R"}
    (tmp_path / "run").mkdir()
    whole = build_recipe(values).to_dict()
    older = {key: value for key, value in whole.items() if key not in ("layer_optimizer", "keep_final_norm")}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(older))
    (tmp_path / "run" / "results.json").write_text(json.dumps({"perplexity": 7.0}))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["train", str(path)]) == 0
    path.write_text(yaml.safe_dump({**values, "layer_optimizer": "muon"}))
    assert cli.main(["train", str(path)]) == 1


@pytest.mark.parametrize(("text", "kind"), [("[1]", dict), ("3", dict), ("{}", list), ("[1]", list)])
def test_json_of_another_kind_is_one_line(text, kind, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(UserError, match=f"file.json cannot be read: it is no {kind.__name__} of JSON"):
        read_json(tmp_path / "file.json", kind)
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    assert read_records(tmp_path / "lines.jsonl") == [{"step": 1}]
