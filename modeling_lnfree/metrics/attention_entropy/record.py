"""What was measured of the attention of a model, with the means over all queries."""

from typing import Any

import torch
from torch import Tensor, nn


class AttentionEntropyRecord:
    """What `record_attention_entropy` measured, over all the queries that are not padding.

    Rows are the attention modules that were called, `layer_names`, in the order of the model; a module that runs
    several times in a forward pass has a row a run. Columns are heads. An entry is NaN if the head is broken (a query,
    or a key that one of them saw, was not finite), or if there is no such head, where layers have different numbers.
    """

    def __init__(self):
        # by position and run of the layer: its name and (heads, 6), sums over queries of entropy, largest entropy, NaN
        # weights, infinite scores, 1, and 1 where clipping left no weight
        self._totals: dict[tuple[int, int], tuple[str, Tensor]] = {}
        # likewise, (heads, 5): the largest score, sums over queries of the weight on the first key and of the
        # log-sum-exp, and over sequences of the spectral gap and of 1
        self._logits: dict[tuple[int, int], Tensor] = {}
        self.unmeasured: list[str] = []
        """What the model computed and the record does not hold, a sentence each; filled when the block is left."""

    @property
    def layer_names(self) -> list[str]:
        """Name of each row's module; with the number of the run behind it, from the second run in a pass on."""
        return [self._totals[row][0] for row in sorted(self._totals)]

    @property
    def num_heads(self) -> list[int]:
        """Number of heads of each row."""
        return [len(self._totals[row][1]) for row in sorted(self._totals)]

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the queries (`torch.FloatTensor` of shape `(layers, heads)`), in nats (arXiv 2410.09637).
        Where softmax is clipped (arXiv 2306.12929), that of the weights divided by their sum, over the queries that
        have any left; see `empty_count`."""
        return (self._sums[..., 0] / (self._sums[..., 4] - self._sums[..., 5])).float()

    @property
    def layer_entropy(self) -> Tensor:
        """Mean of `entropy` over the heads of each layer (`torch.FloatTensor` of shape `(layers,)`), in nats."""
        return torch.stack([row[:heads].mean() for row, heads in zip(self.entropy, self.num_heads, strict=True)])

    @property
    def mean_entropy(self) -> float:
        """Mean of `entropy` over all heads, in nats."""
        return self.entropy[self._exists].double().mean().item()

    @property
    def max_entropy(self) -> Tensor:
        """Mean of the largest entropy that the queries can have, the logarithm of the number of keys that each sees
        (`torch.FloatTensor` of shape `(layers, heads)`), in nats."""
        return (self._sums[..., 1] / self._sums[..., 4]).float()

    @property
    def normalized_entropy(self) -> Tensor:
        """`entropy / max_entropy`, in [0, 1] (`torch.FloatTensor` of shape `(layers, heads)`)."""
        ratio = self._sums[..., 0] / self._sums[..., 1]
        return (ratio * self._sums[..., 4] / (self._sums[..., 4] - self._sums[..., 5])).clamp(max=1.0).float()

    @property
    def nan_count(self) -> Tensor:
        """Number of seen keys whose attention weight is NaN (`torch.LongTensor` of shape `(layers, heads)`), as are
        those of the queries in `empty_count`, 0 divided by 0."""
        return self._sums[..., 2].long()

    @property
    def inf_count(self) -> Tensor:
        """Number of seen keys whose score has an infinity in its query or key (`torch.LongTensor` of shape
        `(layers, heads)`)."""
        return self._sums[..., 3].long()

    @property
    def empty_count(self) -> Tensor:
        """Number of queries of whose weights softmax clipping left nothing (`torch.LongTensor` of shape
        `(layers, heads)`): they attend to no key, so their entropy is NaN, and not in the mean."""
        return self._sums[..., 5].long()

    @property
    def num_queries(self) -> int:
        """Number of queries measured in each layer (in the layer with most, should they differ)."""
        return int(max(self._sums[..., 4].flatten().tolist(), default=0))

    @property
    def head_distribution(self) -> Tensor:
        """Share of all heads in each quarter of their own largest entropy, [0, max/4), ..., [3max/4, max]
        (`torch.FloatTensor` of shape `(4,)`). Broken heads are in none of them."""
        quarters = (4 * self.normalized_entropy[self._exists]).floor().clamp(max=3)
        return torch.stack([(quarters == quarter).float().mean() for quarter in range(4)])

    @property
    def has_logits(self) -> bool:
        """Whether the scores were looked at (`logits=True`)."""
        return bool(self._logits)

    @property
    def max_logit(self) -> Tensor:
        """Largest score of a key that a query saw (`torch.FloatTensor` of shape `(layers, heads)`). This and the next
        three need `logits=True`."""
        return self._padded_logits[..., 0].float()

    @property
    def sink_share(self) -> Tensor:
        """Mean weight of the queries on the first key that each of them may see (`torch.FloatTensor` of shape
        `(layers, heads)`): the first token of its sequence, or of its packed document, and with a sliding window the
        first in it. What an attention sink takes (arXiv 2309.17453)."""
        return (self._padded_logits[..., 1] / self._sums[..., 4]).float()

    @property
    def logsumexp(self) -> Tensor:
        """Mean log-sum-exp of the queries' scores (`torch.FloatTensor` of shape `(layers, heads)`)."""
        return (self._padded_logits[..., 2] / self._sums[..., 4]).float()

    @property
    def spectral_gap(self) -> Tensor:
        """Mean over the sequences of the difference between the two largest eigenvalues of a head's map
        (`torch.FloatTensor` of shape `(layers, heads)`), from 0 to 1 (arXiv 2311.13541). NaN for what is not causal
        or read with a cache, and where no sequence has two tokens."""
        return (self._padded_logits[..., 3] / self._padded_logits[..., 4]).float()

    def all_reduce(self) -> None:
        """Add up the measurements of all processes of the default process group, in each of them."""
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        logits = {row: logits.cpu() for row, logits in self._logits.items()}
        mine = {row: (name, total.cpu(), logits.get(row)) for row, (name, total) in self._totals.items()}
        torch.distributed.all_gather_object(gathered, mine)
        self._totals, self._logits = {}, {}
        for totals in gathered:
            for row, (name, total, of_logits) in totals.items():
                self.add(row, name, total, of_logits)

    def add(self, row: tuple[int, int], name: str, total: Tensor, logits: Tensor | None = None) -> None:
        """Add what was measured of a layer, as `_totals` and `_logits` hold it; the last column may be missing."""
        total = nn.functional.pad(total, (0, 6 - total.shape[-1]))
        if row in self._totals:
            before = self._totals[row][1]
            if before.shape != total.shape:
                raise ValueError(f"it had {len(before)} heads before, and has {len(total)} now")
            total = before + total
        self._totals[row] = (name, total)
        if logits is not None:
            earlier = self._logits.get(row)
            if earlier is not None:
                largest = torch.maximum(earlier[:, :1], logits[:, :1])
                logits = torch.cat([largest, earlier[:, 1:] + logits[:, 1:]], -1)
            self._logits[row] = logits

    @property
    def _padded_logits(self) -> Tensor:
        if self._totals and not self._logits:
            raise ValueError("scores were not looked at: record_attention_entropy(model, logits=True)")
        rows = [self._logits[row].cpu().double() for row in sorted(self._logits)]
        if not rows:
            return torch.zeros(0, 0, 5).double()
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)

    @property
    def _sums(self) -> Tensor:
        # (layers, heads, 6); where layers have fewer heads, entries without a query
        totals = [self._totals[row][1].cpu().double() for row in sorted(self._totals)]
        return nn.utils.rnn.pad_sequence(totals, batch_first=True) if totals else torch.zeros(0, 0, 6).double()

    @property
    def _exists(self) -> Tensor:
        heads = torch.tensor(self.num_heads, dtype=torch.long)
        return torch.arange(self._sums.shape[1]) < heads[:, None]
