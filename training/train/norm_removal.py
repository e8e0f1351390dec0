"""
Taking the norms out of a trained model while it is fine-tuned (Heimersheim, arXiv 2409.13710; arXiv 2507.02559; the
smooth form is TaperNorm's, arXiv 2602.10408).

A norm divides each token by a deviation of its own. Removed, it divides all tokens by one constant, the running mean
of that deviation, frozen at that moment: what is left is linear, and `fold_norms` folds it into the weights. The norm
before attention goes in two parts: that of queries and keys, and later that of values.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from modeling_lnfree import LNFreeForCausalLM
from modeling_lnfree.entropy_regularization import add_gradient, is_share

from ..convert.convert import fold_norms
from ..errors import UserError
from ..files import append_record, drop_records_after, read_records
from ..methods import MethodArguments


# share of the running mean that outlives a step of the optimizer; of the smoothed loss, that outlives a log
MOMENTUM = 0.9
# a mean deviation so many times the first one has exploded
EXPLODED = 1e3


class RemovableNorm(nn.Module):
    """
    A LayerNorm or RMSNorm whose parts can each be replaced by a division by a constant. The parameters keep their
    names in the model.

    Args:
        norm: the norm that it stands for, whose parameters it takes over.
        parts: how many parts are removed one by one.
        skip_first: leaves position 0 out of the running mean, and nowhere else: only one constant can be folded.

    Attributes:
        share (buffer of shape `(parts,)`): 1 where the part is the norm, 0 where it is removed, in between while it
            tapers off.
        deviation (buffer of shape `(parts,)`): running mean over tokens, one step of the optimizer after the other; it
            stands still once the part is removed.
    """

    weight: Tensor
    share: Tensor
    deviation: Tensor
    seen: Tensor

    def __init__(self, norm: Any, parts: int = 1, skip_first: bool = False):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        # an RMSNorm has no bias, and leaves the mean
        self.centers = self.bias is not None
        self.eps, self.skip_first, device = norm.eps, skip_first, norm.weight.device
        self.register_buffer("share", torch.ones(parts, device=device))
        self.register_buffer("deviation", torch.full((parts,), torch.nan, device=device))
        # sum over the tokens of this step, and their number
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64, device=device), persistent=False)
        self.spread: Tensor | None = None

    def normalize(self, hidden_states: Tensor, part: int = 0) -> Tensor:
        """`hidden_states` (`(batch_size, seq_len, hidden_size)`) by the norm, by the constant, or in between."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.centers:
            wide = wide - wide.mean(-1, keepdim=True)
        deviation = (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()  # (B, T, 1)
        if self.training:
            self._collect(deviation)
        # nothing has been seen before the first step: the part is the whole norm then
        constant = self.deviation[part].nan_to_num(1.0)
        scale = self.share[part] / deviation + (1 - self.share[part]) / constant
        normalized = (wide * scale * self.weight).to(hidden_states.dtype)
        return normalized if self.bias is None else normalized + self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.normalize(hidden_states)

    def _collect(self, deviation: Tensor):
        """Adds what tokens show in this step to the sums of the running mean, and keeps how far they spread."""
        counted = deviation[:, 1:] if self.skip_first else deviation
        self.spread = (counted - counted.detach().mean()).square().mean()
        with torch.no_grad():
            self.seen += torch.stack([counted.double().sum(), self.seen.new_tensor(counted.numel())])

    @torch.no_grad()
    def end_step(self):
        """Moves the running means of the parts that are there by what all processes have seen in this step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.seen)
        mean = (self.seen[0] / self.seen[1]).float()
        moved = torch.where(self.deviation.isnan(), mean, MOMENTUM * self.deviation + (1 - MOMENTUM) * mean)
        self.deviation.copy_(torch.where(self.share > 0, moved, self.deviation))
        self.seen.zero_()


class SplitNorm(RemovableNorm):
    """The norm before attention: queries and keys (part 0) and values (part 1) are normalized each for itself."""

    def __init__(self, norm: Any, attention: Any, skip_first: bool = False):
        super().__init__(norm, parts=2, skip_first=skip_first)
        for name, part in (("q_proj", 0), ("k_proj", 0), ("v_proj", 1)):
            hook = functools.partial(self._normalize_input, part=part)
            attention.get_submodule(name).register_forward_pre_hook(hook)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def _normalize_input(self, projection: nn.Module, args: tuple[Tensor], part: int) -> tuple[Tensor]:
        return (self.normalize(args[0], part), *args[1:])


@dataclass(frozen=True)
class Removal:
    """One part of one norm: the name of the module in the model, and which of its parts."""

    name: str
    part: int = 0

    @property
    def title(self) -> str:
        """For people: `layers.3.input_layernorm (query and key)`."""
        name = self.name.removeprefix("model.")
        return f"{name} ({('query and key', 'value')[self.part]})" if name.endswith("input_layernorm") else name


def plan_removals(
    num_layers: int, first_step: int, gaps: Sequence[int], keep_final_norm: bool
) -> list[tuple[int, Removal]]:
    """
    The published order (arXiv 2507.02559): the norms before the MLPs, then queries and keys, then values, each from
    the first layer up, and the final norm last.

    Args:
        first_step: the step, counted from 1, before which the first one goes.
        gaps: steps from one to the next, among MLP norms, query and key, values, and before the final norm.

    Returns:
        The step before which each goes.
    """
    layers = range(num_layers)
    groups = [
        [Removal(f"model.layers.{layer}.post_attention_layernorm") for layer in layers],
        [Removal(f"model.layers.{layer}.input_layernorm", 0) for layer in layers],
        [Removal(f"model.layers.{layer}.input_layernorm", 1) for layer in layers],
        [] if keep_final_norm else [Removal("model.norm")],
    ]
    planned: list[tuple[int, Removal]] = []
    for group, gap in zip(groups, gaps, strict=True):
        for removal in group:
            planned.append((planned[-1][0] + gap if planned else first_step, removal))
    return planned


def wrap_norms(model: LNFreeForCausalLM, keep_final_norm: bool, skip_first: bool = False) -> LNFreeForCausalLM:
    """
    Puts a `RemovableNorm` in the place of every norm that is to go, in place.

    Raises:
        UserError: for a model whose norms cannot be folded away once they are constants.
    """
    config = model.config
    if config.norm_type not in ("layernorm", "rmsnorm") or config.final_norm_type not in ("none", config.norm_type):
        raise UserError(
            f"norms can be removed from a model whose norms are all layernorm or all rmsnorm, got {config.variant} "
            f"(norm_type={config.norm_type!r}, final_norm_type={config.final_norm_type!r})"
        )
    # what else reads a norm's output has no weights that take it up
    taken_up = {"norm_position": ("pre",), "mlp_type": ("two_layer", "gated"), "attention_gate_init": (None,)}
    for name, allowed in {**taken_up, "identity_projections": ([], ["o_proj"])}.items():
        for layer in config.per_layer_config:
            if (found := getattr(layer, name)) not in allowed:
                raise UserError(
                    f"norms can be removed from models with {name} one of {', '.join(map(repr, allowed))}, whose "
                    f"weights take them up; got {found!r}"
                )
    for layer in model.model.layers:
        layer.input_layernorm = SplitNorm(layer.input_layernorm, layer.self_attn, skip_first)
        layer.post_attention_layernorm = RemovableNorm(layer.post_attention_layernorm, skip_first=skip_first)
    if not keep_final_norm and config.final_norm_type != "none":
        model.model.norm = RemovableNorm(model.model.norm, skip_first=skip_first)
    return model


def fold(model: LNFreeForCausalLM) -> LNFreeForCausalLM:
    """
    An ordinary model without the norms that have been removed, with equal logits.

    Raises:
        UserError: if a norm is not removed yet.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, RemovableNorm)}
    left = [name for name, norm in norms.items() if bool((norm.share > 0).any())]
    if left:
        raise UserError(f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} not removed: train for more steps")
    deviations = {name: norm.deviation.tolist() for name, norm in norms.items()}
    extra = ("share", "deviation")
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] not in extra}
    config = fold_norms(state, model.config, deviations)
    with torch.device("meta"):
        folded = type(model)(config)
    folded.load_state_dict(state, assign=True)
    folded.tie_weights()
    folded.generation_config = model.generation_config
    return folded.train(model.training)


