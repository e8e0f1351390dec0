"""
Which way to a model without LayerNorm is better: to train one with norms and take them out, or to train without?

    .venv/bin/python scripts/norm_removal_study.py --backbones gpt2 --seeds 1 3 4 --docs docs

For each backbone and seed, all at the size of the recipe quick, with Muon for the matrices of the layers, on the
standard library's source: a model with norms is trained (0.8 M tokens), converted to transformers' own class, and
goes through `lnfree remove-norms` (0.4 M other tokens), which trains its control as long; and models without norms
are trained with the preset Stable from random weights, with as many tokens as both together (1.2 M). `--scratch SM+R
SM+LN+G` trains one with norms like that too; it was added when the others were known, to tell what the single schedule
does. What is finished is not trained again. The schedule was tried once, with seed 2 on GPT-2's backbone, and was
written down here before the runs of other seeds.

When those of Llama had fallen short, the reason was looked for with seed 2, with a plain MLP in place of Llama's gated
one (`llama-two-layer`), and with a gated one in GPT-2 (`gpt2-gated`). So Llama has a second schedule, in which the
norms before the MLPs have more time, chosen with seed 2 and then run with the others:

    .venv/bin/python scripts/norm_removal_study.py --backbones llama-two-layer gpt2-gated --seeds 2 --scratch

Compared is the loss over the whole evaluation part, paired by seed with that of the control; 95 % intervals by
Student's t from three seeds on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.compare.seeds import t_interval
from training.errors import UserError
from training.files import read_json
from training.pages import check_docs, format_head, format_row, origin_of, write_table
from training.runs import RESULTS, Run


BIASES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
_ROTARY = {"position_embedding_type": "rotary", "tie_word_embeddings": False}
BACKBONES: dict[str, dict[str, Any]] = {
    "gpt2": {"variant": "SM+LN+G", "biased_projections": BIASES},
    "pythia": {
        **{"variant": "SM+LN+G", "biased_projections": BIASES, "parallel_residual": True},
        **{**_ROTARY, "partial_rotary_factor": 0.25},
    },
    # a gated MLP of as many parameters
    "llama": {
        **{"variant": "SM+RMS+S", "biased_projections": [], "mlp_type": "gated", "intermediate_size": 344},
        **{**_ROTARY, "partial_rotary_factor": 1.0},
    },
}
_PLAIN = {"mlp_type": "two_layer", "intermediate_size": 512}
_GATED = {"mlp_type": "gated", "intermediate_size": 344}
# of this family alone, to tell what the gate does
BACKBONES["llama-two-layer"] = BACKBONES["llama"] | _PLAIN
BACKBONES["gpt2-gated"] = BACKBONES["gpt2"] | _GATED | {"biased_projections": BIASES[:4]}
STOCK = ("gpt2", "pythia", "llama")
STEPS, REMOVAL_STEPS = 400, 200
# more than the published gaps, since a step has 2,048 tokens and not half a million
REMOVAL = {
    **{"eval_fraction": 0.02, "block_size": 128, "max_steps": REMOVAL_STEPS},
    **{"remove_norms_from": 20, "remove_norms_gaps": [4, 4, 6, 6]},
    **{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 64},
    **{"learning_rate": 5e-4, "layer_optimizer": "muon", "layer_learning_rate": 3e-3, "weight_decay": 0.1},
    **{"warmup_steps": 10, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None},
    **{"entropy_steps": 40, "entropy_sequences": 16},
}
# what a gated MLP needs more of: steps for its own norms, and after the last
SLOWER = {"llama": {"remove_norms_from": 8, "remove_norms_gaps": [8, 1, 1, 2]}}
# of a seed's fine-tuning, which then reads other tokens than its training
OTHER_SEED = 100
FORMATS = {"perplexity": "{:.2f}", "nats from the control": "{:+.3f}", "95 % interval": "{:+.3f} to {:+.3f}"}


def run(verb: str, *arguments: str, **fields: Any):
    """A verb of `lnfree` in a process of its own."""
    given = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    if subprocess.run([sys.executable, "-P", "-m", "training.cli", verb, *arguments, *given]).returncode != 0:
        raise UserError(f"lnfree {verb} {' '.join(arguments)} failed; the same command goes on")


def train_all(folder: Path, backbone: str, seed: int, scratch: list[str]):
    """The runs of one backbone and seed that are not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    original, stock, fields = folder / "original", folder / "stock", {**BACKBONES[backbone], "seed": seed}
    with_norms = {"preset": None, "layer_learning_rate": 0.006}
    run("train", "small_stable", **fields, **with_norms, max_steps=STEPS, output_dir=str(original))
    if backbone not in STOCK:
        stock = original / "model"
    elif not stock.is_dir():
        run("import", "--to-stock", str(original / "model"), str(stock))
    options, texts = {**REMOVAL, "seed": OTHER_SEED + seed}, ["--dataset", "stdlib"]
    if not (folder / "model").is_dir():
        run("remove-norms", str(stock), str(folder), *texts, **options)
    if backbone in SLOWER and not (folder / "slower" / "model").is_dir():
        run("remove-norms", str(stock), str(folder / "slower"), *texts, "--no-control", **options | SLOWER[backbone])
    for variant in scratch:
        given = {**fields, "variant": variant, "max_steps": STEPS + REMOVAL_STEPS, "output_dir": str(folder / variant)}
        run("train", "small_stable", **given)


