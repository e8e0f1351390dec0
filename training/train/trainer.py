"""The Trainer of this project: checkpoints that are whole or not there, streams, sharded models."""

import errno
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from modeling_lnfree import EntropyRegularizationMixin, LNFreeForCausalLM, build_optimizer
from modeling_lnfree.fused_loss import has_fused_loss
from modeling_lnfree.likelihood import to_perplexity
from modeling_lnfree.optimization import get_decayed_parameters

from ..errors import UserError, one_line
from ..parametrization import is_parametrized, split_state, update_spectral_norms
from ..runs import INCOMPLETE
from .batch_entropy import BatchEntropyMixin
from .checkpoints import remove_old_checkpoints, write_manifest
from .norm_removal import NormRemovalMixin
from .stability import StabilityCallback


SHARDED_OPTIMIZER, DATA_DIGEST = "optimizer_shards", "data.sha256"
# in a folder of its own: what reads every .safetensors file beside the config takes them for weights
PARAMETRIZATION = Path("parametrization", "state.safetensors")


class LNFreeTrainer(EntropyRegularizationMixin, BatchEntropyMixin, NormRemovalMixin, Trainer):
    """
    The Trainer, with checkpoints that are whole or not there, perplexity beside the losses, an end to runs that are
    unstable, and no weight decay on learned negative slopes unless `decay_slopes` asks for it.

    A stream is split by process. Checkpoints hold its place in every process, `stream_RANK.pt`; training goes on from
    those in `stream_states`, a folder. Of a sharded model, every process writes and reads its part of the optimizer;
    the weights are one ordinary file here too. So they are of a model with parametrized weights; what these are made
    of stands beside them.

    Args:
        decay_slopes: weight decay on learned negative slopes too.
        milestones: steps whose checkpoints are kept beside the newest `save_total_limit`.
        data_digest: of the blocks that are trained and evaluated on; a part of every checkpoint.
        layer_options: arguments of `build_optimizer`, where the matrices of the layers have a rule of their own.
    """

    def __init__(
        self,
        model: LNFreeForCausalLM,
        args: TrainingArguments,
        *,
        decay_slopes: bool = False,
        milestones: Sequence[int] = (),
        data_digest: str = "",
        layer_options: dict[str, Any] | None = None,
        **kwargs,
    ):
        self.sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        # the Trainer takes a sharded model only without its optimizer, which is saved and loaded below
        only_model, args.save_only_model = args.save_only_model, args.save_only_model or self.sharded
        super().__init__(model, args, **kwargs)
        args.save_only_model = only_model
        self.decay_slopes, self.milestones, self.data_digest = decay_slopes, milestones, data_digest
        self.layer_options, self.layer_learning_rate = layer_options, 0.0
        self.label_smoothing = 0.0
        if has_fused_loss(model):
            # smoothed in the model: there are no logits to smooth
            self.label_smoothing, self.label_smoother = args.label_smoothing_factor, None
        elif self.label_smoother is not None:
            # the Trainer shifts the labels of the classes that it knows by name, and a compiled model's is another
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        self.stability = StabilityCallback(Path(self.args.output_dir), self.model)
        self.add_callback(self.stability)
        self.stream: Any = None
        self.stream_states: str | None = None
        self.data_seconds = 0.0

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # only here: what trains on no stream starts without it
        from torchdata.stateful_dataloader import StatefulDataLoader

        # not prepared by Accelerate, which would fetch ahead of what is trained on, and split the rows a second time
        self.stream = StatefulDataLoader(
            split_dataset_by_node(self.train_dataset, self.args.process_index, self.args.world_size),
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # its own, so that entering the stream again takes nothing from the generator of dropout
            generator=torch.Generator(),
        )
        if self.stream_states is not None:
            self.stream.load_state_dict(torch.load(Path(self.stream_states) / self._stream_name, weights_only=True))
        return self.stream

    @property
    def _stream_name(self) -> str:
        return f"stream_{self.args.process_index}.pt"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        began = time.perf_counter()
        if self.stream is not None:
            # as Accelerate does with what it has prepared: nothing waits for the copy
            epoch_iterator = (send_to_device(batch, device, non_blocking=True) for batch in epoch_iterator)
        try:
            samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        except (OSError, ValueError, DatasetsError) as error:
            step = self.state.global_step + 1
            raise UserError(f"the data of step {step} cannot be read: {one_line(error)}") from error
        self.data_seconds += time.perf_counter() - began
        return samples

    def get_decay_parameter_names(self, model) -> list[str]:
        decayed = set(get_decayed_parameters(model))
        slopes = [name for name, _ in model.named_parameters() if name.endswith("negative_slope")]
        decayed.update(slopes if self.decay_slopes else ())
        return [name for name, _ in model.named_parameters() if name in decayed]

    def create_optimizer(self, *args, **kwargs):
        is_new = self.optimizer is None
        if self.layer_options and is_new:
            _, adamw = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = build_optimizer(
                self.model,
                learning_rate=adamw.pop("lr"),
                weight_decay=self.args.weight_decay,
                decayed=self.get_decay_parameter_names(self.model),
                **self.layer_options,
                **adamw,
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and is_parametrized(self.model):
            optimizer.register_step_post_hook(lambda *args: update_spectral_norms(self.model))
        return optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # A loss for every sequence: the Trainer's own, of a batch, also counts the sequences that fill up the last
        # batches of several processes. As predictions they are gathered without those.
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if has_fused_loss(model):
                losses = model(**inputs, labels=labels, reduction="none").loss  # (B, T - 1)
            else:
                logits = model(**inputs).logits[:, :-1].float()  # (B, T - 1, V)
                losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        nll = losses.mean(1)  # (B,)
        return nll.mean(), nll, labels

    def evaluation_loop(self, *args, **kwargs):
        # what is compiled was so for training steps, and is not compiled for evaluation a second time
        with torch.compiler.set_stance("force_eager"):
            output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = output.metrics.pop("eval_nll")
        return output

    def log(self, logs: dict[str, float], *args, **kwargs):
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs:
                logs[f"{prefix}perplexity"] = to_perplexity(logs[f"{prefix}loss"])
        if self.layer_options and "learning_rate" in logs:
            logs["layer_learning_rate"] = self.layer_learning_rate
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.label_smoothing and model.training:
            inputs = {**inputs, "label_smoothing": self.label_smoothing}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.last_batch = inputs
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None
        # of the step that is about to be made, as is what the Trainer logs of the first group; the last is the layers'
        self.layer_learning_rate = self.optimizer.param_groups[-1]["lr"]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        self.stability.check_gradient(self.state.global_step + 1, norm, self.last_batch, scaled)
        return norm

    def _get_output_dir(self, trial):
        return os.path.join(super()._get_output_dir(trial), INCOMPLETE)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        dcp.save(state, checkpoint_id=os.path.join(output_dir, SHARDED_OPTIMIZER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self.sharded:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        dcp.load(state, checkpoint_id=os.path.join(checkpoint, SHARDED_OPTIMIZER))
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save(self, output_dir=None, state_dict=None):
        if is_parametrized(self.model) and self.args.should_save:
            state_dict, own = split_state(self.model)
            path = Path(output_dir) / PARAMETRIZATION
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(own, path)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if is_parametrized(self.model):
            ordinary, own = split_state(self.model)
            weights = load_file(Path(resume_from_checkpoint) / PARAMETRIZATION)
            for path in Path(resume_from_checkpoint).glob("*.safetensors"):
                weights |= {name: tensor for name, tensor in load_file(path).items() if name in ordinary}
            names = self.model.state_dict().keys()
            self.model.load_state_dict({name: weights[name] for name in names & weights.keys()}, strict=False)
            return None
        if not self.sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = get_model_state_dict(self.model)
        dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(resume_from_checkpoint))
        set_model_state_dict(self.model, weights)

    def _save_checkpoint(self, model, trial):
        # Written aside, then renamed: a run killed in the middle finds only whole checkpoints.
        self.stability.check_weights(self.state.global_step)
        aside = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.stream is not None:
                torch.save(self.stream.state_dict(), aside / self._stream_name)
        except (RuntimeError, dcp.CheckpointException) as error:
            cause = _disk_error(error)
            if cause is None:
                raise
            raise OSError(errno.EIO, one_line(cause)) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (aside / DATA_DIGEST).write_text(self.data_digest, encoding="utf-8")
            write_manifest(aside)
            os.replace(aside, Path(self.args.output_dir) / aside.name)
            remove_old_checkpoints(Path(self.args.output_dir), self.args.save_total_limit, self.milestones)
        self.accelerator.wait_for_everyone()


def _disk_error(error: RuntimeError | dcp.CheckpointException) -> BaseException | None:
    """What torch says in its own words of a file that could not be written, as on a full disk; None for the rest."""
    failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error, None)]
    return next((e for e, _ in failures if isinstance(e, OSError) or "inline_container" in str(e)), None)
