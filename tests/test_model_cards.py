"""The card and its picture say what the block is, for every design."""

import hashlib

import matplotlib
import pytest
from matplotlib.figure import Figure

from model_cards.card import build_card
from model_cards.diagram import describe_activation, describe_norm, draw_block

from .modeling.designs import design, every_design, every_preset, possible


RESULTS = {
    **{"dataset": "owner/texts", "perplexity": 9.0, "eval_loss": 2.2, "eval_tokens": 10, "parameters": 99, "seed": 0},
    **{"block_size": 16, "train_tokens": 10, "train_steps": 1, "hardware": "CPU", "train_seconds": 1, "versions": {}},
    **{"recipe": {}, "commit": None},
    "attention_entropy": {"entropy": [[1.0]], "max_entropy": [[1.0]], "nan_count": [0]},
}


def draw(monkeypatch, tmp_path, config) -> list[tuple[str, float, float]]:
    """Texts of the picture, with where they stand, from the bottom to the top."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: kept.extend(figure.axes[0].texts))
        draw_block(config, tmp_path / "block.png")
    places = [(text.get_text(), *text.get_position()) for text in kept if text.get_text()]
    return sorted(places, key=lambda place: place[2])


def kinds(drawn) -> str:
    """N for a norm in a branch, M for one in the stream, A, F and + in their order."""
    left = min(x for _, x, _ in drawn)
    letters = {"attention": "A", "feed-forw": "F", "gated fee": "F", "+": "+"}
    found = ""
    for text, x, _ in drawn:
        norm = text in ("LayerNorm", "RMSNorm", "DyT", "Derf")
        found += ("M" if x == left else "N") if norm else letters.get(text[:9], "")
    return found


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("OP", "gpt2", "A+F+"),
        ("rmsnorm", "gpt2", "NA+NF+"),
        ("rmsnorm", "llama", "NA+NF+"),
        ("PostLN", "gpt2", "A+MF+M"),
        ("PeriLN", "gpt2", "NAN+NFN+"),
        ("HybridNorm", "llama", "A+MF+"),
        ("no MLP", "gpt2", "NA+"),
        ("no MLP, hybrid", "gpt2", "A+M"),
        ("SAS-P", "gpt2", "FA++"),
    ],
)
def test_norms_are_drawn_where_they_are(name, backbone, expected, monkeypatch, tmp_path):
    assert kinds(draw(monkeypatch, tmp_path, design(name, backbone))) == expected


@pytest.mark.parametrize(
    ("name", "backbone", "said"),
    [
        ("HybridNorm", "gpt2", ["RMSNorm of q, k, v"]),
        ("SAS", "gpt2", ["identity: v, o", "a I + b softmax - c uniform", "x 0", "x 0.3"]),
        ("OP", "gpt2", ["RMSNorm of q, k", "x 0.707", "x 1"]),
        ("Gated", "gpt2", ["gated by head"]),
        ("Clipped", "gpt2", ["weights clipped, 12.0"]),
        ("SoftCap", "gpt2", ["scores capped at 30.0"]),
        ("AERO", "gpt2", ["scores / learned temperature", "feed-forward, one matrix"]),
        ("gated", "llama", ["gated feed-forward, 24", "SiLU", "biases: gate, up"]),
        ("num_key_value_heads", "gpt2", ["attention, 4 heads (2 of keys and values)"]),
        ("per layer", "gpt2", ["residual stream, block 0 of 2: they differ"]),
        ("head_dim", "gpt2", ["biases: v, o"]),
    ],
)
def test_parts_are_named_and_nothing_that_is_not_there(name, backbone, said, monkeypatch, tmp_path):
    lines = "\n".join(text for text, *_ in draw(monkeypatch, tmp_path, design(name, backbone))).split("\n")
    assert set(said) <= set(lines)
    plain = "\n".join(text for text, *_ in draw(monkeypatch, tmp_path, design("zero_init_projections"))).split("\n")
    assert not set(said) & set(plain)


@every_design
def test_the_block_of_every_design_is_drawn_with_its_norms(name, tmp_path):
    config = design(name)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_block(config, tmp_path / "block.svg")
    drawn = (tmp_path / "block.svg").read_text()
    layer = config.per_layer_config[0]
    by_position = {"pre": (1, 1), "peri": (2, 2), "post": (1, 1), "hybrid": (1, 0)}[layer.norm_position]
    norms = sum(by_position) if layer.mlp_type != "none" else by_position[0]
    assert drawn.count(f">{describe_norm(config.norm_type)}<") == (0 if config.norm_type == "none" else norms)
    assert drawn.count("attention, 4 heads") == 1
    assert drawn.count("feed-forward") == (layer.mlp_type != "none")


@pytest.mark.parametrize(
    ("name", "activation"), [("silu", "SiLU"), ("linear", "no activation"), ("Shaped", "leaky ReLU, slope 0.795876")]
)
def test_activations_are_told(name, activation):
    assert describe_activation(design(name)) == activation


@every_preset
def test_every_preset_has_a_picture_and_a_card(name, tmp_path):
    for backbone in ("gpt2", "pythia", "llama"):
        if not possible(name, backbone):
            continue
        config = design(name, backbone)
        draw_block(config, tmp_path / "block.png")
        results = {**RESULTS, "variant": config.variant, "backbone": config.backbone}
        card = build_card("name", config, results, tmp_path, "")
        said = {"gpt2": "GPT-2", "pythia": "Pythia", "llama": "Llama"}[config.backbone]
        assert f"**{config.variant}**" in card.text and f"the {said}" in card.text
        assert f"the design {config.preset}" in card.text
        assert ("without LayerNorm" in card.text) == (config.norm_type == "none")


def test_a_card_says_which_layers_differ(tmp_path):
    pruned = design("Pruned", num_hidden_layers=5)
    results = {**RESULTS, "variant": pruned.variant, "backbone": "gpt2"}
    text = build_card("name", pruned, results, tmp_path, "").text
    assert "| feed-forward layer | one matrix (layer 0, 1); none (layer 2, 3, 4) |" in text
    assert "| residual gains | 1, 1, 1, 1 (layer 0, 1); 1, 1 (layer 2, 3, 4) |" in text
    text = build_card("name", design("HybridNorm-star"), results, tmp_path, "").text
    assert "attention and feed-forward layer (layer 0); over the sum behind attention (layer 1) |" in text


# by hand: where each design is from
PAPERS = {
    **{"QKNorm": "2405.19279", "OP": "2405.19279", "SAS": "2311.01906", "SAS-P": "2311.01906"},
    **{"V-SkipInit": "2302.10322", "Shaped": "2306.17759", "Gated": "2306.12929", "Clipped": "2306.12929"},
    **{"ScFFN": "2410.13060", "ScFuFFN": "2410.13060", "AERO": "2410.13060", "PostLN": "2002.04745"},
    **{"Pruned": "2410.13060", "PeriLN": "2502.02732"},
    **{"HybridNorm": "2503.04598", "HybridNorm-star": "2503.04598"},
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_card_names_the_paper_of_its_design(name, tmp_path):
    config = design(name)
    results = {**RESULTS, "variant": config.variant, "backbone": config.backbone}
    said = build_card("name", config, results, tmp_path, "").text.partition("## Results")[0]
    assert PAPERS[name] in said
    assert not [paper for paper in set(PAPERS.values()) - {PAPERS[name], "2410.09637"} if paper in said]


@pytest.mark.parametrize(("name", "norm"), [("rmsnorm", "RMSNorm"), ("dyt", "DyT"), ("derf", "Derf")])
def test_a_card_says_layernorm_only_where_it_is(name, norm, tmp_path):
    config = design(name)
    results = {**RESULTS, "variant": config.variant, "backbone": config.backbone}
    card = build_card("name", config, results, tmp_path, "")
    assert "LayerNorm" not in card.text.partition("## Results")[0]
    assert f"| norms in the blocks | {norm} |" in card.text and f"| final norm | {norm} |" in card.text
    assert config.norm_type in card.data.tags


def test_every_statement_of_a_card_is_about_its_run(tmp_path):
    (tmp_path / "modeling_lnfree.py").write_text("code = 1\n")
    measured = {"entropy": [[0.5, 1.5], [2.0, 3.0]], "max_entropy": [[3.1, 3.1], [3.1, 3.1]], "nan_count": [2, 5]}
    results = {
        **{"dataset": "owner/texts", "perplexity": 123.4567, "eval_loss": 4.81588, "eval_tokens": 1234, "seed": 77},
        **{"parameters": 56789, "block_size": 48, "train_tokens": 98765, "train_steps": 321, "hardware": "an abacus"},
        **{"train_seconds": 90.0, "versions": {"python": "3.0.1", "torch": "0.4.2"}, "commit": "abc1234-dirty"},
        **{"recipe": {"eval_dataset": "owner/held_out", "trainable": "q_proj"}, "eval_revision": "rev9"},
        **{"base_model": "owner/base", "attention_entropy": measured, "variant": "SM+LR-layer", "backbone": "gpt2"},
    }
    config = design("gated, leaky", vocab_size=61, biased_projections=["k_proj"])
    card = build_card("named", config, results, tmp_path, "COSTS", namespace="me")
    digest = hashlib.sha256(b"code = 1\n").hexdigest()
    for statement in (
        *(
            "| parameters | 56,789 |",
            "| layers, heads, width, feed-forward width | 2, 4, 16, 24 |",
            "| biases | k_proj |",
        ),
        *("| activation | leaky ReLU, a learned slope a layer, at the start 0.3 |", "| vocabulary | 61 |"),
        *("| positions, residual, embeddings | learned, sequential, tied |", "context length 48"),
        *("perplexity **123.457** (4.8159 nats per token)", "(owner/texts; 1,234 predicted tokens)"),
        *("(a causal head's largest at this length is 3.100): 1.00, 2.50;", "- NaNs in the attention: 7."),
        *(f"| `modeling_lnfree.py` | `{digest}` |", "| seed | 77 |", "| hardware | an abacus |", "COSTS"),
        *("| tokens, steps | 98,765, 321 |", "| training time | 1.5 minutes |", "python 3.0.1, torch 0.4.2 |"),
        *(
            "It was fine-tuned from owner/base; trained were the parameters `q_proj` alone.",
            "trained on 98,765 tokens",
        ),
        *("at commit `abc1234` (and changes that are in no commit)", "Fine-tuned by the Hugging Face `Trainer`"),
        *('name = "me/named"', "A sequence may be at most 32 tokens long.", "forward pass over 48 tokens"),
        "The entropy of every head, of all seeds, is in the dataset [lnfree-results]",
    ):
        assert statement in card.text, statement
    assert (card.data.base_model, card.data.datasets, card.data.license) == (
        "owner/base",
        ["owner/texts"],
        "apache-2.0",
    )
    for result in card.data.eval_results:
        assert (result.dataset_type, result.dataset_revision) == ("owner/held_out", "rev9")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        **{"perplexity": 123.4567, "attention_entropy": 1.75}
    }
    others = {59.4: "59 seconds", 60: "1.0 minutes", None: "not known: the run was resumed"}
    for seconds, told in others.items():
        text = build_card("named", config, {**results, "train_seconds": seconds}, tmp_path, "").text
        assert f"| training time | {told} |" in text
    text = build_card("named", config, {**results, "commit": "abc1234", "base_model": None}, tmp_path, "").text
    assert "at commit `abc1234` installed" in text and "Trained from scratch by the" in text
    assert 'name = "named"' in text and "lnfree-results" not in text and "fine-tuned from" not in text


def test_seeds_of_a_comparison_are_told(tmp_path):
    row = {
        "name": "a",
        "variant": "SM+R",
        "seed": 1,
        "perplexity": 2.0,
        "change": None,
        "entropy": 1.0,
        "parameters": 9,
    }
    rows = [row, {**row, "name": "b", "variant": "SM+LN+G", "change": 0, "perplexity": 3.0}]
    named = {"variant": "SM+R", "backbone": "gpt2", **RESULTS}

    def text(*siblings):
        return build_card("a", design("residual_gains"), named, tmp_path, "", namespace="me", siblings=siblings).text

    assert "One seed each" in text(*rows) and "One seed each" not in text(rows[0], {**rows[1], "seed": 2})
    assert "Among the variants trained" not in text(rows[0])
    assert "| **SM+R** (this one) | 2.000 |  | 1.000 | 9 | 1 |" in text(*rows)
    assert "| [SM+LN+G](https://huggingface.co/me/b) | 3.000 | 0 | 1.000 | 9 | 1 |" in text(*rows)


def test_words_of_the_notation_are_explained_and_no_others(tmp_path):
    named = {"variant": "SM+R", "backbone": "gpt2", **RESULTS}
    card = build_card("a", design("residual_gains"), named, tmp_path, "", words=("R", "LR-layer"))
    assert "SM softmax attention, R ReLU, LR-layer leaky ReLU with a learned slope a layer" in card.text
    assert "LN LayerNorm" not in card.text
