"""What a training run tells before it prepares its data, and the tokens that it counts at its end."""

import io
import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from training import cli
from training.errors import UserError
from training.recipe import build_recipe
from training.train import loop


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min": 1}}, "recipe: .*min"),
        ({"lr_scheduler_kwargs": {"min_lr": "small"}, "lr_scheduler_type": "cosine_with_min_lr"}, "recipe: "),
        # of which the first step alone reads nothing
        (
            {
                "warmup_steps": 5,
                "lr_scheduler_kwargs": {"min_lr_rate": "small"},
                "lr_scheduler_type": "cosine_with_min_lr",
            },
            "recipe: TypeError",
        ),
        ({"adam_beta1": 2.0}, "recipe: Invalid beta parameter at index 0: 2.0"),
        ({"adam_epsilon": -1e-8}, "recipe: Invalid epsilon value"),
        ({"log_level": "loud"}, "recipe: KeyError: 'loud'"),
        (
            {"torch_compile": True, "torch_compile_backend": "fastest"},
            "recipe: 'FASTEST' is not a valid DynamoBackend",
        ),
        # bitsandbytes, as most of the Trainer's optimizers, is no part of the set-up
        ({"optim": "adamw_bnb_8bit"}, "recipe: .*bitsandbytes"),
    ],
)
def test_optimization_is_refused_before_the_data(fields, message, recipe_values, tmp_path):
    recipe = build_recipe({**recipe_values, "dataset": "no/such/data.jsonl", "output_dir": str(tmp_path), **fields})
    with pytest.raises(UserError, match=message) as error:
        loop.train(recipe)
    assert "\n" not in str(error.value) and "no/such/data" not in str(error.value)


def test_tracker_without_a_login_is_told_before_the_data(recipe_values, tmp_path, monkeypatch):
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # nobody is there to ask
    monkeypatch.setattr("sys.stdin", io.StringIO())
    values = {**recipe_values, "variant": "SM+R", "output_dir": str(tmp_path / "run"), "report_to": "wandb"}
    with pytest.raises(UserError, match="report_to='wandb' fails, and may be left out: .*`wandb login`") as error:
        loop.train(build_recipe({**values, "dataset": "no/such/data.jsonl"}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_save"])
def test_tracker_that_fails_is_one_line_and_the_run_goes_on_without_it(event, recipe_values, tmp_path, monkeypatch):
    class NoServerError(Exception):
        """Of a tracker's own kind."""

    class Tracker(TrainerCallback):
        """Its server is gone after the first checkpoint, or never was there."""

    def fail(self, args, state, control, **kwargs):
        if event != "on_log" or state.global_step > 4:
            raise NoServerError("no answer from\n127.0.0.1")

    setattr(Tracker, event, fail)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
    values = {**recipe_values, "variant": "SM+R", "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="^report_to='mlflow' fails, and may be left out: no answer from 127.0.0.1$"):
        loop.train(build_recipe({**values, "report_to": "mlflow"}))
    loop.train(build_recipe(values))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["train_steps"] == 8


def test_short_last_batch_of_an_epoch_is_counted_as_it_is(recipe_values, tmp_path):
    run_dir = tmp_path / "run"
    values = {**recipe_values, "per_device_train_batch_size": 7, "gradient_accumulation_steps": 3}
    values |= {"max_steps": 90, "save_steps": 90, "logging_steps": 90, "include_num_input_tokens_seen": "all"}
    loop.train(build_recipe({**values, "output_dir": str(run_dir)}))
    results = json.loads((run_dir / "results.json").read_text())
    # transformers' own count
    seen = [
        entry["num_input_tokens_seen"]
        for entry in json.loads((run_dir / "log_history.json").read_text())
        if "num_input_tokens_seen" in entry
    ]
    assert results["train_tokens"] == seen[-1] < 90 * 7 * 3 * 16


def test_epochs_are_counted_in_blocks(recipe_values):
    recipe = build_recipe({**recipe_values, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    blocks = Dataset.from_dict({"input_ids": [[0]] * 21})
    # 8, 8, 5 sequences of 16 tokens, and again
    counts = [loop.count_tokens(recipe, steps, blocks) // 16 for steps in range(8)]
    assert counts == [0, 8, 16, 21, 29, 37, 42, 50]


def test_padded_vocabulary_is_the_models(recipe_values, tmp_path):
    values = {**recipe_values, "max_steps": 4, "output_dir": str(tmp_path / "first")}
    first = loop.train(build_recipe(values))
    named = {**values, "tokenizer": str(first / "model"), "vocab_size": 384, "output_dir": str(tmp_path / "second")}
    second = loop.train(build_recipe(named))
    assert json.loads((second / "model" / "config.json").read_text())["vocab_size"] == 384
    with pytest.raises(UserError, match="vocab_size must be at least 300, .* got 299"):
        loop.train(build_recipe({**named, "vocab_size": 299, "output_dir": str(tmp_path / "third")}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entropy_weight": math.nan}, "entropy_weight must be finite and more than 0, got nan"),
        ({"batch_entropy_weight": math.inf}, "batch_entropy_weight must be finite and more than 0, got inf"),
        ({"entropy_weight": 1.0, "entropy_margin": math.nan}, r"entropy_margin must be in \[0, 1\], got nan"),
        ({"batch_entropy_weight": 1.0, "batch_entropy_floor": -0.1}, "batch_entropy_floor must be in .* got -0.1"),
        ({"batch_entropy_weight": 1.0, "fsdp_size": 2}, "batch_entropy_weight=1.0 needs whole weights"),
        ({"layer_learning_rate": math.inf}, "layer_learning_rate must be finite and more than 0, got inf"),
    ],
)
def test_numbers_that_are_none_and_methods_that_cannot_be_sharded(fields, message, recipe_values):
    with pytest.raises(UserError, match=message):
        build_recipe({**recipe_values, **fields})


def test_layers_are_compiled_when_asked(recipe_values, tmp_path, monkeypatch):
    """By torch's own method, which is stood in for: compiling takes a minute."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    values = {**recipe_values, "max_steps": 1, "save_strategy": "no", "logging_steps": 1}
    for asked in (False, True):
        run = loop.train(build_recipe({**values, "compile_layers": asked, "output_dir": str(tmp_path / str(asked))}))
        assert compiled == ["LNFreeDecoderLayer"] * 2 * asked
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["data_seconds"] < results["train_seconds"]


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        (["measure", "no/model", "--dataset", "stdlib"], "model 'no/model' is no folder"),
        (["import", "no/model", "out"], "model 'no/model' is no folder"),
        (["measure", "no/model", "--dataset", "no/texts"], "dataset 'no/texts' is no file or folder"),
        # where datasets looks for a bucket
        (
            ["measure", "no/model", "--dataset", "buckets/no/texts/a"],
            "dataset 'buckets/no/texts/a' is no file or folder",
        ),
        (["train", "quick", "dataset=mistyped", "output_dir=run"], "dataset 'mistyped' is no file or folder"),
    ],
)
def test_hub_that_cannot_be_reached_is_told_at_once(verb, what, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        "training.texts.load_documents", lambda *args, **kwargs: {"eval": Dataset.from_dict({"a": ["b"]})}
    )
    assert cli.main(verb) == 1
    assert f"{what}, and the Hub cannot be reached to look for it" in capsys.readouterr().err
