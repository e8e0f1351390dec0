"""
Folders -> repositories of the Hub. A repository changes by one commit, made only if something differs from what stands
there, and only on top of the commit that was compared; so a push may be repeated at any time, and does what is left.
"""

import functools
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from ..errors import UserError
from .client import describe_error, retry
from .publication import Kind, Publication, format_size


COLLECTION = "LNFree: GPT models without LayerNorm"
PAPER = "2410.09637"


# of these, what a release does not have would be loaded beside what it has; results of other runs stay
STALE = (".py", ".safetensors")
_MARKS = {"new": "+", "changed": "~", "removed": "-", "same": "="}


def release(api: HfApi, publications: list[Publication], *, private: bool = False, dry_run: bool = False):
    """
    Compares what was built with what stands on the Hub, prints the difference, and, unless it is a dry run, pushes it.

    Raises:
        UserError: if a repository is public that should be private, before anything is pushed; if someone else
            changes a repository meanwhile; and if the Hub does not take it, with what is done and what is left.
    """
    for publication in publications:
        retry(functools.partial(_compare, api, publication, private))
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
                f"{describe_error(error)}; {index} of {len(publications)} are published, not yet {left}; "
                "the same command goes on"
            ) from error
    print(f"collection: {retry(lambda: _collect(api, publications, private))}")


def _compare(api: HfApi, publication: Publication, private: bool):
    """Sets `seen`, `changes` and `tags` from what stands on the Hub; an attempt, to be repeated as a whole."""
    repo: dict[str, Any] = {"repo_id": publication.repo_id, "repo_type": publication.kind}
    try:
        info = api.repo_info(**repo)
    except RepositoryNotFoundError:
        publication.seen, publication.changes = None, dict.fromkeys(publication.files, "new")
        return
    if private and not info.private:
        raise UserError(f"{publication} is public; make it private on the Hub, or publish without --private")
    refs = api.list_repo_refs(**repo)
    publication.seen = {branch.name: branch.target_commit for branch in refs.branches}.get(publication.branch)
    revision = publication.seen or info.sha  # a new branch starts from main
    tree = api.list_repo_tree(**repo, revision=revision, recursive=True)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    changes = {}
    for name, path in publication.files.items():
        changes[name] = "new" if name not in remote else "same" if _is_same(path, remote[name]) else "changed"
    stale = [name for name in remote if name.endswith(STALE) and name not in changes]
    publication.changes = changes | dict.fromkeys(stale, "removed")
    publication.tags = {tag.name: tag.target_commit for tag in refs.tags}


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
    numbers = count(1)
    while any(tag in main.tags and (main.tags[tag] != main.seen or main.is_changed) for main in mains):
        tag = f"{release}.post{next(numbers)}"
    return tag


def _print_plan(publications: list[Publication], tag: str, private: bool):
    for publication in publications:
        state = "new" if publication.seen is None else "changes" if publication.is_changed else "unchanged"
        # a branch is as public as its repository
        if state == "new" and publication.branch == "main":
            state += ", private" if private else ", public"
        files = publication.files
        print(f"{publication}: {state}, {format_size(sum(path.stat().st_size for path in files.values()))}")
        for name, change in publication.changes.items():
            size = format_size(files[name].stat().st_size) if name in files else ""
            print(f"  {_MARKS[change]} {name:32} {size:>9}")
    print(f"release: {tag}")


def _push(api: HfApi, publication: Publication, private: bool, tag: str):
    """Brings one repository to its folder: created if missing, at most one commit, and the release's tag."""
    repo: dict[str, Any] = {"repo_id": publication.repo_id, "repo_type": publication.kind}
    planned, changed = publication.seen, publication.is_changed
    if planned is None:
        sdk: dict[str, Any] = {"space_sdk": "gradio"} if publication.kind == "space" else {}
        retry(lambda: api.create_repo(**repo, private=private, exist_ok=True, **sdk))
        if publication.branch != "main":
            retry(lambda: api.create_branch(**repo, branch=publication.branch, exist_ok=True))

    def commit():
        # looked at again each time: an attempt whose answer was lost may have done it
        _compare(api, publication, private)
        if not publication.is_changed:
            return
        if planned not in (None, publication.seen):
            raise _second_writer(publication, planned)
        files = publication.files
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
        retry(commit)
    publication.commit = publication.seen or ""
    if publication.branch == "main" and tag not in publication.tags:
        retry(lambda: api.create_tag(**repo, tag=tag, revision=publication.commit, exist_ok=True))
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
    wanted: list[tuple[str, Kind]]
    wanted = [*((item.repo_id, item.kind) for item in publications if item.branch == "main"), (PAPER, "paper")]
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
