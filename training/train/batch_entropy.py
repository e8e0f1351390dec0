"""Batch entropy as a part of the loss (arXiv 2208.01134), with targets that are learned."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_lnfree.entropy_regularization import add_gradient, add_parameter

from ..quantities import batch_entropy


class BatchEntropyLoss:
    """
    What multiplies the loss CE in `CE + CE * weight * mean over layers of (H - max(floor, |a|))^2`, as in the paper's
    published code: H is the batch entropy behind a layer, a its learned target.

    The standard deviation is over the sequences that one process has in one forward pass: with gradient accumulation
    and with several processes this is the mean of such terms, and not that of one large batch. A forward pass of a
    single sequence has none.

    Args:
        model: one of this family, whose layers' outputs are looked at.
        target: start of the targets.
    """

    def __init__(self, model: PreTrainedModel, *, weight: float, target: float, floor: float):
        self.model, self.weight, self.floor = model, weight, floor
        self.targets = nn.Parameter(torch.full((len(model.model.layers),), target, device=model.device))
        self._outputs: dict[int, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Stands around the forward pass."""
        self._outputs = {}
        with ExitStack() as stack:
            for index, layer in enumerate(self.model.model.layers):
                # no operation in the hook: under checkpointing it would be one of those that are run again
                stack.enter_context(
                    layer.register_forward_hook(
                        lambda _, args, output, index=index: self._outputs.__setitem__(index, output)
                    )
                )
            yield

    def factor(self) -> Tensor:
        """`weight * mean (H - max(floor, |a|))^2` of the forward pass that was watched last; 0 for one sequence."""
        outputs = [self._outputs[index] for index in range(len(self.targets))]
        self._outputs = {}
        if len(outputs[0]) < 2:
            return self.targets.new_zeros(())
        entropies = torch.stack([batch_entropy(output) for output in outputs])
        targets = self.targets.abs().clamp(min=self.floor)
        return self.weight * (entropies - targets).square().mean()


class BatchEntropyMixin:
    """
    A Trainer with `BatchEntropyLoss`, once `batch_entropy` is set. The loss that is logged stays the model's own;
    beside it stand `batch_entropy_factor`, the mean over the forward passes of what it is multiplied by, and the mean
    target.
    """

    batch_entropy: BatchEntropyLoss | None = None
    # of the forward passes since the last log: number, and sum of the factors
    _passes, _factor = 0, 0.0

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.batch_entropy is not None:
            add_parameter(optimizer, self.batch_entropy.targets, "batch_entropy_targets")
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.batch_entropy is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        with self.batch_entropy.watch():
            computed = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss = computed[0] if return_outputs else computed
        factor = self.batch_entropy.factor()
        self._passes, self._factor = self._passes + 1, self._factor + factor.detach()
        return add_gradient(computed, loss * factor)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._passes:
            logs["batch_entropy_factor"] = float(self._factor) / self._passes
            logs["batch_entropy_target"] = self.batch_entropy.targets.abs().mean().item()
            self._passes, self._factor = 0, 0.0
        super().log(logs, *args, **kwargs)
