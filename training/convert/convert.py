"""A stock checkpoint of the classes in `ARCHITECTURES` -> this family, and back, with equal logits."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Conv1D, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import has_file

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM

from ..data import check_reachable, has_vocabulary
from ..errors import UserError, explained
from ..files import is_taken
from ..recipe import check_model_id
from .architectures import ARCHITECTURES, stock_config


# of a block; the gate only where the MLP is gated
_PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
# one of them comes with every tokenizer, those that are written in Python too
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "tekken.json", "tokenizer.tiktoken", "merges.txt"),
)
# An epsilon that no variance of a residual stream reaches: the published models without LayerNorm have 1e12.
_LN_FREE_EPS = 1e9
# largest difference of a logit, as a share of the largest logit
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def convert(
    model_id: str | Path,
    out_dir: str | Path,
    *,
    to_stock: bool = False,
    revision: str | None = None,
    shard_size: str = "2GB",
) -> Path:
    """
    Converts a checkpoint with its tokenizer, loads the result back, and compares its logits with the original's. No
    weight is held twice. A scale of the attention scores by layer (CodeParrot's models) goes into the queries.

    A stock model whose LayerNorms have been disabled by an epsilon of 1e12 (arXiv 2409.13710, 2507.02559) becomes one
    that has none: see `fold_norms`. Its output projection is then a matrix of its own.

    Args:
        model_id: Hub id or folder of a language model of a class in `ARCHITECTURES`; for `to_stock`, of a model of
            this family.
        out_dir: new or empty folder.
        to_stock: writes the stock class: see `stock_config`.
        revision: branch, tag or commit on the Hub.
        shard_size: largest file of weights.

    Returns:
        `out_dir`.

    Raises:
        UserError: for a model that cannot be loaded, one that the other class cannot express, an `out_dir` that is
            not empty, and logits that differ.
    """
    model_id, out_dir = str(model_id), Path(out_dir)
    if is_taken(out_dir):
        raise UserError(f"{out_dir} exists and is no empty folder; name a new one")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written: {error.strerror}") from None
    source = _load(model_id, ("lnfree",) if to_stock else tuple(ARCHITECTURES), revision)
    tokenizer = _load_tokenizer(model_id, revision)
    probe = _probe(source.config)
    with torch.no_grad():
        expected = source(probe).logits
    if not expected.isfinite().all():
        raise UserError(f"model {model_id!r} cannot be converted: its own logits are NaN or infinite")
    generation_config, positions = source.generation_config, source.config.max_position_embeddings
    target = _to_stock(source) if to_stock else _from_stock(source)
    del source
    # pipelines would generate 256 tokens
    if generation_config.max_length is None and generation_config.max_new_tokens is None:
        generation_config.max_length = positions
    target.generation_config = generation_config
    name = out_dir.resolve().name
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{name}.") as aside:
        folder = Path(aside) / name
        with explained(f"{out_dir} cannot be written"):
            target.save_pretrained(folder, max_shard_size=shard_size)
            if tokenizer is not None:
                tokenizer.model_max_length = positions
                tokenizer.save_pretrained(folder)
        model_class, summary = type(target), _summary(target)
        del target
        difference = _compare(model_class.from_pretrained(folder, dtype="auto").eval(), probe, expected)
        os.replace(folder, out_dir)
    tokenizer_note = "no tokenizer came with it" if tokenizer is None else "with its tokenizer"
    print(f"{out_dir}: {summary}, {tokenizer_note}; largest difference of a logit {difference:.2g}")
    return out_dir


def config_in_family(model_id: str | Path) -> LNFreeConfig:
    """
    The configuration that `load_in_family` gives, but where the weights say otherwise.

    Raises:
        UserError: as there.
    """
    check_model_id(model_id)
    with explained(f"model {model_id!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(model_id)
        if config.model_type not in ("lnfree", *ARCHITECTURES):
            raise UserError(
                f"model {model_id!r} must be of type {', '.join(ARCHITECTURES)} or lnfree, got {config.model_type}"
            )
        return config if config.model_type == "lnfree" else ARCHITECTURES[config.model_type].to_ours(config)


def load_in_family(model_id: str | Path, revision: str | None = None) -> LNFreeForCausalLM:
    """
    A model of this family, or a stock one as a model of this family, in float32. `revision` is a branch, tag or
    commit of the Hub.

    Raises:
        UserError: for a model that cannot be loaded, and one that the family cannot express.
    """
    model = _load(str(model_id), ("lnfree", *ARCHITECTURES), revision)
    if not isinstance(model, LNFreeForCausalLM):
        model = _from_stock(model)
    return model.float()


def _load(model_id: str, model_types: tuple[str, ...], revision: str | None) -> PreTrainedModel:
    check_model_id(model_id, revision)
    check_reachable("model", str(model_id))
    with explained(f"model {model_id!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(model_id, revision=revision)
        if config.model_type not in model_types:
            raise UserError(f"model {model_id!r} must be of type {' or '.join(model_types)}, got {config.model_type}")
        if (quantized := getattr(config, "quantization_config", None)) is not None:
            method = dict(quantized).get("quant_method", "an unknown method")
            raise UserError(f"model {model_id!r} must have weights that are not quantized, got those of {method}")
        ours = config.model_type == "lnfree"
        model_class = LNFreeForCausalLM if ours else ARCHITECTURES[config.model_type].model_class
        model, report = model_class.from_pretrained(
            model_id, revision=revision, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    report["mismatched_keys"] = [
        f"{name} {tuple(found)}, not {tuple(size)}" for name, found, size in report["mismatched_keys"]
    ]
    for kind, what in (
        ("mismatched_keys", "has weights of other sizes than its config.json says"),
        ("missing_keys", "lacks weights"),
        ("unexpected_keys", f"has weights for which {model_class.__name__} has no place"),
    ):
        if names := sorted(report[kind]):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"model {model_id!r} {what}: {', '.join(names[:5])}{more}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"model {model_id!r} cannot be converted: its weight {name} has NaN or infinite entries")
    return model.eval()


def _load_tokenizer(model_id: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None if none came with it."""
    found = [name for name in _TOKENIZER_FILES if has_file(model_id, name, revision=revision)]
    if not found:
        return None
    with explained(f"the tokenizer of {model_id!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision)
        if not has_vocabulary(tokenizer):
            raise UserError(
                f"the tokenizer of {model_id!r} has no tokens when transformers reads it from {', '.join(found)}"
            )
    return tokenizer


def _probe(config) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, min(32, config.max_position_embeddings)), generator=generator)


