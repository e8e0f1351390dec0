"""
Finished runs -> the Hub: a repository a variant, the metric as a Space, the measured results as a dataset, and the
collection of them; then all of it loaded back from there by a clean process.

Everything is built and checked on this machine first. A repository then changes by one commit, made only if something
differs from what stands there, and only on top of the commit that was compared. So the same command may be given again
at any time: after an interruption it does what is left.
"""

import functools
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    HfApi,
    ModelCard,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha, validate_repo_id
from safetensors import SafetensorError, safe_open

import modeling_lnfree
from model_cards import card
from model_cards.card import RESULTS_TEMPLATE, TEMPLATE, model_name

from ..encryption import counting
from ..errors import UserError
from ..runs import find_runs, list_checkpoints, setting_of
from .export import PROBE, export, last_words


HUB_CHECK = Path(__file__).with_name("hub_check.py")
METRIC = Path(modeling_lnfree.__file__).parent / "metrics" / "attention_entropy"
COLLECTION = "LNFree: GPT models without LayerNorm"
PAPER = "2410.09637"
# https://huggingface.co/docs/hub/storage-limits
MAX_FILE_SIZE, MAX_FOLDER_ENTRIES = 50 * 10**9, 10_000
# seconds before a request is tried again that the client itself does not repeat; what a server asks for goes first
WAITS, LONGEST_WAIT = (1, 2, 4, 8, 16), 600
# of these, what a release does not have would be loaded beside what it has; results of other runs stay
STALE = (".py", ".safetensors")
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml")
# a vocabulary holds whatever its corpus held
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_LOCAL_PATH = re.compile(
    r"(?<![\w.:/~-])(/(home|Users|root|tmp|private|var|mnt|media|scratch|workspace|work|opt|srv)/[\w.-]+|~/[\w.-]+"
    r"|[A-Za-z]:\\\\?[\w.-]+)"
)
_MARKS = {"new": "+", "changed": "~", "removed": "-", "same": "="}
# a row a head; entropies in nats
_RESULTS_SCHEMA = pa.schema(
    {
        "model": pa.string(),  # name of the repository, which holds one of the seeds
        **{name: pa.string() for name in ("variant", "backbone", "dataset")},
        **{name: pa.int64() for name in ("block_size", "seed", "train_tokens", "train_steps", "parameters")},
        "perplexity": pa.float64(),  # of the run
        "layer": pa.int64(),
        "head": pa.int64(),
        "entropy": pa.float64(),  # mean over the evaluation part
        "max_entropy": pa.float64(),  # the largest that its queries can reach
        "layer_nan_count": pa.int64(),  # attention weights of the layer that are NaN
    }
)
_Result = TypeVar("_Result")


@dataclass
class Publication:
    """
    A folder, and the repository that is to hold it.

    Args:
        repo_id: of the Hub.
        kind: `"model"`, `"dataset"` or `"space"`.
        folder: what it is to hold.
        branch: `main`, or the revision of a checkpoint.
        seen: the commit that `folder` was compared with; None where there is no such branch yet.
        changes: by path, `"new"`, `"changed"`, `"removed"` or `"same"`.
        tags: of the repository, and their commits.
        commit: the commit that holds `folder`, once it is there.
    """

    repo_id: str
    kind: str
    folder: Path
    branch: str = "main"
    seen: str | None = None
    changes: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commit: str | None = None

    @property
    def is_changed(self) -> bool:
        return any(change != "same" for change in self.changes.values())

    def __str__(self) -> str:
        name = self.repo_id if self.branch == "main" else f"{self.repo_id}@{self.branch}"
        return name if self.kind == "model" else f"{name} ({self.kind})"


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
        namespace: user or organisation of the Hub.
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
            f"namespace must be the name of a user or organisation of the Hub, got {namespace!r}"
        ) from None
    runs, api = find_runs(Path(runs_dir)), HfApi()
    try:
        if get_token() is not None or not dry_run:
            _check_account(api, namespace)
        with tempfile.TemporaryDirectory(prefix="lnfree-") as aside:
            publications = build(runs, namespace, Path(aside), seed=seed, checkpoints=checkpoints)
            release(api, publications, private=private, dry_run=dry_run)
            if not dry_run:
                verify(api, publications)
    except (OSError, httpx2.TransportError) as error:
        raise UserError(_message(error)) from error
    return publications


