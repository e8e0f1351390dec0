"""Publishing to a Hub on loopback, by the real client over real HTTP, with its faults; and loading back from there."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file

from model_cards.card import build_card
from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import PRESETS
from training import cli, data, runs
from training.errors import UserError
from training.hub import client, export, publish
from training.hub.publication import Publication
from training.hub.verify import verify
from training.recipe import DataArguments, build_recipe
from training.train import loop, stability

from ..conftest import ROOT, caching_in
from ..hub_server import OTHER_TOKEN, TOKEN
from ..modeling.designs import preset_name
from .conftest import MODELS, environment, holds, release
from .test_problems import write_nan


WRITES = r"^/(api/(repos|collections|.*/(commit|tag|branch)/)|lfs)"


# ---- what arrives


def test_family_arrives_whole(server, family):
    published = release(family)
    assert [str(p) for p in published] == [
        f"me/{MODELS[0]}",
        f"me/{MODELS[1]}",
        f"me/{MODELS[1]}@step-4",
        "me/lnfree-results (dataset)",
        "me/attention_entropy (space)",
    ]
    for publication in published:
        assert holds(server, publication)
        repository = server.repository(publication.repo_id, f"{publication.kind}s")
        # one commit, atop the one with which the Hub creates a repository
        assert [commit.oid for commit in repository.commits if commit.parent is None] == [repository.commits[0].oid]
        assert len(repository.commits) == 1 + sum(p.repo_id == publication.repo_id for p in published)
        assert repository.tags == {"v0.2.0": repository.branches["main"]}
        assert not repository.private
    (collection,) = server.collections.values()
    assert [(item["id"], item["type"]) for item in collection["items"]] == [
        *((f"me/{name}", "model") for name in MODELS),
        ("me/lnfree-results", "dataset"),
        ("me/attention_entropy", "space"),
        ("2410.09637", "paper"),
    ]
    finished, step = (load_file(p.folder / "model.safetensors") for p in published[1:3])
    assert not finished["model.embed_tokens.weight"].equal(step["model.embed_tokens.weight"])


def test_second_release_writes_nothing_and_a_change_is_one_commit(server, family):
    release(family)
    writes = sum(server.count(method, WRITES) for method in ("POST", "PUT", "PATCH"))
    release(family)
    assert sum(server.count(method, WRITES) for method in ("POST", "PUT", "PATCH")) == writes
    assert server.count("POST", "/commit/") == 5
    path = family[1].folder / "README.md"
    path.write_text(path.read_text() + "\nOne more line.\n")
    published = release(family)
    assert server.count("POST", "/commit/") == 6 and holds(server, family[1])
    for publication in published:
        repository = server.repository(publication.repo_id, f"{publication.kind}s")
        assert repository.tags["v0.2.0.post1"] == repository.branches["main"]
        assert (repository.tags["v0.2.0"] == repository.branches["main"]) == (publication.repo_id != family[1].repo_id)


def test_what_a_release_does_not_have_goes_if_it_would_be_loaded_and_else_stays(server, family):
    release(family[:1])
    repository = server.repository(family[0].repo_id)
    theirs = {"old.py": b"x = 1\n", "model-00001-of-00002.safetensors": b"", "NOTES.md": b"of a person\n"}
    repository.commit("main", "by hand", {**repository.files, **theirs})
    release(family[:1])
    assert "NOTES.md" in repository.files
    assert not {"old.py", "model-00001-of-00002.safetensors"} & repository.files.keys()


def test_dry_run_lists_every_file_and_touches_nothing(server, family, capsys, monkeypatch):
    release(family[:1])
    (family[0].folder / "README.md").write_text((family[0].folder / "README.md").read_text() + "\n")
    requests = len(server.requests)
    capsys.readouterr()
    monkeypatch.delenv("HF_TOKEN")
    release(family, dry_run=True)
    assert {method for method, _, _ in server.requests[requests:]} == {"GET"}
    assert len(server.repositories) == 1
    printed = capsys.readouterr().out
    for publication in family:
        for path in publication.folder.rglob("*"):
            if path.is_file():
                assert re.search(
                    rf"^  [+~=] {re.escape(path.relative_to(publication.folder).as_posix())} ", printed, re.M
                )
    assert f"me/{MODELS[0]}: changes" in printed and f"me/{MODELS[1]}: new, public, " in printed
    assert f"me/{MODELS[1]}@step-4: new, " in printed and "dry run, nothing was pushed; " in printed
    assert re.search(r"^  ~ README.md +[\d.]+ kB$", printed, re.M) and "release: v0.2.0.post1" in printed


def test_private_repositories_are_private(server, small):
    release(small, private=True)
    assert all(repository.private for repository in server.repositories.values())
    assert all(collection["private"] for collection in server.collections.values())
    with pytest.raises(Exception, match="404|Repository Not Found"):
        HfApi(token=OTHER_TOKEN).dataset_info("me/lnfree-results")


def test_collection_is_put_in_order_and_what_others_put_in_stays(server, small):
    release(small)
    (collection,) = server.collections.values()
    theirs = {**collection["items"][0], "id": "someone/else", "_id": "0" * 24}
    collection["items"] = [theirs, *collection["items"][::-1]]
    release(small)
    (collection,) = server.collections.values()
    ordered = ["me/lnfree-results", "me/attention_entropy", "2410.09637", "someone/else"]
    assert [item["id"] for item in collection["items"]] == ordered


def test_public_repository_is_not_taken_for_a_private_one(server, small):
    release(small)
    with pytest.raises(UserError, match="is public; make it private on the Hub, or publish without --private"):
        release(small, private=True)


# ---- faults


FAULTS = {
    "a busy server at the commit": ("POST", "/commit/", {"status": 503}),
    "a rate limit at the commit": ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
    "a commit whose answer is lost": ("POST", "/commit/", {"lose_answer": True}),
    "a commit cut in the middle": ("POST", "/commit/", {"cut": True}),
    "an upload cut in the middle": ("PUT", "^/lfs/", {"cut": True}),
    "a busy server at the upload": ("PUT", "^/lfs/", {"status": 500}),
    "a creation whose answer is lost": ("POST", "/repos/create", {"lose_answer": True}),
    "a busy server at the tag": ("POST", "/tag/", {"status": 502}),
    "a lost tag": ("POST", "/tag/", {"lose_answer": True}),
    "a busy server at the look-up": ("GET", "/refs", {"status": 503}),
    "a collection cut": ("POST", "/collections", {"cut": True}),
    "a lost item of the collection": ("POST", "/items", {"lose_answer": True}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_outlived_and_leaves_one_commit(server, small, fault, monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.05, 0.05))
    method, path, what = FAULTS[fault]
    server.fail(method, path, **what)
    release(small)
    assert server.faults[0].times == 0
    for publication in small:
        assert holds(server, publication)
        repository = server.repository(publication.repo_id, f"{publication.kind}s")
        assert len(repository.commits) == 2 and repository.tags == {"v0.2.0": repository.branches["main"]}
    (collection,) = server.collections.values()
    assert len(collection["items"]) == 3


def test_rate_limit_is_waited_for_as_long_as_the_server_asks(server, small, capsys):
    server.fail("POST", "/commit/", status=429, headers={"Retry-After": "2"})
    release(small)
    said = "the Hub answered 429 to POST /api/datasets/me/lnfree-results/commit/main"
    assert f"{said} a fault on request, and asks to wait 2 s; trying again in 2 s" in capsys.readouterr().err
    # too long to wait for: told, with what the server asks
    server.fail("POST", "/collections", status=429, headers={"Retry-After": "86400"})
    server.collections.clear()
    with pytest.raises(Exception, match="429"):
        release(small)


def test_interrupted_release_goes_on_where_it_stopped(server, family, monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.05,))
    server.fail("POST", f"{MODELS[1]}/commit/", times=99, status=503)
    with pytest.raises(UserError) as caught:
        release(family)
    assert str(caught.value) == (
        f"the Hub answered 503 to POST /api/models/me/{MODELS[1]}/commit/main a fault on request; 1 of 5 are "
        f"published, not yet me/{MODELS[1]}, me/{MODELS[1]}@step-4, me/lnfree-results (dataset), "
        "me/attention_entropy (space); the same command goes on"
    )
    # nothing half-published is the repository's main
    assert server.repository(f"me/{MODELS[1]}").files.keys() == {".gitattributes"}
    server.faults.clear()
    for publication in release(family):
        assert holds(server, publication)
        assert server.repository(publication.repo_id, f"{publication.kind}s").tags.keys() == {"v0.2.0"}
    assert len(server.repository(f"me/{MODELS[0]}").commits) == 2


def test_second_writer_is_noticed_and_not_overwritten(server, small):
    release(small)
    repository = server.repository("me/lnfree-results", "datasets")
    path = small[0].folder / "README.md"
    path.write_text(path.read_text() + "\nOurs.\n")

    def write():
        repository.commit("main", "theirs", {**repository.files, "README.md": b"theirs\n"})

    # at the very moment of the commit, and between the comparison and the commit
    for moment in ("/commit/main", "/preupload/main"):
        server.fail("POST", f"lnfree-results{moment}", before=write)
        with pytest.raises(UserError, match="someone else has changed me/lnfree-results .dataset. since"):
            release(small)
        assert repository.files["README.md"] == b"theirs\n" and repository.commits[-1].title == "theirs"
    release(small)
    assert holds(server, small[0])


def test_hub_that_cannot_be_reached_is_one_line(server, runs_dir, monkeypatch, capsys):
    monkeypatch.setattr(client, "WAITS", (0.05,))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["publish", str(runs_dir), "--namespace", "me"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lnfree publish: error: the Hub at http://127.0.0.1:9 cannot be reached: ")


def test_clean_process_that_fails_says_why_without_the_token(server, small):
    published = release(small[:1])
    said = {"X-Error-Message": f"{TOKEN} may not read this"}
    server.fail("GET", "^/api/datasets/", times=99, status=403, headers=said)
    with pytest.raises(UserError) as caught:
        verify(HfApi(), published)
    assert str(caught.value).startswith("published, but not as it should be: me/lnfree-results at ")
    assert "*** may not read this" in str(caught.value) and TOKEN not in str(caught.value)


# ---- refusals


@pytest.mark.parametrize(
    ("token", "namespace", "message"),
    [
        (None, "me", "no token of the Hub; log in by 'hf auth login', or set HF_TOKEN"),
        (TOKEN, "a b/c", "namespace must be the name of a user or organization of the Hub, got 'a b/c'"),
        (TOKEN, "google", "namespace=google is not yours; the token's are me, lab"),
        ("hf_nobody_has_this", "me", "the Hub does not know the token; log in by 'hf auth login', or set HF_TOKEN"),
        ("hf_\u00e9", "me", "the token of the Hub has characters that no token has"),
    ],
)
def test_who_may_not_publish_is_told_before_any_work(server, runs_dir, token, namespace, message, monkeypatch, capsys):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(["publish", str(runs_dir), "--namespace", namespace]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err and (token is None or token not in captured.err)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing is not a folder"),
        (".", "no finished run in .*: none of its subfolders has a model and a"),
        ("run", "no finished run in .*/run: it is a run itself; the folder of runs is "),
    ],
)
def test_folder_without_runs_is_told_before_a_token_is_asked_for(
    server, runs_dir, tmp_path, name, message, monkeypatch, capsys
):
    monkeypatch.delenv("HF_TOKEN")
    if name == "run":
        shutil.copytree(runs_dir / "SM+R-5", tmp_path / "run")
    assert cli.main(["publish", str(tmp_path / name), "--namespace", "me"]) == 1
    assert re.fullmatch(f"lnfree publish: error: .*{message}.*\n", capsys.readouterr().err)
    assert server.requests == []


def test_broken_run_is_refused_before_anything_is_published(server, runs_dir, tmp_path, capsys):
    shutil.copytree(runs_dir / "SM+R-5", tmp_path / "runs" / "SM+R-5")
    write_nan(tmp_path / "runs" / "SM+R-5" / "model")
    assert cli.main(["publish", str(tmp_path / "runs"), "--namespace", "me"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lnfree publish: error: nothing was published: ")
    assert "its weight model.layers.0.mlp.up_proj.weight has NaN or infinite entries" in error
    assert {method for method, _, _ in server.requests} == {"GET"}


def test_problem_of_the_last_repository_is_seen(runs_dir, tmp_path, monkeypatch):
    shutil.copytree(runs_dir / "SM+R-5", tmp_path / "runs" / "SM+R-5")
    write_nan(tmp_path / "runs" / "SM+R-5" / "model")
    shutil.copytree(publish.METRIC, tmp_path / "metric")
    (tmp_path / "metric" / "cache.pkl").touch()
    monkeypatch.setattr(publish, "METRIC", tmp_path / "metric")
    with pytest.raises(UserError, match="NaN or infinite entries; me/metric .space.: cache.pkl is a pickle"):
        publish.build(runs.find_runs(tmp_path / "runs")[0], "me", tmp_path / "aside")


def test_run_that_is_not_finished_is_told_and_left_out(runs_dir, tmp_path, capsys):
    shutil.copytree(runs_dir / "SM+R-5", tmp_path / "SM+R-5")
    # an export among the runs is none of them, and nothing to tell of
    for name, lacking in (("interrupted", ("model", "results.json")), ("export", ("model",))):
        shutil.copytree(runs_dir / "SM+R-5", tmp_path / name, ignore=shutil.ignore_patterns(*lacking))
    values = yaml.safe_load((runs_dir / "SM+R-5" / "recipe.yaml").read_text())
    values |= {"output_dir": str(tmp_path / "diverged"), "learning_rate": 1e30}
    with pytest.raises(stability.UnstableRunError):
        loop.train(build_recipe(values))
    capsys.readouterr()
    assert [run.name for run in publish.find_finished(tmp_path)] == ["SM+R-5"]
    unstable, unfinished = capsys.readouterr().out.splitlines()
    assert unstable.startswith("left out: diverged is unstable at step 2, layer 0: the gradient norm is nan; ")
    assert unfinished == "left out: interrupted is not finished"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model/tokenizer.json", b"{"),
        ("model/tokenizer.json", b"{}"),
        ("model/tokenizer.json", None),
        ("model/config.json", b"{"),
        ("model/model.safetensors", b"junk"),
        ("model/model.safetensors", None),
        ("results.json", b"{"),
        ("log_history.json", b"\xff"),
        ("attention_entropy.jsonl", None),
        ("gradient_norm.jsonl", b"\xff"),
    ],
)
def test_damaged_file_of_a_run_is_one_line_that_names_it(server, runs_dir, tmp_path, name, damage, capsys):
    path = shutil.copytree(runs_dir / "SM+R-5", tmp_path / "runs" / "SM+R-5") / name
    path.unlink() if damage is None else path.write_bytes(damage)
    publishing = ["publish", str(tmp_path / "runs"), "--namespace", "me"]
    for command in (["export", str(tmp_path / "runs" / "SM+R-5"), str(tmp_path / "out")], publishing):
        assert cli.main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"lnfree {command[0]}: error: ") and "SM+R-5" in error and path.name in error, error


def test_one_seed_of_a_variant_is_published_and_all_are_in_the_results(runs_dir, built, capsys):
    found, _ = runs.find_runs(runs_dir)
    assert [run.name for run in publish.choose(found, None)] == ["SM+LN+G-5", "SM+R-5"]
    assert f"{MODELS[1]}: the run of seed 5 is published; also in the results: 7" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed=7 is not among the finished runs of lnfree-gpt2-sm-ln-g-t16 .seed 5"):
        publish.choose(found, 7)
    rows = load_dataset("parquet", data_files=str(built[3].folder / "data" / "*.parquet"), split="train").to_pandas()
    for run in found:
        mine = rows[(rows.variant == run.variant) & (rows.seed == run.seed)].sort_values(["layer", "head"])
        assert mine.entropy.to_numpy().reshape(2, 2).tolist() == run.attention_entropy["entropy"]
        assert set(mine.model) == {run.model_name} and set(mine.perplexity) == {run.perplexity}


@pytest.mark.slow
def test_revision_of_the_evaluation_data_is_its_commit(server, tmp_path):
    code = (
        "from datasets import Dataset\nfrom training.data import find_revision\n"
        "from training.recipe import DataArguments\n"
        "Dataset.from_dict({'content': ['a text', 'another']}).push_to_hub('me/code')\n"
        "for name in ('dataset', 'eval_dataset'):\n    print(find_revision(DataArguments(**{name: 'me/code'})))\n"
    )
    run = run_outside([sys.executable, "-c", code], tmp_path, server, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == 2 * [server.repository("me/code", "datasets").branches["main"]]
    assert data.find_revision(DataArguments()) == f"python-{platform.python_version()}"


def test_runs_of_two_settings_do_not_share_a_name(runs_dir, tmp_path):
    shutil.copytree(runs_dir, tmp_path / "runs")
    path = tmp_path / "runs" / "SM+R-7" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "train_tokens": 1}))
    with pytest.raises(UserError, match="SM.R-. and SM.R-. would both be lnfree-gpt2-sm-r-t16; publish runs of one"):
        publish.choose(runs.find_runs(tmp_path / "runs")[0], None)


# ---- the card


def test_card_tells_what_was_measured(built, runs_dir):
    card = ModelCard.load(built[1].folder / "README.md")
    results = {name: runs.read_results(runs_dir / name) for name in ("SM+LN+G-5", "SM+R-5")}
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["perplexity"] == results["SM+R-5"]["perplexity"]
    entropy = torch.tensor(results["SM+R-5"]["attention_entropy"]["entropy"], dtype=torch.float64).mean().item()
    assert measured["attention_entropy"] == pytest.approx(entropy)
    assert "SM softmax attention, LN LayerNorm, G GELU, R ReLU" in card.text.replace("\n", " ")
    change = 100 * (results["SM+R-5"]["perplexity"] / results["SM+LN+G-5"]["perplexity"] - 1)
    assert f"| **SM+R** (this one) | {results['SM+R-5']['perplexity']:.3f} | {change:+.2f}&nbsp;% |" in card.text
    assert (
        f"[SM+LN+G](https://huggingface.co/me/{MODELS[0]}) | {results['SM+LN+G-5']['perplexity']:.3f} | 0 |"
        in card.text
    )
    # of other data than Python source nothing is said that holds for that alone
    config = LNFreeConfig.from_pretrained(built[1].folder)
    of_code = build_card(MODELS[1], config, {**results["SM+R-5"], "dataset": "stdlib"}, built[1].folder, "")
    assert (card.data.language, of_code.data.language) == (None, "code")
    assert "512 tokens: what it generates cannot be relied on" in card.text.replace("\n", " ")
    assert "512 tokens of Python source: what it generates looks like code" in of_code.text.replace("\n", " ")
    for picture in re.findall(r'<img src="([^"]+)"', card.text):
        assert (built[1].folder / picture).read_bytes().startswith(b"\x89PNG")
    # None where this is no clone
    assert (results["SM+R-5"]["commit"] or "").removesuffix("-dirty") in card.text
    step = ModelCard.load(built[2].folder / "README.md")
    assert "after training step 4 of 8" in step.text and "after training step" not in card.text


def test_same_run_is_the_same_bytes_again(built, runs_dir, tmp_path):
    siblings = publish.choose(runs.find_runs(runs_dir)[0], None)
    again = export.export(runs_dir / "SM+R-5", tmp_path / MODELS[1], namespace="me", siblings=siblings)
    files = Publication(built[1].repo_id, "model", again).files
    assert files.keys() == built[1].files.keys()
    for name, path in files.items():
        assert path.read_bytes() == (built[1].folder / name).read_bytes(), name


# ---- the whole way


def run_outside(command: list[str], folder: Path, server, **more) -> subprocess.CompletedProcess:
    """In a clean process with an empty cache of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    own = {"HF_HOME": str(folder / "home"), **environment(server), **more}
    return subprocess.run(command, cwd=folder, env={**inherited, **own}, capture_output=True, text=True)


