"""The spectral norm of queries against keys where several heads share a key."""

import pytest
import torch
from torch import nn

from training import parametrization


def test_norm_of_grouped_queries_is_with_the_keys_of_their_group():
    query, key = nn.Linear(6, 4 * 3), nn.Linear(6, 2 * 3)
    found = parametrization.query_key_norm(query, key, 3)
    matrices = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double() for layer in (query, key)]
    for head in range(4):
        of_query, of_key = matrices[0][3 * head :][:3], matrices[1][3 * (head // 2) :][:3]
        expected = torch.linalg.svdvals(of_query.T @ of_key)[0].item()
        assert found[head].item() == pytest.approx(expected, rel=1e-9)
