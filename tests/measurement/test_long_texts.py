"""Texts longer than what the model reads at a time: strided and rolling windows, by the recipes written out."""

import pytest
import torch
import torch.nn.functional as F

from modeling_lnfree import measure
from modeling_lnfree.likelihood import Reading, Window, negative_log_likelihoods, rolling

from .naive import TEXTS, make, make_tokenizer, reference


LENGTH = 8
TEXT = "".join(TEXTS) * 2 + "Qrst"


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="a", eos_token="b")


def documented_recipe(model, token_ids, max_length, stride):
    """Perplexity of fixed-length models, as the documentation of transformers computes it."""
    encodings = torch.tensor([token_ids])
    seq_len, nll_sum, n_tokens, prev_end_loc = encodings.size(1), 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_loss_tokens = (target_ids != -100).sum().item() - target_ids.size(0)
        # the loss of no token is not a number
        nll_sum += neg_log_likelihood * num_loss_tokens if num_loss_tokens else 0.0
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return torch.exp(nll_sum / n_tokens).item()


@pytest.mark.parametrize("stride", [1, 3, 7, LENGTH])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_strided_perplexity_is_that_of_the_documented_recipe(model, tokenizer, stride, batch_size):
    token_ids = tokenizer(TEXT)["input_ids"]
    if stride == 1:
        # all that follows the first window has one new token, which the recipe does not count
        token_ids = token_ids[: LENGTH + 5]
    expected = documented_recipe(reference(model), token_ids, LENGTH, stride)
    text = tokenizer.decode(token_ids)
    found = measure(model, [text], tokenizer=tokenizer, max_length=LENGTH, stride=stride, batch_size=batch_size)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.truncated_texts == 0 and found.num_tokens == found.num_bytes == len(text)
    predicted = len(text) - 1 if stride < LENGTH else len(text) - -(-len(text) // LENGTH)
    assert found.predicted_tokens == predicted


def test_concatenated_texts_are_one_with_an_empty_line_between_them(model):
    tokenizer = make_tokenizer()
    joined = "\n\n".join(TEXTS)
    token_ids = tokenizer(joined)["input_ids"]  # which has none for a line break
    found = measure(model, TEXTS, tokenizer=tokenizer, max_length=LENGTH, concatenate=True, stride=4)
    assert found.perplexity == pytest.approx(documented_recipe(reference(model), token_ids, LENGTH, 4), rel=1e-5)
    assert (found.num_texts, found.num_tokens, found.num_bytes) == (1, len(token_ids), len(joined))
    # windows of the whole length, unless it is said
    whole = measure(model, TEXTS, tokenizer=tokenizer, max_length=LENGTH, concatenate=True)
    assert whole.perplexity == pytest.approx(documented_recipe(reference(model), token_ids, LENGTH, LENGTH), rel=1e-5)


def rolling_log_likelihood(model, token_ids, prefix):
    """As the harness rolls: each token once, from the context that a window which ends with its piece has room for."""
    total, predicted = 0.0, 0
    while predicted < len(token_ids):
        number = min(LENGTH, len(token_ids) - predicted)
        end = predicted + number
        context = [prefix, *token_ids][:end][-LENGTH:]
        with torch.no_grad():
            likelihoods = model(torch.tensor([context])).logits[0].log_softmax(-1)
        for place, target in enumerate(token_ids[predicted:end]):
            total += likelihoods[len(context) - number + place, target].item()
        predicted = end
    return total


@pytest.mark.parametrize("length", [3, LENGTH, LENGTH + 1, 3 * LENGTH, 3 * LENGTH + 5])
def test_rolling_likelihood_is_that_of_the_harness(model, tokenizer, length):
    text = TEXT[:length]
    expected = rolling_log_likelihood(reference(model), tokenizer(text)["input_ids"], tokenizer.bos_token_id)
    found = measure(model, [text], tokenizer=tokenizer, max_length=LENGTH, rolling=True)
    assert -found.nll * found.predicted_tokens == pytest.approx(expected, abs=1e-4)
    assert found.predicted_tokens == found.num_tokens == length


def test_the_total_of_a_long_text_is_that_of_its_logits_in_float64(tokenizer):
    model, text = make("llama"), TEXT * 200
    with torch.no_grad():
        model.lm_head.weight.mul_(300)  # confident, and often wrong
    expected = torch.tensor(0.0, dtype=torch.float64)
    token_ids = tokenizer(text)["input_ids"]
    for window in rolling(token_ids, 64, tokenizer.bos_token_id):
        with torch.no_grad():
            logits = model(torch.tensor([window.input_ids])).logits[0, window.first :]
        nll = F.cross_entropy(logits.double(), torch.tensor(window.targets), reduction="none")
        (found,) = negative_log_likelihoods(model, [window])
        torch.testing.assert_close(found, nll, atol=1e-6, rtol=0, check_dtype=False)
        expected += nll.sum()
    found = measure(model, [text], tokenizer=tokenizer, max_length=64, rolling=True)
    assert found.nll > 20 and logits.abs().max() > 100
    assert found.total == pytest.approx(expected.item(), abs=1e-4)


def test_a_text_rolls_from_the_token_that_begins_it():
    for special, prefix in (({"bos_token": "c", "eos_token": "d"}, 2), ({"eos_token": "d"}, 3)):
        assert Reading(make_tokenizer(**special), 8, rolling=True).prefix == prefix


def test_rolling_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed: pip install 'lnfree[clients]'")
    for length in range(1, 40):
        token_ids = list(range(100, 100 + length))
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(token_ids, 7, LENGTH, 1))
        ours = list(rolling(token_ids, LENGTH, 7))
        for window, (context, continuation) in zip(ours, theirs, strict=True):
            assert window.input_ids == [*context, *continuation][:-1][-LENGTH:]
            assert window.targets == continuation
            assert window.first == len(window.input_ids) - len(continuation)


