"""Exact attention entropy at the cost of one more attention call.

A query with the scores `s_j = scaling * q.k_j` of the keys that it sees attends with `p = softmax(s)`. The entropy of
`p`, in nats, is

    H = -sum_j p_j log p_j = logsumexp(s) - sum_j p_j s_j        because log p_j = s_j - logsumexp(s),

and the scores are linear in the keys, so the last sum is an attention output whose values are the keys:

    sum_j p_j s_j = scaling * q . (sum_j p_j k_j) = scaling * q . Attention(q, k, v=k).

A fused attention kernel computes the log-sum-exp and that output in O(T) memory: no (T, T) map is ever formed.

Precision: H does not change when one vector is added to every key, but both terms do, and their difference cancels.
So the mean of the visible keys is subtracted from every key first, and everything is computed in float32 at least; in
float64 where the terms are large all the same, as in a head of a run that diverges (on the CPU).

Gradient: the log-sum-exp of a kernel carries none. But dH/ds_j = -p_j (s_j - sum_i p_i s_i) is also the gradient of
-sum_j p_j c_j with constants c_j = s_j, so H = lse.detach() - scaling * q.detach() . Attention(q, k, v=k.detach())
has the right value and the right gradient, by the kernel's own backward.

Scores that are not linear in the keys (additive biases, soft caps) and sinks take the chunked path: plain softmax, one
block of queries at a time.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import find_packed_sequence_indices, sdpa_mask


# elements of the scores, or of the float mask of a kernel, that are held at a time
_BLOCK_ELEMENTS = 2**22
# log-sum-exp from which on the difference needs float64
_LARGE_SCORE = 2**8


def compute_attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Entropy of the attention distribution of every query, differentiable with respect to `query` and `key`.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, T, head_dim)`): any floating dtype.
        key (`torch.Tensor` of shape `(batch, kv_heads, S, head_dim)`): `kv_heads` divides `heads` (grouped heads).
        scaling (`float`): factor of the dot products.
        attention_mask (`torch.Tensor` of shape `(batch | 1, heads | 1, T | 1, S)`, *optional*): bool, True where the
            query sees the key; or floating, added to the scores, where minus infinity and the lowest number of its
            dtype hide the key.
        is_causal (`bool`, defaults to `False`): the queries are the last T of the S positions, and see no later key.
        softcap (`float`, *optional*): the scores become `softcap * tanh(scores / softcap)` before the mask is added.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): score of one more key, which every query sees.

    Returns:
        `torch.Tensor` of shape `(batch, heads, T)`: entropy in nats, never below 0; float64 for float64 inputs, else
        float32. NaN for a query that sees no key, and for one that is not finite or sees a key that is not.

    Raises:
        ValueError: for shapes or a dtype of `attention_mask` other than these.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[::3] != key.shape[::3]:
        raise ValueError(
            "query must be (batch, heads, T, head_dim) and key (batch, kv_heads, S, head_dim), got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, heads, num_queries, _ = query.shape
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {key.shape[1]}")
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(f"attention_mask must be bool or floating, got {attention_mask.dtype}")
        allowed = ({1, batch}, {1, heads}, {1, num_queries}, {key.shape[2]})
        if attention_mask.ndim != 4 or not all(map(set.__contains__, allowed, attention_mask.shape)):
            raise ValueError(
                f"attention_mask must be ({batch} or 1, {heads} or 1, {num_queries} or 1, {key.shape[2]}) here, got "
                f"shape {tuple(attention_mask.shape)}"
            )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have one entry for each of the {heads} heads, got shape {tuple(sinks.shape)}")
    visible, bias = _split_mask(attention_mask)
    visibility = _Visibility(visible, is_causal, num_queries, key.shape[2], query.device)
    sinks = None if sinks is None else sinks.view(1, heads, 1, 1)
    return _entropy(query, key, scaling, visibility, bias=bias, softcap=softcap, sinks=sinks)[0]


class _Visibility:
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

    def block(self, start: int, stop: int) -> "_Visibility":
        """What the queries from `start` to `stop` see."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, start:stop]
        elif self.is_causal:
            shape = (1, 1, stop - start, self.num_keys)
            mask = torch.ones(shape, dtype=torch.bool, device=self.device).tril(start)
        return _Visibility(mask, False, stop - start, self.num_keys, self.device)

    def number(self) -> Tensor:
        """Number of keys that each query sees, `(batch | 1, heads | 1, T)`."""
        if self.mask is not None:
            return self.mask.sum(-1)
        if self.is_causal:
            return torch.arange(1, self.num_queries + 1, device=self.device)[None, None]
        return torch.full((1, 1, self.num_queries), self.num_keys, device=self.device)

    def count(self, marked: Tensor, heads: int) -> Tensor:
        """Number of the `marked` keys (bool, `(batch, kv_heads, S)`) that each query sees, `(batch, heads, T)`."""
        if self.mask is not None and self.mask.shape[1] > 1:
            return (self.mask & _repeat_heads(marked, heads)[:, :, None]).sum(-1)
        marked = marked.float()
        if self.mask is not None:
            number = (self.mask[:, 0].float() @ marked.mT).mT
        elif self.is_causal:
            number = marked.cumsum(-1)
        else:
            number = marked.sum(-1, keepdim=True).expand(-1, -1, self.num_queries)
        return _repeat_heads(number, heads)

    def mean_key(self, key: Tensor) -> Tensor:
        """Mean of the keys that any query sees, `(batch, kv_heads, 1, head_dim)`."""
        if self.mask is None:
            return key.mean(2, keepdim=True)
        seen = self.mask.any(2).any(1)[:, None, None].to(key.dtype)  # (batch | 1, 1, 1, S)
        return (seen / seen.sum(-1, keepdim=True).clamp(min=1)) @ key