def read_rows(folders: dict[int, Path], backbone: str) -> list[dict[str, Any]]:
    """A row for each way that at least one seed has gone."""
    control = {seed: _loss(folder / "control") for seed, folder in folders.items()}
    normed = BACKBONES[backbone]["variant"]
    ways = [
        ("with norms", "original", STEPS),
        ("with norms, trained on: the control", "control", STEPS + REMOVAL_STEPS),
        ("without norms, taken out", "removed", STEPS + REMOVAL_STEPS),
        ("without norms, those of the MLPs taken out slowly", "slower/removed", STEPS + REMOVAL_STEPS),
        ("SM+R@Stable from random weights", "SM+R", STEPS + REMOVAL_STEPS),
        ("SM+G@Stable from random weights", "SM+G", STEPS + REMOVAL_STEPS),
        (f"{normed}@Stable from random weights", normed, STEPS + REMOVAL_STEPS),
    ]
    rows = []
    for title, name, steps in ways:
        losses = {seed: _loss(folder / name) for seed, folder in folders.items() if _is_finished(folder / name)}
        if not losses:
            continue
        changes = [loss - control[seed] for seed, loss in losses.items()]
        compared = name != "control"
        rows.append(
            {
                "backbone": backbone,
                "model": title,
                "tokens": f"{steps * 2048 / 1e6:.1f} M",
                "seeds": ", ".join(map(str, losses)),
                "perplexity": [float(np.exp(loss)) for loss in losses.values()],
                "nats from the control": float(np.mean(changes)) if compared else None,
                "95 % interval": t_interval(changes) if compared else None,
            }
        )
    return rows


def plot(folders: dict[str, Path]) -> Figure:
    """Loss over tokens of the two ways, of one seed a backbone."""
    figure = Figure(figsize=(4.5 * len(folders), 3.6), layout="constrained")
    for axes, (backbone, folder) in zip(
        figure.subplots(1, len(folders), squeeze=False)[0], folders.items(), strict=True
    ):
        ways = (
            ("original", "with norms", 0),
            ("control", "with norms, trained on", STEPS),
            ("removed", "norms taken out", STEPS),
            ("slower/removed", "norms taken out, those of the MLPs slowly", STEPS),
            ("SM+R", "SM+R@Stable from random weights", 0),
            ("SM+G", "SM+G@Stable from random weights", 0),
            (BACKBONES[backbone]["variant"], "with norms, @Stable from random weights", 0),
        )
        # a way has one color in all panels
        for index, (name, label, first) in enumerate(ways):
            if _is_finished(folder / name):
                log = [entry for entry in read_json(folder / name / "log_history.json", list) if "loss" in entry]
                tokens = [(first + entry["step"]) * 2048 / 1e6 for entry in log]
                axes.plot(
                    tokens, [float(entry["loss"]) for entry in log], label=label, linewidth=1.2, color=f"C{index}"
                )
        axes.set(xlabel="training tokens (M)", ylabel="training loss (nats)", title=backbone, ylim=(3.6, 6))
        axes.legend(fontsize=7)
    return figure


def _is_finished(folder: Path) -> bool:
    return (folder / RESULTS).is_file()


def _loss(folder: Path) -> float:
    return Run.load(folder).results["eval_loss"]


def main():
    """Trains what is missing, prints the table, and writes it with the picture into the docs where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(STOCK), choices=list(BACKBONES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 3, 4])
    parser.add_argument("--scratch", nargs="*", default=["SM+R", "SM+G"], help="variants trained from random weights")
    parser.add_argument("--output", type=Path, default=Path("runs/norm_removal"), metavar="DIR")
    parser.add_argument("--read-only", action="store_true", help="train nothing: the table of what is finished")
    parser.add_argument("--docs", metavar="DIR", help="the checkout's docs, whose table norm-removal is written")
    arguments = parser.parse_args()
    try:
        if arguments.docs is not None:
            check_docs(arguments.docs)
        wanted = [(backbone, seed) for backbone in arguments.backbones for seed in arguments.seeds]
        folders = {key: arguments.output / f"{key[0]}-seed{key[1]}" for key in wanted}
        if not arguments.read_only:
            for (backbone, seed), folder in folders.items():
                train_all(folder, backbone, seed, arguments.scratch)
    except UserError as error:
        sys.exit(f"norm_removal_study: {error}")
    finished = {key: folder for key, folder in folders.items() if (folder / "model").is_dir()}
    rows = []
    for backbone in dict.fromkeys(backbone for backbone, _ in finished):
        of_backbone = {seed: folder for (name, seed), folder in finished.items() if name == backbone}
        rows += read_rows(of_backbone, backbone)
    if not rows:
        sys.exit(f"norm_removal_study: nothing is finished in {arguments.output}")
    print(*format_head(rows[0]), *(format_row(row, FORMATS) for row in rows), sep="\n")
    first = {}
    for (backbone, _), folder in finished.items():
        first.setdefault(backbone, folder)
    drawn = plot({backbone: folder for backbone, folder in first.items() if backbone in STOCK} or first)
    drawn.savefig(arguments.output / "norm_removal_study.png", dpi=110)
    if arguments.docs is not None:
        first_run = Run.load(next(iter(finished.values())) / "removed")
        backbones = " ".join(dict.fromkeys(backbone for backbone, _ in finished))
        command = f"python scripts/norm_removal_study.py --backbones {backbones}"
        write_table(arguments.docs, "norm-removal", rows, command, FORMATS, **origin_of(first_run.results))
        drawn.savefig(Path(arguments.docs) / "norm_removal_study.png", dpi=110)


if __name__ == "__main__":
    main()
