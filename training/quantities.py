"""What is measured during training: a class a quantity."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from modeling_lnfree import record_attention_entropy


class Quantity(ABC):
    """What one forward pass of the probe batch shows; its file in the run's folder is `<name>.jsonl`."""

    name: str

    def watch(self, model: torch.nn.Module) -> AbstractContextManager:
        """Stands around the forward pass."""
        return nullcontext()

    @abstractmethod
    def measure(self, model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, float]]:
        """The record for the file, and the scalars for the log, after the forward pass."""


class AttentionEntropy(Quantity):
    """
    Attention entropy of every layer and head in nats, the share of heads in each quarter of its range, and the NaN
    weights and infinite scores in the attention of each layer: of the distribution before dropout, without padding.
    """

    name = "attention_entropy"

    @contextmanager
    def watch(self, model):
        with record_attention_entropy(model) as self.record:
            yield

    def measure(self, model):
        entropy = self.record.entropy.tolist()
        nan_count = self.record.nan_count.sum(-1).tolist()
        inf_count = self.record.inf_count.sum(-1).tolist()
        head_distribution = self.record.head_distribution.tolist()
        scalars = {"attention_entropy/mean": self.record.entropy.mean().item()}
        for layer, heads in enumerate(entropy):
            scalars[f"attention_entropy/layer_{layer}/mean"] = sum(heads) / len(heads)
            scalars[f"attention_nan_count/layer_{layer}"] = nan_count[layer]
            scalars[f"attention_inf_count/layer_{layer}"] = inf_count[layer]
            for head, value in enumerate(heads):
                scalars[f"attention_entropy/layer_{layer}/head_{head}"] = value
        for quarter, share in enumerate(head_distribution):
            scalars[f"attention_entropy/share_of_heads_in_quarter_{quarter}"] = share
        record = {
            "entropy": entropy,
            "max_entropy": self.record.max_entropy.mean().item(),
            "head_distribution": head_distribution,
            "nan_count": nan_count,
            "inf_count": inf_count,
        }
        return record, scalars


class NegativeSlope(Quantity):
    """Learned negative slopes: one a layer, or the one that all layers share."""

    name = "negative_slope"

    def measure(self, model):
        slopes = model.model.learned_slope.negative_slope.detach().float().tolist()
        return {"slopes": slopes}, {f"negative_slope/{index}": slope for index, slope in enumerate(slopes)}


class ResidualStream(Quantity):
    """
    The residual stream behind every layer: the mean L2 norm of a token's vector, and the kurtosis of the activations'
    root mean squares over the hidden size, from 1 (all dimensions alike) to the hidden size (one outlier feature has
    everything), arXiv 2405.19279.
    """

    name = "residual_stream"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        # per layer: sums over tokens of each dimension's square, and of the norm; number of tokens
        self.sums = torch.zeros(len(layers), model.config.hidden_size + 2, dtype=torch.float64)

        def add(layer: int, output: torch.Tensor):
            # the GPUs of Apple have no float64
            dtype = torch.float32 if output.device.type == "mps" else torch.float64
            squares = output.to(dtype).square().flatten(0, -2)  # (tokens, D)
            tokens = torch.full((1,), len(squares), device=squares.device)
            self.sums[layer] += torch.cat([squares.sum(0), squares.sum(-1).sqrt().sum()[None], tokens]).cpu()

        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(
                    layer.register_forward_hook(lambda _, args, output, index=index: add(index, output))
                )
            yield
        self.sums = _add_up(self.sums, model.device)

    def measure(self, model):
        mean_squares = self.sums[:, :-2] / self.sums[:, -1:]  # (layers, D)
        norm = (self.sums[:, -2] / self.sums[:, -1]).tolist()
        kurtosis = (mean_squares.square().mean(-1) / mean_squares.mean(-1).square()).tolist()
        scalars = {f"residual_stream/layer_{layer}/norm": value for layer, value in enumerate(norm)}
        scalars |= {f"residual_stream/layer_{layer}/kurtosis": value for layer, value in enumerate(kurtosis)}
        return {"norm": norm, "kurtosis": kurtosis}, scalars


class ZeroActivations(Quantity):
    """Share of the activations in every block's feed-forward layer that are exactly zero: what ReLU switches off."""

    name = "zero_activations"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        self.counts = torch.zeros(len(layers), 2, dtype=torch.float64)  # zeros, activations

        def add(layer: int, output: torch.Tensor):
            self.counts[layer, 0] += (output == 0).sum().item()
            self.counts[layer, 1] += output.numel()

        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(
                    layer.mlp.act_fn.register_forward_hook(lambda _, args, output, index=index: add(index, output))
                )
            yield
        self.counts = _add_up(self.counts, model.device)

    def measure(self, model):
        share = (self.counts[:, 0] / self.counts[:, 1]).tolist()
        return {"share": share}, {f"zero_activations/layer_{layer}": value for layer, value in enumerate(share)}


def _add_up(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sums over the processes, each of which saw its part of the probe batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    sums = sums.to(device)
    torch.distributed.all_reduce(sums)
    return sums.cpu()
