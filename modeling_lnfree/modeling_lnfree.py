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
LNFree: decoder-only transformers with and without LayerNorm (arXiv 2410.09637), on the GPT-2, GPT-NeoX and Llama
backbones.

Attention, block, decoder, heads, from top to bottom. What the variants differ in are rows of the tables in
`parts_lnfree.py`, looked up when a module is built; no forward pass asks the config.

Shapes in the comments: B batch, T queries, S keys, D hidden size, H heads, d head dimension, F feed-forward width.

Where mlinter's TRF057 is switched off: `auto_docstring` finds a model's name by its path inside transformers, and
prints errors on the terminal of whoever loads it from anywhere else. The docstrings here are written by hand.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.processing_utils import Unpack
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lnfree import ATTENTION_PROJECTIONS, EXACT_ATTENTION, LNFreeConfig
from .parts_lnfree import (
    MLPS,
    NORMS,
    POSITIONS,
    ROTARY,
    ROTATIONS,
    SLOPES,
    WIRINGS,
    LNFreeClipping,
    LNFreeHeadGate,
    LNFreeScaledRotary,
    LNFreeSoftCap,
    LNFreeUniform,
    add,
    add_nothing,
    add_scaled,
    build_gains,
    build_head_norm,
    build_linear,
    build_optional,
    build_scale,
    divide_by_temperature,
    eager_attention_forward,
    fill,
    keep,
    keep_heads,
    shape_heads,
)


# transformers 5.24 renamed `past_key_values` to `cache`, in arguments, outputs and mask builders alike. A model that
# takes the wrong one generates from an empty cache without an error, so every forward takes both, with a warning where
# transformers' own models have it.
RENAMED = "cache" in inspect.signature(create_causal_mask).parameters
CACHE_NAME = "cache" if RENAMED else "past_key_values"
rename_cache: Callable = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache") if RENAMED else keep


class LNFreeAttention(nn.Module):
    """Causal multi-head self-attention, computed by the implementation that the config names."""

    def __init__(self, config: LNFreeConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        heads = config.num_attention_heads
        kv_heads: int = config.num_key_value_heads  # type: ignore[assignment]  # the config fills both in
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        self.config = config  # the model's, whose attention implementation may be changed
        self.layer_idx = layer_idx
        self.num_key_value_groups = heads // kv_heads
        self.scaling = config.attention_multiplier or self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = build_linear(layer, "q_proj", config.hidden_size, heads * self.head_dim)
        self.k_proj = build_linear(layer, "k_proj", config.hidden_size, kv_heads * self.head_dim)
        self.v_proj = build_linear(layer, "v_proj", config.hidden_size, kv_heads * self.head_dim)
        self.o_proj = build_linear(layer, "o_proj", heads * self.head_dim, config.hidden_size)
        self.q_norm, self.k_norm, self.v_norm = (build_head_norm(config, name) for name in ATTENTION_PROJECTIONS[:3])
        self.rotate = ROTATIONS[config.position_embedding_type]
        self.cap = build_optional(LNFreeSoftCap, config.attn_logit_softcapping)
        self.clip = build_optional(LNFreeClipping, config.softmax_clipping)
        # what implementations that cap or clip themselves are told; eager attention has the two modules above
        options = {"softcap": config.attn_logit_softcapping, "softmax_clipping": config.softmax_clipping}
        self.options = {name: value for name, value in options.items() if value is not None}
        self.starts = {}
        self.cool: Callable[..., torch.Tensor] = keep
        self.temperature: nn.Parameter | None = None
        # CODEPATH: a temperature for each head (AERO).
        if config.softmax_temperature is not None:
            self.cool, self.temperature = divide_by_temperature, nn.Parameter(torch.empty(heads))
            self.starts["temperature"] = partial(init.constant_, val=config.softmax_temperature)
        self.mix_heads: Callable[..., torch.Tensor] = keep_heads
        self.attention_gains: nn.Parameter | None = None
        # CODEPATH: shaped attention (SAS, SAS-P, V-SkipInit, Shaped).
        if config.attention_gains is not None:
            self.mix_heads, self.attention_gains = shape_heads, nn.Parameter(torch.empty(3, heads))
            self.starts["attention_gains"] = partial(fill, values=config.attention_gains)
            self.uniform = LNFreeUniform(self)
        self.head_gate = build_optional(partial(LNFreeHeadGate, config), config.attention_gate_init)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, ...] = (),
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)  # (B, H, T, d)
        key_states = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        own_states = self.v_norm(self.v_proj(hidden_states).view(head_shape)).transpose(1, 2)
        query_states = self.cool(self.rotate(query_states, *position_embeddings), self.temperature)
        key_states = self.rotate(key_states, *position_embeddings)

        value_states = own_states
        if layer_past is not None:
            # the paged cache of `generate_batch` finds in the keywords where to read and write
            key_states, value_states = layer_past.update(
                key_states, own_states, self.layer_idx, kwargs=kwargs
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
            **self.options,
            **kwargs,
        )  # (B, T, H, d)

        def uniform() -> torch.Tensor:
            queries = torch.zeros_like(query_states)
            return attention_interface(
                self.uniform, queries, key_states, value_states, attention_mask, scaling=self.scaling, **kwargs
            )[0]

        attn_output = self.mix_heads(self.attention_gains, attn_output, own_states, uniform)
        attn_output = self.head_gate(attn_output, hidden_states)
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1))  # (B, T, D)
        return attn_output, attn_weights


