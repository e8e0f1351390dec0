"""What several tests of the models need."""

import pytest
import torch

from modeling_lnfree import cpu


@pytest.fixture
def onednn(monkeypatch):
    """`use_fast_cpu` acts as on an AMD processor, and takes oneDNN at every size."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(cpu, "USE_ONEDNN", True)
    monkeypatch.setattr(cpu, "ONEDNN_SIZE", 0)
