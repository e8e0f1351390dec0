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
"""
The parts of LNFree models, each a small class or function and a row in the table that a config's value picks it from.

What is not there is an identity under the same name, so that no forward pass asks. `starts` of a module says how its
parameters begin: a name and what fills it in place.

Shapes in the comments: B batch, T queries, S keys, D hidden size, H heads, d head dimension, F feed-forward width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .configuration_lnfree import LNFreeConfig


def fill(tensor: torch.Tensor, values: list[float]):
    """Fills the rows of a tensor, each with its value, in place."""
    rows = tensor.new_tensor(values).view(-1, *[1] * (tensor.ndim - 1))
    init.copy_(tensor, rows.expand_as(tensor))


ONES, ZEROS = partial(init.constant_, val=1.0), partial(init.constant_, val=0.0)


def keep(states: torch.Tensor, *args) -> torch.Tensor:
    """In place of a function that is not there: the first argument, as it came."""
    return states


class LNFreeIdentity(nn.Module):
    """In place of a module that is not there: its first input, as it came, whatever follows it."""

    def forward(self, states: torch.Tensor, *args) -> torch.Tensor:
        return states


class LNFreeScale(nn.Module):
    """Times a constant: `embedding_multiplier`, `logits_multiplier`."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * self.factor


def build_scale(factor: float) -> nn.Module:
    return nn.Identity() if factor == 1 else LNFreeScale(factor)


# ---- norms: `norm_type`, `final_norm_type`, `normalized_projections`


class LNFreeRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 at least (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.starts = {"weight": ONES}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(states.dtype)


class LNFreeDynamicTanh(nn.Module):
    """weight * tanh(alpha x) + bias, in place of a norm (arXiv 2503.10622)."""

    def __init__(self, size: int, alpha: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.alpha = nn.Parameter(torch.empty(1))
        self.starts = {"weight": ONES, "bias": ZEROS, "alpha": partial(init.constant_, val=alpha)}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(self.alpha * states) + self.bias


class LNFreeDynamicErf(LNFreeDynamicTanh):
    """weight * erf(alpha x + shift) + bias, in place of a norm (arXiv 2512.10938)."""

    def __init__(self, size: int, alpha: float):
        super().__init__(size, alpha)
        self.shift = nn.Parameter(torch.empty(1))
        self.starts |= {"shift": ZEROS}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.erf(self.alpha * states + self.shift) + self.bias


# given width, epsilon and the start of alpha
NORMS: dict[str, Callable[[int, float, float], nn.Module]] = {
    "none": lambda size, eps, alpha: nn.Identity(),
    "layernorm": lambda size, eps, alpha: nn.LayerNorm(size, eps=eps),
    "rmsnorm": lambda size, eps, alpha: LNFreeRMSNorm(size, eps),
    "dyt": lambda size, eps, alpha: LNFreeDynamicTanh(size, alpha),
    "derf": lambda size, eps, alpha: LNFreeDynamicErf(size, alpha),
}


def build_head_norm(config: LNFreeConfig, name: str) -> nn.Module:
    """The norm over each head of what this projection gives, or the identity in its place."""
    normed = name in config.normalized_projections
    return LNFreeRMSNorm(config.head_dim, config.layer_norm_eps) if normed else LNFreeIdentity()  # type: ignore[arg-type]


# ---- positions: `position_embedding_type`, `rope_parameters`


class LNFreeRotary(nn.Module):
    """
    Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864, in GPT-NeoX's half-split layout): of
    `position_ids` `(batch_size, seq_len)` two tensors of shape `(batch_size, 1, seq_len, config.rotary_dim)`, computed
    in float32 and cast to `dtype`.
    """

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        self.config = config
        self.factor = 1.0

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inverse_frequencies(position_ids)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)

    def inverse_frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Of shape `(rotary_dim / 2,)`. No buffer, which would lose its value or its precision with the model's."""
        dim = self.config.rotary_dim
        exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32)
        return 1.0 / (self.config.rope_theta ** (exponents / dim))


class LNFreeScaledRotary(LNFreeRotary):
    """Frequencies that transformers' function for the config's `rope_type` gives, the same for every length."""

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        with torch.device("cpu"):  # a model that is being loaded is built without values
            frequencies, self.factor = ROPE_INIT_FUNCTIONS[config.rope_type](config, torch.device("cpu"))
        self.frequencies = frequencies.tolist()

    def inverse_frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.frequencies, device=position_ids.device)


