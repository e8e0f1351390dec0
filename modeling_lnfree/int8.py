"""A model as if it computed in int8: weights and activations rounded, the products in the model's own precision."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import Conv1D

from .metrics.attention_entropy.reading import inner_model
from .metrics.attention_entropy.recorder import named_arguments


def round_to_int8(values: Tensor, largest: Tensor) -> Tensor:
    """Symmetric: to the nearest of -127 to 127 times `largest / 127`; what lies beyond is clipped."""
    wide = torch.promote_types(values.dtype, torch.float32)
    scale = torch.where(largest > 0, largest, 1.0).to(wide) / 127
    return ((values.to(wide) / scale).round().clamp(-127, 127) * scale).to(values.dtype)


def quantize_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight in int8 by output channel, each with its own largest entry."""
    inputs = 0 if isinstance(layer, Conv1D) else 1
    weight = layer.weight.detach()
    return round_to_int8(weight, weight.abs().amax(inputs, keepdim=True))


def quantize_activations(states: Tensor, mask: Tensor | None, *, by_token: bool, clip: float = 1.0) -> Tensor:
    """
    Activations in int8: by token, or by tensor, which is one sequence of the batch without its padding, so that the
    batch does not matter.

    Args:
        states (`torch.Tensor` of shape `(batch, T, features)`; of any other shape, all of it is one tensor).
        mask (`torch.Tensor` of shape `(batch, T)`, *optional*): 0 at padding.
        clip: the quantile of the tokens' largest entries that the range ends at (after arXiv 2209.13325).
    """
    size = states.detach().abs().amax(-1, keepdim=True)  # of each token
    if not by_token:
        rows = size[..., 0] if states.ndim == 3 else size.reshape(1, -1)
        if mask is not None and rows.shape == mask.shape:
            rows = rows.masked_fill(~mask.bool(), math.nan)
        wide = torch.promote_types(rows.dtype, torch.float32)
        largest = rows.to(wide).nanquantile(clip, dim=-1)  # (batch,)
        size = largest.view(-1, *[1] * (states.ndim - 1))
    return round_to_int8(states, size)


@contextmanager
def simulate_int8(model: nn.Module, *, activations: str, clip: float = 1.0) -> Iterator[None]:
    """
    Within, every linear layer of the decoder has its weight in int8 by output channel and its input in int8, both
    symmetric about 0 with the largest absolute entry as the end of the range; the output projection and the products
    of attention are as they were (as in arXiv 2306.12929).

    Args:
        model: a model of transformers, or a wrapper of one.
        activations: `"tensor"`, one range for a sequence, or `"token"`, one for each token.
        clip: with `"tensor"`, the quantile of the tokens' largest entries that is taken for the range.

    Raises:
        ValueError: for other arguments, and for a model without linear layers.
    """
    if activations not in ("tensor", "token"):
        raise ValueError(f"activations must be 'tensor' or 'token', got {activations!r}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be a quantile above 0 and at most 1, got {clip}")
    decoder = inner_model(model).base_model.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, nn.Linear | Conv1D)]
    if not layers:
        raise ValueError(f"{type(decoder).__name__} has no linear layers to round")
    masks: list[Tensor | None] = [None]
    shapes: list[torch.Size | None] = [None]

    def keep_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = dict(named_arguments(module, args, kwargs))
        mask, input_ids = given.get("attention_mask"), given.get("input_ids")
        masks[0] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        shapes[0] = None if input_ids is None else input_ids.shape

    def round_input(module: nn.Module, args: tuple) -> tuple:
        states, shape = args[0], shapes[0]
        # a layer may read the tokens of all sequences in a row
        flat = states.ndim == 2 and shape is not None and len(states) == shape.numel()
        rows = states.view(*shape, -1) if flat else states  # type: ignore[misc]  # it is there if flat
        rounded = quantize_activations(rows, masks[0], by_token=activations == "token", clip=clip)
        return (rounded.view(states.shape), *args[1:])

    with ExitStack() as stack:
        stack.enter_context(decoder.register_forward_pre_hook(keep_mask, with_kwargs=True))
        for layer in layers:
            stack.callback(layer.weight.data.copy_, layer.weight.detach().clone())
            layer.weight.data.copy_(quantize_weight(layer))
            stack.enter_context(layer.register_forward_pre_hook(round_input))
        yield
