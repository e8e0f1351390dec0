"""
What scripts/test_gpu.sh runs: the tests marked gpu, the benchmark's tables for a GPU, and the recipe gpt2_t128_stable
on the Python source of this machine's site-packages, the paper's four variants at once and by one schedule. Every part
has its time: what is not done by then is said to be so. A table of the trainings comes last.
"""

import argparse
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import yaml
from matplotlib.figure import Figure

from training.data import load_documents, load_tokenizer, tokenize_blocks
from training.files import read_json, read_records
from training.pages import format_head, format_row, machine
from training.recipe import load_recipe
from training.runs import REPORT, RESULTS, describe_instability, find_commit, library_versions, read_results
from training.sweep import LOG, load_sweep


VARIANTS = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
# Seconds of the whole, of the tests and of the benchmark. The trainings have the rest, of which they need about 200 on
# an H200 (seven runs of 650 steps by AdamW took 150 there).
WHOLE, TESTS, BENCHMARK = 520, 140, 130
# of a part at a tiny size, on a CPU that others use too
TRIED = 3600
# by names of tests: these groups run beside each other, as most of their time goes to compilers
GROUPS = {"flex attention": "flex", "entropies": "(entropies or kernel) and not flex", "training": ""}
GROUPS["training"] = " and ".join(f"not ({names})" for names in GROUPS.values() if names)
# of 16,384 tokens each; the rest of the schedule is the recipe's
SCHEDULE = {
    "recipe": "gpt2_t128_stable",
    "seed": 1,
    "max_steps": 650,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "fp16": False,
    "bf16": True,
    "tokenizer": None,
    "vocab_size": 16384,
    "eval_dataset": None,
    "eval_fraction": 0.01,
    "logging_steps": 50,
    "entropy_steps": 50,
    "eval_strategy": "no",
    "save_strategy": "no",
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    # so far from uniform attention that the variants' entropies differ
    "initializer_range": 0.3,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "vocab_size": 300,
    "eval_fraction": 0.1,
    "logging_steps": 2,
    "entropy_steps": 2,
}
MB = 10**6


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/test_gpu.sh")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="everything at a tiny size on a CPU")
    options = parser.parse_args()
    # a shell may have started this with interruptions ignored, and so would be what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began, work, output = time.monotonic(), Path(os.environ["HF_HOME"]), options.output
    output.mkdir(parents=True, exist_ok=True)
    sweep = write_sweep(work, options.tiny)
    # the processors make the tokens while the GPU is tested
    preparation = threading.Thread(target=prepare, args=(sweep,), daemon=True)
    preparation.start()

    document: dict[str, Any] = {
        "device": machine(),
        "versions": library_versions(),
        "commit": find_commit(),
        "date": datetime.date.today().isoformat(),
    }
    document["tests"] = run_tests(work, options.tiny)
    document["benchmark"] = run_benchmark(work, options.tiny)
    preparation.join(timeout=60)
    limit = TRIED if options.tiny else WHOLE - (time.monotonic() - began)
    run("trainings", {"sweep": ["training.cli", "sweep", str(sweep), "--jobs", str(len(VARIANTS))]}, limit)
    document["schedule"], document["trainings"] = SCHEDULE | (TINY if options.tiny else {}), describe_trainings(sweep)
    document["seconds"] = time.monotonic() - began

    (output / "gpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw_entropies(document["trainings"]).savefig(output / "entropy.png")
    tests, rows = document["tests"], document["trainings"]
    print(f"\n{document['device']}: {tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} "
          f"skipped{'' if tests['ended'] else ', and the time was too short for the rest'}; "
          f"benchmark {'complete' if document['benchmark']['ended'] else 'incomplete'}; {document['seconds']:.0f} s; "
          f"{output}/gpu.json, {output}/entropy.png\n")  # fmt: skip
    steps, tokens = document["schedule"]["max_steps"], 128 * document["schedule"]["per_device_train_batch_size"]
    print(f"{len(VARIANTS)} trainings at once, {steps} steps of {tokens:,} tokens; entropies in nats, by layer\n")
    print("\n".join([*format_head(rows[0]), *map(format_row, rows)]))
    complete = tests["ended"] and document["benchmark"]["ended"] and all(row["perplexity"] for row in rows)
    return 0 if complete and not tests["failed"] else 1


def run(part: str, commands: dict[str, list[str]], limit: float) -> dict[str, int | None]:
    """
    The exit status of commands, arguments of `python -m` each, that run at the same time; None for what was
    interrupted after `limit` seconds. Several print one after the other, when all have ended.
    """
    print(f"\n== {part}", flush=True)
    logs = {name: Path(os.environ["HF_HOME"]) / f"{name}.txt" for name in commands}
    processes = {}
    for name, command in commands.items():
        with logs[name].open("w") as log:
            streams = {} if len(commands) == 1 else {"stdout": log, "stderr": subprocess.STDOUT}
            processes[name] = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True, **streams)
    end, status = time.monotonic() + limit, {}
    for name, process in processes.items():
        try:
            status[name] = process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            status[name] = None
            stop(process)
        if len(commands) > 1:
            print(f"-- {name}\n{logs[name].read_text(errors='replace')}", flush=True)
        if status[name] is None:
            print(f"{part}: {name} was interrupted after {limit:.0f} s", flush=True)
    return status


