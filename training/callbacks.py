"""What is measured during training: a callback a quantity, each through the Trainer's log and into a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from modeling_lnfree import record_attention_entropy


class MeasurementCallback(TrainerCallback):
    """
    Measures before the first step, every `every` steps, and after the last one.

    Args:
        every: steps between two measurements.
        path: JSON-lines file, one record a measurement. Resuming drops the records after the checkpoint's step.
        log: the Trainer's `log`, so that every `report_to` receives the scalars.
    """

    def __init__(self, every: int, path: Path, log: Callable[[dict[str, float]], None]):
        self.every, self.path, self.log = every, path, log

    def measure(self, model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, float]]:
        """The record for the file, and the scalars for the log."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            kept = [line for line in read_records(self.path) if line["step"] <= state.global_step]
            aside = self.path.with_suffix(".aside")
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(aside, self.path)
        if state.global_step == 0:
            self._record(state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._record(state, control, model)

    def _record(self, state, control, model):
        record, scalars = self.measure(model)
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **record}) + "\n")
        # logging clears the flag by which the step's own loss waits to be logged
        should_log = control.should_log
        self.log(scalars)
        control.should_log = should_log


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a measurement file; a line that a kill cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class AttentionEntropyCallback(MeasurementCallback):
    """
    Attention entropy of every layer and head in nats, and the NaNs in the attention of each layer, on a fixed probe
    batch in evaluation mode: the distribution before dropout, without padding.

    Args:
        probe (`dict` of `torch.LongTensor` of shape `(num_sequences, seq_len)`): the probe batch, `input_ids` and, if
            documents are separated, `position_ids`.
    """

    def __init__(
        self, probe: dict[str, torch.Tensor], every: int, path: Path, log: Callable[[dict[str, float]], None]
    ):
        super().__init__(every, path, log)
        self.probe = probe

    def measure(self, model):
        was_training = model.training
        model.eval()
        with torch.no_grad(), record_attention_entropy(model) as record:
            model(**{name: value.to(model.device) for name, value in self.probe.items()}, use_cache=False)
        model.train(was_training)
        entropy = record.entropy.tolist()
        nan_count = record.nan_count.sum(-1).tolist()
        scalars = {"attention_entropy/mean": record.entropy.mean().item()}
        for layer, heads in enumerate(entropy):
            scalars[f"attention_entropy/layer_{layer}/mean"] = sum(heads) / len(heads)
            scalars[f"attention_nan_count/layer_{layer}"] = nan_count[layer]
            for head, value in enumerate(heads):
                scalars[f"attention_entropy/layer_{layer}/head_{head}"] = value
        return {"entropy": entropy, "max_entropy": record.max_entropy.mean().item(), "nan_count": nan_count}, scalars


class NegativeSlopeCallback(MeasurementCallback):
    """Learned negative slopes: one a layer, or the one that all layers share."""

    def measure(self, model):
        slopes = model.model.learned_slope.negative_slope.detach().float().tolist()
        return {"slopes": slopes}, {f"negative_slope/{index}": slope for index, slope in enumerate(slopes)}


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
