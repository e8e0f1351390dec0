"""Weights that are made of others, and the spectral norms that the bound of attention entropy is made of."""

import math

import pytest
import torch
from torch import nn

from training import parametrization

from .conftest import random_ids, tiny_model


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


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_sigma_matches_a_float64_svd_after_power_iterations(shape):
    weight = torch.randn(shape)
    sigma_reparam = parametrization.SigmaReparam(weight, None)
    assert sigma_reparam.gain.item() == pytest.approx(torch.linalg.svdvals(weight.double())[0].item(), rel=1e-6)
    # exactly the weight at the start
    assert sigma_reparam(weight).equal(weight)
    # another weight: the iterations find its norm
    weight = torch.randn(shape)
    for _ in range(50):
        sigma_reparam.update(weight)
    expected = torch.linalg.svdvals(weight.double())[0].item()
    assert sigma_reparam.sigma(weight).item() == pytest.approx(expected, rel=1e-4)
    found = torch.linalg.svdvals(parametrization.SpectralNorm(weight)(weight).double())[0].item()
    assert found == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["sigma_reparam", "weight_norm", "spectral_norm"])
def test_parametrized_model_folds_to_equal_logits(kind):
    model, ids = tiny_model("SM+LN+R", tie_word_embeddings=True), random_ids(2, 9)
    before, names = model(ids).logits, list(model.state_dict())
    parametrization.parametrize_weights(model, kind)
    if kind != "spectral_norm":
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        # a second forward pass before the backward one
        (model(ids, labels=ids).loss + model(ids, labels=ids).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        parametrization.update_spectral_norms(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = model(ids).logits
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    assert (trained - before).abs().max() > 1e-3
    ordinary, own = parametrization.split_state(model)
    assert set(ordinary) == set(names) and own
    parametrization.fold_weights(model)
    assert set(model.state_dict()) == set(names) and not parametrization.is_parametrized(model)
    torch.testing.assert_close(model(ids).logits, trained, rtol=0, atol=1e-6)
    assert all(ordinary[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_gain_is_a_parameter_of_the_parametrization_alone():
    layer = nn.Linear(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization.WeightNorm(layer.weight))
    assert {name for name, _ in layer.named_parameters()} == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.gain",
    }


def test_start_of_the_gains_is_the_one_named():
    model = tiny_model("SM+LN+R")
    parametrization.parametrize_weights(model, "sigma_reparam", ["q_proj"], 0.7)
    for layer in model.model.layers:
        assert torch.linalg.matrix_norm(layer.self_attn.q_proj.weight, 2).item() == pytest.approx(0.7, rel=1e-4)


def test_lower_bound_is_the_least_entropy_of_logits_of_that_norm():
    for number in (2, 3, 17):
        for norm in (0.0, 0.3, 2.0, 30.0):
            logits = torch.full((number,), -norm / math.sqrt(number * (number - 1)), dtype=torch.float64)
            logits[0] = norm * math.sqrt((number - 1) / number)
            assert logits.norm().item() == pytest.approx(norm)
            log_weights = logits.log_softmax(0)
            least = -(log_weights.exp() * log_weights).sum().item()
            bound = parametrization.entropy_lower_bound(
                torch.tensor([norm], dtype=torch.float64), torch.tensor([number])
            ).item()
            assert bound == pytest.approx(least, abs=1e-12)
            for _ in range(50):
                other = torch.randn(number, dtype=torch.float64)
                log_weights = (other * norm / other.norm()).log_softmax(0)
                assert -(log_weights.exp() * log_weights).sum().item() >= bound - 1e-12
    assert parametrization.entropy_lower_bound(torch.tensor(3.0), torch.tensor(1)).item() == 0


@pytest.mark.parametrize("biased", [[], ["q_proj", "k_proj"]])
def test_norm_of_query_and_key_matches_a_float64_svd(biased):
    attention = tiny_model("SM+G", biased_projections=biased).double().model.layers[1].self_attn
    found = parametrization.query_key_norm(attention.q_proj, attention.k_proj, 8)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        query, key = (
            torch.cat([layer.weight[rows], layer.bias[rows, None]], 1) if biased else layer.weight[rows]
            for layer in (attention.q_proj, attention.k_proj)
        )
        assert found[head].item() == pytest.approx(torch.linalg.svdvals(query.T @ key)[0].item())
