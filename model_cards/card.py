"""Results of a run -> the model card of its export."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_lnfree import LNFreeForCausalLM
from training.private_cost import BASELINE, comparison, count_operations


TEMPLATE = Path(__file__).parent / "lnfree_card.md.jinja"
CORPORA = {"stdlib": "Python source of the interpreter's standard library"}


def build_card(name: str, config, results: dict[str, Any], folder: Path) -> ModelCard:
    """
    The card of an exported variant.

    Args:
        name: of the repository or folder.
        config: the model's `LNFreeConfig`.
        results: of the run, as `results.json` holds them.
        folder: the export, whose `.py` files are listed with their hashes.
    """
    entropy = np.array(results["attention_entropy"]["entropy"])  # (layers, heads)
    corpus = CORPORA.get(results["dataset"], results["dataset"])
    evaluated = {
        "task_type": "text-generation",
        "dataset_type": results["dataset"],
        "dataset_name": f"{corpus}, held-out documents",
    }
    card_data = ModelCardData(
        language="code",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lnfree", "code", "layernorm-free" if config.norm_type == "none" else "layernorm", results["variant"]],
        # what is no id of the Hub was local
        datasets=[results["dataset"]] if "/" in results["dataset"] else None,
        model_name=name,
        eval_results=[
            EvalResult(**evaluated, metric_type="perplexity", metric_value=float(results["perplexity"])),
            EvalResult(
                **evaluated,
                metric_type="attention_entropy",
                metric_name="mean attention entropy (nats)",
                metric_value=float(entropy.mean()),
            ),
        ],
    )
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        results=results,
        corpus=corpus,
        entropy_by_layer=entropy.mean(1).tolist(),
        max_entropy=float(np.mean(results["attention_entropy"]["max_entropy"])),
        hashes=hashes,
        private_cost=_private_cost(config, results["block_size"]),
    )


def _private_cost(config, length: int) -> str:
    """Markdown: what one forward pass over `length` tokens costs under encryption."""
    counts = count_operations(LNFreeForCausalLM, config, length=length)
    named, baseline = [(counts["variant"], counts["forward"])], counts["forward"]
    if "baseline" in counts:
        baseline = counts["baseline"]["forward"]
        named.insert(0, (BASELINE, baseline))
    return "\n".join(comparison(named, baseline))
