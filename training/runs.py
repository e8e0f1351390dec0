"""A run's folder: its results, its name, its setting, and what decides whether two runs may be compared."""

import importlib.metadata
import json
import math
import platform
import re
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modeling_lnfree.configuration_lnfree import BASELINE, variant_order

from .errors import UserError, one_line
from .files import read_json
from .recipe import LAYER_FIELDS, MODEL_FIELDS, MUON_DEFAULTS, DataArguments, Recipe, read_values


RESULTS, LOCK, ASIDE = "results.json", ".lock", ".incomplete"


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """
    The results of a finished run.

    Raises:
        UserError: if the folder holds none, or a file that cannot be read.
    """
    path = Path(run_dir) / RESULTS
    if not path.is_file():
        raise UserError(f"{run_dir} is not a finished run: it has no {RESULTS}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; remove it, and the run ends again") from None


def check_same_recipe(run_dir: Path, recipe: Recipe):
    """Raises UserError if the folder holds a run of another recipe, or what is no run and would be lost to it."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        if (run_dir / "model").exists() or list_checkpoints(run_dir):
            raise UserError(
                f"{run_dir} is not a run's folder: it holds a model or checkpoints, and no recipe.yaml; name another "
                "output_dir"
            )
        return
    # a field that the run did not know yet had its default's effect
    ours, theirs = recipe.to_dict(), {**asdict(DataArguments()), **read_values(path, "recipe")}
    for key in sorted((ours.keys() | theirs.keys()) - {"output_dir"}):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{run_dir} holds a run with {key}={theirs.get(key)!r}, this recipe has {ours.get(key)!r}; "
                "name another output_dir"
            )


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


def find_commit() -> str | None:
    """The project's commit where it runs from a clone, with `-dirty` after it if files differ from that commit."""
    for command in ("ls-files --error-unmatch runs.py", "describe --always --dirty --abbrev=40 --exclude=*"):
        try:
            run = subprocess.run(["git", *command.split()], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None
        if run.returncode:
            return None
    return run.stdout.strip()


REPORT = "instability.json"


def describe(report: dict[str, Any]) -> str:
    """A report in one line."""
    layer = "" if report["layer"] is None else f", layer {report['layer']}"
    last = report["last_checkpoint"]
    kept = "there is no checkpoint before it" if last is None else f"the last sound checkpoint is {last}"
    parts = [f"is unstable at step {report['step']}{layer}: {report['seen']}", report["found"], kept]
    # reports of earlier versions have neither of these
    for record in report.get("stream", []):
        norms = " ".join(f"{norm:.3g}" for norm in record["norm"])
        parts.append(f"norm of the stream behind each layer at step {record['step']}: {norms}")
    if "advice" in report:
        parts.append(report["advice"])
    return "; ".join(parts)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


# fields of a recipe that decide a run's result, but for the seed and what `configuration` tells
DECISIVE = MODEL_FIELDS - {"slope_sharing", "negative_slope", "hidden_act", "norm_type", "final_norm_type"} | {
    *("dataset_config", "eval_dataset", "eval_fraction", "text_column", "tokenizer"),
    *("streaming", "separate_documents"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps"),
    *("lr_scheduler_type", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "fp16", "bf16"),
}


def setting_of(run: dict[str, Any]) -> tuple:
    """Runs are compared within one setting: all that decides the result but the configuration and the seed."""
    # a field that the run did not know yet had its default's effect
    recipe = {**asdict(DataArguments()), **run["recipe"]}
    decisive = {key: recipe[key] for key in sorted(recipe.keys() & DECISIVE) if recipe[key] is not None}
    return run["backbone"], run["block_size"], run["dataset"], run["train_tokens"], json.dumps(decisive)


def why_unstable(folder: Path) -> str:
    """What a run that is unstable says of it, in one line; nothing for any other."""
    path = folder / REPORT
    return describe(read_json(path)) if path.is_file() else ""


def configuration(run: dict[str, Any]) -> str:
    """The variant, and what else sets runs of one setting apart: `SM+R, muon 0.006` trains its layers by Muon."""
    recipe = run["recipe"]
    decay = ", slopes decayed" if recipe.get("decay_slopes") else ""
    given = {name: recipe[name] for name in LAYER_FIELDS if recipe.get(name) is not None}
    optimizer, rate = given.pop("layer_optimizer", "adamw"), given.pop("layer_learning_rate", None)
    if optimizer == "adamw" and rate is None and not given:
        return run["variant"] + decay
    layers = f", {optimizer}" if rate is None else f", {optimizer} {rate:g}"
    others = {name: value for name, value in given.items() if value != MUON_DEFAULTS.get(name)}
    return run["variant"] + decay + layers + "".join(f", {name}={value}" for name, value in others.items())


def baseline_of(runs: list[dict[str, Any]]) -> str | None:
    """
    The configuration that changes are against: that of SM+LN+G. If it was trained in several ways, the best of those
    with the most seeds.
    """
    losses: dict[str, list[float]] = {}
    for run in runs:
        if run["variant"] == BASELINE:
            losses.setdefault(configuration(run), []).append(math.log(run["perplexity"]))
    return min(losses, key=lambda name: (-len(losses[name]), statistics.mean(losses[name])), default=None)


def evaluations(run: dict[str, Any]) -> list[tuple[int, float]]:
    """Training tokens and perplexity of a run's evaluations on the way."""
    log = read_json(run["folder"] / "log_history.json")
    tokens_per_step = run["train_tokens"] // run["train_steps"]
    evaluated = [
        (entry["step"] * tokens_per_step, entry["eval_perplexity"]) for entry in log if "eval_perplexity" in entry
    ]
    # the last one, over the whole evaluation part, is the result itself
    return evaluated[:-1]


def find_runs(runs_dir: Path) -> list[dict[str, Any]]:
    """
    Results of all finished runs, in the paper's order, with their folders; tells which runs are left out.

    Raises:
        UserError: if there is none.
    """
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not a folder")
    runs = []
    for folder in sorted(path.parent for path in runs_dir.glob("*/recipe.yaml")):
        if not (folder / RESULTS).is_file():
            print(f"left out: {folder.name} {why_unstable(folder) or 'is not finished'}")
        # an export has results too, but its weights beside them
        elif (folder / "model").is_dir():
            runs.append({"folder": folder, **read_results(folder)})
    if not runs:
        raise UserError(f"no finished run in {runs_dir}: none of its subfolders has a model and a {RESULTS}")
    return sorted(runs, key=lambda run: (setting_of(run), variant_order(run["variant"]), run["seed"]))
