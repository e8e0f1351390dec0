"""
Finished runs -> the Hub: a repository a variant, the metric as a Space, the measured results as a dataset, and the
collection of them; then all of it loaded back from there by a clean process.

Everything is built and checked on this machine first. The same command may be given again at any time: after an
interruption it does what is left.
"""

import shutil
import tempfile
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import modeling_lnfree

from ..errors import UserError
from ..runs import Run, find_runs, list_checkpoints
from .client import describe_error, retry
from .export import export
from .problems import find_private_strings, find_problems
from .publication import Publication
from .push import release
from .results import write_results
from .verify import verify


METRIC = Path(modeling_lnfree.__file__).parent / "metrics" / "attention_entropy"


def publish(
    runs_dir: str | Path,
    namespace: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    seed: int | None = None,
    checkpoints: bool = False,
) -> list[Publication]:
    """
    Publishes the finished runs below a folder; see the module's docstring.

    Args:
        runs_dir: folder whose subfolders are runs.
        namespace: user or organization of the Hub.
        private: whether repositories that are created are private; one that is public already is refused.
        dry_run: whether only to list what would change.
        seed: of the runs to publish, where a variant has several; the lowest finished one by default. The dataset of
            results holds all of them.
        checkpoints: whether a run's checkpoints are published too, as revisions `step-N` of its repository.

    Returns:
        What was published, models first, in the paper's order.

    Raises:
        UserError: for runs that cannot be published, before anything is; and when the Hub refuses or cannot be
            reached, with what is done and what is left.
    """
    try:
        validate_repo_id(f"{namespace}/{METRIC.name}")
    except HFValidationError:
        raise UserError(
            f"namespace must be the name of a user or organization of the Hub, got {namespace!r}"
        ) from None
    runs, api = find_finished(runs_dir), HfApi()
    try:
        if get_token() is not None or not dry_run:
            _check_account(api, namespace)
        with tempfile.TemporaryDirectory(prefix="lnfree-") as aside:
            publications = build(runs, namespace, Path(aside), seed=seed, checkpoints=checkpoints)
            release(api, publications, private=private, dry_run=dry_run)
            if not dry_run:
                verify(api, publications)
    except (OSError, httpx2.TransportError) as error:
        raise UserError(describe_error(error)) from error
    return publications


def find_finished(runs_dir: str | Path) -> list[Run]:
    """The finished runs below a folder; which are left out is printed."""
    finished, unfinished = find_runs(runs_dir)
    for name, why in unfinished.items():
        print(f"left out: {name} {why or 'is not finished'}")
    return finished


def choose(runs: list[Run], seed: int | None) -> list[Run]:
    """
    One run a repository: of the seed asked for, or the lowest.

    Raises:
        UserError: if a variant has no run of the seed, or if two runs cannot be told apart by their repository's name.
    """
    chosen: dict[str, Run] = {}
    for run in runs:
        if seed is not None and run.seed != seed:
            continue
        first = chosen.setdefault(run.model_name, run)
        if first is not run and (first.setting != run.setting or first.seed == run.seed):
            raise UserError(
                f"{first.name} and {run.name} would both be {run.model_name}; publish runs of one setting from a "
                "folder of their own"
            )
    missing = [run for run in runs if run.model_name not in chosen]
    if missing:
        found = sorted({f"{run.model_name} (seed {run.seed})" for run in missing})
        raise UserError(f"seed={seed} is not among the finished runs of {', '.join(found)}")
    for name, run in chosen.items():
        others = [str(other.seed) for other in runs if other.model_name == name and other is not run]
        if others:
            print(f"{name}: the run of seed {run.seed} is published; also in the results: {', '.join(others)}")
    return list(chosen.values())


def build(
    runs: list[Run], namespace: str, aside: Path, *, seed: int | None = None, checkpoints: bool = False
) -> list[Publication]:
    """
    Makes the folders of all repositories below `aside`, and checks them; see `find_runs` and `publish`.

    Raises:
        UserError: with all that forbids to publish them.
    """
    chosen = choose(runs, seed)
    models, problems = [], []
    for run in chosen:
        siblings = [other for other in chosen if other.setting == run.setting]
        sources: dict[str, Path | None] = {"main": None}
        if checkpoints:
            sources |= {path.name.replace("checkpoint", "step"): path for path in list_checkpoints(run.folder)}
        name = run.model_name
        for branch, checkpoint in sources.items():
            folder = aside / branch / name
            try:
                export(run.folder, folder, namespace=namespace, siblings=siblings, checkpoint=checkpoint)
                models.append(Publication(f"{namespace}/{name}", "model", folder, branch))
            except UserError as error:
                problems.append(str(error))
    results = Publication(f"{namespace}/lnfree-results", "dataset", aside / "results")
    write_results(runs, namespace, results.folder)
    metric = Publication(f"{namespace}/{METRIC.name}", "space", aside / METRIC.name)
    shutil.copytree(METRIC, metric.folder, symlinks=True, ignore=shutil.ignore_patterns("__*"))
    publications = [*models, results, metric]
    private_strings = find_private_strings(runs[0].folder.parent, namespace, aside)
    for publication in publications:
        problems += find_problems(publication, private_strings)
    if problems:
        raise UserError(f"nothing was published: {'; '.join(problems)}")
    return publications


def _check_account(api: HfApi, namespace: str):
    if not (get_token() or "").isascii():
        raise UserError("the token of the Hub has characters that no token has")
    account = retry(api.whoami)
    owned = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if namespace not in owned:
        raise UserError(f"namespace={namespace} is not yours; the token's are {', '.join(owned)}")
