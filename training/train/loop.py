"""
Recipe -> Trainer -> finished run.

A run's folder holds `recipe.yaml`, the last checkpoints, what was measured on the way (`attention_entropy.jsonl`,
`residual_stream.jsonl`, `batch_entropy.jsonl`, `speed.jsonl`, by variant `zero_activations.jsonl` or
`negative_slope.jsonl`, by recipe `entropy_bound.jsonl`), and once it is finished `model/`, `log_history.json` and
`results.json`, in this order.
"""

import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DynamoBackend, broadcast_object_list
from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.trainer import TRAINER_STATE_NAME

from modeling_lnfree import EntropyRegularizer, LNFreeForCausalLM, record_attention_entropy
from modeling_lnfree.likelihood import to_perplexity

from ..data import (
    digest_blocks,
    document_positions,
    find_revision,
    load_documents,
    load_tokenizer,
    tokenize_blocks,
    vocabulary_size,
)
from ..errors import UserError, explained
from ..files import flush, write_atomically
from ..parametrization import fold_weights
from ..quantities import (
    BatchEntropy,
    EntropyBound,
    HeadGates,
    LearnedScalars,
    NegativeSlope,
    Outliers,
    Quantity,
    ResidualStream,
    ZeroActivations,
)
from ..recipe import Recipe, parent_name
from ..runs import (
    INCOMPLETE,
    LOCK,
    REPORT,
    RESULTS,
    check_same_recipe,
    device_name,
    find_commit,
    library_versions,
    list_checkpoints,
    read_results,
)
from .batch_entropy import BatchEntropyLoss
from .callbacks import (
    BriefPrinterCallback,
    BriefProgressCallback,
    MeasurementCallback,
    SpeedCallback,
    check_login,
    explain_trackers,
)
from .checkpoints import last_whole_checkpoint
from .norm_removal import NormRemovalCallback, fold
from .start import load_parent, start_model
from .trainer import DATA_DIGEST, LNFreeTrainer


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def train(recipe: Recipe) -> Path:
    """
    Trains what the recipe says, or goes on from the run's last checkpoint; a finished run is left as it is. Of several
    processes, each closes its process group at the end.

    Returns:
        The run's folder.

    Raises:
        UserError: for data that cannot be had or have changed since the last checkpoint, for a folder that holds a
            run of another recipe, and for a disk that cannot be written.
        UnstableRunError: for a run that is unstable (`StabilityCallback`).
    """
    arguments = recipe.build_arguments()
    if arguments.world_size % recipe.data.fsdp_size:
        raise UserError(
            f"fsdp_size={recipe.data.fsdp_size} must divide the number of processes, {arguments.world_size}"
        )
    _check_optimization(arguments)
    run_dir = Path(arguments.output_dir)
    # the other processes of a launcher share the first one's claim
    with _claim(run_dir, recipe) if int(os.environ.get("RANK", 0)) == 0 else nullcontext():
        return _train(recipe, arguments, run_dir)


