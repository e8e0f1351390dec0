"""
Two parties compute an exported model's next tokens, one with the weights and one with the prompt, and neither in the
clear, beside the same tokens computed in the clear:

    bash scripts/private_inference.sh runs/quickstart/exports/* --json private.json --plot private.png
    bash scripts/private_inference.sh SM+LN+G SM+R --tokens 8 --new-tokens 2
    bash scripts/private_inference.sh --functions 3x16 5x23

A name of `lnfree cost` stands for that model with random weights, at any size; it reads random tokens. Each model runs
in two processes on loopback, with CrypTen 0.4.1: additive shares in the ring of 64-bit integers with 16 fractional
bits. Party 0, the server, reads `model.safetensors` and shares every weight by its name; party 1, the client, shares
its tokens as one-hot rows, alone sees the logits, chooses the next token and shares that. Keys and values stay shared
in a cache. Counted are rounds, bytes of both parties together, and seconds, by operation, beside the rounds and bytes
that `lnfree cost` predicts from the configuration.

What this does not protect. CrypTen's default provider is a trusted first party: party 0 deals the multiplication
triples and so could unmask all that is opened, the prompt too; and dealing them costs nothing here, where a real
offline phase costs more than what is counted. The parties are honest but curious: one that deviates is not noticed.
Public are the configuration, the number of tokens, and one constant a norm (below). CrypTen is a research tool.

The operations are CrypTen's own functions, with what they need to converge on these models:

- Causal mask: hidden scores are replaced by -12, not lowered, and their exponentials are multiplied by 0. CrypTen's
  exponential is (1 + x / 256)^256, which is garbage for the usual -1e4.
- LayerNorm: rows are divided by the root of the norm's median variance before their own is computed, since CrypTen's
  inverse root converges near 1. The constants come from the clear model on this file's text, and are public.
- GELU: the tanh form. The erf of CrypTen diverges outside of a small range.
"""

import argparse
import importlib.metadata
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn
from transformers import AutoTokenizer

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import read_variant
from modeling_lnfree.variants import variant_order
from training.encryption.counting import count_operations
from training.encryption.crypten import CRYPTEN
from training.encryption.named import find_named
from training.encryption.prices import Shape
from training.pages import format_head, format_row, write_table


# CrypTen imports from it what it needs for ONNX only; torch has dropped it
sys.modules.setdefault("torch.onnx.symbolic_registry", types.ModuleType("torch.onnx.symbolic_registry"))
try:
    import crypten
    import crypten.communicator
except ImportError as error:
    sys.exit(f"private_inference: {error}; bash scripts/private_inference.sh installs what is missing and runs this")

SERVER, CLIENT = 0, 1
PROMPT = "def __init__(self, name, value=None):\n        self.name = name\n        self.value ="
HIDDEN_SCORE = -12.0
OPERATIONS = ("embedding", "LayerNorm", "linear", "attention products", "softmax", "activation", "logits")
# the operations of `lnfree cost` that are measured together here
PREDICTED = {
    **{"embedding": ["embedding"], "LayerNorm": ["layer_norm"], "softmax": ["softmax"]},
    **{"activation": ["gelu", "relu"], "products and logits": ["opening", "sampling"]},
}
MEASURED = {"products and logits": ["linear", "attention products", "logits"]}
NOT_PROTECTED = (
    "Not protected: party 0 (the server) deals the triples and could unmask the prompt; deviating parties are not "
    "noticed; no offline phase is counted."
)


class Meter:
    """Rounds, bytes (sent and received by this party), seconds and those of computing, since the last `take`."""

    def __init__(self):
        self.costs: dict[str, dict[str, float]] = {}

    @contextmanager
    def measure(self, operation: str) -> Iterator[None]:
        communicator = crypten.communicator.get()
        before, started, computed = communicator.get_communication_stats(), time.perf_counter(), time.process_time()
        yield
        after, seconds = communicator.get_communication_stats(), time.perf_counter() - started
        cost = self.costs.setdefault(operation, {"rounds": 0, "bytes": 0, "seconds": 0.0, "computing": 0.0})
        cost["rounds"] += after["rounds"] - before["rounds"]
        cost["bytes"] += after["bytes"] - before["bytes"]
        cost["seconds"] += seconds
        cost["computing"] += time.process_time() - computed

    def take(self) -> dict[str, dict[str, float]]:
        costs, self.costs = self.costs, {}
        return costs


