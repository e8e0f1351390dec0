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
What a part of a model does to a metric, by exchanging what it writes for what it writes on another text: for real, one
part at a time, and by one backward pass for all parts at once. Not on the Hub.

Shapes: B batch, T positions, L layers, H heads, d head dimension, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attribution import by_head, family_model


@dataclass(frozen=True)
class PatchingScores:
    """
    By how much a metric of the clean run changes if a part gives what it gives in the corrupted one; or what one
    backward pass says of it. Both say nothing of what is not exchanged: attention patterns, the stream as a whole.

    Attributes:
        heads (`torch.Tensor` of shape `(L, H, B, T)`): of the output of a head at a position.
        mlps (`torch.Tensor` of shape `(L, B, T)`): of the output of a feed-forward layer at a position.
        clean, corrupted (`torch.Tensor` of shape `(B,)`): the metric of both runs.
    """

    heads: Tensor
    mlps: Tensor
    clean: Tensor
    corrupted: Tensor

    def error(self, real: "PatchingScores") -> float:
        """The sum of |score - real score| over all parts and positions, as a share of the sum of |real score|."""
        pairs = ((self.heads, real.heads), (self.mlps, real.mlps))
        wrong = sum((ours - theirs).abs().sum().item() for ours, theirs in pairs)
        whole = sum(theirs.abs().sum().item() for _, theirs in pairs)
        if not whole:
            # as between a text and itself
            return math.inf if wrong else 0.0
        return wrong / whole


# logits (B, T, V) -> (B,)
Metric = Callable[[Tensor], Tensor]


def attribution_patching(
    model: nn.Module, clean_ids: Tensor, corrupted_ids: Tensor, metric: Metric | None = None
) -> PatchingScores:
    """
    The first-order estimate of `activation_patching` for all heads, feed-forward layers and positions: the change of
    an output, times the gradient of the metric in the clean run, so two forward passes and a backward one.

    Args:
        model: an `LNFreeForCausalLM` in evaluation mode, of any design.
        clean_ids, corrupted_ids (`torch.LongTensor` of shape `(B, T)`): pairs of texts, token by token.
        metric: logits `(B, T, V)` -> `(B,)`; by default the logit at the last position of the token that is likeliest
            there in the clean run, less that of the one likeliest in the corrupted run.

    Raises:
        ValueError: for a model in training mode or of another family, texts of unequal shapes, and a pair of texts
            with one likeliest token where no metric is given.
    """
    lm, metric, outputs, values = _two_runs(model, clean_ids, corrupted_ids, metric)
    # what is added to an output and is 0 has its gradient, though the weights may have none
    added = {site: torch.zeros_like(states, requires_grad=True) for site, states in outputs.items()}
    with torch.enable_grad(), _changing(lm, added, lambda states, zeros: states + zeros) as clean_outputs:
        total = metric(lm(clean_ids, use_cache=False).logits).sum()
        # a layer without an MLP has an output that nothing reads
        gradients = torch.autograd.grad(total, list(added.values()), allow_unused=True, materialize_grads=True)
    scores = {
        site: (outputs[site].double() - clean_outputs[site].detach().double()) * gradient.double()
        for site, gradient in zip(added, gradients, strict=True)
    }
    return _scores(lm, {site: score.cpu() for site, score in scores.items()}, *values)


