"""Attention entropy of every head of a causal language model, as a metric of `evaluate`.

A head that attends from one query with the weights p has the entropy -sum_j p_j log p_j, in nats: 0 if it looks at one
key only, the logarithm of the number of visible keys if it looks at all alike. The metric reports the mean over all
queries of all texts, for every layer and head (arXiv 2410.09637). It is exact and forms no attention map; the
mathematics stands in `entropy.py`.
"""

from collections.abc import Mapping, Sequence, Sized
from itertools import groupby
from numbers import Integral
from typing import Any

import evaluate
import torch
from datasets import Features, List, Value
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .entropy import compute_attention_entropy
from .linear import LinearEntropy
from .reading import (
    adapted_model,
    check_max_length,
    check_reachable,
    encode,
    evaluating,
    inner_model,
    load_model,
    pad,
    side,
)
from .record import AttentionEntropyRecord
from .recorder import record_attention_entropy
from .summary import combine, to_numbers
from .visibility import Visibility


# `evaluate` brings along the files that this one imports, and not those that they import
__all__ = ["AttentionEntropy", "AttentionEntropyRecord", "LinearEntropy", "Visibility", "compute_attention_entropy"]


_CITATION = """\
@article{jha2024relu,
  title={ReLU's Revival: On the Entropic Overload in Normalization-Free Large Language Models},
  author={Jha, Nandan Kumar and Reagen, Brandon},
  journal={arXiv preprint arXiv:2410.09637},
  year={2024}
}
"""

# of a measurement, see `summary.FIELDS`
_FEATURES = {
    "entropy": List(List(Value("float64"))),
    "max_entropy": List(List(Value("float64"))),
    "nan_count": List(List(Value("int64"))),
    "inf_count": List(List(Value("int64"))),
    "empty_count": List(List(Value("int64"))),
    "num_queries": Value("int64"),
}


class AttentionEntropy(evaluate.Metric):
    """
    Predictions are texts, which a model reads, or measurements made before, which are put together.

    Args:
        predictions (`list`): texts (`str`, none empty), each measured by itself; or measurements: records of
            `metric.record`, results of `compute`, or dictionaries with their keys `entropy`, `max_entropy`,
            `nan_count`, `inf_count` and `num_queries`.
        references (*optional*): not looked at; `evaluate.combine` passes them to all of its metrics.
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

        - **entropy** (`list` of shape `(layers, heads)`): mean over the queries, in nats. Where layers have different
          numbers of heads, rows have different lengths.
        - **max_entropy** (`list` of shape `(layers, heads)`): largest value that the same queries can reach, in nats:
          the mean of the logarithm of the number of keys that each sees.
        - **normalized_entropy** (`list` of shape `(layers, heads)`): `entropy / max_entropy`, in [0, 1].
        - **layer_entropy** (`list` of shape `(layers,)`): mean of `entropy` over the heads, in nats.
        - **mean_entropy** (`float`): mean of `entropy` over layers and heads, in nats.
        - **head_distribution** (`list` of shape `(4,)`): share of the heads whose entropy is in [0, max/4),
          [max/4, max/2), [max/2, 3max/4) and [3max/4, max]. Broken heads are in none of them.
        - **nan_count**, **inf_count** (`list` of shape `(layers, heads)`): number of attention weights that are NaN,
          and of scores that have an infinity in their query or key.
        - **empty_count** (`list` of shape `(layers, heads)`): number of queries that softmax clipping leaves no
          weight, which are not in the mean of `entropy`; 0 for models without it.
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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._texts: list[str] = []

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=Features({"predictions": _FEATURES}),
            reference_urls=["https://arxiv.org/abs/2410.09637"],
        )

    def add(
        self,
        *,
        prediction: str | Mapping[str, Any] | AttentionEntropyRecord | None = None,
        predictions: str | Mapping[str, Any] | AttentionEntropyRecord | None = None,
    ) -> None:
        """Add one text or one measurement, by either name: `evaluate.combine` takes the second."""
        given: Any = predictions if prediction is None else prediction
        self.add_batch(predictions=[given])

    def add_batch(self, *, predictions: Sequence[str | Mapping[str, Any] | AttentionEntropyRecord]) -> None:
        """Add texts or measurements."""
        texts = _are_texts(predictions)
        self._check_kind(texts)
        if texts:
            # measured by `compute`, and until then safe from its errors
            self._texts += map(str, predictions)
        else:
            measurements: Any = predictions
            super().add_batch(predictions=[to_numbers(measurement) for measurement in measurements])

    def _check_kind(self, texts: bool) -> None:
        if self.writer is not None if texts else self._texts:
            raise ValueError("predictions must be texts or measurements, not both")

    def compute(
        self,
        *,
        predictions: Sequence[str | Mapping[str, Any] | AttentionEntropyRecord] | None = None,
        references: Sequence[Any] | None = None,
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
        # all is measured before anything is added, so that a corrected call finds what was there
        if predictions is None and self.writer is None and not self._texts:
            raise ValueError("there is nothing to compute: pass predictions=, or add them first by add or add_batch")
        texts = bool(self._texts)
        if predictions is not None:
            texts = _are_texts(predictions)
            self._check_kind(texts)
        if not texts:
            if model_id is not None or model is not None:
                raise ValueError("measurements are put together without a model; model_id= and model= are for texts")
            return super().compute(predictions=predictions)
        if (model_id is None) == (model is None):
            raise ValueError("to measure texts, pass either model_id=, or model= and tokenizer=")
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        loading = {"device": device, "trust_remote_code": trust_remote_code, "revision": revision, "dtype": dtype}
        for named in (model_id, tokenizer):
            if isinstance(named, str):
                check_reachable(named)
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
        texts = [*self._texts, *map(str, () if predictions is None else predictions)]
        record = _measure(texts, model, tokenizer, batch_size=batch_size, max_length=max_length)
        self._texts = []
        return super().compute(predictions=[record])

    def _compute(self, *, predictions: list[dict[str, Any]]) -> dict[str, Any]:
        return combine(predictions)


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


def _measure(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
) -> AttentionEntropyRecord:
    sequences = [token_ids[:max_length] for token_ids in encode(texts, tokenizer)]
    for text, sequence in zip(texts, sequences, strict=True):
        if not sequence:
            raise ValueError(f"the text {text!r} has no tokens")
    # little padding
    sequences.sort(key=len)
    inner, adapted = inner_model(model), adapted_model(model)
    alike = [list(group) for _, group in groupby(sequences, key=lambda sequence: side(inner, len(sequence)))]
    batches = [group[i : i + batch_size] for group in alike for i in range(0, len(group), batch_size)]
    # the model without its head: the logits of all tokens would take the most memory
    backbone = inner.base_model if adapted is None else adapted
    device = inner.device
    if device.type == "meta":
        # the weights are elsewhere until they are needed, as accelerate's offload has it
        device = torch.device(getattr(getattr(inner, "_hf_hook", None), "execution_device", None) or "cpu")
    # not reduced: other processes may measure other texts, or none
    # nor are the towers of other modalities, which read no text
    with (
        evaluating(model),
        torch.no_grad(),
        record_attention_entropy(inner.base_model.get_decoder(), reduce=False) as record,
    ):
        for batch in evaluate.logging.tqdm(batches):
            backbone(**pad(batch, device), use_cache=False)
    if record.num_queries == 0:
        raise ValueError("no query was measured: " + "; ".join(record.unmeasured))
    return record
