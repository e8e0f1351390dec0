"""The card and its picture say what the block is, for every design."""

import pytest
from matplotlib.figure import Figure

from model_cards.card import build_card
from model_cards.diagram import draw_block

from ..modeling.designs import design, every_preset, possible


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
    ],
)
def test_parts_are_named_and_nothing_that_is_not_there(name, backbone, said, monkeypatch, tmp_path):
    lines = "\n".join(text for text, *_ in draw(monkeypatch, tmp_path, design(name, backbone))).split("\n")
    assert set(said) <= set(lines)
    plain = "\n".join(text for text, *_ in draw(monkeypatch, tmp_path, design("zero_init_projections"))).split("\n")
    assert not set(said) & set(plain)


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


@pytest.mark.parametrize(("name", "norm"), [("rmsnorm", "RMSNorm"), ("dyt", "DyT"), ("derf", "Derf")])
def test_a_card_says_layernorm_only_where_it_is(name, norm, tmp_path):
    config = design(name)
    results = {**RESULTS, "variant": config.variant, "backbone": config.backbone}
    card = build_card("name", config, results, tmp_path, "")
    assert "LayerNorm" not in card.text.partition("## Results")[0]
    assert f"| norms in the blocks | {norm} |" in card.text and f"| final norm | {norm} |" in card.text
    assert config.norm_type in card.data.tags
