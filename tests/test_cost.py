"""`lnfree cost`: what a model costs under encryption, by its configuration, and the bits that it needs."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from training import cli
from training.cost import cost
from training.errors import UserError

from .conftest import random_ids, tiny_model


@pytest.fixture
def counted(tmp_path):
    """Runs the command; returns its counts."""

    def run(model, *arguments):
        path = tmp_path / "cost.json"
        assert cli.main(["cost", str(model), "--json", str(path), *arguments]) == 0
        return json.loads(path.read_text())["private_cost"]

    return run


def test_counts_beside_the_baseline(tmp_path, counted, capsys):
    tiny_model("SM+R").save_pretrained(tmp_path / "sm-r")
    # a configuration is enough
    (tmp_path / "sm-r" / "model.safetensors").unlink()
    counts = counted(tmp_path / "sm-r", "--length", "9", "--batch-size", "2", "--new-tokens", "3")
    assert (counts["length"], counts["batch_size"], counts["new_tokens"], counts["variant"]) == (9, 2, 3, "SM+R")
    assert counts["forward"]["total"]["relu"]["elements"] == 3 * 2 * 9 * 128
    assert counts["baseline"]["generation"]["total"]["gelu"]["elements"] == 3 * 2 * (9 + 1 + 1) * 128
    printed = capsys.readouterr().out
    assert "one forward pass over 2 x 9 tokens" in printed and "generating 3 tokens after 2 x 9 tokens" in printed
    assert "| SM+LN+G |" in printed and "-108 LayerNorm rows, -6,912 GELU" in printed


def test_a_model_of_another_kind_has_no_baseline(tmp_path, counted, capsys):
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 12, "vocab_size": 50}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    counts = counted(tmp_path)
    assert "| GPT2LMHeadModel |" in capsys.readouterr().out
    assert counts["generation"] is None and "baseline" not in counts
    # as many tokens as it has positions, in one input
    assert (counts["length"], counts["batch_size"]) == (12, 1)


def test_code_that_comes_with_a_model_is_run_only_when_asked(tmp_path, counted, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model("SM+R")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"model_type": "lnfree"', '"model_type": "unknown_to_all"'))
    source = tmp_path / "configuration_lnfree.py"
    source.write_text(source.read_text().replace('model_type = "lnfree"', 'model_type = "unknown_to_all"'))
    with pytest.raises(UserError, match="trust_remote_code"):
        cost(str(tmp_path), length=4)
    assert (
        counted(tmp_path, "--length", "4", "--trust-remote-code")["forward"]["total"]["relu"]["elements"]
        == 3 * 4 * 128
    )


@pytest.fixture
def reader(tmp_path, recipe_values):
    """A model with a tokenizer, and texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model("SM+G", vocab_size=26).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "model")
    texts = ["".join(chr(97 + i % 26) for i in row) for row in random_ids(5, 20).tolist()]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"letters": text, "number": 1}) + "\n" for text in texts))
    return tmp_path / "model", path


def test_fewest_bits_of_fixed_point(reader, tmp_path, capsys):
    model, texts = reader
    arguments = ["cost", str(model), "--fixed-point", "--dataset", str(texts), "--batch-size", "3", "--device", "cpu"]
    assert cli.main([*arguments, "--json", str(tmp_path / "cost.json")]) == 0
    bits = json.loads((tmp_path / "cost.json").read_text())["fixed_point"]
    loaded = tiny_model("SM+G", vocab_size=26).from_pretrained(model).double()
    nats = []
    for line in texts.read_text().splitlines():
        ids = torch.tensor([[ord(letter) - 97 for letter in json.loads(line)["letters"]]])
        log_probs = loaded(ids).logits.log_softmax(-1)[:, :-1]
        nats.append(-log_probs.gather(-1, ids[:, 1:, None]).flatten())
    assert bits["perplexity"] == pytest.approx(math.exp(torch.cat(nats).mean().item()), rel=1e-5)
    assert bits["fixed_point_perplexity"] <= 1.01 * bits["perplexity"]
    assert f"{bits['integer_bits']} integer and {bits['fraction_bits']} fractional bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_id": "./no-such-model"}, "model './no-such-model' is neither a folder nor an id of the Hub"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"new_tokens": -1}, "new_tokens must be at least 0, got -1"),
        ({"length": 65}, "need 65 positions, the model has 64"),
        ({"length": 64, "new_tokens": 2}, "length=64 and new_tokens=2 need 65 positions, the model has 64"),
        ({"fixed_point": True}, "--fixed-point needs texts to keep the perplexity of: --dataset NAME_OR_FILE"),
        ({"dataset": "stdlib"}, "--dataset stdlib has no effect without --fixed-point"),
        ({"json_path": "."}, "json_path must be a new or a plain file, got ., which is a folder"),
        ({"fixed_point": True, "dataset": "texts.jsonl", "text_column": "number"}, "must hold texts, got int"),
        ({"fixed_point": True, "dataset": "texts.jsonl", "device": "nonsense"}, "device 'nonsense' cannot be used"),
    ],
)
def test_errors_are_one_line(reader, monkeypatch, options, message):
    monkeypatch.chdir(reader[1].parent)
    with pytest.raises(UserError, match=message) as error:
        cost(**{"model_id": str(reader[0]), **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "now"),
    [
        (["--private-cost"], "lnfree cost MODEL"),
        (["--private-cost", "8"], "lnfree cost MODEL"),
        (["--fixed-point"], "lnfree cost MODEL --fixed-point"),
    ],
)
def test_options_that_measure_had_name_the_verb(option, now, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["measure", "a-model", "--dataset", "stdlib", *option])
    assert capsys.readouterr().err == f"lnfree measure: error: {option[0]} is now '{now}'\n"