def _train(recipe: Recipe, arguments: TrainingArguments, run_dir: Path) -> Path:
    if arguments.process_index == 0:
        # some launchers start fewer than they are asked for
        print(f"{run_dir}: {arguments.world_size} process{'es' * (arguments.world_size > 1)}, {arguments.device.type}")
        for line in recipe.idle:
            print(f"{run_dir}: {line}")
    # one process looks, for all: nodes may see a shared folder differently for a while
    (finished,) = broadcast_object_list([(run_dir / RESULTS).is_file()])
    if finished:
        if arguments.process_index == 0:
            print(f"{run_dir} is finished: perplexity {read_results(run_dir)['perplexity']:.3f}")
        PartialState().destroy_process_group()
        return run_dir

    check_login(arguments)
    parent = load_parent(recipe)
    with arguments.main_process_first(desc="data preparation"):
        documents = load_documents(recipe.data, arguments.seed)
        tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model.get("vocab_size"))
        vocab_size = vocabulary_size(tokenizer, recipe.model.get("vocab_size"))
        blocks = tokenize_blocks(documents, tokenizer, recipe.data, arguments.seed)
        # now: both may have moved on when the training ends
        origin = {"eval_revision": find_revision(recipe.data), "commit": find_commit()}

    set_seed(arguments.seed)
    model = start_model(recipe, tokenizer, vocab_size, parent)
    del parent
    if recipe.data.fsdp_size > 1:
        model = _shard(model.to(arguments.device), recipe.data.fsdp_size, arguments.world_size)
    trainer = _build_trainer(recipe, arguments, run_dir, model, tokenizer, blocks)

    # one process reads and hashes, removes what is damaged, and says where all go on
    found = last_whole_checkpoint(run_dir) if trainer.is_world_process_zero() else None
    (checkpoint,) = broadcast_object_list([found])
    if checkpoint is not None:
        _prepare_to_resume(trainer, checkpoint)
    with _disk_errors_explained(run_dir):
        runtime = _train_to_the_end(trainer, checkpoint, run_dir)
        fold_weights(model)
        if recipe.data.remove_norms_from is not None:
            model = trainer.model = trainer.model_wrapped = fold(model)
        with torch.no_grad(), record_attention_entropy(model) as record:
            metrics = trainer.evaluate(blocks["eval"])
        model.config.use_cache = True  # the Trainer switches it off for training
        # a sharded model is gathered by all together
        if trainer.is_world_process_zero() or recipe.data.fsdp_size > 1:
            model.save_pretrained(run_dir / INCOMPLETE / "model", is_main_process=trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            # a resumed run has forgotten how long it took before
            metrics["eval_tokens"] = len(blocks["eval"]) * (recipe.data.block_size - 1)
            metrics["train_tokens"] = count_tokens(recipe, trainer.state.global_step, blocks["train"])
            _finish(run_dir, recipe, trainer, metrics, record, runtime if checkpoint is None else None, origin)
    # torch may abort a process that ends while its group is open
    PartialState().destroy_process_group()
    return run_dir


def _build_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    run_dir: Path,
    model: LNFreeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, Dataset | IterableDataset],
) -> LNFreeTrainer:
    """The Trainer, with all that the recipe asks to be done and measured on the way."""
    collate = functools.partial(_collate, boundary=tokenizer.eos_token_id if recipe.data.separate_documents else None)
    trainer = LNFreeTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=_select_evenly(blocks["eval"], recipe.data.eval_sequences),
        data_collator=collate,
        compute_metrics=lambda prediction: {"nll": prediction.predictions.mean(dtype="float64").item()},
        processing_class=tokenizer,
        decay_slopes=recipe.data.decay_slopes,
        milestones=recipe.data.milestones or [],
        data_digest=digest_blocks(blocks),
        layer_options=recipe.layer_options,
    )
    explain_trackers(trainer)
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    if trainer.is_world_process_zero():  # the Trainer's own show every line once for each node
        trainer.add_callback(BriefPrinterCallback if arguments.disable_tqdm else BriefProgressCallback)
    trainer.add_callback(
        SpeedCallback(recipe.tokens_per_step, recipe.data.block_size, run_dir / "speed.jsonl", trainer)
    )
    _add_methods(trainer, recipe, run_dir)
    probe = collate(list(blocks["eval"].take(min(recipe.data.entropy_sequences, len(blocks["eval"])))))
    del probe["labels"]
    probe = {
        name: torch.tensor_split(value, arguments.world_size)[arguments.process_index] for name, value in probe.items()
    }
    quantities = _choose_quantities(model, recipe)
    trainer.add_callback(MeasurementCallback(trainer, quantities, probe, recipe.data.entropy_steps, run_dir))
    return trainer


def _train_to_the_end(trainer: LNFreeTrainer, checkpoint: str | None, run_dir: Path) -> float | None:
    """Trains from the start or a checkpoint on; seconds of the training, None where the checkpoint was the last."""
    if checkpoint is not None and _is_trained(checkpoint):
        # the Trainer would make one step more
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        trainer._load_from_checkpoint(checkpoint)
        return None
    runtime = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    if trainer.state.global_step < trainer.state.max_steps:
        # of a stream without a row, the Trainer only warns
        raise UserError(
            f"{run_dir} stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: the dataset has no "
            "more blocks to train on"
        )
    return runtime


def _add_methods(trainer: LNFreeTrainer, recipe: Recipe, run_dir: Path):
    """What the recipe asks to be done beside training by the loss: penalties, and norms that are taken out."""
    if recipe.data.entropy_weight is not None:
        trainer.entropy_regularizer = EntropyRegularizer(
            trainer.model,
            weight=recipe.data.entropy_weight,
            margin=recipe.data.entropy_margin,
            target=recipe.data.entropy_target_init,
            learned=recipe.data.entropy_target_learned,
        )
    if recipe.data.batch_entropy_weight is not None:
        trainer.batch_entropy = BatchEntropyLoss(
            trainer.model,
            weight=recipe.data.batch_entropy_weight,
            target=recipe.data.batch_entropy_target,
            floor=recipe.data.batch_entropy_floor,
        )
    if recipe.data.remove_norms_from is not None:
        trainer.add_callback(NormRemovalCallback(trainer, recipe.data, run_dir))


def _choose_quantities(model: LNFreeForCausalLM, recipe: Recipe) -> list[Quantity]:
    """What is measured on the way beside attention; of some models there is nothing to be seen."""
    stream = ResidualStream()
    quantities: list[Quantity] = [stream, BatchEntropy(), Outliers(stream)]
    if recipe.data.weight_parametrization is not None and EntropyBound.holds(model.config):
        quantities.append(EntropyBound())
    if ZeroActivations.holds(model):
        quantities.append(ZeroActivations())
    if model.config.slope_sharing is not None:
        quantities.append(NegativeSlope())
    if model.config.attention_gate_init is not None:
        quantities.append(HeadGates())
    scalars = LearnedScalars(model)
    if scalars.names:
        quantities.append(scalars)
    return quantities