@pytest.mark.slow
def test_command_twice_with_faults_leaves_neither_token_nor_path_behind(server, runs_dir, tmp_path):
    for method, path, what in FAULTS.values():
        server.fail(method, path, **what)
    command = [sys.executable, "-m", "training.cli", "publish", str(runs_dir), "--namespace", "lab", "--checkpoints"]
    first = run_outside(command, tmp_path, server, PYTHONPATH=str(ROOT))
    assert first.returncode == 0, first.stderr
    assert all(fault.times == 0 for fault in server.faults)
    commits = {key: len(repository.commits) for key, repository in server.repositories.items()}
    second = run_outside(command, tmp_path, server, PYTHONPATH=str(ROOT))
    assert second.returncode == 0, second.stderr
    assert {key: len(repository.commits) for key, repository in server.repositories.items()} == commits
    assert second.stdout.count(": unchanged, ") == 2 * len(commits) + 2
    everything = [first.stdout, first.stderr, second.stdout, second.stderr, json.dumps(server.collections)]
    # torchao tells of libraries in its own folder that it does not need
    everything = [re.sub(r"(?m)^Failed to load .*torchao.*$", "", text) for text in everything]
    for repository in server.repositories.values():
        for commit in repository.commits:
            everything += [commit.title, *commit.files, *(blob.decode("latin-1") for blob in commit.files.values())]
    for text in everything:
        for secret in (TOKEN, str(runs_dir), str(tmp_path), str(Path.home()) + "/", str(ROOT)):
            assert secret not in text


