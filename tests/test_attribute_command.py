"""`lnfree attribute`: every option changes what it says it does, and what cannot be done is one line."""

import json
import re

import matplotlib.image
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from modeling_lnfree import LNFreeForCausalLM, activation_patching, attribute_logits, attribution_patching, logit_lens
from training import cli

from .conftest import byte_tokenizer, tiny_config


TEXT, OTHER = "def main(", "def name("


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a model without a norm, one with a final norm, a stock GPT-2, one with peri norms."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    folder = tmp_path_factory.mktemp("attributed")
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    peri = {"norm_position": "peri"}
    built = {
        "plain": LNFreeForCausalLM(tiny_config("SM+R-noLNf", **sizes)),
        "normed": LNFreeForCausalLM(tiny_config("SM+LN+G", **sizes)),
        "peri": LNFreeForCausalLM(tiny_config("SM+LN+G", **sizes, **peri)),
        "stock": GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=256, n_positions=64)),
    }
    for name, model in built.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    built["plain"].save_pretrained(folder / "no tokenizer")
    return folder


@pytest.fixture
def run(models, tmp_path, capsys):
    """Runs the command on a model; returns what it printed and what it wrote."""

    def run(name: str, *options: str) -> tuple[str, dict]:
        path = tmp_path / "results.json"
        assert cli.main(["attribute", str(models / name), *options, "--json", str(path)]) == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    return run


def loaded(models, name: str):
    model, tokenizer = (auto.from_pretrained(models / name) for auto in (AutoModelForCausalLM, AutoTokenizer))
    return model.eval(), tokenizer, tokenizer(TEXT, return_tensors="pt")["input_ids"]


def cells(printed: str, head: str) -> list[list[str]]:
    """The rows of the table whose first column is called so."""
    lines = printed.splitlines()
    (start,) = (index for index, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line[1:-1].split("|")])
    return rows


def test_a_logit_and_its_parts(run, models):
    printed, results = run("plain", TEXT)
    model, tokenizer, input_ids = loaded(models, "plain")
    found = attribute_logits(model, input_ids)
    likeliest = tokenizer.decode([model(input_ids).logits[0, -1].argmax()])
    assert printed.startswith(f"the logit of {likeliest!r} after {TEXT!r} is {found.logits[0, -1]:.4f}:\n")
    assert results["parts"] == pytest.approx({name: part[0, -1].item() for name, part in found.parts.items()})
    rows = cells(printed, "part")
    assert [rows[-2][0], *rows[-1]] == ["1 others", "all 11", f"{found.logits[0, -1]:+.4f}"]
    shown = [(name, float(value)) for name, value in rows[:-2]]
    assert [abs(value) for _, value in shown] == sorted((abs(value) for _, value in shown), reverse=True)
    assert all(results["parts"][name] == pytest.approx(value, abs=1e-4) for name, value in shown)
    assert sum(value for _, value in shown) + float(rows[-2][1]) == pytest.approx(float(rows[-1][1]), abs=1e-3)
    assert "effects" not in results and "lens" not in results and "neurons" not in results


def test_target_and_against_choose_the_logits(run, models):
    model, tokenizer, input_ids = loaded(models, "plain")
    logits = model(input_ids).logits[0, -1]
    first, second = (tokenizer.convert_tokens_to_ids(token) for token in "ax")
    _, results = run("plain", TEXT, "--target", "a")
    assert results["logit"] == pytest.approx(logits[first].item(), abs=1e-5) and results["target"] == "'a'"
    printed, results = run("plain", TEXT, "--target", "a", "--against", "x")
    assert results["logit"] == pytest.approx((logits[first] - logits[second]).item(), abs=1e-5)
    assert printed.startswith("the logit of 'a' less that of 'x' after ")
    assert sum(results["parts"].values()) == pytest.approx(results["logit"], abs=1e-5)


