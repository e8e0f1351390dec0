"""`lnfree remove-norms`: a trained model -> one without norms, fine-tuned, with a control that kept its norms."""

import json
from dataclasses import asdict
from pathlib import Path

from .errors import UserError
from .files import read_json, read_records, write_atomically
from .hub.export import export
from .methods import NORM_REMOVAL_FIELDS, MethodArguments
from .plots import plot_norm_removal
from .recipe import load_recipe
from .runs import RESULTS, Run
from .train.loop import train


RECIPE = "remove_norms"


def remove_norms(
    model_id: str,
    out_dir: str | Path,
    overrides: list[str],
    *,
    dataset: str | None = None,
    keep_final_norm: bool = False,
    control: bool = True,
) -> Path:
    """
    Fine-tunes a model while its norms are taken out one after the other (recipe `remove_norms`), fine-tunes it as long
    with them, and exports the first. The same command goes on where it was interrupted.

    Args:
        model_id: Hub id or folder of a stock GPT-2, Pythia or Llama, or of a model of this family, with its tokenizer.
        out_dir: gets `removed` and `control`, the two runs, `model`, the export, and `norm_removal.png`.
        overrides: `key=value` strings that replace the recipe's values.
        dataset: what it is fine-tuned on; the recipe's by default.
        keep_final_norm: leaves the norm before the output projection.
        control: whether the run with norms is trained too.

    Returns:
        The folder of the export.

    Raises:
        UserError: before any work, for a model whose norms cannot be folded away and a schedule that does not end
            within the steps; and as `train` and `export`.
    """
    out_dir = Path(out_dir)
    given = [f"init_from={json.dumps(str(model_id))}", f"keep_final_norm={json.dumps(keep_final_norm)}"]
    given += [] if dataset is None else [f"dataset={json.dumps(dataset)}"]
    # the auxiliary loss is of the final norm's deviations
    given += ["remove_norms_auxiliary_weight=0"] if keep_final_norm else []
    named = {override.partition("=")[0] for override in overrides}
    if taken := named & {"init_from", "keep_final_norm", "output_dir"}:
        raise UserError(f"{', '.join(sorted(taken))} cannot be overridden: the command's own arguments say it")

    def recipe(name: str, *more: str):
        return load_recipe(RECIPE, [*overrides, *given, f"output_dir={json.dumps(str(out_dir / name))}", *more])

    # the loss of the model as it came, and what the control does without
    removal = recipe("removed", "eval_on_start=true")
    stays = {name: value for name, value in asdict(MethodArguments()).items() if name in NORM_REMOVAL_FIELDS}
    controlled = (
        recipe("control", *(f"{name}={json.dumps(value)}" for name, value in stays.items())) if control else None
    )
    removed = Run.load(train(removal))
    beside = Run.load(train(controlled)) if controlled is not None else None
    removed = _with_losses(removed, beside)
    plot_norm_removal(removed, beside).savefig(out_dir / "norm_removal.png")
    folder = export(removed.folder, out_dir / "model")
    losses = removed.results["norm_removal"]
    told = f"{folder}: {removed.variant}, loss {losses['eval_loss']:.4f} nats"
    told += f"; the original {losses['eval_loss_before']:.4f}"
    told += f", fine-tuned as long with its norms {losses['eval_loss_control']:.4f}" if beside is not None else ""
    print(told)
    return folder


def _with_losses(removed: Run, control: Run | None) -> Run:
    """The run with `norm_removal` in its results, from which the card and the command tell what it cost."""
    log = read_json(removed.folder / "log_history.json", list)
    before = next(entry["eval_loss"] for entry in log if entry["step"] == 0 and "eval_loss" in entry)
    record = read_records(removed.folder / "norm_removal.jsonl")[-1]
    losses = {
        "eval_loss": removed.results["eval_loss"],
        "eval_loss_before": before,
        "eval_loss_control": None if control is None else control.results["eval_loss"],
        "first_step": record["starts"][0],
        "last_step": record["starts"][-1],
        "removed": len(record["starts"]),
    }
    results = {**removed.results, "norm_removal": losses}
    write_atomically(removed.folder / RESULTS, json.dumps(results, indent=1))
    return Run(removed.folder, results)
