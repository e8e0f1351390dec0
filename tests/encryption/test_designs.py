"""What designs cost beside the plain block, by hand at two sizes, and every preset in counts and fixed point."""

import json

import pytest
import torch

from modeling_lnfree import LNFreeForCausalLM
from modeling_lnfree.parts_lnfree import NORMS
from training import cli
from training.encryption.counting import count_operations
from training.encryption.fixed_point import measure_fixed_point

from ..conftest import tiny_config
from ..modeling.designs import design, design_model, every_preset
from .test_counting import sizes


# names that an operation may have; each but the products is in a design's formula
KNOWN = {
    *("softmax", "layer_norm", "rms_norm", "gelu", "relu", "leaky_relu", "silu", "tanh", "erf", "sigmoid", "clamp"),
    *("matmul", "comparison", "opening", "truncation", "embedding", "sampling"),
}
B, T = 2, 13


def by_hand(name, config) -> dict[str, tuple[int, int]]:
    """Of one block, calls and elements more than those of SM+R with these sizes."""
    width, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    states, scores, tokens = B * T * width, B * heads * T * T, B * T
    return {
        # after the projections of queries and keys, each head by itself
        "normalized": {"rms_norm": (2, 2 * states)},
        "rmsnorm": {"rms_norm": (2, 2 * states)},
        # twice: alpha x, and the weight
        "dyt": {"tanh": (2, 2 * states), "opening": (4, 4 * states + 2 * (1 + width)), "truncation": (4, 4 * states)},
        "derf": {"erf": (2, 2 * states), "opening": (4, 4 * states + 2 * (1 + width)), "truncation": (4, 4 * states)},
        # the slices of the input by the gate's weights, and the output by the gate
        "gate": {
            "sigmoid": (1, tokens * heads),
            "opening": (2, states + width + tokens * heads + states),
            "truncation": (2, 2 * states),
        },
        "temperature": {"opening": (1, states + heads), "truncation": (1, states)},
        # a, b and c, and the product of the public uniform weights and the values
        "shaped": {"opening": (3, 3 * (states + heads)), "truncation": (4, 4 * states), "matmul": (1, states)},
        "residual gains": {"opening": (4, 4 * (states + 1)), "truncation": (4, 4 * states)},
        "residual gains, fixed": {"truncation": (4, 4 * states)},
        "soft cap": {"tanh": (1, scores), "truncation": (2, 2 * scores)},
        "clipping": {"clamp": (1, scores), "comparison": (2, 2 * scores), "truncation": (1, scores)},
        "silu": {"silu": (1, tokens * inner), "relu": (-1, -tokens * inner), "comparison": (-1, -tokens * inner)},
        # the gate's projection, and its product with the other
        "gated": {
            "matmul": (1, tokens * inner),
            "opening": (2, states + width * inner + 2 * tokens * inner),
            "truncation": (2, 2 * tokens * inner),
        },
    }[name]


GAINS = [0.9, 0.5, 1.1, 0.3]
DESIGNS = {
    "normalized": ("SM+R", {"normalized_projections": ["q_proj", "k_proj"]}),
    "rmsnorm": ("SM+RMS+R", {}),
    "dyt": ("SM+DyT+R", {}),
    "derf": ("SM+Derf+R", {}),
    "gate": ("SM+R", {"attention_gate_init": 0.3}),
    "temperature": ("SM+R", {"softmax_temperature": 0.5}),
    "shaped": ("SM+R", {"attention_gains": [1.0, 1.0, 1.0]}),
    "residual gains": ("SM+R", {"residual_gains": GAINS}),
    "residual gains, fixed": ("SM+R", {"residual_gains": GAINS, "residual_gains_trainable": False}),
    "soft cap": ("SM+R", {"attn_logit_softcapping": 2.0}),
    "clipping": ("SM+R", {"softmax_clipping": 0.3}),
    "silu": ("SM+S", {}),
    "gated": ("SM+R", {"mlp_type": "gated"}),
}


@sizes
@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_costs_what_its_formula_says(name, size):
    def layer(variant, fields):
        config = tiny_config(variant, **size, **fields)
        return count_operations(LNFreeForCausalLM, config, length=T, batch_size=B)["forward"]["layers"][0], config

    plain, _ = layer("SM+R", {})
    found, config = layer(*DESIGNS[name])
    more = {}
    for key in found.keys() | plain.keys():
        nothing = {"calls": 0, "elements": 0}
        ours, theirs = found.get(key, nothing), plain.get(key, nothing)
        difference = (ours["calls"] - theirs["calls"], ours["elements"] - theirs["elements"])
        more |= {key: difference} if difference != (0, 0) else {}
    assert more == by_hand(name, config)
    if name == "normalized":
        head = size["hidden_size"] // size["num_attention_heads"]
        assert found["rms_norm"]["rows"] == {str(head): 2 * B * T * size["num_attention_heads"]}


class MeanAbsoluteNorm(torch.nn.Module):
    """A norm that no cost model knows: x / mean |x| * weight."""

    def __init__(self, size, eps, alpha):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))

    def forward(self, states):
        return self.weight * (states / states.abs().mean(-1, keepdim=True))


def test_dividing_by_private_data_costs_a_reciprocal(monkeypatch):
    monkeypatch.setitem(NORMS, "dyt", MeanAbsoluteNorm)
    config = tiny_config("SM+DyT+R", final_norm_type="layernorm")
    plain, found = (
        count_operations(LNFreeForCausalLM, each, length=T, batch_size=B)["forward"]
        for each in (tiny_config("SM+R"), config)
    )
    layer, states = found["layers"][0], B * T * config.hidden_size
    assert layer["reciprocal"] == {"calls": 2, "elements": 2 * B * T}
    # the quotient and the weight
    more = layer["opening"]["elements"] - plain["layers"][0]["opening"]["elements"]
    assert more == 2 * (states + B * T + states + config.hidden_size)
    for estimate in found["estimates"].values():
        assert estimate["by_operation"]["reciprocal"]["rounds"] > 0
        assert list(estimate["without_figure"]) == ["abs"]
    assert "reciprocal" not in plain["total"]


@every_preset
def test_every_preset_is_counted_beside_the_baseline(name, tmp_path, capsys):
    config = design(name)
    config.save_pretrained(tmp_path)
    path = tmp_path / "cost.json"
    assert cli.main(["cost", str(tmp_path), "--json", str(path), "--length", "7", "--new-tokens", "3"]) == 0
    counts = json.loads(path.read_text())["private_cost"]
    assert counts["variant"] == config.variant and f"| {config.variant} |" in capsys.readouterr().out
    for phase in ("forward", "generation"):
        assert counts[phase]["total"].keys() <= KNOWN
        assert counts["baseline"][phase]["total"]["layer_norm"]["calls"] % (2 * config.num_hidden_layers + 1) == 0


@every_preset
def test_every_preset_has_its_bits_of_fixed_point(name):
    model, input_ids = design_model(name).float(), torch.randint(61, (2, 9))
    found = measure_fixed_point(model, lambda: model(input_ids, labels=input_ids).loss.item())
    assert found["fixed_point_perplexity"] <= 1.01 * found["perplexity"]
    assert found["integer_bits"] is not None and found["largest_value"] < 2.0 ** found["integer_bits_to_hold"]
