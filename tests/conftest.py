"""Tiny models of every variant on both backbones."""

import pytest
import torch

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM


BACKBONES = {
    "gpt2": {},
    "pythia": {"position_embedding_type": "rotary", "parallel_residual": True, "tie_word_embeddings": False},
}
VARIANTS = (
    "SM+LN+G",
    "SM+LN+R",
    "SM+G",
    "SM+R",
    "SM+LR0.01",
    "SM+LR0.1",
    "SM+LR-layer",
    "SM+LR-global",
    "SM+R-noLNf",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_config(variant: str = "SM+R", backbone: str = "gpt2", **kwargs) -> LNFreeConfig:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    named = {**sizes, "max_position_embeddings": 64, "initializer_range": 0.2, **BACKBONES[backbone], **kwargs}
    return LNFreeConfig.from_variant(variant, **named)


def tiny_model(variant: str = "SM+R", backbone: str = "gpt2", **kwargs) -> LNFreeForCausalLM:
    """In evaluation mode, with weights that make every part matter: biases and norms are random too."""
    model = LNFreeForCausalLM(tiny_config(variant, backbone, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(*shape: int, vocab_size: int = 99) -> torch.Tensor:
    return torch.randint(2, vocab_size, shape)


every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
