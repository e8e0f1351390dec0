"""
`lnfree benchmark`: what training, measuring, generating and starting cost, beside what a user would take instead.

Every figure is a median over rounds in which the alternatives take turns in one process, after one round to warm up,
so that the ratios hold where the milliseconds do not. Peak memory on the CPU (Linux only): one process is forked for
each alternative, in which malloc returns what is freed at once; it warms up, resets the mark of its peak resident
memory (/proc/self/clear_refs), runs once, and reports how far the mark (VmHWM) rose. On CUDA the allocator tells.
"""

import ctypes
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Trainer,
    TrainingArguments,
)

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM, record_attention_entropy
from modeling_lnfree.modeling_lnfree import build_linear

from ..errors import UserError
from ..files import write_atomically
from ..quantities import AttentionEntropy, ResidualStream, ZeroActivations
from ..recipe import load_recipe
from ..train.callbacks import MeasurementCallback
from ..train.plan import ATTENTION_FLOPS


MIB = 2**20
QUICK = Path(__file__).parents[1] / "recipes" / "quick.yaml"
# the quick start's model, and the paper's (arXiv 2410.09637)
SIZES = {
    "quick": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 2048},
    "gpt2": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50257},
    "pythia70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 50304},
}
PYTHIA = {"position_embedding_type": "rotary", "parallel_residual": True, "tie_word_embeddings": False}
Run = Callable[[], Any]


def build_lnfree(variant: str, size: str, length: int, device: str, **kwargs) -> LNFreeForCausalLM:
    """The variant at one of `SIZES`, with the paper's biases and random weights."""
    fields = {**SIZES[size], **(PYTHIA if size == "pythia70m" else {})}
    config = LNFreeConfig.from_variant(variant, max_position_embeddings=length, **{**fields, **kwargs})
    return LNFreeForCausalLM(config).to(device)


