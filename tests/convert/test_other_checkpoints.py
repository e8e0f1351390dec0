"""Checkpoints that are damaged, of another kind, or not what their configuration says: right, or one clear line."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from modeling_lnfree import LNFreeForCausalLM, LNFreeForSequenceClassification
from training.cli import main

from ..conftest import random_ids, tiny_config
from .test_convert import tiny_gpt2, tiny_neox


def edited(model, **fields):
    """Saves a model whose config.json says something else."""

    def save(path):
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **fields}))

    return save


def with_file(name, content):
    def save(path):
        tiny_gpt2().save_pretrained(path)
        (path / name).write_text(content)

    return save


def with_nan(path):
    model = tiny_gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    model.save_pretrained(path)


def cut(path):
    tiny_gpt2().save_pretrained(path)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def other_head(model_class):
    return lambda path: model_class(tiny_gpt2().config).save_pretrained(path)


WRONG = {
    "classifier": (other_head(GPT2ForSequenceClassification), "GPT2LMHeadModel has no place: score.weight"),
    "two heads": (other_head(GPT2DoubleHeadsModel), "GPT2LMHeadModel has no place: multiple_choice_head"),
    "fewer layers": (edited(tiny_gpt2(), n_layer=2), "GPT2LMHeadModel has no place: transformer.h.2"),
    "more layers": (edited(tiny_gpt2(), n_layer=4), "lacks weights: transformer.h.3"),
    "wider": (
        edited(tiny_neox(), intermediate_size=128),
        "of other sizes than its config.json says: gpt_neox.layers.0",
    ),
    "GPTQ": (
        edited(tiny_gpt2(), quantization_config={"quant_method": "gptq", "bits": 4}),
        "not quantized, got .*gptq",
    ),
    "4 bits": (
        edited(tiny_gpt2(), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "not quantized, got .*bitsandbytes",
    ),
    "text for a number": (edited(tiny_gpt2(), n_embd="32"), "cannot be loaded: .*'n_embd' expected int"),
    "null": (edited(tiny_neox(), attention_dropout=None), "cannot be loaded: .*'attention_dropout'"),
    "no heads": (edited(tiny_gpt2(), n_head=0), "cannot be loaded: ZeroDivisionError"),
    "nothing rotated": (
        edited(tiny_neox(), rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.0}),
        "cannot be expressed: .*partial_rotary_factor must be in",
    ),
    "everything dropped": (edited(tiny_neox(), hidden_dropout=1.0), "cannot be expressed: .*must be in .*got 1.0"),
    "no epsilon": (edited(tiny_neox(), layer_norm_eps=0.0), "cannot be expressed: .*layer_norm_eps must be"),
    "NaN": (with_nan, "its weight transformer.h.1.mlp.c_fc.weight has NaN or infinite entries"),
    "cut weights": (cut, "cannot be loaded: "),
    "pointer": (with_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "cannot be loaded: "),
    "no config": (with_file("config.json", "[]"), "cannot be loaded: "),
    "broken tokenizer": (with_file("tokenizer.json", "{"), "the tokenizer of .* cannot be loaded: "),
    "other tokenizer": (with_file("tokenizer.json", '{"a": 1}'), "the tokenizer of .* cannot be loaded: "),
    "spiece": (with_file("spiece.model", ""), "the tokenizer of .* has no tokens when .* spiece.model"),
    "tekken": (with_file("tekken.json", "{}"), "the tokenizer of .* cannot be loaded: "),
    "sampling": (with_file("generation_config.json", '{"temperature": 0.5}'), "cannot be written: .*temperature"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_right_is_one_line(what, tmp_path, capsys):
    prepare, message = WRONG[what]
    prepare(tmp_path / "stock")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 1
    (last,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lnfree import: error: ")]
    assert re.search(message, last), last
    assert not (tmp_path / "ours").exists()


def test_classifier_of_this_family_keeps_its_head(tmp_path, capsys):
    LNFreeForSequenceClassification(tiny_config("SM+LN+G")).save_pretrained(tmp_path / "ours")
    assert main(["import", "--to-stock", str(tmp_path / "ours"), str(tmp_path / "stock")]) == 1
    assert "LNFreeForCausalLM has no place: score.weight" in capsys.readouterr().err


@pytest.mark.parametrize("to_stock", [False, True])
def test_head_of_its_own_is_kept_where_the_configuration_says_tied(to_stock, tmp_path):
    model = tiny_gpt2()
    if to_stock:
        model.save_pretrained(tmp_path / "gpt2")
        assert main(["import", str(tmp_path / "gpt2"), str(tmp_path / "first")]) == 0
    else:
        model.save_pretrained(tmp_path / "first")
    state = load_file(tmp_path / "first" / "model.safetensors")
    state["lm_head.weight"] = torch.randn(99, 32)
    save_file(state, tmp_path / "first" / "model.safetensors", {"format": "pt"})
    model.config.tie_word_embeddings = False
    untied = GPT2LMHeadModel(model.config).eval()
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": state["lm_head.weight"]})

    options = ["--to-stock"] if to_stock else []
    assert main(["import", *options, str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    second = (GPT2LMHeadModel if to_stock else LNFreeForCausalLM).from_pretrained(tmp_path / "second").eval()
    input_ids = random_ids(2, 30)
    torch.testing.assert_close(second(input_ids).logits, untied(input_ids).logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh"])
def test_other_names_of_gelu_are_imported(activation, tmp_path):
    model = tiny_neox(hidden_act=activation)
    model.save_pretrained(tmp_path / "stock")
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 0
    ours = LNFreeForCausalLM.from_pretrained(tmp_path / "ours").eval()
    input_ids = random_ids(2, 30)
    torch.testing.assert_close(ours(input_ids).logits, model(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_tokenizer_in_python_comes_along(tmp_path, capsys):
    tiny_gpt2(vocab_size=400).save_pretrained(tmp_path / "stock")
    ByT5Tokenizer().save_pretrained(tmp_path / "stock")
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 0
    assert "with its tokenizer" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("ab")["input_ids"] == ByT5Tokenizer()("ab")["input_ids"]


def test_clients_read_and_write_no_further_than_the_context(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "stock")
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "stock")
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert len(tokenizer("a b " * 100, truncation=True)["input_ids"]) == 64
    ours = LNFreeForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ours.generation_config.eos_token_id = None
    assert ours.generate(torch.zeros(1, 60, dtype=torch.long), do_sample=False).shape == (1, 64)
