"""What the metric's tests need."""

import evaluate
import pytest

from modeling_lnfree.metrics.attention_entropy.attention_entropy import AttentionEntropy

from ..conftest import byte_tokenizer


@pytest.fixture(scope="module", autouse=True)
def quiet():
    evaluate.disable_progress_bar()
    yield
    evaluate.enable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    """No special tokens, and so nothing to pad with."""
    return byte_tokenizer()


@pytest.fixture
def metric(tmp_path):
    return AttentionEntropy(cache_dir=str(tmp_path))
