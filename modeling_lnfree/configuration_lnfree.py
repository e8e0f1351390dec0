# Copyright 2026 The LNFree Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""LNFree configuration: decoder-only transformers with and without LayerNorm (arXiv 2410.09637)."""

import difflib
import math
import re
from dataclasses import field, fields
from typing import Literal

import transformers
from huggingface_hub.dataclasses import strict


if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18):
    raise ImportError(
        f"LNFree models need transformers 5.18 or newer, found {transformers.__version__}: pip install -U transformers"
    )

logger = transformers.utils.logging.get_logger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")

# Every save names all classes, not only the one that was saved: each Auto class loads what a fine-tuning wrote.
AUTO_MAP = {
    "AutoConfig": "configuration_lnfree.LNFreeConfig",
    "AutoModel": "modeling_lnfree.LNFreeModel",
    "AutoModelForCausalLM": "modeling_lnfree.LNFreeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_lnfree.LNFreeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_lnfree.LNFreeForTokenClassification",
}

# What transformers itself passes to a config, or writes in a config.json, without declaring a field for it.
_UNDECLARED_KEYS = {
    "attn_implementation",
    "auto_map",
    "base_model_tp_plan",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "task_specific_params",
    "tie_last_hidden_states",
    "torch_dtype",
}

# ---- The paper's notation, SM[+NORM]+ACT[-noLNf], as tables: what each word says of the fields. Names are read and
# written by them, and nothing else in the project takes a name apart.

# by position embedding: the GELU of the backbone, which G stands for
GELUS = {"learned": "gelu_pytorch_tanh", "rotary": "gelu"}
NORM_WORDS = {"": "none", "LN": "layernorm"}
# a number follows LR: the fixed slope
ACTIVATION_WORDS: dict[str, dict[str, tuple]] = {
    "G": {"hidden_act": tuple(GELUS.values())},
    "R": {"hidden_act": ("relu",)},
    "LR-layer": {"hidden_act": ("leaky_relu",), "slope_sharing": ("layer",)},
    "LR-global": {"hidden_act": ("leaky_relu",), "slope_sharing": ("global",)},
    "LR": {"hidden_act": ("leaky_relu",), "slope_sharing": (None,)},
}
FINAL_NORM_WORDS = {"": "layernorm", "-noLNf": "none"}
BACKBONES: dict[str, dict[str, str | bool]] = {
    "gpt2": {"position_embedding_type": "learned", "parallel_residual": False, "tie_word_embeddings": True},
    "pythia": {"position_embedding_type": "rotary", "parallel_residual": True, "tie_word_embeddings": False},
}

# The paper's four, in its order. Changes are against the first, and ReLU is compared with GELU without and with norms.
BASELINE = "SM+LN+G"
PAPER_ORDER = (BASELINE, "SM+LN+R", "SM+G", "SM+R")
RELU_AGAINST_GELU = (("SM+R", "SM+G"), ("SM+LN+R", "SM+LN+G"))
# what people read in place of a field's value
LABELS = {
    "layernorm": "LayerNorm",
    "gelu": "GELU",
    "gelu_pytorch_tanh": "GELU (tanh)",
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
}


def variant_order(variant: str) -> tuple[int, str]:
    """A sort key: the paper's variants in its order, then all others by name."""
    return (PAPER_ORDER.index(variant), "") if variant in PAPER_ORDER else (len(PAPER_ORDER), variant)


def variant_slug(variant: str) -> str:
    """The variant as folders and repositories write it: `sm-ln-g`."""
    return variant.lower().replace("+", "-")


def _alternatives(words) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_VARIANT = re.compile(
    rf"SM(\+(?P<norm>{_alternatives(filter(None, NORM_WORDS))}))?\+(?P<act>{_alternatives(ACTIVATION_WORDS)})"
    rf"(?P<slope>(?<=LR)-?\d+(\.\d+)?(e-?\d+)?)?(?P<final>{_alternatives(filter(None, FINAL_NORM_WORDS))})?"
)


