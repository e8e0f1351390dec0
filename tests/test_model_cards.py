"""What is drawn and said of a model by its configuration."""

import matplotlib
import pytest

from model_cards.diagram import describe_activation, describe_norm, draw_block

from .modeling.designs import design, every_design


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
