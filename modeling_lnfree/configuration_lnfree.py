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

import copy
import difflib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, Literal

import transformers
from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18):
    raise ImportError(
        f"LNFree models need transformers 5.18 or newer, found {transformers.__version__}: pip install -U transformers"
    )

logger = transformers.utils.logging.get_logger(__name__)

# The projections of attention, and of an MLP by its type; PROJECTIONS are those of GPT-2, GPT-NeoX and the paper.
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_UP_DOWN = ("up_proj", "down_proj")
MLP_PROJECTIONS = {"two_layer": _UP_DOWN, "gated": (*_UP_DOWN, "gate_proj"), "fused": ("fused_proj",), "none": ()}
PROJECTIONS = ATTENTION_PROJECTIONS + _UP_DOWN
_ATTENTION_PLAN = {f"layers.*.self_attn.{name}": "colwise" for name in ATTENTION_PROJECTIONS[:3]}
_ATTENTION_PLAN["layers.*.self_attn.o_proj"] = "rowwise"

# What changes scores or weights between the products is the attention implementation's to do. These do it ("flash" is
# all of that kind, which say themselves which version cannot); others drop it in silence.
EXACT_ATTENTION = {"attn_logit_softcapping": ("eager", "flex_attention", "flash"), "softmax_clipping": ("eager",)}

# Every save names all classes, not only the one that was saved: each Auto class loads what a fine-tuning wrote.
AUTO_MAP = {"AutoConfig": "configuration_lnfree.LNFreeConfig", "AutoModel": "modeling_lnfree.LNFreeModel"} | {
    f"AutoModel{head}": f"modeling_lnfree.LNFree{head}"
    for head in ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
}

# What transformers itself passes to a config, or writes in a config.json, without declaring a field for it.
_UNDECLARED_KEYS = {
    *("attn_implementation", "auto_map", "base_model_tp_plan", "custom_pipelines", "experts_implementation"),
    *("model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config", "quantization_config"),
    *("task_specific_params", "tie_last_hidden_states", "torch_dtype"),
}

# ---- The notation, SM[+NORM]+ACT[-noLNf][@PRESET], as tables: what each word says of the fields. Names are read and
# written by them, and nothing else in the project takes a name apart.

ATTENTION_WORD = "SM"
NORM_WORDS = {"": "none", "LN": "layernorm", "RMS": "rmsnorm", "DyT": "dyt", "Derf": "derf"}
# by position embedding: the GELU of the backbone, which G stands for
GELUS = {"learned": "gelu_pytorch_tanh", "rotary": "gelu"}
# a number follows LR, the fixed slope, unless a preset says it
ACTIVATION_WORDS: dict[str, dict[str, tuple]] = {
    "G": {"hidden_act": tuple(GELUS.values())},
    "R": {"hidden_act": ("relu",)},
    "S": {"hidden_act": ("silu",)},
    "Lin": {"hidden_act": ("linear",)},
    "LR-layer": {"hidden_act": ("leaky_relu",), "slope_sharing": ("layer",)},
    "LR-global": {"hidden_act": ("leaky_relu",), "slope_sharing": ("global",)},
    "LR": {"hidden_act": ("leaky_relu",), "slope_sharing": (None,)},
}
NO_FINAL_NORM = "-noLNf"

# What makes a backbone; what else its models have; and the final norm where the blocks have none.
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt2": {"position_embedding_type": "learned", "parallel_residual": False, "tie_word_embeddings": True},
    "llama": {
        **{"position_embedding_type": "rotary", "partial_rotary_factor": 1.0},
        **{"parallel_residual": False, "mlp_type": "gated"},
    },
    "pythia": {"position_embedding_type": "rotary", "parallel_residual": True, "tie_word_embeddings": False},
}
_USUAL = {"llama": {"tie_word_embeddings": False, "biased_projections": [], "embedding_dropout": 0.0}}
_FINAL_NORMS = {"llama": "rmsnorm"}