class LNFreeDecoderLayer(GradientCheckpointingLayer):
    """One block: attention and feed-forward layer, wired and normed as the config says."""

    def __init__(self, config: LNFreeConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.wire, norms = WIRINGS[layer.norm_position, config.parallel_residual]
        around_attention, around_mlp = config.norm_alphas
        has_mlp, gains = layer.mlp_type != "none", layer.residual_gains

        def norm(name: str, alpha: float, is_there: bool = True) -> nn.Module:
            norm_type = config.norm_type if name in norms and is_there else "none"
            return NORMS[norm_type](config.hidden_size, config.layer_norm_eps, alpha)

        self.input_layernorm = norm("input_layernorm", around_attention)
        self.self_attn = LNFreeAttention(config, layer_idx)
        self.attention_output_norm = norm("attention_output_norm", around_attention)
        self.post_attention_layernorm = norm("post_attention_layernorm", around_mlp, has_mlp)
        self.mlp = MLPS[layer.mlp_type](layer)
        self.mlp_output_norm = norm("mlp_output_norm", around_mlp, has_mlp)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)
        self.add_attn = add if gains is None else add_scaled
        self.add_mlp = self.add_attn if has_mlp else add_nothing
        self.residual_gains = build_gains(gains, config.residual_gains_trainable)
        self.starts = {} if gains is None else {"residual_gains": partial(fill, values=gains)}

    def forward(
        self,
        hidden_states: torch.Tensor,
        negative_slope: tuple[torch.Tensor, ...] = (),
        attention_mask: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        def attn(states):
            output, _ = self.self_attn(states, attention_mask=attention_mask, layer_past=layer_past, **kwargs)
            return self.hidden_dropout(output)

        def mlp(states):
            return self.hidden_dropout(self.mlp(states, *negative_slope))

        def add_attn(x, branch):
            return self.add_attn(self.residual_gains, 0, x, branch)

        def add_mlp(x, branch):
            return self.add_mlp(self.residual_gains, 2, x, branch)

        return self.wire(self, hidden_states, attn, mlp, add_attn, add_mlp)


class LNFreePreTrainedModel(PreTrainedModel):  # trf-ignore: TRF057
    config: LNFreeConfig
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
        for name, start in getattr(module, "starts", {}).items():
            start(getattr(module, name))

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """transformers' own choice; where none is named, one that computes all that the config says."""
        if requested_attention is not None:
            self.config.check_attention_implementation(requested_attention)
        elif any(getattr(self.config, name) is not None for name in EXACT_ATTENTION):
            requested_attention = "eager"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def save_pretrained(self, save_directory, **kwargs):
        """
        As in `PreTrainedModel`. During training the Trainer pushes its run's folder, into which it takes config and
        weights of the checkpoint, but not the model's code. Its checkpoints (it alone hands a `state_dict` over with
        them) put the code there too, where none is.
        """
        super().save_pretrained(save_directory, **kwargs)
        path, is_checkpoint = Path(save_directory), "state_dict" in kwargs
        if is_checkpoint and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name):
            if not any(path.parent.glob("*_lnfree.py")):
                custom_object_save(self, path.parent)


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
        # CODEPATH: learned positions on the GPT-2 backbone, rotary ones on those of Pythia and Llama.
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary = ROTARY.get(config.rope_type, LNFreeScaledRotary)(config)
        self.add_positions = POSITIONS[config.position_embedding_type]
        self.embedding_scale = build_scale(config.embedding_multiplier)
        self.learned_slope = SLOPES[config.slope_sharing](config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([LNFreeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        alpha = config.norm_alphas[1]
        self.norm = NORMS[config.final_norm_type](config.hidden_size, config.layer_norm_eps, alpha)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @rename_cache
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
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
                default. Positions that start again, with neither a mask nor a cache given, mark packed sequences that
                do not see each other.
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
        # of those alone it is asked whether they start again, which reads a number from the device
        given_position_ids = position_ids
        if position_ids is None:
            past_len = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_len
            position_ids = position_ids.unsqueeze(0)  # (1, T)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=given_position_ids,
            **{CACHE_NAME: cache},
        )
        # behind the mask, for which a cache means that sequences are not packed
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states, position_embeddings = self.add_positions(self, inputs_embeds, position_ids)
        hidden_states = self.embedding_dropout(self.embedding_scale(hidden_states))
        for layer, negative_slope in zip(self.layers, self.learned_slope(), strict=True):
            hidden_states = layer(
                hidden_states,
                negative_slope,
                attention_mask=causal_mask,
                layer_past=cache,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


class LNFreeForCausalLM(LNFreePreTrainedModel, GenerationMixin):  # trf-ignore: TRF057
    """The decoder with a language-modeling head, tied to the token embedding for `tie_word_embeddings=True`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        self.model = LNFreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.logits_scale = build_scale(config.logits_multiplier)
        self.post_init()

    @can_return_tuple
    @rename_cache
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
        logits = self.logits_scale(self.lm_head(outputs.last_hidden_state[:, kept, :]))
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


class LNFreeClassifier(LNFreePreTrainedModel):  # trf-ignore: TRF057
    """What the two classifiers share: the decoder, and a linear head on the states that `pool` picks."""

    has_bias: bool
    output_type: type
    # what the output takes over from the decoder's
    passed_on: tuple[str, ...] = ("hidden_states", "attentions")

    def __init__(self, config: LNFreeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LNFreeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.has_bias)
        self.post_init()

    @can_return_tuple
    @rename_cache
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast | TokenClassifierOutput:
        """Arguments of `LNFreeModel.forward`, and `labels`; see the two classes."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = self.pool(outputs.last_hidden_state, input_ids, attention_mask)
        logits = self.score(self.dropout(states))
        loss = None
        if labels is not None:
            loss = self.compute_loss(logits, labels, **kwargs)
        return self.output_type(loss=loss, logits=logits, **{name: outputs.get(name) for name in self.passed_on})

    def pool(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """The states to classify, of the final ones, shape `(batch_size, seq_len, hidden_size)`: all of them."""
        return hidden_states

    def compute_loss(self, logits, labels, **kwargs) -> torch.Tensor:
        return self.loss_function(logits, labels, self.config, **kwargs)


class LNFreeForSequenceClassification(LNFreeClassifier):  # trf-ignore: TRF057
    """
    The decoder with a linear head on each sequence's last token that is not padding, on whichever side that is.

    `labels`, of shape `(batch_size,)`, are classes, or values for `problem_type="regression"`; of shape
    `(batch_size, num_labels)` for `"multi_label_classification"`. The output has `logits` of shape
    `(batch_size, num_labels)`. Several sequences with neither an attention mask nor a `pad_token_id` to tell padding
    by are a ValueError.
    """

    has_bias = False
    output_type = SequenceClassifierOutputWithPast
    passed_on = (CACHE_NAME, "hidden_states", "attentions")
    # The loss is a mean over sequences; the Trainer then divides by the accumulation steps itself.
    accepts_loss_kwargs = False

    def compute_loss(self, logits, labels, **kwargs) -> torch.Tensor:
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

    def pool(self, hidden_states, input_ids, attention_mask) -> torch.Tensor:
        """The state of each sequence's last token that is not padding, shape `(batch_size, hidden_size)`."""
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
        last_token = (positions * is_token.to(positions)).argmax(-1)  # (B,)
        return hidden_states[torch.arange(batch_size, device=hidden_states.device), last_token]


class LNFreeForTokenClassification(LNFreeClassifier):  # trf-ignore: TRF057
    """
    The decoder with a linear head on every token; a token's class is told from it and what stands before it.

    `labels`, of shape `(batch_size, seq_len)`, are the tokens' classes, not shifted; -100 is ignored. The output has
    `loss` in nats per token, where `num_items_in_batch` among the keywords makes gradient accumulation exact, and
    `logits` of shape `(batch_size, seq_len, num_labels)`.
    """

    has_bias = True
    output_type = TokenClassifierOutput


# What libraries decide by a class's name, they look up in these: the Trainer whether label smoothing shifts the
# labels, pipelines whether they know the model, cards what it is for. Of remote code no one else tells them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["lnfree"] = "LNFreeForCausalLM"
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["lnfree"] = "LNFreeForSequenceClassification"
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["lnfree"] = "LNFreeForTokenClassification"

__all__ = [
    "LNFreePreTrainedModel",
    "LNFreeModel",
    "LNFreeForCausalLM",
    "LNFreeForSequenceClassification",
    "LNFreeForTokenClassification",
]
