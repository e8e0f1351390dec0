"""Tiny models of ten families, their attention maps in float64, and random queries and keys."""

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask


VOCAB_SIZE = 61
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": {**SIZES, "attn_pdrop": 0.2},
    "gpt_neox": SIZES,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 5},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "qwen3": {**GROUPED, "head_dim": 8},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {**GROUPED, "num_key_value_heads": 4},
    "gpt_oss": {**GROUPED, "head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
    "bert": SIZES,
}
# models whose softcap or sinks sdpa cannot apply
EAGER_ONLY = {"gemma2", "gpt_oss"}


def supports_sdpa(model_type):
    """Of models that it cannot compute: transformers before 5.24 takes Gemma 2, and leaves the softcap out."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]._supports_sdpa


def make_model(model_type, implementation="sdpa", **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type], **overrides})
    factory = AutoModel if model_type == "bert" else AutoModelForCausalLM
    model = factory.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # scores of ordinary size: heads that are neither uniform nor one-hot
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=0.4)
            elif "sinks" in name or "bias" in name:
                parameter.normal_(std=0.5)
    return model


def make_uneven_llama():
    """Four heads of queries on two of keys in the first layer, and half of them in the second."""
    model = make_model("llama", "eager")
    attention = model.model.layers[1].self_attn
    attention.q_proj, attention.k_proj, attention.v_proj = (torch.nn.Linear(32, n, bias=False) for n in (16, 8, 8))
    attention.o_proj = torch.nn.Linear(16, 32, bias=False)
    return model


def make_batch(padding, batch=3, length=13):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, VOCAB_SIZE, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding == "left":
        attention_mask[0, :4], attention_mask[1, :9] = 0, 0
    elif padding == "right":
        attention_mask[0, -4:], attention_mask[1, -9:] = 0, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def float64_maps(model, batch):
    """Attention maps `(layers, batch, heads, T, S)` of the same weights in float64, by eager attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    if model.config._attn_implementation == "sdpa" and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    reference = type(model)._from_config(config, **options).eval()
    reference.load_state_dict(model.state_dict())
    # eager softmax is in float32, where the lowest float64 is minus infinity and a padded query becomes NaN
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = lambda **arguments: eager_mask(**{**arguments, "dtype": torch.float32})
    with torch.no_grad():
        maps = torch.stack(reference(**batch, output_attentions=True).attentions).double()
    del ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    if model.config.model_type == "gpt_oss":
        # eager leaves out the sink, which is a key as well
        maps = torch.cat([maps, (1 - maps.sum(-1, keepdim=True)).clamp(min=1e-30)], -1)
    return maps


def mean_of_queries(values, attention_mask):
    """`(layers, batch, heads, T)` -> `(layers, heads)` over the queries that are not padding."""
    real = attention_mask.bool()[None, :, None]
    return torch.where(real, values, 0.0).sum((1, 3)) / real.sum()


def random_states(batch, heads, kv_heads, num_queries, num_keys, head_dim, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, num_queries, head_dim, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, num_keys, head_dim, generator=generator, dtype=torch.float64)
    return (scale * query).to(dtype), key.to(dtype)


def random_mask(shape, seed=0):
    """Bool mask in which every query sees some key."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[..., 0] = True
    return mask