def _choose(runs: list[dict[str, Any]], seed: int | None) -> list[dict[str, Any]]:
    """One run a repository: of the seed asked for, or the lowest."""
    chosen: dict[str, dict[str, Any]] = {}
    for run in runs:
        name = model_name(run)
        if seed is not None and run["seed"] != seed:
            continue
        first = chosen.setdefault(name, run)
        if first is not run and (setting_of(first) != setting_of(run) or first["seed"] == run["seed"]):
            raise UserError(
                f"{first['folder'].name} and {run['folder'].name} would both be {name}; publish runs of one setting "
                "from a folder of their own"
            )
    missing = [run for run in runs if model_name(run) not in chosen]
    if missing:
        found = sorted({f"{model_name(run)} (seed {run['seed']})" for run in missing})
        raise UserError(f"seed={seed} is not among the finished runs of {', '.join(found)}")
    for name, run in chosen.items():
        others = [str(other["seed"]) for other in runs if model_name(other) == name and other is not run]
        if others:
            print(f"{name}: the run of seed {run['seed']} is published; also in the results: {', '.join(others)}")
    return list(chosen.values())


def build(
    runs: list[dict[str, Any]], namespace: str, aside: Path, *, seed: int | None = None, checkpoints: bool = False
) -> list[Publication]:
    """
    Makes the folders of all repositories below `aside`, and checks them; see `find_runs` and `publish`.

    Raises:
        UserError: with all that forbids to publish them.
    """
    chosen = _choose(runs, seed)
    models, problems = [], []
    for run in chosen:
        siblings = [other for other in chosen if setting_of(other) == setting_of(run)]
        sources = {"main": None}
        if checkpoints:
            sources |= {path.name.replace("checkpoint", "step"): path for path in list_checkpoints(run["folder"])}
        name = model_name(run)
        for branch, checkpoint in sources.items():
            folder = aside / branch / name
            try:
                export(run["folder"], folder, namespace=namespace, siblings=siblings, checkpoint=checkpoint)
                models.append(Publication(f"{namespace}/{name}", "model", folder, branch))
            except UserError as error:
                problems.append(str(error))
    results = Publication(f"{namespace}/lnfree-results", "dataset", aside / "results")
    _write_results(runs, namespace, results.folder)
    metric = Publication(f"{namespace}/{METRIC.name}", "space", aside / METRIC.name)
    shutil.copytree(METRIC, metric.folder, symlinks=True, ignore=shutil.ignore_patterns("__*"))
    publications = [*models, results, metric]
    private_strings = _private_strings(runs[0]["folder"].parent, namespace, aside)
    for publication in publications:
        problems += find_problems(publication, private_strings)
    if problems:
        raise UserError(f"nothing was published: {'; '.join(problems)}")
    return publications


