"""Attention entropy as a loss (AERO, arXiv 2410.13060; arXiv 2501.03489), for any model that the recorder measures.

With E the mean entropy of a head's queries, M the mean of the largest that these queries can have (the logarithm of
the number of keys that each sees), and a threshold t for each head,

    delta = E - t M,    penalty = mean over layers of the mean over heads of (delta^2 if |delta| > margin M, else 0),

in nats^2. AERO has log T in place of M, which a causal head cannot reach. Both directions count: a head above its
threshold (overload) and one below it (collapse). No (T, T) map is formed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .metrics.attention_entropy.recorder import LayerEntropy, record_attention_entropy, uses_attention_interface


def _world_size() -> int:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def add_parameter(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str) -> None:
    """
    Hands a parameter that belongs to no model to an optimizer: without weight decay, its gradient averaged over the
    processes before each step, and gone after it. The optimizer's state dict holds its value too, under `name`, so
    that it is saved and resumed wherever the optimizer is. A second call of the same pair changes nothing.
    """
    if any(parameter is other for group in optimizer.param_groups for other in group["params"]):
        return

    def average(*args):
        if parameter.grad is not None and _world_size() > 1:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= _world_size()

    def forget_gradient(*args):
        # who empties the gradients of the model alone, as the Trainer does, leaves this one
        parameter.grad = None

    def load(optimizer, state_dict):
        if name not in state_dict:
            raise ValueError(f"the optimizer's state has no {name!r}: it was saved without them")
        with torch.no_grad():
            parameter.copy_(state_dict[name])

    last = optimizer.param_groups[-1]
    optimizer.add_param_group({"params": [parameter], "weight_decay": 0.0})
    # ahead of the others, so that the last stays that of the layers, where these have a rule of their own
    if optimizer.param_groups[-1] is not last:
        optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    optimizer.register_step_pre_hook(average)
    optimizer.register_step_post_hook(forget_gradient)
    optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: {**state_dict, name: parameter.detach()})
    optimizer.register_load_state_dict_pre_hook(load)


class EntropyRegularizer:
    """
    The penalty on attention entropy of a model in training.

    ```python
    regularizer = EntropyRegularizer(model, weight=1e-5)
    regularizer.add_to(optimizer)
    for batch in batches:
        with regularizer.measure():
            loss = model(**batch).loss + regularizer.penalty()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ```

    In a Trainer of transformers or TRL: `EntropyRegularizationMixin`. With several processes, `penalty` is that of the
    whole batch, and the gradient is right where gradients are averaged over the processes, as DDP does. With gradient
    accumulation, call `look_ahead` before the first micro-batch.

    Args:
        model (`nn.Module`): what `record_attention_entropy` measures.
        weight (`float`): of the penalty in the loss; AERO has 1e-5 and 5e-5.
        margin (`float`, defaults to 0.2): share of a head's largest entropy around its threshold where the penalty is
            exactly 0.
        target (`float` or `Tensor` that broadcasts to `(layers, heads)`, defaults to 0.5): thresholds as shares of a
            head's largest entropy, in [0, 1]; where they are learned, their start.
        learned (`bool`, defaults to `True`): whether the thresholds are trained (AERO) or fixed.

    Attributes:
        targets (`nn.Parameter` of shape `(layers, heads)`): the thresholds.

    Raises:
        ValueError: for a weight that is not above 0, a margin or target outside [0, 1], and a model that cannot be
            measured.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float,
        margin: float = 0.2,
        target: float | Tensor = 0.5,
        learned: bool = True,
    ):
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight must be finite and more than 0, got {weight}")
        if not 0 <= margin <= 1:
            raise ValueError(f"margin must be in [0, 1], got {margin}")
        target = torch.as_tensor(target, dtype=torch.float32)
        if not ((target >= 0) & (target <= 1)).all():
            raise ValueError(f"target must be in [0, 1], got {target.tolist()}")
        self.model, self.weight, self.margin = model, weight, margin
        with record_attention_entropy(model, reduce=False):  # raises for a model that cannot be measured
            pass
        self._layers = [
            name
            for name, module in model.named_modules()
            if uses_attention_interface(type(module))  # type: ignore[arg-type]  # a class is hashable
        ]
        configs = (vars(module).get("config") for module in model.modules())
        heads = max(getattr(config, "num_attention_heads", 0) for config in configs)
        device = next(model.parameters()).device
        self.targets = nn.Parameter(target.to(device).expand(len(self._layers), heads).clone(), requires_grad=learned)
        self._measured: list[LayerEntropy] | None = None
        # of the whole step, where its micro-batches were looked at before; their number, and how many are to come
        self._ahead: Tensor | None = None
        self._micro_batches = self._left = 1

    def add_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Hands learned thresholds to an optimizer, which then trains, saves and resumes them."""
        if self.targets.requires_grad:
            add_parameter(optimizer, self.targets, "entropy_targets")

    @contextmanager
    def measure(self) -> Iterator[None]:
        """
        Stands around the forward pass of a micro-batch, and leaves the outputs of the model as they are. With gradient
        checkpointing, which runs the layers again, the backward pass stands in it too.
        """
        self._measured = []
        with record_attention_entropy(self.model, reduce=False, differentiable=True, on_layer=self._measured.append):
            yield

    def look_ahead(self, forward: Callable[[Any], Any], micro_batches: Sequence[Any]) -> None:
        """
        Measures all micro-batches of a step before the first is trained on: the penalty is not a sum over sequences,
        and its gradient in one micro-batch needs the entropies of all. This costs one more forward pass without
        gradients of each, unless there is only one; random numbers are drawn afterwards as if it had not been made.
        """
        self._micro_batches = self._left = len(micro_batches)
        self._ahead = None
        if self._micro_batches == 1:
            return
        device = self.targets.device
        totals = []
        with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            for micro_batch in micro_batches:
                with self.measure():
                    forward(micro_batch)
                totals.append(self._totals())
        self._ahead = _add_up(torch.stack(totals).sum(0))

    def penalty(self) -> Tensor:
        """
        The penalty, times its weight, for the forward pass that was measured last; of several micro-batches, the share
        of this one, so that values and gradients add up to those of one large batch.

        Raises:
            RuntimeError: if no attention was measured, or what was measured carries no gradient.
        """
        if self._measured is None:
            raise RuntimeError("penalty() needs a forward pass inside `with regularizer.measure():`")
        own = self._totals()
        if torch.is_grad_enabled() and not own.requires_grad:
            raise RuntimeError(
                f"the attention entropy of {type(self.model).__name__} carries no gradient: gradient checkpointing "
                "must have use_reentrant=False, and some parameter before the attention must be trained"
            )
        # the other processes and micro-batches are constants; DDP divides gradients by the number of processes
        total = _add_up(own.detach()) if self._ahead is None else self._ahead
        total = total + _world_size() * (own - own.detach())
        entropy, largest, number = total.unbind(-1)  # (layers, heads)
        present = number > 0
        number = torch.where(present, number, 1)
        entropy, largest = entropy / number, largest / number
        share = 1 / self._micro_batches
        targets = self.targets.detach() + share * (self.targets - self.targets.detach())
        delta = entropy - targets * largest
        squared = torch.where(delta.abs() <= self.margin * largest, 0, delta.square())
        # layers of other attention may have fewer heads
        penalty = self.weight * (squared.sum(1) / present.sum(1).clamp(min=1)).mean()
        self._measured = None
        self._left -= 1
        if self._left == 0:
            self._ahead, self._micro_batches, self._left = None, 1, 1
        return penalty - (1 - share) * penalty.detach()

    def _totals(self) -> Tensor:
        """Sums over the queries of entropy, largest entropy and 1, `(layers, heads, 3)`, of this process."""
        if not self._measured:
            raise RuntimeError(
                f"no attention of {type(self.model).__name__} was measured in the forward pass: a copy of the model "
                "ran (nn.DataParallel), or a graph that torch.compile made before"
            )
        totals = self.targets.new_zeros(*self.targets.shape, 3, dtype=torch.float64)
        for layer, entropy, largest in self._measured:
            # padding has NaN
            counted = ~entropy.isnan()
            columns = (torch.where(counted, entropy, 0), torch.where(counted, largest, 0), counted)
            sums = torch.stack([column.sum((0, 2), dtype=torch.float64) for column in columns], -1)
            # a layer that runs again has the number of the run behind its name
            row, heads = self._layers.index(layer.partition("[")[0]), torch.arange(len(sums), device=totals.device)
            totals = totals.index_put((torch.full_like(heads, row), heads), sums, accumulate=True)
        return totals


def _add_up(totals: Tensor) -> Tensor:
    """Sums over the processes."""
    if _world_size() > 1:
        totals = totals.clone()
        torch.distributed.all_reduce(totals)
    return totals


def is_share(trainer: Any, num_items_in_batch: Any) -> bool:
    """
    Whether a Trainer takes its losses for shares of the whole batch's, which add up to it; other losses it divides by
    the number of micro-batches.
    """
    # what newer versions of transformers let a class say itself
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return scaled
    return trainer.compute_loss_func is not None or (
        trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    )


def add_gradient(computed: Any, penalty: Tensor) -> Any:
    """
    What a Trainer's `compute_loss` gave, a loss or a tuple that begins with one, with the gradient of the penalty and
    not its value: the loss that is logged stays the model's own.
    """
    loss, *others = computed if isinstance(computed, tuple) else (computed,)
    loss = loss + (penalty - penalty.detach()).to(loss)
    return (loss, *others) if others else loss


class EntropyRegularizationMixin:
    """
    A Trainer with the penalty: `Trainer` of transformers, `SFTTrainer` of TRL, and what derives from them.

    ```python
    class RegularizedTrainer(EntropyRegularizationMixin, SFTTrainer):
        pass

    trainer = RegularizedTrainer(model, args=args, train_dataset=dataset)
    trainer.entropy_regularizer = EntropyRegularizer(trainer.model, weight=1e-5)
    trainer.train()
    ```

    The thresholds are in the optimizer and in its checkpoints. The loss that is logged stays the model's own; beside
    it stand `entropy_penalty`, the mean of the steps since the last log, weight included, and `entropy_target`, the
    mean of learned thresholds. Clipping sees the model's gradients alone. Evaluation has no penalty.
    """

    entropy_regularizer: EntropyRegularizer | None = None
    _micro_batches: Sequence[Any] | None = None
    # steps and sum of their penalties since the last log
    _steps, _penalty = 0, 0.0

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.entropy_regularizer is not None:
            self.entropy_regularizer.add_to(optimizer)
        return optimizer

    def get_batch_samples(self, *args, **kwargs):
        samples = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = samples[0]
        return samples

    def training_step(self, model, inputs, *args, **kwargs):
        regularizer = self.entropy_regularizer
        if regularizer is None:
            return super().training_step(model, inputs, *args, **kwargs)
        if self._micro_batches is not None:
            # not when they are fetched: the Trainer sets the random numbers of a checkpoint after that
            model.train()
            regularizer.look_ahead(self._look_at, self._micro_batches)
            self._micro_batches = None
            self._steps += 1
        with regularizer.measure():
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        kwargs |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        computed = super().compute_loss(model, inputs, **kwargs)
        if self.entropy_regularizer is None or not model.training:
            return computed
        penalty = self.entropy_regularizer.penalty()
        self._penalty += penalty.detach()
        # it is a share in any case
        if not is_share(self, num_items_in_batch):
            penalty = penalty * self.current_gradient_accumulation_steps
        return add_gradient(computed, penalty)

    def _look_at(self, micro_batch):
        inputs = self._prepare_inputs(micro_batch)
        self.model(**{name: value for name, value in inputs.items() if name != "labels"})

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._steps:
            logs["entropy_penalty"] = float(self._penalty) / self._steps
            if self.entropy_regularizer.targets.requires_grad:
                logs["entropy_target"] = self.entropy_regularizer.targets.mean().item()
            self._steps, self._penalty = 0, 0.0
        super().log(logs, *args, **kwargs)
