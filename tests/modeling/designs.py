"""The designs that the tests go over: every field once, on the backbones that can have it, and every preset."""

import pytest
import torch

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import PRESETS


SIZES = {
    **{"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
    **{"max_position_embeddings": 32, "initializer_range": 0.4, "embedding_dropout": 0.0},
}
# a variant, and the fields that it is tried with
FIELDS = {
    "rmsnorm": ("SM+RMS+R", {}),
    "layer_norm_eps": ("SM+LN+R", {"layer_norm_eps": 0.3, "normalized_projections": ["q_proj"]}),
    "dyt": ("SM+DyT+G", {"norm_alpha_init": [0.8, 0.2]}),
    "derf": ("SM+Derf+R", {"norm_alpha_init": 0.7}),
    "final_norm_type": ("SM+R", {"final_norm_type": "derf"}),
    "post": ("SM+LN+R", {"norm_position": "post"}),
    "peri": ("SM+RMS+G", {"norm_position": "peri"}),
    "hybrid": ("SM+LN+R", {"norm_position": "hybrid"}),
    "normalized_projections": ("SM+R", {"normalized_projections": ["v_proj", "q_proj", "k_proj"]}),
    "identity_projections": ("SM+R", {"identity_projections": ["v_proj", "o_proj"]}),
    "identity, normalized": ("SM+R", {"identity_projections": ["v_proj"], "normalized_projections": ["v_proj"]}),
    "zero_init_projections": ("SM+R", {"zero_init_projections": ["down_proj"], "biased_projections": ["down_proj"]}),
    "attention_gains": ("SM+R", {"attention_gains": [0.7, 0.9, 0.4]}),
    "attention_gate_init": ("SM+R", {"attention_gate_init": 0.3}),
    "softmax_temperature": ("SM+R", {"softmax_temperature": 0.5}),
    "attn_logit_softcapping": ("SM+R", {"attn_logit_softcapping": 1.5}),
    "softmax_clipping": ("SM+R", {"softmax_clipping": 0.3}),
    "residual_gains": ("SM+R", {"residual_gains": [0.9, 0.5, 1.1, 0.3]}),
    "residual_gains, fixed": ("SM+LN+R", {"residual_gains": [0.9, 0.5, 1.1, 0.3], "residual_gains_trainable": False}),
    "residual_gains, post": ("SM+LN+R", {"residual_gains": [0.9, 0.5, 1.1, 0.3], "norm_position": "post"}),
    "residual_gains, peri": ("SM+LN+R", {"residual_gains": [0.9, 0.5, 1.1, 0.3], "norm_position": "peri"}),
    "residual_gains, hybrid": ("SM+LN+R", {"residual_gains": [0.9, 0.5, 1.1, 0.3], "norm_position": "hybrid"}),
    "embedding_multiplier": ("SM+R", {"embedding_multiplier": 2.5}),
    "logits_multiplier": ("SM+R", {"logits_multiplier": 0.25}),
    "attention_multiplier": ("SM+R", {"attention_multiplier": 0.9}),
    "gated": ("SM+S", {"mlp_type": "gated", "biased_projections": ["gate_proj", "up_proj"]}),
    "gated, leaky": ("SM+LR-layer", {"mlp_type": "gated", "negative_slope": 0.3}),
    "fused": ("SM+R", {"mlp_type": "fused", "biased_projections": ["fused_proj"]}),
    "no MLP": ("SM+LN+R", {"mlp_type": "none", "residual_gains": [0.9, 0.5]}),
    "no MLP, peri": ("SM+LN+R", {"mlp_type": "none", "norm_position": "peri"}),
    "no MLP, post": ("SM+LN+R", {"mlp_type": "none", "norm_position": "post"}),
    "no MLP, hybrid": ("SM+LN+R", {"mlp_type": "none", "norm_position": "hybrid"}),
    "linear": ("SM+Lin", {}),
    "silu": ("SM+S", {}),
    "head_dim": ("SM+R", {"head_dim": 8, "biased_projections": ["v_proj", "o_proj"]}),
    "num_key_value_heads": ("SM+R", {"num_key_value_heads": 2, "attention_gains": [0.7, 0.9, 0.4]}),
    "per layer": ("SM+LN+R", {"per_layer_config": {0: {"norm_position": "peri", "identity_projections": ["v_proj"]}}}),
    "per layer, MLP": ("SM+R", {"per_layer_config": {1: {"mlp_type": "none"}}}),
    "all at once": (
        "SM+RMS+S",
        {
            **{
                "norm_position": "peri",
                "normalized_projections": ["q_proj", "k_proj"],
                "attention_gains": [0.7, 0.9, 0.4],
            },
            **{
                "attention_gate_init": 0.3,
                "softmax_temperature": 0.5,
                "attn_logit_softcapping": 1.5,
                "mlp_type": "gated",
            },
            **{"softmax_clipping": 0.3, "residual_gains": [0.9, 0.5, 1.1, 0.3], "embedding_multiplier": 2.5},
        },
    ),
}
NOT_PARALLEL = ("post", "hybrid")


def preset_name(preset: str) -> str:
    """A variant with it: without a norm and with ReLU where it says nothing else."""
    norm = "+LN" if "norm_position" in PRESETS[preset] else ""
    return f"SM{norm}+{ {'linear': 'Lin', 'leaky_relu': 'LR'}.get(PRESETS[preset].get('hidden_act'), 'R') }@{preset}"


def design(name: str, backbone: str = "gpt2", **kwargs) -> LNFreeConfig:
    variant, fields = FIELDS[name] if name in FIELDS else (preset_name(name), {})
    kwargs |= {"partial_rotary_factor": 0.5} if backbone == "pythia" else {}
    return LNFreeConfig.from_variant(variant, backbone, **{**SIZES, **fields, **kwargs})


def design_model(name: str, backbone: str = "gpt2", **kwargs) -> LNFreeForCausalLM:
    """In evaluation mode and float64, with parameters that all matter: none at its start, if that is 0 or 1."""
    model = LNFreeForCausalLM(design(name, backbone, **kwargs)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def possible(name: str, backbone: str) -> bool:
    return not (backbone == "pythia" and any(word in name for word in (*NOT_PARALLEL, "PostLN", "HybridNorm")))


every_preset = pytest.mark.parametrize("name", PRESETS)
PRESETS_AND_BACKBONES = [(name, b) for name in PRESETS for b in ("gpt2", "pythia", "llama") if possible(name, b)]
every_preset_and_backbone = pytest.mark.parametrize(("name", "backbone"), PRESETS_AND_BACKBONES)
# every field on one backbone, every preset on all
every_path = pytest.mark.parametrize(
    ("name", "backbone"), [*((name, "gpt2") for name in FIELDS), *PRESETS_AND_BACKBONES]
)
every_design = pytest.mark.parametrize("name", [*FIELDS, *PRESETS])
every_design_and_backbone = pytest.mark.parametrize(
    ("name", "backbone"),
    [(name, b) for name in (*FIELDS, *PRESETS) for b in ("gpt2", "pythia", "llama") if possible(name, b)],
)