def _write_results(runs: list[dict[str, Any]], namespace: str, folder: Path):
    """The dataset of results, runs x layers x heads: a table for each backbone and context length, and the card."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        rows = tables.setdefault(f"{run['backbone']}-t{run['block_size']}", [])
        dataset = Path(run["dataset"]).name if Path(run["dataset"]).exists() else run["dataset"]
        described = {name: run[name] for name in _RESULTS_SCHEMA.names if name in run} | {"dataset": dataset}
        measured = run["attention_entropy"]
        for (layer, head), entropy in np.ndenumerate(np.array(measured["entropy"])):
            figures = {"entropy": entropy, "max_entropy": measured["max_entropy"][layer][head]}
            nans = {"layer_nan_count": measured["nan_count"][layer]}
            rows.append({"model": model_name(run), **described, "layer": layer, "head": head, **figures, **nans})
    (folder / "data").mkdir(parents=True)
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, _RESULTS_SCHEMA), folder / "data" / f"{name}.parquet")
    data = DatasetCardData(
        license="apache-2.0",
        pretty_name="LNFree: attention entropy by run, layer and head",
        tags=["lnfree"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    card = DatasetCard.from_template(data, str(RESULTS_TEMPLATE), namespace=namespace, collection=COLLECTION)
    card.save(folder / "README.md")


def _private_strings(runs_dir: Path, namespace: str, aside: Path) -> list[str]:
    """What says where, and by whom, a file was made."""
    folders = [Path.home(), Path.cwd(), runs_dir, runs_dir.resolve(), aside, Path(tempfile.gettempdir())]
    paths = {str(folder) for folder in folders if folder.is_absolute() and len(folder.parts) > 1}
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody, as in some containers
        user = ""
    # a name that is a word of the cards cannot be told from it
    sources = (TEMPLATE, Path(card.__file__), Path(counting.__file__))
    spoken = set(re.findall(r"\w+", "".join(source.read_text(encoding="utf-8") for source in sources)))
    return sorted(paths) + ([user] if user not in spoken | {namespace, ""} else [])


def find_problems(publication: Publication, private_strings: Sequence[str] = ()) -> list[str]:
    """
    What forbids to publish a folder: links that leave it, files over the Hub's limits, pickles, broken weights, a card
    without results, the token, a local path or the user's name.
    """
    problems = []
    root = publication.folder.resolve()
    token = get_token()
    for path in sorted(publication.folder.rglob("*")):
        name = f"{publication}: {path.relative_to(publication.folder)}"
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            problems.append(f"{name} is a link out of the folder")
        elif path.is_dir():
            if sum(1 for _ in path.iterdir()) > MAX_FOLDER_ENTRIES:
                problems.append(f"{name} has more than {MAX_FOLDER_ENTRIES:,} entries")
        elif path.stat().st_size > MAX_FILE_SIZE:
            problems.append(f"{name} has {_size(path.stat().st_size)}, the Hub takes {_size(MAX_FILE_SIZE)}")
        elif _is_pickle(path):
            problems.append(f"{name} is a pickle, which runs code when it is loaded")
        else:
            # weights may be large, and hold no text
            data = path.read_bytes() if path.suffix != ".safetensors" else b""
            if token and token.encode() in data:
                problems.append(f"{name} holds the token")
            if path.suffix == ".safetensors":
                problems += [f"{name}: {problem}" for problem in _find_broken_weights(path)]
            if path.suffix in _TEXTS and path.name not in _VOCABULARIES:
                found = _find_private(data.decode("utf-8"), private_strings)
                if found is not None:
                    problems.append(f"{name} holds {found!r}")
    if publication.kind == "model":
        problems += [f"{publication}: {problem}" for problem in _find_card_problems(publication.folder)]
    return problems


def _is_pickle(path: Path) -> bool:
    if path.suffix in _PICKLES:
        return True
    with path.open("rb") as file:
        start = file.read(2)
    # the first opcode of protocols 2 to 5, and what torch.save wraps it in
    return (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")) or (
        zipfile.is_zipfile(path) and any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    )


def _find_broken_weights(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return [
                f"{name} has NaN or infinite entries"
                for name in file.keys()  # noqa: SIM118  (not a dictionary)
                if not file.get_tensor(name).isfinite().all()
            ]
    except SafetensorError as error:
        return [f"is not safetensors ({error})"]


def _find_private(text: str, private_strings: Sequence[str]) -> str | None:
    for private in private_strings:
        # a name is also half of an id of the Hub, which is public
        before, after = (r"\w.-", r"\w-") if "/" in private else (r"\w.@/-", r"\w/-")
        if re.search(rf"(?<![{before}]){re.escape(private)}(?![{after}])", text):
            return private
    match = _LOCAL_PATH.search(text)
    return match[0] if match else None


def _find_card_problems(folder: Path) -> list[str]:
    try:
        data = ModelCard.load(folder / "README.md").data
    except (OSError, ValueError, KeyError) as error:
        return [f"its card cannot be read ({' '.join(str(error).split())})"]
    values = {result.metric_type: result.metric_value for result in data.eval_results or []}
    problems = []
    for metric in ("perplexity", "attention_entropy"):
        if not isinstance(values.get(metric), float) or not np.isfinite(values[metric]):
            problems.append(f"its card has no result for {metric} ({values.get(metric)})")
    return problems


def _check_account(api: HfApi, namespace: str):
    if not (get_token() or "").isascii():
        raise UserError("the token of the Hub has characters that no token has")
    account = _patiently(api.whoami)
    owned = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    if namespace not in owned:
        raise UserError(f"namespace={namespace} is not yours; the token's are {', '.join(owned)}")


def _compare(api: HfApi, publication: Publication, private: bool):
    """Sets `seen`, `changes` and `tags` from what stands on the Hub; an attempt, to be repeated as a whole."""
    repo = {"repo_id": publication.repo_id, "repo_type": publication.kind}
    try:
        info = api.repo_info(**repo)
    except RepositoryNotFoundError:
        publication.seen, publication.changes = None, dict.fromkeys(_files(publication.folder), "new")
        return
    if private and not info.private:
        raise UserError(f"{publication} is public; make it private on the Hub, or publish without --private")
    refs = api.list_repo_refs(**repo)
    publication.seen = {branch.name: branch.target_commit for branch in refs.branches}.get(publication.branch)
    revision = publication.seen or info.sha  # a new branch starts from main
    tree = api.list_repo_tree(**repo, revision=revision, recursive=True)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    changes = {}
    for name, path in _files(publication.folder).items():
        changes[name] = "new" if name not in remote else "same" if _is_same(path, remote[name]) else "changed"
    stale = [name for name in remote if name.endswith(STALE) and name not in changes]
    publication.changes = changes | dict.fromkeys(stale, "removed")
    publication.tags = {tag.name: tag.target_commit for tag in refs.tags}


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder).as_posix()): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _is_same(path: Path, entry) -> bool:
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is None:
        return sha.git_hash(path.read_bytes()) == entry.blob_id
    with path.open("rb") as file:
        return sha.sha_fileobj(file).hex() == entry.lfs.sha256


def _next_tag(publications: list[Publication]) -> str:
    """
    The release's name, one for the whole family: the project's version, with `.post1` and so on for what was published
    under it before. A name is free where a repository does not have it, or has it on the very commit that stays.
    """
    mains = [publication for publication in publications if publication.branch == "main"]
    tag = release = f"v{version('lnfree')}"
    for number in count(1):
        if all(tag not in main.tags or main.tags[tag] == main.seen and not main.is_changed for main in mains):
            return tag
        tag = f"{release}.post{number}"


def _print_plan(publications: list[Publication], tag: str, private: bool):
    for publication in publications:
        state = "new" if publication.seen is None else "changes" if publication.is_changed else "unchanged"
        # a branch is as public as its repository
        if state == "new" and publication.branch == "main":
            state += ", private" if private else ", public"
        files = _files(publication.folder)
        print(f"{publication}: {state}, {_size(sum(path.stat().st_size for path in files.values()))}")
        for name, change in publication.changes.items():
            size = _size(files[name].stat().st_size) if name in files else ""
            print(f"  {_MARKS[change]} {name:32} {size:>9}")
    print(f"release: {tag}")


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def release(api: HfApi, publications: list[Publication], *, private: bool = False, dry_run: bool = False):
    """
    Compares what was built with what stands on the Hub, prints the difference, and, unless it is a dry run, pushes it.

    Raises:
        UserError: if a repository is public that should be private, before anything is pushed; if someone else
            changes a repository meanwhile; and if the Hub does not take it, with what is done and what is left.
    """
    for publication in publications:
        _patiently(functools.partial(_compare, api, publication, private))
    tag = _next_tag(publications)
    _print_plan(publications, tag, private)
    if dry_run:
        print("dry run, nothing was pushed; + new, ~ changed, - removed, = the same")
        return
    for index, publication in enumerate(publications):
        try:
            _push(api, publication, private, tag)
        except (OSError, httpx2.TransportError, RuntimeError, ValueError) as error:
            left = ", ".join(map(str, publications[index:]))
            raise UserError(
                f"{_message(error)}; {index} of {len(publications)} are published, not yet {left}; "
                "the same command goes on"
            ) from error
    print(f"collection: {_patiently(lambda: _collect(api, publications, private))}")


def _push(api: HfApi, publication: Publication, private: bool, tag: str):
    """Brings one repository to its folder: created if missing, at most one commit, and the release's tag."""
    repo = {"repo_id": publication.repo_id, "repo_type": publication.kind}
    planned, changed = publication.seen, publication.is_changed
    if planned is None:
        sdk = {"space_sdk": "gradio"} if publication.kind == "space" else {}
        _patiently(lambda: api.create_repo(**repo, private=private, exist_ok=True, **sdk))
        if publication.branch != "main":
            _patiently(lambda: api.create_branch(**repo, branch=publication.branch, exist_ok=True))

    def commit():
        # looked at again each time: an attempt whose answer was lost may have done it
        _compare(api, publication, private)
        if not publication.is_changed:
            return
        if planned not in (None, publication.seen):
            raise _second_writer(publication, planned)
        files = _files(publication.folder)
        touched = [name for name, change in publication.changes.items() if change in ("new", "changed")]
        additions = [CommitOperationAdd(name, files[name]) for name in touched]
        removed = [name for name, change in publication.changes.items() if change == "removed"]
        try:
            done = api.create_commit(
                **repo,
                operations=[*additions, *(CommitOperationDelete(name, is_folder=False) for name in removed)],
                commit_message=f"{Path(publication.repo_id).name}, {tag}",
                revision=publication.branch,
                parent_commit=publication.seen,
            )
        except HfHubHTTPError as error:
            if error.response.status_code in (409, 412):
                raise _second_writer(publication, publication.seen) from error
            raise
        publication.seen = done.oid

    if changed:
        _patiently(commit)
    publication.commit = publication.seen
    if publication.branch == "main" and tag not in publication.tags:
        _patiently(lambda: api.create_tag(**repo, tag=tag, revision=publication.commit, exist_ok=True))
    state = "unchanged" if not changed else "created" if planned is None else "updated"
    print(f"{publication}: {state}, {publication.commit[:12]}")


