"""`lnfree cost`: what a model costs under encryption, by its configuration, and the bits that it needs."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from training import cli
from training.cost import cost
from training.encryption import named
from training.encryption.named import find_named
from training.encryption.published import find_published
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
        cost([str(tmp_path)], length=4)
    assert (
        counted(tmp_path, "--length", "4", "--trust-remote-code")["forward"]["total"]["relu"]["elements"]
        == 3 * 4 * 128
    )


@pytest.fixture
def reader(tmp_path):
    """A model with a tokenizer, and texts."""
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
    # weights of half precision are read in float32, which simulates them
    loaded.bfloat16().save_pretrained(model)
    assert cli.main([*arguments, "--json", str(tmp_path / "half.json")]) == 0
    half = json.loads((tmp_path / "half.json").read_text())["fixed_point"]
    assert half["perplexity"] != bits["perplexity"] == pytest.approx(half["perplexity"], rel=0.05)
    assert cli.main(["cost", str(tmp_path), *arguments[1:]]) == 1
    assert "--fixed-point is of one model, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_ids": ["./no-such-model"]}, "model './no-such-model' is neither a folder nor an id of the Hub"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"new_tokens": -1}, "new_tokens must be at least 0, got -1"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
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
        cost(**{"model_ids": [str(reader[0])], **options})
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


def test_models_by_name_stand_beside_the_first(tmp_path, capsys):
    sizes = "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,vocab_size=99"
    names = [f"SM+LN+G:{sizes}", f"SM+R:{sizes}", f"pythia-14m:SM+R:{sizes}"]
    path = tmp_path / "cost.json"
    command = ["cost", *names, "--tokens", "6", "--network", "10,1", "--network", "lan", "--json", str(path)]
    assert cli.main(command) == 0
    results = json.loads(path.read_text())
    assert [results["model"], *(other["model"] for other in results["others"])] == names
    forward = results["others"][0]["private_cost"]["forward"]
    printed = capsys.readouterr().out
    # 10 ms a round, 1 Gbit/s
    cost = forward["estimates"]["SEMI2K"]
    seconds = cost["rounds"] * 0.01 + cost["bytes_per_party"] * 8 / 1e9
    # of the two tables that name it, the first
    start = f"| SEMI2K | {names[1]} | {cost['rounds']:,} |"
    row = next(line for line in printed.splitlines() if line.startswith(start))
    assert f"| {seconds:.2f} |" in row and "-12 LayerNorm rows, -768 GELU" in row
    # against the first, and not the last
    baseline = results["private_cost"]["forward"]["estimates"]["SEMI2K"]
    theirs = baseline["rounds"] * 0.01 + baseline["bytes_per_party"] * 8 / 1e9
    assert f"| {100 * (seconds / theirs - 1):+.1f} % |" in row
    assert f"against {names[0]}" in printed and "| s on 10 ms, 1 Gbit/s | s on LAN |" in printed


@pytest.mark.parametrize(
    ("name", "stock", "parameters"),
    # as their papers and cards have them
    [
        ("gpt2", "GPT2LMHeadModel", 124_439_808),
        ("gpt2-xl", "GPT2LMHeadModel", 1_557_611_200),
        ("pythia-70m", "GPTNeoXForCausalLM", 70_426_624),
        ("pythia-12b", "GPTNeoXForCausalLM", 11_846_072_320),
        ("llama-3.2-1b", "LlamaForCausalLM", 1_235_814_400),
        ("llama-3.1-8b", "LlamaForCausalLM", 8_030_261_248),
        ("llama-2-7b", "LlamaForCausalLM", 6_738_415_616),
    ],
)
def test_named_shapes_are_those_of_the_models(name, stock, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_named(name))
    assert type(model).__name__ == stock
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# layers, width, heads, heads of keys and values, and positions, which no number of parameters tells
SHAPES = {
    **{"gpt2": (12, 768, 12, 12, 1024), "gpt2-medium": (24, 1024, 16, 16, 1024)},
    **{"gpt2-large": (36, 1280, 20, 20, 1024), "gpt2-xl": (48, 1600, 25, 25, 1024)},
    **{"pythia-14m": (6, 128, 4, 4, 2048), "pythia-31m": (6, 256, 8, 8, 2048), "pythia-70m": (6, 512, 8, 8, 2048)},
    **{"pythia-160m": (12, 768, 12, 12, 2048), "pythia-410m": (24, 1024, 16, 16, 2048)},
    **{"pythia-1b": (16, 2048, 8, 8, 2048), "pythia-1.4b": (24, 2048, 16, 16, 2048)},
    **{"pythia-2.8b": (32, 2560, 32, 32, 2048), "pythia-6.9b": (32, 4096, 32, 32, 2048)},
    **{"pythia-12b": (36, 5120, 40, 40, 2048), "llama-3.2-1b": (16, 2048, 32, 8, 131072)},
    **{"llama-3.2-3b": (28, 3072, 24, 8, 131072), "llama-3.1-8b": (32, 4096, 32, 8, 131072)},
    **{"llama-2-7b": (32, 4096, 32, 32, 4096)},
}


@pytest.mark.parametrize("name", named.SHAPES)
def test_named_shapes_have_the_heads_of_the_models(name):
    for config in (find_named(name), find_named(f"{name}:SM+R")):
        sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        grouped = getattr(config, "num_key_value_heads", config.num_attention_heads)
        assert (*sizes, grouped, config.max_position_embeddings) == SHAPES[name]


def test_a_length_that_is_not_named_is_one_that_all_have(tmp_path, counted):
    for name, positions in (("long", 24), ("short", 12)):
        tiny_model("SM+R", max_position_embeddings=positions).save_pretrained(tmp_path / name)
    assert cost([str(tmp_path / name) for name in ("long", "short")])["private_cost"]["length"] == 12
    assert counted(tmp_path / "long")["length"] == 24


def test_a_named_variant_has_the_sizes_of_its_shape():
    config = find_named("gpt2-medium:SM+Lin@ScFuFFN:vocab_size=50000")
    assert (config.variant, config.hidden_size, config.num_hidden_layers) == ("SM+Lin@ScFuFFN", 1024, 24)
    assert config.vocab_size == 50000
    assert find_named("SM+R").hidden_size == 768 and find_named("llama-3.2-1b:SM+R").num_key_value_heads == 8
    assert find_named("openai-community/gpt2") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SM+X", "model 'SM\\+X': variant must be"),
        ("gpt2:foo", "model 'gpt2:foo': variant must be"),
        ("gpt2:SM+R:5", "behind a ':' stand a variant and then FIELD=VALUE,...; got '5'"),
        ("gpt2:hidden_size=65", "num_attention_heads must divide hidden_size=65, got 12"),
        ("SM+R:no_such_field=1", "no_such_field"),
    ],
)
def test_wrong_names_are_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        cost([name], length=4)
    assert "\n" not in str(error.value)


@pytest.fixture
def docs(tmp_path):
    """Of a checkout with one page, whose tables are those of the names."""

    def build(*names):
        (tmp_path / "docs" / "data").mkdir(parents=True)
        (tmp_path / "README.md").write_text("nothing\n")
        marks = [f"<!-- table {name} -->\n<!-- end -->\n" for name in names]
        (tmp_path / "docs" / "page.md").write_text("\n".join(marks))
        return tmp_path / "docs"

    return build


def test_steps_and_tables_for_the_docs(tmp_path, docs, capsys):
    folder = docs("x-steps", "x-operations")
    name = "SM+R:hidden_size=32,num_hidden_layers=1,num_attention_heads=4,vocab_size=99"
    command = ["cost", name, "--tokens", "6", "--steps", "--docs"]
    assert cli.main([*command, str(folder / "data" / "x.json")]) == 0
    printed, text = capsys.readouterr().out, (folder / "page.md").read_text()
    assert {path.stem for path in (folder / "data").iterdir()} == {"x-steps", "x-operations"}
    (first, *_) = json.loads((folder / "data" / "x-steps.json").read_text())["rows"]
    assert first["step"] in text and first["step"] in printed and f"`lnfree cost {name} --tokens 6`" in text
    assert f"`lnfree cost {name} --tokens 6 --steps`" in text
    assert "| instead: sampling, the largest logit found by the parties |" in text and text.count("<!-- end -->") == 2
    with pytest.raises(UserError, match="no page of .* has a mark for y-steps, y, y-token, y-operations, y-published"):
        cost([name], length=6, docs_path=folder / "data" / "y.json")
    with pytest.raises(UserError, match="--docs must be the folder docs of a checkout"):
        cost([name], length=6, docs_path=tmp_path / "x.json")


def test_totals_of_papers_stand_beside_the_same_model(docs, capsys):
    path = docs("x", "x-published") / "data" / "x.json"
    command = ["cost", "SM+LN+G", "SM+Lin@ScFuFFN", "--tokens", "128"]
    assert cli.main([*command, "--network", "lan", "--docs", str(path)]) == 0
    assert "totals that papers have" in capsys.readouterr().out
    first, second = json.loads(path.read_text())["rows"][:2]
    assert (first["configuration"], first["change on LAN"]) == ("SM+LN+G", "0") and second["change on LAN"][0] == "-"
    rows = json.loads((path.parent / "x-published.json").read_text())["rows"]
    assert [(row["configuration"], row["GB"], row["s"]) for row in rows] == [
        ("SM+LN+G", 25.32, pytest.approx(492.6)),
        ("SM+LN+G", None, 1.6),
        ("SM+Lin@ScFuFFN", 6.43, pytest.approx(285.6)),
    ]
    # both parties together, on the network of the paper
    assert rows[0]["SEMI2K: GB"] == pytest.approx(2 * first["MB sent by each party"] / 1e3)
    assert rows[0]["network"] == "80 ms, 0.1 Gbit/s" and "transcription" in rows[0]["source"]
    seconds = 0.08 * first["rounds"] + 8 * first["MB sent by each party"] / 100
    assert rows[0]["SEMI2K: s there"] == pytest.approx(seconds)
    assert len(find_published(find_named("gpt2"), None, 32, 1)) == 2
    others = (("gpt2", 32, 2), ("gpt2-medium", 128, 1), ("pythia-160m", 128, 1))
    assert [find_published(find_named(name), None, *sizes) for name, *sizes in others] == [[]] * 3
