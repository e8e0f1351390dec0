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
Which parts of a model of this family make its logits: what each part adds to one, and what the residual stream says
layer by layer. Not on the Hub.

Without a final norm a logit is a sum: what the embeddings, heads, feed-forward layers and biases write to the residual
stream, each times the residual gains behind it, read by the token's row of the output projection. A final norm divides
the sum by its own size, and no part has a share of that; held at the value that it has, it is a scale like any other
(`linearize`), but what then stands for a part is not what its removal takes away.

Shapes: B batch, T positions, L layers, H heads, F feed-forward width, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .metrics.attention_entropy.reading import inner_model


@dataclass(frozen=True)
class LogitAttribution:
    """
    What the parts of a model add to one logit at every position, or to the difference of two, in float64 on the CPU.

    Attributes:
        logits (`torch.Tensor` of shape `(B, T)`): the model's logit of each position's target, less that of the token
            against it if there is one.
        targets (`torch.LongTensor` of shape `(B, T)`): the tokens that these are of.
        token, position (`torch.Tensor` of shape `(B, T)`): of the embeddings; 0 for positions that are not learned.
        heads (`torch.Tensor` of shape `(L, H, B, T)`), mlps and biases (`(L, B, T)`): of heads, of feed-forward layers
            with their biases, and of the biases of attention's output projections.
        neurons (`torch.Tensor` of shape `(L, F, B, T)`, *optional*): of the feed-forward layers' neurons. A layer's
            are its entry of `mlps` but for the output projection's bias.
        final_bias (`torch.Tensor` of shape `(B, T)`): of the final norm's bias.
        effects (`dict[str, torch.Tensor]`): by the name of a part, for a final norm that was held: by how much the
            logit falls when the part is taken out of the stream and the norm computed anew, `(B, T)`.
    """

    logits: Tensor
    targets: Tensor
    token: Tensor
    position: Tensor
    heads: Tensor
    mlps: Tensor
    biases: Tensor
    final_bias: Tensor
    neurons: Tensor | None = None
    effects: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Tensor]:
        """All of them by name, each `(B, T)`; their sum is `logits`, up to the rounding of the model."""
        parts = {"token embedding": self.token, "position embedding": self.position}
        for layer, (heads, bias, mlp) in enumerate(zip(self.heads, self.biases, self.mlps, strict=True)):
            parts |= {f"layer {layer} head {head}": part for head, part in enumerate(heads)}
            parts |= {f"layer {layer} attention bias": bias, f"layer {layer} MLP": mlp}
        return {**parts, "final norm's bias": self.final_bias}

    @property
    def total(self) -> Tensor:
        """The sum of all parts, `(B, T)`."""
        return torch.stack(list(self.parts.values())).sum(0)

    @property
    def error(self) -> float:
        """
        What holding the norm gets wrong, as a share: over all parts and positions, the sum of |part - effect| over the
        sum of |effect|. 0 without a final norm.
        """
        parts = self.parts
        wrong = sum((parts[name] - effect).abs().sum().item() for name, effect in self.effects.items())
        return wrong / sum(effect.abs().sum().item() for effect in self.effects.values()) if self.effects else 0.0