def _compare(model: PreTrainedModel, probe: Tensor, expected: Tensor) -> float:
    """The largest difference of a logit."""
    with torch.no_grad():
        difference = (model(probe).logits - expected).abs().max().item()
    allowed = _TOLERANCE.get(model.dtype, 1e-4) * expected.abs().max().item()
    # also where the original's logits are NaN
    if not difference <= allowed:
        raise UserError(f"the converted model's logits differ by up to {difference:.3g}, more than {allowed:.3g}")
    return difference


def _summary(model: PreTrainedModel) -> str:
    kind = model.config.variant if isinstance(model, LNFreeForCausalLM) else type(model).__name__
    return f"{kind}, {model.num_parameters():,} parameters"


def _from_stock(stock: PreTrainedModel) -> LNFreeForCausalLM:
    """Moves the weights of a stock model, which is left empty."""
    # as the weights are: a configuration that says otherwise is corrected
    stock.config.tie_word_embeddings = _is_tied(stock)
    with explained("the model's configuration cannot be expressed"):
        config = ARCHITECTURES[stock.config.model_type].to_ours(stock.config)
    state = {}
    for name, module in _stock_modules(stock, config):
        for kind in ("weight", "bias"):
            if getattr(module, kind, None) is None:
                continue
            tensor = _take(getattr(module, kind))
            if isinstance(module, Conv1D) and kind == "weight":
                tensor = tensor.T
            if name.endswith("qkv"):
                parts = _split(tensor, stock.config)
                for projection, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                    state[f"{name.removesuffix('qkv')}self_attn.{projection}.{kind}"] = part
            else:
                state[f"{name}.{kind}"] = tensor.contiguous()
    if stock.config.model_type == "gpt2":
        _scale_queries(state, stock.config)
    if config.layer_norm_eps >= _LN_FREE_EPS:
        config = fold_norms(state, config)
    with torch.device("meta"):
        ours = LNFreeForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    ours.load_state_dict(state, assign=True)
    ours.tie_weights()
    return ours


