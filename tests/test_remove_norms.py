"""`lnfree remove-norms` on a model that other code made, from the command to the export and its card."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from training import cli

from .conftest import random_ids


OVERRIDES = [
    *("block_size=16", "max_steps=10", "remove_norms_from=2", "remove_norms_gaps=[1,1,1,1]", "logging_steps=1"),
    *("save_steps=5", "per_device_train_batch_size=4", "gradient_accumulation_steps=1", "learning_rate=1e-4"),
    *("warmup_steps=1", "lr_scheduler_type=linear", "lr_scheduler_kwargs=null", "eval_fraction=0.2", "use_cpu=true"),
    *("disable_tqdm=true", "entropy_steps=5", "entropy_sequences=4"),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock GPT-2 with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("stock") / "gpt2"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)).save_pretrained(folder)
    return folder


def test_from_the_command_to_the_card(stock, corpus, own_cache, tmp_path, capsys):
    command = ["remove-norms", str(stock), str(tmp_path / "out"), "--dataset", str(corpus), *OVERRIDES]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    results, control = (
        json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in ("removed", "control")
    )
    assert (results["variant"], control["variant"]) == ("SM+G-noLNf", "SM+LN+G")
    losses = results["norm_removal"]
    assert losses["eval_loss_control"] == control["eval_loss"] and losses["removed"] == 7
    # the model as it came, by itself
    model = AutoModelForCausalLM.from_pretrained(stock).eval()
    assert losses["eval_loss_before"] == pytest.approx(5.55, abs=0.2)  # nearly uniform over 257 bytes
    folder = tmp_path / "out" / "model"
    assert (tmp_path / "out" / "norm_removal.png").stat().st_size > 10_000
    card = (folder / "README.md").read_text()
    for name in ("eval_loss", "eval_loss_before", "eval_loss_control"):
        assert f"{losses[name]:.4f}" in card and f"{losses[name]:.4f}" in printed
    assert "base_model: gpt2" in card and "7 parts from step 2 to 8 of 10" in card
    assert str(tmp_path) not in card
    from modeling_lnfree import LNFreeForCausalLM

    ours = LNFreeForCausalLM.from_pretrained(folder).eval()
    assert not [module for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)]
    input_ids = random_ids(2, 9)
    assert not torch.allclose(ours(input_ids).logits, model(input_ids).logits, atol=1e-3)
    # a finished one is left as it is
    assert cli.main(command) == 0


def test_options_act(stock, corpus, own_cache, tmp_path):
    command = ["remove-norms", str(stock), str(tmp_path / "out"), "--dataset", str(corpus), *OVERRIDES]
    assert cli.main([*command, "--keep-final-norm", "--no-control"]) == 0
    assert not (tmp_path / "out" / "control").exists()
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["norm_type"], config["final_norm_type"]) == ("none", "layernorm")
    assert "control" not in (tmp_path / "out" / "model" / "README.md").read_text().split("## Results")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init_from=x"], "init_from cannot be overridden: the command's own arguments say it"),
        (["max_steps=5"], "the last of 7 norms is gone at step 8, and max_steps is 5"),
        (["remove_norms_gap=[1]"], "the nearest known one is 'remove_norms_gaps'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, stock, corpus, own_cache, tmp_path, capsys):
    command = ["remove-norms", str(stock), str(tmp_path / "out"), "--dataset", str(corpus), *OVERRIDES]
    assert cli.main([*command, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
