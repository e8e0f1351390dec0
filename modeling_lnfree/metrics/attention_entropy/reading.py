"""Models that are measured, and the texts that they read."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import httpx2
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    model_id: str,
    *,
    device: str | torch.device | None,
    trust_remote_code: bool,
    revision: str | None,
    dtype: str | torch.dtype | None,
    with_head: bool = True,
) -> PreTrainedModel:
    """
    A causal language model in evaluation mode, with the arguments of the metric's `compute`. Without `with_head`,
    its output projection may be missing, which entropy does not need.

    Raises:
        OSError, ValueError: if it cannot be loaded, or lacks weights, in whose place random ones would be measured.
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    loading = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype or "auto"}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_id, **loading, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except ValueError as error:
        # of a model of another kind, transformers names all that are of this one
        raise ValueError(str(error).split("Model type should be one of")[0].strip()) from error
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        sizes = f"{name} has {tuple(found)}, not {tuple(wanted)}"
        raise ValueError(f"{model_id} has weights of other sizes than its configuration: {sizes}")
    part = "" if with_head else f"{model.base_model_prefix}."
    if missing := sorted(name for name in report["missing_keys"] if name.startswith(part)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{model_id} lacks weights, which would be random: {', '.join(missing[:3])}{more}")
    return model.to(device).eval()


def check_reachable(model_id: str) -> None:
    """
    Raises OSError or ValueError at once for a model that is neither a folder nor in the cache, and of which the Hub
    cannot be asked: loading it would try for a minute.
    """
    ask_hub(ask_for_model, model_id, f"model {model_id!r} is no folder")


def ask_hub(ask: Callable[[str], None], name: str, nowhere: str) -> None:
    """Calls `ask` with a name. Raises an error that begins with `nowhere` if it is no id, or there is no answer."""
    try:
        ask(name)
    except httpx2.TransportError as error:
        raise ConnectionError(f"{nowhere}, and the Hub cannot be reached to look for it: {error}") from error
    except HFValidationError:
        raise ValueError(f"{nowhere}, and cannot be an id of the Hub") from None
    except (OSError, ValueError):
        # what loads it says what the Hub answers
        return


def ask_for_model(model_id: str) -> None:
    """Asks the Hub for a model or tokenizer that is neither a folder nor in the cache."""
    files = ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json")
    if not os.path.isdir(model_id) and not any(isinstance(try_to_load_from_cache(model_id, f), str) for f in files):
        HfApi().model_info(model_id, timeout=10)


def side(model: PreTrainedModel, length: int) -> int:
    """
    Which texts a text of `length` tokens may share a batch with: a model with scaled rotary positions may turn the
    whole batch by other frequencies once one text is longer than those that it was first trained on (longrope,
    arXiv 2402.13753).
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    parts = (rope, *rope.values())
    lengths: set[Any] = {
        getattr(part, "get", dict[str, Any]().get)("original_max_position_embeddings") for part in parts
    }
    lengths.add(getattr(config, "original_max_position_embeddings", None))
    return bisect_left(sorted(lengths - {None}), length)


def check_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """
    Number of tokens to read of a text: `max_length`, or as many as model and tokenizer take.

    Raises:
        ValueError: if `max_length` is no integer, below 1, or more than the model has positions.
    """
    inner = inner_model(model)
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    for name, module in inner.named_modules():
        # RoBERTa's begin behind that of its padding token
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    positions -= _virtual_tokens(model)
    if max_length is None:
        # 1e30 is no integer in JSON
        return int(min(tokenizer.model_max_length, positions))
    if not isinstance(max_length, Integral) or not 1 <= max_length <= positions:
        raise ValueError(
            f"max_length must be an integer in 1 to {positions}, the positions of the model, got {max_length!r}"
        )
    return max_length


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every text, with the special tokens that the tokenizer adds by itself."""
    # not verbose: what is longer than the model's positions is cut afterwards
    return tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, `(batch, longest)`, padded on the right; no padding token is needed."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    input_ids = pad_sequence(rows, batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; behind it, every module in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers in a wrapper, as PEFT's or `DataParallel`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"model must be a model of transformers or hold one, got {type(model).__name__}")


def adapted_model(model: nn.Module) -> nn.Module | None:
    """PEFT's model, if there is one: it puts tokens or keys before those of the model in it."""
    found = (module for module in model.modules() if hasattr(module, "peft_config"))
    return next(found, None)


def _virtual_tokens(model: nn.Module) -> int:
    adapted = adapted_model(model)
    adapter = None if adapted is None else getattr(adapted, "active_peft_config", None)
    return getattr(adapter, "num_virtual_tokens", None) or 0