class PrivateModel:
    """
    The model on shares: GPT-2 backbone, GELU or ReLU. T queries, S keys, D width, H heads, d head dimension.

    Args:
        weights: by their names in the export, shared.
        variances: public median variance of the rows that each norm receives, by the norm's name.
    """

    def __init__(self, config: LNFreeConfig, weights: dict[str, Any], variances: dict[str, float], meter: Meter):
        self.config, self.weights, self.variances, self.meter = config, weights, variances, meter
        self.cache: list[tuple[Any, Any]] = [()] * config.num_hidden_layers
        self.length = 0

    def forward(self, tokens):
        """Logits `(T, vocab)` of the next T tokens (one-hot rows `(T, vocab)`), all shared."""
        queries = tokens.size(0)
        with self.meter.measure("embedding"):
            positions = self.weights["model.embed_positions.weight"][self.length : self.length + queries]
            states = tokens.matmul(self.weights["model.embed_tokens.weight"]) + positions  # (T, D)
        self.length += queries
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            states = states + self.attend(self.normalize(states, f"{name}.input_layernorm"), layer)
            hidden = self.normalize(states, f"{name}.post_attention_layernorm")
            hidden = self.activate(self.project(hidden, f"{name}.mlp.up_proj"))
            states = states + self.project(hidden, f"{name}.mlp.down_proj")
        states = self.normalize(states, "model.norm")
        with self.meter.measure("logits"):
            return states.matmul(self.weights["model.embed_tokens.weight"].t())

    def project(self, states, name: str):
        with self.meter.measure("linear"):
            states = states.matmul(self.weights[f"{name}.weight"].t())
            bias = self.weights.get(f"{name}.bias")
            return states if bias is None else states + bias

    def attend(self, states, layer: int):
        name, heads = f"model.layers.{layer}.self_attn", self.config.num_attention_heads
        query, key, value = (
            self.project(states, f"{name}.{part}_proj").reshape(states.size(0), heads, -1).transpose(0, 1)
            for part in "qkv"
        )  # (H, T, d)
        if self.cache[layer]:
            key, value = (
                crypten.cat([past, new], dim=1) for past, new in zip(self.cache[layer], (key, value), strict=True)
            )
        self.cache[layer] = (key, value)  # (H, S, d)
        with self.meter.measure("attention products"):
            scores = (query * query.size(-1) ** -0.5).matmul(key.transpose(1, 2))  # (H, T, S)
        with self.meter.measure("softmax"):
            weights = self.softmax(scores)
        with self.meter.measure("attention products"):
            output = weights.matmul(value)
        return self.project(output.transpose(0, 1).reshape(states.size()), f"{name}.o_proj")

    def softmax(self, scores):
        """CrypTen's softmax over the keys that the causal mask leaves visible."""
        queries, keys = scores.size(1), scores.size(2)
        visible = torch.ones(queries, keys).tril(keys - queries)
        scores = scores * visible + HIDDEN_SCORE * (1 - visible)
        exponentials = (scores - scores.max(-1, keepdim=True)[0]).exp() * visible
        with crypten.cfg.temp_override({"functions.reciprocal_all_pos": True}):
            return exponentials * exponentials.sum(-1, keepdim=True).reciprocal()

    def normalize(self, states, name: str):
        """LayerNorm, or nothing where the export has none."""
        if name not in self.variances:
            return states
        with self.meter.measure("LayerNorm"):
            scale = self.variances[name] ** -0.5
            states = (states - states.mean(-1, keepdim=True)) * scale
            variance = states.square().mean(-1, keepdim=True) + self.config.layer_norm_eps * scale**2
            return states * variance.inv_sqrt() * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def activate(self, states):
        with self.meter.measure("activation"):
            if self.config.hidden_act == "relu":
                return states.relu()
            inner = (2 / torch.pi) ** 0.5 * (states + 0.044715 * states.square() * states)
            return 0.5 * states * (1 + inner.tanh())


def join(rank: int, aside: Path):
    """Makes this process one of the two parties, on loopback and with one thread."""
    torch.set_num_threads(1)
    environment = {"DISTRIBUTED_BACKEND": "gloo", "RENDEZVOUS": f"file://{aside}/rendezvous"}
    os.environ.update(environment, WORLD_SIZE="2", RANK=str(rank))
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    crypten.init()
    crypten.cfg.communicator.verbose = True  # or nothing is counted