def build_stock(size: str, length: int, device: str, relu: bool = False, **kwargs) -> nn.Module:
    """
    transformers' own model of the same size; with ReLU in place of GELU on request. The dropout is the paper's, on the
    embeddings alone: GPT-2's own, on attention and residuals too, would cost it time that has to do with neither norm
    nor activation.
    """
    fields = SIZES[size]
    if size == "pythia70m":
        act = {"hidden_act": "relu"} if relu else {}
        config = GPTNeoXConfig(
            max_position_embeddings=length, intermediate_size=4 * fields["hidden_size"], **fields, **act
        )
        return GPTNeoXForCausalLM._from_config(config, **kwargs).to(device)
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    act = {"activation_function": "relu"} if relu else {}
    others = {"bos_token_id": None, "eos_token_id": None, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(
        n_positions=length, **{names.get(name, name): value for name, value in fields.items()}, **act, **others
    )
    return GPT2LMHeadModel._from_config(config, **kwargs).to(device)


def take_turns(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round; before the first one every run warms up once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(build: Callable[[], tuple[Run, Run]], device: str) -> float:
    """Peak memory of a run above what was taken before it, in MiB; `build` makes a run that warms up, and the run."""
    if device == "cuda":
        warm_up, run = build()
        warm_up()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    # a thread has an arena of its own in malloc: what this process has freed would serve its tensors, and hide them
    thread = threading.Thread(target=_peak_rss, args=(build, sender))
    child = context.Process(target=lambda: (thread.start(), thread.join()))
    child.start()
    sender.close()
    peak = receiver.recv()
    child.join()
    return peak


def _peak_rss(build: Callable[[], tuple[Run, Run]], sender):
    # the threads of the process that forked are not here, and the pool would wait for them
    torch.set_num_threads(1)
    # M_MMAP_THRESHOLD: a tensor gets pages of its own, and kept or torn pages do not blur the mark
    ctypes.CDLL(None).mallopt(-3, 2**16)
    warm_up, run = build()
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mark()
    run()
    sender.send((_peak_mark() - before) / MIB)


def _peak_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def _synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(tokens: int, width: int, device: str) -> float:
    """FLOP/s of the machine in float32 at the feed-forward layer's shape, by the library that the model takes."""
    layer, states = build_linear(width, 4 * width).to(device), torch.randn(tokens, width, device=device)
    with torch.no_grad():
        seconds = medians(take_turns({"layer": lambda: layer(states)}, 20, device))["layer"]
    return 2 * states.numel() * layer.out_features / seconds


def growth_exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(size) by least squares; NaN for one size, or if a value is not above 0."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def training_step(model: nn.Module, input_ids: Tensor, measure: str | None = None) -> Run:
    """Forward, backward, clip, AdamW; with `measure`, also the entropy of every head by `record` or by `maps`."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        if measure == "record":
            with record_attention_entropy(model) as record:
                loss = model(input_ids, labels=input_ids, use_cache=False).loss
            record.entropy.mean()
        elif measure == "maps":
            output = model(input_ids, labels=input_ids, use_cache=False, output_attentions=True)
            loss = output.loss
            entropy_of_maps(output.attentions)
        else:
            loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def entropy_of_maps(attentions: tuple[Tensor, ...]) -> Tensor:
    """Mean entropy `(layers, heads)` of the attention maps; entr is -p log p, in one pass over a map."""
    return torch.stack([torch.special.entr(weights).sum(-1).mean((0, 2)) for weights in attentions]).cpu()


def benchmark_step(sizes: list[str], rounds: int, device: str, compiled: bool) -> Iterator[dict[str, Any]]:
    """Training steps of the variants and of the stock model of the same size; 1,024 tokens each, 2,048 for `quick`."""
    for size in sizes:
        for length, batch in ((128, 16),) if size == "quick" else ((128, 8), (256, 4), (1024, 1)):
            input_ids = torch.randint(SIZES[size]["vocab_size"], (batch, length), device=device)
            builds = {
                **{v: partial(build_lnfree, v, size, length, device) for v in ("SM+R", "SM+G", "SM+LN+G")},
                "stock": partial(build_stock, size, length, device),
                "stock, ReLU": partial(build_stock, size, length, device, relu=True),
            }

            def prepare(build, input_ids=input_ids):
                step = training_step(build(), input_ids)
                return step, step

            mib = {name: peak_memory(lambda build=build: prepare(build), device) for name, build in builds.items()}
            for mode in ("eager", "compiled") if compiled else ("eager",):
                models = {name: build() for name, build in builds.items()}
                flops = {name: count_flops(model, input_ids) for name, model in models.items()}
                if mode == "compiled":
                    # past a number of graphs, which all models count towards, torch goes back to eager and says little
                    torch.compiler.reset()
                    models = {name: torch.compile(model) for name, model in models.items()}
                steps = {name: training_step(model, input_ids) for name, model in models.items()}
                seconds = medians(take_turns(steps, rounds, device))
                rate = matmul_rate(input_ids.numel(), SIZES[size]["hidden_size"], device)
                yield from [
                    {
                        "size": size,
                        "T": length,
                        "mode": mode,
                        "model": name,
                        "ms": 1e3 * seconds[name],
                        "of stock": seconds[name] / seconds["stock"],
                        "of stock, ReLU": seconds[name] / seconds["stock, ReLU"],
                        "of matmul rate": flops[name] / seconds[name] / rate,
                        "peak MiB": mib[name] if mode == "eager" else None,
                        "peak of stock": mib[name] / mib["stock"] if mode == "eager" else None,
                    }
                    for name in models
                ]
                del models, steps


def count_flops(model: nn.Module, input_ids: Tensor) -> int:
    """FLOP of the products of a training step, forward and backward; on the CPU the causal half of attention's."""
    causal = {
        kernel: lambda *args, count=count, **kwargs: count(*args, **kwargs) // 2
        for kernel, count in ATTENTION_FLOPS.items()
    }
    with FlopCounterMode(display=False, custom_mapping=causal) as counter:
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def benchmark_entropy(rounds: int, device: str, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """
    What measuring adds to a forward pass without gradients: `record` to one with sdpa, and the maps that everybody
    else needs (eager attention and `output_attentions=True`, then -sum p log p). Two layers of GPT-2 small without a
    head, batch 1: with more layers the memory of the maps grows, since all are kept.
    """
    for length in lengths:
        input_ids = torch.randint(1024, (1, length), device=device)

        def prepare(mode, length=length, input_ids=input_ids):
            torch.manual_seed(0)
            special = {"bos_token_id": None, "eos_token_id": None}
            config = GPT2Config(n_embd=768, n_head=12, n_layer=2, vocab_size=1024, n_positions=length, **special)
            attention = "eager" if mode == "maps" else "sdpa"
            model = GPT2Model._from_config(config, attn_implementation=attention).eval().to(device)

            @torch.no_grad()
            def run(ids=input_ids):
                if mode == "plain":
                    return model(ids, use_cache=False)
                if mode == "maps":
                    return entropy_of_maps(model(ids, use_cache=False, output_attentions=True).attentions)
                with record_attention_entropy(model) as record:
                    model(ids, use_cache=False)
                return record.entropy

            return lambda: run(input_ids[:, :16]), run

        modes = ("plain", "record", "maps")
        # memory first: on the CPU the processes are forked while this one has computed little
        mib = {mode: peak_memory(lambda mode=mode: prepare(mode), device) for mode in modes}
        runs = {mode: prepare(mode)[1] for mode in modes}
        torch.testing.assert_close(runs["record"](), runs["maps"](), atol=1e-4, rtol=0)
        # a short pass varies more, and costs less
        seconds = take_turns(runs, rounds * max(1, 2048 // length), device)
        added = {
            mode: statistics.median(s - plain for s, plain in zip(seconds[mode], seconds["plain"], strict=True))
            for mode in ("record", "maps")
        }
        yield {
            "T": length,
            "plain ms": 1e3 * statistics.median(seconds["plain"]),
            "record adds ms": 1e3 * added["record"],
            "maps add ms": 1e3 * added["maps"],
            "maps / record": added["maps"] / added["record"],
            "plain MiB": mib["plain"],
            "record adds MiB": mib["record"] - mib["plain"],
            "maps add MiB": mib["maps"] - mib["plain"],
        }


def benchmark_entropy_in_training(sizes: list[str], rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """SM+R's training step, the same with entropy measured in it, and the published way; 2,048 tokens or more."""
    for size in sizes:
        for length in (128, 1024) if size == "quick" else (128, 1024, 4096):
            input_ids = torch.randint(SIZES[size]["vocab_size"], (max(1, 2048 // length), length), device=device)

            def prepare(measure, size=size, length=length, input_ids=input_ids):
                attention = "eager" if measure == "maps" else "sdpa"
                model = build_lnfree("SM+R", size, length, device, attn_implementation=attention)
                step = training_step(model, input_ids, measure)
                return step, step

            ways = {"plain": None, "record": "record", "maps": "maps"}
            mib = {name: peak_memory(lambda way=way: prepare(way), device) for name, way in ways.items()}
            seconds = medians(take_turns({name: prepare(way)[1] for name, way in ways.items()}, rounds, device))
            yield {
                "size": size,
                "T": length,
                "plain ms": 1e3 * seconds["plain"],
                "record / plain": seconds["record"] / seconds["plain"],
                "record / maps": seconds["record"] / seconds["maps"],
                "record adds MiB": mib["record"] - mib["plain"],
                "maps add MiB": mib["maps"] - mib["plain"],
            }


def benchmark_callback(rounds: int, device: str) -> list[dict[str, Any]]:
    """The share of training time that the measurements of `lnfree train` take by the recipe `quick`, SM+R."""
    recipe = load_recipe(QUICK)
    data, batch_size = recipe.data, recipe.training["per_device_train_batch_size"]
    model = build_lnfree("SM+R", "quick", data.block_size, device)
    input_ids = torch.randint(model.config.vocab_size, (batch_size, data.block_size), device=device)
    probe = {"input_ids": torch.randint(model.config.vocab_size, (data.entropy_sequences, data.block_size))}
    measured = {"entropy": [AttentionEntropy()], "all": [AttentionEntropy(), ResidualStream(), ZeroActivations()]}
    runs = {"step": training_step(model, input_ids)}
    for name, quantities in measured.items():
        callback = MeasurementCallback(quantities, probe, data.entropy_steps, Path(), lambda scalars: None)
        runs[name] = partial(callback.measure, model)
    seconds = medians(take_turns(runs, rounds, device))
    between = data.entropy_steps * seconds["step"]
    return [
        {
            "measured": name,
            "step ms": 1e3 * seconds["step"],
            "measurement ms": 1e3 * seconds[name],
            "share of the time": seconds[name] / (between + seconds[name]),
        }
        for name in measured
    ]


def benchmark_generation(sizes: list[str], rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """128 tokens after a prompt of 16, greedy, by SM+R and by the stock model; weights read over what a sum reads."""
    read = torch.ones(2**28 // 4, device=device)
    bandwidth = 2**28 / medians(take_turns({"read": read.sum}, 10, device))["read"]
    for size in sizes:
        models = {
            "SM+R": build_lnfree("SM+R", size, 144, device).eval(),
            "stock": build_stock(size, 144, device).eval(),
        }
        for batch in (1, 32):
            prompt = torch.randint(SIZES[size]["vocab_size"], (batch, 16), device=device)
            for cache in ("dynamic", "static"):

                def generate(model, prompt=prompt, cache=cache):
                    lengths = {"min_new_tokens": 128, "max_new_tokens": 128}
                    model.generate(
                        prompt,
                        do_sample=False,
                        pad_token_id=0,
                        cache_implementation=cache,
                        disable_compile=True,
                        **lengths,
                    )

                runs = {name: lambda model=model: generate(model) for name, model in models.items()}
                seconds = medians(take_turns(runs, rounds, device))
                layers = (layer for layer in models["SM+R"].modules() if isinstance(layer, nn.Linear))
                weights = sum(layer.weight.nbytes for layer in layers)
                yield {
                    "size": size,
                    "batch": batch,
                    "cache": cache,
                    "SM+R tokens/s": 128 * batch / seconds["SM+R"],
                    "stock tokens/s": 128 * batch / seconds["stock"],
                    "speed-up": seconds["stock"] / seconds["SM+R"],
                    "of bandwidth": 128 * weights / seconds["SM+R"] / bandwidth,
                }


def benchmark_command(rounds: int, steps: int = 60) -> list[dict[str, Any]]:
    """
    Tokens per second of `lnfree train` by the recipe `quick`, with all that it measures and writes, and of a plain
    Trainer on stock GPT-2 with the same arguments and blocks; beside the bare training step of either model. The last
    row is tokenising 200 documents without the cache, which is to be faster than any training.
    """
    from datasets import Dataset

    from ..data import load_documents, load_tokenizer, tokenize_blocks
    from ..train.loop import train

    rows: dict[str, list[float]] = {"lnfree train": [], "Trainer, stock": []}
    waiting = []
    # what training prints does not belong among the tables
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        for index in range(rounds):
            base = [f"max_steps={steps}", f"save_steps={steps}", "disable_tqdm=true", "variant=SM+R"]
            recipe = load_recipe(QUICK, [*base, f"output_dir={folder}/{index}"])
            result = json.loads((train(recipe) / "results.json").read_text(encoding="utf-8"))
            rows["lnfree train"].append(result["train_tokens"] / result["train_seconds"])
            waiting.append(result["data_seconds"] / result["train_seconds"])
            documents = load_documents(recipe.data, 0)
            tokenizer = load_tokenizer(recipe.data, documents["train"], recipe.model["vocab_size"])
            blocks = tokenize_blocks(documents, tokenizer, recipe.data)["train"]
            arguments = TrainingArguments(**{**recipe.training, "output_dir": f"{folder}/stock-{index}"})
            trainer = Trainer(build_stock("quick", 128, "cpu"), arguments, _collate, blocks)
            seconds = trainer.train().metrics["train_runtime"]
            rows["Trainer, stock"].append(result["train_tokens"] / seconds)
    part = {"train": Dataset.from_dict(documents["train"][:200])}
    tokens = len(tokenize_blocks(part, tokenizer, recipe.data)["train"]) * recipe.data.block_size
    tokenise = {"tokenising": lambda: tokenize_blocks(part, tokenizer, recipe.data)}
    input_ids = torch.randint(2048, (16, 128))
    models = {
        "lnfree train": build_lnfree("SM+R", "quick", 128, "cpu"),
        "Trainer, stock": build_stock("quick", 128, "cpu"),
    }
    # one after the other, as in training: by turns, each would find its memory taken by the other
    steps_of = {name: training_step(model, input_ids) for name, model in models.items()}
    ten = {name: lambda step=step: [step() for _ in range(10)] for name, step in steps_of.items()}
    bare = {name: seconds / 10 for name, seconds in medians(take_turns(ten, rounds, "cpu")).items()}
    return [
        {
            "command": name,
            "tokens/s": statistics.median(values),
            "bare step tokens/s": input_ids.numel() / bare[name],
            "time outside the model": 1 - statistics.median(values) * bare[name] / input_ids.numel(),
            "share waiting for data": statistics.median(waiting) if name == "lnfree train" else None,
        }
        for name, values in rows.items()
    ] + [
        {
            "command": "tokenising",
            "tokens/s": tokens / medians(take_turns(tokenise, rounds, "cpu"))["tokenising"],
            **dict.fromkeys(("bare step tokens/s", "time outside the model", "share waiting for data")),
        }
    ]


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def benchmark_start(rounds: int) -> list[dict[str, Any]]:
    """Seconds to import, to `--help`, and from the command to the first step with a cold and a warm data cache."""

    def run(*command: str, **environment) -> Run:
        return lambda: subprocess.run(
            [sys.executable, *command], check=True, capture_output=True, env={**os.environ, **environment}
        )

    torch_and_transformers = "import torch, transformers; from transformers import PreTrainedModel, Trainer"
    seconds = medians(
        take_turns(
            {
                "import of torch and transformers": run("-c", torch_and_transformers),
                "the same and modeling_lnfree": run("-c", f"{torch_and_transformers}; import modeling_lnfree"),
                "lnfree --help": run("-m", "training.cli", "--help"),
            },
            rounds,
            "cpu",
        )
    )
    with tempfile.TemporaryDirectory() as home:
        seconds["first step, cold data cache"] = _first_step(home)
        warm = [_first_step(home) for _ in range(rounds)]
        seconds["first step, warm data cache"] = statistics.median(warm)
    return [{"what": name, "s": value} for name, value in seconds.items()]


def _first_step(home: str) -> float:
    """Seconds from the command to the measurement before the first step of a run of the recipe `quick`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "training.cli", "train", str(QUICK), f"output_dir={folder}/run"]
        start = time.perf_counter()
        with subprocess.Popen(
            command, env={**os.environ, "HF_HOME": home}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            first = Path(folder) / "run" / "attention_entropy.jsonl"
            while process.poll() is None and not (first.is_file() and first.stat().st_size):
                time.sleep(0.02)
            seconds = time.perf_counter() - start
            process.kill()
        if not first.is_file():
            raise UserError("the training command ended before its first step")
    return seconds


def benchmark_growth(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """
    Exponents of SM+R from the quick start's size on, over one dimension at a time: of a training step, of one with
    entropy measured, and of generating 16 tokens after a prompt of T.
    """
    base = {"T": 128, "batch": 4, "width": 128, "depth": 6}
    scales = {"T": [256, 512, 1024], "batch": [4, 8, 16], "width": [128, 256, 512], "depth": [4, 8, 16]}

    def prepare(what, at):
        fields = {
            "hidden_size": at["width"],
            "num_hidden_layers": at["depth"],
            "num_attention_heads": at["width"] // 32,
        }
        model = build_lnfree("SM+R", "quick", at["T"] + 16, device, **fields)
        input_ids = torch.randint(2048, (at["batch"], at["T"]), device=device)
        if what == "generating":
            return partial(model.eval().generate, input_ids, do_sample=False, min_new_tokens=16, max_new_tokens=16)
        return training_step(model, input_ids, "record" if what == "the same with entropy" else None)

    for what in ("training step", "the same with entropy", "generating"):
        for dimension, values in scales.items():
            runs = {str(value): prepare(what, {**base, dimension: value}) for value in values}
            seconds = medians(take_turns(runs, rounds, device))
            yield {
                "what": what,
                "over": dimension,
                "values": ", ".join(runs),
                "ms": ", ".join(f"{1e3 * value:.0f}" for value in seconds.values()),
                "exponent": growth_exponent(values, list(seconds.values())),
            }


SECTIONS = {
    "step": "A training step",
    "entropy": "What measuring attention entropy adds to a forward pass",
    "training-entropy": "Entropy measured in every training step",
    "callback": "What is measured on the way, at the recipe's cadence",
    "generation": "Generating 128 tokens",
    "command": "The training command",
    "start": "Starting",
    "growth": "Growth of training and generating",
}


def benchmark(
    sections: list[str],
    sizes: list[str],
    rounds: int,
    lengths: list[int],
    compiled: bool = False,
    json_path: str | None = None,
) -> dict[str, Any]:
    """
    Runs the sections of `SECTIONS` (all if none is named) at the sizes of `SIZES`, and prints a Markdown table for
    each, row by row.

    Args:
        rounds: over which the medians are taken.
        lengths: sequence lengths of the section `entropy`.
        compiled: the section `step` also with `torch.compile`.
        json_path: file of all figures, written anew after each row.

    Raises:
        UserError: for a section or a size that there is not, and for a number below 1.
    """
    sections = sections or list(SECTIONS)
    for value in (rounds, *lengths):
        if value < 1:
            raise UserError(f"rounds and lengths must be at least 1, got {value}")
    for name, given, known in (("section", sections, SECTIONS), ("size", sizes, SIZES)):
        for value in given:
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    document = {"device": name, "rounds": rounds, "versions": {"python": platform.python_version(), **versions}}
    print(
        f"{name}; medians of {rounds} rounds; torch {versions['torch']}, transformers {versions['transformers']}",
        end="\n\n",
    )
    runs = {
        "step": lambda: benchmark_step(sizes, rounds, device, compiled),
        "entropy": lambda: benchmark_entropy(rounds, device, lengths),
        "training-entropy": lambda: benchmark_entropy_in_training(sizes, rounds, device),
        "callback": lambda: benchmark_callback(rounds, device),
        "generation": lambda: benchmark_generation(sizes, rounds, device),
        "command": lambda: benchmark_command(rounds),
        "start": lambda: benchmark_start(rounds),
        "growth": lambda: benchmark_growth(rounds, device),
    }
    document["sections"] = {}
    for section in sections:
        rows = document["sections"][section] = []
        print(f"## {SECTIONS[section]}\n")
        # row by row: at the paper's sizes each takes minutes
        for row in runs[section]():
            if not rows:
                print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
            print(f"| {' | '.join(_format(name, value) for name, value in row.items())} |", flush=True)
            rows.append(row)
            if json_path is not None:
                write_atomically(Path(json_path), json.dumps(document, indent=1))
        print(flush=True)
    return document


def _processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if match:
            return match[1]
    return platform.processor() or "CPU"


def _format(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if name.startswith(("of ", "peak of", "record /", "maps /", "speed-up", "exponent", "share", "time outside")):
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
