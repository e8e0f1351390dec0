"""Which models are measured, and which are refused in one line, as their numbers would mean something else."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_lnfree import measure
from modeling_lnfree.metrics.attention_entropy.attention_entropy import AttentionEntropy
from training import cli

from ..conftest import byte_tokenizer


SIZES = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 40, "bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def build(model_type: str = "gpt2", model_class=AutoModelForCausalLM, **fields):
    torch.manual_seed(0)
    return model_class.from_config(AutoConfig.for_model(model_type, **{**SIZES, **fields})).eval()


def edit(path: Path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def cut(path: Path):
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def pointer(path: Path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def without_tokenizer(path: Path):
    for file in path.glob("tokenizer*"):
        file.unlink()


def t5():
    return AutoModel.from_config(AutoConfig.for_model("t5", d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8))


WRONG = {
    "no tokenizer": (build, without_tokenizer, "no tokenizer came with it"),
    "bert": (lambda: build("bert"), None, "is no causal language model"),
    "t5": (t5, None, "T5Config'> for this kind of AutoModel: AutoModelForCausalLM.$"),
    "more layers": (
        build,
        lambda path: edit(path, n_layer=4),
        "lacks weights, which would be random: transformer.h.2",
    ),
    "wider": (build, lambda path: edit(path, n_inner=32), "of other sizes than its configuration: transformer.h.0"),
    "other type": (build, lambda path: edit(path, n_embd="16"), "'n_embd' expected int, got str"),
    "cut": (build, cut, "cannot be measured: "),
    "pointer": (build, pointer, "cannot be measured: "),
    "small vocabulary": (lambda: build(vocab_size=99), None, "the tokenizer gives token 220, and the model knows 99"),
}


@pytest.mark.parametrize("what", WRONG)
def test_refused_in_one_line(what, tokenizer, tmp_path, monkeypatch, capsys):
    make, damage, message = WRONG[what]
    make().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    if damage is not None:
        damage(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a text\n" + "b" * 60 + "\n")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["measure", "model", "--dataset", "texts.txt", "--text-column", "text", "--streaming"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lnfree measure: error: ")]
    assert re.search(message, line), line


def test_decoder_of_the_same_class_is_measured(tokenizer, tmp_path, monkeypatch, capsys):
    build("bert", is_decoder=True).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a text\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["measure", "model", "--dataset", "texts.txt", "--text-column", "text", "--streaming"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["roberta", "data2vec-text", "xlm-roberta"])
def test_positions_that_begin_behind_the_padding_token(model_type, tokenizer, tmp_path):
    # 40 positions, of which the first is behind that of token 1: 38 tokens can be read
    model = build(model_type, is_decoder=True, pad_token_id=1)
    texts = ["a text", "b" * 60]
    found = measure(model, texts, tokenizer=tokenizer)
    assert (found.num_tokens, found.truncated_texts) == (6 + 38, 1)
    likelihoods = []
    for text in texts:
        input_ids = torch.tensor([tokenizer(text)["input_ids"][:38]])
        logits = model(input_ids).logits[0, :-1].double()
        likelihoods.append(logits.log_softmax(-1).gather(1, input_ids[0, 1:, None]))
    assert found.nll == pytest.approx(-torch.cat(likelihoods).mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="max_length must be an integer in 1 to 38, the positions of the model"):
        measure(model, texts, tokenizer=tokenizer, max_length=39)
    metric = AttentionEntropy(cache_dir=str(tmp_path))
    encoder = build(model_type, AutoModel, pad_token_id=1)
    assert metric.compute(predictions=texts, model=encoder, tokenizer=tokenizer)["num_queries"] == 6 + 38


def test_length_of_a_tokenizer_may_be_a_float(tokenizer, tmp_path):
    build().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for written, read in ((12.0, 12), (1e30, 40)):
        path = tmp_path / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": written}))
        assert measure(str(tmp_path / "model"), ["b" * 60]).num_tokens == read


def test_meta_device_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "texts.txt").write_text("a text\n")
    options = ["--text-column", "text", "--streaming", "--device", "meta"]
    assert cli.main(["measure", "model", "--dataset", "texts.txt", *options]) == 1
    assert "device 'meta' cannot be used: it holds no values" in capsys.readouterr().err


def test_entropy_needs_no_head_but_all_layers(tokenizer, tmp_path):
    metric = AttentionEntropy(cache_dir=str(tmp_path / "cache"))
    whole = build("llama", num_key_value_heads=2)
    whole.model.save_pretrained(tmp_path / "body")
    texts = ["a text", "another"]
    found = metric.compute(predictions=texts, model_id=str(tmp_path / "body"), tokenizer=tokenizer, device="cpu")
    expected = metric.compute(predictions=texts, model=whole, tokenizer=tokenizer)
    torch.testing.assert_close(torch.tensor(found["entropy"]), torch.tensor(expected["entropy"]))
    edit(tmp_path / "body", num_hidden_layers=3)
    with pytest.raises(ValueError, match="lacks weights, which would be random: model.layers.2"):
        metric.compute(predictions=texts, model_id=str(tmp_path / "body"), tokenizer=tokenizer)


@pytest.mark.parametrize("prediction", [None, b"text", ["text"], 3])
def test_predictions_of_another_kind_are_named(prediction, tokenizer, tmp_path):
    metric = AttentionEntropy(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"or a result of this metric, got {re.escape(repr(prediction))}"):
        metric.compute(predictions=["text", prediction], model=build(), tokenizer=tokenizer)