@torch.no_grad()
def attribute_logits(
    model: nn.Module,
    input_ids: Tensor,
    targets: int | Tensor | None = None,
    *,
    against: int | Tensor | None = None,
    neurons: bool = False,
    linearize: bool = False,
    attention_mask: Tensor | None = None,
) -> LogitAttribution:
    """
    Splits a logit of every position into what each part of the model adds to it: direct logit attribution.

    Args:
        model: an `LNFreeForCausalLM` in evaluation mode, on any backbone; norms before the branches do not matter.
        input_ids (`torch.LongTensor` of shape `(B, T)`): the tokens.
        targets (`int` or `torch.LongTensor` of shape `(B, T)`): whose logits are split; by default the likeliest at
            each position.
        against: tokens whose logits are subtracted.
        neurons: whether to split the feed-forward layers too.
        linearize: holds a final norm at the scale that it has on these tokens (for DyT and Derf, entry by entry), and
            measures by `effects` what that gets wrong.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 0 for padding, on either side.

    Raises:
        ValueError: for a model in training mode or of another family; where a norm stands between the parts and the
            logits; for tokens that the model does not know; and for a model whose parts do not add up to its logits,
            because an adapter or a quantization computes beside its weights.
    """
    lm = family_model(model)
    config, body = lm.config, lm.model
    _check_norms(config, linearize)
    if neurons and any(layer.mlp_type == "fused" for layer in config.per_layer_config):
        raise ValueError("neurons=True needs feed-forward layers with an activation; mlp_type='fused' has none")
    with _recording(lm) as seen:
        logits = lm(input_ids, use_cache=False, **_padded(attention_mask)).logits
    targets = logits.argmax(-1) if targets is None else _tokens("targets", targets, logits)
    read = _wide(lm.lm_head.weight[targets])  # (B, T, D), the direction of the logit
    picked = _wide(logits.gather(-1, targets[..., None])[..., 0])
    if against is not None:
        others = _tokens("against", against, logits)
        read = read - _wide(lm.lm_head.weight[others])
        picked = picked - _wide(logits.gather(-1, others[..., None])[..., 0])
    read = read * config.logits_multiplier
    norm = deepcopy(body.norm).to("cpu", torch.float64)
    stream = _wide(seen[body.norm].input)
    direction, final_bias = _hold(config.final_norm_type, norm, stream, read)

    scales = _scales(lm)
    token = _wide(body.embed_tokens(input_ids)) * config.embedding_multiplier * scales.start
    # the whole of the stream's start, less the tokens'
    position = _wide(seen[body.embedding_dropout].output) * scales.start - token
    layers = list(zip(body.layers, scales.attention, scales.mlp, strict=True))
    effects = {}
    if linearize and config.final_norm_type != "none":
        normed, written = norm(stream), [("token embedding", token), ("position embedding", position)]
        for name, vector in chain(written, _vectors(layers, seen, config)):
            effects[name] = ((normed - norm(stream - vector)) * read).sum(-1)
    split = [
        (
            attention * _heads(layer, seen, direction, config),
            attention * (_bias(layer, token) * direction).sum(-1),
            (mlp * _wide(seen[layer.mlp].output) * direction).sum(-1),
        )
        for layer, attention, mlp in layers
    ]
    heads, biases, mlps = (torch.stack(parts) for parts in zip(*split, strict=True))
    hidden = [mlp * _neurons(layer.mlp, seen, direction, config) for layer, _, mlp in layers if neurons]
    attribution = LogitAttribution(
        logits=picked,
        targets=targets.cpu(),
        token=(token * direction).sum(-1),
        position=(position * direction).sum(-1),
        heads=heads,
        mlps=mlps,
        biases=biases,
        final_bias=(read * final_bias).sum(-1),
        neurons=torch.stack(hidden) if neurons else None,
        effects=effects,
    )
    _check_sum(attribution, lm)
    return attribution


@dataclass(frozen=True)
class LogitLens:
    """
    What a model would say if the layers behind a place wrote nothing more; row 0 is before the first layer.

    Attributes:
        tokens (`torch.LongTensor` of shape `(L + 1, B, T)`): the likeliest next token.
        probabilities (`torch.Tensor` of shape `(L + 1, B, T)`): its probability.
        divergences (`torch.Tensor` of shape `(L + 1, B, T)`): from what the model says in the end, KL(end || here), in
            nats.
    """

    tokens: Tensor
    probabilities: Tensor
    divergences: Tensor