def stop(process: subprocess.Popen):
    """By an interruption, after which everything says how far it came; and what does not listen, at once."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_tests(work: Path, tiny: bool) -> dict[str, Any]:
    os.environ["LNFREE_GPU_DEVICE"] = "cpu" if tiny else "cuda"
    pytest = ["pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k"]
    reports = {name: work / f"{name}.xml" for name in GROUPS}
    commands = {name: [*pytest, names, f"--junitxml={reports[name]}"] for name, names in GROUPS.items()}
    status = run("tests", commands, TRIED if tiny else TESTS)
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for report in reports.values():
        # the suites that a report holds, of which pytest makes one
        for suite in ElementTree.parse(report).getroot() if report.is_file() else ():
            for name in counts:
                counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    # 1 is that of failures
    ended = all(code in (0, 1) for code in status.values())
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"], "ended": ended}


def run_benchmark(work: Path, tiny: bool) -> dict[str, Any]:
    path = work / "benchmark.json"
    command = ["training.cli", "benchmark", "attention", "passes", "training-entropy", "bf16", "--json", str(path)]
    if tiny:
        command += ["--sizes", "quick", "--rounds", "1", "--lengths", "64"]
    else:
        command += ["--sizes", "gpt2", "--rounds", "5", "--lengths", "1024", "4096", "16384", "32768", "--compiled"]
    status = run("benchmark", {"benchmark": command}, TRIED if tiny else BENCHMARK)
    return {"ended": status["benchmark"] == 0, **(read_json(path) if path.is_file() else {"sections": {}})}


def write_sweep(work: Path, tiny: bool) -> Path:
    """The sweep, and its corpus: files of this machine's site-packages in an order that follows from their text."""
    corpus, texts = work / "python.jsonl", {}
    for path in Path(torch.__file__).parents[1].rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if 100 < len(text) < MB:
            # not the hash of the text alone, which decides what is held out
            texts[hashlib.sha256(f"order {text}".encode()).digest()] = text
        if tiny and len(texts) == 100:
            break
    size, most = 0, MB if tiny else 60 * MB
    with corpus.open("w", encoding="utf-8") as file:
        for _, text in sorted(texts.items()):
            size += file.write(json.dumps({"content": text}) + "\n")
            if size > most:
                break
    path = work / "gpu.yaml"
    values = {**SCHEDULE, **(TINY if tiny else {}), "dataset": str(corpus), "output_dir": str(work / "runs")}
    path.write_text(yaml.safe_dump({**values, "grids": [{"variant": VARIANTS}]}), encoding="utf-8")
    return path


def prepare(sweep: Path):
    """Tokenizer and tokens into the cache, where all trainings find them."""
    values = yaml.safe_load(sweep.read_text(encoding="utf-8"))
    recipe = load_recipe(
        values.pop("recipe"), [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "grids"]
    )
    documents = load_documents(recipe.data, recipe.training["seed"])
    tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model["vocab_size"])
    tokenize_blocks(documents, tokenizer, recipe.data, recipe.training["seed"])


def describe_trainings(sweep: Path) -> list[dict[str, Any]]:
    """A row each; of what did not end, what was measured until then, and why."""
    rows = []
    for variant, job in zip(VARIANTS, load_sweep(sweep)[1], strict=True):
        folder, why, result = job.folder, "", None
        if (folder / RESULTS).is_file():
            result = read_results(folder)
        elif (folder / REPORT).is_file():
            why = describe_instability(read_json(folder / REPORT))
        else:
            log = (folder / LOG).read_text(errors="replace").splitlines() if (folder / LOG).is_file() else []
            why = log[-1] if log else "not begun"
        speeds, streams, entropies = (
            read_records(folder / f"{name}.jsonl") for name in ("speed", "residual_stream", "attention_entropy")
        )
        rows.append(
            {
                "variant": variant,
                "perplexity": result and result["perplexity"],
                "steps": max([record["step"] for record in speeds], default=0),
                "tokens/s": speeds[-1]["tokens_per_second"] if speeds else None,
                "largest stream": max((max(record["norm"]) for record in streams), default=None),
                "entropies": [sum(heads) / len(heads) for heads in entropies[-1]["entropy"]] if entropies else [],
                "not finished": why,
            }
        )
    return rows


def draw_entropies(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axis = figure.subplots()
    for row in rows:
        label = row["variant"] if row["perplexity"] else f"{row['variant']} (step {row['steps']})"
        axis.plot(row["entropies"], marker="o", markersize=4, label=label)
    axis.set(xlabel="layer", ylabel="attention entropy (nats)", title="Mean over heads, at the end")
    axis.xaxis.get_major_locator().set_params(integer=True)
    # above the largest, where overloaded heads are
    axis.set_ylim(0, 1.08 * max([1e-3, *(entropy for row in rows for entropy in row["entropies"])]))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    return figure


if __name__ == "__main__":
    sys.exit(main())
