"""The sections of the benchmark, a function each, which gives the rows of its table one by one."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, GPT2Config, PreTrainedModel, Trainer, TrainingArguments

from modeling_lnfree import record_attention_entropy, use_fast_cpu
from modeling_lnfree.variants import BASELINE, rename_variant

from ..catalog import find_file, read_values
from ..errors import UserError
from ..parametrization import parametrize_weights, update_spectral_norms
from ..quantities import BatchEntropy, Outliers, Quantity, ResidualStream, ZeroActivations
from ..recipe import load_recipe
from ..runs import read_results
from ..train.callbacks import MeasurementCallback
from .gpu import TOKENS, benchmark_attention, benchmark_bf16, benchmark_passes
from .models import (
    SIZES,
    build_lnfree,
    build_stock,
    count_flops,
    entropy_of_maps,
    matmul_rate,
    training_step,
)
from .timing import Action, Row, Settings, growth_exponent, medians, peak_memory, take_turns


def _fast(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return use_fast_cpu(build())


def benchmark_step(settings: Settings) -> Iterator[Row]:
    """
    Training steps of the variants and of the stock model of the same size, in float32; 1,024 tokens each, 2,048 for
    `quick`, 16,384 on a GPU. On a CPU all of them plainly and by `use_fast_cpu`: what comes from LayerNorm is told
    from what comes from the library.
    """
    device, rounds = settings.device, settings.rounds
    ways = (False, True) if device == "cpu" else (False,)
    for size in settings.sizes:
        for length in (128,) if size == "quick" else (128, 256, 1024):
            batch = (2048 if size == "quick" and device == "cpu" else TOKENS[device]) // length
            input_ids = torch.randint(SIZES[size]["vocab_size"], (batch, length), device=device)
            plain: dict[str, Callable[[], PreTrainedModel]] = {
                **{v: partial(build_lnfree, v, size, length, device) for v in ("SM+R", "SM+G", "SM+LN+G")},
                "stock": partial(build_stock, size, length, device),
                "stock, ReLU": partial(build_stock, size, length, device, relu=True),
            }
            builds: dict[tuple[str, bool], Callable[[], PreTrainedModel]] = {
                (name, fast): partial(_fast, build) if fast else build
                for fast in ways
                for name, build in plain.items()
            }

            def prepare(build, input_ids=input_ids):
                step = training_step(build(), input_ids)
                return step, step

            mib = {name: peak_memory(partial(prepare, build), device) for name, build in builds.items()}
            for mode in ("eager", "compiled") if settings.compiled else ("eager",):
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
                        "fast CPU": fast,
                        "ms": 1e3 * seconds[name, fast],
                        "of stock": seconds[name, fast] / seconds["stock", fast],
                        "of stock, ReLU": seconds[name, fast] / seconds["stock, ReLU", fast],
                        "of plain": seconds[name, fast] / seconds[name, False],
                        "of matmul rate": flops[name, fast] / seconds[name, fast] / rate,
                        "peak MiB": mib[name, fast] if mode == "eager" else None,
                        "peak of stock": mib[name, fast] / mib["stock", fast] if mode == "eager" else None,
                    }
                    for name, fast in models
                ]
                del models, steps


def benchmark_optimizer(settings: Settings) -> Iterator[Row]:
    """Training steps of SM+R at T=128 by AdamW alone, and by Muon for the matrices of the layers."""
    device = settings.device
    for size in settings.sizes:
        input_ids = torch.randint(SIZES[size]["vocab_size"], (16 if size == "quick" else 8, 128), device=device)

        def prepare(name, size=size, input_ids=input_ids):
            model = build_lnfree("SM+R", size, 128, device)
            step = training_step(model, input_ids, layer_optimizer=name)
            return step, step

        names = ("adamw", "muon")
        mib = {name: peak_memory(partial(prepare, name), device) for name in names}
        seconds = medians(take_turns({name: prepare(name)[0] for name in names}, settings.rounds, device))
        yield from [
            {
                "size": size,
                "tokens": input_ids.numel(),
                "layer optimizer": name,
                "ms": 1e3 * seconds[name],
                "of adamw": seconds[name] / seconds["adamw"],
                "peak MiB": mib[name],
            }
            for name in names
        ]


def benchmark_designs(settings: Settings) -> Iterator[Row]:
    """
    Training steps by Muon of every design that the sweep `designs` compares, the fastest first: 2,048 tokens at the
    size of `quick`.
    """
    device = settings.device
    grids = read_values(find_file("designs", "sweep"), "sweep")["grids"]
    named = [(variant, grid.get("preset")) for grid in grids for variant in _as_list(grid["variant"])]
    # a preset that a grid names for all its variants
    variants = list(dict.fromkeys(rename_variant(v, preset=preset) if preset else v for v, preset in named))
    input_ids = torch.randint(SIZES["quick"]["vocab_size"], (16, 128), device=device)

    def prepare(variant):
        model = use_fast_cpu(build_lnfree(variant, "quick", 128, device))
        step = training_step(model, input_ids, layer_optimizer="muon")
        return step, step

    mib = {variant: peak_memory(partial(prepare, variant), device) for variant in variants}
    seconds = medians(take_turns({variant: prepare(variant)[0] for variant in variants}, settings.rounds, device))
    yield from [
        {
            "design": variant,
            "ms": 1e3 * seconds[variant],
            "of SM+LN+G": seconds[variant] / seconds[BASELINE],
            "peak MiB": mib[variant],
            "peak of SM+LN+G": mib[variant] / mib[BASELINE],
        }
        for variant in sorted(variants, key=seconds.__getitem__)
    ]


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def benchmark_entropy(settings: Settings) -> Iterator[Row]:
    """
    What measuring adds to a forward pass without gradients: `record` to one with sdpa, and the maps that everybody
    else needs (eager attention and `output_attentions=True`, then -sum p log p). Two layers of GPT-2 small without a
    head, batch 1: with more layers the memory of the maps grows, since all are kept.
    """
    device, rounds = settings.device, settings.rounds
    for length in settings.lengths:
        input_ids = torch.randint(1024, (1, length), device=device)

        def prepare(mode, length=length, input_ids=input_ids):
            torch.manual_seed(0)
            special = {"bos_token_id": None, "eos_token_id": None}
            config = GPT2Config(n_embd=768, n_head=12, n_layer=2, vocab_size=1024, n_positions=length, **special)
            attention = "eager" if mode == "maps" else "sdpa"
            model = AutoModel.from_config(config, attn_implementation=attention).eval().to(device)

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
        mib = {mode: peak_memory(partial(prepare, mode), device) for mode in modes}
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


def benchmark_entropy_in_training(settings: Settings) -> Iterator[Row]:
    """
    SM+R's training step, the same with entropy measured in it, and the published way; 2,048 tokens or more, on a GPU
    16,384 in bfloat16 autocast.
    """
    device, rounds = settings.device, settings.rounds
    tokens, dtype = (TOKENS["cuda"], torch.bfloat16) if device == "cuda" else (2048, None)
    for size in settings.sizes:
        for length in (128, 1024) if size == "quick" or device == "cuda" else (128, 1024, 4096):
            input_ids = torch.randint(SIZES[size]["vocab_size"], (max(1, tokens // length), length), device=device)

            def prepare(measure, size=size, length=length, input_ids=input_ids):
                attention = "eager" if measure == "maps" else "sdpa"
                model = use_fast_cpu(build_lnfree("SM+R", size, length, device, attn_implementation=attention))
                step = training_step(model, input_ids, measure, dtype=dtype)
                return step, step

            ways = {"plain": None, "record": "record", "maps": "maps"}
            mib = {name: peak_memory(partial(prepare, way), device) for name, way in ways.items()}
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


def benchmark_methods(settings: Settings) -> Iterator[Row]:
    """
    SM+R's training step with AERO's penalty on entropy, beside one without it, one that only measures, and one that
    takes the penalty from maps; 2,048 tokens. And with the matrices of the layers under sigma-reparametrization, the
    power iteration after the step included.
    """
    device = settings.device
    ways = {"plain": None, "record": "record", "penalty": "penalty", "map penalty": "map penalty", "sigma": None}
    for size in settings.sizes:
        for length in (128, 1024):
            input_ids = torch.randint(SIZES[size]["vocab_size"], (2048 // length, length), device=device)

            def prepare(way, size=size, length=length, input_ids=input_ids):
                attention = "eager" if way == "map penalty" else "sdpa"
                model = build_lnfree("SM+R", size, length, device, attn_implementation=attention)
                if way != "sigma":
                    step = training_step(model, input_ids, ways[way])
                    return step, step
                parametrize_weights(model, "sigma_reparam")
                train = training_step(model, input_ids)

                def step():
                    train()
                    update_spectral_norms(model)

                return step, step

            mib = {way: peak_memory(partial(prepare, way), device) for way in ways}
            seconds = medians(take_turns({way: prepare(way)[1] for way in ways}, settings.rounds, device))
            yield {
                "size": size,
                "T": length,
                "plain ms": 1e3 * seconds["plain"],
                "record / plain": seconds["record"] / seconds["plain"],
                "penalty / plain": seconds["penalty"] / seconds["plain"],
                "penalty / map penalty": seconds["penalty"] / seconds["map penalty"],
                "penalty adds MiB": mib["penalty"] - mib["plain"],
                "map penalty adds MiB": mib["map penalty"] - mib["plain"],
                "sigma / plain": seconds["sigma"] / seconds["plain"],
            }


def benchmark_callback(settings: Settings) -> list[Row]:
    """The share of training time that the measurements of `lnfree train` take by the recipe `quick`, SM+R."""
    device, rounds = settings.device, settings.rounds
    recipe = load_recipe("quick")
    data, batch_size = recipe.data, recipe.training["per_device_train_batch_size"]
    model = use_fast_cpu(build_lnfree("SM+R", "quick", data.block_size, device))
    input_ids = torch.randint(model.config.vocab_size, (batch_size, data.block_size), device=device)
    probe = {"input_ids": torch.randint(model.config.vocab_size, (data.entropy_sequences, data.block_size))}
    stream = ResidualStream()
    measured: dict[str, list[Quantity]] = {
        "attention": [],
        "all": [stream, BatchEntropy(), Outliers(stream), ZeroActivations()],
    }
    runs = {"step": training_step(model, input_ids)}
    for name, quantities in measured.items():
        callback = MeasurementCallback(None, quantities, probe, data.entropy_steps, Path())

        def measure(callback=callback):
            return callback.describe(callback.measure(model), model)

        runs[name] = measure
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


def benchmark_generation(settings: Settings) -> Iterator[Row]:
    """
    128 tokens after a prompt of 16, greedy, by SM+R and by the stock model, both by `use_fast_cpu` and plain; weights
    read over what a sum reads.
    """
    device, rounds = settings.device, settings.rounds
    read = torch.ones(2**28 // 4, device=device)
    bandwidth = 2**28 / medians(take_turns({"read": read.sum}, 10, device))["read"]
    for size in settings.sizes:
        models = {
            "SM+R": use_fast_cpu(build_lnfree("SM+R", size, 144, device)).eval(),
            "SM+R plain": build_lnfree("SM+R", size, 144, device).eval(),
            "stock": use_fast_cpu(build_stock(size, 144, device)).eval(),
            "stock plain": build_stock(size, 144, device).eval(),
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
                    **{f"{name} tokens/s": 128 * batch / seconds[name] for name in models},
                    "speed-up": seconds["stock"] / seconds["SM+R"],
                    "speed-up plain": seconds["stock plain"] / seconds["SM+R plain"],
                    "of bandwidth": 128 * weights / seconds["SM+R"] / bandwidth,
                }


def benchmark_command(settings: Settings) -> list[Row]:
    """
    Tokens per second of `lnfree train` by the recipe `quick`, with all that it measures and writes, and of a plain
    Trainer on stock GPT-2 with the same arguments and blocks; beside the bare training step of either model. The last
    row is tokenizing 200 documents without the cache, which is to be faster than any training.
    """
    from datasets import Dataset

    from ..data import load_documents, load_tokenizer, tokenize_blocks
    from ..train.loop import train

    rows: dict[str, list[float]] = {"lnfree train": [], "Trainer, stock": []}
    waiting = []
    # what training prints does not belong among the tables
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        for index in range(settings.rounds):
            base = ["max_steps=60", "save_steps=60", "disable_tqdm=true", "variant=SM+R"]
            recipe = load_recipe("quick", [*base, f"output_dir={folder}/{index}"])
            result = read_results(train(recipe))
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
    tokenizing = {"tokenizing": lambda: tokenize_blocks(part, tokenizer, recipe.data)}
    input_ids = torch.randint(2048, (16, 128))
    models: dict[str, PreTrainedModel] = {
        "lnfree train": use_fast_cpu(build_lnfree("SM+R", "quick", 128, "cpu")),
        "Trainer, stock": build_stock("quick", 128, "cpu"),
    }
    # one after the other, as in training: by turns, each would find its memory taken by the other
    steps_of = {name: training_step(model, input_ids) for name, model in models.items()}
    ten = {name: lambda step=step: [step() for _ in range(10)] for name, step in steps_of.items()}
    bare = {name: seconds / 10 for name, seconds in medians(take_turns(ten, settings.rounds, "cpu")).items()}
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
            "command": "tokenizing",
            "tokens/s": tokens / medians(take_turns(tokenizing, settings.rounds, "cpu"))["tokenizing"],
            **dict.fromkeys(("bare step tokens/s", "time outside the model", "share waiting for data")),
        }
    ]


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    input_ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def benchmark_start(settings: Settings) -> list[Row]:
    """Seconds to import, to `--help`, and from the command to the first step with a cold and a warm data cache."""

    def run(*command: str, **environment) -> Action:
        return lambda: subprocess.run(
            [sys.executable, "-P", *command], check=True, capture_output=True, env={**os.environ, **environment}
        )

    torch_and_transformers = "import torch, transformers; from transformers import PreTrainedModel, Trainer"
    seconds = medians(
        take_turns(
            {
                "import of torch and transformers": run("-c", torch_and_transformers),
                "the same and modeling_lnfree": run("-c", f"{torch_and_transformers}; import modeling_lnfree"),
                "lnfree --help": run("-m", "training.cli", "--help"),
            },
            settings.rounds,
            "cpu",
        )
    )
    with tempfile.TemporaryDirectory() as home:
        seconds["first step, cold data cache"] = _first_step(home)
        warm = [_first_step(home) for _ in range(settings.rounds)]
        seconds["first step, warm data cache"] = statistics.median(warm)
    return [{"what": name, "s": value} for name, value in seconds.items()]


def _first_step(home: str) -> float:
    """Seconds from the command to the measurement before the first step of a run of the recipe `quick`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "training.cli", "train", "quick", f"output_dir={folder}/run"]
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


