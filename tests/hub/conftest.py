"""Runs that are published, and a Hub on loopback."""

import json
import shutil

import pytest
from huggingface_hub import HfApi, constants

from training import data, runs
from training.hub import publish, push
from training.hub.publication import Publication
from training.recipe import build_recipe
from training.train import loop

from ..hub_server import TOKEN, HubServer


MODELS = ["lnfree-gpt2-sm-ln-g-t16", "lnfree-gpt2-sm-r-t16"]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """Finished runs of two variants, one of them with two seeds and a checkpoint in the middle."""
    folder, cache = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")
    corpus = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    texts = [f"def f{i}(x, y):\n    return x * {i} + y - {i * i % 97}\n" * (3 + i % 5) for i in range(120)]
    corpus.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    values = {"dataset": str(corpus), "eval_fraction": 0.2, "vocab_size": 300, "block_size": 16, "hidden_size": 16}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.1, "max_steps": 8}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 2, "entropy_steps": 4}
    values |= {"entropy_sequences": 5, "save_steps": 4, "disable_tqdm": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "HF_HOME", str(cache))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
        for variant, seed in (("SM+LN+G", 5), ("SM+R", 7), ("SM+R", 5)):
            run_dir = folder / f"{variant}-{seed}"
            loop.train(build_recipe({**values, "variant": variant, "seed": seed, "output_dir": str(run_dir)}))
            shutil.rmtree(run_dir / "checkpoint-8")
            if (variant, seed) != ("SM+R", 5):
                shutil.rmtree(run_dir / "checkpoint-4")
    return folder


@pytest.fixture(scope="module")
def built(runs_dir, tmp_path_factory):
    return publish.build(runs.find_runs(runs_dir)[0], "me", tmp_path_factory.mktemp("built"), checkpoints=True)


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
def small(family):
    """The two repositories that are small and go through everything."""
    return [publication for publication in family if publication.kind != "model"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer().running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        for name, value in environment(running).items():
            monkeypatch.setenv(name, value)
        yield running


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
