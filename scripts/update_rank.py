"""
Why a model without LayerNorm stalls: a step of AdamW is nearly of rank one in every matrix, which turns all tokens the
same way. Trains one and the same model with such steps, and with limits to them that could show the claim wrong:

    .venv/bin/python scripts/update_rank.py training/recipes/quick.yaml variant=SM+R seed=2

`clipped`: no singular value of a matrix's step is larger than all are in a step of Muon at six times the rate, and the
step is AdamW's otherwise. `scaled`: the whole step is made smaller, until the same holds. If the size of the step were
what stalls the model, both would end it; if its rank is, only the first.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from modeling_lnfree import LNFreeForCausalLM
from training.data import load_documents, load_tokenizer, tokenize_blocks
from training.errors import UserError
from training.pages import check_docs, format_head, format_row, write_table
from training.recipe import Recipe, load_recipe


RULES = ("adamw", "clipped", "scaled")
MUON_RATE = 6  # times AdamW's
FORMATS = {"stable rank": "{:.2f}", "spectral norm": "{:.4f}"}


def limit_step(step: Tensor, limit: float, rule: str) -> tuple[Tensor, float, float]:
    """
    Args:
        step (`torch.Tensor` of shape `(rows, columns)`): of a matrix.
        limit: of its singular values.
        rule: of `RULES`.

    Returns:
        The step by the rule, its stable rank (squared Frobenius norm by squared spectral norm) and its spectral norm.
    """
    left, values, right = torch.linalg.svd(step, full_matrices=False)
    if rule == "clipped":
        values = values.clamp(max=limit)
        step = left * values @ right
    elif rule == "scaled":
        factor = (limit / values[0]).clamp(max=1.0)
        values, step = values * factor, step * factor
    return step, (values.square().sum() / values[0].square()).item(), values[0].item()


def train(recipe: Recipe, rule: str, every: int) -> Iterator[dict[str, Any]]:
    """A row every so many steps: loss (mean of the last ten steps), cosine of two tokens, rank and size of a step."""
    seed, arguments = recipe.training["seed"], recipe.training
    documents = load_documents(recipe.data, seed)
    tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model.get("vocab_size"))
    blocks = tokenize_blocks(documents, tokenizer, recipe.data, seed)["train"]
    set_seed(seed)
    model = LNFreeForCausalLM(recipe.build_config(vocab_size=len(tokenizer))).train()
    states: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output.detach()))
    matrices = [module.weight for module in model.model.modules() if isinstance(module, nn.Linear)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    sequences = arguments.get("per_device_train_batch_size", 8)
    # the blocks of a document follow one another
    order, losses = torch.randperm(len(blocks)), []
    for step in range(1, arguments["max_steps"] + 1):
        rate = arguments["learning_rate"] * min(1.0, step / arguments["warmup_steps"])
        optimizer.param_groups[0]["lr"] = rate
        rows = blocks[order[(step - 1) * sequences : step * sequences]]["input_ids"]
        loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments["max_grad_norm"])
        before = [matrix.detach().clone() for matrix in matrices]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rule != "adamw" or step % every == 0:
            ranks, norms = [], []
            with torch.no_grad():
                for matrix, old in zip(matrices, before, strict=True):
                    limit = MUON_RATE * rate * 0.2 * math.sqrt(max(matrix.shape))
                    limited, rank, norm = limit_step(matrix - old, limit, rule)
                    ranks.append(rank)
                    norms.append(norm)
                    if rule != "adamw":
                        matrix.copy_(old + limited)
        if step % every == 0:
            yield {
                "steps of": rule,
                "seed": seed,
                "step": step,
                "loss": sum(losses[-10:]) / len(losses[-10:]),
                "cosine of tokens": mean_cosine(states[-1]),
                "stable rank": sum(ranks) / len(ranks),
                "spectral norm": sum(norms) / len(norms),
            }
        states.clear()


def mean_cosine(states: Tensor) -> float:
    """Mean cosine of two different tokens of a sequence; states are `(batch_size, seq_len, hidden_size)`."""
    length = states.shape[1]
    total = nn.functional.normalize(states, dim=-1).sum(1).square().sum(-1)  # every pair twice, and T ones
    return ((total - length) / (length * (length - 1))).mean().item()


def main():
    """Prints the rows of every rule, and writes them into the docs where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--every", type=int, default=40, metavar="N", help="steps between two rows (default: 40)")
    parser.add_argument("--docs", metavar="DIR", help="the checkout's docs, whose table update-rank is written")
    arguments = parser.parse_args()
    try:
        if arguments.docs is not None:
            check_docs(arguments.docs)
        recipe = load_recipe(arguments.recipe, ["max_steps=120", "warmup_steps=20", *arguments.overrides])
        found = []
        for rule in RULES:
            for row in train(recipe, rule, arguments.every):
                if not found:
                    print(*format_head(row), sep="\n")
                print(format_row(row, FORMATS), flush=True)
                found.append(row)
    except UserError as error:
        sys.exit(f"update_rank: {error}")
    if arguments.docs is not None:
        command = " ".join(["python scripts/update_rank.py", arguments.recipe, *arguments.overrides])
        write_table(arguments.docs, "update-rank", found, command, FORMATS)


if __name__ == "__main__":
    main()
