"""
What measuring attention entropy adds to a forward pass, in time and in peak memory:

    python scripts/benchmark_entropy.py --json benchmark.json

Modes: `plain`, a forward pass with sdpa attention and without gradients; `record`, the same pass inside
`record_attention_entropy`; `maps`, the pass that everybody else needs, with eager attention and
`output_attentions=True`, then -sum p log p of the maps. What a mode adds is its figure less that of `plain`; in time,
the median of the differences within a round.

The model has the shape of GPT-2 small (width 768, 12 heads of 64, MLP 3072), but two layers and no language-model
head; batch 1, float32, random weights. With more layers the memory of `maps` grows, since it keeps the maps of all.

Time: medians over repeats in which the modes take turns, all in one process. Memory on the CPU (Linux only): each mode
runs in a process of its own, forked before any other computation, in which malloc returns what is freed at once. It
passes over a short input, resets the mark of its peak resident memory (/proc/self/clear_refs), runs the mode once, and
reports how far the mark (VmHWM) rose. On CUDA the allocator tells its peak.

Last, the share of training time that the callback of `lnfree train` takes: one measurement on its probe batch beside
the training steps of the recipe `quick` between two measurements, in the same process.
"""

import argparse
import ctypes
import importlib.metadata
import json
import math
import multiprocessing
import operator
import platform
import re
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from modeling_lnfree import LNFreeForCausalLM, record_attention_entropy
from training.callbacks import AttentionEntropyCallback
from training.recipe import load_recipe


# by their attention implementation
MODES = {"plain": "sdpa", "record": "sdpa", "maps": "eager"}
LENGTHS = (128, 512, 1024, 2048, 4096)
SHAPE = {"n_embd": 768, "n_head": 12, "n_layer": 2, "vocab_size": 1024}
MIB = 2**20
QUICK = Path(__file__).parents[1] / "training" / "recipes" / "quick.yaml"


def build_model(mode: str, length: int, device: str) -> GPT2Model:
    """GPT-2 without a head, with `length` positions and random weights, the same for every mode."""
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**SHAPE, n_positions=length, attn_implementation=MODES[mode], **special)
    return GPT2Model(config).eval().to(device)


@torch.no_grad()
def run_mode(mode: str, model: GPT2Model, input_ids: Tensor) -> Tensor | None:
    """One pass; returns the entropy `(layers, heads)` that the mode measures."""
    if mode == "record":
        with record_attention_entropy(model) as record:
            model(input_ids, use_cache=False)
        return record.entropy
    if mode == "plain":
        model(input_ids, use_cache=False)
        return None
    attentions = model(input_ids, use_cache=False, output_attentions=True).attentions
    # entr is -p log p, in one pass over the map
    return torch.stack([torch.special.entr(weights).sum(-1).mean((0, 2)) for weights in attentions]).cpu()


