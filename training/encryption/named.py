"""Models by name alone: the shapes that people run, as the stock class or as any variant of this family."""

import re
from typing import Any

import yaml
from transformers import PreTrainedConfig

from modeling_lnfree import LNFreeConfig
from modeling_lnfree.configuration_lnfree import ATTENTION_WORD, PROJECTIONS

from ..convert.architectures import stock_config
from ..errors import explained


def _gpt2(layers: int, width: int, heads: int) -> tuple[str, dict[str, Any]]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return "gpt2", {**sizes, "vocab_size": 50257, "max_position_embeddings": 1024}


def _pythia(layers: int, width: int, heads: int, vocabulary: int = 50304) -> tuple[str, dict[str, Any]]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    rotary = {"partial_rotary_factor": 0.25, "max_position_embeddings": 2048}
    return "pythia", {**sizes, **rotary, "vocab_size": vocabulary}


def _llama(
    layers: int, width: int, heads: int, key_value_heads: int, inner: int, vocabulary: int, positions: int, tied: bool
) -> tuple[str, dict[str, Any]]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    groups = {"num_key_value_heads": key_value_heads, "intermediate_size": inner, "vocab_size": vocabulary}
    return "llama", {**sizes, **groups, "max_position_embeddings": positions, "tie_word_embeddings": tied}


# backbone and sizes, as the configurations on the Hub have them
SHAPES = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432),
    "pythia-12b": _pythia(36, 5120, 40, 50688),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, 131072, tied=True),
    "llama-3.2-3b": _llama(28, 3072, 24, 8, 8192, 128256, 131072, tied=True),
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 131072, tied=False),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 4096, tied=False),
}
_STOCK = {"gpt2": "SM+LN+G", "pythia": "SM+LN+G", "llama": "SM+RMS+S"}


def find_named(name: str) -> PreTrainedConfig | None:
    """
    The configuration that a name stands for: `gpt2-xl` is the stock one, `gpt2-xl:SM+R` that of a variant with these
    sizes, `SM+R` that with GPT-2's; `gpt2:SM+R:num_hidden_layers=6,hidden_size=512` sets fields of `LNFreeConfig`.
    None for what is no such name.

    Raises:
        UserError: for a variant or field that there is not.
    """
    first, _, rest = name.partition(":")
    variant = None
    if first.startswith(f"{ATTENTION_WORD}+"):
        first, variant = "gpt2", first
    elif "=" not in rest.partition(":")[0]:
        variant, _, rest = rest.partition(":")
    if first not in SHAPES:
        return None
    backbone, sizes = SHAPES[first]
    with explained(f"model {name!r}"):
        fields = _read_fields(rest)
        if variant:
            return LNFreeConfig.from_variant(variant, backbone, **{**sizes, **fields})
        # a stock model has them all
        biased = [] if backbone == "llama" else list(PROJECTIONS)
        fields = {**sizes, "biased_projections": biased, **fields}
        return stock_config(LNFreeConfig.from_variant(_STOCK[backbone], backbone, **fields))


def _read_fields(given: str) -> dict[str, Any]:
    """`FIELD=VALUE,...`, values as YAML has them within braces."""
    if given and "=" not in given:
        raise ValueError(f"behind a ':' stand a variant and then FIELD=VALUE,...; got {given!r}")
    return yaml.safe_load("{" + re.sub(r"(?:^|(?<=,))(\w+)=", r"\1: ", given) + "}")
