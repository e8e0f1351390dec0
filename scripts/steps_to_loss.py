"""
How many steps a small GPT-2 needs until its loss (mean of ten steps) is below 6.0 nats, where one without LayerNorm
may sit on its plateau: 200 steps of the recipe `quick` at most, by setting and seed.

    .venv/bin/python scripts/steps_to_loss.py --docs docs

Goes on with what is missing in its file of results. A seed that ends above 6.0 stands in the table as that.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PrinterCallback, TrainerCallback, set_seed

from training.data import load_documents, load_tokenizer, tokenize_blocks
from training.errors import UserError
from training.files import read_records
from training.pages import check_docs, format_head, format_row, write_table
from training.recipe import load_recipe
from training.runs import find_commit
from training.train.start import start_model
from training.train.trainer import LNFreeTrainer


LOSS, STEPS, EVERY = 6.0, 200, 10
SETTINGS = {
    "SM+LN+G": ["variant=SM+LN+G"],
    "SM+R": ["variant=SM+R"],
    "SM+G": ["variant=SM+G"],
    "SM+R@Stable, Muon 0.012": ["variant=SM+R@Stable", "layer_optimizer=muon", "layer_learning_rate=0.012"],
    "SM+G@Stable, Muon 0.012": ["variant=SM+G@Stable", "layer_optimizer=muon", "layer_learning_rate=0.012"],
    "SM+R, Muon 0.006": ["variant=SM+R", "layer_optimizer=muon", "layer_learning_rate=0.006"],
    "SM+R@Stable": ["variant=SM+R@Stable"],
    "SM+R, embeddings times 4": ["variant=SM+R", "embedding_multiplier=4"],
    "SM+R, layers at 1/6 of the rate": ["variant=SM+R", "layer_learning_rate=0.000167"],
    "SM+R, warm-up of 80 steps": ["variant=SM+R", "warmup_steps=80"],
    "SM+R, rate 0.0003": ["variant=SM+R", "learning_rate=0.0003"],
    "SM+R, beta2 0.95": ["variant=SM+R", "adam_beta2=0.95"],
    "SM+R-noLNf": ["variant=SM+R-noLNf"],
    "SM+R, rotary": ["variant=SM+R", "position_embedding_type=rotary"],
    "SM+R, parallel": ["variant=SM+R", "parallel_residual=true"],
    "SM+R, untied": ["variant=SM+R", "tie_word_embeddings=false"],
    "SM+R, all biases": ["variant=SM+R", "biased_projections=[q_proj, k_proj, v_proj, o_proj, up_proj, down_proj]"],
}


class StopBelow(TrainerCallback):
    """Ends a training whose logged loss is below `LOSS`, and keeps the step."""

    step: int | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.step is None and logs is not None and logs.get("loss", LOSS) < LOSS:
            self.step = state.global_step
            control.should_training_stop = True


def count_steps(overrides: list[str], seed: int) -> int | None:
    """Steps of a run until its loss is below `LOSS`; None where it never is."""
    with tempfile.TemporaryDirectory() as folder:
        usual = [f"max_steps={STEPS}", "warmup_steps=20", f"logging_steps={EVERY}", "save_strategy=no"]
        more = ["disable_tqdm=true", f"seed={seed}", f"output_dir={folder}"]
        recipe = load_recipe("quick", [*usual, *overrides, *more])
        arguments = recipe.build_arguments()
        documents = load_documents(recipe.data, seed)
        tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model.get("vocab_size"))
        blocks = tokenize_blocks(documents, tokenizer, recipe.data, seed)
        set_seed(seed)
        stop = StopBelow()
        trainer = LNFreeTrainer(
            model=start_model(recipe, tokenizer, len(tokenizer), None),
            args=arguments,
            train_dataset=blocks["train"],
            data_collator=collate,
            processing_class=tokenizer,
            decay_slopes=recipe.data.decay_slopes,
            milestones=[],
            layer_options=recipe.layer_options,
            callbacks=[stop],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return stop.step


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def to_rows(found: dict[str, dict[int, int | None]]) -> list[dict[str, Any]]:
    """A row a setting: of how many seeds the loss fell below, and after how many steps."""
    rows = []
    for setting, steps in found.items():
        # a seed that never is below counts as one that is so after all others
        values = sorted(STEPS + EVERY if step is None else step for step in steps.values())
        names = [f"> {STEPS}" if value > STEPS else str(value) for value in values]
        middle = statistics.median(values)
        rows.append(
            {
                "setting": setting,
                "seeds": len(values),
                f"below {LOSS} in {STEPS} steps": sum(value <= STEPS for value in values),
                "least": names[0],
                "median": f"> {STEPS}" if middle > STEPS else f"{middle:g}",
                "most": names[-1],
            }
        )
    return rows


def plot(found: dict[str, dict[int, int | None]]) -> Figure:
    figure = Figure(figsize=(8, 0.6 + 0.3 * len(found)), layout="constrained")
    axis = figure.subplots()
    never = STEPS + 2 * EVERY
    for row, steps in enumerate(found.values()):
        places = [never if step is None else step for step in steps.values()]
        for place in sorted(set(places)):
            same = places.count(place)
            heights = [row + 0.08 * (index - (same - 1) / 2) for index in range(same)]
            axis.plot([place] * same, heights, "o", ms=4, color="C3" if place == never else "C0")
    axis.axvspan(never - EVERY, never + EVERY, color="C3", alpha=0.1, lw=0)
    ticks = range(0, STEPS + 1, 40)
    axis.set_xticks([*ticks, never], [*map(str, ticks), "never"])
    axis.set_xlim(0, never + EVERY)
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"steps until the loss is below {LOSS} nats; a point a seed")
    axis.grid(axis="x", alpha=0.3)
    return figure


def main():
    """Makes the runs that are missing, prints a row a setting, and writes them with the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every setting")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="1 to N (default: 10)")
    parser.add_argument("--results", type=Path, default=Path("runs/steps_to_loss.jsonl"), metavar="FILE")
    parser.add_argument("--docs", metavar="DIR", help="the checkout's docs, whose table steps-to-loss is written")
    arguments = parser.parse_args()
    found: dict[str, dict[int, int | None]] = {}
    try:
        if arguments.docs is not None:
            check_docs(arguments.docs)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        # others are answers to another question
        records = [record for record in read_records(arguments.results) if record["overrides"] == arguments.overrides]
        for record in records:
            found.setdefault(record["setting"], {})[record["seed"]] = record["steps"]
        for setting, overrides in SETTINGS.items():
            for seed in range(1, arguments.seeds + 1):
                if seed not in found.setdefault(setting, {}):
                    found[setting][seed] = count_steps([*overrides, *arguments.overrides], seed)
                    record = {"setting": setting, "seed": seed, "steps": found[setting][seed]}
                    records.append({**record, "overrides": arguments.overrides, "commit": find_commit()})
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
    except UserError as error:
        sys.exit(f"steps_to_loss: {error}")
    rows = to_rows(found)
    print(*format_head(rows[0]), *map(format_row, rows), sep="\n")
    if arguments.docs is not None:
        command = " ".join(["python scripts/steps_to_loss.py", *arguments.overrides])
        # that of the runs, which may be older
        write_table(arguments.docs, "steps-to-loss", rows, command, commit=records[0]["commit"])
        plot(found).savefig(Path(arguments.docs) / "steps_to_loss.png", dpi=110)


if __name__ == "__main__":
    main()