class NormRemovalCallback(TrainerCallback):
    """
    Removes the norms one after the other: by steps, or, with a tolerance, the next one when the loss is back; then the
    last go in any case before the training ends. `norm_removal.jsonl` has, at every log, the deviation and the share
    of every part, and the steps of the removals.

    Args:
        trainer: of a model whose norms are wrapped.
        options: the recipe's.
        run_dir: the run's folder.

    Raises:
        UserError: for a schedule that does not end within the training's steps.
    """

    def __init__(self, trainer: Trainer, options: MethodArguments, run_dir: Path):
        self.trainer, self.path = trainer, run_dir / "norm_removal.jsonl"
        self.taper_steps, self.tolerance = options.remove_norms_taper, options.remove_norms_tolerance
        model = trainer.model
        trainer.auxiliary_weight = options.remove_norms_auxiliary_weight
        self.norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, RemovableNorm)}
        planned = plan_removals(
            model.config.num_hidden_layers,
            int(options.remove_norms_from or 0),
            options.remove_norms_gaps,
            "model.norm" not in self.norms,
        )
        self.removals = [removal for _, removal in planned]
        # the steps before which they go, as far as known
        self.starts = [step for step, _ in planned] if self.tolerance is None else [planned[0][0]]
        self.loss: float | None = None
        self.reference: float | None = None
        self.first: dict[str, float] = {}
        last = planned[-1][0] + self.taper_steps
        if self.tolerance is None and last > trainer.args.max_steps:
            raise UserError(
                f"the last of {len(planned)} norms is gone at step {last}, and max_steps is {trainer.args.max_steps}: "
                "raise it, or lower remove_norms_from, remove_norms_gaps or remove_norms_taper"
            )

    def on_train_begin(self, args, state, control, **kwargs):
        records = [record for record in read_records(self.path) if record["step"] <= state.global_step]
        if state.global_step == 0:
            records = []
        if records:
            self.loss, self.reference, self.starts = (records[-1][key] for key in ("loss", "reference", "starts"))
            self.first = {name: values[-1] for name, values in records[0]["deviation"].items()}
        if state.is_world_process_zero:
            drop_records_after(self.path, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        for start, removal in zip(self.starts, self.removals, strict=False):
            progress = (state.global_step + 2 - start) / (self.taper_steps + 1)
            if progress > 0:
                share = 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * progress))
                self.norms[removal.name].share[removal.part] = share

    def on_step_end(self, args, state, control, **kwargs):
        for norm in self.norms.values():
            norm.end_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not math.isfinite(logs["loss"]):
            return
        step = state.global_step
        self.loss = logs["loss"] if self.loss is None else MOMENTUM * self.loss + (1 - MOMENTUM) * logs["loss"]
        if step < self.starts[0]:
            self.reference = self.loss
        elif self.tolerance is not None and len(self.starts) < len(self.removals):
            left = len(self.removals) - len(self.starts)
            # the last ones go in any case, one a log, before the training ends
            is_late = state.max_steps - step <= (left + 1) * args.logging_steps + self.taper_steps
            settled = step >= self.starts[-1] + self.taper_steps and self.reference is not None
            if is_late or settled and self.loss <= self.reference + self.tolerance:
                self.starts.append(step + 1)
        deviation = {name: norm.deviation.tolist() for name, norm in self.norms.items()}
        if state.is_world_process_zero:
            record = {"step": step, "loss": self.loss, "reference": self.reference, "starts": list(self.starts)}
            shares = {name: norm.share.tolist() for name, norm in self.norms.items()}
            append_record(self.path, {**record, "deviation": deviation, "share": shares})
        self.first = self.first or {name: values[-1] for name, values in deviation.items()}
        for name, values in deviation.items():
            if not values[-1] <= EXPLODED * self.first[name]:
                seen = f"the mean deviation before {name} is {values[-1]:.3g}, at first {self.first[name]:.3g}"
                self.trainer.stability.end(step, seen, None, f"{name} is the norm that exploded")


class NormRemovalMixin:
    """
    A Trainer with the auxiliary loss of norm removal, once `auxiliary_weight` is not 0: the mean squared distance of
    the final norm's deviations from their mean (arXiv 2507.02559). The loss that is logged stays the model's own.
    """

    auxiliary_weight = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        kwargs |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        computed = super().compute_loss(model, inputs, **kwargs)
        if not self.auxiliary_weight or not model.training:
            return computed
        penalty = self.auxiliary_weight * self.model.model.norm.spread
        if is_share(self, num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        return add_gradient(computed, penalty)
