"""What forbids to publish a folder."""

import io
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.hub.export import export
from training.hub.problems import find_private_strings, find_problems
from training.hub.publication import Publication

from ..hub_server import TOKEN
from .conftest import MODELS


def write_nan(folder, value=torch.nan):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(name, change):
    def tamper(folder):
        (folder / name).write_text(change((folder / name).read_text()))

    return tamper


def disguise(folder):
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    (folder / "weights.dat").write_bytes(buffer.getvalue())


def grow(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(50 * 10**9 + 1)  # sparse: takes no room


def crowd(folder):
    (folder / "data").mkdir()
    for index in range(10_001):
        (folder / "data" / str(index)).touch()


REFUSED = {
    "NaN weights": (write_nan, "model.safetensors: model.layers.0.mlp.up_proj.weight has NaN or infinite entries"),
    "infinite weights": (
        lambda folder: write_nan(folder, -torch.inf),
        "model.safetensors: model.layers.0.mlp.up_proj.weight has NaN or infinite entries",
    ),
    "too many entries": (crowd, "data has more than 10,000 entries"),
    "the token in a file that is no text": (
        lambda folder: (folder / "curves.png").write_bytes(b"\x89PNG" + TOKEN.encode()),
        "curves.png holds the token",
    ),
    "a path below the home folder": (
        edit("README.md", lambda text: f"{text}\nSee ~/thesis for more.\n"),
        "README.md holds '~/thesis'",
    ),
    "a path in a file of lines": (
        edit("speed.jsonl", lambda text: text + '{"step": 9, "path": "/tmp/x"}\n'),
        "speed.jsonl holds '/tmp/x'",
    ),
    "a pickle": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is a pickle"),
    "a plain pickle": (lambda f: (f / "weights").write_bytes(pickle.dumps([1])), "weights is a pickle"),
    "a pickle under another name": (disguise, "weights.dat is a pickle"),
    "a link out of the folder": (
        lambda folder: (folder / "data.json").symlink_to("/etc/hostname"),
        "data.json is a link out of the folder",
    ),
    "a file over the limit": (grow, "model.safetensors has 50 GB, the Hub takes 50 GB"),
    "weights that are none": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"junk"),
        "model.safetensors: is not safetensors",
    ),
    "the token": (edit("recipe.yaml", lambda text: f"{text}hub_token: {TOKEN}\n"), "recipe.yaml holds the token"),
    "a local path": (
        edit("config.json", lambda text: text.replace("{", '{"_name_or_path": "/home/somebody/runs/x",', 1)),
        "config.json holds '/home/somebody'",
    ),
    "a path of Windows": (
        edit("results.json", lambda text: text.replace("{", r'{"dataset": "C:\\Users\\somebody\\x",', 1)),
        r"results.json holds 'C:\\\\Users'",
    ),
    "the user's name": (
        edit("README.md", lambda text: f"{text}\nTrained by j.doe-smith on a laptop.\n"),
        "README.md holds 'j.doe-smith'",
    ),
    "a card without results": (
        edit("README.md", lambda text: re.sub(r"model-index:\n.*?(?=---\n)", "", text, flags=re.S)),
        "its card has no result for perplexity",
    ),
    "a card that cannot be read": (
        lambda folder: (folder / "README.md").unlink(),
        "its card cannot be read",
    ),
    "a card whose entropy is infinite": (
        edit("README.md", lambda text: re.sub(r"(?s)(value: [\d.]+.*?value: )[\d.]+", r"\1.inf", text, count=1)),
        "its card has no result for attention_entropy",
    ),
    "a card with a result that is NaN": (
        edit("README.md", lambda text: re.sub(r"value: [\d.]+", "value: .nan", text, count=1)),
        "its card has no result for perplexity",
    ),
}


@pytest.fixture(scope="module")
def whole(runs_dir, tmp_path_factory):
    return export(runs_dir / "SM+R-5", tmp_path_factory.mktemp("exports") / MODELS[1], namespace="me")


@pytest.fixture
def exported(whole, tmp_path, monkeypatch):
    """A model that may be published, in a folder of the test's own."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return Publication(f"me/{MODELS[1]}", "model", shutil.copytree(whole, tmp_path / MODELS[1]))


@pytest.mark.parametrize("what", REFUSED)
def test_folder_is_refused(what, exported):
    tamper, message = REFUSED[what]
    assert find_problems(exported, ["j.doe-smith"]) == []
    tamper(exported.folder)
    problems = find_problems(exported, ["j.doe-smith"])
    assert any(message in problem and f"me/{MODELS[1]}" in problem for problem in problems), problems


def test_pickles_are_known_by_their_endings(tmp_path):
    names = {f"empty{suffix}" for suffix in (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")}
    for name in names | {"empty.txt", "empty.parquet"}:
        (tmp_path / name).touch()
    problems = find_problems(Publication("me/x", "dataset", tmp_path))
    assert {problem.partition(": ")[2] for problem in problems} == {
        f"{name} is a pickle, which runs code when it is loaded" for name in names
    }


def test_ids_of_the_hub_are_no_secrets(exported):
    edit("results.json", lambda text: text.replace("{", '{"dataset": "j.doe-smith/code",', 1))(exported.folder)
    assert find_problems(exported, ["j.doe-smith"]) == []


def test_what_is_at_its_limit_is_not_refused(exported):
    folder = exported.folder
    (folder / "data").mkdir()
    for index in range(10_000):
        (folder / "data" / str(index)).touch()
    assert find_problems(exported) == []
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(50 * 10**9)
    assert not any("the Hub takes" in problem for problem in find_problems(exported))


def test_folders_of_this_machine_and_its_user_are_private(tmp_path, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "j.doe-smith")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = find_private_strings(tmp_path / "runs", "me", tmp_path / "aside")
    assert {str(tmp_path / name) for name in ("home", "runs", "aside")} | {str(tmp_path), "j.doe-smith"} <= set(found)
    # the name that it is published under is no secret, nor one that is a word of the cards
    for name, namespace in (("j.doe-smith", "j.doe-smith"), ("model", "me")):
        monkeypatch.setattr("getpass.getuser", lambda name=name: name)
        assert name not in find_private_strings(tmp_path / "runs", namespace, tmp_path / "aside")