def test_neurons_and_lens_have_tables(run, models):
    printed, results = run("plain", TEXT, "--neurons", "--lens")
    model, tokenizer, input_ids = loaded(models, "plain")
    neurons = attribute_logits(model, input_ids, neurons=True).neurons[:, :, 0, -1]
    torch.testing.assert_close(torch.tensor(results["neurons"]).double(), neurons)
    layer, neuron = divmod(neurons.abs().argmax().item(), neurons.shape[1])
    assert cells(printed, "neuron")[0] == [f"layer {layer} neuron {neuron}", f"{neurons[layer, neuron]:+.4f}"]
    stream = logit_lens(model, input_ids)
    rows = cells(printed, "after")
    assert [row[0] for row in rows] == ["the embeddings", "layer 0", "layer 1"]
    last = (values[:, 0, -1] for values in (stream.tokens, stream.probabilities, stream.divergences))
    for row, written, token, probability, divergence in zip(rows, results["lens"], *last, strict=True):
        assert float(row[3]) == pytest.approx(divergence.item(), abs=1e-3)
        assert written["divergence"] == pytest.approx(divergence.item(), abs=1e-6)
        assert row[1] == written["token"] == repr(tokenizer.decode([token]))
        assert float(row[2]) == pytest.approx(probability.item(), abs=1e-3)
        assert written["probability"] == pytest.approx(probability.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["normed", "stock"])
def test_a_final_norm_is_held_on_demand_in_stock_models_too(name, run, models):
    printed, results = run(name, TEXT, "--linearize")
    model, _, input_ids = loaded(models, name)
    assert results["logit"] == pytest.approx(model(input_ids).logits[0, -1].max().item(), abs=1e-4)
    assert sum(results["parts"].values()) == pytest.approx(results["logit"], abs=1e-4)
    assert 0 < results["error"] and f"wrong by {100 * results['error']:.0f} % of what taking them out" in printed
    expected = attribute_logits(model, input_ids, linearize=True) if name == "normed" else None
    if expected is not None:
        last = {part: effect[0, -1].item() for part, effect in expected.effects.items()}
        assert results["effects"] == pytest.approx(last) and results["error"] == pytest.approx(expected.error)
    for part, adds, removal in cells(printed, "part")[:-2]:
        assert results["parts"][part] == pytest.approx(float(adds), abs=1e-4)
        if part in results["effects"]:
            assert results["effects"][part] == pytest.approx(-float(removal), abs=1e-4)


@pytest.mark.parametrize("name", ["plain", "normed", "peri"])
def test_corrupted_text_scores_every_output(name, run, models):
    model, tokenizer, input_ids = loaded(models, name)
    other_ids = tokenizer(OTHER, return_tensors="pt")["input_ids"]
    first, second = (tokenizer.convert_tokens_to_ids(token) for token in "ax")

    def metric(logits):
        return logits[:, -1, first] - logits[:, -1, second]

    named = ("--target", "a", "--against", "x")
    printed, results = run(name, TEXT, "--corrupted", OTHER, *named)
    estimate = attribution_patching(model, input_ids, other_ids, metric)
    assert len(results["scores"]) == 2 * 3 * input_ids.shape[1] and "error" not in results
    for row in results["scores"]:
        layer, head = re.fullmatch(r"layer (\d) (?:head (\d)|MLP)", row["part"]).groups()
        scores = estimate.mlps[int(layer)] if head is None else estimate.heads[int(layer), int(head)]
        assert row["score"] == pytest.approx(scores[0, row["position"]].item(), abs=1e-6)
        assert row["token"] == repr(tokenizer.decode([input_ids[0, row["position"]]]))
    assert results["clean"] == pytest.approx(metric(model(input_ids).logits).item(), abs=1e-5)
    assert results["after_corrupted"] == pytest.approx(metric(model(other_ids).logits).item(), abs=1e-5)
    printed, results = run(name, TEXT, "--corrupted", OTHER, *named, "--real", "--lens")
    real = activation_patching(model, input_ids, other_ids, metric)
    assert results["error"] == pytest.approx(estimate.error(real), rel=1e-3) and len(results["lens"]) == 3
    assert f"the estimate is wrong by {100 * results['error']:.0f} % of the real change." in printed
    by_part = {(row["part"], row["position"]): row["real"] for row in results["scores"]}
    assert by_part["layer 1 head 1", 1] == pytest.approx(real.heads[1, 1, 0, 1].item(), abs=1e-6)
    assert len(cells(printed, "part")[0]) == 4