def measure_time(length: int, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """
    Median `seconds` of every mode, and `added_seconds` of `record` and `maps`, after one round to warm up in which the
    measured entropies are compared.
    """
    models = {mode: build_model(mode, length, device) for mode in MODES}
    input_ids = torch.randint(SHAPE["vocab_size"], (1, length), device=device)
    entropies = {mode: run_mode(mode, model, input_ids) for mode, model in models.items()}
    torch.testing.assert_close(entropies["record"], entropies["maps"], atol=1e-4, rtol=0)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    # a short pass varies more, and costs less
    for _ in range(repeats * max(1, 2048 // length)):
        for mode, model in models.items():
            _synchronize(device)
            start = time.perf_counter()
            run_mode(mode, model, input_ids)
            _synchronize(device)
            seconds[mode].append(time.perf_counter() - start)
    return {
        "seconds": {mode: statistics.median(values) for mode, values in seconds.items()},
        "added_seconds": {
            mode: statistics.median(map(operator.sub, seconds[mode], seconds["plain"])) for mode in ("record", "maps")
        },
    }


def measure_memory(mode: str, length: int, device: str) -> float:
    """Peak memory of one pass above what was taken before it, in MiB."""
    if device == "cuda":
        return _peak_cuda(mode, length)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_rss, args=(mode, length, sender))
    child.start()
    sender.close()
    peak = receiver.recv()
    child.join()
    return peak


def _peak_cuda(mode: str, length: int) -> float:
    model, input_ids = build_model(mode, length, "cuda"), torch.zeros(1, length, dtype=torch.long, device="cuda")
    run_mode(mode, model, input_ids[:, :16])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_mode(mode, model, input_ids)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _peak_rss(mode: str, length: int, sender: Connection):
    # M_MMAP_THRESHOLD: a tensor gets pages of its own, and kept or torn pages do not blur the mark
    ctypes.CDLL(None).mallopt(-3, 2**16)
    model, input_ids = build_model(mode, length, "cpu"), torch.zeros(1, length, dtype=torch.long)
    run_mode(mode, model, input_ids[:, :16])
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mark()
    run_mode(mode, model, input_ids)
    sender.send((_peak_mark() - before) / MIB)


def _peak_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def _synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def measure_callback(device: str, repeats: int) -> dict[str, float]:
    """
    Median `step_seconds` (forward, backward, clip, AdamW) of the recipe `quick` and `measure_seconds` of its entropy
    callback, and the `share` of the training time that measuring takes at the recipe's cadence.
    """
    recipe = load_recipe(QUICK)
    data, batch_size = recipe.data, recipe.training["per_device_train_batch_size"]
    model = LNFreeForCausalLM(recipe.build_config()).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    input_ids = torch.randint(model.config.vocab_size, (batch_size, data.block_size), device=device)
    probe = torch.randint(model.config.vocab_size, (data.entropy_sequences, data.block_size))
    callback = AttentionEntropyCallback(probe, data.entropy_steps, Path(), lambda scalars: None)

    def step():
        model(input_ids, labels=input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {"step_seconds": [], "measure_seconds": []}
    for index in range(repeats + 1):
        for name, run in (("step_seconds", step), ("measure_seconds", lambda: callback.measure(model))):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    between = data.entropy_steps * medians["step_seconds"]
    return {**medians, "share": medians["measure_seconds"] / (between + medians["measure_seconds"])}


def growth_exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(T) by least squares; NaN for one length, or if a value is not above 0."""
    if len(lengths) < 2 or min(values) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(t) for t in lengths], [math.log(v) for v in values]).slope


def benchmark(device: str, lengths: list[int], repeats: int) -> dict[str, Any]:
    """
    Figures of one device: `rows`, one a length, with the figures of `measure_time` and the peak `mib` of every mode;
    `growth`, the exponents of the time that `record` and `maps` add and of the peak memory of their passes;
    `callback`, the figures of `measure_callback`.
    """
    # memory first: on the CPU the processes are forked while this one has computed nothing
    memory = {length: {mode: measure_memory(mode, length, device) for mode in MODES} for length in lengths}
    rows = [{"T": length, **measure_time(length, device, repeats), "mib": memory[length]} for length in lengths]
    growth = {
        mode: {
            "added_seconds": growth_exponent(lengths, [row["added_seconds"][mode] for row in rows]),
            "peak_mib": growth_exponent(lengths, [row["mib"][mode] for row in rows]),
        }
        for mode in ("record", "maps")
    }
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    callback = measure_callback(device, repeats)
    return {"device": name, "repeats": repeats, "rows": rows, "growth": growth, "callback": callback}


def to_markdown(results: dict[str, Any]) -> str:
    """The table of one device."""
    lines = [
        f"{results['device']}; GPT-2 small's width with {SHAPE['n_layer']} layers, batch 1, float32; medians of "
        f"{results['repeats']} rounds (more at T < 2048, as many times as T is shorter).",
        "",
        "| T | plain pass (ms) | `record` adds (ms) | maps add (ms) | maps / `record` | pass: `record` / plain "
        "| pass: maps / plain | plain peak (MiB) | `record` adds (MiB) | maps add (MiB) |",
        "|---:" * 10 + "|",
    ]
    for row in results["rows"]:
        seconds, added, mib = row["seconds"], row["added_seconds"], row["mib"]
        lines.append(
            f"| {row['T']} | {1e3 * seconds['plain']:.1f} | {1e3 * added['record']:.1f} | {1e3 * added['maps']:.1f} "
            f"| {added['maps'] / added['record']:.1f} | {seconds['record'] / seconds['plain']:.2f} "
            f"| {seconds['maps'] / seconds['plain']:.2f} | {mib['plain']:.1f} "
            f"| {mib['record'] - mib['plain']:.1f} | {mib['maps'] - mib['plain']:.1f} |"
        )
    record, maps = (results["growth"][mode] for mode in ("record", "maps"))
    callback = results["callback"]
    lines += [
        "",
        f"Powers of T: of the added time `record` {record['added_seconds']:.2f}, maps {maps['added_seconds']:.2f}; of "
        f"the peak memory of a pass, `record` {record['peak_mib']:.2f}, maps {maps['peak_mib']:.2f}.",
        "",
        f"Training by the recipe `quick`: a step {1e3 * callback['step_seconds']:.0f} ms, a measurement "
        f"{1e3 * callback['measure_seconds']:.0f} ms, {100 * callback['share']:.2f} % of the training time.",
    ]
    return "\n".join(lines)


def main():
    """Prints a Markdown table a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    # the CPU first: no process may be forked once CUDA is in use
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = []
    for device in devices:
        results.append(benchmark(device, sorted(arguments.lengths), arguments.repeats))
        print(to_markdown(results[-1]), end="\n\n")
    if arguments.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        document = {"shape": SHAPE, "results": results, "versions": {"python": platform.python_version(), **versions}}
        Path(arguments.json).write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