def _check_optimization(arguments: TrainingArguments):
    """Raises UserError for what the Trainer would refuse after the data."""
    model = torch.nn.Linear(1, 1)
    with explained("recipe"):
        arguments.get_process_log_level()
        if arguments.torch_compile:
            DynamoBackend(str(arguments.torch_compile_backend).upper())
        # an optimizer that is given its modules wants the model itself
        if arguments.optim_target_modules is None:
            optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
            if not options.keys() & {"params", "model", "optimizer_dict"}:
                optimizer_class(model.parameters(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=arguments.learning_rate)
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
        # what it is given may be read behind the warm-up alone
        for _ in range(9 if isinstance(scheduler, LambdaLR) else 0):
            optimizer.step()
            scheduler.step()


def count_tokens(recipe: Recipe, steps: int, blocks: Dataset | IterableDataset) -> int:
    """Tokens trained on in so many steps. The last step of an epoch has only what is left of the blocks."""
    if isinstance(blocks, IterableDataset):
        return steps * recipe.tokens_per_step
    sequences, epoch = recipe.tokens_per_step // recipe.data.block_size, len(blocks)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        # Accelerate fills the last batch up in every process
        batch = recipe.training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
        epoch = -(-epoch // (batch * processes)) * batch * processes
    epochs, rest = divmod(steps, -(-epoch // sequences))
    return (epochs * epoch + min(rest * sequences, epoch)) * recipe.data.block_size


def _is_trained(checkpoint: str) -> bool:
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def _select_evenly(blocks: Dataset, number: int | None) -> Dataset:
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
        raise UserError(
            f"{checkpoint} holds the weights alone: the run was interrupted and cannot be resumed; name another "
            "output_dir"
        )
    digest = Path(checkpoint) / DATA_DIGEST
    if digest.is_file() and digest.read_text(encoding="utf-8") != trainer.data_digest:
        raise UserError(
            f"{checkpoint} was trained on other data: since then the dataset, its tokenizer or Python's standard "
            "library has changed; name another output_dir"
        )
    if isinstance(trainer.train_dataset, IterableDataset):
        written = len(list(Path(checkpoint).glob("stream_*.pt")))
        if written != trainer.args.world_size:
            raise UserError(
                f"{checkpoint} was written by {written} processes and is read by {trainer.args.world_size}: a stream "
                "goes on in as many as it was split in"
            )
        # the stream is entered where it was left, not read again from its start
        trainer.args.ignore_data_skip = True
        trainer.stream_states = checkpoint


@contextmanager
def _claim(run_dir: Path, recipe: Recipe) -> Iterator[None]:
    """
    Locks the run's folder and writes the recipe into it, or checks that the folder is of this very recipe. The lock
    ends with the block, or with a process that is killed.
    """
    lock = FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # a sweep that looks whether the folder is free holds the lock for a moment
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(f"another process is training in {run_dir}") from None
    except OSError as error:
        raise UserError(f"output_dir={run_dir} cannot be written: {error.strerror}") from None
    try:
        check_same_recipe(run_dir, recipe)
        with _disk_errors_explained(run_dir):
            shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)
            (run_dir / REPORT).unlink(missing_ok=True)
            write_atomically(run_dir / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors_explained(run_dir: Path):
    """A disk that is full or read-only is one line for a person, and what is half written on it makes room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)
        free = shutil.disk_usage(run_dir).free / 1e6
        last = next((path.name for path in reversed(list_checkpoints(run_dir))), None)
        kept = f"the last whole checkpoint is {last}, and the same command goes on from it"
        if last is None:
            kept = "no checkpoint is whole yet, and the same command begins again"
        raise UserError(f"{run_dir} cannot be written: {error} ({free:.1f} MB free); {kept}") from error


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
    trainer.processing_class.model_max_length = model.config.max_position_embeddings
    trainer.processing_class.save_pretrained(run_dir / INCOMPLETE / "model")
    flush(run_dir / INCOMPLETE / "model")
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    os.replace(run_dir / INCOMPLETE / "model", run_dir / "model")
    shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)
    write_atomically(run_dir / "log_history.json", json.dumps(state.log_history, indent=1))

    results = {
        "variant": model.config.variant,
        "backbone": model.config.backbone,
        "block_size": recipe.data.block_size,
        "seed": arguments.seed,
        "dataset": recipe.data.dataset,
        "perplexity": to_perplexity(metrics["eval_loss"]),
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
    if recipe.data.init_from is not None:
        results["base_model"] = parent_name(recipe.data.init_from)
    write_atomically(run_dir / RESULTS, json.dumps(results, indent=1))
    print(f"{run_dir} is finished: {results['variant']}, perplexity {results['perplexity']:.3f}")
