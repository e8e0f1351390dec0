"""The README's Python runs as it stands there, on an exported model, and what it pushes loads elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_lnfree import LNFreeForCausalLM
from training import data
from training.recipe import DataArguments

from .conftest import ROOT, tiny_config
from .hub_server import TOKEN, HubServer


@pytest.fixture
def export_dir(tmp_path, monkeypatch):
    """A small model with a tokenizer of its own, saved as an export is."""
    monkeypatch.setattr(data, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text((ROOT / "README.md").read_text())
    arguments = DataArguments(dataset=str(corpus), text_column="text")
    tokenizer = data.load_tokenizer(arguments, data.load_documents(arguments, 0)["train"], 300)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=128, **ids)
    folder = tmp_path / "export"
    LNFreeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def readme_code(heading: str, index: int = 0) -> str:
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[index]


def run_outside(code: str, folder: Path, **environment) -> str:
    """Runs code in a clean process that does not know the project; returns what it printed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    run = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=folder,
        env={**inherited, "HF_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_load_fine_tune_and_push(export_dir, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "README.md").write_text((ROOT / "README.md").read_text())
    code = readme_code("Load, fine-tune, push").replace("runs/quick/exports/lnfree-gpt2-sm-r-t128", str(export_dir))
    # and from a model that was itself loaded as remote code
    code += "model.push_to_hub('lnfree-plain')\n"
    code += "import torch\ntorch.save(model.eval()(torch.arange(9)[None]).logits.detach(), 'logits.pt')\n"
    with HubServer().running() as server:
        environment = {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        run_outside(code, outside, HF_TOKEN=TOKEN, **environment)
        pushed = server.repository("me/lnfree-finetuned")
        titles = {commit.title: commit for commit in pushed.commits}
        during = titles["Training in progress, step 10"]
        plain = server.repository("me/lnfree-plain").find("main")
        assert plain.files["model.safetensors"] == pushed.files["model.safetensors"]
        for commit in (during, pushed.find("main"), plain):
            for name in ("configuration_lnfree.py", "modeling_lnfree.py", "parts_lnfree.py"):
                assert commit.files[name] == (ROOT / "modeling_lnfree" / name).read_bytes()
            assert {"config.json", "model.safetensors"} <= commit.files.keys()
        # another user, another process, nothing but what was pushed
        printed = run_outside(
            "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"logits = torch.load({str(outside / 'logits.pt')!r})\n"
            f"for revision in ('main', {during.oid!r}):\n"
            "    named = {'revision': revision, 'trust_remote_code': True}\n"
            "    model = AutoModelForCausalLM.from_pretrained('me/lnfree-finetuned', **named).eval()\n"
            "    tokenizer = AutoTokenizer.from_pretrained('me/lnfree-finetuned', **named)\n"
            "    print(torch.equal(model(torch.arange(9)[None]).logits, logits), len(tokenizer))",
            tmp_path,
            **environment,
        )
    expected = ["True", "300"], ["False", "300"]
    assert tuple(line.split() for line in printed.splitlines()) == expected
    before = LNFreeForCausalLM.from_pretrained(export_dir).eval()
    assert not before(torch.arange(9)[None]).logits.equal(torch.load(outside / "logits.pt"))


def test_attention_entropy_of_any_model(export_dir):
    model = LNFreeForCausalLM.from_pretrained(export_dir)
    scope = {"model": model, "batch": {"input_ids": torch.arange(9)[None]}}
    exec(readme_code("Attention entropy of any model"), scope)
    assert scope["record"].entropy.shape == (model.config.num_hidden_layers, model.config.num_attention_heads)


def test_metric_of_the_readme_on_an_export(export_dir, tmp_path):
    outside = tmp_path / "outside"
    metric = "modeling_lnfree/metrics/attention_entropy"
    shutil.copytree(ROOT / metric, outside / metric, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", outside)
    code = readme_code("Attention entropy of any model", 1)
    code = code.replace("runs/quick/exports/lnfree-gpt2-sm-r-t128", str(export_dir))
    code += "import json\nprint(json.dumps([result['entropy'], list(texts), result['num_queries']]))"
    entropy, texts, num_queries = json.loads(run_outside(code, outside).splitlines()[-1])

    model = LNFreeForCausalLM.from_pretrained(export_dir, attn_implementation="eager").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    total, count = 0, 0
    with torch.no_grad():
        for text in texts:
            input_ids = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")["input_ids"]
            maps = torch.stack(model(input_ids, output_attentions=True).attentions)  # (layers, 1, heads, T, T)
            total, count = total + torch.special.entr(maps).sum((1, 3, 4)), count + input_ids.shape[1]
    assert count == num_queries
    torch.testing.assert_close(torch.tensor(entropy).double(), total / count, atol=2e-5, rtol=0)


def test_variants_of_the_readme_exist():
    from modeling_lnfree import LNFreeConfig

    names = re.findall(r"`(SM\+[^`]+)`", (ROOT / "README.md").read_text())
    assert len(names) >= 8
    for name in names:
        assert LNFreeConfig.from_variant(name).variant == name


def test_files_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"bash (scripts/\S+)", text):
        assert os.access(ROOT / script, os.X_OK), script
