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

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from modeling_lnfree import LNFreeForCausalLM

from ..convert.convert import fold_norms
from ..errors import UserError
from ..files import append_record, drop_records_after, read_records


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

    def __init__(self, norm: nn.Module, parts: int = 1, skip_first: bool = False):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        # an RMSNorm has no bias, and leaves the mean
        self.centers = self.bias is not None
        self.eps, self.skip_first = norm.eps, skip_first
        like = {"dtype": torch.float32, "device": norm.weight.device}
        self.register_buffer("share", torch.ones(parts, **like))
        self.register_buffer("deviation", torch.full((parts,), torch.nan, **like))
        # sum over the tokens of this step, and their number
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64, device=norm.weight.device), persistent=False)
        self.spread: Tensor | None = None

    def normalize(self, hidden_states: Tensor, part: int = 0) -> Tensor:
        """`hidden_states` (`(batch_size, seq_len, hidden_size)`) by the norm, by the constant, or in between."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        if self.centers:
            wide = wide - wide.mean(-1, keepdim=True)
        deviation = (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()  # (B, T, 1)
        if self.training:
            self._see(deviation)
        # nothing has been seen before the first step: the part is the whole norm then
        constant = self.deviation[part].nan_to_num(1.0)
        scale = self.share[part] / deviation + (1 - self.share[part]) / constant
        normalized = (wide * scale * self.weight).to(hidden_states.dtype)
        return normalized if self.bias is None else normalized + self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.normalize(hidden_states)

    def _see(self, deviation: Tensor):
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


class RemovableAttentionNorm(RemovableNorm):
    """The norm before attention: queries and keys (part 0) and values (part 1) are normalized each for itself."""

    def __init__(self, norm: nn.Module, attention: nn.Module, skip_first: bool = False):
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
    planned, step = [], first_step
    for group, gap in zip(groups, gaps, strict=True):
        for removal in group:
            planned.append((step if not planned else planned[-1][0] + gap, removal))
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
    if config.norm_position != "pre" or config.mlp_type == "none":
        raise UserError(
            "norms can be removed where they stand before attention and MLP (norm_position='pre'), whose weights take "
            f"them up; got norm_position={config.norm_position!r}, mlp_type={config.mlp_type!r}"
        )
    for layer in model.model.layers:
        layer.input_layernorm = RemovableAttentionNorm(layer.input_layernorm, layer.self_attn, skip_first)
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
    Removes the norms one after the other: by steps, or, with a tolerance, the next one when the loss is back.
    `norm_removal.jsonl` has, at every log, the deviation and the share of every part, and the step of each removal.

    Args:
        model: with its norms wrapped.
        removals: in order, with the step before which each goes; with a tolerance, only the first step counts.
        taper_steps: steps over which a part goes from the norm to the constant, along a cosine; 0: at once.
        tolerance: in nats. The next part goes when the smoothed training loss is not more than this above what it was
            before the first one went.
        run_dir: the run's folder.
        end_run: ends an unstable run (`StabilityCallback.end`).
    """

    def __init__(
        self,
        model: LNFreeForCausalLM,
        removals: list[tuple[int, Removal]],
        run_dir: Path,
        end_run,
        *,
        taper_steps: int = 0,
        tolerance: float | None = None,
    ):
        self.model, self.removals, self.taper_steps, self.tolerance = model, removals, taper_steps, tolerance
        self.path, self.end_run = run_dir / "norm_removal.jsonl", end_run
        self.norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, RemovableNorm)}
        self.loss: float | None = None
        self.reference: float | None = None
        self.first: dict[str, float] = {}
        self.starts = [step for step, _ in removals] if tolerance is None else [removals[0][0]]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            drop_records_after(self.path, state.global_step)
        for record in read_records(self.path):
            if record["step"] <= state.global_step:
                self.loss, self.reference, self.starts = (record[key] for key in ("loss", "reference", "starts"))
                self.first = self.first or {name: values[0] for name, values in record["deviation"].items()}
        self._set_shares(state.global_step + 1)

    def on_step_begin(self, args, state, control, **kwargs):
        self._set_shares(state.global_step + 1)

    def _set_shares(self, step: int):
        for start, (_, removal) in zip(self.starts, self.removals, strict=False):
            progress = (step - start + 1) / (self.taper_steps + 1)
            if progress > 0:
                share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
                self.norms[removal.name].share[removal.part] = share if progress < 1 else 0.0

    def on_step_end(self, args, state, control, **kwargs):
        for norm in self.norms.values():
            norm.end_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not math.isfinite(logs["loss"]):
            return
        self.loss = logs["loss"] if self.loss is None else MOMENTUM * self.loss + (1 - MOMENTUM) * logs["loss"]
        step = state.global_step
        if self.tolerance is not None and step + 1 >= self.starts[0] and len(self.starts) < len(self.removals):
            self.reference = self.loss if self.reference is None else self.reference
            settled = step > self.starts[-1] + self.taper_steps
            if settled and self.loss <= self.reference + self.tolerance:
                self.starts.append(step + 1)
        deviation = {name: norm.deviation.tolist() for name, norm in self.norms.items()}
        record = {
            "step": step,
            "loss": self.loss,
            "reference": self.reference,
            "starts": list(self.starts),
            "deviation": deviation,
            "share": {name: norm.share.tolist() for name, norm in self.norms.items()},
        }
        if state.is_world_process_zero:
            append_record(self.path, record)
        self.first = self.first or {name: values[0] for name, values in deviation.items()}
        for name, values in deviation.items():
            if not values[-1] <= EXPLODED * self.first[name]:
                seen = f"the mean deviation before {name} is {values[-1]:.3g}, at first {self.first[name]:.3g}"
                self.end_run(step, seen, None, f"of the norms, {name} exploded")


def auxiliary_loss(model: LNFreeForCausalLM) -> Tensor:
    """Mean squared distance of the final norm's deviation from its mean, over the tokens of the last training pass."""
    return model.model.norm.spread
