"""The tasks of lm-eval (EleutherAI's harness), where it is installed, on a model at hand."""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import UserError, explained


def check_tasks(tasks: str | None) -> list[str]:
    """
    Names of tasks, or `.yaml` files of them, that have commas between them.

    Raises:
        UserError: if lm-eval is not installed, or does not know one of them.
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise UserError(f"tasks must name tasks of lm-eval with commas between them, got {tasks!r}")
    if names:
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            raise UserError(
                "--tasks hands over to lm-eval, which is not installed: pip install 'lnfree[clients]'"
            ) from None
        manager, found = _manager(names)
        if unknown := [name for name in found if name not in manager.task_index]:
            raise UserError(f"lm-eval has no task {', '.join(unknown)}: 'lm-eval ls tasks' lists them")
    return names


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str], batch_size: int, max_length: int
) -> dict[str, dict[str, float]]:
    """By task, its metrics; those that have a standard error without it."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, found = _manager(names)
    with explained(f"the tasks {', '.join(found)} cannot be run"):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        results = simple_evaluate(model=harness, tasks=found, task_manager=manager, log_samples=False)
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in metrics.items()
            if isinstance(value, float) and "_stderr" not in metric
        }
        for task, metrics in results["results"].items()
    }


def _manager(names: list[str]) -> tuple[Any, list[str]]:
    """lm-eval's own index of tasks with those of the files, and the tasks' names."""
    from lm_eval.tasks import TaskManager

    files = {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
    found = []
    for name in names:
        if name in files:
            with explained(f"the task {name} cannot be read"):
                match = re.search(r"^task:\s*(\S+)", files[name].read_text(encoding="utf-8"), re.MULTILINE)
            if match is None:
                raise UserError(f"the task {name} cannot be read: it has no line 'task: NAME'")
            name = match[1]
        found.append(name)
    return TaskManager(include_path=[str(path.parent) for path in files.values()] or None), found