@torch.no_grad()
def activation_patching(
    model: nn.Module, clean_ids: Tensor, corrupted_ids: Tensor, metric: Metric | None = None
) -> PatchingScores:
    """
    Patches for real: in the clean run one head's, or one feed-forward layer's, output at one position is exchanged for
    that of the corrupted run, and the model goes on from there. All positions of a part go in one forward pass of
    `B * T` rows, so this is for small models and short texts.

    Args: as of `attribution_patching`.

    Raises:
        ValueError: as there.
    """
    lm, metric, outputs, values = _two_runs(model, clean_ids, corrupted_ids, metric)
    batch, length = clean_ids.shape
    rows = clean_ids.repeat(length, 1)  # (T * B, T): every position's own copy of the batch
    exchanged = torch.eye(length, dtype=torch.bool, device=clean_ids.device).repeat_interleave(batch, 0)[..., None]
    clean = values[0]

    def change(site: nn.Module, kept: Tensor) -> Tensor:
        # of the columns that are not kept, (B, T)
        theirs = outputs[site].repeat(length, 1, 1)
        swap = {site: exchanged & ~kept}
        with _changing(lm, swap, lambda states, where: torch.where(where, theirs, states)):
            logits = lm(rows, use_cache=False).logits
        changes = [metric(part).double().cpu() - clean for part in logits.split(batch)]
        return torch.stack(changes, 1)

    scores = {}
    for layer in lm.model.layers:
        output = layer.self_attn.o_proj
        width = outputs[output].shape[-1]
        owner = torch.arange(width, device=clean_ids.device) // (width // lm.config.num_attention_heads)
        heads = [change(output, owner != head) for head in range(lm.config.num_attention_heads)]
        scores[output] = torch.stack(heads, -1)  # (B, T, H)
        scores[layer.mlp] = change(layer.mlp, owner.new_zeros(1, dtype=torch.bool))[..., None]
    return _scores(lm, scores, *values)


@contextmanager
def _changing(
    model: Any, by: dict[nn.Module, Tensor], change: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[dict[nn.Module, Tensor]]:
    """
    Within, what heads and feed-forward layers give is changed on the way, with a tensor for each place; yields what
    it was. A head's output is what its layer's output projection gets, which is the key of its place.
    """
    before: dict[nn.Module, Tensor] = {}

    def on_heads(module, args):
        before[module] = args[0]
        return (change(args[0], by[module]), *args[1:]) if module in by else None

    def on_mlp(module, args, output):
        before[module] = output
        return change(output, by[module]) if module in by else None

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(on_heads).remove)
            stack.callback(layer.mlp.register_forward_hook(on_mlp).remove)
        yield before


@torch.no_grad()
def _two_runs(
    model: nn.Module, clean_ids: Tensor, corrupted_ids: Tensor, metric: Metric | None
) -> tuple[Any, Metric, dict[nn.Module, Tensor], list[Tensor]]:
    """The model, the metric, the outputs of the corrupted run by their place, and the metric of both runs."""
    lm = family_model(model)
    if clean_ids.shape != corrupted_ids.shape or clean_ids.ndim != 2:
        raise ValueError(
            "clean_ids and corrupted_ids must be pairs of texts of equal length, (batch_size, seq_len), got "
            f"{tuple(clean_ids.shape)} and {tuple(corrupted_ids.shape)}"
        )
    clean = lm(clean_ids, use_cache=False).logits
    with _changing(lm, {}, lambda states, by: states) as outputs:
        corrupted = lm(corrupted_ids, use_cache=False).logits
    if metric is None:
        answers = torch.stack([clean[:, -1].argmax(-1), corrupted[:, -1].argmax(-1)], -1)  # (B, 2)
        if (same := answers[:, 0] == answers[:, 1]).any():
            raise ValueError(
                f"metric must be given for texts with the same likeliest token, got {answers[same, 0].tolist()} after "
                "both texts of a pair"
            )

        def metric(logits: Tensor) -> Tensor:
            right, wrong = logits[:, -1].gather(-1, answers).unbind(-1)
            return right - wrong

    return lm, metric, outputs, [metric(logits).double().cpu() for logits in (clean, corrupted)]


def _scores(model: Any, scores: dict[nn.Module, Tensor], clean: Tensor, corrupted: Tensor) -> PatchingScores:
    """
    Args:
        scores: by place, of heads `(B, T, H)` or, to be summed, `(B, T, H * d)`; of MLPs `(B, T, 1)` or `(B, T, D)`.
    """
    layers = model.model.layers
    heads = [by_head(scores[layer.self_attn.o_proj], model.config).sum(-1).permute(2, 0, 1) for layer in layers]
    mlps = [scores[layer.mlp].flatten(2).sum(-1) for layer in layers]
    return PatchingScores(torch.stack(heads), torch.stack(mlps), clean, corrupted)