@torch.no_grad()
def logit_lens(model: nn.Module, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> LogitLens:
    """
    Reads the residual stream before and behind every layer by the final norm and the output projection.

    Args:
        model: an `LNFreeForCausalLM` in evaluation mode. Residual gains of the skips behind a place are applied.
        input_ids (`torch.LongTensor` of shape `(B, T)`): the tokens.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 0 for padding, on either side.

    Raises:
        ValueError: for a model in training mode or of another family.
    """
    lm = family_model(model)
    body = lm.model
    with _recording(lm) as seen:
        last = lm(input_ids, use_cache=False, **_padded(attention_mask)).logits.float().log_softmax(-1)
    streams = [seen[module].output for module in (body.embedding_dropout, *body.layers)]
    tokens, probabilities, divergences = [], [], []
    for stream, skips in zip(streams, _scales(lm).skips, strict=True):
        logits = lm.logits_scale(lm.lm_head(body.norm((stream * skips).to(stream.dtype))))
        here = logits.float().log_softmax(-1)  # (B, T, V)
        likeliest = here.max(-1)
        tokens.append(likeliest.indices.cpu())
        probabilities.append(likeliest.values.exp().cpu())
        divergences.append((last.exp() * (last - here)).sum(-1).cpu())
    return LogitLens(torch.stack(tokens), torch.stack(probabilities), torch.stack(divergences))


# ---- what they share


@dataclass
class _Seen:
    """What a module got and gave."""

    input: Tensor
    output: Tensor


@contextmanager
def _recording(model: Any) -> Iterator[dict[nn.Module, _Seen]]:
    """What the modules that matter get and give in the forward pass within."""
    body, seen = model.model, {}

    def keep(module: nn.Module, args: tuple, output: Tensor):
        seen[module] = _Seen(args[0], output)

    modules = [body.embedding_dropout, body.norm, *body.layers, *(layer.mlp for layer in body.layers)]
    modules += [layer.self_attn.o_proj for layer in body.layers]
    modules += [layer.mlp.down_proj for layer in body.layers if hasattr(layer.mlp, "down_proj")]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield seen


def family_model(model: nn.Module) -> Any:
    """The language model of this family in a wrapper. Raises ValueError for another, and one in training mode."""
    inner: Any = inner_model(model)
    if inner.config.model_type != "lnfree" or not hasattr(inner, "lm_head"):
        raise ValueError(
            f"model must be an LNFreeForCausalLM, got {type(inner).__name__}; `lnfree import` makes one of a GPT-2, "
            "GPT-NeoX, Llama, Mistral or Qwen, with equal logits"
        )
    if inner.training:
        raise ValueError("model must be in evaluation mode, without dropout: call model.eval() first")
    return inner


def _padded(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """What a forward pass is told of padding: as in generation, the first token of a text is at position 0."""
    if attention_mask is None:
        return {}
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask, "position_ids": position_ids}


def _check_norms(config, linearize: bool):
    """Raises ValueError, with the field and the reason, where a norm mixes what the parts have written."""
    for index, layer in enumerate(config.per_layer_config):
        if layer.norm_position != "pre" and config.norm_type != "none":
            raise ValueError(
                f"norm_position={layer.norm_position!r} in layer {index}: a norm stands behind what its parts write, "
                "and no part has a share of what comes out of it; logits can be split where norms stand before the "
                "branches ('pre')"
            )
    if config.final_norm_type != "none" and not linearize:
        raise ValueError(
            f"final_norm_type={config.final_norm_type!r}: the final norm divides the sum of all parts by its size, "
            "and no part has a share of that; linearize=True holds the norm at its value on these tokens, and says "
            "what that gets wrong"
        )


def _tokens(name: str, given: int | Tensor, logits: Tensor) -> Tensor:
    """Token ids by position."""
    tokens = torch.as_tensor(given, device=logits.device)
    known = logits.shape[-1]
    if tokens.dtype != torch.long or tokens.numel() == 0 or not 0 <= tokens.min() <= tokens.max() < known:
        raise ValueError(f"{name} must be token ids from 0 to {known - 1}, got {given}")
    if tokens.ndim not in (0, 2) or tokens.ndim == 2 and tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"{name} must be one token, or tokens of shape {tuple(logits.shape[:2])}, got {tuple(tokens.shape)}"
        )
    return tokens.expand(logits.shape[:2])


def _wide(tensor: Tensor) -> Tensor:
    """In float64 on the CPU, which every machine has."""
    return tensor.detach().to("cpu", torch.float64)


def by_head(states: Tensor, config) -> Tensor:
    return states.unflatten(-1, (config.num_attention_heads, -1))


def _weight(projection: Any, config) -> Tensor:
    """What a projection multiplies rows by, `(in, out)`; it may be an identity."""
    if isinstance(projection, nn.Identity):
        return torch.eye(config.hidden_size, dtype=torch.float64)
    return _wide(projection.weight).T


def _heads(layer: Any, seen: dict[nn.Module, _Seen], direction: Tensor, config) -> Tensor:
    """What each head adds, `(H, B, T)`."""
    output = layer.self_attn.o_proj
    along = by_head(direction @ _weight(output, config).T, config)  # (B, T, H, d)
    return (by_head(_wide(seen[output].input), config) * along).sum(-1).permute(2, 0, 1)


