"""What is timed: the variants and the stock models at the same sizes, and their training steps."""

import math

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from modeling_lnfree import (
    EntropyRegularizer,
    LNFreeConfig,
    LNFreeForCausalLM,
    build_optimizer,
    record_attention_entropy,
    use_fast_cpu,
)
from modeling_lnfree.optimization import LayerOptimizer

from ..train.plan import ATTENTION_FLOPS
from .timing import Action, medians, take_turns


# the quick start's model, and the paper's (arXiv 2410.09637)
SIZES = {
    "quick": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 2048},
    "gpt2": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50257},
    "pythia70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 50304},
}


def build_lnfree(variant: str, size: str, length: int, device: str, **kwargs) -> LNFreeForCausalLM:
    """The variant at one of `SIZES`, with the paper's biases and random weights."""
    backbone = "pythia" if size == "pythia70m" else "gpt2"
    fields = {**SIZES[size], "max_position_embeddings": length, **kwargs}
    config = LNFreeConfig.from_variant(variant, backbone, **fields)
    with torch.device(device):
        return LNFreeForCausalLM(config)


def build_stock(size: str, length: int, device: str, relu: bool = False) -> PreTrainedModel:
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
        with torch.device(device):
            return GPTNeoXForCausalLM(config)
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    act = {"activation_function": "relu"} if relu else {}
    others = {"bos_token_id": None, "eos_token_id": None, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(
        n_positions=length, **{names.get(name, name): value for name, value in fields.items()}, **act, **others
    )
    with torch.device(device):
        return GPT2LMHeadModel(config)


def training_step(
    model: nn.Module,
    input_ids: Tensor,
    measure: str | None = None,
    layer_optimizer: LayerOptimizer = "adamw",
    dtype: torch.dtype | None = None,
) -> Action:
    """
    Forward, backward, clip, AdamW (or Muon for the matrices of the layers); with `measure`, also the entropy of every
    head by `record` or by `maps`, or AERO's penalty on it in the loss, by `penalty` (`EntropyRegularizer`) or by
    `map penalty`. Forward under autocast to `dtype`, if there is one.
    """
    model.train()
    regularizer = EntropyRegularizer(model, weight=1e-5, margin=0.0)
    optimizer: torch.optim.Optimizer
    if layer_optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = build_optimizer(model, learning_rate=1e-4, layer_optimizer=layer_optimizer, fused=True)

    def forward() -> Tensor:
        if measure == "record":
            with record_attention_entropy(model) as record:
                loss = model(input_ids, labels=input_ids, use_cache=False).loss
            record.entropy.mean()
            return loss
        if measure == "maps":
            output = model(input_ids, labels=input_ids, use_cache=False, output_attentions=True)
            entropy_of_maps(output.attentions)
            return output.loss
        if measure == "penalty":
            with regularizer.measure():
                loss = model(input_ids, labels=input_ids, use_cache=False).loss
            return loss + regularizer.penalty()
        if measure == "map penalty":
            output = model(input_ids, labels=input_ids, use_cache=False, output_attentions=True)
            return output.loss + 1e-5 * penalty_of_maps(output.attentions)
        return model(input_ids, labels=input_ids, use_cache=False).loss

    def step():
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype is not None):
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def penalty_of_maps(attentions: tuple[Tensor, ...]) -> Tensor:
    """AERO's penalty without a margin, thresholds at half of log T, as its published code computes it from maps."""
    largest = math.log(attentions[0].shape[-1])
    entropy = torch.stack([-(weights * (weights + 1e-9).log()).sum(-1).mean((0, 2)) for weights in attentions])
    return (entropy - 0.5 * largest).square().mean()


@torch.no_grad()
def entropy_of_maps(attentions: tuple[Tensor, ...]) -> Tensor:
    """Mean entropy `(layers, heads)` of the attention maps; entr is -p log p, in one pass over a map."""
    return torch.stack([torch.special.entr(weights).sum(-1).mean((0, 2)) for weights in attentions]).cpu()


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


def matmul_rate(tokens: int, width: int, device: str) -> float:
    """FLOP/s of the machine in float32 at the feed-forward layer's shape, by the faster library."""
    layer = use_fast_cpu(nn.Linear(width, 4 * width, bias=False)).to(device)
    states = torch.randn(tokens, width, device=device)
    with torch.no_grad():
        seconds = medians(take_turns({"layer": lambda: layer(states)}, 20, device))["layer"]
    return 2 * states.numel() * layer.out_features / seconds
