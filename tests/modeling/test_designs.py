"""Every field and every preset against a naive float64 forward, and the identities that hold at the start."""

import re

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.modeling_lnfree import LNFreeDecoderLayer

from ..conftest import every_backbone, random_ids
from .designs import SIZES, design, design_model, every_design_and_backbone, every_preset, possible, preset_name
from .naive import naive_logits


@every_design_and_backbone
def test_logits_and_gradients_match_a_naive_float64_forward(name, backbone):
    model = design_model(name, backbone)
    weights = {key: tensor.detach().clone().requires_grad_() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    input_ids = random_ids(2, 6, vocab_size=61)
    expected = naive_logits(model.config, weights, input_ids)
    logits = model(input_ids).logits
    # the angles of rotary positions are float32
    tolerance = {"atol": 1e-9, "rtol": 1e-7} if backbone == "gpt2" else {"atol": 5e-5, "rtol": 1e-3}
    torch.testing.assert_close(logits, expected, **tolerance)
    for each in (logits, expected):
        F.cross_entropy(each.flatten(0, 1), input_ids.flatten()).backward()
    for key, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if weights[key].grad is None else weights[key].grad
        torch.testing.assert_close(parameter.grad, grad, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_position": "pre", "logits_multiplier": 1, "embedding_multiplier": 1, "mlp_type": "two_layer"},
        {"normalized_projections": [], "identity_projections": [], "zero_init_projections": []},
        {"attention_multiplier": 4**-0.5, "head_dim": 4, "num_key_value_heads": 4, "norm_alpha_init": 0.5},
        {"softmax_clipping": 0.0, "attn_implementation": "eager"},
        {"residual_gains": [1, 1, 1, 1], "residual_gains_trainable": False},
        {"softmax_temperature": 1.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
@every_backbone
def test_neutral_values_give_bit_equal_logits(fields, backbone):
    implementation = {"attn_implementation": fields.get("attn_implementation")}
    plain = LNFreeForCausalLM(tiny_design("SM+R", backbone, **implementation)).eval()
    model = LNFreeForCausalLM(tiny_design("SM+R", backbone, **fields)).eval()
    learned = {name for name in model.state_dict() if name not in plain.state_dict()}
    assert all(name.rpartition(".")[2] in fields or name.endswith("temperature") for name in learned)
    model.load_state_dict(plain.state_dict(), strict=False)
    input_ids = random_ids(2, 9, vocab_size=61)
    assert model(input_ids).logits.equal(plain(input_ids).logits)


def tiny_design(variant, backbone, **fields):
    factor = {"partial_rotary_factor": 0.5} if backbone == "pythia" else {}
    return LNFreeConfig.from_variant(variant, backbone, **{**SIZES, **factor, **fields})


def test_default_rotary_parameters_are_those_of_the_fields():
    scaled = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    plain, model = (
        LNFreeForCausalLM(tiny_design("SM+R", "pythia", **f)).eval() for f in ({"rope_theta": 5000.0}, scaled)
    )
    model.load_state_dict(plain.state_dict())
    assert model.config.rope_theta == 5000.0
    input_ids = random_ids(2, 9, vocab_size=61)
    assert model(input_ids).logits.equal(plain(input_ids).logits)


# ---- what holds at the start


def fresh(name: str, backbone: str = "gpt2", **kwargs) -> LNFreeForCausalLM:
    return LNFreeForCausalLM(design(name, backbone, **kwargs)).eval()


@pytest.mark.parametrize("name", ["SAS", "SAS-P"])
@pytest.mark.parametrize("backbone", ["gpt2", "pythia", "llama"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_of_sas_starts_as_the_identity_exactly(name, backbone, implementation):
    attention = fresh(name, backbone, attn_implementation=implementation).model.layers[0].self_attn
    seen = []
    attention.register_forward_hook(lambda _, args, kwargs, output: seen.append((args, output[0])), with_kwargs=True)
    model = fresh(name, backbone, attn_implementation=implementation)
    model.model.layers[0].self_attn = attention
    with torch.no_grad():
        model(random_ids(2, 9, vocab_size=61))
    ((states,), output), *_ = seen
    assert output.equal(states) and output.abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gains_of_plain_attention_change_nothing(implementation):
    plain = fresh("linear", attn_implementation=implementation)
    model = fresh("linear", attn_implementation=implementation, attention_gains=[0, 1, 0])
    assert model.load_state_dict(plain.state_dict(), strict=False).missing_keys == [
        f"model.layers.{i}.self_attn.attention_gains" for i in range(2)
    ]
    input_ids = random_ids(2, 9, vocab_size=61)
    torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits, atol=1e-6, rtol=0)


def test_gates_without_weights_scale_by_their_probability():
    plain = fresh("linear", biased_projections=[])
    model = fresh("linear", biased_projections=[], attention_gate_init=0.25, initializer_range=0.0)
    model.load_state_dict({**plain.state_dict()}, strict=False)
    for layer in plain.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.25
    input_ids = random_ids(2, 9, vocab_size=61)
    torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_post_norm_leaves_a_stream_of_rms_one():
    config = tiny_design("SM+RMS+R@PostLN", "gpt2", layer_norm_eps=1e-12)
    outputs = LNFreeForCausalLM(config).eval()(random_ids(2, 9, vocab_size=61), output_hidden_states=True)
    for states in outputs.hidden_states[1:-1]:
        torch.testing.assert_close(states.pow(2).mean(-1), torch.ones(2, 9))


def test_normalized_queries_and_keys_forget_the_scale_of_their_matrices():
    model, input_ids = fresh("QKNorm", biased_projections=[], layer_norm_eps=1e-20), random_ids(2, 9, vocab_size=61)
    before = model(input_ids).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 3
        layer.self_attn.k_proj.weight.data *= 0.2
    torch.testing.assert_close(model(input_ids).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "slope"), [("DyT", 1.0), ("Derf", 2 / torch.pi**0.5)])
def test_a_small_alpha_is_the_identity(name, slope):
    model = LNFreeForCausalLM(tiny_design(f"SM+{name}+R", "gpt2", norm_alpha_init=1e-5)).double().eval()
    plain = LNFreeForCausalLM(tiny_design("SM+R-noLNf", "gpt2")).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    for key, parameter in model.named_parameters():
        if "norm" in key and key.endswith("weight"):
            parameter.data.fill_(1e5 / slope)
    input_ids = random_ids(2, 9, vocab_size=61)
    torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_a_large_cap_caps_nothing():
    plain = fresh("linear", attn_implementation="eager")
    model = fresh("linear", attn_logit_softcapping=1e4)
    model.load_state_dict(plain.state_dict())
    input_ids = random_ids(2, 9, vocab_size=61)
    torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits, atol=1e-5, rtol=1e-5)


@every_preset
def test_starts_are_those_of_the_fields(name):
    model = LNFreeForCausalLM(design(name, initializer_range=0.02, hidden_size=64, num_hidden_layers=2))
    for key, tensor in model.state_dict().items():
        part = key.split(".")[-2]
        index = re.search(r"layers\.(\d+)", key)
        config = model.config.per_layer_config[int(index[1]) if index else 0]
        if part in config.zero_init_projections or key.endswith("_proj.bias"):
            assert (tensor == 0).all(), key
        elif key.endswith("attention_gains"):
            assert tensor.equal(torch.tensor(config.attention_gains)[:, None].expand(3, 4)), key
        elif key.endswith("residual_gains"):
            torch.testing.assert_close(tensor, torch.tensor(config.residual_gains), msg=key)
        elif key.endswith("temperature"):
            assert tensor.equal(torch.full((4,), config.softmax_temperature)), key
        elif key.endswith("head_gate.bias"):
            torch.testing.assert_close(tensor.sigmoid(), torch.full((4,), config.attention_gate_init), msg=key)
        elif "norm" in key:
            assert (tensor == (key.endswith("weight"))).all(), key
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.25), key


def test_starts_of_what_no_preset_has():
    derf = LNFreeForCausalLM(design("derf")).state_dict()
    for key, tensor in derf.items():
        if "norm" in key:
            start = {"weight": 1.0, "bias": 0.0, "alpha": 0.7, "shift": 0.0}[key.rpartition(".")[2]]
            assert tensor.equal(torch.full_like(tensor, start)), key
    alphas = LNFreeForCausalLM(design("dyt")).state_dict()
    starts = {key: tensor.item() for key, tensor in alphas.items() if key.endswith("alpha")}
    for key, start in starts.items():
        assert start == pytest.approx(0.8 if "input_layernorm" in key else 0.2), key
    for scale in (0.02, 0.5):
        gated = LNFreeForCausalLM(design("attention_gate_init", hidden_size=64, initializer_range=scale))
        for layer in gated.model.layers:
            assert layer.self_attn.head_gate.weight.std().item() == pytest.approx(scale, rel=0.4)


def test_every_projection_that_is_named_starts_at_0():
    named = ["q_proj", "o_proj", "down_proj"]
    for key, tensor in LNFreeForCausalLM(design("linear", zero_init_projections=named)).state_dict().items():
        if key.endswith("proj.weight"):
            assert (tensor == 0).all() == (key.split(".")[-2] in named), key


def test_fixed_gains_are_there_before_weights_are_initialized():
    config = design("OP")
    gains = LNFreeDecoderLayer(config, 0).residual_gains
    assert gains is not None and not isinstance(gains, torch.nn.Parameter)
    torch.testing.assert_close(gains, torch.tensor(config.residual_gains))


@every_preset
def test_names_of_presets_round_trip(name):
    for backbone in ("gpt2", "pythia", "llama"):
        if not possible(name, backbone):
            with pytest.raises(StrictDataclassError, match="has no form with parallel_residual=True"):
                design(name, backbone)
            continue
        config = design(name, backbone)
        assert config.preset == name and config.backbone == backbone
        assert config.variant == preset_name(name)
        again = LNFreeConfig.from_dict(config.to_dict())
        assert again.variant == config.variant and again.to_dict() == config.to_dict()
        changed = LNFreeConfig.from_dict({**config.to_dict(), "embedding_multiplier": 3.0})
        assert changed.variant.endswith("@custom")
