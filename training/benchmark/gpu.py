"""
Sections of the benchmark for a GPU: half precision, and batches that fill the card. On a CPU they have small ones, so
that they can be tried there.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from modeling_lnfree import LNFreeForCausalLM, compute_attention_entropy, record_attention_entropy, use_fused_loss

from ..train.callbacks import peak_flops, token_flops
from ..train.start import compile_layers
from .models import SIZES, build_lnfree, build_stock, training_step
from .timing import MIB, Action, Row, Settings, medians, peak_memory, synchronize, take_turns


# of a batch
TOKENS = {"cuda": 16_384, "cpu": 1024}
# a model and the same without what is in question
WITHOUT_GELU = {"stock": "stock, ReLU", "SM+G": "SM+R", "SM+LN+G": "SM+LN+R"}
WITHOUT_NORMS = {"SM+LN+G": "SM+G", "SM+LN+R": "SM+R"}


@torch.no_grad()
def benchmark_attention(settings: Settings) -> Iterator[Row]:
    """
    One causal attention call by what sdpa takes of itself, by its FlashAttention, and the entropy of its queries; no
    gradients; in bfloat16 on a GPU.
    """
    device, on_gpu = settings.device, settings.device == "cuda"
    width, dtype = (2048, torch.bfloat16) if on_gpu else (256, torch.float32)
    for head_dim in (64, 128):
        for length in settings.lengths:
            shape = (max(1, TOKENS[device] // length), width // head_dim, length, head_dim)
            query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
            sdpa = partial(scaled_dot_product_attention, query, key, value, is_causal=True)

            def flash(sdpa=sdpa):
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    sdpa()

            entropy = partial(compute_attention_entropy, query, key, scaling=head_dim**-0.5, is_causal=True)
            calls: dict[str, Callable] = {"sdpa": sdpa, "flash": flash, "entropy": entropy}
            # a call is shorter than what starts it takes to measure
            repeated = {name: lambda call=call: [call() for _ in range(10)] for name, call in calls.items()}
            ms = {n: 100 * seconds for n, seconds in medians(take_turns(repeated, settings.rounds, device)).items()}
            yield {
                "head dim": head_dim,
                "T": length,
                **{f"{name} ms": ms[name] for name in calls},
                "entropy / sdpa": ms["entropy"] / ms["sdpa"],
                "entropy / flash": ms["entropy"] / ms["flash"],
            }


def _llama(length: int, device: str) -> PreTrainedModel:
    """Of the shape of a Llama of 1 B, with few embeddings."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 1024}
    config = LlamaConfig(
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=length, pad_token_id=None, **sizes
    )
    with torch.device(device):
        return AutoModel.from_config(config, dtype=torch.bfloat16)


def _stock(size: str, length: int, device: str) -> PreTrainedModel:
    model = build_stock(size, length, device).base_model
    return model.to(torch.bfloat16) if device == "cuda" else model


