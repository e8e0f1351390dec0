"""
`lnfree train --plan`: what a run will need, before anything starts.

One training step runs on fake tensors, which have shapes but no memory, under torch's own memory tracker and FLOP
counter: the figures are those of this very model with its activation checkpointing and precision, not of a formula.
The loss is a GPU's, by blocks of tokens, unless the recipe says `fused_loss: false`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainingArguments

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM, build_optimizer, use_fused_loss

from ..convert.convert import config_in_family
from ..data import load_tokenizer, vocabulary_size
from ..errors import UserError
from ..recipe import Recipe


GIB = 2**30
# those of 8 and 4 bits, of GaLore and their like hold other states
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
# torch counts the attention of accelerators only
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class _Step(NamedTuple):
    """A training step in one process that holds the whole model; sizes in bytes."""

    parameters: int
    weights: int
    layer: int  # weights of one layer
    num_layers: int
    states: int  # of the optimizer, as a checkpoint has them
    peak: dict[str, int]  # by what the memory is for, as the tracker calls it
    flops_per_token: float


def plan(recipe: Recipe, processes: int = 1, flops: float | None = None) -> dict[str, Any]:
    """
    What training by the recipe needs.

    Args:
        processes: of the launcher, one for each GPU.
        flops: floating-point operations that one process does in a second, sustained.

    Returns:
        `parameters`, `tokens_per_step`, `steps` and `tokens` (None without a budget), `flops_per_token` (forward,
        backward, what activation checkpointing computes again, and Muon's products), `traffic` (bytes that a process
        sends in a step), `checkpoint` (bytes), `seconds` (None without `flops`), and bytes of memory in a process at
        the peak of a step: `weights`, `gradients`, `optimizer`, `activations`, `communication`, and their sum
        `memory`.

    Raises:
        UserError: for a number of processes that the recipe cannot use, and for an optimizer other than AdamW.
    """
    training, fsdp_size = recipe.training, recipe.data.fsdp_size
    if processes < 1 or processes % fsdp_size:
        raise UserError(f"processes must be a multiple of fsdp_size={fsdp_size}, got {processes}")
    if flops is not None and not flops > 0:
        raise UserError(f"flops must be more than 0, got {flops}")
    if training.get("optim", "adamw_torch") not in ADAMW:
        raise UserError(f"a plan knows the memory of optim={', '.join(ADAMW)} only, got {training['optim']!r}")
    sequences = training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    accumulation = training.get("gradient_accumulation_steps", 1)

    step = _simulate_step(recipe, sequences, accumulation)
    memory = _memory(step, processes, fsdp_size, accumulation)
    tokens_per_step = sequences * accumulation * recipe.data.block_size * processes
    steps = training.get("max_steps", -1)
    if recipe.data.train_tokens is not None:
        # the recipe's own max_steps is that of as many processes as run now
        steps = -(-recipe.data.train_tokens // tokens_per_step)
    steps = steps if steps > 0 else None
    tokens = None if steps is None else steps * tokens_per_step
    return {
        "parameters": step.parameters,
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "tokens": tokens,
        "flops_per_token": step.flops_per_token,
        "traffic": _traffic(step.weights, processes, fsdp_size, accumulation),
        "checkpoint": step.weights + (0 if training.get("save_only_model") else step.states),
        "seconds": None if flops is None or tokens is None else tokens * step.flops_per_token / (flops * processes),
        **memory,
        "memory": sum(memory.values()),
    }


def _simulate_step(recipe: Recipe, sequences: int, accumulation: int) -> _Step:
    """One step on fake tensors, of micro-batches of so many sequences."""
    training = recipe.training
    with FakeTensorMode():
        model = LNFreeForCausalLM(_config(recipe)).train()
        if training.get("activation_checkpointing") or training.get("gradient_checkpointing"):
            # older versions of transformers have it under the second name alone
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if recipe.data.fused_loss is not False:
            use_fused_loss(model)
        optimizer = build_optimizer(model, **{"layer_optimizer": "adamw", **recipe.layer_options}, fused=True)
        input_ids = torch.zeros(sequences, recipe.data.block_size, dtype=torch.long)

        tracker = MemTracker()

        def backward():
            # float16 takes the same room
            half = bool(training.get("bf16") or training.get("fp16"))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            tracker.reset_mod_stats()  # it refuses a second forward pass otherwise; the peak stays

        def step(micro_batches: int):
            for _ in range(micro_batches):
                backward()
            optimizer.step()
            optimizer.zero_grad()

        step(1)  # the optimizer's state comes into being
        tracker.track_external(model, optimizer)
        with tracker:
            step(min(accumulation, 2))  # from the second on, gradients wait while activations grow
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            backward()
        # Muon's products
        with FlopCounterMode(display=False) as update_counter:
            optimizer.step()
        states = [state for states in optimizer.state.values() for state in states.values() if state.ndim]
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    flops = counter.get_total_flops() + update_counter.get_total_flops() / accumulation
    return _Step(
        parameters=model.num_parameters(),
        weights=_bytes(model.parameters()),
        layer=_bytes(model.model.layers[0].parameters()),
        num_layers=len(model.model.layers),
        states=_bytes(states),
        peak={getattr(part, "value", part): size for part, size in peak.items()},
        flops_per_token=flops / input_ids.numel(),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """In float32."""
    return 4 * sum(tensor.numel() for tensor in tensors)


def _memory(step: _Step, processes: int, fsdp_size: int, accumulation: int) -> dict[str, float]:
    """Bytes in a process at the peak of a step, by what they are for."""
    gradients, communication = step.peak["Gradient"] / fsdp_size, 0
    if fsdp_size > 1:
        # whole at a time: embedding and head, a layer and the one fetched ahead, and a layer's gradient
        communication = step.weights - step.layer * step.num_layers + 3 * step.layer
        if _scatters(processes, fsdp_size, accumulation) < accumulation:
            gradients = step.peak["Gradient"]  # until the last micro-batch they stay whole
    elif processes > 1:
        communication = step.weights  # the buckets in which gradients are summed
    return {
        "weights": step.weights / fsdp_size,
        "gradients": gradients,
        "optimizer": step.peak["Optstate"] / fsdp_size,
        "activations": step.peak["Activation"] + step.peak["Temp"] + step.peak["Other"],
        "communication": communication,
    }


def _traffic(weights: int, processes: int, fsdp_size: int, accumulation: int) -> float:
    """Bytes that a process sends in a step."""
    sent, replicas = 0.0, processes // fsdp_size
    if fsdp_size > 1:
        # in every micro-batch the weights are gathered forward and backward
        times = 2 * accumulation + _scatters(processes, fsdp_size, accumulation)
        sent = weights * (fsdp_size - 1) / fsdp_size * times
    return sent + 2 * weights / fsdp_size * (replicas - 1) / replicas


def _scatters(processes: int, fsdp_size: int, accumulation: int) -> int:
    """How often FSDP2 scatters gradients in a step: in every micro-batch with replicas, in the last one without."""
    return accumulation if processes > fsdp_size else 1


def _config(recipe: Recipe) -> LNFreeConfig:
    if recipe.data.init_from is not None:
        return config_in_family(recipe.data.init_from)
    # with a vocab_size in the recipe, a plan needs no tokenizer and no network
    if recipe.data.tokenizer is None or "vocab_size" in recipe.model:
        return recipe.build_config()
    tokenizer = load_tokenizer(recipe.data, None, None)
    return recipe.build_config(vocab_size=vocabulary_size(tokenizer, None))


def print_plan(recipe: Recipe, processes: int, flops: float | None):
    """Prints the plan, a line a figure."""
    planned = plan(recipe, processes, flops)
    config, fsdp_size = _config(recipe), recipe.data.fsdp_size
    ways = [f"{fsdp_size} by FSDP2"] if fsdp_size > 1 else []
    ways += [f"{processes // fsdp_size} replicas"] if processes > fsdp_size else []
    lines = {
        "model": f"{config.variant} on {config.backbone}, {planned['parameters']:,} parameters",
        "processes": f"{processes}" + (f" ({' x '.join(ways)})" if ways else ""),
        "tokens a step": f"{planned['tokens_per_step']:,}",
        "steps": "until the epochs end (max_steps is not set)",
    }
    if planned["steps"] is not None:
        lines["steps"] = f"{planned['steps']:,}, {planned['tokens']:,} tokens"
    lines["memory"] = f"{planned['memory'] / GIB:.2f} GiB in a process at the peak of a step, of which"
    for part in ("weights", "gradients", "optimizer", "activations", "communication"):
        lines[f"  {part}"] = f"{planned[part] / GIB:.2f} GiB"
    if not planned["gradients"]:
        lines["  gradients"] += " (none at the peak: they come as activations go)"
    lines["checkpoint"] = f"{planned['checkpoint'] / GIB:.2f} GiB"
    lines["computing"] = f"{planned['flops_per_token']:.3g} FLOPs a token"
    lines["network"] = f"{planned['traffic'] / GIB:.2f} GiB sent by a process in a step"
    # where a node holds a replica, this share is what the cards between nodes carry
    between = 2 * planned["weights"] * (1 - fsdp_size / processes) if processes > fsdp_size > 1 else 0
    if between:
        lines["  replicas"] = f"{between / GIB:.2f} GiB of it between replicas"
    if flops is not None:
        seconds_a_step = planned["tokens_per_step"] * planned["flops_per_token"] / (flops * processes)
        lines["time"] = f"{seconds_a_step:.3g} s a step at {flops:.3g} FLOP/s in each process"
        if planned["seconds"] is not None:
            lines["time"] += f", {planned['seconds'] / 3600:.1f} hours in all, of computing alone"
        lines["data"] = f"{flops / planned['flops_per_token']:,.0f} tokens/s to read and tokenize for each process"
        for name, sent in (("network", planned["traffic"]), ("  replicas", between)):
            if sent:
                lines[name] += f": {sent / seconds_a_step / 1e9:.2f} GB/s to keep up"
    for name, value in lines.items():
        print(f"{name:<15} {value}")
