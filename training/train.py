"""
Recipe -> Trainer -> finished run. Plainly or by a launcher:

    python -m training.train training/recipes/quick.yaml variant=SM+R
    torchrun --nproc_per_node 2 -m training.train training/recipes/quick.yaml variant=SM+R

A run's folder holds `recipe.yaml`, the last checkpoints, `attention_entropy.jsonl` (and `negative_slope.jsonl`) with
what was measured on the way, and once it is finished `model/`, `log_history.json` and `results.json`, in this order.
"""

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from filelock import FileLock, Timeout
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from modeling_lnfree import LNFreeForCausalLM, record_attention_entropy

from .callbacks import AttentionEntropyCallback, BriefPrinterCallback, BriefProgressCallback, NegativeSlopeCallback
from .data import document_positions, load_documents, load_tokenizer, tokenize_blocks
from .recipe import DataArguments, Recipe, RecipeError, load_recipe


RESULTS, ASIDE = "results.json", ".incomplete"


class LNFreeTrainer(Trainer):
    """
    The Trainer, with checkpoints that are whole or not there, perplexity beside the evaluation loss, and no weight
    decay on learned negative slopes unless `decay_slopes` asks for it.

    A stream is split by process. Checkpoints hold its place in every process, `stream_RANK.pt`; training goes on from
    those in `stream_states`, a folder.
    """

    def __init__(self, *args, decay_slopes: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.decay_slopes = decay_slopes
        self.stream, self.stream_states = None, None

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
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial):
        return os.path.join(super()._get_output_dir(trial), ASIDE)

    def _save_checkpoint(self, model, trial):
        # Written aside, then renamed: a run killed in the middle finds only whole checkpoints.
        super()._save_checkpoint(model, trial)
        if self.stream is not None:
            aside = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            torch.save(self.stream.state_dict(), aside / self._stream_name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            os.replace(os.path.join(self._get_output_dir(trial), name), os.path.join(self.args.output_dir, name))
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def train(recipe: Recipe) -> Path:
    """
    Trains what the recipe says, or goes on from the run's last checkpoint; a finished run is left as it is.

    Returns:
        The run's folder.

    Raises:
        RecipeError: for data that cannot be had, and for a folder that holds a run of another recipe.
    """
    arguments = _build_arguments(recipe)
    if arguments.world_size % recipe.data.fsdp_size:
        raise RecipeError(
            f"fsdp_size={recipe.data.fsdp_size} must divide the number of processes, {arguments.world_size}"
        )
    run_dir = Path(arguments.output_dir)
    # Held until the process ends, however it ends. The other processes of a launcher share the first one's claim.
    if int(os.environ.get("RANK", 0)) == 0:
        lock = _claim(run_dir, recipe)  # noqa: F841
    if (run_dir / RESULTS).is_file():
        print(f"{run_dir} is finished: perplexity {read_results(run_dir)['perplexity']:.3f}")
        return run_dir

    with arguments.main_process_first(desc="data preparation"):
        documents = load_documents(recipe.data, arguments.seed)
        tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model.get("vocab_size"))
        blocks = tokenize_blocks(documents, tokenizer, recipe.data, arguments.seed)

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
        eval_dataset=blocks["eval"],
        data_collator=collate,
        compute_metrics=lambda prediction: {"nll": prediction.predictions.mean(dtype="float64").item()},
        processing_class=tokenizer,
        decay_slopes=recipe.data.decay_slopes,
    )
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trainer.add_callback(BriefPrinterCallback if arguments.disable_tqdm else BriefProgressCallback)
    probe = collate(list(blocks["eval"].take(min(recipe.data.entropy_sequences, len(blocks["eval"])))))
    del probe["labels"]
    probe = {
        name: torch.tensor_split(value, arguments.world_size)[arguments.process_index] for name, value in probe.items()
    }
    every = recipe.data.entropy_steps
    trainer.add_callback(AttentionEntropyCallback(probe, every, run_dir / "attention_entropy.jsonl", trainer.log))
    if model.config.slope_sharing is not None:
        trainer.add_callback(NegativeSlopeCallback(every, run_dir / "negative_slope.jsonl", trainer.log))

    checkpoint = get_last_checkpoint(run_dir)
    if checkpoint is not None:
        _prepare_to_resume(trainer, checkpoint)
    runtime = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    with torch.no_grad(), record_attention_entropy(model) as record:
        metrics = trainer.evaluate()
    model.config.use_cache = True  # the Trainer switches it off for training
    if trainer.is_world_process_zero() or recipe.data.fsdp_size > 1:  # a sharded model is gathered by all together
        model.save_pretrained(run_dir / ASIDE / "model", is_main_process=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        # a resumed run has forgotten how long it took before
        _finish(run_dir, recipe, trainer, metrics, record, runtime if checkpoint is None else None)
    return run_dir


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats per token; infinite where that overflows."""
    return torch.tensor(nll, dtype=torch.float64).exp().item()


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """
    The results of a finished run.

    Raises:
        RecipeError: if the folder holds none.
    """
    path = Path(run_dir) / RESULTS
    if not path.is_file():
        raise RecipeError(f"{run_dir} is not a finished run: it has no {RESULTS}")
    return json.loads(path.read_text(encoding="utf-8"))


def _build_arguments(recipe: Recipe) -> TrainingArguments:
    # a NaN in the loss must show, not be replaced by the running mean; pinned memory is for accelerators
    defaults = {"logging_nan_inf_filter": False, "dataloader_pin_memory": torch.accelerator.is_available()}
    try:
        return TrainingArguments(**{**defaults, **recipe.training})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"recipe: {' '.join(str(error).split())}") from error


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
    model.tie_weights()
    return model


def _prepare_to_resume(trainer: LNFreeTrainer, checkpoint: str):
    if trainer.args.save_only_model:
        raise RecipeError(
            f"{checkpoint} holds the weights alone: the run was interrupted and cannot be resumed; name another "
            "output_dir"
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
    path = run_dir / "recipe.yaml"
    ours = recipe.to_dict()
    lock = FileLock(run_dir / ".lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"another process is training in {run_dir}") from None
    except OSError as error:
        raise RecipeError(f"output_dir={run_dir} cannot be written: {error.strerror}") from None
    if path.is_file():
        # a field that the run did not know yet had its default's effect
        theirs = {**asdict(DataArguments()), **yaml.safe_load(path.read_text(encoding="utf-8"))}
        for key in sorted((ours.keys() | theirs.keys()) - {"output_dir"}):
            if ours.get(key) != theirs.get(key):
                raise RecipeError(
                    f"{run_dir} holds a run with {key}={theirs.get(key)!r}, this recipe has {ours.get(key)!r}; "
                    "name another output_dir"
                )
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)
    write_atomically(path, yaml.safe_dump(ours, sort_keys=False))
    return lock


def write_atomically(path: Path, text: str):
    """Writes a text file that is whole or not there."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _finish(
    run_dir: Path, recipe: Recipe, trainer: LNFreeTrainer, metrics: dict[str, float], record, runtime: float | None
):
    """Writes the model, the log and, last, the results that mark the run as finished."""
    model, state, arguments = trainer.model, trainer.state, trainer.args
    trainer.processing_class.save_pretrained(run_dir / ASIDE / "model")
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    os.replace(run_dir / ASIDE / "model", run_dir / "model")
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)
    write_atomically(run_dir / "log_history.json", json.dumps(state.log_history, indent=1))

    block_size = recipe.data.block_size
    tokens_per_step = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size * block_size
    )
    results = {
        "variant": model.config.variant,
        "backbone": model.config.backbone,
        "block_size": block_size,
        "seed": arguments.seed,
        "dataset": recipe.data.dataset,
        "perplexity": perplexity(metrics["eval_loss"]),
        "eval_loss": metrics["eval_loss"],
        "eval_tokens": len(trainer.eval_dataset) * (block_size - 1),
        "train_steps": state.global_step,
        "train_tokens": state.global_step * tokens_per_step,
        "train_seconds": runtime,
        "parameters": model.num_parameters(),
        "attention_entropy": {
            "entropy": record.entropy.tolist(),
            "max_entropy": record.max_entropy.tolist(),
            "head_distribution": record.head_distribution.tolist(),
            "nan_count": record.nan_count.sum(-1).tolist(),
        },
        "recipe": recipe.to_dict(),
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
        },
    }
    write_atomically(run_dir / RESULTS, json.dumps(results, indent=1))
    print(f"{run_dir} is finished: {results['variant']}, perplexity {results['perplexity']:.3f}")


if __name__ == "__main__":
    try:
        train(load_recipe(sys.argv[1], sys.argv[2:]))
    except RecipeError as error:
        sys.exit(f"lnfree train: error: {error}")
