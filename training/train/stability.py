"""When a run is unstable, and where it broke: it ends there with a report, its last sound checkpoint kept."""

import json
import math
import re
import statistics
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from ..errors import UserError
from ..files import append_record, drop_records_after, read_records, write_atomically
from ..runs import REPORT, describe_instability, list_checkpoints


RECENT, BEFORE, FACTOR = 10, 100, 20
# root mean square of the stream's entries; with LayerNorm it was from 2 to 20
LARGE_STREAM = 50
# of the stream, in a report
MEASUREMENTS = 2


class UnstableRunError(UserError):
    """A run that ended because it is unstable; its message names the step, what was seen, and where."""


class StabilityCallback(TrainerCallback):
    """
    Ends a run that is unstable, by `UnstableRunError`:

    - a gradient norm that is not finite, before the weights take that step (with fp16's loss scaling such steps are
      left out by the scaler, and not looked at). On an accelerator, which reading a number would hold up in every
      step, norms are read when the loss is logged; until then the weights get zeros for such a gradient;
    - a loss, of training or evaluation, or an attention map of the probe batch that is not finite;
    - gradient norms far outside their history: past the warm-up, the median of the last 10 steps is more than 20 times
      that of the 100 before. One outlier is not enough: clipping takes care of it.

    The report has the residual stream at the last measurements, and what to try. Without norms in the blocks, a stream
    of the probe batch far larger than runs with LayerNorm reach, with a root mean square above 50, is told while the
    run goes on, and again when it has grown tenfold. Blocks with norms do not see how large it is.

    `gradient_norm.jsonl` holds the norm, before clipping, of every step.

    Args:
        run_dir: the run's folder.
        model: to look into once something is wrong.
    """

    def __init__(self, run_dir: Path, model: PreTrainedModel):
        self.run_dir, self.model = run_dir, model
        self.path = run_dir / "gradient_norm.jsonl"
        # of the steps since the last record: what was read, and what still is on the device, with the step's batch
        self.pending: list[float] = []
        self.unread: list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]] = []
        self.reads_at_once = True
        self.writes = True
        self.batch: dict[str, torch.Tensor] | None = None
        self.told_stream = LARGE_STREAM * model.config.hidden_size**0.5

    def on_train_begin(self, args, state, control, **kwargs):
        self.args, self.max_steps = args, state.max_steps
        self.reads_at_once = args.device.type == "cpu"
        self.warmup_steps = args.get_warmup_steps(state.max_steps)
        self.writes = state.is_world_process_zero
        if self.writes:
            drop_records_after(self.path, state.global_step)
        norms = [norm for record in read_records(self.path) for norm in record["norms"]]
        past_warmup = norms[: state.global_step][self.warmup_steps :]
        self.norms = [norm for norm in past_warmup if math.isfinite(norm)]

    def check_gradient(self, step: int, norm: torch.Tensor, batch: dict[str, torch.Tensor], scaled: bool):
        """
        Looks at the gradient of a step that is about to be made.

        Args:
            norm: before clipping, a number on the model's device.
            batch: inputs of the step, to find again what is not finite.
            scaled: whether fp16's scaler sees to what is not finite.
        """
        self.batch = batch
        self.unread.append((step, norm, batch))
        if self.reads_at_once or step % self.args.logging_steps == 0 or step == self.max_steps:
            unread, self.unread = self.unread, []
            norms = torch.stack([norm for _, norm, _ in unread]).tolist()  # the one place that waits for the device
            for (step, _, batch), value in zip(unread, norms, strict=True):
                self.check_norm(step, value, batch, scaled)
        elif not scaled:
            drop_broken_gradients(self.model, norm)

    def check_norm(self, step: int, norm: float, batch: dict[str, torch.Tensor], scaled: bool):
        """As `check_gradient`, once the norm is read."""
        self.pending.append(norm)
        if not math.isfinite(norm):
            if not scaled:
                self.end(step, f"the gradient norm is {norm}", *locate(self.model, batch))
            return
        if step <= self.warmup_steps:
            return
        self.norms = [*self.norms[1 - RECENT - BEFORE :], norm]
        if len(self.norms) == RECENT + BEFORE:
            before, recent = statistics.median(self.norms[:BEFORE]), statistics.median(self.norms[BEFORE:])
            if recent > FACTOR * before:
                largest = max(
                    (parameter.grad.norm().item(), name)
                    for name, parameter in self.model.named_parameters()
                    if parameter.grad is not None
                )[1]
                seen = (
                    f"the median gradient norm of the last {RECENT} steps is {recent:.3g}, more than {FACTOR} times "
                    f"the {before:.3g} of the {BEFORE} before"
                )
                self.end(step, seen, _layer(largest), f"the largest gradient is that of {largest}")

    def on_step_end(self, args, state, control, **kwargs):
        if self.writes and (state.global_step % args.logging_steps == 0 or state.global_step == state.max_steps):
            append_record(self.path, {"step": state.global_step, "norms": self.pending})
            self.pending = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, value in logs.items():
            if key in ("loss", "eval_loss") and not math.isfinite(value):
                self.end(state.global_step, f"the {key} is {value}", *locate(self.model, self.batch))
            name, _, layer = key.partition("/layer_")
            # NaN weights of heads that have an entropy are of queries that softmax clipping leaves none
            empty = name == "attention_nan_count" and math.isfinite(
                logs.get(f"attention_entropy/layer_{layer}/mean", math.nan)
            )
            if name in ("attention_nan_count", "attention_inf_count") and value and not empty:
                what = "NaN weights" if name == "attention_nan_count" else "infinite scores"
                found = locate(self.model, self.batch)[1]
                self.end(state.global_step, f"{value} {what} in the attention of the probe batch", int(layer), found)
        self.look_at_stream(state.global_step, logs)

    def look_at_stream(self, step: int, logs: dict[str, float]):
        """Tells, in the first process, of a measured stream that is far too large."""
        if self.model.config.norm_type != "none":
            return
        norms = [value for key, value in logs.items() if re.fullmatch(r"residual_stream/layer_\d+/norm", key)]
        if not norms or not max(norms) > self.told_stream:
            return
        layer = norms.index(max(norms))
        self.told_stream = 10 * max(norms)
        if self.writes:
            print(
                f"warning: {self.run_dir}, step {step}: the stream behind layer {layer} has a norm of "
                f"{norms[layer]:.3g}, far more than runs with LayerNorm reach; {self.advise()}"
            )

    def advise(self) -> str:
        """What may keep such a run stable."""
        now = f"a longer warm-up than {self.warmup_steps} steps, a learning_rate below {self.args.learning_rate:g}"
        if self.model.config.norm_type != "none":
            return f"try {now}"
        return f"try {now}, or the preset @Stable with the optimizer of the recipe gpt2_t128_stable"

    def check_weights(self, step: int):
        """Before a checkpoint, which must be sound."""
        if (found := _broken_weights(self.model)) is not None:
            self.end(step, "the weights are not finite", *found)

    def end(self, step: int, seen: str, layer: int | None, found: str):
        """Writes the report and ends the run."""
        last = next((path.name for path in reversed(list_checkpoints(self.run_dir))), None)
        report = {
            "step": step,
            "layer": layer,
            "seen": seen,
            "found": found,
            "last_checkpoint": last,
            "stream": read_records(self.run_dir / "residual_stream.jsonl")[-MEASUREMENTS:],
            "advice": self.advise(),
        }
        if self.writes:
            write_atomically(self.run_dir / REPORT, json.dumps(report, indent=1))
        raise UnstableRunError(f"{self.run_dir} {describe_instability(report)}")


