"""What is measured during training: a class a quantity, each through the Trainer's log and into a file."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.modeling_lnfree import build_linear

from .checkpoints import write_atomically


class Quantity(ABC):
    """What one forward pass of the probe batch shows; its file in the run's folder is `<name>.jsonl`."""

    name: str

    def watch(self, model: torch.nn.Module) -> AbstractContextManager:
        """Stands around the forward pass."""
        return nullcontext()

    @abstractmethod
    def measure(self, model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, float]]:
        """The record for the file, and the scalars for the log, after the forward pass."""


class MeasurementCallback(TrainerCallback):
    """
    Measures before the first step, every `every` steps, and after the last one: one forward pass of a fixed probe
    batch in evaluation mode, which all quantities watch.

    Args:
        quantities: what is measured; each has a JSON-lines file in `run_dir`, with one record a measurement. Resuming
            drops the records after the checkpoint's step.
        probe (`dict` of `torch.LongTensor` of shape `(num_sequences, seq_len)`): the probe batch, `input_ids` and, if
            documents are separated, `position_ids`.
        every: steps between two measurements.
        log: the Trainer's `log`, so that every `report_to` receives the scalars.
    """

    def __init__(
        self,
        quantities: list[Quantity],
        probe: dict[str, torch.Tensor],
        every: int,
        run_dir: Path,
        log: Callable[[dict[str, float]], None],
    ):
        self.quantities, self.probe, self.every, self.run_dir, self.log = quantities, probe, every, run_dir, log

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            for quantity in self.quantities:
                drop_records_after(self.run_dir / f"{quantity.name}.jsonl", state.global_step)
        if state.global_step == 0:
            self._record(state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._record(state, control, model)

    def _record(self, state, control, model):
        scalars = {}
        for quantity, (record, logged) in zip(self.quantities, self.measure(model), strict=True):
            if state.is_world_process_zero:
                append_record(self.run_dir / f"{quantity.name}.jsonl", {"step": state.global_step, **record})
            scalars |= logged
        # logging clears the flag by which the step's own loss waits to be logged
        should_log = control.should_log
        self.log(scalars)
        control.should_log = should_log

    def measure(self, model: torch.nn.Module) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """The record and the scalars of every quantity."""
        was_training = model.training
        model.eval()
        with torch.no_grad(), ExitStack() as stack:
            for quantity in self.quantities:
                stack.enter_context(quantity.watch(model))
            model(**{name: value.to(model.device) for name, value in self.probe.items()}, use_cache=False)
        model.train(was_training)
        return [quantity.measure(model) for quantity in self.quantities]


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


def append_record(path: Path, record: dict[str, Any]):
    """One more line of a measurement file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def drop_records_after(path: Path, step: int):
    """Makes a measurement file what it was at `step`; a run that starts again at step 0 also measures that again."""
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


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


class SpeedCallback(TrainerCallback):
    """
    Training tokens per second, of all processes together, and model FLOPs utilisation, each time that the loss is
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
        config = model.config
        weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
        attention = 12 * config.num_hidden_layers * config.hidden_size * self.block_size
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.token_share = (6 * weights + attention) / (args.world_size * _peak_flops(model.device, dtype))

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


@torch.no_grad()
def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large linear layer, the best of five."""
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    with torch.random.fork_rng([]):  # training draws as if nothing had been measured
        layer = build_linear(size, size).to(device, dtype)
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
