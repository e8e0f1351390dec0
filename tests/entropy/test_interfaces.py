"""What records leave in the interfaces of transformers, and how they share them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_lnfree import record_attention_entropy

from .models import make_batch, make_model, random_states


def interfaces():
    """All functions that the interfaces hand out."""
    functions = [*ALL_ATTENTION_FUNCTIONS.values(), *ALL_MASK_ATTENTION_FUNCTIONS.values()]
    return functions + [ALL_ATTENTION_FUNCTIONS.get_interface(name, interfaces) for name in ("eager", "sdpa")]


def test_no_interface_is_left_changed_after_an_exception():
    model = make_model("llama")
    before = interfaces()
    with pytest.raises(RuntimeError, match="stop"), record_attention_entropy(model) as record:
        model(**make_batch("none"))
        raise RuntimeError("stop")
    assert interfaces() == before and not model._forward_pre_hooks
    assert record.num_queries == 39 and not record.entropy.isnan().any()


def test_blocks_in_threads_and_in_any_order_are_apart_and_leave_nothing():
    model, batch = make_model("llama"), make_batch("left")
    before = interfaces()
    start = threading.Barrier(3)

    def measure(model):
        start.wait()
        records = []
        for _ in range(10):
            with record_attention_entropy(model) as record, torch.no_grad():
                model(**batch)
            records.append(record)
        return records

    with ThreadPoolExecutor(3) as threads:
        measured = list(threads.map(measure, [make_model("llama"), make_model("llama", "eager"), make_model("gpt2")]))
    assert {record.num_queries for records in measured for record in records} == {26}

    first, second = record_attention_entropy(model), record_attention_entropy(model)
    with torch.no_grad():
        records = first.__enter__(), second.__enter__()
        model(**batch)
        first.__exit__(None, None, None)
        model(**batch)
        second.__exit__(None, None, None)
        model(**batch)
    assert [record.num_queries for record in records] == [26, 2 * 26]
    assert interfaces() == before


def test_any_number_of_blocks_with_passes_between_them():
    """As a training that is measured has; Python 3.13 overlooks what changes in a class often."""

    class Attention(torch.nn.Module):
        def forward(self, query):
            return ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, query, query, None, scaling=0.25)[0]

    model, (query, _) = Attention(), random_states(1, 2, 2, 3, 3, 8)
    for _ in range(500):
        for _ in range(3):
            model(query)
        with record_attention_entropy(model) as record:
            model(query)
        assert record.num_queries == 3
