"""The export of a run: what is in it, that a stranger loads it, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_lnfree import LNFreeForCausalLM
from training import cli, runs
from training.errors import UserError
from training.hub.export import export


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R", "SM+LR-layer"])
def test_export_loads_outside_the_project_with_equal_logits(variant_runs, corpus, tmp_path, variant):
    out_dir = tmp_path / "lnfree-tiny"
    assert cli.main(["export", str(variant_runs / variant), str(out_dir)]) == 0
    names = {path.relative_to(out_dir).as_posix() for path in out_dir.rglob("*") if path.is_file()}
    assert names - {"negative_slope.jsonl", "zero_activations.jsonl"} == {
        "README.md",
        "attention_entropy.jsonl",
        "batch_entropy.jsonl",
        "block.png",
        "config.json",
        "configuration_lnfree.py",
        "curves.png",
        "generation_config.json",
        "gradient_norm.jsonl",
        "heat_map.png",
        "log_history.json",
        "model.safetensors",
        "modeling_lnfree.py",
        "outliers.jsonl",
        "parts_lnfree.py",
        "probe/logits.safetensors",
        "recipe.yaml",
        "residual_stream.jsonl",
        "results.json",
        "speed.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert ("zero_activations.jsonl" in names) == (variant == "SM+R")
    assert ("negative_slope.jsonl" in names) == (variant == "SM+LR-layer")
    # every Auto class, in a process of our own making beside the one that the export made
    script = """
import sys, torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)
folder, inputs = sys.argv[1], torch.arange(20)[None]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "lnfree"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(body(inputs[:, :16]).last_hidden_state, model.model(inputs[:, :16]).last_hidden_state)
head = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
assert head(inputs[:, :16]).logits.shape == (1, 3)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("def f", max_new_tokens=5, do_sample=False)
assert text[0]["generated_text"].startswith("def f")
# by their defaults, pipelines would generate past the 16 positions, and truncation would not truncate
for prompt in ("def f", "def f(x, y):"):
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt)
    assert text[0]["generated_text"].startswith(prompt)
assert tokenizer("def f(x, y): " * 99, truncation=True, return_tensors="pt")["input_ids"].shape == (1, 16)
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
assert "modeling_lnfree" not in sys.modules and "training" not in sys.modules
save_file({"logits": again(inputs[:, :16]).logits.detach()}, sys.argv[3])
"""
    logits, again = tmp_path / "logits.safetensors", tmp_path / "again"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-I", "-c", script, str(out_dir), str(again), str(logits)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    trained = LNFreeForCausalLM.from_pretrained(variant_runs / variant / "model").eval()
    assert load_file(logits)["logits"].equal(trained(torch.arange(16)[None]).logits)
    probe = load_file(out_dir / "probe" / "logits.safetensors")
    torch.testing.assert_close(trained(probe["input_ids"]).logits.detach(), probe["logits"], atol=1e-6, rtol=1e-5)
    card = (out_dir / "README.md").read_text()
    assert "## Under encryption" in card and f"| {variant} |" in card
    assert "| s on LAN | s on WAN |" in card and f"| SEMI2K | {variant} | " in card and "WAN 80 ms, 0.2 Gbit/s" in card
    assert f"**{runs.read_results(variant_runs / variant)['perplexity']:.3f}**" in card
    for path in out_dir.iterdir():
        if path.suffix in (".json", ".md", ".yaml", ".py") and path.name != "tokenizer.json":
            assert str(variant_runs) not in path.read_text() and str(corpus.parent) not in path.read_text(), path


def test_export_is_repeated_over_itself_but_over_nothing_else(variant_runs, tmp_path):
    out_dir = export(variant_runs / "SM+G", tmp_path / "out")
    assert export(variant_runs / "SM+G", out_dir) == out_dir
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="mine exists and is not an export"):
        export(variant_runs / "SM+G", tmp_path / "mine")
    for run in ("SM+G", "SM+R"):
        with pytest.raises(UserError, match="exists and is not an export"):
            export(variant_runs / "SM+G", variant_runs / run)
        assert (variant_runs / run / "model").is_dir()
    with pytest.raises(UserError, match="is not a finished run"):
        export(tmp_path, tmp_path / "out2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_export_whose_logits_differ_gets_no_name(variant_runs, tmp_path, monkeypatch):
    # a save that loses a weight, as a model with a wrong key would
    save = LNFreeForCausalLM.save_pretrained

    def lossy(self, folder, **kwargs):
        save(self, folder, **kwargs)
        path = Path(folder) / "model.safetensors"
        state = load_file(path)
        state["model.layers.0.mlp.up_proj.weight"] += 1e-6
        save_file(state, path, metadata={"format": "pt"})

    monkeypatch.setattr(LNFreeForCausalLM, "save_pretrained", lossy)
    with pytest.raises(UserError, match="logits differ from the trained model's by up to"):
        export(variant_runs / "SM+R", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