def benchmark_passes(settings: Settings) -> Iterator[Row]:
    """
    What measuring entropy, and measuring it with the scores, adds to a whole forward pass without a head, in bfloat16
    on a GPU: of stock models, and there also of the shape of a Llama of 1 B.
    """
    device = settings.device
    length = 1024 if device == "cuda" else 128
    builds = {(size, length): partial(_stock, size, length, device) for size in settings.sizes}
    if device == "cuda":
        builds |= {("Llama 1B", length): partial(_llama, length, device) for length in (1024, 8192)}
    for (name, length), build in builds.items():
        batch = max(1, TOKENS[device] // length)
        input_ids = torch.randint(1024, (batch, length), device=device)
        model = build().eval()

        @torch.no_grad()
        def run(way, model=model, input_ids=input_ids):
            if way == "plain":
                return model(input_ids, use_cache=False)
            with record_attention_entropy(model, logits=way == "logits") as record:
                model(input_ids, use_cache=False)
            return record.entropy

        runs = {way: partial(run, way) for way in ("plain", "record", "logits")}
        mib = {way: peak_memory(partial(_again, act), device) for way, act in runs.items()}
        seconds = medians(take_turns(runs, settings.rounds, device))
        yield {
            "model": name,
            "T": length,
            "sequences": batch,
            "plain ms": 1e3 * seconds["plain"],
            "record / plain": seconds["record"] / seconds["plain"],
            "with scores / plain": seconds["logits"] / seconds["plain"],
            "plain MiB": mib["plain"],
            "record adds MiB": mib["record"] - mib["plain"],
        }


def _again(act: Action) -> tuple[Action, Action]:
    return act, act


def benchmark_bf16(settings: Settings) -> Iterator[Row]:
    """
    Training steps in bfloat16 autocast that fill a GPU, those of the family with head and loss in one: time, model
    FLOPs utilization (`SpeedCallback`), peak memory (of a GPU), and seconds of the first step. What share of a step is
    GELU's and what the norms' follows from the same model without them. Compiled by layers, on a GPU at T=1024 alone.
    """
    device, on_gpu = settings.device, settings.device == "cuda"
    peak = peak_flops(torch.device(device), torch.bfloat16)
    for size in settings.sizes:
        for length in (128, 1024) if on_gpu else (128,):
            input_ids = torch.randint(SIZES[size]["vocab_size"], (TOKENS[device] // length, length), device=device)
            builds: dict[str, Callable[[], PreTrainedModel]] = {
                **{v: partial(_fused, v, size, length, device) for v in ("SM+R", "SM+G", "SM+LN+R", "SM+LN+G")},
                "stock": partial(build_stock, size, length, device),
                "stock, ReLU": partial(build_stock, size, length, device, relu=True),
            }
            compiled = settings.compiled and (length == 1024 or not on_gpu)
            for mode in ("eager", "compiled") if compiled else ("eager",):
                torch.compiler.reset()
                steps, first, gib, flops = {}, {}, {}, {}
                for name, build in builds.items():
                    before = torch.cuda.memory_allocated() if on_gpu else 0
                    model = build()
                    flops[name] = token_flops(model, length) * input_ids.numel()
                    if mode == "compiled":
                        (compile_layers if isinstance(model, LNFreeForCausalLM) else _compile_stock_layers)(model)
                    steps[name] = training_step(model, input_ids, dtype=torch.bfloat16)
                    began = time.perf_counter()
                    steps[name]()
                    synchronize(device)
                    first[name] = time.perf_counter() - began
                    if on_gpu:
                        torch.cuda.reset_peak_memory_stats()
                        steps[name]()
                        gib[name] = (torch.cuda.max_memory_allocated() - before) / MIB / 1024
                seconds = medians(take_turns(steps, settings.rounds, device))
                yield from [
                    {
                        "size": size,
                        "T": length,
                        "mode": mode,
                        "model": name,
                        "ms": 1e3 * seconds[name],
                        "tokens/s": input_ids.numel() / seconds[name],
                        "MFU": flops[name] / seconds[name] / peak,
                        "of stock": seconds[name] / seconds["stock"],
                        "of stock, ReLU": seconds[name] / seconds["stock, ReLU"],
                        "share of GELU": _share(seconds, name, WITHOUT_GELU),
                        "share of norms": _share(seconds, name, WITHOUT_NORMS),
                        "peak GiB": gib.get(name),
                        "first step s": first[name],
                    }
                    for name in builds
                ]
                del model, steps


def _fused(variant: str, size: str, length: int, device: str) -> PreTrainedModel:
    return use_fused_loss(build_lnfree(variant, size, length, device))


def _compile_stock_layers(model: PreTrainedModel):
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        layer.compile()


def _share(seconds: dict[str, float], name: str, without: dict[str, str]) -> float | None:
    return 1 - seconds[without[name]] / seconds[name] if name in without else None
