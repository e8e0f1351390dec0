"""The spectral norms that the bound of attention entropy is made of."""

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


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 9, 4)])
def test_norms_of_inputs_match_a_float64_svd(shape, with_bias):
    states = torch.randn(shape)
    wide = states.double()
    wide = torch.cat([wide, torch.ones(*shape[:2], 1, dtype=torch.float64)], -1) if with_bias else wide
    expected = torch.linalg.svdvals(wide)[:, 0] ** 2
    found = parametrization.gram_norm(states, with_bias=with_bias)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    # where positions rotate between the two, what is not less than the products of any token with all
    largest = torch.linalg.vector_norm(wide @ wide.mT, dim=-1).amax(-1)
    assert (parametrization.gram_norm(states, with_bias=with_bias, rotated=True) >= largest).all()