def run_party(rank: int, folder: Path, aside: Path, variances: dict[str, float], length: int, new_tokens: int):
    """One party's process; writes what it measured, and the client what it received, below `aside`."""
    join(rank, aside)
    config = LNFreeConfig.from_pretrained(folder)
    with torch.device("meta"):
        shapes = LNFreeForCausalLM(config).state_dict()
    # the client knows no weight, only the shapes
    weights = load_file(folder / "model.safetensors") if rank == SERVER else {}
    prompt = load_file(aside / "prompt.safetensors")["input_ids"] if rank == CLIENT else None
    meter, results, costs = Meter(), [], []
    with crypten.no_grad():
        shared = {
            name: crypten.cryptensor(weights[name] if rank == SERVER else torch.zeros(shape.shape), src=SERVER)
            for name, shape in shapes.items()
            if name != "lm_head.weight"  # tied to the embeddings
        }
        model = PrivateModel(config, shared, variances, meter)
        for step in range(new_tokens):
            rows = torch.zeros(length if step == 0 else 1, config.vocab_size)
            if rank == CLIENT:
                rows = F.one_hot(prompt, config.vocab_size).float()
            logits = model.forward(crypten.cryptensor(rows, src=CLIENT))
            with meter.measure("logits"):
                opened = logits.reveal(dst=CLIENT)
            if rank == CLIENT:
                # not by get_plain_text: 0.4.1 decodes -131071 as -2.99998, and others just above a negative integer
                logits = opened.float() / logits.encoder.scale
                results.append(logits)
                prompt = logits[-1:].argmax(-1)
            costs.append(meter.take())
    measured = {"costs": costs, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    (aside / f"costs{rank}.json").write_text(json.dumps(measured), encoding="utf-8")
    if rank == CLIENT:
        save_file({"logits": torch.cat(results)}, aside / "logits.safetensors")
    crypten.uninit()


@torch.no_grad()
def measure_variances(model: LNFreeForCausalLM, input_ids: Tensor) -> dict[str, float]:
    """Median variance of the rows `(T, D)` that every LayerNorm of the clear model receives, by its name."""
    variances, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):

            def record(module, args, name=name):
                variances[name] = args[0].var(-1, unbiased=False).median().item()

            handles.append(module.register_forward_pre_hook(record))
    model(input_ids)
    for handle in handles:
        handle.remove()
    return variances