def _to_stock(ours: LNFreeForCausalLM) -> PreTrainedModel:
    """Moves the weights of a model of this family, which is left empty."""
    ours.config.tie_word_embeddings = _is_tied(ours)
    config = stock_config(ours.config)
    state = {name: _take(parameter) for name, parameter in ours.named_parameters()}
    with torch.device("meta"):
        stock = ARCHITECTURES[config.model_type].model_class(config)
    for name, module in _stock_modules(stock, ours.config):
        for kind in ("weight", "bias"):
            parameter = getattr(module, kind, None)
            if parameter is None:
                continue
            names = [f"{name}.{kind}"]
            if name.endswith("qkv"):
                names = [f"{name.removesuffix('qkv')}self_attn.{p}.{kind}" for p in ("q_proj", "k_proj", "v_proj")]
            found = [state.pop(name, None) for name in names]
            # a projection without a bias has a bias of 0 there
            size = parameter.shape[-1] // len(names)
            tensors = [torch.zeros(size, dtype=ours.dtype) if tensor is None else tensor for tensor in found]
            tensor = _join(tensors, ours.config, config.model_type)
            if isinstance(module, Conv1D) and kind == "weight":
                tensor = tensor.T
            setattr(module, kind, nn.Parameter(tensor.contiguous()))
    stock.config.dtype = ours.config.dtype
    stock.tie_weights()
    return stock


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _stock_modules(stock: PreTrainedModel, config: LNFreeConfig) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a stock model that has weights, by its name here; `qkv` is the fused projection of a block."""
    body, architecture = stock.base_model, ARCHITECTURES[stock.config.model_type]
    yield "model.embed_tokens", stock.get_input_embeddings()
    if not config.tie_word_embeddings:
        yield "lm_head", stock.get_output_embeddings()
    for name, theirs in architecture.outer.items():
        yield f"model.{name}", body.get_submodule(theirs)
    for index, block in enumerate(body.get_submodule(architecture.layers)):
        for name, theirs in architecture.block.items():
            yield f"model.layers.{index}.{name}", block.get_submodule(theirs)


def _take(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter, which is left empty: no weight is held twice."""
    values = parameter.data
    parameter.data = values.new_empty(0)
    return values


def _split(tensor: Tensor, config) -> list[Tensor]:
    """Query, key and value out of a fused weight or bias, whose rows are the outputs."""
    if config.model_type == "gpt2":
        return [part.clone(memory_format=torch.contiguous_format) for part in tensor.chunk(3)]
    by_head = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:])  # (H, 3, d, ...)
    return [part.reshape(-1, *tensor.shape[1:]) for part in by_head.unbind(1)]


