"""
Loads what was published as a stranger would, by repository id and pinned commit, with an empty cache, in a process
that does not know this project:

    python -I hub_check.py ASKED.json FOUND.json

Writes what it found for every repository, and fails with the first one that does not load.
"""

import json
import sys
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)


def check_model(repo_id: str, revision: str, probe: str) -> dict[str, Any]:
    """Every Auto class and the pipeline; the logits of the stored probe; a generation."""
    loading = {"revision": revision, "trust_remote_code": True}
    AutoConfig.from_pretrained(repo_id, **loading)
    AutoModel.from_pretrained(repo_id, **loading)
    AutoModelForSequenceClassification.from_pretrained(repo_id, **loading, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(repo_id, **loading)
    model = AutoModelForCausalLM.from_pretrained(repo_id, **loading)
    if not type(model).__module__.startswith("transformers_modules."):
        raise ImportError(f"the model's code is {type(model).__module__}, not the repository's")
    stored = load_file(hf_hub_download(repo_id, probe, revision=revision))
    with torch.no_grad():
        logits = model(stored["input_ids"]).logits
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "def ", max_new_tokens=8, do_sample=False, return_full_text=False
    )
    return {
        "difference": (logits - stored["logits"]).abs().max().item(),
        "scale": stored["logits"].abs().max().item(),
        "generated": text[0]["generated_text"],
    }


def check_metric(repo_id: str, revision: str, model: dict[str, str]) -> dict[str, Any]:
    """The metric, on a published model."""
    metric = evaluate.load(repo_id, revision=revision)
    result = metric.compute(
        predictions=["def main():\n    return 0\n"],
        model_id=model["repo_id"],
        revision=model["revision"],
        trust_remote_code=True,
    )
    return {"mean_entropy": result["mean_entropy"]}


def check_dataset(repo_id: str, revision: str) -> dict[str, Any]:
    """The table of results."""
    return {"rows": load_dataset(repo_id, revision=revision, split="train").num_rows}


def main(asked: str, found: str):
    """Checks models, metric and dataset, in this order."""
    repositories = json.loads(Path(asked).read_text(encoding="utf-8"))
    results = []
    for repository in repositories:
        repo_id, revision = repository["repo_id"], repository["revision"]
        try:
            if repository["kind"] == "model":
                results.append(check_model(repo_id, revision, repository["probe"]))
            elif repository["kind"] == "space":
                results.append(check_metric(repo_id, revision, repositories[0]))
            else:
                results.append(check_dataset(repo_id, revision))
        # whatever went wrong in loading is the finding
        except Exception as error:
            sys.exit(f"{repo_id} at {revision[:12]}: {type(error).__name__}: {' '.join(str(error).split())}")
    Path(found).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
