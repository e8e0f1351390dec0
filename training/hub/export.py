"""A finished run -> a folder as the Hub wants it, loaded back by a clean process before it counts."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from model_cards.card import build_card
from model_cards.diagram import draw_block
from modeling_lnfree import LNFreeForCausalLM

from ..encryption.counting import describe_forward
from ..errors import UserError, explained
from ..plots import plot_curves, plot_heat_maps, run_title
from ..runs import read_results


LOAD_CHECK = Path(__file__).with_name("load_check.py")
PROMPT = "def __init__(self"
# in a folder of its own: what reads every .safetensors file beside the config takes them for weights
PROBE = Path("probe", "logits.safetensors")


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    namespace: str | None = None,
    siblings: Sequence[dict[str, Any]] = (),
    checkpoint: Path | None = None,
) -> Path:
    """
    Exports a finished run: safetensors, config with `auto_map`, the model's code, tokenizer, generation config, card,
    heat map, curves over training with their figures, recipe, results, and the logits of a probe batch. A clean
    subprocess then loads it with `trust_remote_code=True`; its logits must be the trained model's, bit by bit. Only
    then does the folder get its name. The same run gives the same bytes again.

    Args:
        run_dir: folder of the run.
        out_dir: new folder, or one that an earlier export wrote. Its name is the model's.
        namespace: user or organisation of the Hub that the card speaks of.
        siblings: results of the runs that the card compares this one with, itself among them, in the paper's order.
        checkpoint: folder with other weights of the same run, and nothing else different.

    Returns:
        `out_dir`.

    Raises:
        UserError: if the run is not finished or a file of it cannot be read, if a weight is NaN or infinite, if
            `out_dir` holds anything else, or if the check fails.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    results = read_results(run_dir)
    if out_dir.is_file() or out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "heat_map.png").is_file():
        raise UserError(f"{out_dir} exists and is not an export; name a new folder")
    if out_dir.resolve() in (run_dir.resolve(), *run_dir.resolve().parents):
        raise UserError(f"{out_dir} holds the run itself; name a new folder")
    # a local path is nobody else's business
    del results["recipe"]["output_dir"]
    for recipe in (results, results["recipe"]):
        for key in ("dataset", "eval_dataset", "tokenizer"):
            if recipe.get(key) and Path(recipe[key]).exists():
                recipe[key] = Path(recipe[key]).name
    weights = checkpoint or run_dir / "model"
    with explained(f"{weights}: its config.json or model.safetensors cannot be read"):
        model = LNFreeForCausalLM.from_pretrained(weights, dtype="auto").eval()
    model.config.use_cache = True  # the Trainer switches it off for training
    # pipelines would generate 256 tokens, and truncation would not truncate
    model.generation_config.max_length = model.config.max_position_embeddings
    for parameter_name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{run_dir} is not exported: its weight {parameter_name} has NaN or infinite entries")
    with explained(f"{run_dir / 'model'}: its tokenizer.json or tokenizer_config.json cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    tokenizer.model_max_length = model.config.max_position_embeddings
    name = out_dir.resolve().name
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{name}.") as aside:
        folder = Path(aside) / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        plot_heat_maps([results["attention_entropy"]], [run_title(results)]).savefig(folder / "heat_map.png")
        plot_curves([{"folder": run_dir, **results}]).savefig(folder / "curves.png")
        draw_block(model.config, folder / "block.png")
        for measured in (run_dir / "log_history.json", *run_dir.glob("*.jsonl")):
            with explained(f"{run_dir}: its {measured.name} cannot be read"):
                (folder / measured.name).write_text(measured.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(results["recipe"], sort_keys=False), encoding="utf-8")
        step = int(checkpoint.name.split("-")[-1]) if checkpoint else None
        cost = describe_forward(type(model), model.config, results["block_size"])
        card = build_card(name, model.config, results, folder, cost, namespace=namespace, siblings=siblings, step=step)
        card.save(folder / "README.md")
        _write_probe(folder / PROBE, model)
        prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        generated = _check(folder, prompt)
        if out_dir.exists():
            os.replace(out_dir, Path(aside) / "earlier")
        os.replace(folder, out_dir)
    # where a publication is built is nobody's business
    shown = out_dir if namespace is None else name if step is None else f"{name}, step {step}"
    print(f"{shown}: loaded back in a clean process, logits equal bit by bit; it generates")
    print(f"  {tokenizer.decode(generated[0])!r}")
    return out_dir


def _write_probe(path: Path, model: LNFreeForCausalLM):
    """Random tokens and their logits, by which anyone can tell whether the model arrived whole."""
    generator = torch.Generator().manual_seed(0)
    length = min(16, model.config.max_position_embeddings)
    input_ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    threads = torch.get_num_threads()
    # the order of a sum depends on the number of threads
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            logits = model(input_ids).logits
    finally:
        torch.set_num_threads(threads)
    path.parent.mkdir()
    save_file({"input_ids": input_ids, "logits": logits}, path)


def _check(folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """Loads the export in a clean process; returns what it generated."""
    probe = load_file(folder / PROBE)
    with tempfile.TemporaryDirectory() as outside:
        inputs, outputs = Path(outside) / "inputs.safetensors", Path(outside) / "outputs.safetensors"
        save_file({"input_ids": probe["input_ids"], "prompt": prompt}, inputs)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        environment |= {"HF_HOME": outside, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", LOAD_CHECK, folder.resolve(), inputs, outputs]
        run = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise UserError(f"the export does not load in a clean process: {last_words(run)}")
        found = load_file(outputs)
    if not found["logits"].equal(probe["logits"]):
        difference = (found["logits"] - probe["logits"]).abs().max().item()
        raise UserError(f"the exported model's logits differ from the trained model's by up to {difference:.3g}")
    return found["generated"]


def last_words(run: subprocess.CompletedProcess) -> str:
    """The last line of what a process said went wrong; one that was killed says nothing."""
    return (run.stderr.strip().splitlines() or [f"it ended with status {run.returncode}"])[-1]
