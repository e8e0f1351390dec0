"""The keys that each query of an attention call sees: from a mask, or from the arguments of an attention function."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import find_packed_sequence_indices, sdpa_mask


# an additive mask hides a key from here on: exp(-10000) is 0 in every dtype
HIDDEN_BIAS = -1e4


class Visibility:
    """The keys that each query sees: those where `mask` is True, or all; with `is_causal`, up to its own position.

    `mask` is bool, `(batch | 1, heads | 1, T, S)`. After construction, `is_causal` is set only without a mask and with
    T = S, which is what the kernels take.
    """

    def __init__(self, mask: Tensor | None, is_causal: bool, num_queries: int, num_keys: int, device: torch.device):
        if mask is not None:
            mask = mask.expand(-1, -1, num_queries, -1)
        if is_causal and (mask is not None or num_queries != num_keys):
            causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
            mask, is_causal = causal[None, None] if mask is None else mask & causal, False
        self.mask, self.is_causal, self.device = mask, is_causal, device
        self.num_queries, self.num_keys = num_queries, num_keys
        self._number: Tensor | None = None

    def block(self, start: int, stop: int) -> "Visibility":
        """What the queries from `start` to `stop` see; without the keys that lie behind them all, where causal."""
        mask, num_keys = self.mask, self.num_keys
        if mask is not None:
            mask = mask[:, :, start:stop]
        elif self.is_causal:
            num_keys = stop
            mask = torch.ones(1, 1, stop - start, num_keys, dtype=torch.bool, device=self.device).tril(start)
        return Visibility(mask, False, stop - start, num_keys, self.device)

    def part(self, start: int, stop: int) -> tuple[slice, Tensor | None]:
        """The keys from the first to the last that any query from `start` to `stop` sees, and which of these a mask
        hides from each, bool, `(batch | 1, heads | 1, queries, keys)`; a query without a key sees all."""
        keys = slice(0, stop if self.is_causal else self.num_keys)
        if self.mask is None:
            return keys, None
        mask = self.mask[:, :, start:stop]
        # elsewhere the numbers would have to be waited for
        if mask.is_cpu and len(seen := mask.any(0).any(0).any(0).nonzero()):
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
        hidden = ~mask[..., keys]
        return keys, hidden & ~hidden.all(-1, keepdim=True)

    def number(self) -> Tensor:
        """Number of keys that each query sees, `(batch | 1, heads | 1, T)`."""
        if self._number is None:
            if self.mask is not None:
                self._number = self.mask.sum(-1)
            elif self.is_causal:
                self._number = torch.arange(1, self.num_queries + 1, device=self.device)[None, None]
            else:
                self._number = torch.full((1, 1, self.num_queries), self.num_keys, device=self.device)
        return self._number

    def count(self, marked: Tensor, heads: int) -> Tensor:
        """Number of the `marked` keys (bool, `(batch, kv_heads, S)`) that each query sees, `(batch, heads, T)`."""
        if self.mask is not None and self.mask.shape[1] > 1:
            return (self.mask & repeat_heads(marked, heads)[:, :, None]).sum(-1)
        marked = marked.float()
        if self.mask is not None:
            number = (self.mask[:, 0].float() @ marked.mT).mT
        elif self.is_causal:
            number = marked.cumsum(-1)
        else:
            number = marked.sum(-1, keepdim=True).expand(-1, -1, self.num_queries)
        return repeat_heads(number, heads)

    def mean_key(self, key: Tensor) -> Tensor:
        """Mean of the keys that any query sees, `(batch, kv_heads, 1, head_dim)`."""
        if self.mask is None:
            return key.mean(2, keepdim=True)
        seen = self.mask.any(2).any(1)[:, None, None].to(key.dtype)  # (batch | 1, 1, 1, S)
        return (seen / seen.sum(-1, keepdim=True).clamp(min=1)) @ key


def repeat_heads(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1) if states.shape[1] != heads else states


def split_mask(attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Visible keys (bool) and additive bias of an attention mask."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask, None
    # by negation, so that a key whose mask is NaN is seen, and its queries become NaN
    return ~(attention_mask <= HIDDEN_BIAS), attention_mask


class MaskOrigin(NamedTuple):
    """What a mask that the model asked for stands for."""

    visible: Tensor | None  # bool mask of the visible keys; None also for masks that say so themselves
    is_causal: bool  # whether the keys are visible up to the query's position where `visible` is None
    told: Tensor | None  # the padding mask that the mask function was told, (batch, tokens)
    padded: Tensor | None  # which queries are padding, bool, (batch, T); None where `told` does not say


def describe_mask(mask: Tensor | BlockMask, **arguments) -> MaskOrigin:
    # at once and not when it is needed: a static cache moves its `q_offset` on in place
    visible, is_causal, padded = None, False, None
    is_bidirectional = "allow_is_bidirectional_skip" in arguments
    if isinstance(mask, BlockMask) or mask.is_floating_point():
        visible = sdpa_mask(**arguments)
        is_causal = visible is None and not arguments.get("allow_is_bidirectional_skip", False)
    told, num_queries = arguments["attention_mask"], arguments["q_length"]
    # it tells of the keys; the queries are among them, but in cross attention
    if told is not None and not (is_bidirectional and num_queries != arguments["kv_length"]):
        start = int(arguments["q_offset"])
        if start + num_queries <= told.shape[1]:
            padded = ~told[:, start : start + num_queries].bool()
    return MaskOrigin(visible, is_causal, told, padded)


def read_visibility(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | BlockMask | None,
    origin: MaskOrigin | None,
    weights: Tensor | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Visibility, Tensor | None]:
    """Keys, their visibility and the additive bias, as the attention function `implementation` reads its arguments;
    `weights` is what it returned, if it did."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if "flash" in implementation:
        lengths = (cu_seq_lens_q, cu_seq_lens_k)
        mask: Any = attention_mask  # a tensor, or none
        visible = _flash_visible(query, key, mask, sliding_window, position_ids, lengths)
        return key, Visibility(visible, is_causal, num_queries, num_keys, query.device), None

    visible, bias = None, None
    if attention_mask is None:
        is_causal = is_causal and implementation != "eager"
    elif implementation == "eager" and isinstance(attention_mask, Tensor) and not attention_mask.is_floating_point():
        attention_mask = attention_mask[..., :num_keys]
        if attention_mask.dtype == torch.bool and weights is not None and not (weights * ~attention_mask).any():
            visible = attention_mask
        else:
            # it is added to the scores, 0 and 1 as well, and hides nothing then
            visible, bias = split_mask(attention_mask.float())
    elif isinstance(attention_mask, Tensor) and (origin is None or attention_mask.dtype == torch.bool):
        visible, bias = split_mask(attention_mask[..., :num_keys])
    elif origin is not None:
        visible, is_causal = origin.visible, origin.is_causal
    else:
        block_mask: Any = attention_mask
        visible = create_mask(block_mask.mask_mod, *block_mask.shape, query.device)  # type: ignore[call-arg]  # four sizes
    is_causal = is_causal and visible is None and num_queries > 1
    if is_causal:
        # what lies behind is the part of a static cache that is not filled yet
        key = key[:, :, :num_queries]
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        bias = position_bias if bias is None else bias + position_bias
    return key, Visibility(visible, is_causal, num_queries, key.shape[2], query.device), bias


def _flash_visible(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cumulative_lengths: tuple[Any, Any],
) -> Tensor | None:
    """Mask of the keys that flash attention shows, where it shows not all or all up to the query's position."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    masks = []
    if attention_mask is not None:
        masks.append(attention_mask[:, None, None, :num_keys].bool())
    elif len(query) == 1 and None not in cumulative_lengths:
        # the sequence that each position of the packed ones is in
        queries, keys = (
            torch.searchsorted(ends, torch.arange(length, device=ends.device, dtype=ends.dtype), right=True)
            for ends, length in zip(cumulative_lengths, (num_queries, num_keys), strict=True)
        )
        masks.append((queries[:, None] == keys)[None, None])
    elif position_ids is not None and position_ids.shape == (1, num_keys) and len(query) == 1:
        sequences = find_packed_sequence_indices(position_ids)
        if sequences is not None:
            masks.append(sequences[:, None, :, None] == sequences[:, None, None, :])
    if sliding_window is not None and num_keys > sliding_window:
        positions = torch.arange(num_keys, device=query.device)
        masks.append((positions[None, None, -num_queries:, None] - positions).abs() < sliding_window)
    return functools.reduce(torch.logical_and, masks) if masks else None
