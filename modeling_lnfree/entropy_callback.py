"""Attention entropy on the way, in any Trainer: into its log, as a picture, and an alert when heads break."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from .metrics.attention_entropy.record import AttentionEntropyRecord
from .metrics.attention_entropy.recorder import record_attention_entropy


logger = logging.get_logger(__name__)


class AttentionEntropyCallback(TrainerCallback):
    """
    Measures attention entropy while a `Trainer` of transformers, or one that derives from it as TRL's `SFTTrainer`,
    trains a model that `record_attention_entropy` measures.

    ```python
    trainer.add_callback(AttentionEntropyCallback(trainer, every=50))
    ```

    The log, and so every `report_to`, gets in nats `attention_entropy/mean`, `attention_entropy/layer_L/mean` and
    `attention_entropy/layer_L/head_H`; the share of heads in each quarter of their own largest entropy,
    `attention_entropy/share_of_heads_in_quarter_Q`; `attention_nan_count/layer_L`, `attention_inf_count/layer_L`; and
    with `logits` `max_logit/layer_L`, the layer's largest attention logit, `sink_share/layer_L`, the mean weight on
    the first key that a query may see, and `spectral_gap/layer_L`, the mean spectral gap of its heads' maps.
    TensorBoard, trackio and Weights & Biases get a heat map too. An alert is told in the log of the first process, and
    by the tracker where it has alerts: when the share of heads that are collapsed, or of those that are overloaded,
    comes to `alert_share` past the warm-up and the first measurement; once, until it has been below again.

    Args:
        trainer (`Trainer`): the one that it is added to.
        every (`int`, defaults to 100): steps between two measurements.
        probe (`dict` of `Tensor`, *optional*): inputs of a forward pass in evaluation mode that measures, before the
            first step, every `every` steps and after the last one; of several processes, each has its part, and the
            figures are of all. By default the training batches of every such step are measured as they run, the
            first step's too.
        collapse (`float`, defaults to 0.05): a head has collapsed below this share of its largest entropy.
        overload (`float`, defaults to 0.95): a head is overloaded above this share.
        alert_share (`float`, defaults to 0.5): of all heads.
        logits (`bool`, defaults to `False`): look at the scores too, at about twice the time.

    Raises:
        ValueError: for `every` below 1, and for shares outside [0, 1].
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 100,
        probe: dict[str, Tensor] | None = None,
        collapse: float = 0.05,
        overload: float = 0.95,
        alert_share: float = 0.5,
        logits: bool = False,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        for name, value in (("collapse", collapse), ("overload", overload), ("alert_share", alert_share)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.trainer, self.every, self.probe = trainer, every, probe
        self.collapse, self.overload, self.alert_share = collapse, overload, alert_share
        self.logits = logits
        self._told: set[str] = set()
        self._is_first, self._warmup_steps = True, 0
        self._open = ExitStack()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._open.close()
        self._warmup_steps = args.get_warmup_steps(state.max_steps)
        if self.probe is not None and state.global_step == 0:
            self._report(self.measure(model), state, control, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.probe is None and self._is_due(state.global_step + 1, state, first=1):
            self._record = self._open.enter_context(self.watch(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.probe is not None and self._is_due(state.global_step, state):
            self._report(self.measure(model), state, control, model)
        elif self.probe is None and self._is_due(state.global_step, state, first=1):
            self._open.close()
            self._report(self._record, state, control, model)

    def _is_due(self, step: int, state, first: int = 0) -> bool:
        return step % self.every == 0 or step in (first, state.max_steps)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[AttentionEntropyRecord]:
        """Stands around the forward passes that are measured."""
        with record_attention_entropy(model, logits=self.logits) as record:
            yield record

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> AttentionEntropyRecord:
        """One forward pass of the probe batch in evaluation mode."""
        was_training = model.training
        model.eval()
        with self.watch(model) as record:
            model(**{name: value.to(model.device) for name, value in (self.probe or {}).items()})
        model.train(was_training)
        return record

    def figures(self, record: AttentionEntropyRecord, state, model: nn.Module) -> dict[str, float]:
        """What goes into the log."""
        return describe_record(record)[1]

    def _report(self, record: AttentionEntropyRecord, state, control, model: nn.Module):
        figures = self.figures(record, state, model)
        # logging clears the flag by which the step's own loss waits to be logged
        should_log = control.should_log
        self.trainer.log(figures)
        control.should_log = should_log
        if state.is_world_process_zero:
            trackers = self._trackers()
            if trackers:
                self._send_heat_map(record, state.global_step, trackers)
            self._alert(record, state.global_step, trackers)
        self._is_first = False

    def _trackers(self) -> dict[str, Any]:
        """The callbacks of the trackers that take pictures, by the name of their package."""
        names = {"TensorBoardCallback": "tensorboard", "TrackioCallback": "trackio", "WandbCallback": "wandb"}
        callbacks = self.trainer.callback_handler.callbacks
        return {names[type(callback).__name__]: callback for callback in callbacks if type(callback).__name__ in names}

    def _send_heat_map(self, record: AttentionEntropyRecord, step: int, trackers: dict[str, Any]):
        picture = draw_heat_map(record)
        name = "attention_entropy/heat_map"
        if "tensorboard" in trackers:
            trackers["tensorboard"].tb_writer.add_image(name, picture, step, dataformats="HWC")
        for package in ("trackio", "wandb"):
            if package in trackers:
                # it is loaded: its callback has done that
                tracker = sys.modules[package]
                tracker.log({name: tracker.Image(picture), "train/global_step": step})

    def _alert(self, record: AttentionEntropyRecord, step: int, trackers: dict[str, Any]):
        share = record.normalized_entropy
        exists = ~record.max_entropy.isnan()
        found = {
            "collapsed": (share < self.collapse, f"below {self.collapse:.0%} of their largest entropy"),
            "overloaded": (share > self.overload, f"above {self.overload:.0%} of their largest entropy"),
        }
        for what, (heads, where) in found.items():
            number, total = int((heads & exists).sum()), int(exists.sum())
            if number == 0 or number < self.alert_share * total:
                self._told.discard(what)
            elif what not in self._told and not self._is_first and step > self._warmup_steps:
                self._told.add(what)
                by_layer = ", ".join(f"{row}: {int(count)}" for row, count in enumerate(heads.sum(1)) if count)
                text = f"step {step}: {number} of {total} heads are {what}, {where} (by layer, {by_layer})"
                logger.warning(text)
                for package in ("trackio", "wandb"):
                    if package in trackers and hasattr(sys.modules[package], "alert"):
                        sys.modules[package].alert(title=f"attention heads {what}", text=text)


def describe_record(record: AttentionEntropyRecord) -> tuple[dict[str, Any], dict[str, float]]:
    """A record as what a file takes, and as the scalars of a log."""
    entropy = record.entropy.tolist()
    nan_count = record.nan_count.sum(-1).tolist()
    inf_count = record.inf_count.sum(-1).tolist()
    head_distribution = record.head_distribution.tolist()
    scalars = {"attention_entropy/mean": record.mean_entropy}
    for layer, (heads, number) in enumerate(zip(entropy, record.num_heads, strict=True)):
        scalars[f"attention_entropy/layer_{layer}/mean"] = sum(heads[:number]) / number
        scalars[f"attention_nan_count/layer_{layer}"] = nan_count[layer]
        scalars[f"attention_inf_count/layer_{layer}"] = inf_count[layer]
        for head, value in enumerate(heads[:number]):
            scalars[f"attention_entropy/layer_{layer}/head_{head}"] = value
    for quarter, share in enumerate(head_distribution):
        scalars[f"attention_entropy/share_of_heads_in_quarter_{quarter}"] = share
    figures: dict[str, Any] = {
        "entropy": entropy,
        "max_entropy": record.max_entropy.nanmean().item(),
        "head_distribution": head_distribution,
        "nan_count": nan_count,
        "inf_count": inf_count,
    }
    if record.has_logits:
        figures |= {name: getattr(record, name).tolist() for name in ("max_logit", "sink_share", "spectral_gap")}
        for layer, number in enumerate(record.num_heads):
            scalars[f"max_logit/layer_{layer}"] = max(figures["max_logit"][layer][:number])
            for name in ("sink_share", "spectral_gap"):
                scalars[f"{name}/layer_{layer}"] = sum(figures[name][layer][:number]) / number
    return figures, scalars


def draw_heat_map(record: AttentionEntropyRecord):
    """Layers x heads, each as a share of its largest entropy (`numpy.ndarray` of bytes, `(height, width, 3)`)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    share = record.normalized_entropy
    figure = Figure(figsize=(2 + 0.25 * share.shape[1], 1.5 + 0.25 * share.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="head", ylabel="layer", title="entropy / largest")
    axes.locator_params(integer=True)
    figure.colorbar(image)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