@pytest.mark.slow  # imports the harness
@pytest.mark.filterwarnings("default")  # what it warns about in itself
def test_lm_eval_rolls_over_a_long_text_as_we_do(model, tokenizer):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="pip install 'lnfree[clients]'").HFLM
    from lm_eval.api.instance import Instance

    text = TEXT * 50
    options = {"pretrained": model, "tokenizer": tokenizer, "device": "cpu", "max_length": 64, "batch_size": 32}
    found = measure(model, [text], tokenizer=tokenizer, max_length=64, rolling=True)
    rolled = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    (total,) = harness(**options, softmax_dtype="float64").loglikelihood_rolling(rolled, disable_tqdm=True)
    assert found.predicted_tokens == len(text) > 3000
    assert -found.total == pytest.approx(total, abs=1e-4)
    # by its default, a token at a time: its sum over a window is rounded
    tokens = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"][:64]]
    requests = [(None, tokens[:end], [tokens[end]]) for end in range(1, len(tokens))]
    singles = harness(**options)._loglikelihood_tokens(requests, disable_tqdm=True)
    (ours,) = negative_log_likelihoods(model, [Window(tokens[:-1], tokens[1:])])
    assert (-ours).tolist() == pytest.approx([single for single, _ in singles], abs=1e-4)


@pytest.mark.parametrize("way", [{}, {"stride": 3}, {"rolling": True}])
def test_batch_size_and_company_change_nothing(model, tokenizer, way):
    texts = [TEXT, *TEXTS]
    whole = measure(model, texts, tokenizer=tokenizer, max_length=LENGTH, batch_size=5, **way)
    ones = measure(model, texts, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, **way)
    assert whole.summary == pytest.approx(ones.summary, rel=1e-4)
    first = measure(model, texts[:1], tokenizer=tokenizer, max_length=LENGTH, **way)
    rest = measure(model, texts[1:], tokenizer=tokenizer, max_length=LENGTH, **way)
    assert whole.total == pytest.approx(first.total + rest.total, rel=1e-6)
    assert whole.summary["max_logit"] == pytest.approx(max(first.summary["max_logit"], rest.summary["max_logit"]))