# The designs of the field: what each sets, values at the start as in its paper, or a function of the configuration.
# Those above PostLN are without a norm and with ReLU there where they set nothing else.
_QK_NORM = {"normalized_projections": ["q_proj", "k_proj"]}
_SKIPLESS = {"residual_gains": lambda c: [0.0, 1.0, 1.0, 0.1 * (18 / c.num_hidden_layers) ** 0.5]}
_SHAPED = {"attention_gains": [1.0, 1.0, 1.0]}
_SAS = {"identity_projections": ["v_proj", "o_proj"], "zero_init_projections": ["q_proj"], **_SHAPED, **_SKIPLESS}
_FIXED = {"residual_gains_trainable": False}
_SCALED = {"hidden_act": "linear", "residual_gains": [1.0, 1.0, 1.0, 1.0]}
_FUSED = {**_SCALED, "mlp_type": "fused"}
_NO_MLP = {"mlp_type": "none", "residual_gains": [1.0, 1.0]}
_PRUNED = {"per_layer_config": lambda c: dict.fromkeys(range(c.num_hidden_layers // 2, c.num_hidden_layers), _NO_MLP)}
_HYBRID = {"norm_position": "hybrid", "normalized_projections": ["q_proj", "k_proj", "v_proj"]}
PRESETS: dict[str, dict[str, Any]] = {
    # He et al. 2024 (arXiv 2405.19279): the outlier-protected block, and its normalized queries and keys alone
    "QKNorm": _QK_NORM,
    "OP": {**_QK_NORM, "residual_gains": lambda c: [1.0, c.num_hidden_layers**-0.5] * 2, **_FIXED},
    "Stable": {"residual_gains": lambda c: [1.0, (2 * c.num_hidden_layers) ** -0.5] * 2, **_FIXED},
    # He & Hofmann 2023 (2311.01906); theirs trains the values of the first block
    "SAS": {**_SAS, "parallel_residual": False},
    "SAS-P": {**_SAS, "parallel_residual": True},
    # He et al. 2023 (2302.10322), without the orthogonal starts of values and output
    "V-SkipInit": {"attention_gains": [1.0, 0.0, 0.0], **_SKIPLESS},
    # Noci et al. 2023 (2306.17759)
    "Shaped": {
        **{"attention_multiplier": lambda c: (c.hidden_size * c.head_dim) ** -0.5, **_SHAPED},
        **{"residual_gains": [0.5**0.5] * 4, **_FIXED},
        **{"hidden_act": "leaky_relu", "negative_slope": lambda c: 1 - c.intermediate_size**-0.5},
    },
    # Bondarenko et al. 2023 (2306.12929), values of OPT; clipping leaves nothing of a row near the uniform one
    "Gated": {"attention_gate_init": 0.25},
    "Clipped": {"softmax_clipping": 12.0},
    "SoftCap": {"attn_logit_softcapping": 30.0},
    # AERO (2410.13060): linear feed-forward layers, scaled; fused; without the deeper half's; with its temperature
    "ScFFN": _SCALED,
    "ScFuFFN": _FUSED,
    "Pruned": {**_FUSED, **_PRUNED},
    "AERO": {**_FUSED, "softmax_temperature": 0.01},
    # 2002.04745 (its own has no final norm: -noLNf), 2502.02732, 2503.04598
    "PostLN": {"norm_position": "post"},
    "PeriLN": {"norm_position": "peri"},
    "HybridNorm": _HYBRID,
    "HybridNorm-star": {**_HYBRID, "per_layer_config": {0: {"norm_position": "pre"}}},
}
CUSTOM = "custom"
# what a preset may set beside norm and activation; at its neutral value in every model without one
DESIGN_FIELDS = {
    *("norm_position", "normalized_projections", "identity_projections", "zero_init_projections", "attention_gains"),
    *("attention_gate_init", "softmax_temperature", "attn_logit_softcapping", "softmax_clipping", "residual_gains"),
    *("residual_gains_trainable", "embedding_multiplier", "attention_multiplier", "logits_multiplier", "mlp_type"),
}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "intermediate_size")
# what layers may differ in, by `per_layer_config`
_PER_LAYER = {"norm_position", "identity_projections", "zero_init_projections", "mlp_type", "residual_gains"}

_DROPOUTS = ("embedding_dropout", "attention_dropout", "hidden_dropout", "classifier_dropout")
_POSITIVE = ("layer_norm_eps", "softmax_temperature", "attn_logit_softcapping", "attention_multiplier", "rope_theta")
_RANGES = (
    (_DROPOUTS, lambda value: 0 <= value < 1, "in [0, 1)"),
    (_POSITIVE, lambda value: 0 < value < math.inf, "finite and positive"),
    (("initializer_range", "softmax_clipping"), lambda value: 0 <= value < math.inf, "finite and not negative"),
    (("embedding_multiplier", "logits_multiplier"), math.isfinite, "finite"),
    (("attention_gate_init",), lambda value: 0 < value < 1, "in (0, 1)"),
    (("partial_rotary_factor",), lambda value: 0 < value <= 1, "in (0, 1]"),
)


def _alternatives(words) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_VARIANT = re.compile(
    rf"{ATTENTION_WORD}(\+(?P<norm>{_alternatives(filter(None, NORM_WORDS))}))?"
    rf"\+(?P<act>{_alternatives(ACTIVATION_WORDS)})"
    rf"(?P<slope>(?<=LR)-?\d+(\.\d+)?(e[+-]?\d+)?)?(?P<final>{NO_FINAL_NORM})?"
    rf"(@(?P<preset>{_alternatives((*PRESETS, CUSTOM))}))?"
)
_FORM = (
    f"SM[+NORM]+ACT[{NO_FINAL_NORM}][@PRESET] with NORM one of {', '.join(filter(None, NORM_WORDS))}, ACT one of "
    f"{re.sub('LR(?=,|$)', 'LR<slope>', ', '.join(ACTIVATION_WORDS))}, and PRESET one of {', '.join(PRESETS)}"
)


def read_variant(variant: str) -> dict[str, str]:
    """Words of a name, `norm`, `act`, `slope`, `final` and `preset`, empty if absent. ValueError for other names."""
    match = _VARIANT.fullmatch(variant)
    preset = PRESETS.get(match["preset"], {}) if match else {}
    if match is None or (match["act"] == "LR") != (match["slope"] is not None or "negative_slope" in preset):
        raise ValueError(f"variant must be {_FORM}, for example SM+LN+G, SM+R or SM+LR0.01; got {variant!r}")
    return match.groupdict("")


def write_variant(norm: str, act: str, slope: str, final: str, preset: str) -> str:
    """The name that these words make."""
    return "+".join(filter(None, [ATTENTION_WORD, norm, act + slope + final])) + (preset and f"@{preset}")


def _require(holds: bool, message: str):
    if not holds:
        raise ValueError(message)


def _value_at(sizes: Any, value: Any) -> Any:
    """A preset's value: of one that depends on the sizes, what it is at these."""
    return value(sizes) if callable(value) else value


def _same(ours: Any, theirs: Any) -> bool:
    # the order of names says nothing, that of numbers all
    names = isinstance(ours, list) and all(isinstance(name, str) for name in ours)
    return sorted(ours) == sorted(theirs) if names and isinstance(theirs, list) else ours == theirs


@strict
class LNFreeConfig(transformers.PreTrainedConfig):  # trf-ignore: TRF057 (see modeling_lnfree.py)
    r"""
    Configuration of an LNFree model. The defaults are the paper's GPT-2 without LayerNorm and with ReLU (`SM+R`,
    arXiv 2410.09637), 124M parameters. The switches span three backbones, GPT-2, Pythia (GPT-NeoX) and Llama
    (`BACKBONES`), and the norm-free and norm-changing blocks of the field (`PRESETS`).

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads (`int`): tokens, width, blocks, heads.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; `4 * hidden_size` by default.
        num_key_value_heads, head_dim (`int`, *optional*): heads of keys and values (grouped queries), all by default;
            the width of a head, `hidden_size / num_attention_heads` by default.
        max_position_embeddings (`int`): context length. With learned positions it is a hard limit.
        position_embedding_type (`str`): `"learned"` (GPT-2) or `"rotary"` (GPT-NeoX, Llama).
        partial_rotary_factor, rope_theta (`float`): the fraction of a head that is rotated; the base of wavelengths.
        rope_parameters (`dict`, *optional*): transformers' own for scaled rotary positions (`rope_type` `"linear"`,
            `"llama3"`, `"yarn"`, ...); its `rope_theta` and `partial_rotary_factor` go before the fields.
        parallel_residual (`bool`): `x + attn(norm(x)) + mlp(norm(x))` (GPT-NeoX), not one after the other (GPT-2).
        tie_word_embeddings (`bool`): whether the output projection is the token embedding (GPT-2).
        norm_type, final_norm_type (`str`): the norms of the blocks, and the one before the output projection (which
            the paper's LN-free models keep): `"none"`, `"layernorm"`, or a row of `NORMS` in parts_lnfree.py.
        norm_alpha_init (`float` or `list`): start of alpha, or of [those around attention, all others].
        norm_position (`str`): `"pre"` x + f(N(x)), `"post"` N(x + f(x)), `"peri"` x + N(f(N(x))), or `"hybrid"`
            H = N(x + attn(x)), H + mlp(H).
        layer_norm_eps (`float`): epsilon of the norms that are there.
        mlp_type (`str`): `"two_layer"`, `"gated"`, `"fused"` (one matrix, no activation), or `"none"`.
        hidden_act (`str`): `"gelu"` is by erf (GPT-NeoX), `"gelu_pytorch_tanh"` by tanh (GPT-2), `"linear"` none.
        negative_slope (`float`, *optional*): of `"leaky_relu"`, 0.01 by default; of a learned slope, the start.
        slope_sharing (`str`, *optional*): makes that slope a parameter, one per `"layer"` or one `"global"` one.
        biased_projections (`list[str]`): which have a bias. The paper: query and key; GPT-2 and GPT-NeoX: all.
        normalized_projections (`list[str]`): which of q_proj, k_proj and v_proj have an RMSNorm over each head.
        identity_projections, zero_init_projections (`list[str]`): the identity (of v_proj, o_proj); what starts at 0.
        attention_gains (`list[float]`, *optional*): starts of a, b, c, learned by head, of the weights a I + b A - c C
            with C uniform over what the query sees (arXiv 2311.01906, 2306.17759).
        attention_gate_init (`float`, *optional*): start of a learned gate on a head's output (arXiv 2306.12929).
        softmax_temperature (`float`, *optional*): start of a divisor of the scores, by head (arXiv 2410.13060).
        attn_logit_softcapping (`float`, *optional*): cap; scores become cap * tanh(scores / cap).
        softmax_clipping (`float`, *optional*): alpha; of n seen keys, clip((1 + alpha / n) p - alpha / n, 0, 1).
        attention_multiplier (`float`, *optional*): of the dot products, in place of `head_dim ** -0.5`.
        residual_gains, residual_gains_trainable (`list[float]`, *optional*, and `bool`): starts of [skip, attention,
            skip, MLP], two without an MLP; and whether they are trained. They are saved in any case.
        embedding_multiplier, logits_multiplier (`float`): times the embeddings, and times the logits.
        embedding_dropout, attention_dropout, hidden_dropout, classifier_dropout (`float`): of embeddings, attention
            weights, outputs of attention and feed-forward layer, and before classification heads.
        initializer_range (`float`): standard deviation of the initial weights; no extra scaling with depth.
        per_layer_config (`dict`, *optional*): transformers' own, for the fields in `_PER_LAYER`.

    Raises:
        ValueError: for a combination that makes no model (`StrictDataclassError`), and a field that does not exist.
    """

    model_type = "lnfree"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {**_ATTENTION_PLAN, "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
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
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["learned", "rotary"] = "learned"
    partial_rotary_factor: float | int = 0.25
    rope_theta: float | int = 10000.0
    rope_parameters: dict | None = None
    parallel_residual: bool = False
    tie_word_embeddings: bool = True
    norm_type: Literal["none", "layernorm", "rmsnorm", "dyt", "derf"] = "none"
    final_norm_type: Literal["layernorm", "none", "rmsnorm", "dyt", "derf"] = "layernorm"
    norm_alpha_init: float | int | list[float | int] = 0.5
    norm_position: Literal["pre", "post", "peri", "hybrid"] = "pre"
    layer_norm_eps: float | int = 1e-5
    mlp_type: Literal["two_layer", "gated", "fused", "none"] = "two_layer"
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "relu", "leaky_relu", "silu", "linear"] = "relu"
    negative_slope: float | int | None = None
    slope_sharing: Literal["layer", "global"] | None = None
    biased_projections: list[str] = field(default_factory=lambda: ["q_proj", "k_proj"])
    normalized_projections: list[str] = field(default_factory=list)
    identity_projections: list[str] = field(default_factory=list)
    zero_init_projections: list[str] = field(default_factory=list)
    attention_gains: list[float | int] | None = None
    attention_gate_init: float | None = None
    softmax_temperature: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    softmax_clipping: float | int | None = None
    attention_multiplier: float | int | None = None
    residual_gains: list[float | int] | None = None
    residual_gains_trainable: bool = True
    embedding_multiplier: float | int = 1.0
    logits_multiplier: float | int = 1.0
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
        self.rope_parameters = copy.deepcopy(self.rope_parameters)  # the caller's
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.negative_slope is None and self.hidden_act == "leaky_relu":
            self.negative_slope = 0.01
        scaled = self.rope_parameters is not None
        super().__post_init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})
        self.rope_parameters = self.rope_parameters if scaled else None  # transformers makes one in any case
        if scaled:
            self._take_from_rope_parameters()
        self.base_model_tp_plan = self._tensor_parallel_plan()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # what overrides a saved field is part of the construction, so that the validators see it
        overrides = {f.name: kwargs.pop(f.name) for f in fields(cls) if f.name in kwargs and f.name != "dtype"}
        # and what was derived from it is derived anew
        width, heads = config_dict.get("hidden_size"), config_dict.get("num_attention_heads")
        if width and heads and overrides.keys() & {"hidden_size", "num_attention_heads"}:
            derived = {"head_dim": width // heads, "num_key_value_heads": heads}
            config_dict = {key: value for key, value in config_dict.items() if (key, value) not in derived.items()}
        # where models are loaded, a variant is a suffix of the names of their weights
        unused = {"variant": kwargs.pop("variant")} if "variant" in kwargs else {}
        loaded = super().from_dict({**config_dict, **overrides}, **kwargs)
        return (loaded[0], {**loaded[1], **unused}) if isinstance(loaded, tuple) else loaded

    def _take_from_rope_parameters(self):
        for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.25)):
            ours, theirs = getattr(self, name), self.rope_parameters.setdefault(name, getattr(self, name))
            _require(ours in (default, theirs), f"{name}={ours} contradicts rope_parameters, where it is {theirs}")
            setattr(self, name, theirs)

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Which matrices are shared out over the heads or the feed-forward width, and what goes with them."""
        plan: dict[str, str] = {}
        # an identity has no part of the heads, and a gate reads all of the input
        if not any(layer.identity_projections for layer in self._layers) and self.attention_gate_init is None:
            plan |= _ATTENTION_PLAN
            # each rank's heads add to the gradient of what all heads share
            for name in self.normalized_projections:
                plan[f"layers.*.self_attn.{name[0]}_norm"] = "replicated_with_grad_allreduce"
            for name, start in (("attention_gains", self.attention_gains), ("temperature", self.softmax_temperature)):
                if start is not None:
                    plan |= {f"layers.*.self_attn.{name}": "rowwise", "layers.*.self_attn": "local_params"}
        matrices = {name for layer in self._layers for name in MLP_PROJECTIONS[layer.mlp_type]} - {"fused_proj"}
        plan |= {f"layers.*.mlp.{name}": "rowwise" if name == "down_proj" else "colwise" for name in matrices}
        if self.slope_sharing is not None:
            # and each rank's part of a feed-forward layer to that of a learned slope
            plan["learned_slope"] = "replicated_with_grad_allreduce"
        return plan

    @property
    def _layers(self) -> Sequence["LNFreeConfig"]:
        """The configurations of the layers that differ, or this one."""
        return self.per_layer_config if self.is_heterogeneous else [self]

    def _refuse_unknown_fields(self, kwargs):
        # PreTrainedConfig accepts any keyword in silence, so a misspelled field would leave its default in place.
        declared = [f.name for f in fields(self) if f.name != "transformers_version"]
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
        """Sizes are positive; the heads divide the width, and those of keys and values the heads."""
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        for name in (*_SIZES, "vocab_size", "max_position_embeddings", "num_key_value_heads"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        fits = width % heads == 0 or self.head_dim != width // heads
        _require(fits, f"num_attention_heads must divide hidden_size={width}, got {heads}")
        _require(heads % kv_heads == 0, f"num_key_value_heads must divide num_attention_heads={heads}, got {kv_heads}")

    def validate_numbers(self):
        """Probabilities, factors, and the starts of what is learned lie where they make sense."""
        for names, holds, where in _RANGES:
            for name in names:
                value = getattr(self, name)
                _require(value is None or holds(value), f"{name} must be {where}, got {value}")
        finite = len(self.norm_alphas) == 2 and all(map(math.isfinite, self.norm_alphas))
        _require(finite, f"norm_alpha_init must be one or two finite numbers, got {self.norm_alpha_init}")

    def validate_positions(self):
        """The rotated part of a head is even and not empty, and transformers knows the scaling."""
        if self.position_embedding_type != "rotary":
            _require(self.rope_parameters is None, "rope_parameters is an option of position_embedding_type='rotary'")
            return
        _require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"the rotary dimension int(partial_rotary_factor * head_dim) must be even and at least 2, got "
            f"{self.rotary_dim} from partial_rotary_factor={self.partial_rotary_factor} and head_dim={self.head_dim}",
        )
        known = ["default", *ROPE_INIT_FUNCTIONS]
        _require(self.rope_type in known, f"rope_type must be one of {', '.join(known)}; got {self.rope_type!r}")

    def validate_activation(self):
        """Options of the negative slope go with the leaky ReLU only, and a learned one with an MLP that has it."""
        leaky = self.hidden_act == "leaky_relu"
        sloped = self.negative_slope is not None and math.isfinite(self.negative_slope)
        _require(not leaky or sloped, f"negative_slope of a leaky ReLU must be finite, got {self.negative_slope}")
        for name in ("negative_slope", "slope_sharing"):
            given = f"hidden_act={self.hidden_act!r} and {name}={getattr(self, name)!r}"
            message = f"{name} is an option of hidden_act='leaky_relu', got {given}"
            _require(leaky or getattr(self, name) is None, message)
        for layer in self._layers:
            fits = self.slope_sharing is None or layer.mlp_type not in ("fused", "none")
            _require(fits, f"slope_sharing={self.slope_sharing!r} needs activations, got mlp_type={layer.mlp_type!r}")

    def validate_projections(self):
        """Projections are named where they are, and an identity has neither bias nor another width."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        for layer in self._layers:
            present = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS[layer.mlp_type])
            matrices = [name for name in present if name not in layer.identity_projections]
            for option, allowed in (
                ("identity_projections", ["v_proj", "o_proj"]),
                ("normalized_projections", ["q_proj", "k_proj", "v_proj"]),
                ("biased_projections", matrices),
                ("zero_init_projections", matrices),
            ):
                for name in getattr(layer, option):
                    _require(name in allowed, f"{option} must be a list from {', '.join(allowed)}; got {name!r}")
            fits = "v_proj" not in layer.identity_projections or kv_heads == heads
            grouped = f"grouped queries, got num_key_value_heads={kv_heads} and num_attention_heads={heads}"
            _require(fits, f"identity_projections may not name v_proj with {grouped}")
            for option in ("identity_projections", "attention_gate_init"):
                _require(
                    not getattr(layer, option) or heads * self.head_dim == self.hidden_size,
                    f"{option}={getattr(layer, option)} needs heads that share out the width, got hidden_size="
                    f"{self.hidden_size}, num_attention_heads={heads} and head_dim={self.head_dim}",
                )

    def validate_residual(self):
        """Gains have an entry for each of what they scale, and the input has a way through every block."""
        mix = self.attention_gains
        finite = mix is None or (len(mix) == 3 and all(map(math.isfinite, mix)))
        _require(finite, f"attention_gains must be three finite numbers, got {mix}")
        for layer in self._layers:
            gains, entries = layer.residual_gains, 2 if layer.mlp_type == "none" else 4
            fits = layer.norm_position in ("pre", "peri") or not self.parallel_residual
            _require(fits, f"norm_position={layer.norm_position!r} has no form with parallel_residual=True")
            fits = gains is None or (len(gains) == entries and all(map(math.isfinite, gains)))
            form = f"{entries} finite numbers, [skip, attention; skip, MLP], with mlp_type={layer.mlp_type!r}"
            _require(fits, f"residual_gains must be {form}; got {gains}")
            _require(
                not gains or gains[0] != 0 or self.parallel_residual or bool(mix and mix[0]),
                f"residual_gains={gains} leaves no way past attention: its first entry may be 0 only where "
                "attention_gains start with another number, or with parallel_residual=True",
            )
        trained = self.residual_gains_trainable or any(layer.residual_gains is not None for layer in self._layers)
        _require(trained, "residual_gains_trainable=False needs residual_gains, got None")

    def validate_layers(self):
        """Layers differ in what no client reads, and attention, where it is named, computes what the fields say."""
        for name in self.per_layer_attributes or ():
            _require(name in _PER_LAYER, f"per_layer_config may set {', '.join(sorted(_PER_LAYER))}; got {name!r}")
        if self._attn_implementation is not None:
            self.check_attention_implementation(self._attn_implementation)

    def check_attention_implementation(self, implementation: str):
        """Raises ValueError, with what to take, if this implementation of attention would drop a field in silence."""
        for name, exact in EXACT_ATTENTION.items():
            value, right = getattr(self, name), " or ".join(map(repr, exact))
            computes = implementation in exact or ("flash" in exact and "flash" in implementation)
            message = f"{name}={value} would be dropped by attn_implementation={implementation!r}: take {right}"
            _require(value is None or computes, message)

    @property
    def norm_alphas(self) -> list[float]:
        """Starts of alpha of the norms around attention, and of all others."""
        return self.norm_alpha_init if isinstance(self.norm_alpha_init, list) else [self.norm_alpha_init] * 2

    @property
    def rope_type(self) -> str:
        """Of rotary positions, as transformers names it."""
        return (self.rope_parameters or {}).get("rope_type", "default")

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int((self.head_dim or 0) * self.partial_rotary_factor)

    @property
    def preset(self) -> str | None:
        """The row of `PRESETS` whose fields these are, None for a model without any, `"custom"` for others."""
        neutral = {f.name: [] if f.default is MISSING else f.default for f in fields(self) if f.name in DESIGN_FIELDS}
        layers = list(self._layers) if self.is_heterogeneous else [self] * self.num_hidden_layers
        for name, values in ((None, {}), *PRESETS.items()):
            expected = {**neutral, **{key: _value_at(self, value) for key, value in values.items()}}
            # a gated MLP goes without saying on the backbone that has it
            if "mlp_type" not in values and self._layers[0]._has(BACKBONES["llama"], but=values):
                expected["mlp_type"] = "gated"
            differing = expected.pop("per_layer_config", {})
            if all(layer._has({**expected, **differing.get(i, {})}) for i, layer in enumerate(layers)):
                return name
        return CUSTOM

    @property
    def variant(self) -> str:
        """In the notation: `SM+LN+G`, `SM+R`, `SM+LR0.01`, `SM+LR-layer`, `SM+R-noLNf`, `SM+R@OP`, `SM+R@custom`."""
        preset = self.preset
        norm = next(word for word, norm_type in NORM_WORDS.items() if norm_type == self.norm_type)
        act = next(
            word
            for word, values in ACTIVATION_WORDS.items()
            if all(getattr(self, name) in allowed for name, allowed in values.items())
        )
        said = act != "LR" or "negative_slope" in PRESETS.get(preset or "", {})
        final = NO_FINAL_NORM if self.final_norm_type == "none" else ""
        if not final and self.final_norm_type != self._usual_final_norm():
            preset = CUSTOM
        return write_variant(norm, act, "" if said else f"{self.negative_slope:g}", final, preset or "")

    @property
    def backbone(self) -> str:
        """`"gpt2"`, `"pythia"`, `"llama"`, or `"custom"` for a mixture of them, whatever its preset changes."""
        changed = PRESETS.get(self.preset or "", {}).keys() | (self.per_layer_attributes or set())
        return next((name for name, values in BACKBONES.items() if self._has(values, but=changed)), "custom")

    def _has(self, values: dict[str, Any], but: Collection[str] = ()) -> bool:
        return all(key in but or _same(getattr(self, key), value) for key, value in values.items())

    def _usual_final_norm(self) -> str:
        return _FINAL_NORMS.get(self.backbone, "layernorm") if self.norm_type == "none" else self.norm_type

    @classmethod
    def from_variant(cls, variant: str, backbone: str | None = None, **kwargs) -> "LNFreeConfig":
        """
        The configuration of a variant in the paper's notation (see `variant`); `kwargs` are further fields. `G` stands
        for the backbone's own GELU: tanh with learned positions (GPT-2), erf with rotary ones (GPT-NeoX). `backbone`
        names a row of `BACKBONES`, whose fields `kwargs` may change. The final norm is of the blocks' type; where they
        have none it is LayerNorm, RMSNorm on the Llama backbone.

        Raises:
            ValueError: if `variant` is not in the notation, `kwargs` contradict it, or there is no such backbone.
        """
        words = read_variant(variant)
        preset = PRESETS.get(words["preset"], {})
        _require(backbone in (None, *BACKBONES), f"backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
        kwargs = {**BACKBONES.get(backbone or "", {}), **_USUAL.get(backbone or "", {}), **preset, **kwargs}
        named = {name: values[0] for name, values in ACTIVATION_WORDS[words["act"]].items()}
        if words["act"] == "G":
            named["hidden_act"] = GELUS.get(kwargs.get("position_embedding_type", ""), GELUS["learned"])
        if words["slope"]:
            named["negative_slope"] = float(words["slope"])
        for name, value in named.items():
            _require(
                name not in preset or callable(preset[name]) or preset[name] == value,
                f"{words['preset']} has {name}={preset.get(name)!r}, which {words['act']} in {variant} is not",
            )
        sizes = cls(**{name: kwargs[name] for name in _SIZES if name in kwargs})
        named |= {name: _value_at(sizes, value) for name, value in kwargs.items()}
        named.setdefault("norm_type", NORM_WORDS[words["norm"]])
        named.setdefault("final_norm_type", "none" if words["final"] else cls(**named)._usual_final_norm())
        config = cls(**named)
        # a slope is written as 0.1, and may be read as 0.10; fields of no preset may be added to a plain name
        plain = write_variant(**{**words, "slope": words["slope"] and f"{float(words['slope']):g}"})
        fits = plain in (config.variant, config.variant.partition("@")[0])
        given = {name: named[name] for name in kwargs}
        _require(fits, f"these fields make {config.variant}, not variant={variant!r}: {given}")
        return config


__all__ = ["LNFreeConfig"]
