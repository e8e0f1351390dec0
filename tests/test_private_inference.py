"""The two-party run, in its own environment, against the models in the clear."""

import json
import subprocess

import pytest

from .conftest import ROOT, byte_tokenizer, tiny_model


SCRIPT = ROOT / "scripts" / "private_inference.sh"
VARIANTS = ["SM+LN+G", "SM+R"]


@pytest.fixture
def exports(tmp_path):
    """Two small models with a token a byte."""
    folders = []
    for number, variant in enumerate(VARIANTS):
        folders.append(tmp_path / variant)
        tiny_model(variant, vocab_size=256, num_hidden_layers=2).save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
        (folders[-1] / "results.json").write_text(json.dumps({"perplexity": 10.0 + number}))
    return folders


# Installs CrypTen into .venv/private where that has not been done, so that nothing is skipped.
@pytest.mark.slow
def test_two_parties_compute_the_clear_tokens_and_count_their_messages(exports, tmp_path):
    outputs = tmp_path / "private.json", tmp_path / "private.png"
    command = ["bash", SCRIPT, *exports, "--prompt", "def f(", "--new-tokens", "3"]
    run = subprocess.run([*command, "--json", outputs[0], "--plot", outputs[1]], capture_output=True, text=True)
    assert run.returncode == 0, (
        f"{SCRIPT.name} installs what it needs into .venv/private; if that failed, there by hand: "
        f"pip install --no-deps crypten==0.4.1; pip install omegaconf onnx\n{run.stderr}"
    )
    assert outputs[1].read_bytes().startswith(b"\x89PNG")
    document = json.loads(outputs[0].read_text())
    assert "party 0" in document["not_protected"] and document["not_protected"] in run.stdout
    results = {result["variant"]: result for result in document["runs"]}
    assert list(results) == VARIANTS
    for result in results.values():
        assert (
            result["private_tokens"] == result["clear_tokens"] and result["equal_argmax"] == result["positions"] == 8
        )
        assert 0 < result["largest_error"] < 0.05 * result["largest_logit"]
        total = result["prompt"]["total"]
        assert total["rounds"] == sum(cost["rounds"] for name, cost in result["prompt"].items() if name != "total")
        assert result["new_token"]["total"]["bytes"] < total["bytes"]
    baseline, ours = (results[variant]["prompt"] for variant in VARIANTS)
    # by hand: a product of shares opens both factors, each party sends its own, 8 bytes an element
    width, inner, length = 32, 128, 6
    factors = 2 * (4 * (length + width) * width + (length + inner) * width + (length + width) * inner)
    assert (ours["linear"]["rounds"], ours["linear"]["bytes"]) == (12, 2 * 8 * factors)
    for name in ("softmax", "linear", "embedding", "logits"):
        assert [ours[name][key] for key in ("rounds", "bytes")] == [baseline[name][key] for key in ("rounds", "bytes")]
    assert 5 * ours["LayerNorm"]["rounds"] == baseline["LayerNorm"]["rounds"]  # 4 in the blocks and the final one
    assert ours["activation"]["bytes"] < baseline["activation"]["bytes"]


@pytest.mark.slow
def test_what_is_predicted_is_what_the_parties_count(tmp_path):
    sizes = "hidden_size=48,num_attention_heads=3,vocab_size=131,num_hidden_layers"
    path, page = tmp_path / "private.json", tmp_path / "docs" / "page.md"
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("nothing\n")
    page.write_text("<!-- table x -->\n<!-- end -->\n\n<!-- table x-functions -->\n<!-- end -->\n")
    command = ["bash", SCRIPT, f"SM+LN+G:{sizes}=1", f"SM+LN+R:{sizes}=2", "--tokens", "23", "--new-tokens", "2"]
    docs = ["--functions", "3x16", "2x130", "--docs", tmp_path / "docs" / "data" / "x.json"]
    run = subprocess.run([*command, "--json", path, *docs], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    document = json.loads(path.read_text())
    for row in document["functions"]:
        assert row["rounds: predicted"] == row["measured"] > 0, row
        assert row["bytes: predicted"] == row["measured bytes"] > 0, row
    assert {row["rows x length"] for row in document["functions"]} == {"3 x 16", "2 x 130"}
    for result in document["runs"]:
        assert result["predicted"].keys() == {"prompt", "new_token"}
        for parts in result["predicted"].values():
            assert parts["total"]["rounds"] > 200
            for name, part in parts.items():
                assert part["rounds"] == part["measured_rounds"], name
                assert part["bytes"] == part["measured_bytes"], name
        assert result["peak_gib"][0] > 0.1
    assert "| SM+LN+R | 2 x 48, 131 | a new token |" in page.read_text()
    # times of a busy machine may not be split
    assert "s a multiply-add" in run.stdout or "These runs are too few or too alike to split computing" in run.stdout


@pytest.mark.slow
def test_wrong_arguments_are_one_line(exports, tmp_path):
    for arguments, message in (
        ([tmp_path], "is not an export: it has no config.json"),
        ([*exports, "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["gpt2"], "gpt2 is of a stock class; name a variant, as in gpt2:SM+LN+G"),
        ([*exports, "--new-tokens", "0"], "--new-tokens must be at least 1, got 0"),
        ([*exports, "--new-tokens", "99"], "99 new ones do not fit into max_position_embeddings=64"),
    ):
        run = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)
        assert run.returncode != 0 and message in run.stderr.strip().splitlines()[-1], run.stderr