def _second_writer(publication: Publication, seen: str) -> UserError:
    return UserError(f"someone else has changed {publication} since {seen[:12]}, and nothing of it was overwritten")


def _collect(api: HfApi, publications: list[Publication], private: bool) -> str:
    """The collection of the family, in the paper's order; what others put into it stays, at its end."""
    namespace = publications[0].repo_id.split("/")[0]
    known = [found for found in api.list_collections(owner=namespace) if found.title == COLLECTION]
    if known:
        # a list shows some items only
        collection = api.get_collection(known[0].slug)
    else:
        collection = api.create_collection(COLLECTION, namespace=namespace, private=private, exists_ok=True)
    wanted = [(item.repo_id, item.kind) for item in publications if item.branch == "main"] + [(PAPER, "paper")]
    present = {(item.item_id, item.item_type) for item in collection.items}
    for item_id, kind in wanted:
        if (item_id, kind) not in present:
            api.add_collection_item(collection.slug, item_id, kind, exists_ok=True)
    for position, key in enumerate(wanted):
        items = api.get_collection(collection.slug).items
        item = next(item for item in items if (item.item_id, item.item_type) == key)
        if items.index(item) != position:
            api.update_collection_item(collection.slug, item.item_object_id, position=position)
    return collection.url


def verify(api: HfApi, publications: list[Publication]):
    """
    Loads everything by id and commit in a clean process with an empty cache, and prints what was found.

    Raises:
        UserError: if something does not load, or a model's logits are not those of the trained one.
    """
    asked = [
        {"repo_id": item.repo_id, "revision": item.commit, "kind": item.kind, "probe": PROBE.as_posix()}
        for item in publications
    ]
    with tempfile.TemporaryDirectory(prefix="lnfree-") as outside:
        questions, answers = Path(outside) / "asked.json", Path(outside) / "found.json"
        questions.write_text(json.dumps(asked), encoding="utf-8")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        # the token by the client's own two ways: the variable, or the file that a login wrote
        inherited |= {key: os.environ[key] for key in ("HF_TOKEN", "HF_HUB_DISABLE_XET") if key in os.environ}
        own = {"HF_HOME": outside, "HF_TOKEN_PATH": constants.HF_TOKEN_PATH, "HF_ENDPOINT": api.endpoint}
        run = subprocess.run(
            [sys.executable, "-I", HUB_CHECK, questions, answers],
            cwd=outside,
            env={**inherited, **own, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise UserError(f"published, but not as it should be: {_without_token(last_words(run))}")
        found = json.loads(answers.read_text(encoding="utf-8"))
    rows = []
    for publication, result in zip(publications, found, strict=True):
        if publication.kind == "model":
            # another processor sums in another order
            if not result["difference"] <= 1e-5 * result["scale"]:
                raise UserError(f"published, but {publication} has logits that differ by {result['difference']:.3g}")
            checked = f"logits differ by {result['difference']:.1g}; every Auto class; generates"
        elif publication.kind == "space":
            checked = f"evaluate.load; {result['mean_entropy']:.3f} nats on a text"
        else:
            checked = f"load_dataset: {result['rows']} rows"
        rows.append((str(publication), publication.commit[:12], checked))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print("loaded back by id in a clean process with an empty cache:")
    for name, commit, checked in rows:
        print(f"  {name:{widths[0]}}  {commit:{widths[1]}}  {checked}")


def _patiently(request: Callable[[], _Result]) -> _Result:
    """
    Repeats a request that a busy server or a broken connection turned down. The client repeats uploads and reads by
    itself, but not commits, tags, branches, collections and the creation of repositories.
    """
    for wait in WAITS:
        try:
            return request()
        except (OSError, httpx2.TransportError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            pause = _pause(cause, wait)
            if pause is None:
                raise
            print(f"{_message(cause)}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)
    return request()


def _pause(error: BaseException | None, wait: float) -> float | None:
    """Seconds until it is worth trying again; None if it is not."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError):
        return wait
    if not isinstance(error, HfHubHTTPError):
        return None
    status, asked = error.response.status_code, error.response.headers.get("Retry-After", "")
    if status == 429 or status == 408 or status >= 500:
        wait = int(asked) if asked.isdigit() else wait
        return wait if wait <= LONGEST_WAIT else None
    return None


def _message(error: BaseException) -> str:
    """One line for a person, without the token."""
    # how the client wraps what went wrong in an upload
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError | httpx2.TransportError):
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "no token of the Hub; log in by 'hf auth login', or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError):
        response, said = error.response, error.server_message or ""
        asked = f"{response.request.method} {response.request.url.path}"
        text = f"the Hub answered {response.status_code} to {asked} {said}"
        if response.status_code == 401:
            text = "the Hub does not know the token; log in by 'hf auth login', or set HF_TOKEN"
        if response.status_code == 429 and (wait := response.headers.get("Retry-After")):
            text += f", and asks to wait {wait} s"
    elif isinstance(error, httpx2.TransportError):
        text = f"the Hub at {constants.ENDPOINT} cannot be reached: {error}"
    else:
        text = str(error)
    return " ".join(_without_token(text).split())


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text