@pytest.mark.slow
def test_code_of_a_published_card_runs_as_it_stands_there(server, family, tmp_path):
    release(family)
    text = server.repository(f"me/{MODELS[1]}").files["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    # as long a prompt and a continuation as the tiny model has positions for
    code = "\n".join(blocks).replace("max_new_tokens=40", "max_new_tokens=4")
    (tmp_path / "mine.txt").write_text("def f(x):\n    return x\n" * 50)
    run = run_outside([sys.executable, "-I", "-c", code], tmp_path, server)
    assert run.returncode == 0, run.stderr
    # what was fine-tuned loads like what it came from, and its own card names its base
    check = (
        "from transformers import pipeline\n"
        f"print(pipeline('text-generation', 'me/{MODELS[1]}-finetuned', trust_remote_code=True)"
        "('def f', max_new_tokens=4)[0]['generated_text'])"
    )
    (tmp_path / "elsewhere").mkdir()
    run = run_outside([sys.executable, "-I", "-c", check], tmp_path / "elsewhere", server)
    assert run.returncode == 0 and run.stdout.startswith("def f"), run.stderr
    tuned = server.repository(f"me/{MODELS[1]}-finetuned").files
    card = yaml.safe_load(tuned["README.md"].decode().split("---\n")[1])
    assert card["base_model"] == f"me/{MODELS[1]}"


STRANGER = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

input_ids, logits = torch.arange(32).view(2, 16), {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    logits[name] = model(input_ids).logits.detach()
save_file(logits, sys.argv[1])
"""


@pytest.mark.slow  # processes that load each export, and what was published
def test_every_design_is_trained_published_and_loaded_back(server, recipe_values, cache, tmp_path):
    designs = [*map(preset_name, PRESETS), "SM+RMS+R@SAS", "SM+RMS+R@SAS-P", "SM+DyT+G", "SM+Derf+G", "SM+RMS+S"]
    names = {
        variant: f"me/lnfree-gpt2-{variant.lower().replace('+', '-').replace('@', '-')}-t16" for variant in designs
    }
    expected = {}
    with caching_in(cache):
        for variant, name in names.items():
            run_dir = tmp_path / "runs" / variant
            loop.train(
                build_recipe({**recipe_values, "variant": variant, "max_steps": 100, "output_dir": str(run_dir)})
            )
            log = json.loads((run_dir / "log_history.json").read_text())
            losses = [entry["loss"] for entry in log if "loss" in entry]
            assert np.isfinite(losses).all() and len(losses) == 50
            assert losses[-1] < losses[0], variant
            model = LNFreeForCausalLM.from_pretrained(run_dir / "model").eval()
            assert model.config.variant == variant
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            with torch.no_grad():
                expected[name] = model(torch.arange(32).view(2, 16)).logits
    assert cli.main(["publish", str(tmp_path / "runs"), "--namespace", "me"]) == 0
    for variant, name in names.items():
        assert f"**{variant}**" in server.repository(name).files["README.md"].decode()
    (tmp_path / "stranger.py").write_text(STRANGER)
    found = tmp_path / "logits.safetensors"
    clean = {**environment(server), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", tmp_path / "stranger.py", found, *names.values()]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    run = subprocess.run(command, cwd=tmp_path, env={**inherited, **clean}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    logits = load_file(found)
    for name, tensor in expected.items():
        torch.testing.assert_close(logits[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
