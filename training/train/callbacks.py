"""Callbacks of the Trainer: measurements and speed into the log and into files, and what the terminal shows."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Conv1D,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks

from modeling_lnfree import AttentionEntropyCallback, use_fast_cpu
from modeling_lnfree.entropy_callback import describe_record
from modeling_lnfree.metrics.attention_entropy.record import AttentionEntropyRecord

from ..errors import explained
from ..files import append_record, drop_records_after
from ..quantities import Quantity


class MeasurementCallback(AttentionEntropyCallback):
    """
    Attention (entropy, largest logit, sink share) and other quantities, all in one forward pass of a fixed probe batch
    in evaluation mode: before the first step, every `every` steps, and after the last one. Each has a JSON-lines file
    in `run_dir`, with one record a measurement; resuming drops the records after the checkpoint's step.

    Args:
        trainer: its log, which every `report_to` receives, gets the scalars.
        quantities: what is measured beside attention entropy.
        probe (`dict` of `torch.LongTensor` of shape `(num_sequences, seq_len)`): the probe batch, `input_ids` and, if
            documents are separated, `position_ids`.
        every: steps between two measurements.
    """

    def __init__(
        self, trainer: Trainer, quantities: list[Quantity], probe: dict[str, torch.Tensor], every: int, run_dir: Path
    ):
        super().__init__(trainer, every=every, probe=probe, logits=True)
        self.quantities, self.run_dir = quantities, run_dir

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for name in ("attention_entropy", *(quantity.name for quantity in self.quantities)):
                drop_records_after(self.run_dir / f"{name}.jsonl", state.global_step)
        super().on_train_begin(args, state, control, **kwargs)

    def measure(self, model):
        # layers that are compiled run as they are: a graph of this pass would be compiled for nothing else
        with torch.compiler.set_stance("force_eager"):
            return super().measure(model)

    @contextmanager
    def watch(self, model: torch.nn.Module) -> Iterator[AttentionEntropyRecord]:
        with super().watch(model) as record, ExitStack() as stack:
            for quantity in self.quantities:
                stack.enter_context(quantity.watch(model))
            yield record

    def describe(
        self, record: AttentionEntropyRecord, model: torch.nn.Module
    ) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
        """By the name of its file, what a quantity writes into it, and its scalars for the log."""
        quantities = {quantity.name: quantity.measure(model) for quantity in self.quantities}
        return {"attention_entropy": describe_record(record), **quantities}

    def figures(self, record: AttentionEntropyRecord, state, model: torch.nn.Module) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, (values, scalars) in self.describe(record, model).items():
            if state.is_world_process_zero:
                append_record(self.run_dir / f"{name}.jsonl", {"step": state.global_step, **values})
            figures |= scalars
        return figures


class SpeedCallback(TrainerCallback):
    """
    Training tokens per second, of all processes together, and model FLOPs utilization, each time that the loss is
    logged; the time is that of the steps and of waiting for their data, without evaluations, measurements and
    checkpoints.

    A model FLOP is one that the weights and the attention of a forward and a backward pass need: 6 a token for each
    weight of a matrix product, 12 * layers * hidden size * T for attention (PaLM, arXiv 2204.02311, appendix B). They
    are divided not by a data sheet's figure but by what this machine reaches in a large matrix product in the
    training's precision, measured once at the start.

    Args:
        tokens_per_step: of all processes.
        block_size: T.
        path: JSON-lines file.
        trainer: its `log`, and its `data_seconds`, the time that it has waited for data so far.
    """

    def __init__(self, tokens_per_step: int, block_size: int, path: Path, trainer: Trainer):
        self.tokens_per_step, self.block_size, self.path, self.trainer = tokens_per_step, block_size, path, trainer
        self.seconds, self.data_seconds, self.steps = 0.0, 0.0, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            drop_records_after(self.path, state.global_step)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.token_share = token_flops(model, self.block_size) / (args.world_size * peak_flops(model.device, dtype))

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        due = state.global_step % args.logging_steps == 0 or state.global_step == state.max_steps
        if due and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        if due:
            waited, self.data_seconds = self.trainer.data_seconds - self.data_seconds, self.trainer.data_seconds
            tokens_per_second = self.steps * self.tokens_per_step / (self.seconds + waited)
            self.seconds, self.steps = 0.0, 0
            record = {"tokens_per_second": tokens_per_second, "mfu": tokens_per_second * self.token_share}
            if state.is_world_process_zero:
                append_record(self.path, {"step": state.global_step, **record})
            should_log = control.should_log
            self.trainer.log({f"speed/{key}": value for key, value in record.items()})
            control.should_log = should_log


def check_login(arguments: TrainingArguments):
    """Asks for a key of Weights & Biases where there is none; raises UserError where nobody can be asked."""
    if "wandb" in arguments.report_to and arguments.process_index == 0:
        import wandb

        with _explained("wandb"):
            wandb.login(verify=False)


def explain_trackers(trainer: Trainer):
    """Makes one line of what a tracker of `report_to` raises, for want of a login or a server for instance."""
    for name in trainer.args.report_to:
        (tracker,) = get_reporting_integration_callbacks([name])
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, tracker):
                for event in ("on_train_begin", "on_log", "on_evaluate", "on_save", "on_train_end"):
                    setattr(callback, event, _explained(name)(getattr(callback, event)))


def _explained(tracker: str):
    # each has errors of its own
    return explained(f"report_to={tracker!r} fails, and may be left out", Exception)


def token_flops(model: PreTrainedModel, block_size: int) -> int:
    """The model FLOPs of a token in sequences of `block_size`, see `SpeedCallback`."""
    products = (module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D))
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * block_size
    return 6 * sum(module.weight.numel() for module in products) + attention


@torch.no_grad()
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large linear layer, the best of five."""
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    with torch.random.fork_rng([]):  # training draws as if nothing had been measured
        layer = use_fast_cpu(torch.nn.Linear(size, size, bias=False)).to(device, dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        layer(matrix)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _brief(logs: dict[str, float]) -> dict[str, float]:
    brief = {key: value for key, value in logs.items() if "/" not in key or key == "attention_entropy/mean"}
    return brief if set(brief) - {"epoch", "step"} else {}


class BriefProgressCallback(ProgressCallback):
    """The Trainer's progress bar; of the measurements it shows the mean only."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if brief := _brief(logs):
            super().on_log(args, state, control, logs=brief, **kwargs)


class BriefPrinterCallback(PrinterCallback):
    """The Trainer's lines without a progress bar; of the measurements they hold the mean only."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if brief := _brief(logs):
            super().on_log(args, state, control, logs=brief, **kwargs)
