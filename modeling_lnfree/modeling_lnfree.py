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
LNFree: decoder-only transformers with and without LayerNorm (arXiv 2410.09637), on the GPT-2 and GPT-NeoX backbones.

Shapes in the comments: B batch, T queries, S keys, D hidden size, H heads, d head dimension, F feed-forward width.

Where mlinter's TRF057 is switched off: `auto_docstring` finds a model's name by its path inside transformers, and
prints errors on the terminal of whoever loads it from anywhere else. The docstrings here are written by hand.
"""

import filecmp
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import flop_registry
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_lnfree import LNFreeConfig


# transformers 5.24 renamed `past_key_values` to `cache`, in arguments, outputs and mask builders alike. A model that
# takes the wrong one generates from an empty cache without an error, so every forward takes both.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def mkl_leaves_half_unused() -> bool:
    """
    Whether torch multiplies by MKL on an AMD processor with AVX-512: MKL works with half of its vectors there, and
    oneDNN, which torch has too, with all. Older versions of torch do not tell the processor: False.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    return processor.get("avx512_f", False) and "AMD" in processor.get("cpu_name", "")


# Not beside an accelerator, where the model will be: copies by `nn.DataParallel` would share the first one's method.
USE_ONEDNN = mkl_leaves_half_unused() and not torch.accelerator.is_available()
# the number of multiplications above which a call of oneDNN pays off
ONEDNN_SIZE = 2**21


def define_onednn_linear():
    """
    `torch.ops.lnfree.linear(states, weight, bias)`: `nn.functional.linear` of matrices by oneDNN. The operation that
    torch has for it has no derivatives, and torch.compile takes it with constant weights only.
    """

    @torch.library.custom_op("lnfree::linear", mutates_args=(), device_types="cpu")
    def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

    @linear.register_fake
    def _(states, weight, bias):
        return states.new_empty((len(states), len(weight)))

    def setup_context(ctx, inputs, output):
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs[0] if needs_weight else None, inputs[1] if needs_states else None)

    def backward(ctx, grads):  # (N, output features)
        states, weight = ctx.saved_tensors
        grad_states = grad_weight = grad_bias = None
        if weight is not None:
            grad_states = linear(grads, weight.t(), None)
        if states is not None:
            # oneDNN copies a first factor that is transposed: the gradients, or the states and then the result
            if grads.numel() < states.numel() + grads.shape[1] * states.shape[1]:
                grad_weight = linear(grads.t(), states.t(), None)
            else:
                grad_weight = linear(states.t(), grads.t(), None).t().contiguous()
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_states, grad_weight, grad_bias

    linear.register_autograd(backward, setup_context=setup_context)
    flop_registry[torch.ops.lnfree.linear] = lambda states, weight, bias, out_val: 2 * states.numel() * len(weight)


# another copy of this file may have defined it; to define it anew would leave that one with a freed operation
if not hasattr(torch.ops.lnfree, "linear"):
    define_onednn_linear()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is dense, float32, on the CPU, of no subclass, and has no tangent (of forward-mode derivatives)."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and (torch.compiler.is_compiling() or unpack_dual(tensor).tangent is None)
    )


def linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward`, by oneDNN where that takes less time and means the same."""
    weight = self.weight  # read once: a parametrization computes it
    # an exported graph is for any machine, and sizes would be fixed in it
    if input.is_cpu and not (torch.jit.is_tracing() or torch.compiler.is_exporting()) and input.numel():
        # reading a weight takes the time of 8 multiplications
        size = max(input.numel(), 8 * self.in_features) * self.out_features
        if (
            size > ONEDNN_SIZE
            and torch.backends.mkldnn.enabled
            and is_plain(input)
            and is_plain(weight)
            and (self.bias is None or is_plain(self.bias))
            and input.shape[-1] == weight.shape[-1]
            and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active())
        ):
            output = torch.ops.lnfree.linear(input.reshape(-1, input.shape[-1]), weight, self.bias)
            return output.view(*input.shape[:-1], -1)
    return nn.functional.linear(input, weight, self.bias)


# a pickle holds a method by its name: read anywhere, that is `nn.Linear.forward`
linear_forward.__name__ = "forward"


def build_linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """`nn.Linear` itself, since quantisation goes by the exact type; its forward pass may be `linear_forward`."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    if USE_ONEDNN:
        layer.forward = MethodType(linear_forward, layer)
    return layer


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
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()  # (B, T, H, d)
    return attn_output, attn_weights


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


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` dimensions of `states` (`(batch_size, num_heads, seq_len, head_dim)`)."""
    rotated, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1)


class LNFreeAttention(nn.Module):
    """Causal multi-head self-attention, computed by the implementation that the config names."""

    def __init__(self, config: LNFreeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            bias = name in config.biased_projections
            self.add_module(name, build_linear(config.hidden_size, config.hidden_size, bias=bias))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, H, T, d)
        key_states = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        # Rotary positions only (the Pythia backbone)
        if position_embeddings is not None:
            query_states = apply_rotary(query_states, *position_embeddings)
            key_states = apply_rotary(key_states, *position_embeddings)

        if layer_past is not None:
            # the paged cache of `generate_batch` finds in the keywords where to read and write
            key_states, value_states = layer_past.update(
                key_states, value_states, self.layer_idx, kwargs=kwargs
            )  # (B, H, S, d)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1))  # (B, T, D)
        return attn_output, attn_weights


class LNFreeMLP(nn.Module):
    """Two projections with the variant's activation between them."""

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        self.up_proj = build_linear(
            config.hidden_size, config.intermediate_size, bias="up_proj" in config.biased_projections
        )
        self.act_fn = LNFreeLeakyReLU(config) if config.hidden_act == "leaky_relu" else ACT2FN[config.hidden_act]
        self.down_proj = build_linear(
            config.intermediate_size, config.hidden_size, bias="down_proj" in config.biased_projections
        )

    def forward(self, hidden_states: torch.Tensor, negative_slope: torch.Tensor | None = None) -> torch.Tensor:
        # Compiled, ReLU's output and its view that down_proj keeps are two tensors to torch's partitioner, which then
        # stores a mask of the signs as well. In two dimensions, which hooks see then, they are one.
        input_shape = hidden_states.shape if torch.compiler.is_compiling() else None
        if input_shape is not None:
            hidden_states = hidden_states.flatten(0, -2)  # (B * T, D)
        hidden_states = self.up_proj(hidden_states)  # (B, T, F)
        # Learned slopes only
        if negative_slope is not None:
            hidden_states = self.act_fn(hidden_states, negative_slope)
        else:
            hidden_states = self.act_fn(hidden_states)
        hidden_states = self.down_proj(hidden_states)
        return hidden_states if input_shape is None else hidden_states.view(input_shape)


class LNFreeLeakyReLU(nn.Module):
    """Leaky ReLU with the config's slope, or with a learned one that the model passes down."""

    def __init__(self, config: LNFreeConfig):
        super().__init__()
        self.negative_slope = config.negative_slope

    def forward(self, hidden_states: torch.Tensor, negative_slope: torch.Tensor | None = None) -> torch.Tensor:
        if negative_slope is None:
            return nn.functional.leaky_relu(hidden_states, self.negative_slope)
        return nn.functional.prelu(hidden_states, negative_slope.to(hidden_states.dtype))


class LNFreeLearnedSlope(nn.Module):
    """The learned slopes of all layers: one that all share, or one a layer. A module, so that plans can name it."""

    def __init__(self, num_slopes: int):
        super().__init__()
        self.negative_slope = nn.Parameter(torch.empty(num_slopes))

    def forward(self, num_layers: int) -> tuple[torch.Tensor, ...]:
        slopes = self.negative_slope.split(1)  # (1,) each
        return slopes * (num_layers // len(slopes))


class LNFreeDecoderLayer(GradientCheckpointingLayer):
    """One block: attention and feed-forward layer, one after the other (GPT-2) or side by side (GPT-NeoX)."""

    def __init__(self, config: LNFreeConfig, layer_idx: int):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = build_norm(config, config.norm_type)
        self.self_attn = LNFreeAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.norm_type)
        self.mlp = LNFreeMLP(config)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        negative_slope: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, layer_past=layer_past, **kwargs
        )
        attn_output = self.hidden_dropout(attn_output)
        if self.parallel_residual:
            mlp_output = self.mlp(self.post_attention_layernorm(hidden_states), negative_slope)
            return hidden_states + attn_output + self.hidden_dropout(mlp_output)
        hidden_states = hidden_states + attn_output
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states), negative_slope)
        return hidden_states + self.hidden_dropout(mlp_output)