@torch.no_grad()
def drop_broken_gradients(model: torch.nn.Module, norm: torch.Tensor):
    """Zeros for gradients whose norm is not finite, without reading it."""
    broken = ~norm.isfinite()
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            grad.masked_fill_(broken, 0.0)


def locate(model: PreTrainedModel, batch: dict[str, torch.Tensor] | None = None) -> tuple[int | None, str]:
    """
    The layer (None outside the layers) and the place where numbers first stop being finite: in the weights, else in a
    forward pass of the batch, else in its backward pass.
    """
    if (found := _broken_weights(model)) is not None:
        return found
    if batch is None:
        return None, "all weights are finite"
    outputs: list[str] = []

    def look(name: str):
        def hook(module, args, output):
            tensor = output if isinstance(output, torch.Tensor) else next(iter(output), None)
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                outputs.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    model.zero_grad()
    try:
        with torch.enable_grad():
            model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if outputs:
        return _layer(outputs[0]), f"in the forward pass the first output that is not finite is that of {outputs[0]}"
    # the backward pass goes from the last layer to the first
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return _layer(name), f"in the backward pass the first gradient that is not finite is that of {name}"
    return None, "weights, outputs and gradients are finite when the batch is computed again"


def _broken_weights(model: torch.nn.Module) -> tuple[int | None, str] | None:
    for name, parameter in model.named_parameters():
        broken = int((~parameter.isfinite()).sum())
        if broken:
            return _layer(name), f"{broken:,} of the {parameter.numel():,} entries of {name} are not finite"
    return None


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
