"""
Recipe -> Trainer -> finished run. Plainly or by a launcher:

    python -m training.train training/recipes/quick.yaml variant=SM+R
    torchrun --nproc_per_node 2 -m training.train training/recipes/quick.yaml variant=SM+R

A run's folder holds `recipe.yaml`, the last checkpoints, what was measured on the way (`attention_entropy.jsonl`,
`residual_stream.jsonl`, `speed.jsonl`, by variant `zero_activations.jsonl` or `negative_slope.jsonl`), and once it is
finished `model/`, `log_history.json` and `results.json`, in this order.
"""

import errno
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from modeling_lnfree import LNFreeForCausalLM, record_attention_entropy

from .callbacks import (
    AttentionEntropy,
    BriefPrinterCallback,
    BriefProgressCallback,
    MeasurementCallback,
    NegativeSlope,
    ResidualStream,
    SpeedCallback,
    ZeroActivations,
)
from .checkpoints import (
    flush,
    last_whole_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
    write_atomically,
    write_manifest,
)
from .data import digest_blocks, document_positions, find_revision, load_documents, load_tokenizer, tokenize_blocks
from .recipe import DataArguments, Recipe, RecipeError, one_line, read_values
from .stability import REPORT, StabilityCallback


RESULTS, LOCK, ASIDE = "results.json", ".lock", ".incomplete"
SHARDED_OPTIMIZER, DATA_DIGEST = "optimizer_shards", "data.sha256"
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class LNFreeTrainer(Trainer):
    """
    The Trainer, with checkpoints that are whole or not there, perplexity beside the losses, an end to runs that are
    unstable, and no weight decay on learned negative slopes unless `decay_slopes` asks for it.

    A stream is split by process. Checkpoints hold its place in every process, `stream_RANK.pt`; training goes on from
    those in `stream_states`, a folder. Of a sharded model, every process writes and reads its part of the optimiser;
    the weights are one ordinary file here too.

    Args:
        decay_slopes: weight decay on learned negative slopes too.
        milestones: steps whose checkpoints are kept beside the newest `save_total_limit`.
        data_digest: of the blocks that are trained and evaluated on; a part of every checkpoint.
    """

    def __init__(
        self,
        model: LNFreeForCausalLM,
        args: TrainingArguments,
        *,
        decay_slopes: bool = False,
        milestones: Sequence[int] = (),
        data_digest: str = "",
        **kwargs,
    ):
        self.sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        # the Trainer takes a sharded model only without its optimiser, which is saved and loaded below
        only_model, args.save_only_model = args.save_only_model, args.save_only_model or self.sharded
        super().__init__(model, args, **kwargs)
        args.save_only_model = only_model
        self.decay_slopes, self.milestones, self.data_digest = decay_slopes, milestones, data_digest
        self.stability = StabilityCallback(Path(self.args.output_dir), self.model)
        self.add_callback(self.stability)
        self.stream, self.stream_states = None, None
        self.data_seconds = 0.0

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
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

    def get_batch_samples(self, *args, **kwargs):
        began = time.perf_counter()
        try:
            samples = super().get_batch_samples(*args, **kwargs)
        except (OSError, ValueError, DatasetsError) as error:
            step = self.state.global_step + 1
            raise RecipeError(f"the data of step {step} cannot be read: {one_line(error)}") from error
        self.data_seconds += time.perf_counter() - began
        return samples

    def get_decay_parameter_names(self, model) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if self.decay_slopes or not name.endswith("negative_slope")]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # A loss for every sequence: the Trainer's own, of a batch, also counts the sequences that fill up the last
        # batches of several processes. As predictions they are gathered without those.
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits[:, :-1].float()  # (B, T - 1, V)
            nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").mean(1)  # (B,)
        return nll.mean(), nll, labels

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = output.metrics.pop("eval_nll")
        return output

    def log(self, logs: dict[str, float], *args, **kwargs):
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs:
                logs[f"{prefix}perplexity"] = perplexity(logs[f"{prefix}loss"])
        super().log(logs, *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.last_batch = inputs
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None
        self.stability.see_gradient(self.state.global_step + 1, float(norm), self.last_batch, scaled)
        return norm

    def _get_output_dir(self, trial):
        return os.path.join(super()._get_output_dir(trial), ASIDE)

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

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
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


def train(recipe: Recipe) -> Path:
    """
    Trains what the recipe says, or goes on from the run's last checkpoint; a finished run is left as it is. Of several
    processes, each closes its process group at the end.

    Returns:
        The run's folder.

    Raises:
        RecipeError: for data that cannot be had or have changed since the last checkpoint, for a folder that holds a
            run of another recipe, and for a disk that cannot be written.
        UnstableRunError: for a run that is unstable (`StabilityCallback`).
    """
    arguments = build_arguments(recipe)
    if arguments.world_size % recipe.data.fsdp_size:
        raise RecipeError(
            f"fsdp_size={recipe.data.fsdp_size} must divide the number of processes, {arguments.world_size}"
        )
    run_dir = Path(arguments.output_dir)
    # Held until the process ends, however it ends. The other processes of a launcher share the first one's claim.
    if int(os.environ.get("RANK", 0)) == 0:
        lock = _claim(run_dir, recipe)  # noqa: F841
        # some launchers start fewer than they are asked for
        print(f"{run_dir}: {arguments.world_size} process{'es' * (arguments.world_size > 1)}, {arguments.device.type}")
    # one process looks, for all: nodes may see a shared folder differently for a while
    (finished,) = broadcast_object_list([(run_dir / RESULTS).is_file()])
    if finished:
        if arguments.process_index == 0:
            print(f"{run_dir} is finished: perplexity {read_results(run_dir)['perplexity']:.3f}")
        PartialState().destroy_process_group()
        return run_dir

    with arguments.main_process_first(desc="data preparation"):
        documents = load_documents(recipe.data, arguments.seed)
        tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model.get("vocab_size"))
        blocks = tokenize_blocks(documents, tokenizer, recipe.data, arguments.seed)
        # now: both may have moved on when the training ends
        origin = {"eval_revision": find_revision(recipe.data), "commit": _commit()}

    set_seed(arguments.seed)
    model = LNFreeForCausalLM(
        recipe.build_config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if recipe.data.fsdp_size > 1:
        model = _shard(model.to(arguments.device), recipe.data.fsdp_size, arguments.world_size)
    collate = functools.partial(_collate, boundary=tokenizer.eos_token_id if recipe.data.separate_documents else None)
    trainer = LNFreeTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=_spread(blocks["eval"], recipe.data.eval_sequences),
        data_collator=collate,
        compute_metrics=lambda prediction: {"nll": prediction.predictions.mean(dtype="float64").item()},
        processing_class=tokenizer,
        decay_slopes=recipe.data.decay_slopes,
        milestones=recipe.data.milestones or [],
        data_digest=digest_blocks(blocks),
    )
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    if trainer.is_world_process_zero():  # the Trainer's own show every line once for each node
        trainer.add_callback(BriefPrinterCallback if arguments.disable_tqdm else BriefProgressCallback)
    trainer.add_callback(
        SpeedCallback(recipe.tokens_per_step, recipe.data.block_size, run_dir / "speed.jsonl", trainer)
    )
    quantities = [AttentionEntropy(), ResidualStream()]
    if model.config.hidden_act == "relu":
        quantities.append(ZeroActivations())
    if model.config.slope_sharing is not None:
        quantities.append(NegativeSlope())
    probe = collate(list(blocks["eval"].take(min(recipe.data.entropy_sequences, len(blocks["eval"])))))
    del probe["labels"]
    probe = {
        name: torch.tensor_split(value, arguments.world_size)[arguments.process_index] for name, value in probe.items()
    }
    trainer.add_callback(MeasurementCallback(quantities, probe, recipe.data.entropy_steps, run_dir, trainer.log))

    # one process reads and hashes, removes what is damaged, and says where all go on
    found = last_whole_checkpoint(run_dir) if trainer.is_world_process_zero() else None
    (checkpoint,) = broadcast_object_list([found])
    if checkpoint is not None:
        _prepare_to_resume(trainer, checkpoint)
    with _disk_errors_explained(run_dir):
        runtime = None
        if checkpoint is not None and _is_trained(checkpoint):
            # the Trainer would make one step more
            trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            trainer._load_from_checkpoint(checkpoint)
        else:
            runtime = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
            if trainer.state.global_step < trainer.state.max_steps:
                # of a stream without a row, the Trainer only warns
                raise RecipeError(
                    f"{run_dir} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: the dataset "
                    "has no more blocks to train on"
                )
        with torch.no_grad(), record_attention_entropy(model) as record:
            metrics = trainer.evaluate(blocks["eval"])
        model.config.use_cache = True  # the Trainer switches it off for training
        # a sharded model is gathered by all together
        if trainer.is_world_process_zero() or recipe.data.fsdp_size > 1:
            model.save_pretrained(run_dir / ASIDE / "model", is_main_process=trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            # a resumed run has forgotten how long it took before
            metrics["eval_tokens"] = len(blocks["eval"]) * (recipe.data.block_size - 1)
            metrics["train_tokens"] = trainer.state.global_step * recipe.tokens_per_step
            _finish(run_dir, recipe, trainer, metrics, record, runtime if checkpoint is None else None, origin)
    # torch may abort a process that ends while its group is open
    PartialState().destroy_process_group()
    return run_dir


def _is_trained(checkpoint: str) -> bool:
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def _disk_error(error: RuntimeError | dcp.CheckpointException) -> BaseException | None:
    """What torch says in its own words of a file that could not be written, as on a full disk; None for the rest."""
    failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error, None)]
    return next((e for e, _ in failures if isinstance(e, OSError) or "inline_container" in str(e)), None)


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats per token; infinite where that overflows."""
    return torch.tensor(nll, dtype=torch.float64).exp().item()


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """
    The results of a finished run.

    Raises:
        RecipeError: if the folder holds none, or a file that cannot be read.
    """
    path = Path(run_dir) / RESULTS
    if not path.is_file():
        raise RecipeError(f"{run_dir} is not a finished run: it has no {RESULTS}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {one_line(error)}; remove it, and the run ends again") from None


def build_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments; raises RecipeError for those that it refuses."""
    # a NaN in the loss must show, not be replaced by the running mean; pinned memory is for accelerators
    defaults = {"logging_nan_inf_filter": False, "dataloader_pin_memory": torch.accelerator.is_available()}
    if recipe.training.get("fp16") and (recipe.training.get("use_cpu") or not torch.accelerator.is_available()):
        raise RecipeError(
            "fp16=True needs an accelerator: a CPU would train in float32 without a word; bf16=True works"
        )
    try:
        arguments = TrainingArguments(**{**defaults, **recipe.training})
        # refuses what is not known or not installed; the Trainer would after the data
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"recipe: {one_line(error)}") from error
    # one process, one GPU: the Trainer would give each that it sees a batch, and a step more tokens than the recipe
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _spread(blocks: Dataset, number: int | None) -> Dataset:
    """`number` blocks at equal distances."""
    if number is None or number >= len(blocks):
        return blocks
    return blocks.select([index * len(blocks) // number for index in range(number)])


def _collate(rows: list[dict[str, torch.Tensor]], boundary: int | None = None) -> dict[str, torch.Tensor]:
    input_ids = torch.stack([row["input_ids"] for row in rows])  # (batch, T)
    batch = {"input_ids": input_ids, "labels": input_ids}
    return batch if boundary is None else {**batch, "position_ids": document_positions(input_ids, boundary)}


def _shard(model: LNFreeForCausalLM, fsdp_size: int, world_size: int) -> LNFreeForCausalLM:
    """
    Shards a fresh model, of equal weights in every process, by FSDP2; several nodes hold replicas of each other.

    transformers' own engine: on CPU, Accelerate's gives DDP without a word.
    """
    config = DistributedConfig(fsdp_size=fsdp_size, dp_replicate_size=world_size // fsdp_size)
    config, _, mesh = model.prepare_distribute_model(config)
    model = model.maybe_distribute_model(model, config, mesh)
    # it is now of a class that torch has made, of whose module the code would be saved beside the weights
    type(model).__module__, type(model).__name__ = LNFreeForCausalLM.__module__, LNFreeForCausalLM.__name__
    model.tie_weights()
    return model


def _prepare_to_resume(trainer: LNFreeTrainer, checkpoint: str):
    if trainer.args.save_only_model:
        raise RecipeError(
            f"{checkpoint} holds the weights alone: the run was interrupted and cannot be resumed; name another "
            "output_dir"
        )
    digest = Path(checkpoint) / DATA_DIGEST
    if digest.is_file() and digest.read_text(encoding="utf-8") != trainer.data_digest:
        raise RecipeError(
            f"{checkpoint} was trained on other data: since then the dataset, its tokenizer or Python's standard "
            "library has changed; name another output_dir"
        )
    if isinstance(trainer.train_dataset, IterableDataset):
        written = len(list(Path(checkpoint).glob("stream_*.pt")))
        if written != trainer.args.world_size:
            raise RecipeError(
                f"{checkpoint} was written by {written} processes and is read by {trainer.args.world_size}: a stream "
                "goes on in as many as it was split in"
            )
        # the stream is entered where it was left, not read again from its start
        trainer.args.ignore_data_skip = True
        trainer.stream_states = checkpoint


def _claim(run_dir: Path, recipe: Recipe) -> FileLock:
    """Locks the run's folder and writes the recipe into it, or checks that the folder is of this very recipe."""
    lock = FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # a sweep that looks whether the folder is free holds the lock for a moment
        lock.acquire(timeout=1)
    except Timeout:
        raise RecipeError(f"another process is training in {run_dir}") from None
    except OSError as error:
        raise RecipeError(f"output_dir={run_dir} cannot be written: {error.strerror}") from None
    check_same_recipe(run_dir, recipe)
    with _disk_errors_explained(run_dir):
        shutil.rmtree(run_dir / ASIDE, ignore_errors=True)
        (run_dir / REPORT).unlink(missing_ok=True)
        write_atomically(run_dir / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    return lock


def check_same_recipe(run_dir: Path, recipe: Recipe):
    """Raises RecipeError if the folder holds a run of another recipe, or what is no run and would be lost to it."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        if (run_dir / "model").exists() or list_checkpoints(run_dir):
            raise RecipeError(
                f"{run_dir} is not a run's folder: it holds a model or checkpoints, and no recipe.yaml; name another "
                "output_dir"
            )
        return
    # a field that the run did not know yet had its default's effect
    ours, theirs = recipe.to_dict(), {**asdict(DataArguments()), **read_values(path, "recipe")}
    for key in sorted((ours.keys() | theirs.keys()) - {"output_dir"}):
        if ours.get(key) != theirs.get(key):
            raise RecipeError(
                f"{run_dir} holds a run with {key}={theirs.get(key)!r}, this recipe has {ours.get(key)!r}; "
                "name another output_dir"
            )


@contextmanager
def _disk_errors_explained(run_dir: Path):
    """A disk that is full or read-only is one line for a person, and what is half written on it makes room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        shutil.rmtree(run_dir / ASIDE, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free / 1e6
        last = next((path.name for path in reversed(list_checkpoints(run_dir))), "none")
        raise RecipeError(
            f"{run_dir} cannot be written: {error} ({free:.1f} MB free); the last whole checkpoint is {last}, and the "
            "same command goes on from it"
        ) from error


def _finish(
    run_dir: Path,
    recipe: Recipe,
    trainer: LNFreeTrainer,
    metrics: dict[str, float],
    record,
    runtime: float | None,
    origin: dict[str, str | None],
):
    """Writes the model, the log and, last, the results that mark the run as finished."""
    model, state, arguments = trainer.model, trainer.state, trainer.args
    trainer.processing_class.save_pretrained(run_dir / ASIDE / "model")
    flush(run_dir / ASIDE / "model")
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    os.replace(run_dir / ASIDE / "model", run_dir / "model")
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)
    write_atomically(run_dir / "log_history.json", json.dumps(state.log_history, indent=1))

    results = {
        "variant": model.config.variant,
        "backbone": model.config.backbone,
        "block_size": recipe.data.block_size,
        "seed": arguments.seed,
        "dataset": recipe.data.dataset,
        "perplexity": perplexity(metrics["eval_loss"]),
        "eval_loss": metrics["eval_loss"],
        "eval_tokens": metrics["eval_tokens"],
        "train_steps": state.global_step,
        "train_tokens": metrics["train_tokens"],
        "train_seconds": runtime,
        "data_seconds": None if runtime is None else trainer.data_seconds,
        "parameters": model.num_parameters(),
        "attention_entropy": {
            "entropy": record.entropy.tolist(),
            "max_entropy": record.max_entropy.tolist(),
            "head_distribution": record.head_distribution.tolist(),
            "nan_count": record.nan_count.sum(-1).tolist(),
        },
        "recipe": recipe.to_dict(),
        "hardware": device_name(arguments.device),
        "versions": library_versions(),
        **origin,
    }
    write_atomically(run_dir / RESULTS, json.dumps(results, indent=1))
    print(f"{run_dir} is finished: {results['variant']}, perplexity {results['perplexity']:.3f}")


def device_name(device: torch.device) -> str:
    """What computes: the name of a CUDA device, and the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    names = ("torch", "transformers", "datasets", "tokenizers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _commit() -> str | None:
    """The project's commit where it runs from a clone, with `-dirty` after it if files differ from that commit."""
    for command in ("ls-files --error-unmatch train.py", "describe --always --dirty --abbrev=40 --exclude=*"):
        try:
            run = subprocess.run(["git", *command.split()], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None
        if run.returncode:
            return None
    return run.stdout.strip()


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