@torch.no_grad()
def run(name: str, prompt: str, tokens: int, new_tokens: int) -> dict[str, Any]:
    """Runs one export, or a named model with random weights; see `run_folder`."""
    config = find_named(name)
    if config is None:
        folder = Path(name)
        config, tokenizer = LNFreeConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        text = tokenizer(Path(__file__).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
        return {**run_folder(folder, config, input_ids, text, new_tokens), "export": folder.name}
    if not isinstance(config, LNFreeConfig):
        sys.exit(f"private_inference: {name} is of a stock class; name a variant, as in {name}:SM+LN+G")
    torch.manual_seed(0)
    input_ids, text = torch.randint(config.vocab_size, (1, tokens)), torch.randint(config.vocab_size, (1, 64))
    with tempfile.TemporaryDirectory() as folder:
        LNFreeForCausalLM(config).save_pretrained(folder)
        return {**run_folder(Path(folder), config, input_ids, text, new_tokens), "export": name}


def run_folder(folder: Path, config: LNFreeConfig, input_ids: Tensor, text: Tensor, new_tokens: int) -> dict[str, Any]:
    """Runs a model privately and in the clear; returns costs by operation and how far the two are apart."""
    if config.backbone != "gpt2" or config.hidden_act not in ("relu", "gelu_pytorch_tanh"):
        sys.exit(
            f"private_inference: {folder} is {config.variant} on {config.backbone}; only GPT-2 with G or R is run"
        )
    length = input_ids.shape[1]
    if length + new_tokens - 1 > config.max_position_embeddings:
        sys.exit(
            f"private_inference: {length} tokens of the prompt and {new_tokens} new ones do not fit into "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    model = LNFreeForCausalLM.from_pretrained(folder).eval()
    variances = measure_variances(model, text[:, : config.max_position_embeddings])
    with tempfile.TemporaryDirectory() as aside:
        aside = Path(aside)
        save_file({"input_ids": input_ids[0]}, aside / "prompt.safetensors")
        multiprocessing.spawn(run_party, (folder.resolve(), aside, variances, length, new_tokens), nprocs=2)
        # of the prompt, then of each new token but the last
        logits = load_file(aside / "logits.safetensors")["logits"]
        found = [json.loads((aside / f"costs{rank}.json").read_text(encoding="utf-8")) for rank in (SERVER, CLIENT)]
    private = logits[length - 1 :].argmax(-1)
    clear = input_ids
    for _ in range(new_tokens):
        clear = torch.cat((clear, model(clear).logits[:, -1:].argmax(-1)), dim=1)
    # at the private tokens, so that the two can be compared wherever they lead
    expected = model(torch.cat((input_ids[0], private[:-1]))[None]).logits[0]
    errors = (logits - expected).abs()
    results = folder / "results.json"
    parties = [party["costs"] for party in found]
    # the last new token's pass has all before it in the cache
    passes = {"prompt": ("forward", length, 0), "new_token": ("token", length + new_tokens - 1, -1)}
    measured, predicted = {}, {}
    for name, (phase, positions, step) in passes.items():
        if name == "prompt" or new_tokens > 1:
            measured[name] = _add_parties([party[step] for party in parties])
            counts = count_operations(LNFreeForCausalLM, config, length=positions)
            predicted[name] = _compare(measured[name], counts[phase]["estimates"]["CrypTen"])
    return {
        "variant": config.variant,
        "perplexity": json.loads(results.read_text(encoding="utf-8"))["perplexity"] if results.is_file() else None,
        "prompt_tokens": length,
        "private_tokens": private.tolist(),
        "clear_tokens": clear[0, length:].tolist(),
        "equal_tokens": int((private == clear[0, length:]).sum()),
        "equal_argmax": int((logits.argmax(-1) == expected.argmax(-1)).sum()),
        "positions": len(logits),
        "largest_error": errors.max().item(),
        "mean_error": errors.mean().item(),
        "largest_logit": expected.abs().max().item(),
        "prompt": measured["prompt"],
        "new_token": measured.get("new_token"),
        "predicted": predicted,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "peak_gib": [party["peak_kib"] / 2**20 for party in found],
        "variances": variances,
    }


def _compare(measured: dict[str, dict[str, float]], cost: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What `lnfree cost` predicts for the operations that are measured together, and in total."""
    parts, keys = {}, ("rounds", "bytes", "computing")
    for name, operations in PREDICTED.items():
        costs = [cost["by_operation"][operation] for operation in operations if operation in cost["by_operation"]]
        found = [measured[part] for part in MEASURED.get(name, [name]) if part in measured]
        parts[name] = {
            "rounds": sum(part["rounds"] for part in costs),
            "bytes": sum(2 * part["bytes_per_party"] for part in costs),
            "multiply_adds": sum(part["multiply_adds"] for part in costs),
            **{f"measured_{key}": sum(part[key] for part in found) for key in keys},
        }
    total = {key: sum(part[key] for part in parts.values()) for key in parts["embedding"]}
    return {**parts, "total": total}


def _add_parties(parties: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Costs by operation and in total: each byte is counted where it is sent and where it arrives."""
    by_operation = {
        name: {
            "rounds": parties[SERVER][name]["rounds"],
            "bytes": sum(party[name]["bytes"] for party in parties) / 2,
            # which wait for one another
            **{key: statistics.mean(party[name][key] for party in parties) for key in ("seconds", "computing")},
        }
        for name in OPERATIONS
        if name in parties[SERVER]
    }
    keys = ("rounds", "bytes", "seconds", "computing")
    total = {key: sum(cost[key] for cost in by_operation.values()) for key in keys}
    return {**by_operation, "total": total}


def to_markdown(runs: list[dict[str, Any]]) -> str:
    """A table of all runs, and one by operation."""
    lines = [
        f"One pass over a prompt of {runs[0]['prompt_tokens']} tokens, and one over a new token with the cache:",
        "",
        "| configuration | perplexity | rounds | MB | s | a new token: rounds | MB | s | tokens as in the clear "
        "| argmax as in the clear | error of the logits: largest | mean |",
        "|---" * 12 + "|",
    ]
    for run in runs:
        perplexity = "" if run["perplexity"] is None else f"{run['perplexity']:.3f}"
        costs = " | ".join(_cost(run[phase] and run[phase]["total"]) for phase in ("prompt", "new_token"))
        lines.append(
            f"| {run['variant']} | {perplexity} | {costs} | {run['equal_tokens']} of {len(run['clear_tokens'])} "
            f"| {run['equal_argmax']} of {run['positions']} | {run['largest_error']:.4f} | {run['mean_error']:.4f} |"
        )
    lines += ["", "The pass over the prompt by operation, rounds / MB / s:", ""]
    lines += ["| operation | " + " | ".join(run["variant"] for run in runs) + " |", "|---" * (1 + len(runs)) + "|"]
    for name in (*OPERATIONS, "total"):
        cells = (_cost(run["prompt"].get(name), separator=" / ") for run in runs)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Predicted by `lnfree cost` and measured:", "", *to_lines(prediction_rows(runs))]
    return "\n".join([*lines, "", fit_rates(runs), "", NOT_PROTECTED])


def to_lines(rows: list[dict[str, Any]]) -> list[str]:
    return [*format_head(rows[0]), *map(format_row, rows)]


def prediction_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every pass rounds and MB as predicted and as measured, in how many seconds, and the parties' peak memory."""
    rows = []
    for run in runs:
        for name, pass_name in (("prompt", f"{run['prompt_tokens']} tokens"), ("new_token", "a new token")):
            if name in run["predicted"]:
                total = run["predicted"][name]["total"]
                rows.append(
                    {
                        "configuration": run["variant"],
                        "blocks x width, vocabulary": f"{run['layers']} x {run['width']}, {run['vocabulary']:,}",
                        "pass": pass_name,
                        "rounds: predicted": total["rounds"],
                        "measured": total["measured_rounds"],
                        "MB: predicted": round(total["bytes"] / 1e6, 3),
                        "measured MB": round(total["measured_bytes"] / 1e6, 3),
                        "s": round(run[name]["total"]["seconds"], 1),
                        "s of computing": round(run[name]["total"]["computing"], 1),
                        "GiB of the parties": ", ".join(f"{peak:.1f}" for peak in run["peak_gib"]),
                    }
                )
    return rows


# what the designs of the family compute besides, as `lnfree cost` composes it; x has rows
FUNCTIONS = {
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "silu": lambda x: x * x.sigmoid(),
    "relu": lambda x: x.relu(),
    "leaky_relu": lambda x: x.relu() * 0.9 + x * 0.1,
    "clamp": lambda x: x.hardtanh(0, 1),
    "reciprocal": lambda x: (x + 1).reciprocal(),
    "softmax": lambda x: x.softmax(-1),
    "rms_norm": lambda x: (
        x * x.square().mean(-1, keepdim=True).inv_sqrt() * crypten.cryptensor(torch.ones(x.size(-1)))
    ),
    "sampling, the largest logit found by the parties": lambda x: x.max(-1, keepdim=True),
}


def run_functions(rank: int, aside: Path, shapes: list[tuple[int, int]]):
    """One party's process: every function on random numbers `(rows, length)`; writes what it cost below `aside`."""
    join(rank, aside)
    costs, meter = [], Meter()
    with crypten.no_grad():
        for shape in shapes:
            for name, function in FUNCTIONS.items():
                x = crypten.cryptensor(torch.rand(shape), src=CLIENT)
                with meter.measure(name):
                    function(x)
            costs.append(meter.take())
    (aside / f"costs{rank}.json").write_text(json.dumps(costs), encoding="utf-8")
    crypten.uninit()


def read_shape(text: str) -> tuple[int, int]:
    """`ROWSxLENGTH`. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be two numbers of at least 1, as 3x16, got {text!r}")
    return int(match[1]), int(match[2])


def function_rows(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Of every function and shape rounds and bytes as predicted and as measured."""
    with tempfile.TemporaryDirectory() as aside:
        multiprocessing.spawn(run_functions, (Path(aside), shapes), nprocs=2)
        parties = [
            json.loads(Path(aside, f"costs{rank}.json").read_text(encoding="utf-8")) for rank in (SERVER, CLIENT)
        ]
    rows = []
    for index, (number, length) in enumerate(shapes):
        for name in FUNCTIONS:
            compose = CRYPTEN.operations.get(name) or CRYPTEN.instead[name]
            steps = [step.cost for step in compose(Shape(number * length, row=length))]
            server, client = (party[index][name] for party in parties)
            rows.append(
                {
                    "function": name,
                    "rows x length": f"{number} x {length}",
                    "rounds: predicted": sum(step.rounds for step in steps),
                    "measured": server["rounds"],
                    "bytes: predicted": sum(step.bytes for step in steps),
                    "measured bytes": round((server["bytes"] + client["bytes"]) / 2),
                }
            )
    return rows


def fit_rates(runs: list[dict[str, Any]]) -> str:
    """A party's seconds of computing, by least squares over the parts of all passes: of what, and how well it fits."""
    passes = [run["predicted"][name] for run in runs for name in run["predicted"]]
    parts = [part for one in passes for name, part in one.items() if name != "total" and part["bytes"]]
    costs = torch.tensor([[part[key] for key in ("multiply_adds", "bytes", "rounds")] for part in parts]).double()
    seconds = torch.tensor([part["measured_computing"] for part in parts]).double()
    fitted = torch.linalg.lstsq(costs, seconds[:, None], driver="gelsd").solution[:, 0]
    if (fitted < 0).any():
        return "These runs are too few or too alike to split computing by multiply-adds, bytes and rounds."
    error = (costs @ fitted - seconds).norm() / seconds.norm()
    values = ", ".join(
        f"{value:.2e} s a {unit}" for value, unit in zip(fitted, ("multiply-add", "byte", "round"), strict=True)
    )
    return f"A party computes about {values} (relative error {error:.0%})."


def _cost(cost: dict[str, float] | None, separator: str = " | ") -> str:
    if cost is None:
        return separator.join(("0", "0", "0"))
    return separator.join((f"{cost['rounds']:,}", f"{cost['bytes'] / 1e6:.2f}", f"{cost['seconds']:.1f}"))


def plot(runs: list[dict[str, Any]], path: str):
    """Perplexity against bytes and against rounds of the pass over the prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, key, unit, factor in ((axes[0], "bytes", "MB", 1e6), (axes[1], "rounds", "rounds", 1)):
        values = [run["prompt"]["total"][key] / factor for run in runs]
        for run, value in zip(runs, values, strict=True):
            axis.scatter(value, run["perplexity"], s=50)
            # below the point with LayerNorm and above without, since such pairs lie close together
            offset = (7, -13 if read_variant(run["variant"])["norm"] else 5)
            axis.annotate(run["variant"], (value, run["perplexity"]), xytext=offset, textcoords="offset points")
        margin = 0.2 * (max(values) - min(values)) or 0.1 * max(values)
        axis.set(xlim=(min(values) - margin, max(values) + 2 * margin), xlabel=f"{unit} of one private pass")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity")
    axes[0].margins(y=0.2)
    figure.suptitle(f"Two parties, {runs[0]['prompt_tokens']} tokens, CrypTen on loopback", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="*", metavar="EXPORT_DIR_OR_NAME")
    parser.add_argument(
        "--functions",
        nargs="+",
        type=read_shape,
        metavar="ROWSxLENGTH",
        help="run single functions of CrypTen beside what is predicted",
    )
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)r")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="that a named model reads (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--plot", metavar="FILE.png", help="draw perplexity against bytes and rounds")
    parser.add_argument("--docs", metavar="DOCS/data/NAME.json", help="of a checkout: write what was predicted there")
    arguments = parser.parse_args()
    for name, value in (("--new-tokens", arguments.new_tokens), ("--tokens", arguments.tokens)):
        if value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    if not arguments.exports and not arguments.functions:
        parser.error("name an export, a model, or --functions")
    for folder in (Path(name) for name in arguments.exports if find_named(name) is None):
        for name in ("config.json", "model.safetensors", *(["results.json"] if arguments.plot else [])):
            if not (folder / name).is_file():
                parser.error(f"{folder} is not an export: it has no {name}")
    tables = {}
    if arguments.functions:
        tables["-functions"] = function_rows(arguments.functions)
        print("\n".join(to_lines(tables["-functions"])))
    runs = [run(name, arguments.prompt, arguments.tokens, arguments.new_tokens) for name in arguments.exports]
    runs.sort(key=lambda run: variant_order(run["variant"]))
    if runs:
        tables[""] = prediction_rows(runs)
        print(to_markdown(runs))
    if arguments.json:
        versions = {name: importlib.metadata.version(name) for name in ("crypten", "torch")}
        document = {"runs": runs, "functions": tables.get("-functions"), "versions": versions}
        document["not_protected"] = NOT_PROTECTED
        Path(arguments.json).write_text(json.dumps(document, indent=1), encoding="utf-8")
    for suffix, rows in tables.items() if arguments.docs else ():
        sizes = f"--tokens {arguments.tokens} --new-tokens {arguments.new_tokens}"
        shapes = [f"{number}x{length}" for number, length in arguments.functions or ()]
        what = [*arguments.exports, sizes] if suffix == "" else ["--functions", *shapes]
        command = " ".join(["bash scripts/private_inference.sh", *what])
        write_table(Path(arguments.docs).parent.parent, Path(arguments.docs).stem + suffix, rows, command)
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
