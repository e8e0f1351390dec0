"""A run's folder: its results, its names, and what decides whether two runs may be compared."""

import importlib.metadata
import json
import math
import platform
import re
import statistics
import subprocess
import textwrap
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_lnfree import LNFreeConfig
from modeling_lnfree.variants import BASELINE, variant_order, variant_slug

from .catalog import read_values
from .errors import UserError, one_line
from .files import read_json
from .methods import METHOD_FIELDS
from .recipe import (
    LAYER_FIELDS,
    MODEL_FIELDS,
    MUON_DEFAULTS,
    START_FIELDS,
    DataArguments,
    Recipe,
)


RESULTS, REPORT, LOCK, INCOMPLETE = "results.json", "instability.json", ".lock", ".incomplete"
# what `lnfree measure --json` may have written into a run's folder about its model
MEASURED = "measured.json"


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
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise ValueError(f"it holds a {type(results).__name__}, not the results of a run")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; remove it, and the run ends again") from None
    return results


def check_same_recipe(run_dir: Path, recipe: Recipe):
    """Raises UserError if the folder holds a run of another recipe, or what is no run and would be lost to it."""
    path = run_dir / "recipe.yaml"
    # a run that was refused, or stopped before its first checkpoint, has nothing to lose
    if not any((run_dir / name).exists() for name in ("model", RESULTS)) and not list_checkpoints(run_dir):
        return
    if not path.is_file():
        raise UserError(
            f"{run_dir} is not a run's folder: it holds a model or checkpoints, and no recipe.yaml; name another "
            "output_dir"
        )
    # a field that the run did not know yet had its default's effect
    ours, theirs = recipe.to_dict(), {**asdict(DataArguments()), **read_values(path, "recipe")}
    # who is told of a run is no part of it
    for key in sorted((ours.keys() | theirs.keys()) - {"output_dir", "report_to"}):
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


def describe_instability(report: dict[str, Any]) -> str:
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
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The training step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


