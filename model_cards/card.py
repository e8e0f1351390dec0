"""Results of a run -> the model card of its export."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .diagram import describe_activation, describe_heads, describe_norm


TEMPLATE = Path(__file__).with_name("lnfree_card.md.jinja")
RESULTS_TEMPLATE = Path(__file__).with_name("results_card.md.jinja")
CORPORA = {"stdlib": "Python source of the interpreter's standard library"}
# words of the notation
WORDS = {
    **{"LN": "LayerNorm", "RMS": "RMSNorm", "DyT": "dynamic tanh", "Derf": "dynamic erf", "G": "GELU", "R": "ReLU"},
    **{"LR": "leaky ReLU", "LR-layer": "leaky ReLU with a learned slope a layer"},
    **{"LR-global": "leaky ReLU with one learned slope", "S": "SiLU", "Lin": "no activation"},
}
BACKBONES = {"gpt2": "GPT-2", "pythia": "Pythia (GPT-NeoX)", "llama": "Llama"}
POSITIONS = {
    "pre": "before attention and feed-forward layer",
    "post": "over the sums behind attention and feed-forward layer",
    "peri": "before and behind attention and feed-forward layer",
    "hybrid": "over the sum behind attention",
}
MLPS = {"two_layer": "two matrices", "gated": "gated", "fused": "one matrix", "none": "none"}
# papers of the designs behind the @
PAPERS = {
    **{"QKNorm": "2405.19279", "OP": "2405.19279", "SAS": "2311.01906", "SAS-P": "2311.01906"},
    **{"V-SkipInit": "2302.10322", "Shaped": "2306.17759", "Gated": "2306.12929", "Clipped": "2306.12929"},
    **{"ScFFN": "2410.13060", "ScFuFFN": "2410.13060", "AERO": "2410.13060", "PostLN": "2002.04745"},
    **{"Pruned": "2410.13060", "PeriLN": "2502.02732"},
    **{"HybridNorm": "2503.04598", "HybridNorm-star": "2503.04598"},
}
PYTHON_SOURCE = ("stdlib", "huggingface-course/codeparrot-ds-train")


def _by_layer(config, describe: Callable[[Any], str]) -> str:
    """What is said of the layers: once where they are alike, else with their numbers."""
    layers: dict[str, list[str]] = {}
    for index, layer in enumerate(config.per_layer_config):
        layers.setdefault(describe(layer), []).append(str(index))
    alike = len(layers) == 1
    return "; ".join(
        text if alike else f"{text or 'none'} (layer {', '.join(found)})" for text, found in layers.items()
    )


def build_card(
    name: str,
    config,
    results: dict[str, Any],
    folder: Path,
    private_cost: str,
    *,
    namespace: str | None = None,
    siblings: Sequence[dict[str, Any]] = (),
    words: Collection[str] = (),
    step: int | None = None,
) -> ModelCard:
    """
    The card of an exported variant.

    Args:
        name: of the repository or folder.
        config: the model's `LNFreeConfig`.
        results: of the run, as `results.json` holds them.
        folder: the export, whose `.py` files are listed with their hashes.
        private_cost: Markdown, what a forward pass costs under encryption.
        namespace: user or organization of the Hub, where it goes there.
        siblings: rows of the published variants that it is compared with, itself among them: `name` of the
            repository, `variant`, `seed`, `perplexity`, `change` (percent, None without a baseline), mean `entropy`
            in nats, `parameters`.
        words: of the notation, that stand in the names of the variants (keys of `WORDS`), to be explained.
        step: the training step of the weights, where they are not those at the end.
    """
    entropy = np.array(results["attention_entropy"]["entropy"])  # (layers, heads)
    corpus = CORPORA.get(results["dataset"], results["dataset"])
    evaluated = {
        "task_type": "text-generation",
        "dataset_type": results["recipe"].get("eval_dataset") or results["dataset"],
        "dataset_name": f"{corpus}, held-out documents",
        "dataset_revision": results.get("eval_revision"),
    }
    norm_tag = "layernorm-free" if config.norm_type == "none" else config.norm_type
    normed = config.norm_type != "none"
    blocks = {
        "norms": describe_norm(config.norm_type),
        "norm position": _by_layer(config, lambda layer: POSITIONS[layer.norm_position]) if normed else None,
        "final norm": describe_norm(config.final_norm_type),
        "attention": _by_layer(config, lambda layer: "; ".join(describe_heads(config, layer))),
        "feed-forward layer": _by_layer(config, lambda layer: MLPS[layer.mlp_type]),
        "residual gains": _by_layer(
            config, lambda layer: ", ".join(f"{gain:.3g}" for gain in layer.residual_gains or ())
        ),
    }
    is_code, parent = results["dataset"] in PYTHON_SOURCE, results.get("base_model") or ""
    card_data = ModelCardData(
        language="code" if is_code else None,  # of other data it is not known
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lnfree", *["code"] * is_code, norm_tag, results["variant"], "arxiv:2410.09637", "custom_code"],
        # what is no id of the Hub was local: a folder named gpt2 is not the gpt2 of the Hub
        datasets=[results["dataset"]] if "/" in results["dataset"] else None,
        base_model=parent if "/" in parent else None,
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
        model_id=f"{namespace}/{name}" if namespace else name,
        namespace=namespace,
        config=config,
        activation=describe_activation(config),
        backbone=BACKBONES.get(results["backbone"], results["backbone"]),
        blocks={key: value for key, value in blocks.items() if value},
        words=", ".join(["SM softmax attention", *(f"{word} {WORDS[word]}" for word in WORDS if word in words)]),
        paper=PAPERS.get(config.preset),
        results=results,
        siblings=siblings,
        step=step,
        corpus=corpus,
        is_code=is_code,
        entropy_by_layer=entropy.mean(1).tolist(),
        max_entropy=float(np.mean(results["attention_entropy"]["max_entropy"])),
        hashes=hashes,
        private_cost=private_cost,
    )