def _bias(layer: Any, like: Tensor) -> Tensor:
    """That of the output projection at every position, `(B, T, D)`; 0 where it has none."""
    bias = getattr(layer.self_attn.o_proj, "bias", None)
    return torch.zeros_like(like) if bias is None else _wide(bias).expand_as(like)


def _vectors(
    layers: list[tuple[Any, float, float]], seen: dict[nn.Module, _Seen], config
) -> Iterator[tuple[str, Tensor]]:
    """What heads and feed-forward layers have in the stream at its end, by their names, `(B, T, D)` each."""
    for index, (layer, attention, mlp) in enumerate(layers):
        output = layer.self_attn.o_proj
        states = by_head(_wide(seen[output].input), config)  # (B, T, H, d)
        matrices = _weight(output, config).unflatten(0, (config.num_attention_heads, -1))  # (H, d, D)
        for head, matrix in enumerate(matrices):
            yield f"layer {index} head {head}", attention * (states[:, :, head] @ matrix)
        yield f"layer {index} MLP", mlp * _wide(seen[layer.mlp].output)


def _neurons(mlp: Any, seen: dict[nn.Module, _Seen], direction: Tensor, config) -> Tensor:
    """What each neuron adds, `(F, B, T)`; 0 where there is no feed-forward layer."""
    if not hasattr(mlp, "down_proj"):
        return direction.new_zeros(config.intermediate_size, *direction.shape[:2])
    along = direction @ _weight(mlp.down_proj, config).T
    return (_wide(seen[mlp.down_proj].input) * along).permute(2, 0, 1)


@dataclass
class _Scales:
    """
    What residual gains make of what is written, on its way to the end: of the stream's start, of attention and of the
    feed-forward layer of each layer; and of the stream before and behind each layer, L + 1.
    """

    start: float
    attention: list[float]
    mlp: list[float]
    skips: list[float]


def _scales(model: Any) -> _Scales:
    attention, mlp, skips = [], [], [1.0]
    for layer, own in zip(reversed(model.model.layers), reversed(list(model.config.per_layer_config)), strict=True):
        gains = layer.residual_gains
        # attention's two, and two for an MLP that may not be there
        values = [1.0, 1.0] if gains is None else gains.tolist()
        past_attention, branch, past_mlp, mlp_branch = [*values, 1.0, 1.0][:4]
        attention.append(branch * past_mlp * skips[-1])
        mlp.append(mlp_branch * skips[-1] if own.mlp_type != "none" else 0.0)
        skips.append(past_attention * past_mlp * skips[-1])
    return _Scales(skips[-1], attention[::-1], mlp[::-1], skips[::-1])


def _hold(norm_type: str, norm: Any, stream: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """
    A final norm that keeps the scale that it has on `stream`: the direction in which `read` reads the stream before
    it, and what it adds of its own, both `(B, T, D)`.
    """
    if norm_type == "none":
        return read, torch.zeros_like(read)
    if norm_type == "rmsnorm":
        return read * norm.weight * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + norm.eps), torch.zeros_like(
            read
        )
    if norm_type == "layernorm":
        deviation = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        direction = read * norm.weight / deviation
        # which its mean is taken from, as from the stream
        return direction - direction.mean(-1, keepdim=True), norm.bias.expand_as(read)
    # DyT and Derf act on each entry: the slope of the line from 0 to it
    zero = norm(torch.zeros_like(stream))
    return read * ((norm(stream) - zero) / stream).nan_to_num(), zero


def _check_sum(attribution: LogitAttribution, model: Any):
    """Raises ValueError if the model computes what its weights do not say."""
    size = torch.stack([part.abs() for part in attribution.parts.values()]).sum(0)
    wrong = (attribution.total - attribution.logits).abs()
    # also for NaN
    if not (wrong <= torch.finfo(model.dtype).eps ** 0.5 * size).all():
        raise ValueError(
            f"the parts add up to logits that are wrong by up to {wrong.max():.3g}: the model computes something "
            "beside its weights, such as an adapter that is not merged or a quantization, or its stream is no sum of "
            "what the parts write, or its logits are not finite"
        )