def benchmark_growth(settings: Settings) -> Iterator[Row]:
    """
    Exponents of SM+R from the quick start's size on, over one dimension at a time: of a training step, of one with
    entropy measured, and of generating 16 tokens after a prompt of T.
    """
    device, rounds = settings.device, settings.rounds
    base = {"T": 128, "batch": 4, "width": 128, "depth": 6}
    scales = {"T": [256, 512, 1024], "batch": [4, 8, 16], "width": [128, 256, 512], "depth": [4, 8, 16]}

    def prepare(what, at):
        fields = {
            "hidden_size": at["width"],
            "num_hidden_layers": at["depth"],
            "num_attention_heads": at["width"] // 32,
        }
        model = use_fast_cpu(build_lnfree("SM+R", "quick", at["T"] + 16, device, **fields))
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


# the title of each, and what gives its rows
SECTIONS: dict[str, tuple[str, Callable[[Settings], Iterable[Row]]]] = {
    "step": ("A training step", benchmark_step),
    "bf16": ("A training step in bfloat16, with batches that fill a GPU", benchmark_bf16),
    "optimizer": ("Muon for the layers' matrices", benchmark_optimizer),
    "designs": ("A training step of every design", benchmark_designs),
    "entropy": ("What measuring attention entropy adds to a forward pass", benchmark_entropy),
    "attention": ("One attention call, and its entropy", benchmark_attention),
    "passes": ("What measuring adds to whole forward passes", benchmark_passes),
    "training-entropy": ("Entropy measured in every training step", benchmark_entropy_in_training),
    "methods": ("Training methods: the penalty on entropy, and sigma-reparametrization", benchmark_methods),
    "callback": ("What is measured on the way, at the recipe's cadence", benchmark_callback),
    "generation": ("Generating 128 tokens", benchmark_generation),
    "command": ("The training command", benchmark_command),
    "start": ("Starting", benchmark_start),
    "growth": ("Growth of training and generating", benchmark_growth),
}
