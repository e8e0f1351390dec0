"""Attention entropy of every head of a causal language model, as a metric of `evaluate`.

A head that attends from one query with the weights p has the entropy -sum_j p_j log p_j, in nats: 0 if it looks at one
key only, the logarithm of the number of visible keys if it looks at all alike. The metric reports the mean over all
queries of all texts, for every layer and head (arXiv 2410.09637). It is exact and forms no attention map; the
mathematics stands in `entropy.py`.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence, Sized
from itertools import groupby
from numbers import Integral
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .entropy import AttentionEntropyRecord, record_attention_entropy


_CITATION = """\
@article{jha2024relu,
  title={ReLU's Revival: On the Entropic Overload in Normalization-Free Large Language Models},
  author={Jha, Nandan Kumar and Reagen, Brandon},
  journal={arXiv preprint arXiv:2410.09637},
  year={2024}
}
"""

# what a measurement holds, by the names of `AttentionEntropyRecord`
_MEASUREMENT = {
    "entropy": List(List(Value("float64"))),
    "max_entropy": List(List(Value("float64"))),
    "nan_count": List(List(Value("int64"))),
    "inf_count": List(List(Value("int64"))),
    "num_queries": Value("int64"),
}


class AttentionEntropy(evaluate.Metric):
    """
    Predictions are texts, which a model reads, or measurements made before, which are put together.

    Args:
        predictions (`list`): texts (`str`, none empty), each measured by itself; or measurements: records of
            `metric.record`, results of `compute`, or dictionaries with their keys `entropy`, `max_entropy`,
            `nan_count`, `inf_count` and `num_queries`.
        model_id (`str`, *optional*): Hub id or folder of a causal language model, for texts.
        model (`transformers.PreTrainedModel`, *optional*): a model at hand, instead of `model_id`. It is measured
            where it is, in evaluation mode.
        tokenizer (`transformers.PreTrainedTokenizerBase` or `str`, *optional*): a tokenizer, its Hub id or its folder;
            that of `model_id` by default.
        batch_size (`int`, defaults to 16): texts in a forward pass. It does not change the result.
        max_length (`int`, *optional*): only the first `max_length` tokens of a text are read; by default as many as
            the model has positions.
        device (`str`, *optional*): device to load `model_id` on; by default an accelerator, if there is one.
        trust_remote_code (`bool`, defaults to `False`): whether the code that comes with `model_id` may be run.
        revision (`str`, *optional*): branch, tag or commit of `model_id`.
        dtype (`str` or `torch.dtype`, *optional*): dtype to load `model_id` in; by default that of its weights.

    Returns:
        `dict`, with NaN, and never 0, where a head is broken:

        - **entropy** (`list` of shape `(layers, heads)`): mean over the queries, in nats.
        - **max_entropy** (`list` of shape `(layers, heads)`): largest value that the same queries can reach, in nats:
          the mean of the logarithm of the number of keys that each sees.
        - **normalized_entropy** (`list` of shape `(layers, heads)`): `entropy / max_entropy`, in [0, 1].
        - **layer_entropy** (`list` of shape `(layers,)`): mean of `entropy` over the heads, in nats.
        - **mean_entropy** (`float`): mean of `entropy` over layers and heads, in nats.
        - **head_distribution** (`list` of shape `(4,)`): share of the heads whose entropy is in [0, max/4),
          [max/4, max/2), [max/2, 3max/4) and [3max/4, max]. Broken heads are in none of them.
        - **nan_count**, **inf_count** (`list` of shape `(layers, heads)`): number of attention weights that are NaN,
          and of scores that have an infinity in their query or key.
        - **num_queries** (`int`): number of queries measured in each layer, which is the number of tokens.

    Raises:
        ValueError: for inputs that are missing, empty, contradictory or of another kind; and for a model that computes
            its attention beside the attention interface of transformers (BLOOM, MPT, Falcon) or is an encoder-decoder.
        OSError: if `model_id` or `tokenizer` cannot be loaded.

    Examples:

        A model at hand; any causal language model of the Hub is named by `model_id` instead.

        >>> import evaluate
        >>> from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4)).eval()
        >>> tokenizer = ByT5Tokenizer()
        >>> metric = evaluate.load("./attention_entropy")
        >>> result = metric.compute(predictions=["A text.", "Another."], model=model, tokenizer=tokenizer)
        >>> result["num_queries"]  # the bytes, and an end-of-text token a text
        17
        >>> len(result["entropy"]), len(result["entropy"][0])  # layers, heads
        (2, 4)
        >>> 0 < result["mean_entropy"] < result["max_entropy"][0][0]
        True
        >>> result["head_distribution"]  # random heads look at all keys alike
        [0.0, 0.0, 0.0, 1.0]

        Measurements that are made on the way, as in training.

        >>> for text in ["A text.", "Another."]:
        ...     with metric.record(model) as record:
        ...         output = model(**tokenizer(text, return_tensors="pt"))
        ...     metric.add(prediction=record)
        >>> streamed = metric.compute()
        >>> abs(streamed["mean_entropy"] - result["mean_entropy"]) < 1e-5
        True
    """

    # for those who have only the metric: `with metric.record(model) as record: model(**batch)`
    record = staticmethod(record_attention_entropy)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=[Features({"predictions": Value("string")}), Features({"predictions": _MEASUREMENT})],
            reference_urls=["https://arxiv.org/abs/2410.09637"],
        )

    def add(self, *, prediction: str | Mapping[str, Any] | AttentionEntropyRecord) -> None:
        """Add one text or one measurement."""
        self.add_batch(predictions=[prediction])

    def add_batch(self, *, predictions: Sequence[str | Mapping[str, Any] | AttentionEntropyRecord]) -> None:
        """Add texts or measurements."""
        texts = _are_texts(predictions)
        if self.writer is not None and texts != self._holds_texts():
            raise ValueError("predictions must be texts or measurements, not both")
        super().add_batch(predictions=[text if texts else _measurement(text) for text in predictions])

    def compute(
        self,
        *,
        predictions: Sequence[str | Mapping[str, Any] | AttentionEntropyRecord] | None = None,
        model_id: str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> dict[str, Any] | None:
        """Attention entropy over all predictions, those given here and those added before."""
        # checked and loaded before anything is added, so that a corrected call finds what was there
        if predictions is None and self.writer is None:
            raise ValueError("there is nothing to compute: pass predictions=, or add them first by add or add_batch")
        if not (self._holds_texts() if predictions is None else _are_texts(predictions)):
            if model_id is not None or model is not None:
                raise ValueError("measurements are put together without a model; model_id= and model= are for texts")
            return super().compute(predictions=predictions)
        if (model_id is None) == (model is None):
            raise ValueError("to measure texts, pass either model_id=, or model= and tokenizer=")
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        loading = {"device": device, "trust_remote_code": trust_remote_code, "revision": revision, "dtype": dtype}
        if model is None:
            model = load_model(model_id, **loading, with_head=False)
        elif any(loading.values()):
            named = ", ".join(name for name, value in loading.items() if value)
            raise ValueError(f"a model at hand is measured as it is; {named} is for model_id=")
        elif tokenizer is None:
            raise ValueError("model= needs tokenizer= beside it")
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=trust_remote_code)
        elif isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        max_length = check_max_length(model, tokenizer, max_length)
        return super().compute(
            predictions=predictions, model=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )

    def _holds_texts(self) -> bool:
        return isinstance(self.selected_feature_format["predictions"], Value)

    def _compute(self, *, predictions: list, model: PreTrainedModel | None = None, **kwargs) -> dict[str, Any]:
        if model is not None:
            predictions = [_measurement(_measure(predictions, model, **kwargs))]
        return _summarize(predictions)


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
    A causal language model in evaluation mode, with the arguments of `AttentionEntropy.compute`. Without `with_head`,
    its output projection may be missing, which entropy does not need.

    Raises:
        OSError, ValueError: if it cannot be loaded, or lacks weights, in whose place random ones would be measured.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    model, report = AutoModelForCausalLM.from_pretrained(
        model_id,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype or "auto",
        output_loading_info=True,
    )
    part = "" if with_head else f"{model.base_model_prefix}."
    if missing := sorted(name for name in report["missing_keys"] if name.startswith(part)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{model_id} lacks weights, which would be random: {', '.join(missing[:3])}{more}")
    return model.to(device).eval()


def side(model: PreTrainedModel, length: int) -> int:
    """
    Which texts a text of `length` tokens may share a batch with: a model with scaled rotary positions may turn the
    whole batch by other frequencies once one text is longer than those that it was first trained on (longrope,
    arXiv 2402.13753).
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = {getattr(part, "get", {}.get)("original_max_position_embeddings") for part in (rope, *rope.values())}
    lengths.add(getattr(config, "original_max_position_embeddings", None))
    return bisect_left(sorted(lengths - {None}), length)


