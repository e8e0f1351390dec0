"""A plain float64 forward of every design, head by head and query by query, written from the papers' descriptions."""

import torch


def naive_logits(config, weights: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """
    Logits `(batch, T, vocab)`, differentiable in `weights` (float64, as `state_dict` names them).

    Args:
        config: an `LNFreeConfig`; its rotary positions are not scaled.
    """
    return torch.stack([_row(config, weights, row) for row in input_ids])


def _row(config, weights, row):
    x = weights["model.embed_tokens.weight"][row]  # (T, D)
    if config.position_embedding_type == "learned":
        x = x + weights["model.embed_positions.weight"][: len(row)]
    x = config.embedding_multiplier * x
    for index in range(config.num_hidden_layers):
        x = _block(config, config.per_layer_config[index], weights, index, x)
    x = _norm(config, config.final_norm_type, weights, "model.norm", x)
    return config.logits_multiplier * (x @ weights["lm_head.weight"].T)


def _block(config, layer, weights, index, x):
    name = f"model.layers.{index}"
    has_mlp = layer.mlp_type != "none"
    s1, g1, s2, g2 = 1.0, 1.0, 1.0, 1.0
    if layer.residual_gains is not None:
        s1, g1, *rest = weights[f"{name}.residual_gains"]
        s2, g2 = rest if has_mlp else (1.0, 1.0)

    def norm(part, x):
        return _norm(config, config.norm_type, weights, f"{name}.{part}", x)

    def attention(x):
        return _attention(config, layer, weights, f"{name}.self_attn", x)

    def mlp(x):
        return _mlp(config, layer, weights, f"{name}.mlp", index, x)

    if layer.norm_position == "pre":
        y = s1 * x + g1 * attention(norm("input_layernorm", x))
        source = x if config.parallel_residual else y
        return s2 * y + g2 * mlp(norm("post_attention_layernorm", source)) if has_mlp else y
    if layer.norm_position == "peri":
        y = s1 * x + g1 * norm("attention_output_norm", attention(norm("input_layernorm", x)))
        source = x if config.parallel_residual else y
        if not has_mlp:
            return y
        return s2 * y + g2 * norm("mlp_output_norm", mlp(norm("post_attention_layernorm", source)))
    y = s1 * x + g1 * attention(x)
    if layer.norm_position == "post":
        y = norm("attention_output_norm", y)
        return norm("mlp_output_norm", s2 * y + g2 * mlp(y)) if has_mlp else y
    if not has_mlp:
        return y
    h = norm("post_attention_layernorm", y)
    return s2 * h + g2 * mlp(h)


def _norm(config, norm_type, weights, name, x):
    if norm_type == "none":
        return x
    weight = weights[f"{name}.weight"]
    if norm_type == "rmsnorm":
        return _rms(config, x) * weight
    bias = weights[f"{name}.bias"]
    if norm_type == "layernorm":
        return _rms(config, x - x.mean(-1, keepdim=True)) * weight + bias
    scaled = weights[f"{name}.alpha"] * x
    if norm_type == "dyt":
        return torch.tanh(scaled) * weight + bias
    return torch.erf(scaled + weights[f"{name}.shift"]) * weight + bias


def _rms(config, x):
    return x / (x.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()


def _linear(weights, name, x):
    if f"{name}.weight" not in weights:
        return x
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _attention(config, layer, weights, name, x):
    length, heads, kv_heads, width = len(x), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (_linear(weights, f"{name}.{p}_proj", x).reshape(length, -1, width) for p in "qkv")
    q, k, v = (
        _rms(config, s) * weights[f"{name}.{p}_norm.weight"] if f"{p}_proj" in config.normalized_projections else s
        for p, s in zip("qkv", (q, k, v), strict=True)
    )
    if config.position_embedding_type == "rotary":
        q, k = _rotate(config, q), _rotate(config, k)
    scaling = width**-0.5 if config.attention_multiplier is None else config.attention_multiplier
    rows = []
    for t in range(length):
        for h in range(heads):
            keys, values = k[: t + 1, h * kv_heads // heads], v[: t + 1, h * kv_heads // heads]
            scores = keys @ q[t, h] * scaling  # (t + 1,)
            if config.softmax_temperature is not None:
                scores = scores / weights[f"{name}.temperature"][h]
            if config.attn_logit_softcapping is not None:
                scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
            p = (scores - scores.max()).exp()
            p = p / p.sum()
            if config.softmax_clipping is not None:
                g = -config.softmax_clipping / (t + 1)
                p = ((1 - g) * p + g).clip(0, 1)
            if config.attention_gains is not None:
                a, b, c = weights[f"{name}.attention_gains"][:, h]
                own = torch.zeros(t + 1, dtype=p.dtype)
                own[t] = 1.0
                p = a * own + b * p - c / (t + 1)
            out = p @ values
            if config.attention_gate_init is not None:
                read = x[t, h * width : (h + 1) * width]
                out = out * torch.sigmoid(
                    weights[f"{name}.head_gate.weight"][h] @ read + weights[f"{name}.head_gate.bias"][h]
                )
            rows.append(out)
    return _linear(weights, f"{name}.o_proj", torch.cat(rows).view(length, heads * width))


def _rotate(config, states):
    half = int(config.head_dim * config.partial_rotary_factor) // 2
    positions = torch.arange(len(states), dtype=torch.float64)[:, None, None]
    angles = positions / config.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat((*turned, rest), -1)


def _mlp(config, layer, weights, name, index, x):
    if layer.mlp_type == "fused":
        return _linear(weights, f"{name}.fused_proj", x)

    def act(x):
        return _activation(config, weights, index, x)

    hidden = _linear(weights, f"{name}.up_proj", x)
    if layer.mlp_type == "gated":
        hidden = act(_linear(weights, f"{name}.gate_proj", x)) * hidden
    else:
        hidden = act(hidden)
    return _linear(weights, f"{name}.down_proj", hidden)


def _activation(config, weights, index, x):
    if config.hidden_act == "linear":
        return x
    if config.hidden_act == "silu":
        return x / (1 + (-x).exp())
    if config.hidden_act == "gelu":
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))
    if config.hidden_act == "gelu_pytorch_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    slope = config.negative_slope or 0.0
    if config.slope_sharing is not None:
        slopes = weights["model.learned_slope.negative_slope"]
        slope = slopes[index if config.slope_sharing == "layer" else 0]
    return torch.where(x > 0, x, slope * x)