def _join(tensors: list[Tensor], config: LNFreeConfig, model_type: str) -> Tensor:
    """The fused weight or bias of query, key and value; what stands alone stays alone."""
    if len(tensors) == 1:
        return tensors[0]
    if model_type == "gpt2":
        return torch.cat(tensors)
    by_head = [tensor.view(config.num_attention_heads, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.stack(by_head, 1).flatten(0, 2)


def _scale_queries(state: dict[str, Tensor], config: GPT2Config):
    """GPT-2's options about the scale of the scores, moved into the query projections."""
    for index in range(config.n_layer):
        scale = 1.0 if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        if scale != 1:
            for kind in ("weight", "bias"):
                state[f"model.layers.{index}.self_attn.q_proj.{kind}"].mul_(scale)


@torch.no_grad()
def fold_norms(
    state: dict[str, Tensor], config: LNFreeConfig, deviations: dict[str, list[float]] | None = None
) -> LNFreeConfig:
    """
    Folds norms that divide by a constant into the weights around them, in place and in float64. A LayerNorm is then
    `(x - mean(x)) * weight / deviation + bias`: scale and bias go into the projections that read it, and all that is
    written to the residual stream is centered, so that its mean is 0 everywhere. An RMSNorm is a scale alone. The bias
    of the final norm, for which the output projection has no place, goes into the stream with the last block's output.

    Args:
        state: weights under this family's names, norms included.
        config: their configuration, with norms before attention and MLP.
        deviations: the constants by the norm's name, two for a norm before attention (query and key; value). A final
            norm that is not among them stays. None: those of norms whose epsilon dwarfs every variance, its root.

    Returns:
        The configuration without norms: `norm_type` is `"none"`, `final_norm_type` too unless that norm stays, the
        projections around a LayerNorm have biases, and the output projection of a model without a final norm is a
        matrix of its own, unlike the embedding it may have been tied to.

    Raises:
        UserError: if the final norm has a bias where its weight is 0.
    """
    centers = config.norm_type == "layernorm"
    keeps_final = config.final_norm_type == "none" or deviations is not None and "model.norm" not in deviations

    def constant(norm: str, part: int = 0) -> float:
        return config.layer_norm_eps**0.5 if deviations is None else deviations[norm][part]

    def read_from(norm: str, projections: list[str], part: int = 0):
        weight, bias = state[f"{norm}.weight"].double() / constant(norm, part), state.get(f"{norm}.bias")
        for name in projections:
            matrix = state[f"{name}.weight"]
            if bias is not None:
                before = state[f"{name}.bias"].double()
                state[f"{name}.bias"] = (before + matrix.double() @ bias.double()).to(matrix.dtype)
            state[f"{name}.weight"] = (matrix.double() * weight).to(matrix.dtype)

    def center(name: str, dim: int):
        if centers:
            tensor = state[name].double()
            state[name] = (tensor - tensor.mean(dim, keepdim=True)).to(state[name].dtype)

    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        if not keeps_final or centers:
            state["lm_head.weight"] = state["lm_head.weight"].clone()
    center("model.embed_tokens.weight", -1)
    if config.position_embedding_type == "learned":
        center("model.embed_positions.weight", -1)
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        names = [name for name in _PROJECTIONS if f"{block}.{name}.weight" in state]
        if centers:
            for name in names:
                matrix = state[f"{block}.{name}.weight"]
                state.setdefault(f"{block}.{name}.bias", matrix.new_zeros(len(matrix)))
        read_from(f"{block}.input_layernorm", [f"{block}.self_attn.{p}_proj" for p in "qk"])
        read_from(f"{block}.input_layernorm", [f"{block}.self_attn.v_proj"], part=-1)
        inputs = [f"{block}.{name}" for name in names if name in ("mlp.gate_proj", "mlp.up_proj")]
        read_from(f"{block}.post_attention_layernorm", inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for kind in ("weight", "bias"):
                state.pop(f"{block}.{norm}.{kind}", None)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for kind in ("weight", "bias"):
                if f"{block}.{name}.{kind}" in state:
                    center(f"{block}.{name}.{kind}", 0)
    without: dict[str, Any] = {"norm_type": "none", "layer_norm_eps": config.layer_norm_eps if keeps_final else 1e-5}
    if centers:
        without["biased_projections"] = [name.rpartition(".")[2] for name in names]
    if not keeps_final:
        _fold_final_norm(state, config, constant("model.norm"))
        without["final_norm_type"] = "none"
    if not keeps_final or centers:
        without["tie_word_embeddings"] = False
    return LNFreeConfig.from_dict({**config.to_dict(), **without})


def _fold_final_norm(state: dict[str, Tensor], config: LNFreeConfig, deviation: float):
    weight, bias = state.pop("model.norm.weight").double() / deviation, state.pop("model.norm.bias", None)
    matrix, last = state["lm_head.weight"], f"model.layers.{config.num_hidden_layers - 1}.mlp.down_proj.bias"
    state["lm_head.weight"] = (matrix.double() * weight).to(matrix.dtype)
    if bias is None:
        return
    shift = torch.where(bias == 0, 0, bias.double() / weight)
    if not shift.isfinite().all():
        raise UserError("the final LayerNorm has a bias where its weight is 0, and cannot be folded away")
    state[last] = (state[last].double() + shift).to(matrix.dtype)
