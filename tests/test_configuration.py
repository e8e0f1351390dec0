"""The configuration: every variant has a name, and what makes no model is an error that says so."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM

from .conftest import BACKBONES, VARIANTS, every_backbone, every_variant, tiny_config


@every_variant
@every_backbone
def test_variant_and_backbone_follow_from_the_fields(variant, backbone):
    config = tiny_config(variant, backbone)
    assert config.variant == variant
    assert config.backbone == backbone


@given(
    norm=st.sampled_from(["", "+LN"]),
    # a subnormal slope does not have three digits
    activation=st.sampled_from(["G", "R", "LR-layer", "LR-global"])
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
    ({"hidden_act": "leaky_relu", "negative_slope": float("nan")}, "needs a finite negative_slope, got .*nan"),
    ({"hidden_act": "silu"}, "hidden_act.*gelu_pytorch_tanh.*silu"),
    ({"norm_type": "rmsnorm"}, "norm_type.*layernorm.*rmsnorm"),
    ({"final_norm_type": "rmsnorm"}, "final_norm_type.*rmsnorm"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type.*rotary.*alibi"),
    ({"hidden_size": 100}, "hidden_size.*divisible.*num_attention_heads=12"),
    ({"hidden_size": "768"}, "hidden_size.*int"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"position_embedding_type": "rotary", "partial_rotary_factor": 0.05}, "even.*got 3"),
    ({"position_embedding_type": "rotary", "partial_rotary_factor": 0.0}, "partial_rotary_factor.*got 0"),
    ({"negative_slope": 0.1}, "negative_slope.*leaky_relu.*'relu'.*0.1"),
    ({"hidden_act": "gelu", "slope_sharing": "layer"}, "slope_sharing.*leaky_relu.*'gelu'"),
    ({"hidden_act": "leaky_relu", "slope_sharing": "head"}, "slope_sharing.*layer.*global.*head"),
    ({"biased_projections": ["query"]}, "biased_projections.*q_proj.*'query'"),
    ({"embedding_dropout": 1.5}, r"embedding_dropout must be in \[0, 1\), got 1.5"),
    ({"initializer_range": -0.1}, "initializer_range.*got -0.1"),
    ({"hiden_size": 64}, "hiden_size.*did you mean 'hidden_size'"),
    ({"n_embd": 64}, "n_embd.*its fields are.*hidden_size"),
]


@pytest.mark.parametrize(
    ("kwargs", "message"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_wrong_field_is_named_with_what_is_allowed(kwargs, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        LNFreeConfig(**kwargs)


@pytest.mark.parametrize("variant", ["LN+G", "SM+X", "SM+LR", "SM+R+LN", "sm+r", ""])
def test_name_outside_the_notation_is_refused(variant):
    with pytest.raises(ValueError, match="variant must be"):
        LNFreeConfig.from_variant(variant)


def test_fields_that_contradict_the_variant_are_refused():
    with pytest.raises(ValueError, match="make SM\\+LN\\+R, not variant='SM\\+R'"):
        LNFreeConfig.from_variant("SM+R", norm_type="layernorm")


def test_config_file_keeps_what_other_tools_added(caplog):
    config = LNFreeConfig()
    known = {**config.to_dict(), "transformers_version": "5.24.0"}
    assert LNFreeConfig.from_dict({**known, "zz_of_a_later_version": 1}).variant == "SM+R"
    # a warning and no error: a later version may name a field of its own like that, and the weights must still load
    assert LNFreeConfig.from_dict({**known, "norm_typ": "layernorm"}).variant == "SM+R"
    assert "did it mean 'norm_type'?" in caplog.text


def test_the_tables_of_the_tests_cover_both_backbones():
    assert set(BACKBONES) == {tiny_config(backbone=name).backbone for name in BACKBONES}
    assert {LNFreeConfig.from_variant(variant).variant for variant in VARIANTS} == set(VARIANTS)
