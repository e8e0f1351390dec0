"""The stock classes that a model of this family can come from and become: where their modules and fields are."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_lnfree import LNFreeConfig
from modeling_lnfree.configuration_lnfree import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, PROJECTIONS

from ..errors import UserError, explained


@dataclass(frozen=True)
class Architecture:
    """
    A stock class.

    Attributes:
        model_class: of the language model.
        to_ours: its configuration -> this family's.
        to_stock: the other way, as far as it has a field for what is said.
        layers: the name of its blocks.
        outer, block: our modules by its names, outside and inside of the blocks; `qkv` is a fused projection.
    """

    model_class: type[PreTrainedModel]
    to_ours: Callable[[Any], LNFreeConfig]
    to_stock: Callable[[LNFreeConfig], PreTrainedConfig]
    layers: str
    outer: dict[str, str]
    block: dict[str, str]


# fields with one name and meaning in all configurations
_SAME_FIELDS = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "tie_word_embeddings"),
]
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}
_QKV = ["q_proj", "k_proj", "v_proj"]
# What a trained model computes the same without. Rotary angles go along whole, and biases are compared by themselves.
_NOT_COMPARED = {
    *("embedding_dropout", "attention_dropout", "hidden_dropout", "classifier_dropout", "use_cache"),
    *("initializer_range", "zero_init_projections", "norm_alpha_init", "rope_theta", "rope_parameters"),
    *("biased_projections", *(f.name for f in fields(PreTrainedConfig))),
}
_COMPARED = [f.name for f in fields(LNFreeConfig) if f.name not in _NOT_COMPARED]


def _common_fields(config: Any, activation: str, field: str) -> dict[str, Any]:
    if activation not in _ACTIVATIONS:
        raise UserError(f"{field} must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    same = {name: getattr(config, name) for name in (*_SAME_FIELDS, "dtype")}
    return {**same, "hidden_act": _ACTIVATIONS[activation]}


def _rotary_fields(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "position_embedding_type": "rotary",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "rope_parameters": None if rope["rope_type"] == "default" else dict(rope),
    }


def _rope_parameters(config: LNFreeConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {"rope_type": "default", "rope_theta": config.rope_theta})


def _config_from_gpt2(config: GPT2Config) -> LNFreeConfig:
    if config.add_cross_attention:
        raise UserError("add_cross_attention must be False, got True: this family has decoders only")
    return LNFreeConfig(
        **_common_fields(config, config.activation_function, "activation_function"),
        intermediate_size=config.n_inner,
        norm_type="layernorm",
        layer_norm_eps=config.layer_norm_epsilon,
        biased_projections=list(PROJECTIONS),
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        hidden_dropout=config.resid_pdrop,
    )


def _gpt2_config(config: LNFreeConfig) -> GPT2Config:
    return GPT2Config(
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        n_inner=None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        activation_function="gelu_new" if config.hidden_act == "gelu_pytorch_tanh" else config.hidden_act,
        layer_norm_epsilon=config.layer_norm_eps,
        embd_pdrop=config.embedding_dropout,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.hidden_dropout,
    )


def _config_from_neox(config: GPTNeoXConfig) -> LNFreeConfig:
    attention = ATTENTION_PROJECTIONS if config.attention_bias else ()
    return LNFreeConfig(
        **_common_fields(config, config.hidden_act, "hidden_act"),
        **_rotary_fields(config.rope_parameters),
        intermediate_size=config.intermediate_size,
        parallel_residual=config.use_parallel_residual,
        norm_type="layernorm",
        layer_norm_eps=config.layer_norm_eps,
        biased_projections=[*attention, *MLP_PROJECTIONS["two_layer"]],
        embedding_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
    )


def _neox_config(config: LNFreeConfig) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        rope_parameters={**_rope_parameters(config), "partial_rotary_factor": config.partial_rotary_factor},
        use_parallel_residual=config.parallel_residual,
        layer_norm_eps=config.layer_norm_eps,
        attention_bias=not set(ATTENTION_PROJECTIONS).isdisjoint(config.biased_projections),
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
    )


def _config_from_llama(config: Any, biased: list[str] | None = None, normalized: list[str] | None = None):
    if biased is None:
        biased = [*(ATTENTION_PROJECTIONS if getattr(config, "attention_bias", False) else ())]
        biased += MLP_PROJECTIONS["gated"] if getattr(config, "mlp_bias", False) else ()
    # the class rotates whole heads, whatever is written there
    rope = {key: value for key, value in config.rope_parameters.items() if key != "partial_rotary_factor"}
    return LNFreeConfig(
        **_common_fields(config, config.hidden_act, "hidden_act"),
        **_rotary_fields(rope),
        intermediate_size=config.intermediate_size,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        mlp_type="gated",
        norm_type="rmsnorm",
        final_norm_type="rmsnorm",
        layer_norm_eps=config.rms_norm_eps,
        biased_projections=biased,
        normalized_projections=normalized or [],
        embedding_dropout=0.0,
        attention_dropout=config.attention_dropout,
    )


def _without_window(config: Any) -> Any:
    """The configuration, if every token sees all that stand before it."""
    window, positions = config.sliding_window, config.max_position_embeddings
    slides = "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"])
    if slides and window is not None and window < positions:
        raise UserError(
            f"sliding_window must be null or at least max_position_embeddings={positions}, got {window}: this family "
            "sees the whole context"
        )
    return config


def _llama_fields(config: LNFreeConfig) -> dict[str, Any]:
    """What Llama, Qwen2 and Qwen3 have in common."""
    rope = {key: value for key, value in _rope_parameters(config).items() if key != "partial_rotary_factor"}
    same = ("intermediate_size", "num_key_value_heads", "hidden_act", "attention_dropout")
    return {
        **{name: getattr(config, name) for name in (*_SAME_FIELDS, *same)},
        "rms_norm_eps": config.layer_norm_eps,
        "rope_parameters": rope,
    }


def _llama_config(config: LNFreeConfig) -> LlamaConfig:
    return LlamaConfig(
        **_llama_fields(config),
        head_dim=config.head_dim,
        attention_bias=not set(ATTENTION_PROJECTIONS).isdisjoint(config.biased_projections),
        mlp_bias=not set(MLP_PROJECTIONS["gated"]).isdisjoint(config.biased_projections),
    )


def _qwen3_config(config: LNFreeConfig) -> Qwen3Config:
    biased = not set(ATTENTION_PROJECTIONS).isdisjoint(config.biased_projections)
    return Qwen3Config(**_llama_fields(config), head_dim=config.head_dim, attention_bias=biased)


_LLAMA_BLOCK = {
    name: name
    for name in (
        *("input_layernorm", "post_attention_layernorm"),
        *(f"self_attn.{name}" for name in ATTENTION_PROJECTIONS),
        *(f"mlp.{name}" for name in MLP_PROJECTIONS["gated"]),
    )
}
# by model type; those after Llama differ from it in what their rows say
ARCHITECTURES = {
    "gpt2": Architecture(
        model_class=GPT2LMHeadModel,
        to_ours=_config_from_gpt2,
        to_stock=_gpt2_config,
        layers="h",
        outer={"embed_positions": "wpe", "norm": "ln_f"},
        block={
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "qkv": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
    ),
    "gpt_neox": Architecture(
        model_class=GPTNeoXForCausalLM,
        to_ours=_config_from_neox,
        to_stock=_neox_config,
        layers="layers",
        outer={"norm": "final_layer_norm"},
        block={
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
            "qkv": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    ),
    "llama": Architecture(
        model_class=LlamaForCausalLM,
        to_ours=_config_from_llama,
        to_stock=_llama_config,
        layers="layers",
        outer={"norm": "norm"},
        block=_LLAMA_BLOCK,
    ),
    # a Llama but for its window; it goes back as a Llama
    "mistral": Architecture(
        model_class=MistralForCausalLM,
        to_ours=lambda config: _config_from_llama(_without_window(config)),
        to_stock=_llama_config,
        layers="layers",
        outer={"norm": "norm"},
        block=_LLAMA_BLOCK,
    ),
    "qwen2": Architecture(
        model_class=Qwen2ForCausalLM,
        to_ours=lambda config: _config_from_llama(_without_window(config), biased=_QKV),
        to_stock=lambda config: Qwen2Config(**_llama_fields(config)),
        layers="layers",
        outer={"norm": "norm"},
        block=_LLAMA_BLOCK,
    ),
    "qwen3": Architecture(
        model_class=Qwen3ForCausalLM,
        to_ours=lambda config: _config_from_llama(_without_window(config), normalized=_QKV[:2]),
        to_stock=_qwen3_config,
        layers="layers",
        outer={"norm": "norm"},
        block={**_LLAMA_BLOCK, "self_attn.q_norm": "self_attn.q_norm", "self_attn.k_norm": "self_attn.k_norm"},
    ),
}


def stock_config(config: LNFreeConfig) -> Any:
    """
    The stock configuration that says what `config` says: of `GPT2LMHeadModel` with learned positions;
    `LlamaForCausalLM` with rotary ones and a gated MLP, Qwen2's or Qwen3's class where only they have its biases or
    normalized queries and keys; `GPTNeoXForCausalLM` with other MLPs. Dropouts that the class lacks are left out; that
    of GPT-NeoX for embeddings and residual is `hidden_dropout`.

    Raises:
        UserError: for the first field whose value the class cannot have.
    """
    if config.is_heterogeneous:
        raise UserError(f"{config.variant} has no stock form: no stock class has layers that differ, per_layer_config")
    architecture = ARCHITECTURES[_stock_type(config)]
    none = f"{config.variant} has no stock form: {architecture.model_class.__name__}"
    with explained(none):
        stock = architecture.to_stock(config)
        back = architecture.to_ours(stock)
    # what does not come back is not in the stock configuration
    for name in _COMPARED:
        ours, theirs = getattr(config, name), getattr(back, name)
        if ours != theirs and (name != "partial_rotary_factor" or config.position_embedding_type == "rotary"):
            raise UserError(f"{none} has {name}={theirs!r} only, not {ours!r}")
    if extra := set(config.biased_projections) - set(back.biased_projections):
        raise UserError(
            f"{none} has biased_projections={back.biased_projections} only, not {', '.join(sorted(extra))}"
        )
    return stock


def _stock_type(config: LNFreeConfig) -> str:
    if config.position_embedding_type == "learned":
        return "gpt2"
    if config.mlp_type != "gated":
        return "gpt_neox"
    if config.normalized_projections:
        return "qwen3"
    whole = config.num_attention_heads * (config.head_dim or 0) == config.hidden_size
    return "qwen2" if whole and set(config.biased_projections) == set(_QKV) else "llama"