@strict
class LNFreeConfig(transformers.PreTrainedConfig):  # trf-ignore: TRF057 (see modeling_lnfree.py)
    r"""
    Configuration of an LNFree model. The defaults are the paper's GPT-2 without LayerNorm and with ReLU (`SM+R`,
    arXiv 2410.09637), 124M parameters. The switches span the paper's two backbones: GPT-2 (learned positions,
    sequential residual, tied embeddings) and Pythia / GPT-NeoX (rotary positions, parallel residual, untied
    embeddings).

    Args:
        vocab_size (`int`): number of tokens.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; `4 * hidden_size` by default.
        num_hidden_layers (`int`): number of blocks.
        num_attention_heads (`int`): number of heads; has to divide `hidden_size`.
        max_position_embeddings (`int`): context length. With learned positions it is a hard limit.
        position_embedding_type (`str`): `"learned"` (GPT-2) or `"rotary"` (GPT-NeoX).
        partial_rotary_factor (`float`): with rotary positions, the fraction of the head dimension that is rotated; the
            rotated dimension `int(partial_rotary_factor * hidden_size / num_attention_heads)` has to be even.
        rope_theta (`float`): with rotary positions, the base of the wavelengths.
        parallel_residual (`bool`): `x + attn(norm(x)) + mlp(norm(x))` (GPT-NeoX), not one after the other (GPT-2).
        tie_word_embeddings (`bool`): whether the output projection is the token embedding (GPT-2).
        norm_type (`str`): the two norms of every block, `"none"` or `"layernorm"`.
        final_norm_type (`str`): the norm before the output projection, `"layernorm"` (kept in the paper's LN-free
            models too) or `"none"` (an identity under the same name).
        layer_norm_eps (`float`): epsilon of the norms that are there.
        hidden_act (`str`): `"gelu"` (erf, as in GPT-NeoX), `"gelu_pytorch_tanh"` (tanh, as in GPT-2), `"relu"` or
            `"leaky_relu"`.
        negative_slope (`float`, *optional*): slope of `"leaky_relu"` for negative inputs, 0.01 by default; where the
            slope is learned, its initial value.
        slope_sharing (`str`, *optional*): makes the slope of `"leaky_relu"` a parameter, one per `"layer"` or one
            `"global"` parameter that all layers share. `None` keeps it fixed.
        biased_projections (`list[str]`): which of q_proj, k_proj, v_proj, o_proj, up_proj and down_proj
            have a bias. The paper: query and key only; GPT-2 and GPT-NeoX themselves: all.
        embedding_dropout, attention_dropout, hidden_dropout (`float`): dropout probability of the embeddings, the
            attention weights, and the output of attention and feed-forward layer.
        initializer_range (`float`): standard deviation of the initial weights; no extra scaling with depth.
        classifier_dropout (`float`): dropout before the classification heads.

    Raises:
        ValueError: for a combination that makes no model (also as `huggingface_hub`'s `StrictDataclassError`), and for
            a field that does not exist.
    """

    model_type = "lnfree"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["learned", "rotary"] = "learned"
    partial_rotary_factor: float | int = 0.25
    rope_theta: float | int = 10000.0
    parallel_residual: bool = False
    tie_word_embeddings: bool = True
    norm_type: Literal["none", "layernorm"] = "none"
    final_norm_type: Literal["layernorm", "none"] = "layernorm"
    layer_norm_eps: float | int = 1e-5
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "relu", "leaky_relu"] = "relu"
    negative_slope: float | int | None = None
    slope_sharing: Literal["layer", "global"] | None = None
    biased_projections: list[str] = field(default_factory=lambda: ["q_proj", "k_proj"])
    embedding_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    classifier_dropout: float | int = 0.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self._refuse_unknown_fields(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.negative_slope is None and self.hidden_act == "leaky_relu":
            self.negative_slope = 0.01
        if self.slope_sharing is not None:
            # each rank's part of a feed-forward layer adds to the gradient of a learned slope
            plan = {**type(self).base_model_tp_plan, "learned_slope": "replicated_with_grad_allreduce"}
            self.base_model_tp_plan = plan
        super().__post_init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # what overrides a saved field is part of the construction, so that the validators see it
        overrides = {f.name: kwargs.pop(f.name) for f in fields(cls) if f.name in kwargs and f.name != "dtype"}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def _refuse_unknown_fields(self, kwargs):
        # PreTrainedConfig accepts any keyword in silence, so a misspelt field would leave its default in place.
        declared = [name for name in (f.name for f in fields(self)) if name != "transformers_version"]
        generation = transformers.GenerationConfig._get_default_generation_params()
        for key in kwargs:
            if key.startswith("_") or key in _UNDECLARED_KEYS or key in generation:
                continue
            nearest = difflib.get_close_matches(key, declared, n=1)
            # A config.json (it names its transformers version) may hold keys that later versions or other tools added.
            if self.transformers_version is not None:
                if nearest:
                    logger.warning(f"config.json has a key {key!r} that is not a field; did it mean {nearest[0]!r}?")
                continue
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; its fields are {', '.join(declared)}"
            raise ValueError(f"LNFreeConfig has no field {key!r} (got {key}={kwargs[key]!r}){hint}")

    def validate_sizes(self):
        """Sizes are positive, and the heads divide the width."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_attention_heads, got hidden_size={self.hidden_size} and "
                f"num_attention_heads={self.num_attention_heads}"
            )

    def validate_probabilities(self):
        """Dropout probabilities lie in [0, 1); the scale of the initial weights is not negative."""
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range must be finite and not negative, got {self.initializer_range}")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be finite and positive, got {self.layer_norm_eps}")

    def validate_positions(self):
        """The rotated part of a head is even and not empty."""
        if self.position_embedding_type != "rotary":
            return
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be finite and positive, got {self.rope_theta}")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor must be in (0, 1], got {self.partial_rotary_factor}")
        if self.rotary_dim == 0 or self.rotary_dim % 2:
            raise ValueError(
                f"the rotary dimension int(partial_rotary_factor * head dimension) must be even and at least 2, got "
                f"{self.rotary_dim} from partial_rotary_factor={self.partial_rotary_factor} and a head dimension of "
                f"{self.hidden_size // self.num_attention_heads}"
            )

    def validate_activation(self):
        """Options of the negative slope go with the leaky ReLU only."""
        if self.hidden_act == "leaky_relu":
            if self.negative_slope is None or not math.isfinite(self.negative_slope):
                raise ValueError(
                    f"hidden_act='leaky_relu' needs a finite negative_slope, got negative_slope={self.negative_slope}"
                )
            return
        for name in ("negative_slope", "slope_sharing"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is an option of hidden_act='leaky_relu'; hidden_act={self.hidden_act!r} has no negative "
                    f"slope, got {name}={getattr(self, name)!r}"
                )

    def validate_biases(self):
        """Biases are named by projection."""
        for name in self.biased_projections:
            if name not in PROJECTIONS:
                raise ValueError(f"biased_projections must be a list from {', '.join(PROJECTIONS)}; got {name!r}")

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.hidden_size // self.num_attention_heads * self.partial_rotary_factor)

    @property
    def variant(self) -> str:
        """
        The variant in the paper's notation: `SM+LN+G`, `SM+LN+R`, `SM+G`, `SM+R`, with `LR` for the leaky ReLU
        (`SM+LR0.01` fixed, `SM+LR-layer` and `SM+LR-global` learned), and `-noLNf` where the final norm is removed.
        """
        norm = next(word for word, norm_type in NORM_WORDS.items() if norm_type == self.norm_type)
        final = next(word for word, norm_type in FINAL_NORM_WORDS.items() if norm_type == self.final_norm_type)
        activation = next(
            word
            for word, values in ACTIVATION_WORDS.items()
            if all(getattr(self, name) in allowed for name, allowed in values.items())
        )
        slope = f"{self.negative_slope:g}" if activation == "LR" else ""
        return "+".join(["SM", *filter(None, [norm]), activation + slope + final])

    @property
    def backbone(self) -> str:
        """`"gpt2"`, `"pythia"`, or `"custom"` for a mixture of the two."""
        for name, values in BACKBONES.items():
            if all(getattr(self, key) == value for key, value in values.items()):
                return name
        return "custom"

    @classmethod
    def from_variant(cls, variant: str, backbone: str | None = None, **kwargs) -> "LNFreeConfig":
        """
        The configuration of a variant in the paper's notation (see `variant`); `kwargs` are further fields. `G` stands
        for the backbone's own GELU: tanh with learned positions (GPT-2), erf with rotary ones (GPT-NeoX). `backbone`
        names a row of `BACKBONES`, whose fields `kwargs` may change.

        Raises:
            ValueError: if `variant` is not in the paper's notation, `kwargs` contradict it, or there is no such
                backbone.
        """
        match = _VARIANT.fullmatch(variant)
        if match is None or (match["act"] == "LR") != (match["slope"] is not None):
            raise ValueError(
                "variant must be SM+[LN+]ACT[-noLNf] with ACT one of G, R, LR<slope>, LR-layer and LR-global, for "
                f"example SM+LN+G, SM+R or SM+LR0.01; got {variant!r}"
            )
        if backbone is not None:
            if backbone not in BACKBONES:
                raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
            kwargs = {**BACKBONES[backbone], **kwargs}
        named = {name: values[0] for name, values in ACTIVATION_WORDS[match["act"]].items()}
        if match["act"] == "G":
            named["hidden_act"] = GELUS.get(kwargs.get("position_embedding_type", ""), GELUS["learned"])
        if match["slope"]:
            named["negative_slope"] = float(match["slope"])
        named["norm_type"] = NORM_WORDS[match["norm"] or ""]
        named["final_norm_type"] = FINAL_NORM_WORDS[match["final"] or ""]
        config = cls(**{**named, **kwargs})
        # a slope is written as 0.1, and may be read as 0.10
        slope = match["slope"] or ""
        plain = variant.replace(f"LR{slope}", f"LR{float(slope):g}") if slope else variant
        if config.variant != plain:
            raise ValueError(f"these fields make {config.variant}, not variant={variant!r}: {kwargs}")
        return config

    def as_variant(self, variant: str) -> "LNFreeConfig":
        """The configuration of another variant of the same sizes and backbone."""
        named = {name for values in ACTIVATION_WORDS.values() for name in values}
        named |= {"norm_type", "final_norm_type", "negative_slope"}
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in named}
        return type(self).from_variant(variant, **same)


__all__ = ["LNFreeConfig"]
