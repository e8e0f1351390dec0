"""`lnfree remove-norms` on a model that other code made, from the command to the export and its card."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_lnfree import LNFreeForCausalLM
from training import cli
from training.plots import plot_norm_removal
from training.runs import Run

from .conftest import ROOT, byte_tokenizer, random_ids


OVERRIDES = [
    *("block_size=16", "max_steps=10", "remove_norms_from=2", "remove_norms_gaps=[1,1,1,1]", "logging_steps=1"),
    *("save_steps=5", "per_device_train_batch_size=4", "gradient_accumulation_steps=1", "learning_rate=1e-4"),
    *("warmup_steps=1", "lr_scheduler_type=linear", "lr_scheduler_kwargs=null", "eval_fraction=0.2", "use_cpu=true"),
    *("disable_tqdm=true", "entropy_steps=5", "entropy_sequences=4"),
]


SCRIPT = ROOT / "scripts" / "norm_removal_study.py"


def save_stock(model, folder):
    """A stock model with a byte-level tokenizer."""
    byte_tokenizer("<|endoftext|>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256))
    return save_stock(model, tmp_path_factory.mktemp("stock") / "gpt2")


def test_from_the_command_to_the_card(stock, corpus, own_cache, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(
        "training.remove_norms.plot_norm_removal", lambda *runs: drawn.append(runs) or plot_norm_removal(*runs)
    )
    command = ["remove-norms", str(stock), str(tmp_path / "out"), "--dataset", str(corpus), *OVERRIDES]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    results, control = (
        json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in ("removed", "control")
    )
    assert (results["variant"], control["variant"]) == ("SM+G-noLNf", "SM+LN+G")
    assert [[run.name for run in pair] for pair in drawn] == [["removed", "control"]]
    losses = results["norm_removal"]
    assert losses["eval_loss_control"] == control["eval_loss"] and losses["removed"] == 7
    # the model as it came, by itself
    model = AutoModelForCausalLM.from_pretrained(stock).eval()
    assert losses["eval_loss_before"] == pytest.approx(5.55, abs=0.2)  # nearly uniform over 257 bytes
    folder = tmp_path / "out" / "model"
    assert (tmp_path / "out" / "norm_removal.png").stat().st_size > 10_000
    figure = plot_norm_removal(Run.load(tmp_path / "out" / "removed"), Run.load(tmp_path / "out" / "control"))
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert {"entropy (nats)", "weight on the first token"} <= {*labels} and labels.count("head") == 4
    # both losses, and a line for each of the seven removals
    assert len(figure.axes[0].lines) == 2 + 7
    card = (folder / "README.md").read_text()
    for name in ("eval_loss", "eval_loss_before", "eval_loss_control"):
        assert f"{losses[name]:.4f}" in card and f"{losses[name]:.4f}" in printed
    # a folder of this name is not the model of the Hub
    assert "base_model" not in card and "It was fine-tuned from gpt2." in card
    assert "7 parts from step 2 to 8 of 10" in card
    assert str(tmp_path) not in card
    ours = LNFreeForCausalLM.from_pretrained(folder).eval()
    assert not [module for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)]
    input_ids = random_ids(2, 9)
    assert not torch.allclose(ours(input_ids).logits, model(input_ids).logits, atol=1e-3)
    # finished runs are not trained again
    finished = [tmp_path / "out" / name / "model" / "model.safetensors" for name in ("removed", "control")]
    before = [path.stat().st_mtime_ns for path in finished]
    assert cli.main(command) == 0
    assert [path.stat().st_mtime_ns for path in finished] == before


def test_options_act(stock, corpus, own_cache, tmp_path):
    command = ["remove-norms", str(stock), str(tmp_path / "out"), "--dataset", str(corpus), *OVERRIDES]
    assert cli.main([*command, "--keep-final-norm", "--no-control"]) == 0
    assert not (tmp_path / "out" / "control").exists()
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["norm_type"], config["final_norm_type"]) == ("none", "layernorm")
    assert "control" not in (tmp_path / "out" / "model" / "README.md").read_text().split("## Results")[0]


def test_a_stock_llama_loses_its_norms(corpus, own_cache, tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=256, eos_token_id=256))
    folder = save_stock(model, tmp_path / "llama")
    command = ["remove-norms", str(folder), str(tmp_path / "out"), "--dataset", str(corpus), "--no-control"]
    assert cli.main([*command, *OVERRIDES]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert (ours.config.variant, ours.config.backbone) == ("SM+S-noLNf", "llama")
    assert not [name for name, _ in ours.named_parameters() if "norm" in name]
    losses = json.loads((tmp_path / "out" / "removed" / "results.json").read_text())["norm_removal"]
    assert losses["eval_loss_before"] == pytest.approx(5.55, abs=0.2) and losses["removed"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init_from=x"], "init_from cannot be overridden: the command's own arguments say it"),
        (["output_dir=x"], "output_dir cannot be overridden: the command's own arguments say it"),
        (["keep_final_norm=true"], "keep_final_norm cannot be overridden: the command's own arguments say it"),
        (["max_steps=5"], "the last of 7 norms is gone at step 8, and max_steps is 5"),
        (["remove_norms_gap=[1]"], "the nearest known one is 'remove_norms_gaps'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, stock, corpus, own_cache, tmp_path, capsys):
    command = ["remove-norms", str(stock), str(tmp_path / "out"), "--dataset", str(corpus), *OVERRIDES]
    assert cli.main([*command, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_study_reads_what_is_finished(tmp_path):
    losses = {"original": 4.5, "control": 4.2, "removed": 4.25, "SM+R": 4.0}
    for seed in (1, 3, 4):
        for name, loss in losses.items():
            folder = tmp_path / f"gpt2-seed{seed}" / name
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"eval_loss": loss + 0.01 * seed}))
            (folder / "log_history.json").write_text(
                json.dumps([{"step": 10, "loss": 5.0}, {"step": 20, "loss": 4.6}])
            )
        (tmp_path / f"gpt2-seed{seed}" / "model").mkdir()
    command = [sys.executable, "-P", SCRIPT, "--read-only", "--backbones", "gpt2"]
    read = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = {line.split(" | ")[1]: line for line in read.stdout.splitlines()[2:]}
    assert rows.keys() == {
        *("with norms", "with norms, trained on: the control", "without norms, taken out"),
        "SM+R@Stable from random weights",
    }
    assert "| 1.2 M | 1, 3, 4 | 70.81, 72.24, 72.97 | +0.050 | +0.050 to +0.050 |" in rows["without norms, taken out"]
    assert "| 0.8 M | 1, 3, 4 |" in rows["with norms"] and "| +0.300 |" in rows["with norms"]
    assert (tmp_path / "norm_removal_study.png").stat().st_size > 10_000
