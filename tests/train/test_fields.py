"""Every field of a recipe acts through the command: a list of them, each with what a run with it shows."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer

from modeling_lnfree import LNFreeForCausalLM
from training import cli, files, runs
from training.data import document_positions
from training.methods import METHOD_FIELDS
from training.recipe import DATA_FIELDS, REFUSED, build_recipe, load_recipe

from ..conftest import ROOT
from .test_training import eval_blocks


pytestmark = pytest.mark.usefixtures("own_cache")
HERE, METHODS = "tests/train/test_fields.py::", "tests/train/test_methods.py::"
# by hand: a field that is new needs a row, and the row a test that looks at the effect in a run
TESTED = {
    "variant": HERE + "test_variant_and_preset_are_the_models",
    "preset": HERE + "test_variant_and_preset_are_the_models",
    "init_from": METHODS + "test_fine_tuned_run_starts_from_the_model_and_comes_back",
    "trainable": METHODS + "test_only_what_is_trainable_changes",
    "dataset": HERE + "test_texts_are_those_that_are_named",
    "dataset_config": HERE + "test_texts_are_those_that_are_named",
    "text_column": HERE + "test_texts_are_those_that_are_named",
    "eval_dataset": HERE + "test_evaluation_is_on_what_is_named",
    "eval_fraction": HERE + "test_evaluation_is_on_what_is_named",
    "streaming": HERE + "test_a_stream_is_shuffled_in_its_buffer",
    "shuffle_buffer": HERE + "test_a_stream_is_shuffled_in_its_buffer",
    "separate_documents": HERE + "test_separated_documents_do_not_see_each_other_in_training_and_evaluation",
    "tokenizer": HERE + "test_tokenizer_is_the_one_named",
    "block_size": HERE + "test_blocks_and_budget_are_those_named",
    "train_tokens": HERE + "test_blocks_and_budget_are_those_named",
    "eval_sequences": "tests/train/test_watching.py::"
    "test_evaluations_on_the_way_take_blocks_spread_over_the_evaluation_part",
    "entropy_steps": HERE + "test_probe_is_as_large_and_as_often_as_named",
    "entropy_sequences": HERE + "test_probe_is_as_large_and_as_often_as_named",
    "milestones": "tests/train/test_watching.py::test_milestones_are_kept_beside_the_newest",
    "decay_slopes": "tests/train/test_training.py::test_weight_decay_reaches_learned_slopes_only_when_asked",
    **dict.fromkeys(
        ("layer_optimizer", "layer_learning_rate", "layer_base_width", "muon_momentum", "muon_adjustment"),
        HERE + "test_every_option_of_the_layers_acts",
    ),
    "attn_implementation": "tests/train/test_speed.py::test_the_recipe_names_the_attention",
    "fused_loss": "tests/train/test_speed.py::test_fused_loss_trains_the_same",
    "compile_layers": "tests/train/test_speed.py::test_compiled_training_equals_eager_and_evaluation_compiles_nothing",
    "fsdp_size": "tests/train/test_distributed.py::test_run_that_keeps_weights_alone_or_cannot_be_sharded_says_so",
    **dict.fromkeys(METHOD_FIELDS, METHODS + "test_every_method_has_a_test_that_it_acts"),
}


def test_every_field_of_our_own_has_a_test():
    assert set(TESTED) == DATA_FIELDS
    for path, name in (test.split("::") for test in TESTED.values()):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


@pytest.fixture(scope="module")
def short(recipe_values):
    return {**recipe_values, "variant": "SM+R", "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}


@pytest.fixture
def train(tmp_path, short):
    """Trains by the command with some fields changed; None takes one away."""

    def run(name: str, **fields):
        path = tmp_path / f"{name}.yaml"
        values = {key: value for key, value in {**short, **fields}.items() if value is not None}
        path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / name)}))
        assert cli.main(["train", str(path)]) == 0
        return runs.Run.load(tmp_path / name)

    return run


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


def equal(ours, theirs) -> bool:
    first, second = weights_of(ours), weights_of(theirs)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def write_texts(path, first: int, number: int, **columns):
    path.parent.mkdir(exist_ok=True)
    texts = [f"def f{i}(x, y):\n    return x * {i} + y - {i * i % 97}\n" * 3 for i in range(first, first + number)]
    rows = [{"content": text, **{name: make(text) for name, make in columns.items()}} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_variant_and_preset_are_the_models(train):
    run = train("variant", variant="SM+LN+G", max_steps=1)
    assert run.variant == run.config.variant == "SM+LN+G"
    run = train("preset", preset="Stable", max_steps=1)
    assert run.variant == run.config.variant == "SM+R@Stable" and run.model_name == "lnfree-gpt2-sm-r-stable-t16"


def test_texts_are_those_that_are_named(train, tmp_path):
    capitals = {"capitals": str.upper}
    for name, first in (("one", 0), ("two", 200)):
        write_texts(tmp_path / "folder" / f"{name}.jsonl", first, 40, **capitals)
    card = {"configs": [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]}
    (tmp_path / "folder" / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    folder = str(tmp_path / "folder")
    one = train("one", dataset=f"{folder}/one.jsonl")
    assert one.results["dataset"] == f"{folder}/one.jsonl"
    assert equal(one, train("config-one", dataset=folder, dataset_config="one"))
    two = train("two", dataset=folder, dataset_config="two")
    assert not equal(one, two) and equal(two, train("file-two", dataset=f"{folder}/two.jsonl"))
    column = train("column", dataset=f"{folder}/one.jsonl", text_column="capitals")
    vocabulary = json.loads((column.folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("RETURN" in token for token in vocabulary) and not any("return" in token for token in vocabulary)


def test_evaluation_is_on_what_is_named(train, tmp_path):
    counted = {fraction: train(str(fraction), eval_fraction=fraction).results for fraction in (0.1, 0.5)}
    assert counted[0.5]["eval_tokens"] > 2 * counted[0.1]["eval_tokens"]
    few = write_texts(tmp_path / "few.jsonl", 500, 2)
    run = train("eval", eval_dataset=few)
    tokenizer = Tokenizer.from_file(str(run.folder / "model" / "tokenizer.json"))
    texts = [json.loads(line)["content"] for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    tokens = sum(len(tokenizer.encode(text).ids) + 1 for text in texts)
    assert run.results["eval_tokens"] == tokens // 16 * 15
    # nothing of the train part is held out then
    assert not equal(run, train("held out"))


@pytest.mark.parametrize("splits", [("train", "validation", "test"), ("train", "test"), ("train", "validation")])
def test_evaluation_is_on_the_validation_split_where_there_is_one(train, tmp_path, splits):
    for index, (split, number) in enumerate({"train": 60, "validation": 3, "test": 9}.items()):
        if split in splits:
            write_texts(tmp_path / "splits" / f"{split}.jsonl", 100 * index, number)
    run = train("run", dataset=str(tmp_path / "splits"), max_steps=1)
    few = "validation" in splits
    assert (run.results["eval_tokens"] < 300) == few


def test_a_stream_is_shuffled_in_its_buffer(train, tmp_path):
    bpe = str(train("first", max_steps=1).folder / "model")
    for split, first, number in (("train", 0, 60), ("validation", 100, 5)):
        write_texts(tmp_path / "parts" / f"{split}.jsonl", first, number)
    given = {
        "dataset": str(tmp_path / "parts"),
        "tokenizer": bpe,
        "vocab_size": None,
        "per_device_train_batch_size": 2,
    }
    prepared = train("prepared", **given)
    streamed = {size: train(f"streamed {size}", **given, streaming=True, shuffle_buffer=size) for size in (1, 60)}
    assert not equal(prepared, streamed[60]) and not equal(streamed[1], streamed[60])
    assert equal(streamed[60], train("again", **given, streaming=True, shuffle_buffer=60))
    assert streamed[1].results["eval_tokens"] == prepared.results["eval_tokens"]
    assert streamed[1].results["train_tokens"] == 3 * 2 * 16
    # in an order that follows the seed: from one model, without dropout, nothing else does
    sizes = ("variant", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    given |= {**dict.fromkeys(sizes), "init_from": bpe, "embedding_dropout": 0.0, "streaming": True}
    first, second, again = (train(f"seed {i}", **given, seed=seed) for i, seed in enumerate((1, 2, 1)))
    assert equal(first, again) and not equal(first, second)


def test_separated_documents_do_not_see_each_other_in_training_and_evaluation(train, short):
    whole = train("whole", entropy_sequences=40)
    run = train("apart", separate_documents=True, entropy_sequences=40)
    assert not equal(whole, run)
    blocks = eval_blocks(short)
    end_of_text = json.loads((run.folder / "model" / "config.json").read_text())["eos_token_id"]
    assert (blocks == end_of_text).any(1).sum() > 5
    model = LNFreeForCausalLM.from_pretrained(run.folder / "model").eval().double()
    nats = {}
    for separated in (True, False):
        positions = {"position_ids": document_positions(blocks, end_of_text)} if separated else {}
        with torch.no_grad():
            log_probs = model(blocks, use_cache=False, **positions).logits.log_softmax(-1)[:, :-1]
        nats[separated] = -log_probs.gather(-1, blocks[:, 1:, None]).mean().item()
    assert run.results["eval_loss"] == pytest.approx(nats[True], rel=1e-5) != pytest.approx(nats[False], rel=1e-5)
    # and the probe: the first token of a document sees itself alone
    largest = files.read_records(run.folder / "attention_entropy.jsonl")[0]["max_entropy"]
    assert largest < files.read_records(whole.folder / "attention_entropy.jsonl")[0]["max_entropy"] - 1e-3
    assert run.attention_entropy["max_entropy"][0][0] < whole.attention_entropy["max_entropy"][0][0] - 1e-3


def test_tokenizer_is_the_one_named(train):
    first = train("first", max_steps=1, vocab_size=280)
    run = train("second", max_steps=1, vocab_size=None, tokenizer=str(first.folder / "model"))
    ours, theirs = ((each.folder / "model" / "tokenizer.json").read_text() for each in (run, first))
    assert ours == theirs and run.config.vocab_size == 280


def test_blocks_and_budget_are_those_named(train):
    run = train("run", block_size=8, train_tokens=150, max_steps=None)
    assert run.config.max_position_embeddings == run.results["block_size"] == 8
    assert run.results["train_steps"] == math.ceil(150 / (4 * 8)) and run.results["train_tokens"] == 5 * 4 * 8
    largest = sum(math.log(i + 1) for i in range(8)) / 8
    assert run.attention_entropy["max_entropy"][0][0] == pytest.approx(largest)


def test_probe_is_as_large_and_as_often_as_named(train, short):
    # with heads that are not uniform
    run = train("run", entropy_steps=2, entropy_sequences=3, max_steps=4, initializer_range=0.5)
    records = files.read_records(run.folder / "attention_entropy.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4]
    model = LNFreeForCausalLM.from_pretrained(run.folder / "model", attn_implementation="eager").eval().double()
    with torch.no_grad():
        maps = torch.stack(model(eval_blocks(short)[:3], output_attentions=True).attentions)
    expected = -torch.special.xlogy(maps, maps).sum(-1).mean((1, 3))
    torch.testing.assert_close(torch.tensor(records[-1]["entropy"]).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_every_option_of_the_layers_acts(train):
    muon = {"layer_optimizer": "muon", "layer_learning_rate": 0.02}
    changes = {
        "plain": {},
        "muon": muon,
        "rate": {**muon, "layer_learning_rate": 0.01},
        "width": {**muon, "layer_base_width": 8},
        "momentum": {**muon, "muon_momentum": 0.5},
        "adjustment": {**muon, "muon_adjustment": "original"},
        "adamw": {"layer_learning_rate": 0.02},
    }
    found = {name: train(name, **change) for name, change in changes.items()}
    for name, run in found.items():
        # half of the width at which a rate holds is half of the rate
        alike = {"rate", "width"}
        same = {other for other in found if equal(run, found[other])}
        assert same == (alike if name in alike else {name}), name
    assert {run.configuration for run in found.values()} == {
        *("SM+R", "SM+R, muon 0.02", "SM+R, muon 0.01", "SM+R, muon 0.02, layer_base_width=8", "SM+R, adamw 0.02"),
        *("SM+R, muon 0.02, muon_momentum=0.5", "SM+R, muon 0.02, muon_adjustment=original"),
    }


# ---- fields of the Trainer


# the fields that are refused, each with a value that would change the run, or that a run would keep without an effect
NOT_TAKEN = {
    **dict.fromkeys(("auto_find_batch_size", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"), True),
    **dict.fromkeys(("dataloader_drop_last", "ignore_data_skip", "load_best_model_at_end", "push_to_hub"), True),
    **dict.fromkeys(("prediction_loss_only", "use_cache", "use_liger_kernel"), True),
    **{"deepspeed": "zero.json", "fsdp": "full_shard", "hub_token": "hf_x", "label_names": ["labels"]},
    **{"metric_for_best_model": "loss"},
    **{"parallelism_config": {"dp": 2}, "resume_from_checkpoint": "checkpoint-4"},
    **dict.fromkeys(("hub_private_repo", "hub_always_push", "greater_is_better", "do_train", "do_eval"), True),
    **dict.fromkeys(("do_predict", "restore_callback_states_from_checkpoint"), True),
    **{"hub_model_id": "me/x", "hub_revision": "v1", "hub_strategy": "end", "classifier_dropout": 0.1},
    **{"fsdp_config": {"min_num_params": 1}, "include_for_metrics": ["loss"], "liger_kernel_config": {"rope": False}},
    **{"local_rank": 0, "remove_unused_columns": False},
}


def test_what_is_refused_is_this():
    assert NOT_TAKEN.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", [name for name in NOT_TAKEN if name != "parallelism_config"])
def test_arguments_that_would_belie_the_recipe_are_refused(name, short, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**short, name: NOT_TAKEN[name], "output_dir": str(tmp_path / "run")}))
    assert cli.main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"{name} is not supported in a recipe: " in error and "hf_x" not in error
    assert not (tmp_path / "run").exists()


def test_strategies_that_are_off_are_read_as_yaml_reads_them(tmp_path, short):
    names = ("save_strategy", "eval_strategy", "logging_strategy")
    path = tmp_path / "recipe.yaml"
    given = {name: value for name, value in short.items() if name not in names}
    path.write_text(yaml.safe_dump(given) + "".join(f"{name}: no\n" for name in names))
    for recipe in (load_recipe(path), load_recipe(path, [f"{name}=no" for name in names])):
        assert {recipe.training[name] for name in names} == {"no"}
        assert recipe.build_arguments().save_strategy == "no"


def test_every_process_counts_its_tokens(short, monkeypatch):
    recipe = build_recipe({**short, "gradient_accumulation_steps": 3})
    assert recipe.tokens_per_step == 4 * 3 * 16
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert recipe.tokens_per_step == 4 * 3 * 16 * 5
    assert build_recipe({**short, "train_tokens": 641}).training["max_steps"] == 3
