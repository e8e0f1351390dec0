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
The head of a causal language model and its loss in one, by blocks of tokens: `use_fused_loss(model)`.

In a training step of a small model with a large vocabulary, the logits, their log-probabilities and the gradients of
both are most of the memory. Here they are there for one block of tokens at a time. The gradient of the states and of
the head's weight is taken while a block's logits are at hand, so that nothing of their size outlives the block, and
the head is multiplied as often as without. (Liger's kernel does the same in blocks of a few hundred tokens, reads a
number from the device in every step, and may overflow in float16; hence plain torch.)
"""

import functools
from types import MethodType
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cpu import causal_lm_loss, next_tokens
from .modeling_lnfree import CACHE_NAME


ModelT = TypeVar("ModelT", bound=PreTrainedModel)
# those whose logits are a linear layer of the base model's last states, times `logits_scale` where there is one
CLASSES = ("LNFreeForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM")
# logits held at a time: 256 MiB of them in float32
BLOCK_ELEMENTS = 2**26


def use_fused_loss(model: ModelT) -> ModelT:
    """
    Makes a causal language model compute its loss by `head_and_loss` in training mode, where `labels` are given as a
    keyword. The output has `logits=None` then. Everything else is as before: evaluation, generation, and training
    steps in which someone needs the head by itself (hooks, adapters or shards on it, `logits_to_keep`). A forward pass
    in training mode takes `label_smoothing` as a further keyword, and any one `reduction="none"`: its loss is then of
    every token but the first, `(batch, T - 1)`, without a gradient and without logits, as an evaluation needs them.
    Doing it twice is doing it once.

    Returns:
        The same model.

    Raises:
        ValueError: for a model of a class that is not known to have a plain linear head, and for one whose loss or
            forward pass another tool has replaced.
    """
    if not has_linear_head(model):
        raise ValueError(
            f"the head and the loss of {type(model).__name__} are not known; known are those of {CLASSES}"
        )
    if getattr(model, "_loss_function", causal_lm_loss) is not causal_lm_loss:
        raise ValueError(f"{type(model).__name__} has a loss function of its own: {model.loss_function}")
    if not has_fused_loss(model):
        if "forward" in vars(model):
            raise ValueError(f"{type(model).__name__} has a forward pass of another tool: {model.forward}")

        # under the name and the signature of the model's own, by which pickles and the Trainer look at it
        @functools.wraps(type(model).forward)
        def forward(*args, **kwargs):
            return _forward(*args, **kwargs)

        vars(forward)["is_fused_loss"] = True
        model.forward = MethodType(forward, model)
    return model


def has_linear_head(model: nn.Module) -> bool:
    """Whether the logits of the model are known to be a linear layer of its last states."""
    return any(kind.__name__ in CLASSES for kind in type(model).__mro__)


def has_fused_loss(model: nn.Module) -> bool:
    """Whether `use_fused_loss` has made the forward pass; what wraps it, such as autocast, has the mark too."""
    return getattr(model.forward, "is_fused_loss", False)


@can_return_tuple
def _forward(
    self,
    *args,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "none"] = "mean",
    **kwargs,
):
    head, to_keep = self.get_output_embeddings(), kwargs.get("logits_to_keep", 0)
    # adapters, shards and parametrizations make the head a layer of another class
    is_plain = type(head) is nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)
    keeps_all = isinstance(to_keep, int) and to_keep == 0
    multiplier = getattr(getattr(self, "logits_scale", None), "factor", 1.0)
    if labels is not None and reduction == "none":
        if is_plain:
            states = self.base_model(*args, **kwargs).last_hidden_state
            losses = token_losses(states, head.weight, labels, multiplier=multiplier)
        else:
            losses = _cross_entropies(type(self).forward(self, *args, **kwargs).logits[:, :-1], labels[:, 1:])
        return CausalLMOutputWithPast(loss=losses)
    # the base model has its positional arguments in another order
    if labels is None or not (self.training and is_plain and keeps_all and len(args) <= 1):
        if label_smoothing:
            raise ValueError(
                f"label_smoothing={label_smoothing} needs the fused loss: training mode, labels as a keyword, and a "
                "head without hooks, adapters, shards and logits_to_keep"
            )
        return type(self).forward(self, *args, labels=labels, **kwargs)
    kwargs.pop("logits_to_keep", None)
    options = {
        name: kwargs.pop(name) for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in kwargs
    }
    outputs = self.base_model(*args, **kwargs)
    loss = head_and_loss(
        outputs.last_hidden_state,
        head.weight,
        labels,
        multiplier=multiplier,
        label_smoothing=label_smoothing,
        **options,
    )
    return CausalLMOutputWithPast(
        loss=loss,
        logits=None,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
        **{CACHE_NAME: outputs.get(CACHE_NAME)},
    )


def head_and_loss(
    states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    multiplier: float = 1.0,
    label_smoothing: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    block_elements: int | None = None,
) -> Tensor:
    """
    Cross-entropy of `multiplier * states @ weight.T` and the labels, in nats; under autocast the products are in its
    dtype, all else in float32 at least. It has first derivatives only.

    Args:
        states (`torch.Tensor` of shape `(batch_size, seq_len, hidden_size)`): behind the last norm.
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`): the head's.
        labels (`torch.LongTensor` of shape `(batch_size, seq_len)`): shifted here, unless `shift_labels` are given.
        label_smoothing: the share of each label that all tokens of the vocabulary get in equal parts.
        num_items_in_batch: what the sum is divided by, for exact gradient accumulation; the number of labels that are
            not `ignore_index` by default. Divided by 0, the loss is NaN and its gradient 0, as of torch's own.
        block_elements: logits that are held at a time; `BLOCK_ELEMENTS` by default.

    Raises:
        ValueError: for another number of labels than of tokens, and a `label_smoothing` outside [0, 1].
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    states = states.reshape(-1, states.shape[-1])
    targets, kept = next_tokens(states, labels, shift_labels, ignore_index)
    differentiable = torch.is_grad_enabled()
    rows = max(1, (block_elements or BLOCK_ELEMENTS) // len(weight))
    total = HeadLossSum.apply(
        states,
        weight,
        targets,
        kept,
        (multiplier, label_smoothing, rows),
        (differentiable and states.requires_grad, differentiable and weight.requires_grad),
    )
    count = kept.sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(total.device)
        # a quotient by 0 would hand NaN on to the gradient
        return torch.where(count == 0, torch.nan, total / count.where(count != 0, 1))
    return total / count


@torch.no_grad()
def token_losses(
    states: Tensor, weight: Tensor, labels: Tensor, *, multiplier: float = 1.0, block_elements: int | None = None
) -> Tensor:
    """
    The cross-entropy of every token but the first, `(batch, seq_len - 1)`, with the arguments of `head_and_loss`, in
    float32 at least and without a gradient; of labels that are -100, 0.
    """
    rows = max(1, (block_elements or BLOCK_ELEMENTS) // len(weight))
    states, targets = states[:, :-1].flatten(0, 1), labels[:, 1:].to(states.device)
    losses = []
    for block, target in zip(states.split(rows), targets.flatten().split(rows), strict=True):
        logits = nn.functional.linear(block, weight)
        losses.append(_cross_entropies(logits, target, multiplier))
    return torch.cat(losses).view(targets.shape)


def _cross_entropies(logits: Tensor, labels: Tensor, multiplier: float = 1.0) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy((wide * multiplier).movedim(-1, 1), labels, reduction="none")


class HeadLossSum(torch.autograd.Function):
    """
    Sum of the cross-entropies of `states @ weight.T` and `labels` where `kept`, both `(N, 1)`.

    Args:
        how: factor of the logits, share of label smoothing, tokens in a block.
        wanted: whether the states, and whether the weight need a gradient.
    """

    @staticmethod
    def forward(ctx, states, weight, labels, kept, how, wanted):
        multiplier, smoothing, rows = how
        ctx.kinds = states.dtype, weight.dtype
        device, vocab_size = states.device.type, len(weight)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        with torch.autocast(device, enabled=False):
            states, weight = states.to(dtype), weight.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            total = states.new_zeros((), dtype=wide)
            grad_states = torch.empty_like(states) if wanted[0] else None
            grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
            for start in range(0, len(states), rows):
                block = slice(start, start + rows)
                label, is_kept = labels[block], kept[block]
                logits = states[block] @ weight.t()  # (rows, V)
                scores = logits if multiplier == 1 else logits.to(wide) * multiplier
                log_probabilities = scores.log_softmax(-1, dtype=wide)
                loss = (smoothing - 1) * log_probabilities.gather(-1, label)
                if smoothing:
                    loss = loss - smoothing * log_probabilities.mean(-1, keepdim=True)
                total = total + loss.where(is_kept, 0).sum()
                if not any(wanted):
                    continue
                # softmax - (1 - smoothing) one_hot - smoothing / V
                grad = log_probabilities.exp_()
                if smoothing:
                    grad = grad.sub_(smoothing / vocab_size)
                grad = grad.scatter_add_(-1, label, torch.full_like(loss, smoothing - 1))
                grad = grad.mul_(is_kept * multiplier).to(dtype)
                if grad_states is not None:
                    grad_states[block] = grad @ weight
                if grad_weight is not None:
                    grad_weight += _wide_product(grad.t(), states[block], wide)
        ctx.save_for_backward(grad_states, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the fused loss has no second derivatives: take those of a model without it")
        grads = (
            None if grad is None else (grad * grad_output).to(kind)
            for grad, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
        )
        return *grads, None, None, None, None


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of matrices in a wider dtype: a sum over many tokens would overflow float16."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
