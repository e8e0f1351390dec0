"""The configuration: every variant has a name, and what makes no model is an error that says so."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import ACTIVATION_WORDS, NORM_WORDS, PRESETS
from modeling_lnfree.variants import BASELINE, as_variant, variant_order, variant_slug

from .conftest import every_backbone, every_variant, tiny_config


@every_variant
@every_backbone
def test_variant_and_backbone_follow_from_the_fields(variant, backbone):
    config = tiny_config(variant, backbone)
    assert config.variant == variant
    assert config.backbone == backbone


@given(
    norm=st.sampled_from([word and f"+{word}" for word in NORM_WORDS]),
    # a subnormal slope does not have three digits
    activation=st.sampled_from([word for word in ACTIVATION_WORDS if word != "LR"])
    | st.floats(0, 1, allow_subnormal=False).map(lambda slope: f"LR{slope:.3g}"),
    final=st.sampled_from(["", "-noLNf"]),
)
def test_every_name_in_the_notation_round_trips(norm, activation, final):
    variant = f"SM{norm}+{activation}{final}"
    assert LNFreeConfig.from_variant(variant).variant == variant


def test_defaults_are_the_papers_gpt2_without_layernorm():
    config = LNFreeConfig()
    assert (config.variant, config.backbone, config.intermediate_size) == ("SM+R", "gpt2", 3072)
    assert config.biased_projections == ["q_proj", "k_proj"]


def test_g_is_the_gelu_of_the_backbone():
    assert tiny_config("SM+G", "gpt2").hidden_act == "gelu_pytorch_tanh"
    assert tiny_config("SM+G", "pythia").hidden_act == "gelu"
    assert tiny_config("SM+G", "gpt2", hidden_act="gelu").variant == "SM+G"


@every_variant
@every_backbone
def test_json_round_trip(tmp_path, variant, backbone):
    config = tiny_config(variant, backbone)
    config.save_pretrained(tmp_path)
    assert LNFreeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_overrides_of_a_saved_config_are_validated(tmp_path):
    LNFreeConfig().save_pretrained(tmp_path)
    assert LNFreeConfig.from_pretrained(tmp_path, hidden_act="leaky_relu").variant == "SM+LR0.01"
    assert LNFreeConfig.from_pretrained(tmp_path, num_hidden_layers=2).num_hidden_layers == 2
    for kwargs in ({"biased_projections": ["query"]}, {"num_attention_heads": 33}, {"slope_sharing": "layer"}):
        with pytest.raises(StrictDataclassError, match=next(iter(kwargs))):
            LNFreeConfig.from_pretrained(tmp_path, **kwargs)


def test_fields_set_after_construction_are_validated_by_the_model():
    config = tiny_config()
    config.slope_sharing = "layer"
    with pytest.raises(StrictDataclassError, match="slope_sharing is an option of hidden_act='leaky_relu'"):
        LNFreeForCausalLM(config)


def test_slope_is_read_as_a_number():
    assert LNFreeConfig.from_variant("SM+LR0.10").variant == "SM+LR0.1"
    for slope in (-0.1, 1e-07, 2.0):
        variant = LNFreeConfig(hidden_act="leaky_relu", negative_slope=slope).variant
        assert LNFreeConfig.from_variant(variant).negative_slope == slope


WRONG = [
    ({"rope_theta": 0, "position_embedding_type": "rotary"}, "rope_theta must be finite and positive, got 0"),
    ({"layer_norm_eps": -1}, "layer_norm_eps must be finite and positive, got -1"),
    ({"hidden_act": "leaky_relu", "negative_slope": float("nan")}, "negative_slope .* must be finite, got .*nan"),
    ({"hidden_act": "swish"}, "hidden_act.*gelu_pytorch_tanh.*swish"),
    ({"norm_type": "batchnorm"}, "norm_type.*layernorm.*batchnorm"),
    ({"final_norm_type": "batchnorm"}, "final_norm_type.*batchnorm"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type.*rotary.*alibi"),
    ({"hidden_size": 100}, "num_attention_heads.*divide hidden_size=100, got 12"),
    ({"hidden_size": "768"}, "hidden_size.*int"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"position_embedding_type": "rotary", "partial_rotary_factor": 0.05}, "even.*got 3"),
    ({"position_embedding_type": "rotary", "partial_rotary_factor": 0.0}, "partial_rotary_factor.*got 0"),
    ({"negative_slope": 0.1}, "negative_slope.*leaky_relu.*'relu'.*0.1"),
    ({"hidden_act": "gelu", "slope_sharing": "layer"}, "slope_sharing.*leaky_relu.*'gelu'"),
    ({"hidden_act": "leaky_relu", "slope_sharing": "head"}, "slope_sharing.*layer.*global.*head"),
    ({"biased_projections": ["query"]}, "biased_projections.*q_proj.*'query'"),
    ({"embedding_dropout": 1.5}, r"embedding_dropout must be in \[0, 1\), got 1.5"),
    # at the bound, and what is no number
    *(
        ({name: value}, rf"{name} must be in \[0, 1\), got {value}")
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout", "classifier_dropout")
        for value in (1.0, -0.01, float("nan"))
    ),
    ({"attention_gate_init": 0.0}, r"attention_gate_init must be in \(0, 1\), got 0.0"),
    ({"attention_gate_init": float("nan")}, r"attention_gate_init must be in \(0, 1\), got nan"),
    ({"partial_rotary_factor": 1.01, "position_embedding_type": "rotary"}, "partial_rotary_factor.*got 1.01"),
    *(
        ({name: value}, f"{name} must be finite and positive, got {value}")
        for name in ("layer_norm_eps", "softmax_temperature", "attn_logit_softcapping", "attention_multiplier")
        for value in (float("inf"), float("nan"))
    ),
    ({"softmax_clipping": float("nan")}, "softmax_clipping must be finite and not negative, got nan"),
    ({"initializer_range": -0.1}, "initializer_range.*got -0.1"),
    ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads=12, got 5"),
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"norm_alpha_init": [0.5, 0.5, 0.5]}, "norm_alpha_init must be one or two finite numbers"),
    ({"norm_position": "sandwich"}, "norm_position.*hybrid.*sandwich"),
    ({"norm_position": "post", "parallel_residual": True}, "norm_position='post' has no form with parallel_residual"),
    ({"norm_position": "hybrid", "parallel_residual": True}, "norm_position='hybrid' has no form"),
    (
        {"normalized_projections": ["o_proj"]},
        "normalized_projections must be a list from q_proj, k_proj, v_proj",
    ),
    ({"identity_projections": ["q_proj"]}, "identity_projections must be a list from v_proj, o_proj; got 'q_proj'"),
    (
        {"identity_projections": ["v_proj"], "num_key_value_heads": 4},
        "identity_projections may not name v_proj",
    ),
    ({"identity_projections": ["o_proj"], "head_dim": 32}, "identity_projections.*head_dim=32"),
    (
        {"identity_projections": ["o_proj"], "biased_projections": ["o_proj"]},
        "biased_projections must be a list from q_proj, k_proj, v_proj, up_proj, down_proj; got 'o_proj'",
    ),
    ({"biased_projections": ["gate_proj"]}, "biased_projections.*'gate_proj'"),
    ({"mlp_type": "fused", "biased_projections": ["up_proj"]}, "biased_projections.*fused_proj; got 'up_proj'"),
    ({"zero_init_projections": ["lm_head"]}, "zero_init_projections.*'lm_head'"),
    ({"attention_gains": [1.0, 1.0]}, r"attention_gains must be three finite numbers, got \[1.0, 1.0\]"),
    ({"attention_gate_init": 1.0}, r"attention_gate_init must be in \(0, 1\), got 1.0"),
    ({"attention_gate_init": 0.5, "head_dim": 32}, "attention_gate_init.*head_dim=32"),
    ({"softmax_temperature": 0.0}, "softmax_temperature must be finite and positive, got 0"),
    ({"softmax_temperature": -1}, "softmax_temperature must be finite and positive, got -1"),
    ({"attn_logit_softcapping": -5.0}, "attn_logit_softcapping must be finite and positive, got -5"),
    ({"softmax_clipping": -0.1}, "softmax_clipping must be finite and not negative, got -0.1"),
    ({"attention_multiplier": 0}, "attention_multiplier must be finite and positive, got 0"),
    ({"embedding_multiplier": float("inf")}, "embedding_multiplier must be finite, got inf"),
    ({"logits_multiplier": float("nan")}, "logits_multiplier must be finite, got nan"),
    ({"residual_gains": [1.0, 1.0]}, "residual_gains must be 4 finite numbers.*two_layer"),
    ({"residual_gains": [1.0] * 4, "mlp_type": "none"}, "residual_gains must be 2 finite numbers.*'none'"),
    ({"residual_gains": [0.0, 1.0, 1.0, 1.0]}, "leaves no way past attention"),
    ({"residual_gains": [0, 1, 1, 1], "attention_gains": [0, 1, 1]}, "leaves no way past attention"),
    ({"residual_gains_trainable": False}, "residual_gains_trainable=False needs residual_gains"),
    (
        {"hidden_act": "leaky_relu", "slope_sharing": "layer", "mlp_type": "fused"},
        "slope_sharing='layer' needs activations, got mlp_type='fused'",
    ),
    (
        {"softmax_clipping": 1.0, "attn_implementation": "sdpa"},
        "softmax_clipping=1.0 would be dropped.*take 'eager'",
    ),
    ({"softmax_clipping": 1.0, "attn_implementation": "flex_attention"}, "softmax_clipping=1.0 would be dropped"),
    ({"attn_logit_softcapping": 30, "attn_implementation": "sdpa"}, "attn_logit_softcapping=30 would be dropped"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "option of position_embedding_type='rotary'"),
    (
        {"rope_parameters": {"rope_type": "rings"}, "position_embedding_type": "rotary"},
        "rope_type must be one of default, linear.*'rings'",
    ),
    (
        {"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 3.0, "position_embedding_type": "rotary"},
        "rope_theta=3.0 contradicts rope_parameters, where it is 2.0",
    ),
    ({"per_layer_config": {0: {"norm_type": "layernorm"}}}, "per_layer_config may set.*norm_position.*'norm_type'"),
    ({"per_layer_config": {0: {"norm_position": "post"}}, "parallel_residual": True}, "has no form"),
    ({"hiden_size": 64}, "hiden_size.*did you mean 'hidden_size'"),
    ({"n_embd": 64}, "n_embd.*its fields are.*hidden_size"),
]


@pytest.mark.parametrize(
    ("kwargs", "message"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_wrong_field_is_named_with_what_is_allowed(kwargs, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        LNFreeConfig(**kwargs)


@pytest.mark.parametrize("variant", ["LN+G", "SM+X", "SM+LR", "SM+R+LN", "sm+r", "", "SM+R@", "SM+R@XX", "SM+G0.1"])
def test_name_outside_the_notation_is_refused(variant):
    with pytest.raises(ValueError, match="variant must be .* LR-global, LR<slope>"):
        LNFreeConfig.from_variant(variant)


def test_fields_that_contradict_the_variant_are_refused():
    with pytest.raises(ValueError, match="make SM\\+LN\\+R, not variant='SM\\+R'"):
        LNFreeConfig.from_variant("SM+R", norm_type="layernorm")


def test_fields_of_no_preset_may_be_added_to_a_name():
    config = LNFreeConfig.from_variant("SM+R", residual_gains=[1.0, 0.5, 1.0, 0.5])
    assert config.variant == "SM+R@custom" and config.preset == "custom"
    assert LNFreeConfig.from_variant("SM+R@custom", residual_gains=[1.0, 0.5, 1.0, 0.5]) == config
    same = LNFreeConfig.from_variant("SM+R", normalized_projections=["k_proj", "q_proj"])
    assert same.variant == "SM+R@QKNorm"
    with pytest.raises(ValueError, match="make SM\\+R@custom, not variant='SM\\+R@OP'"):
        LNFreeConfig.from_variant("SM+R@OP", residual_gains=[1.0, 0.5, 1.0, 0.5])
    with pytest.raises(ValueError, match="ScFFN has hidden_act='linear', which R in SM\\+R@ScFFN is not"):
        LNFreeConfig.from_variant("SM+R@ScFFN")


@pytest.mark.parametrize(
    ("variant", "backbone", "final"),
    [
        ("SM+R", "gpt2", "layernorm"),
        ("SM+RMS+S", "llama", "rmsnorm"),
        ("SM+S", "llama", "rmsnorm"),
        ("SM+LN+S", "llama", "layernorm"),
        ("SM+DyT+G", "pythia", "dyt"),
        ("SM+RMS+S-noLNf", "llama", "none"),
    ],
)
def test_final_norm_follows_the_blocks(variant, backbone, final):
    config = LNFreeConfig.from_variant(variant, backbone)
    assert (config.final_norm_type, config.variant, config.backbone) == (final, variant, backbone)
    other = "derf" if final != "derf" else "dyt"
    assert LNFreeConfig.from_dict({**config.to_dict(), "final_norm_type": other}).variant.endswith("@custom")


def test_defaults_of_sizes_are_derived_and_derived_anew(tmp_path):
    LNFreeConfig().save_pretrained(tmp_path)
    config = LNFreeConfig.from_pretrained(tmp_path, num_attention_heads=6)
    assert (config.head_dim, config.num_key_value_heads) == (128, 6)
    LNFreeConfig(head_dim=32, num_key_value_heads=4).save_pretrained(tmp_path)
    config = LNFreeConfig.from_pretrained(tmp_path, num_attention_heads=8)
    assert (config.head_dim, config.num_key_value_heads) == (32, 4)


def test_rotary_parameters_are_the_callers_own(tmp_path):
    given = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    kept = dict(given)
    config = LNFreeConfig.from_variant("SM+RMS+S", "llama", rope_parameters=given)
    assert given == kept and config.rope_theta == 5e5 and config.rope_type == "linear"
    config.save_pretrained(tmp_path)
    assert LNFreeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert LNFreeConfig.from_variant("SM+RMS+S", "llama").rope_parameters is None


def test_layers_may_differ(tmp_path):
    starred = LNFreeConfig.from_variant("SM+LN+G@HybridNorm-star")
    assert starred.variant == "SM+LN+G@HybridNorm-star" and starred.backbone == "gpt2"
    for layers in ({1: {"norm_position": "pre"}}, {0: {"norm_position": "peri"}}):
        other = LNFreeConfig.from_dict({**starred.to_dict(), "per_layer_config": layers})
        assert other.variant == "SM+LN+G@custom" and other.backbone == "gpt2"
    starred.save_pretrained(tmp_path)
    loaded = LNFreeConfig.from_pretrained(tmp_path)
    assert [loaded.per_layer_config[i].norm_position for i in range(3)] == ["pre", "hybrid", "hybrid"]


def test_slugs_and_order_of_variants():
    names = ["SM+R@OP", "SM+R", "SM+LN+G", "SM+RMS+S", "SM+LN+R"]
    assert sorted(names, key=variant_order) == ["SM+LN+G", "SM+LN+R", "SM+R", "SM+R@OP", "SM+RMS+S"]
    assert [variant_slug(name) for name in names[:2]] == ["sm-r-op", "sm-r"]
    other = as_variant(
        LNFreeConfig.from_variant("SM+R@SAS-P", "pythia", hidden_size=64, num_attention_heads=4), BASELINE
    )
    assert (other.variant, other.backbone, other.hidden_size) == (BASELINE, "pythia", 64)
    # what only a gated MLP has can have no bias in the baseline's
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    gated = LNFreeConfig(mlp_type="gated", biased_projections=[*attention, "gate_proj", "up_proj", "down_proj"])
    assert as_variant(gated, BASELINE).biased_projections == [*attention, "up_proj", "down_proj"]


def test_config_file_keeps_what_other_tools_added(caplog):
    config = LNFreeConfig()
    known = {**config.to_dict(), "transformers_version": "5.24.0"}
    assert LNFreeConfig.from_dict({**known, "zz_of_a_later_version": 1}).variant == "SM+R"
    # a warning and no error: a later version may name a field of its own like that, and the weights must still load
    assert LNFreeConfig.from_dict({**known, "norm_typ": "layernorm"}).variant == "SM+R"
    assert "did it mean 'norm_type'?" in caplog.text


# of 8 layers, 64 wide, with 4 heads and a feed-forward width of 100: values as the papers have them
SKIPLESS = {"residual_gains": [0.0, 1.0, 1.0, 0.15]}
QUERIES_AND_KEYS = {"normalized_projections": ["q_proj", "k_proj"]}
SAS = {"identity_projections": ["v_proj", "o_proj"], "zero_init_projections": ["q_proj"]}
SAS |= {"attention_gains": [1.0, 1.0, 1.0], **SKIPLESS}
SCALED = {"hidden_act": "linear", "residual_gains": [1.0, 1.0, 1.0, 1.0], "residual_gains_trainable": True}
HYBRID = {"norm_position": "hybrid", "normalized_projections": ["q_proj", "k_proj", "v_proj"]}
# a number is a layer that differs
VALUES: dict[str, dict] = {
    "QKNorm": QUERIES_AND_KEYS,
    "OP": {**QUERIES_AND_KEYS, "residual_gains": [1.0, 8**-0.5] * 2, "residual_gains_trainable": False},
    "Stable": {"residual_gains": [1.0, 0.25] * 2, "residual_gains_trainable": False},
    "SAS": {**SAS, "parallel_residual": False},
    "SAS-P": {**SAS, "parallel_residual": True},
    "V-SkipInit": {"attention_gains": [1.0, 0.0, 0.0], **SKIPLESS},
    "Shaped": {
        **{"attention_multiplier": 1 / 32, "attention_gains": [1.0, 1.0, 1.0], "residual_gains": [0.5**0.5] * 4},
        **{"residual_gains_trainable": False, "hidden_act": "leaky_relu", "negative_slope": 0.9},
    },
    "Gated": {"attention_gate_init": 0.25},
    "Clipped": {"softmax_clipping": 12.0},
    "SoftCap": {"attn_logit_softcapping": 30.0},
    "ScFFN": {**SCALED, "mlp_type": "two_layer"},
    "ScFuFFN": {**SCALED, "mlp_type": "fused"},
    "Pruned": {
        **SCALED,
        "mlp_type": "fused",
        **{i: {"mlp_type": "none", "residual_gains": [1.0, 1.0]} for i in (4, 5, 6, 7)},
    },
    "AERO": {**SCALED, "mlp_type": "fused", "softmax_temperature": 0.01},
    "PostLN": {"norm_position": "post"},
    "PeriLN": {"norm_position": "peri"},
    "HybridNorm": HYBRID,
    "HybridNorm-star": {**HYBRID, 0: {"norm_position": "pre"}},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_values_of_their_papers(name):
    act = {"Shaped": "LR", **dict.fromkeys(("ScFFN", "ScFuFFN", "Pruned", "AERO"), "Lin")}.get(name, "R")
    norm = "+LN" if name in ("PostLN", "PeriLN", "HybridNorm", "HybridNorm-star") else ""
    sizes = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 100}
    config = LNFreeConfig.from_variant(f"SM{norm}+{act}@{name}", **sizes)
    for index, layer in enumerate(config.per_layer_config):
        for field, value in (VALUES[name] | VALUES[name].get(index, {})).items():
            near = isinstance(value, float) or field == "residual_gains"
            assert isinstance(field, int) or getattr(layer, field) == (pytest.approx(value) if near else value), field