# fields of a recipe that decide a run's result, but for the seed and what `Run.configuration` tells
SETTING_FIELDS = MODEL_FIELDS - {
    "slope_sharing",
    "negative_slope",
    "hidden_act",
    "norm_type",
    "final_norm_type",
} | {
    *("dataset_config", "eval_dataset", "eval_fraction", "text_column", "tokenizer"),
    *("streaming", "separate_documents"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps"),
    *START_FIELDS,
    *("lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "fp16", "bf16", "label_smoothing_factor", "neftune_noise_alpha"),
}


class Setting(NamedTuple):
    """All that decides a run's result but configuration and seed; `fields` are those of its recipe, as JSON."""

    backbone: str
    block_size: int
    dataset: str
    train_tokens: int
    fields: str


@dataclass(frozen=True)
class Run:
    """
    A finished run.

    Args:
        folder: of the run.
        results: what its `results.json` holds.
    """

    folder: Path
    results: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Raises UserError for a folder that holds no finished run (`read_results`)."""
        return cls(Path(folder), read_results(folder))

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name

    @property
    def model_name(self) -> str:
        """The name of its variant's repository on the Hub: `lnfree-gpt2-sm-r-t128`."""
        return f"lnfree-{self.results['backbone']}-{variant_slug(self.variant)}-t{self.results['block_size']}"

    @property
    def variant(self) -> str:
        """In the paper's notation."""
        return self.results["variant"]

    @property
    def configuration(self) -> str:
        """The variant, and what else sets runs of one setting apart: `SM+R, muon 0.006` trains its layers by Muon."""
        parts = [self.variant, *["slopes decayed"] * bool(self.recipe.get("decay_slopes"))]
        given = {name: self.recipe[name] for name in LAYER_FIELDS if self.recipe.get(name) is not None}
        optimizer, rate = given.pop("layer_optimizer", "adamw"), given.pop("layer_learning_rate", None)
        if (optimizer, rate, given) != ("adamw", None, {}):
            parts.append(optimizer if rate is None else f"{optimizer} {rate:g}")
            parts += [f"{name}={value}" for name, value in given.items() if value != MUON_DEFAULTS.get(name)]
        defaults = asdict(DataArguments())
        methods = {name: self.recipe.get(name, defaults[name]) for name in METHOD_FIELDS}
        parts += [f"{name}={value}" for name, value in methods.items() if value != defaults[name]]
        return ", ".join(parts)

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def perplexity(self) -> float:
        """Over the whole evaluation part."""
        return self.results["perplexity"]

    @cached_property
    def measured(self) -> dict[str, Any]:
        """
        What `lnfree measure MODEL --json FOLDER/measured.json` found of its model, by the names of its quantities,
        with the perplexities `int8 by tensor` and `int8 by token`. Empty without such a file. Raises UserError if it
        cannot be read, or is of several models.
        """
        path = self.folder / MEASURED
        if not path.is_file():
            return {}
        found = read_json(path, object)
        if not isinstance(found, dict) or "summary" not in found:
            raise UserError(f"{path} must hold what was measured of one model; remove it, and measure again")
        return {
            **found["summary"],
            **{f"int8 {way}": read["perplexity"] for way, read in found.get("int8", {}).items()},
        }

    @property
    def attention_entropy(self) -> dict[str, Any]:
        """Over the whole evaluation part: `entropy` and `max_entropy`, each `(layers, heads)` in nats, and counts."""
        return self.results["attention_entropy"]

    @property
    def recipe(self) -> dict[str, Any]:
        """The flat recipe that it was trained by."""
        return self.results["recipe"]

    @cached_property
    def config(self) -> LNFreeConfig:
        """That of its model. Raises UserError if it cannot be read."""
        return LNFreeConfig.from_dict(read_json(self.folder / "model" / "config.json"))

    @cached_property
    def setting(self) -> Setting:
        """Runs are compared with each other within one setting."""
        # a field that the run did not know yet had its default's effect
        recipe = {**asdict(DataArguments()), **self.recipe}
        fields = {key: recipe[key] for key in sorted(recipe.keys() & SETTING_FIELDS) if recipe[key] is not None}
        named = {name: self.results[name] for name in ("backbone", "block_size", "dataset", "train_tokens")}
        return Setting(**named, fields=json.dumps(fields))

    def describe(self, *more: str) -> str:
        """A title for pictures, in lines: configuration, setting and seed, and whatever else is to be said."""
        setting = f"{self.results['backbone']}, T={self.results['block_size']}, seed {self.seed}"
        return "\n".join([*textwrap.wrap(self.configuration, 40), setting, *more])

    def read_evaluations(self) -> list[tuple[int, float]]:
        """Training tokens and perplexity of the evaluations on the way. Raises UserError if they cannot be read."""
        log = read_json(self.folder / "log_history.json", list)
        tokens_per_step = self.results["train_tokens"] // self.results["train_steps"]
        evaluated = [
            (entry["step"] * tokens_per_step, entry["eval_perplexity"]) for entry in log if "eval_perplexity" in entry
        ]
        # the last one, over the whole evaluation part, is the result itself
        return evaluated[:-1]


def find_baseline(runs: list[Run]) -> str | None:
    """
    The configuration that changes are against: that of SM+LN+G. If it was trained in several ways, the best of those
    with the most seeds.
    """
    losses: dict[str, list[float]] = {}
    for run in runs:
        if run.variant == BASELINE:
            losses.setdefault(run.configuration, []).append(math.log(run.perplexity))
    return min(losses, key=lambda name: (-len(losses[name]), statistics.mean(losses[name])), default=None)


def find_runs(runs_dir: str | Path) -> tuple[list[Run], dict[str, str]]:
    """
    The runs below a folder.

    Returns:
        The finished runs by setting, within it in the paper's order, and by seed; and of each other run its name and
        why it is unstable, if it is.

    Raises:
        UserError: if there is no such folder or no finished run, or a file of one cannot be read.
    """
    runs_dir = Path(runs_dir)
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not a folder")
    finished, unfinished = [], {}
    for folder in sorted(path.parent for path in runs_dir.glob("*/recipe.yaml")):
        if not (folder / RESULTS).is_file():
            report = folder / REPORT
            unfinished[folder.name] = describe_instability(read_json(report)) if report.is_file() else ""
        # an export has results too, but its weights beside them
        elif (folder / "model").is_dir():
            finished.append(Run.load(folder))
    if not finished:
        why = f"none of its subfolders has a model and a {RESULTS}"
        if (runs_dir / "recipe.yaml").is_file():
            why = f"it is a run itself; the folder of runs is {runs_dir.parent}"
        raise UserError(f"no finished run in {runs_dir}: {why}")
    finished.sort(key=lambda run: (run.setting, variant_order(run.variant), run.configuration, run.seed))
    return finished, unfinished