def check_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """
    Number of tokens to read of a text: `max_length`, or as many as model and tokenizer take.

    Raises:
        ValueError: if `max_length` is no integer, below 1, or more than the model has positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    if max_length is None:
        return min(tokenizer.model_max_length, positions)
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


def summarize(record: AttentionEntropyRecord) -> dict[str, Any]:
    """
    The result of `AttentionEntropy.compute` for one record.

    Raises:
        ValueError: if nothing was measured.
    """
    return _summarize([_measurement(record)])


def _are_texts(predictions: Sequence[Any]) -> bool:
    if isinstance(predictions, str | Mapping) or not isinstance(predictions, Sized) or len(predictions) == 0:
        raise ValueError(f"predictions must be a list with at least one text or measurement, got {predictions!r}")
    for prediction in predictions:
        if not isinstance(prediction, str | Mapping) and not hasattr(prediction, "entropy"):
            raise ValueError(
                f"a prediction must be a text, a record or a result of this metric, got {prediction!r:.80}"
            )
    kinds = {isinstance(prediction, str) for prediction in predictions}
    if len(kinds) > 1:
        raise ValueError("predictions must be texts or measurements, not both")
    # here and not when a tokenizer finds nothing in it: that would be too late for the texts added before
    if kinds == {True} and not all(predictions):
        raise ValueError("predictions hold an empty text")
    return kinds.pop()


def _measurement(prediction: Mapping[str, Any] | AttentionEntropyRecord) -> dict[str, Any]:
    """The fields of a measurement as Python numbers."""
    if isinstance(prediction, Mapping):
        found = {name: prediction[name] for name in _MEASUREMENT if name in prediction}
    else:
        found = {name: getattr(prediction, name) for name in _MEASUREMENT if hasattr(prediction, name)}
    missing = [name for name in _MEASUREMENT if name not in found]
    if missing:
        raise ValueError(
            "a prediction must be a text, a record or a result of this metric, got "
            f"{type(prediction).__name__} without {', '.join(missing)}"
        )
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def _measure(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
) -> AttentionEntropyRecord:
    sequences = [token_ids[:max_length] for token_ids in encode(texts, tokenizer)]
    for text, sequence in zip(texts, sequences, strict=True):
        if not sequence:
            raise ValueError(f"the text {text!r} has no tokens")
    # little padding
    sequences.sort(key=len)
    alike = [list(group) for _, group in groupby(sequences, key=lambda sequence: side(model, len(sequence)))]
    batches = [group[i : i + batch_size] for group in alike for i in range(0, len(group), batch_size)]
    # the model without its head: the logits of all tokens would take the most memory
    backbone = model.base_model
    was_training = model.training
    model.eval()
    try:
        # not reduced: other processes may measure other texts, or none
        # nor are the towers of other modalities, which read no text
        with torch.no_grad(), record_attention_entropy(backbone.get_decoder(), reduce=False) as record:
            for batch in evaluate.logging.tqdm(batches):
                backbone(**pad(batch, model.device), use_cache=False)
    finally:
        model.train(was_training)
    return record


def _summarize(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    measurements = [measurement for measurement in measurements if measurement["num_queries"] > 0]
    if not measurements:
        raise ValueError(
            "no query was measured: the model read nothing while it was recorded, or ran a graph that "
            "torch.compile had made before"
        )
    shapes = {np.shape(measurement["entropy"]) for measurement in measurements}
    if len(shapes) > 1:
        raise ValueError(f"the measurements are of models of different (layers, heads): {sorted(shapes)}")
    sums = {
        name: torch.tensor([measurement[name] for measurement in measurements], dtype=torch.float64)
        for name in _MEASUREMENT
    }
    queries = sums["num_queries"]
    weights = (queries / queries.sum())[:, None, None]
    entropy, max_entropy = ((weights * sums[name]).sum(0) for name in ("entropy", "max_entropy"))  # (layers, heads)
    normalized = (entropy / max_entropy).clamp(max=1.0)
    quarters = (4 * normalized).floor().clamp(max=3)
    return {
        "entropy": entropy.tolist(),
        "max_entropy": max_entropy.tolist(),
        "normalized_entropy": normalized.tolist(),
        "layer_entropy": entropy.mean(1).tolist(),
        "mean_entropy": entropy.mean().item(),
        "head_distribution": [(quarters == quarter).double().mean().item() for quarter in range(4)],
        "nan_count": sums["nan_count"].sum(0).long().tolist(),
        "inf_count": sums["inf_count"].sum(0).long().tolist(),
        "num_queries": int(queries.sum()),
    }