def _repeat_heads(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1) if states.shape[1] != heads else states


def _split_mask(attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Visible keys (bool) and additive bias of an attention mask."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask, None
    # by negation, so that a key whose mask is NaN is seen, and its queries become NaN
    return ~(attention_mask <= torch.finfo(attention_mask.dtype).min), attention_mask


def _entropy(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: _Visibility,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Entropy, `(batch, heads, T)`, and number of the seen scores whose query or key holds an infinity, of the same
    shape; None where every query sees a key and nothing is broken. `sinks` is `(batch | 1, heads, T | 1, 1)`."""
    batch, heads, num_queries, _ = query.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    linear = bias is None and softcap is None and sinks is None
    kernel = _fused_kernel(query, key) if linear else None
    if kernel is _flash_cpu and visibility.mask is None:
        # the usual case, with nothing broken; there is no device to wait for before the result is looked at
        with torch.autocast(query.device.type, enabled=False):
            entropy = _kernel_entropy(kernel, query, key - visibility.mean_key(key.detach()), visibility, scaling)
        if entropy.isfinite().all():
            return entropy.clamp_(min=0.0), None
    query_size, key_size = query.detach().abs().amax(-1), key.detach().abs().amax(-1)
    # a broken key would spoil, as a value of weight zero, the queries that do not see it
    key = key.nan_to_num(0.0, 0.0, 0.0)
    if softcap is None and sinks is None:
        key = key - visibility.mean_key(key.detach())

    if kernel is None:
        elements = batch * heads * visibility.num_keys
        bias = None if bias is None else bias.expand(-1, -1, num_queries, -1)
        sinks = None if sinks is None else sinks.expand(batch, -1, num_queries, -1)
    else:
        elements = 0 if visibility.mask is None else visibility.mask[..., 0, :].numel()
    step = max(1, _BLOCK_ELEMENTS // elements) if elements else max(1, num_queries)

    entropies, infinities = [], []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, max(1, num_queries), step):
            rows = slice(start, min(start + step, num_queries))
            block = visibility.block(rows.start, rows.stop) if elements else visibility
            if kernel is None:
                rows_bias = None if bias is None else bias[:, :, rows]
                rows_sinks = None if sinks is None else sinks[:, :, rows]
                entropy = _softmax_entropy(query[:, :, rows], key, scaling, block, rows_bias, softcap, rows_sinks)
            else:
                entropy = _kernel_entropy(kernel, query[:, :, rows], key, block, scaling)
            size = query_size[:, :, rows]
            number = block.number()
            broken = ~(entropy.isfinite() & size.isfinite()) | (number == 0)
            broken = broken | (block.count(~key_size.isfinite(), heads) > 0)
            entropies.append(entropy.clamp(min=0.0).masked_fill(broken, torch.nan))
            infinities.append(torch.where(size.isinf(), number, block.count(key_size.isinf(), heads)))
    return torch.cat(entropies, 2), torch.cat(infinities, 2)


def _kernel_entropy(
    kernel: Callable[..., tuple[Tensor, Tensor]], query: Tensor, key: Tensor, visibility: _Visibility, scaling: float
) -> Tensor:
    """`lse - scaling * q . Attention(q, k, v=k)` with the right gradient, `(batch, heads, T)`."""
    output, logsumexp = kernel(query, key, key.detach(), visibility, scaling)
    # the terms cancel: float32 leaves an error of 3e-7 of their size (the CPU alone has kernels in float64)
    if query.device.type == "cpu" and query.dtype == torch.float32 and logsumexp.abs().max() > _LARGE_SCORE:
        return _kernel_entropy(kernel, query.double(), key.double(), visibility, scaling).float()
    return logsumexp.detach() - scaling * torch.linalg.vecdot(query.detach(), output)


def _fused_kernel(query: Tensor, key: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel that gives output and log-sum-exp on this device, or None."""
    # the kernel of the CPU divides by the length
    if query.device.type == "cpu" and query.numel() and key.numel():
        return _flash_cpu
    if query.device.type == "cuda" and query.dtype == torch.float32:
        return _efficient_cuda
    return None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, visibility: _Visibility, scaling: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        is_causal=visibility.is_causal,
        attn_mask=_additive(visibility.mask, query.dtype),
        scale=scaling,
    )


def _efficient_cuda(
    query: Tensor, key: Tensor, value: Tensor, visibility: _Visibility, scaling: float
) -> tuple[Tensor, Tensor]:
    heads, num_queries, head_dim = query.shape[1:]
    # the kernel takes no grouped heads, and wants rows aligned to 16 bytes
    padding = (0, -head_dim % 8)
    query, key, value = (F.pad(_repeat_heads(states, heads), padding) for states in (query, key, value))
    bias = _additive(visibility.mask, query.dtype)
    if bias is not None:
        bias = F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]].expand(query.shape[0], heads, -1, -1)
    output, logsumexp, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, is_causal=visibility.is_causal, scale=scaling
    )
    return output[..., :head_dim], logsumexp[..., :num_queries]