def test_default_answers_of_corrupted_are_the_likeliest_of_both(run, models):
    model, tokenizer, _ = loaded(models, "plain")
    texts = TEXT + "x", TEXT + "y"
    likeliest = [model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].argmax() for text in texts]
    assert likeliest[0] != likeliest[1]
    _, results = run("plain", texts[0], "--corrupted", texts[1])
    assert [results["target"], results["against"]] == [repr(tokenizer.decode([token])) for token in likeliest]


@pytest.mark.parametrize("options", [("--lens",), ("--corrupted", OTHER, "--target", "a", "--against", "x")])
def test_picture_is_drawn_of_what_was_asked_for(options, run, tmp_path):
    run("plain", TEXT, *options, "--picture", str(tmp_path / "both.png"))
    run("plain", TEXT, "--picture", str(tmp_path / "one.png"))
    both, one = (matplotlib.image.imread(tmp_path / name) for name in ("both.png", "one.png"))
    assert both.shape != one.shape or (both != one).any()
    assert (one[..., :3].std((0, 1)) > 0.05).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "normed",
            [TEXT],
            r"model '.*normed' cannot be attributed: final_norm_type='layernorm': the final norm divides",
        ),
        ("peri", [TEXT, "--linearize"], r".*: norm_position='peri' in layer 0: a norm stands behind"),
        ("no tokenizer", [TEXT], r"(the tokenizer of|model) '.*no tokenizer' cannot"),
        ("plain", [""], "a text must have a token, got ''"),
        # what Python makes of arguments that are not UTF-8
        ("plain", ["a\udcff"], r"the text 'a\\udcff' cannot be read: TypeError"),
        ("plain", [TEXT, "--target", "\udcff"], r"the text '\\udcff' cannot be read: TypeError"),
        ("plain", [TEXT, "--revision", "main"], "revision='main' is of the Hub, and .*plain is a folder"),
        (
            "plain",
            [TEXT, "--target", "zqx"],
            "a token must be one of the tokenizer's, got 'zqx', which is 3: 'z', 'q', 'x'",
        ),
        ("plain", [TEXT, "--real"], "--real is of --corrupted TEXT"),
        ("plain", [TEXT, "--corrupted", OTHER, "--neurons"], "--neurons and --linearize are of splitting a logit"),
        ("plain", [TEXT, "--corrupted", OTHER, "--linearize"], "--neurons and --linearize are of splitting a logit"),
        ("plain", [TEXT, "--corrupted", TEXT], "'.*' is the likeliest token after both texts: name the tokens"),
        ("plain", [TEXT, "--corrupted", "x", "--target", "a"], ".*must be pairs of texts of equal length"),
        ("plain", [TEXT, "--picture", "picture.txt"], "picture.txt must end in .png, .pdf or .svg"),
        ("missing", [TEXT], "model '.*missing' "),
    ],
)
def test_what_cannot_be_done_is_one_line(name, options, message, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["attribute", str(models / name), *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"lnfree attribute: error: {message}", error)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_not_overwritten(models, capsys):
    config = models / "plain" / "config.json"
    before = config.read_text()
    assert cli.main(["attribute", str(models / "plain"), TEXT, "--json", str(config)]) == 1
    assert "json_path must not overwrite what is read" in capsys.readouterr().err and config.read_text() == before