def build_norm(config: LNFreeConfig, norm_type: str) -> nn.Module:
    """`nn.LayerNorm` over the hidden size, or the identity for `norm_type="none"`."""
    if norm_type == "none":
        return nn.Identity()
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CrossEntropySum(torch.autograd.Function):
    """
    Sum of the cross-entropies, in nats, of `logits` `(N, vocab_size)` and `labels` `(N, 1)` where `kept` `(N, 1)`. In
    float32 or the logits' own type, whichever is the wider. torch's own keeps log-probabilities and makes two
    gradients of their size: this one goes through a few rows at a time, while the processor has them at hand, keeps
    nothing but the logits themselves, and makes one, softmax - one_hot.
    """

    CHUNK = 2**20  # entries: 4 MiB in float32
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor):
        wide = torch.promote_types(logits.dtype, torch.float32)
        parts = CrossEntropySum.split(logits, labels)
        picked = [chunk.log_softmax(-1, dtype=wide).gather(-1, label) for chunk, label in parts]
        return -torch.cat(picked).where(kept, 0).sum()

    @staticmethod
    def split(logits: torch.Tensor, *others: torch.Tensor):
        """The tensors' rows, `CHUNK` entries of the logits at a time."""
        rows = max(1, CrossEntropySum.CHUNK // logits.shape[-1])
        return zip(*(states.split(rows) for states in (logits, *others)), strict=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        logits, labels, kept = ctx.saved_tensors
        scale = grad_output * kept  # (N, 1)
        # the gradient of a gradient is wanted, or torch.func is at work: operations that autograd follows
        if torch.is_grad_enabled():
            probabilities = logits.softmax(-1, dtype=scale.dtype)
            return (probabilities * scale).scatter_add(-1, labels, -scale).to(logits.dtype), None, None
        grad_logits = torch.empty_like(logits)
        for chunk, grad, label, factor in CrossEntropySum.split(logits, grad_logits, labels, scale):
            grad.copy_(chunk.softmax(-1, dtype=scale.dtype).mul_(factor).scatter_add_(-1, label, -factor))
        return grad_logits, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        logits, labels, kept = ctx.saved_tensors
        wide = torch.promote_types(logits.dtype, torch.float32)
        mean = (logits.softmax(-1, dtype=wide) * tangent).sum(-1, keepdim=True)
        return (mean - tangent.gather(-1, labels)).where(kept, 0).sum()


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    transformers' `ForCausalLMLoss`, by `CrossEntropySum` on the CPU; the logits must stay as they are until the
    backward pass. Where kernels are fused (torch.compile, a GPU's log-softmax), and for other kinds of tensors
    (DTensor), it is transformers' own.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, seq_len, vocab_size)`).
        labels (`torch.LongTensor` of shape `(batch_size, seq_len)`): shifted here, unless `shift_labels` are given.

    Returns:
        The mean in nats over the tokens that are not `ignore_index`; or their sum over `num_items_in_batch`.

    Raises:
        ValueError: for another number of labels than of tokens.
    """
    if logits.device.type != "cpu" or type(logits) is not torch.Tensor or is_tracing(logits):
        return LOSS_MAPPING["ForCausalLM"](
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
        )
    targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    logits = logits.view(-1, vocab_size)
    if targets.numel() != len(logits):
        raise ValueError(f"labels must have one entry for each of the {len(logits)} tokens, got {targets.numel()}")
    targets = targets.reshape(-1, 1).to(logits.device)
    kept = targets != ignore_index
    loss = CrossEntropySum.apply(logits, targets.where(kept, 0), kept)
    return loss / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


class LNFreePreTrainedModel(PreTrainedModel):  # trf-ignore: TRF057
    config: LNFreeConfig
    config_class = LNFreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LNFreeDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LNFreeDecoderLayer, "attentions": LNFreeAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LNFreeLearnedSlope):
            init.constant_(module.negative_slope, self.config.negative_slope)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """
        As in `PreTrainedModel`. A checkpoint of the Trainer puts the model's code into the run's folder too: during
        training the Trainer pushes that folder, and takes the config and the weights into it, but no code.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        save_directory = Path(save_directory).absolute()
        is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", save_directory.name)
        if not (is_main_process and is_checkpoint and self.is_remote_code()):
            return
        for name in (Path(__file__).name, f"{LNFreeConfig.__module__.split('.')[-1]}.py"):
            source, target = Path(__file__).with_name(name), save_directory.with_name(name)
            # left alone where it is the same: an upload may be reading it
            if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
                shutil.copyfile(source, target)


class LNFreeModel(LNFreePreTrainedModel):  # trf-ignore: TRF057
    """
    The decoder without a head.

    Learned slopes live here and are passed down: `learned_slope.negative_slope` has one entry, shared by all layers,
    for `slope_sharing="global"`, and `num_hidden_layers` entries for `"layer"` (arXiv 2410.09637).
    """

    def __init__(self, config: LNFreeConfig):
        # fields may have been set since the config was made
        config.validate()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # CODEPATH: learned positions on the GPT-2 backbone, none on the Pythia backbone.
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # CODEPATH: SM+LR-global has one slope, SM+LR-layer one a layer, all other variants none.
        if config.slope_sharing is not None:
            # CODEPATH: SM+LR-global, else SM+LR-layer.
            num_slopes = 1 if config.slope_sharing == "global" else config.num_hidden_layers
            self.learned_slope = LNFreeLearnedSlope(num_slopes)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([LNFreeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = build_norm(config, config.final_norm_type)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`): tokens; or `inputs_embeds`, not both.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_len + seq_len)`): 1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`): counted from the cache's length by
                default. Positions that start again, with no mask and no cache, mark packed sequences that do not see
                each other.
            cache (`Cache`): keys and values of earlier tokens; `past_key_values` is its name before transformers 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, seq_len, hidden_size)`): in place of tokens.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, and for a position that the
                learned positions do not reach.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)

        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_len = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_len
            position_ids = position_ids.unsqueeze(0)  # (1, T)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )

        hidden_states = inputs_embeds
        position_embeddings = None
        # CODEPATH: learned positions on the GPT-2 backbone, rotary on the Pythia backbone.
        if self.config.position_embedding_type == "learned":
            self.check_positions(position_ids)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        else:
            position_embeddings = rotary_cos_sin(position_ids, self.config, hidden_states.dtype)
        hidden_states = self.embedding_dropout(hidden_states)

        slopes = [None] * len(self.layers)
        # CODEPATH: SM+LR-global and SM+LR-layer.
        if self.config.slope_sharing is not None:
            slopes = self.learned_slope(len(self.layers))
        for layer, slope in zip(self.layers, slopes, strict=True):
            hidden_states = layer(
                hidden_states,
                slope,
                attention_mask=causal_mask,
                layer_past=cache,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def check_positions(self, position_ids: torch.LongTensor):
        """Raises ValueError for a position past the learned ones, where reading it costs no synchronisation."""
        if position_ids.device.type != "cpu" or is_tracing(position_ids) or position_ids.numel() == 0:
            return
        first, last = int(position_ids.min()), int(position_ids.max())
        if first < 0:
            raise ValueError(f"position_ids must not be negative, got {first}")
        if last >= self.config.max_position_embeddings:
            raise ValueError(
                f"position {last} is past the learned positions: the sequence may be at most "
                f"max_position_embeddings={self.config.max_position_embeddings} tokens long"
            )


class LNFreeForCausalLM(LNFreePreTrainedModel, GenerationMixin):  # trf-ignore: TRF057
    """The decoder with a language-modelling head, tied to the token embedding for `tie_word_embeddings=True`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        self.model = LNFreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, seq_len)`): tokens to predict, shifted inside; -100 is
                ignored. `num_items_in_batch` among the keywords makes gradient accumulation exact.
            logits_to_keep (`int` or `torch.Tensor`): the last so many positions, or the positions (1-D); 0 keeps all.

        Returns:
            `CausalLMOutputWithPast` with `loss` in nats per token and `logits` `(batch_size, kept, vocab_size)`.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )


class LNFreeForSequenceClassification(LNFreePreTrainedModel):  # trf-ignore: TRF057
    """The decoder with a linear head on each sequence's last token that is not padding, on whichever side that is."""

    # The loss is a mean over sequences; the Trainer then divides by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LNFreeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels (`torch.Tensor` of shape `(batch_size,)`): classes, or values for `problem_type="regression"`; of
                shape `(batch_size, num_labels)` for `"multi_label_classification"`.

        Returns:
            `SequenceClassifierOutputWithPast` with `logits` of shape `(batch_size, num_labels)`.

        Raises:
            ValueError: for several sequences with neither an attention mask nor a `pad_token_id` to tell padding by.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, D)
        last_token = self.last_token_index(hidden_states, input_ids, attention_mask)  # (B,)
        batch_index = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.score(self.dropout(hidden_states[batch_index, last_token]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )

    def last_token_index(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """Index of each sequence's last token that is not padding, shape `(batch_size,)`."""
        batch_size, seq_len = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            is_token = attention_mask[:, -seq_len:]
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        elif batch_size == 1:
            is_token = hidden_states.new_ones(1, seq_len)
        else:
            raise ValueError(
                f"{batch_size} sequences need an attention_mask, or input_ids and a config.pad_token_id, to find the "
                f"last token that is not padding, got neither (input_ids {'missing' if input_ids is None else 'given'}"
                f", pad_token_id={self.config.pad_token_id})"
            )
        positions = torch.arange(seq_len, device=hidden_states.device)
        return (positions * is_token.to(positions)).argmax(-1)


class LNFreeForTokenClassification(LNFreePreTrainedModel):  # trf-ignore: TRF057
    """The decoder with a linear head on every token; a token's class is told from it and what stands before it."""

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LNFreeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, seq_len)`): classes of the tokens, not shifted; -100 is
                ignored. `num_items_in_batch` among the keywords makes gradient accumulation exact.

        Returns:
            `TokenClassifierOutput` with `loss` in nats per token and `logits` `(batch_size, seq_len, num_labels)`.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LNFreePreTrainedModel",
    "LNFreeModel",
    "LNFreeForCausalLM",
    "LNFreeForSequenceClassification",
    "LNFreeForTokenClassification",
]
