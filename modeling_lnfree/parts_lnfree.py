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

Shapes in the comments: B batch, T queries, S keys, D hidden size, H heads, d head dimension, F feed-forward width.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel

from .configuration_lnfree import LNFreeConfig


# ---- norms: `norm_type` and `final_norm_type`

NORMS: dict[str, Callable[[LNFreeConfig], nn.Module]] = {
    "none": lambda config: nn.Identity(),
    "layernorm": lambda config: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
}


# ---- positions: `position_embedding_type`


def rotary_cos_sin(position_ids: torch.Tensor, config: LNFreeConfig, dtype: torch.dtype):
    """
    Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864, in GPT-NeoX's half-split layout).

    Args:
        position_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`).

    Returns:
        Two tensors of shape `(batch_size, 1, seq_len, config.rotary_dim)`, computed in float32 and cast to `dtype`.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequencies = 1.0 / (config.rope_theta ** (exponents / config.rotary_dim))
    angles = position_ids[:, None, :, None].float() * inverse_frequencies  # (B, 1, T, rotary_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` dimensions of `states` (`(batch_size, num_heads, seq_len, head_dim)`)."""
    rotated, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1)


def learned_positions(model: PreTrainedModel, hidden_states: torch.Tensor, position_ids: torch.Tensor):
    """The embeddings with those of their positions added (GPT-2); nothing to rotate by."""
    model.check_positions(position_ids)
    return hidden_states + model.embed_positions(position_ids), ()


def rotary_positions(model: PreTrainedModel, hidden_states: torch.Tensor, position_ids: torch.Tensor):
    """The embeddings as they are, and what queries and keys are rotated by (GPT-NeoX)."""
    return hidden_states, rotary_cos_sin(position_ids, model.config, hidden_states.dtype)


def keep(states: torch.Tensor) -> torch.Tensor:
    return states


POSITIONS = {"learned": learned_positions, "rotary": rotary_positions}
# what queries and keys go through, with what `POSITIONS` gave
ROTATIONS: dict[str, Callable[..., torch.Tensor]] = {"learned": keep, "rotary": rotate}


# ---- attention weights


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
):
    """Attention by its definition, with the weights `(B, H, T, S)`; in training these are after dropout."""
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()  # (B, T, H, d)
    return attn_output, attn_weights


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
    "gelu": lambda config: ACT2FN["gelu"],
    "gelu_pytorch_tanh": lambda config: ACT2FN["gelu_pytorch_tanh"],
    "relu": lambda config: ACT2FN["relu"],
    "leaky_relu": LNFreeLeakyReLU,
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
        self.starts = {"negative_slope": config.negative_slope}
        self.negative_slope = nn.Parameter(torch.empty(num_slopes))

    def forward(self) -> list[tuple[torch.Tensor]]:
        slopes = self.negative_slope.split(1)  # (1,) each
        return [(slope,) for slope in slopes * (self.num_layers // len(slopes))]


SLOPES: dict[str | None, Callable[[LNFreeConfig], nn.Module]] = {
    None: LNFreeFixedSlope,
    "layer": lambda config: LNFreeLearnedSlope(config, config.num_hidden_layers),
    "global": lambda config: LNFreeLearnedSlope(config, 1),
}


# ---- wirings: `parallel_residual`


def pre_norm(x, attn, mlp, norm_1, norm_2):
    """One after the other (GPT-2)."""
    x = x + attn(norm_1(x))
    return x + mlp(norm_2(x))


def parallel(x, attn, mlp, norm_1, norm_2):
    """Side by side (GPT-NeoX)."""
    return x + attn(norm_1(x)) + mlp(norm_2(x))


WIRINGS = {False: pre_norm, True: parallel}
