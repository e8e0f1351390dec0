"""The torchmetrics form of the attention entropy: the numbers of the metric of evaluate, added up batch by batch."""

import math

import evaluate
import pytest
import torch

from modeling_lnfree import record_attention_entropy

from ..conftest import ROOT, random_ids
from .models import make_model


pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'lnfree[torchmetrics]'")

from modeling_lnfree.metrics.attention_entropy.torchmetric import AttentionEntropy  # noqa: E402


SHAPES = [(1, 5), (3, 9), (2, 2), (4, 7)]


def records(model):
    """Of batches of unlike sizes."""
    found = []
    for shape in SHAPES:
        with record_attention_entropy(model, reduce=False) as record, torch.no_grad():
            model(random_ids(*shape, vocab_size=61))
        found.append(record)
    return found


def make_metric(record, **kwargs):
    return AttentionEntropy(len(record.num_heads), record.num_heads, **kwargs)


def by_evaluate(measured):
    metric = evaluate.load(str(ROOT / "modeling_lnfree" / "metrics" / "attention_entropy"))
    metric.add_batch(predictions=measured)
    return metric.compute()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        given = [torch.tensor(each, dtype=torch.float64) for each in (found[name], values)]
        torch.testing.assert_close(*given, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


@pytest.mark.parametrize("broken", [False, True])
def test_batches_add_up_to_what_evaluate_says_and_a_reset_forgets_them(broken):
    model = make_model("gpt2")
    if broken:
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.bias[0] = torch.nan
    measured = records(model)
    expected = by_evaluate(measured)
    metric = make_metric(measured[0])
    for record in measured:
        metric.update(record)
    assert_equal(metric.compute(), expected)
    assert expected["num_queries"] == sum(rows * length for rows, length in SHAPES)
    assert math.isnan(expected["entropy"][1][0]) == (expected["nan_count"][1][0] > 0) == broken
    metric.reset()
    metric.update(measured[2])
    assert_equal(metric.compute(), by_evaluate(measured[2:3]))
    # what evaluate gave counts as much as what it was made of
    metric.update(by_evaluate([measured[0], measured[1], measured[3]]))
    assert_equal(metric.compute(), expected)


def test_two_halves_merge_to_the_whole_and_a_call_gives_its_own_batch():
    measured = records(make_model("llama"))
    halves = [make_metric(measured[0]) for _ in range(2)]
    for index, record in enumerate(measured):
        assert_equal(halves[index % 2](record), by_evaluate([record]))
    halves[0].merge_state(halves[1])
    assert_equal(halves[0].compute(), by_evaluate(measured))
    saved = make_metric(measured[0])
    saved.persistent(True)
    saved.merge_state(halves[0])
    again = make_metric(measured[0])
    again.load_state_dict(saved.state_dict())
    assert again.num_queries == sum(rows * length for rows, length in SHAPES)


def test_what_it_cannot_add_is_an_error():
    measured = records(make_model("gpt2"))[0]
    metric = make_metric(measured)
    with pytest.raises(ValueError, match=r"of a model with \[4, 4\] heads by layer, the metric of \[2\]"):
        AttentionEntropy(1, 2).update(measured)
    with pytest.raises(ValueError, match="must be a text, a record or a result of this metric, got dict without"):
        metric.update({"entropy": [[1.0]]})
    for numbers in ((0, 4), (2, [4]), (1, 0)):
        with pytest.raises(ValueError, match="num_heads one number or num_layers of them"):
            AttentionEntropy(*numbers)
    with record_attention_entropy(make_model("gpt2"), reduce=False) as nothing:
        pass
    metric.update(nothing)
    with pytest.raises(ValueError, match="no query was measured"):
        metric.compute()


def _measure_in_turn(rank, store, results):
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = make_model("gpt2")
    measured = records(model)
    metric = make_metric(measured[0])
    # three batches in one process, and one in the other
    for record in measured[:3] if rank == 0 else measured[3:]:
        metric.update(record)
    torch.save((metric.compute(), int(metric.num_queries)), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # each process imports transformers
def test_two_processes_see_all_batches(tmp_path):
    torch.multiprocessing.spawn(_measure_in_turn, args=(tmp_path / "store", tmp_path), nprocs=2)
    torch.manual_seed(0)
    expected = by_evaluate(records(make_model("gpt2")))
    for rank, own in enumerate((5 + 27 + 4, 28)):
        result, left = torch.load(tmp_path / f"{rank}.pt")
        assert_equal(result, expected)
        # and afterwards each has its own again
        assert left == own
