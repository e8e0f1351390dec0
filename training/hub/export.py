"""A finished run -> a folder as the Hub wants it, loaded back by a clean process before it counts."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model_cards.card import build_card
from model_cards.diagram import draw_block
from modeling_lnfree import LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import read_variant
from modeling_lnfree.variants import BASELINE

from ..encryption.tables import describe_forward
from ..errors import UserError, explained
from ..files import is_taken, writing
from ..plots import plot_curves, plot_heat_maps
from ..runs import RESULTS, Run, step_of
from .clean_process import find_failure


LOAD_CHECK = Path(__file__).with_name("load_check.py")
PROMPT = "def __init__(self"
# in a folder of its own: what reads every .safetensors file beside the config takes them for weights
PROBE = Path("probe", "logits.safetensors")


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    namespace: str | None = None,
    siblings: Sequence[Run] = (),
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
        namespace: user or organization of the Hub that the card speaks of.
        siblings: the runs that the card compares this one with, itself among them, in the paper's order.
        checkpoint: folder with other weights of the same run, and nothing else different.

    Returns:
        `out_dir`.

    Raises:
        UserError: if the run is not finished or a file of it cannot be read, if a weight is NaN or infinite, if
            `out_dir` holds anything else, or if the check fails.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    run = Run.load(run_dir)
    is_export = not out_dir.is_symlink() and (out_dir / "heat_map.png").is_file()
    if is_taken(out_dir) and not is_export:
        raise UserError(f"{out_dir} exists and is not an export; name a new folder")
    if out_dir.resolve() in (run_dir.resolve(), *run_dir.resolve().parents):
        raise UserError(f"{out_dir} holds the run itself; name a new folder")
    results = _without_local_paths(run.results)
    model, tokenizer = _load(run_dir, checkpoint or run_dir / "model")
    name, step = out_dir.resolve().name, step_of(checkpoint) if checkpoint else None
    with writing(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    with writing(out_dir), tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{name}.") as aside:
        folder = Path(aside) / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        draw_block(model.config, folder / "block.png")
        _write_measured(folder, run, results)
        cost = describe_forward(type(model), model.config, results["block_size"])
        rows = _compare(siblings)
        named = [read_variant(variant) for variant in (results["variant"], *(row["variant"] for row in rows))]
        words = {read[kind] for read in named for kind in ("norm", "act")}
        about = (name, model.config, results, folder, cost)
        card = build_card(*about, namespace=namespace, siblings=rows, words=words, step=step)
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


def _load(run_dir: Path, weights: Path) -> tuple[LNFreeForCausalLM, PreTrainedTokenizerBase]:
    """The model with these weights and its tokenizer, both with what is read by clients of the Hub."""
    with explained(f"{weights}: its config.json or model.safetensors cannot be read"):
        model = LNFreeForCausalLM.from_pretrained(weights, dtype="auto").eval()
    model.config.use_cache = True  # the Trainer switches it off for training
    # pipelines would generate 256 tokens, and truncation would not truncate
    model.generation_config.max_length = model.config.max_position_embeddings
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{run_dir} is not exported: its weight {name} has NaN or infinite entries")
    with explained(f"{run_dir / 'model'}: its tokenizer.json or tokenizer_config.json cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _write_measured(folder: Path, run: Run, results: dict[str, Any]):
    """Results and recipe, and what was measured on the way, with its pictures."""
    title = run.describe()
    plot_heat_maps([run.attention_entropy], [title]).savefig(folder / "heat_map.png")
    plot_curves([run], [title]).savefig(folder / "curves.png")
    for measured in (run.folder / "log_history.json", *run.folder.glob("*.jsonl")):
        with explained(f"{run.folder}: its {measured.name} cannot be read"):
            text = measured.read_text(encoding="utf-8")
        (folder / measured.name).write_text(text, encoding="utf-8")
    (folder / RESULTS).write_text(json.dumps(results, indent=1), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(results["recipe"], sort_keys=False), encoding="utf-8")


def _without_local_paths(results: dict[str, Any]) -> dict[str, Any]:
    """A local path is nobody else's business; of data, tokenizers and models here only the name is told."""
    recipe = {key: value for key, value in results["recipe"].items() if key != "output_dir"}
    if "base_model" in results:
        recipe["init_from"] = results["base_model"]

    def names_only(values: dict[str, Any]) -> dict[str, Any]:
        local = ("dataset", "eval_dataset", "tokenizer")
        found = {key: values[key] for key in local if values.get(key) and Path(values[key]).exists()}
        return {**values, **{key: Path(path).name for key, path in found.items()}}

    return names_only({**results, "recipe": names_only(recipe)})


def _compare(siblings: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the card's comparison; the change is against the baseline of the same seed."""
    baselines = {run.seed: run.perplexity for run in siblings if run.variant == BASELINE}
    return [
        {
            "name": run.model_name,
            "variant": run.variant,
            "seed": run.seed,
            "perplexity": run.perplexity,
            "change": 100 * (run.perplexity / baselines[run.seed] - 1) if run.seed in baselines else None,
            "entropy": float(np.mean(run.attention_entropy["entropy"])),
            "parameters": run.results["parameters"],
        }
        for run in siblings
    ]


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
        failure = find_failure(LOAD_CHECK, [folder.resolve(), inputs, outputs], Path(outside), HF_HUB_OFFLINE="1")
        if failure is not None:
            raise UserError(f"the export does not load in a clean process: {failure}")
        found = load_file(outputs)
    if not found["logits"].equal(probe["logits"]):
        difference = (found["logits"] - probe["logits"]).abs().max().item()
        raise UserError(f"the exported model's logits differ from the trained model's by up to {difference:.3g}")
    return found["generated"]
