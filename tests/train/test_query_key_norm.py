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


@pytest.mark.parametrize("kind", ["spectral_norm", "sigma_reparam"])
def test_gradients_go_through_the_weight_and_its_norm(kind):
    """With u and v as they are, W / u'Wv by autograd in float64; and sigma is in float32 whatever is around it."""
    weight = torch.randn(5, 7, requires_grad=True)
    made = (
        parametrization.SpectralNorm(weight) if kind == "spectral_norm" else parametrization.SigmaReparam(weight, 2.0)
    )
    direction = torch.randn(5, 7)
    (made(weight) * direction).sum().backward()
    wide, u, v = weight.detach().double().requires_grad_(), made.u.double(), made.v.double()
    gain = 1.0 if kind == "spectral_norm" else 2.0
    (gain * wide / (u @ wide @ v) * direction).sum().backward()
    torch.testing.assert_close(weight.grad.double(), wide.grad, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made.sigma(weight).equal(made.sigma(weight.detach())) and made.sigma(weight).dtype == torch.float32
        found = made.sigma(weight)
    assert found.equal(made.sigma(weight))


@pytest.mark.parametrize("kind", ["spectral_norm", "sigma_reparam"])
def test_power_iterations_follow_the_weights_of_both_kinds(kind):
    from ..conftest import tiny_model

    model = tiny_model("SM+R")
    parametrization.parametrize_weights(model, kind, ["q_proj"], 1.0 if kind == "sigma_reparam" else None)
    layer = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    before = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    for _ in range(60):
        parametrization.update_spectral_norms(model)
    after = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    assert after == pytest.approx(1.0, rel=1e-2) != pytest.approx(before, rel=0.1)