def _softmax_entropy(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: _Visibility,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Entropy of one block of queries by way of its scores."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * num_queries, head_dim)
    scores = scaling * (grouped @ key.mT).view(batch, heads, num_queries, num_keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    hidden = torch.zeros_like(scores[:1, :1], dtype=torch.bool) if visibility.mask is None else ~visibility.mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
        hidden = F.pad(hidden, (0, 1), value=False)
    # a query that sees no key gets all: its NaN would enter the gradient of the others
    hidden = hidden & ~hidden.all(-1, keepdim=True)
    log_weights = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
    return -(log_weights.exp() * log_weights.masked_fill(hidden, 0.0)).sum(-1)


class _MaskOrigin(NamedTuple):
    """What a mask that the model asked for stands for."""

    visible: Tensor | None  # bool mask of the visible keys; None also for masks that say so themselves
    is_causal: bool  # whether the keys are visible up to the query's position where `visible` is None
    padded: Tensor | None  # which queries are padding, bool, (batch, T)


def _describe_mask(mask: Tensor | BlockMask, **arguments) -> _MaskOrigin:
    # at once and not when it is needed: a static cache moves its `q_offset` on in place
    visible, is_causal, padded = None, False, None
    if isinstance(mask, BlockMask) or mask.is_floating_point():
        visible = sdpa_mask(**arguments)
        is_causal = visible is None and not arguments.get("allow_is_bidirectional_skip", False)
    padding_mask = arguments["attention_mask"]
    # more queries than keys are those of cross attention, of which it tells the keys
    if padding_mask is not None and arguments["q_length"] <= padding_mask.shape[1]:
        queries = torch.arange(arguments["q_length"], device=padding_mask.device) + arguments["q_offset"]
        padded = ~padding_mask[:, queries].bool()
    return _MaskOrigin(visible, is_causal, padded)


class AttentionEntropyRecord:
    """What `record_attention_entropy` measured, over all the queries that are not padding.

    Rows are the attention modules, `layer_names`, in the order of the model; columns are their heads. An entry is NaN
    if the head is broken (a query, or a key that one of them saw, was not finite), or if no query was measured.
    """

    def __init__(self, model: nn.Module, on_layer: Callable[[int, Tensor], None] | None = None):
        modules = dict(model.named_modules())
        layers = {name: module for name, module in modules.items() if _uses_attention_interface(type(module))}
        if not layers:
            raise ValueError(
                f"{type(model).__name__} computes its attention itself and not by the attention interface of "
                "transformers (ALL_ATTENTION_FUNCTIONS), so its queries and keys cannot be seen"
            )
        configs = [vars(module).get("config") for module in modules.values()]
        # the configuration of an encoder-decoder is also that of its encoder alone
        decodes = any(getattr(layer, "is_decoder", True) for layer in layers.values())
        if any(getattr(config, "add_cross_attention", False) for config in configs) or (
            decodes and any(getattr(config, "is_encoder_decoder", False) for config in configs)
        ):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, or a part of one, with cross attention, which is not "
                "told which of its queries are padding"
            )
        self.layer_names = list(layers)
        self._rows = {module: row for row, module in enumerate(layers.values())}
        # per layer (heads, 5): sums over queries of entropy, largest entropy, NaN weights, infinite scores, and 1
        self._totals = [torch.zeros(0, 5, dtype=torch.float64) for _ in layers]
        self._on_layer = on_layer
        self._masks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._padding_mask: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the queries (`torch.FloatTensor` of shape `(layers, heads)`), in nats (arXiv 2410.09637)."""
        return (self._sums[..., 0] / self._sums[..., 4]).float()

    @property
    def max_entropy(self) -> Tensor:
        """Mean of the largest entropy that the same queries can have, the logarithm of the number of keys that each
        sees (`torch.FloatTensor` of shape `(layers, heads)`), in nats."""
        return (self._sums[..., 1] / self._sums[..., 4]).float()

    @property
    def normalized_entropy(self) -> Tensor:
        """`entropy / max_entropy`, in [0, 1] (`torch.FloatTensor` of shape `(layers, heads)`)."""
        return (self._sums[..., 0] / self._sums[..., 1]).clamp(max=1.0).float()

    @property
    def nan_count(self) -> Tensor:
        """Number of seen keys whose attention weight is NaN (`torch.LongTensor` of shape `(layers, heads)`)."""
        return self._sums[..., 2].long()

    @property
    def inf_count(self) -> Tensor:
        """Number of seen keys whose score has an infinity in its query or key (`torch.LongTensor` of shape
        `(layers, heads)`)."""
        return self._sums[..., 3].long()

    @property
    def num_queries(self) -> int:
        """Number of queries measured in each layer (in the layer with most, should they differ)."""
        return int(max(self._sums[..., 4].flatten().tolist(), default=0))

    @property
    def head_distribution(self) -> Tensor:
        """Share of all heads in each quarter of their own largest entropy, [0, max/4), ..., [3max/4, max]
        (`torch.FloatTensor` of shape `(4,)`). Broken heads are in none of them."""
        quarters = (4 * self.normalized_entropy).floor().clamp(max=3)
        return torch.stack([(quarters == quarter).float().mean() for quarter in range(4)])

    def all_reduce(self) -> None:
        """Add up the measurements of all processes of the default process group, in each of them."""
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, [total.cpu() for total in self._totals])
        self._totals = [nn.utils.rnn.pad_sequence(totals).sum(1) for totals in zip(*gathered, strict=True)]

    @property
    def _sums(self) -> Tensor:
        # (layers, heads, 5); where layers have fewer heads, entries without a query
        return nn.utils.rnn.pad_sequence([total.cpu().double() for total in self._totals], batch_first=True)

    def _remember_batch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._padding_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _remember_mask(self, mask: Any, arguments: dict[str, Any]) -> None:
        if mask is not None:
            self._masks[mask] = _describe_mask(mask, **arguments)

    # not traced: the numbers leave the graph of a compiled model
    @torch.compiler.disable
    @torch.no_grad()
    def _measure(
        self,
        implementation: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | BlockMask | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        **kwargs,
    ) -> None:
        # in the backward pass, a checkpointed layer is computed a second time
        if module not in self._rows or torch._C._current_graph_task_id() != -1:
            return
        origin = None if attention_mask is None else self._masks.get(attention_mask)
        # attention broadcasts a batch of one, as of learned queries
        batch = max(len(query), len(key))
        query, key = (states.expand(batch, -1, -1, -1) for states in (query, key))
        key, visibility, bias = _see(implementation, module, query, key, attention_mask, origin, **kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if implementation == "sdpa":
            # it leaves out both, where transformers does not refuse it: before 5.24, Gemma 2's softcap
            s_aux = softcap = None
        # one a head; `sinks`, as of Inkling 2, are one a query
        if s_aux is not None:
            sinks = s_aux.view(1, -1, 1, 1)
        entropy, infinite = _entropy(query, key, scaling, visibility, bias=bias, softcap=softcap, sinks=sinks)

        number = visibility.number()
        largest = (number + (sinks is not None)).log()
        padded = self._padded(attention_mask, origin, query)
        dtype = torch.float32 if entropy.device.type == "mps" else torch.float64
        row = self._rows[module]
        if infinite is None and padded is None:
            # the usual case: every query counts, and sees as many keys in every sequence and head
            total = F.pad(entropy.sum((0, 2), dtype=dtype)[:, None], (0, 4))
            total[:, 1] = len(query) * largest.sum(dtype=dtype)
            total[:, 4] = len(query) * query.shape[2]
        else:
            counted = number > 0
            if padded is not None:
                counted = counted & ~padded[:, None]
            entropy = entropy.masked_fill(~counted, torch.nan)
            infinite = torch.zeros_like(largest) if infinite is None else infinite
            columns = (entropy, largest, entropy.isnan() * number, infinite, torch.ones_like(largest))
            columns = torch.stack(torch.broadcast_tensors(*columns), -1)
            total = torch.where(counted[..., None], columns, 0).sum((0, 2), dtype=dtype)
        if self._on_layer is not None:
            self._on_layer(row, entropy)
        self._totals[row] = self._totals[row] + total if len(self._totals[row]) else total

    def _padded(
        self, attention_mask: Tensor | BlockMask | None, origin: _MaskOrigin | None, query: Tensor
    ) -> Tensor | None:
        """Which queries are padding, bool, `(batch, T)`, where any can be."""
        if attention_mask is None:
            return None
        if origin is not None:
            return origin.padded
        # a mask that the model made or changed itself: the queries are the last tokens of the batch that it was given
        batch, _, num_queries, _ = query.shape
        mask = self._padding_mask
        if mask is None or mask.shape[0] != batch or mask.shape[1] < num_queries:
            return None
        return ~mask[:, -num_queries:].bool()


def _see(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | BlockMask | None,
    origin: _MaskOrigin | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, _Visibility, Tensor | None]:
    """Keys, their visibility and the additive bias, as the attention function `implementation` reads its arguments."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if "flash" in implementation:
        lengths = (cu_seq_lens_q, cu_seq_lens_k)
        visible = _flash_visible(query, key, attention_mask, sliding_window, position_ids, lengths)
        return key, _Visibility(visible, is_causal, num_queries, num_keys, query.device), None

    visible, bias = None, None
    if attention_mask is None:
        is_causal = is_causal and implementation != "eager"
    elif isinstance(attention_mask, Tensor) and (origin is None or attention_mask.dtype == torch.bool):
        visible, bias = _split_mask(attention_mask[..., :num_keys])
    elif origin is not None:
        visible, is_causal = origin.visible, origin.is_causal
    else:
        visible = create_mask(attention_mask.mask_mod, *attention_mask.shape, query.device)
    is_causal = is_causal and visible is None and num_queries > 1
    if is_causal:
        # what lies behind is the part of a static cache that is not filled yet
        key = key[:, :, :num_queries]
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        bias = position_bias if bias is None else bias + position_bias
    return key, _Visibility(visible, is_causal, num_queries, key.shape[2], query.device), bias


def _flash_visible(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cumulative_lengths: tuple[Tensor | None, Tensor | None],
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


@functools.cache
def _uses_attention_interface(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@contextmanager
def _replaced(owner: type, name: str, replacement: Callable) -> Iterator[None]:
    inherited, original = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


# the records of all open blocks, of whatever thread; the interfaces are replaced from the first to the last
_open_records: list[AttentionEntropyRecord] = []
_interfaces = ExitStack()
_lock = threading.Lock()


@contextmanager
def _opened(record: AttentionEntropyRecord) -> Iterator[None]:
    with _lock:
        if not _open_records:
            _replace_interfaces()
        _open_records.append(record)
    try:
        yield
    finally:
        with _lock:
            _open_records.remove(record)
            if not _open_records:
                _interfaces.close()


def _replace_interfaces() -> None:
    get_interface, get_attention = AttentionInterface.get_interface, AttentionInterface.__getitem__
    get_mask = AttentionMaskInterface.__getitem__

    def measured(function: Callable, implementation: str) -> Callable:
        @functools.wraps(function)
        def attention(module, query, key, value, attention_mask, *args, **kwargs):
            output = function(module, query, key, value, attention_mask, *args, **kwargs)
            for record in tuple(_open_records):
                record._measure(implementation, module, query, key, attention_mask, **kwargs)
            return output

        return attention

    def measured_interface(self, attn_implementation, default):
        # what is registered comes from `measured_attention`; the model's own eager function is not
        if attn_implementation not in self:
            default = measured(default, "eager")
        return get_interface(self, attn_implementation, default)

    def measured_attention(self, implementation):
        return measured(get_attention(self, implementation), implementation)

    def remembered_mask(self, implementation):
        function = get_mask(self, implementation)

        @functools.wraps(function)
        def mask_function(*args, **kwargs):
            mask = function(*args, **kwargs)
            for record in tuple(_open_records):
                record._remember_mask(mask, kwargs)
            return mask

        return mask_function

    for owner, name, replacement in (
        (AttentionInterface, "get_interface", measured_interface),
        (AttentionInterface, "__getitem__", measured_attention),
        (AttentionMaskInterface, "__getitem__", remembered_mask),
    ):
        _interfaces.enter_context(_replaced(owner, name, replacement))


@contextmanager
def record_attention_entropy(
    model: nn.Module, *, reduce: bool = True, on_layer: Callable[[int, Tensor], None] | None = None
) -> Iterator[AttentionEntropyRecord]:
    """Measure the attention entropy of every head of `model` in all its forward passes inside the `with` block.

    ```python
    with record_attention_entropy(model) as record:
        model(**batch)
    record.entropy  # (layers, heads), in nats
    ```

    It stands in the interfaces by which transformers looks up attention and mask functions, calls what the model would
    have called with the same arguments, and reads them: the outputs of the model do not change by one bit, whatever
    its implementation (eager, sdpa, flex, flash). It draws no random numbers and leaves no trace, also after an
    exception. Several may be open at once, of the same or of other models, also in other threads.

    What is measured: the distribution before dropout, in float32 at least, also under autocast; each query once,
    also where gradient checkpointing computes it again; cached decoding as it happens, one query a step. Queries that
    the 2-D attention mask of the model marks as padding are left out, and those that see no key. With a 4-D mask of
    your own all queries count that see a key. An attention sink is one more key that every query sees.

    The numbers are added up on the device of each layer, which nothing waits for until a result is read. Graphs that
    `torch.compile` made before the `with` block are not measured.

    Args:
        model (`torch.nn.Module`): a model of transformers, or a module that holds one; only its modules are measured.
        reduce (`bool`, defaults to `True`): where `torch.distributed` is initialised, add up the measurements of all
            processes when the block is left without an exception, so that all see the results of the whole batch.
            This is a collective: all processes must enter the block. Pass False to measure in one of them only, or
            when the processes hold parts of the heads (tensor parallelism).
        on_layer (`Callable`, *optional*): called at each measurement of a layer with its row and the entropy of every
            query, a `torch.FloatTensor` of shape `(batch, heads, T)` with NaN where the query is padding or broken.

    Raises:
        ValueError: if the model does not use the attention interface (BLOOM, MPT and Falcon do not), or has cross
            attention, as encoder-decoders have; their encoder by itself is measured.
    """
    record = AttentionEntropyRecord(model, on_layer)
    with model.register_forward_pre_hook(record._remember_batch, with_kwargs=True), _opened(record):
        yield record
    if reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
        record.all_reduce()