class LNFreeGrowingRotary(LNFreeScaledRotary):
    """Frequencies that depend on how far the sequence has come (`"dynamic"`, `"longrope"`)."""

    def inverse_frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        length = position_ids.max() + 1
        return ROPE_INIT_FUNCTIONS[self.config.rope_type](self.config, position_ids.device, seq_len=length)[0]


ROTARY = {"default": LNFreeRotary, "dynamic": LNFreeGrowingRotary, "longrope": LNFreeGrowingRotary}


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` dimensions of `states` (`(batch_size, num_heads, seq_len, head_dim)`)."""
    rotated, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1)


def check_positions(position_ids: torch.Tensor, max_positions: int):
    """Raises ValueError for a position past the learned ones, where reading it costs no synchronization."""
    if position_ids.device.type != "cpu" or is_tracing(position_ids) or position_ids.numel() == 0:
        return
    first, last = int(position_ids.min()), int(position_ids.max())
    if first < 0:
        raise ValueError(f"position_ids must not be negative, got {first}")
    if last >= max_positions:
        raise ValueError(
            f"position {last} is past the learned positions: the sequence may be at most "
            f"max_position_embeddings={max_positions} tokens long"
        )


def learned_positions(model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor):
    """The embeddings with those of their positions added (GPT-2); nothing to rotate by."""
    check_positions(position_ids, model.config.max_position_embeddings)
    return hidden_states + model.embed_positions(position_ids), ()


def rotary_positions(model: Any, hidden_states: torch.Tensor, position_ids: torch.Tensor):
    """The embeddings as they are, and what queries and keys are rotated by (GPT-NeoX)."""
    return hidden_states, model.rotary(position_ids, hidden_states.dtype)


POSITIONS = {"learned": learned_positions, "rotary": rotary_positions}
# what queries and keys go through, with what `POSITIONS` gave
ROTATIONS: dict[str, Callable[..., torch.Tensor]] = {"learned": keep, "rotary": rotate}


# ---- scores and weights: `attn_logit_softcapping`, `softmax_clipping`; None for what is not there


class LNFreeSoftCap(nn.Module):
    """Scores -> cap * tanh(scores / cap)."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(scores / self.cap)


class LNFreeClipping(nn.Module):
    """
    Weights p -> clip((1 - g) p + g, 0, 1) with g = -alpha / n, n the keys that the query sees: what is below alpha / n
    becomes nothing (arXiv 2306.12929; n in place of the length, after arXiv 2402.12102).
    """

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, weights: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        number: int | torch.Tensor = weights.shape[-1]
        if attention_mask is not None:
            number = (attention_mask.exp() > 0).sum(-1, keepdim=True, dtype=weights.dtype).clamp(min=1)  # (B, 1, T, 1)
        least = self.alpha / number
        return ((1 + least) * weights - least).clamp(0.0, 1.0)


def build_optional(module_class: Callable[[float], nn.Module], value: float | None) -> nn.Module:
    """The module that a field's value asks for, or the identity for None."""
    return LNFreeIdentity() if value is None else module_class(value)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
):
    """Attention by its definition, with the weights `(B, H, T, S)`; in training these are after dropout."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    attn_weights = module.cap(torch.matmul(query, key.transpose(2, 3)) * scaling)  # (B, H, T, S)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    wide = torch.promote_types(query.dtype, torch.float32)
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=wide)
    attn_weights = module.clip(attn_weights, attention_mask).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()  # (B, T, H, d)
    return attn_output, attn_weights


# ---- heads: `softmax_temperature`, `attention_gains`, `attention_gate_init`


def divide_by_temperature(query: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Queries `(B, H, T, d)` by the temperature of their head `(H,)`, which divides the scores by it."""
    return query / temperature[:, None, None].to(query.dtype)


class LNFreeUniform(nn.Module):
    """
    What stands for the module in the second call of an attention function, the one with zero queries: every function
    gives the mean of the values that a query sees, whatever mask, cache and packing say. It is no attention of the
    model, so what measures those does not see it.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = attention.config, attention.layer_idx, True
        self.num_key_value_groups = attention.num_key_value_groups
        self.cap, self.clip = LNFreeIdentity(), LNFreeIdentity()


def shape_heads(
    gains: torch.Tensor, output: torch.Tensor, own: torch.Tensor, uniform: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """
    (a I + b A - c C) v, of A v, the queries' `own` values, and C v (arXiv 2311.01906, 2306.17759).

    Args:
        gains (`torch.Tensor` of shape `(3, num_heads)`): a, b and c.
        output (`torch.Tensor` of shape `(batch_size, seq_len, num_heads, head_dim)`): A v.
        own (`torch.Tensor` of shape `(batch_size, num_key_value_heads, seq_len, head_dim)`).
    """
    a, b, c = gains[:, :, None].to(output.dtype)  # (H, 1) each
    own = repeat_kv(own, gains.shape[1] // own.shape[1]).transpose(1, 2)  # (B, T, H, d)
    # the difference first: it is 0, and not nearly, where both are the same
    return a * own + (b * output.reshape(own.shape) - c * uniform().reshape(own.shape))


def keep_heads(gains: None, output: torch.Tensor, own: torch.Tensor, uniform: Callable) -> torch.Tensor:
    return output


class LNFreeHeadGate(nn.Module):
    """Times sigmoid(w . x + b) for each head, x its slice of attention's input (arXiv 2306.12929)."""

    def __init__(self, config: LNFreeConfig, probability: float):
        super().__init__()
        head_dim: int = config.head_dim  # type: ignore[assignment]  # the config fills it in
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, head_dim))
        self.bias = nn.Parameter(torch.empty(config.num_attention_heads))
        self.starts = {
            "weight": partial(init.normal_, std=config.initializer_range),
            "bias": partial(init.constant_, val=math.log(probability / (1 - probability))),
        }

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of each head, from 0 to 1, `(B, T, H)`."""
        slices = hidden_states.view(*hidden_states.shape[:-1], *self.weight.shape)  # (B, T, H, d)
        return torch.sigmoid((slices * self.weight).sum(-1) + self.bias)

    def forward(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        gates = self.gates(hidden_states)[..., None]  # (B, T, H, 1)
        return output.reshape(*gates.shape[:-1], self.weight.shape[-1]) * gates


# ---- activations: `hidden_act` and `slope_sharing`


class LNFreeLeakyReLU(nn.Module):
    """Leaky ReLU with the config's slope, or with a learned one that the model passes down."""

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        self.negative_slope: float = config.negative_slope  # type: ignore[assignment]  # the config fills it in

    def forward(self, hidden_states: torch.Tensor, negative_slope: torch.Tensor | None = None) -> torch.Tensor:
        if negative_slope is None:
            return nn.functional.leaky_relu(hidden_states, self.negative_slope)
        return nn.functional.prelu(hidden_states, negative_slope.to(hidden_states.dtype))


ACTIVATIONS: dict[str, Callable[[LNFreeConfig], nn.Module]] = {
    **{name: lambda config: ACT2FN[config.hidden_act] for name in ("gelu", "gelu_pytorch_tanh", "relu", "silu")},
    "leaky_relu": LNFreeLeakyReLU,
    "linear": lambda config: nn.Identity(),
}


class LNFreeFixedSlope(nn.Module):
    """No layer's activation takes a learned slope."""

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        self.num_layers = config.num_hidden_layers

    def forward(self) -> list[tuple]:
        return [()] * self.num_layers


class LNFreeLearnedSlope(nn.Module):
    """
    The learned slopes of all layers (arXiv 2410.09637), one that all share or one a layer, as a list of what each
    layer's activation takes. A module, so that plans can name it.
    """

    def __init__(self, config: LNFreeConfig, num_slopes: int):
        super().__init__()
        self.num_layers = config.num_hidden_layers
        self.negative_slope = nn.Parameter(torch.empty(num_slopes))
        self.starts = {"negative_slope": partial(init.constant_, val=config.negative_slope)}

    def forward(self) -> list[tuple[torch.Tensor]]:
        slopes = self.negative_slope.split(1)  # (1,) each
        return [(slope,) for slope in slopes * (self.num_layers // len(slopes))]


SLOPES: dict[str | None, Callable[[LNFreeConfig], nn.Module]] = {
    None: LNFreeFixedSlope,
    "layer": lambda config: LNFreeLearnedSlope(config, config.num_hidden_layers),
    "global": lambda config: LNFreeLearnedSlope(config, 1),
}


# ---- feed-forward layers: `mlp_type`


def build_linear(config: LNFreeConfig, name: str, in_features: int, out_features: int) -> nn.Module:
    """The projection of that name, or the identity in its place."""
    if name in config.identity_projections:
        return nn.Identity()
    layer = nn.Linear(in_features, out_features, bias=name in config.biased_projections)
    if name in config.zero_init_projections:
        layer.starts = {"weight": ZEROS}  # type: ignore[assignment]
    return layer


class LNFreeMLP(nn.Module):
    """Two projections with the variant's activation between them."""

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        width: int = config.intermediate_size  # type: ignore[assignment]  # the config fills it in
        self.up_proj = build_linear(config, "up_proj", config.hidden_size, width)
        self.act_fn = ACTIVATIONS[config.hidden_act](config)
        self.down_proj = build_linear(config, "down_proj", width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, *negative_slope: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act_fn(self.up_proj(hidden_states), *negative_slope)  # (B, T, F)
        return self.down_proj(hidden_states)


class LNFreeGatedMLP(LNFreeMLP):
    """The same with a third projection, which is multiplied in behind the activation (Llama, arXiv 2002.05202)."""

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        width: int = config.intermediate_size  # type: ignore[assignment]
        self.gate_proj = build_linear(config, "gate_proj", config.hidden_size, width)

    def forward(self, hidden_states: torch.Tensor, *negative_slope: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(hidden_states), *negative_slope)  # (B, T, F)
        return self.down_proj(gate * self.up_proj(hidden_states))


class LNFreeFusedMLP(nn.Module):
    """One square matrix, what two are without an activation between them (arXiv 2410.13060)."""

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        self.fused_proj = build_linear(config, "fused_proj", config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fused_proj(hidden_states)


MLPS: dict[str, Callable[[LNFreeConfig], nn.Module]] = {
    "two_layer": LNFreeMLP,
    "gated": LNFreeGatedMLP,
    "fused": LNFreeFusedMLP,
    "none": lambda config: LNFreeIdentity(),
}


# ---- blocks: `norm_position`, `parallel_residual`, `residual_gains`


def build_gains(values: list[float] | None, trained: bool) -> nn.Parameter | nn.Buffer | None:
    """
    Residual gains. Those that are not trained are a buffer, since loading makes every parameter one that is; they have
    their values from here on, since a buffer is no part of what is initialized.
    """
    if values is None:
        return None
    return (nn.Parameter if trained else nn.Buffer)(torch.tensor(values, dtype=torch.get_default_dtype()))


def add(gains: None, first: int, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    return x + branch


def add_scaled(gains: torch.Tensor, first: int, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """The gain of the skip is at `first`, that of the branch behind it."""
    return gains[first] * x + gains[first + 1] * branch


def add_nothing(gains: torch.Tensor | None, first: int, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """In place of the other two where there is no MLP."""
    return x


def pre_norm(block, x, attn, mlp, add_attn, add_mlp):
    """One after the other (GPT-2, Llama)."""
    x = add_attn(x, attn(block.input_layernorm(x)))
    return add_mlp(x, mlp(block.post_attention_layernorm(x)))


def parallel(block, x, attn, mlp, add_attn, add_mlp):
    """Side by side (GPT-NeoX)."""
    y = add_attn(x, attn(block.input_layernorm(x)))
    return add_mlp(y, mlp(block.post_attention_layernorm(x)))


def post_norm(block, x, attn, mlp, add_attn, add_mlp):
    """Norms over the sums (arXiv 2002.04745)."""
    x = block.attention_output_norm(add_attn(x, attn(x)))
    return block.mlp_output_norm(add_mlp(x, mlp(x)))


def peri_norm(block, x, attn, mlp, add_attn, add_mlp):
    """Norms before and behind each branch (arXiv 2502.02732)."""
    x = add_attn(x, block.attention_output_norm(attn(block.input_layernorm(x))))
    return add_mlp(x, block.mlp_output_norm(mlp(block.post_attention_layernorm(x))))


def parallel_peri_norm(block, x, attn, mlp, add_attn, add_mlp):
    y = add_attn(x, block.attention_output_norm(attn(block.input_layernorm(x))))
    return add_mlp(y, block.mlp_output_norm(mlp(block.post_attention_layernorm(x))))


def hybrid_norm(block, x, attn, mlp, add_attn, add_mlp):
    """No norm before attention; the MLP's is over the sum, and its output also the skip (arXiv 2503.04598)."""
    x = block.post_attention_layernorm(add_attn(x, attn(x)))
    return add_mlp(x, mlp(x))


# by norm position, and whether the branches are parallel: the wiring, and the norms that it has
_BEFORE, _BEHIND = ("input_layernorm", "post_attention_layernorm"), ("attention_output_norm", "mlp_output_norm")
WIRINGS: dict[tuple[str, bool], tuple[Callable, tuple[str, ...]]] = {
    ("pre", False): (pre_norm, _BEFORE),
    ("pre", True): (parallel, _BEFORE),
    ("post", False): (post_norm, _BEHIND),
    ("peri", False): (peri_norm, _BEFORE + _BEHIND),
    ("peri", True): (parallel_peri_norm, _BEFORE + _BEHIND),
    ("hybrid", False): (hybrid_norm, _BEFORE[1:]),
}
