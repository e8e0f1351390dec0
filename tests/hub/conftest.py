"""Runs that are published, and a Hub on loopback."""

import contextlib
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants

from training import cli, runs
from training.hub import publish, push
from training.hub.publication import Publication
from training.hub.results import write_results
from training.recipe import build_recipe
from training.train import loop

from ..conftest import caching_in
from ..hub_server import TOKEN, HubServer


MODELS = ["lnfree-gpt2-sm-ln-g-t16", "lnfree-gpt2-sm-r-t16"]


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory, cache, recipe_values):
    """Finished runs of two variants, one of them with two seeds and a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("runs")
    values = {**recipe_values, "entropy_steps": 4, "save_total_limit": None, "warmup_steps": 0, "weight_decay": 0.0}
    with caching_in(cache):
        for variant, seed in (("SM+LN+G", 5), ("SM+R", 7), ("SM+R", 5)):
            run_dir = folder / f"{variant}-{seed}"
            loop.train(build_recipe({**values, "variant": variant, "seed": seed, "output_dir": str(run_dir)}))
            shutil.rmtree(run_dir / "checkpoint-8")
            if (variant, seed) != ("SM+R", 5):
                shutil.rmtree(run_dir / "checkpoint-4")
    return folder


@pytest.fixture(scope="session")
def published(runs_dir, tmp_path_factory):
    """What `lnfree publish` with all of its switches left on a Hub, in `folders`, and what it printed."""
    printed, aside = io.StringIO(), tmp_path_factory.mktemp("published")
    command = ["publish", str(runs_dir), "--namespace", "me", "--private", "--checkpoints"]
    with HubServer().running() as running, pytest.MonkeyPatch.context() as patch:
        connect(running, patch, aside)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = cli.main(command)
        assert status == 0, printed.getvalue()
    folders = []
    for name, kind, branch in (
        *((MODELS[0], "model", "main"), (MODELS[1], "model", "main"), (MODELS[1], "model", "step-4")),
        *(("lnfree-results", "dataset", "main"), ("attention_entropy", "space", "main")),
    ):
        folder = aside / branch / name
        files = running.repository(f"me/{name}", f"{kind}s").find(branch).files
        for path, content in files.items():
            if path != ".gitattributes":
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
        folders.append(Publication(f"me/{name}", kind, folder, branch))
    return SimpleNamespace(server=running, printed=printed.getvalue(), folders=folders)


@pytest.fixture(scope="session")
def built(published):
    return published.folders


@pytest.fixture
def family(built, tmp_path):
    """Everything to publish, in folders of the test's own."""
    copies = []
    for publication in built:
        folder = shutil.copytree(
            publication.folder, tmp_path / "family" / publication.branch / publication.folder.name
        )
        copies.append(Publication(publication.repo_id, publication.kind, folder, publication.branch))
    return copies


@pytest.fixture
def small(runs_dir, tmp_path):
    """The two repositories that are small and go through everything."""
    results = Publication("me/lnfree-results", "dataset", tmp_path / "family" / "results")
    write_results(runs.find_runs(runs_dir)[0], "me", results.folder)
    metric = tmp_path / "family" / publish.METRIC.name
    shutil.copytree(publish.METRIC, metric, ignore=shutil.ignore_patterns("__*"))
    return [results, Publication("me/attention_entropy", "space", metric)]


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer().running() as running:
        connect(running, monkeypatch, tmp_path)
        yield running


def connect(server, patch: pytest.MonkeyPatch, folder: Path):
    """Makes a server the Hub of this process and of those that it starts."""
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
    for name, value in environment(server).items():
        patch.setenv(name, value)


def environment(server) -> dict[str, str]:
    return {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def refresh(publications):
    """As a new process would start."""
    return [Publication(p.repo_id, p.kind, p.folder, p.branch) for p in publications]


def release(publications, **options):
    publications = refresh(publications)
    push.release(HfApi(), publications, **options)
    return publications


def holds(server, publication) -> bool:
    """Whether a repository's branch holds a folder, byte by byte."""
    repository = server.repository(publication.repo_id, f"{publication.kind}s")
    files = dict(repository.find(publication.branch).files)
    del files[".gitattributes"]
    paths = [path for path in publication.folder.rglob("*") if path.is_file()]
    return files == {path.relative_to(publication.folder).as_posix(): path.read_bytes() for path in paths}
