"""What the parts of a model add to its logits: against float64 written out here, and taking them out for real."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_lnfree import (
    LNFreeConfig,
    LNFreeForCausalLM,
    activation_patching,
    attribute_logits,
    attribution_patching,
    logit_lens,
)
from training.convert.convert import load_in_family

from .conftest import random_ids, tiny_model
from .convert.test_convert import remove_layernorm_by_scaling, tiny_gpt2, tiny_neox
from .modeling.designs import design, design_model, every_design_and_backbone


def of_design(name, backbone, **fields):
    """A model of a design with other fields set too, and tokens."""
    config = LNFreeConfig.from_dict({**design(name, backbone).to_dict(), **fields})
    model = LNFreeForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, random_ids(2, 9, vocab_size=61)


def mixes_behind(config) -> bool:
    """Whether a norm stands behind what the parts write, before the end."""
    return config.norm_type != "none" and any(layer.norm_position != "pre" for layer in config.per_layer_config)


def set_to_zero(module, parameter: str = "weight"):
    with torch.no_grad():
        getattr(module, parameter).zero_()


@every_design_and_backbone
def test_parts_of_every_design_add_up_to_its_logits(name, backbone):
    model, input_ids = of_design(name, backbone)
    config = model.config
    if mixes_behind(config):
        first = 1 if name == "HybridNorm-star" else 0
        for linearize in (False, True):
            with pytest.raises(ValueError, match=f"^norm_position='(post|peri|hybrid)' in layer {first}: a norm"):
                attribute_logits(model, input_ids, linearize=linearize)
        return
    if config.final_norm_type != "none":
        with pytest.raises(ValueError, match=f"^final_norm_type='{config.final_norm_type}': the final norm divides"):
            attribute_logits(model, input_ids)
    logits = model(input_ids).logits
    fused = any(layer.mlp_type == "fused" for layer in config.per_layer_config)
    found = attribute_logits(model, input_ids, 5, against=7, linearize=True, neurons=not fused)
    torch.testing.assert_close(found.logits, (logits[..., 5] - logits[..., 7]).detach())
    torch.testing.assert_close(found.total, found.logits, atol=1e-10, rtol=1e-10)
    assert found.heads.shape == (2, 4, 2, 9) and found.mlps.shape == found.biases.shape == (2, 2, 9)
    assert (found.position.abs().max() > 1e-6) == (backbone == "gpt2")
    for layer, own in enumerate(config.per_layer_config):
        assert (found.biases[layer].abs().max() > 0) == ("o_proj" in own.biased_projections), layer
        assert (found.mlps[layer].abs().max() > 0) == (own.mlp_type != "none")
        if not fused and "down_proj" not in own.biased_projections:
            torch.testing.assert_close(found.neurons[layer].sum(0), found.mlps[layer])


@pytest.mark.parametrize("backbone", ["gpt2", "pythia", "llama"])
@pytest.mark.parametrize("name", ["residual_gains", "embedding_multiplier", "logits_multiplier", "gated", "head_dim"])
def test_a_part_is_what_its_removal_from_the_last_layer_takes_away(name, backbone):
    """In the last layer nothing but the logits reads what the MLP writes, nor a head once there is no MLP."""
    model, input_ids = of_design(name, backbone, final_norm_type="none")
    found = attribute_logits(model, input_ids, 5, neurons=True)
    logits, last = model(input_ids).logits[..., 5], model.model.layers[-1]
    width = model.config.head_dim
    weight = last.mlp.down_proj.weight.clone()
    with torch.no_grad():
        last.mlp.down_proj.weight[:, 3] = 0
    torch.testing.assert_close(found.neurons[-1, 3], logits - model(input_ids).logits[..., 5])
    with torch.no_grad():
        last.mlp.down_proj.weight.copy_(weight)
        if last.mlp.down_proj.bias is not None:
            last.mlp.down_proj.bias.zero_()
    set_to_zero(last.mlp.down_proj)
    without_mlp = model(input_ids).logits[..., 5]
    torch.testing.assert_close(found.mlps[-1], (logits - without_mlp).detach())
    with torch.no_grad():
        last.self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
    torch.testing.assert_close(found.heads[-1, 2], (without_mlp - model(input_ids).logits[..., 5]).detach())


def test_float32_sums_to_its_own_rounding_with_padding_and_batches():
    model = tiny_model("SM+R-noLNf")
    input_ids, mask = random_ids(3, 13), torch.ones(3, 13, dtype=torch.long)
    mask[0, :4] = 0
    found = attribute_logits(model, input_ids, attention_mask=mask)
    logits = model(input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert found.targets.equal(logits.argmax(-1))
    torch.testing.assert_close(found.logits.float(), logits.max(-1).values, atol=0, rtol=0)
    # how a processor adds up decides the last bits: a few of them, of the size of what is added up at each position
    size = torch.stack([part.abs() for part in found.parts.values()]).sum(0)
    assert ((found.total - found.logits).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()
    assert list(found.parts)[2:8] == [f"layer 0 head {h}" for h in range(4)] + [
        "layer 0 attention bias",
        "layer 0 MLP",
    ]
    assert found.error == 0 and found.effects == {}


@pytest.mark.parametrize("stock", [tiny_gpt2, tiny_neox])
def test_a_stock_model_whose_norms_were_taken_out_is_exact_once_imported(stock, tmp_path):
    model = stock()
    remove_layernorm_by_scaling(model).save_pretrained(tmp_path / "stock")
    expected = model.eval()(input_ids := random_ids(1, 13)).logits.max(-1)
    found = attribute_logits(load_in_family(tmp_path / "stock").eval(), input_ids)
    scale = found.logits.abs().max().item()
    torch.testing.assert_close(found.logits.float(), expected.values, atol=1e-4 * scale, rtol=0)
    torch.testing.assert_close(found.total, found.logits, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("final", ["layernorm", "rmsnorm", "dyt", "derf"])
def test_a_norm_that_is_held_has_parts_and_says_what_it_gets_wrong(final):
    model, input_ids = of_design("residual_gains", "gpt2", final_norm_type=final)
    found = attribute_logits(model, input_ids, 5, linearize=True)
    # the stream with the last feed-forward layer's part taken out, through the norm as it is
    logits = model(input_ids).logits[..., 5]
    last = model.model.layers[-1].mlp.down_proj
    set_to_zero(last)
    effect = (logits - model(input_ids).logits[..., 5]).detach()
    torch.testing.assert_close(found.effects["layer 1 MLP"], effect)
    assert (found.parts["layer 1 MLP"] - effect).abs().max() > 1e-3
    assert found.effects.keys() == found.parts.keys() - {
        *("layer 0 attention bias", "layer 1 attention bias", "final norm's bias"),
    }
    effects = torch.stack([found.effects[name] for name in found.effects])
    parts = torch.stack([found.parts[name] for name in found.effects])
    assert found.error == pytest.approx(((parts - effects).abs().sum() / effects.abs().sum()).item())
    assert 0.01 < found.error


def test_held_layernorm_is_the_derivative_at_a_fixed_deviation():
    model, input_ids = tiny_model("SM+LN+G").double(), random_ids(1, 7)
    found = attribute_logits(model, input_ids, 5, linearize=True)
    stream = {}
    model.model.norm.register_forward_pre_hook(lambda norm, args: stream.update(x=args[0]))
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, output: stream.update(mlp=output))
    model(input_ids)
    norm, written = model.model.norm, stream["mlp"]
    deviation = (stream["x"].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    held = (written - written.mean(-1, keepdim=True)) / deviation * norm.weight
    expected = (held @ model.lm_head.weight[5]).detach()
    torch.testing.assert_close(found.mlps[0], expected)


def test_what_cannot_be_attributed_is_one_clear_error():
    input_ids = random_ids(1, 5)
    plain = tiny_model("SM+R-noLNf")
    for options, message in (
        ({"targets": 99}, r"^targets must be token ids from 0 to 98, got 99"),
        ({"targets": torch.zeros(1, 4, dtype=torch.long)}, r"^targets must be one token, or tokens of shape \(1, 5\)"),
        ({"against": -1}, r"^against must be token ids from 0 to 98, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute_logits(plain, input_ids, **options)
    with pytest.raises(ValueError, match="mlp_type='fused' has none"):
        attribute_logits(*of_design("fused", "gpt2", final_norm_type="none"), neurons=True)
    stock = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=99)).eval()
    for call in (attribute_logits, logit_lens, lambda model, ids: attribution_patching(model, ids, ids)):
        with pytest.raises(ValueError, match="must be an LNFreeForCausalLM, got GPT2LMHeadModel; `lnfree import`"):
            call(stock, input_ids)
        with pytest.raises(ValueError, match="must be in evaluation mode"):
            call(tiny_model("SM+R-noLNf").train(), input_ids)
    with pytest.raises(ValueError, match=r"pairs of texts of equal length.* got \(1, 5\) and \(1, 6\)"):
        activation_patching(plain, input_ids, random_ids(1, 6))


def test_the_layer_whose_norm_stands_in_the_way_is_named():
    layers = {"per_layer_config": {1: {"norm_position": "peri"}}}
    model = tiny_model("SM+LN+G-noLNf", final_norm_type="none", **layers)
    with pytest.raises(ValueError, match="^norm_position='peri' in layer 1: a norm stands behind"):
        attribute_logits(model, random_ids(1, 5))


def test_a_model_that_computes_beside_its_weights_is_refused():
    model = tiny_model("SM+R-noLNf")
    model.model.layers[1].register_forward_hook(lambda layer, args, output: output + 0.3)
    with pytest.raises(ValueError, match="^the parts add up to logits that are wrong by up to"):
        attribute_logits(model, random_ids(1, 5))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="or its logits are not finite"):
        attribute_logits(model, random_ids(1, 5), 3)


# ---- lens


def test_lens_of_a_truncated_model_is_what_it_says():
    model, input_ids = tiny_model("SM+LN+G", num_hidden_layers=3).double(), random_ids(2, 7)
    lens = logit_lens(model, input_ids)
    last = model(input_ids).logits.log_softmax(-1)
    layers = model.model.layers
    for number in range(4):
        model.model.layers = layers[:number]
        model.config.num_hidden_layers = number
        model.model.learned_slope.num_layers = number
        here = model(input_ids).logits.log_softmax(-1)
        assert lens.tokens[number].equal(here.argmax(-1))
        torch.testing.assert_close(
            lens.probabilities[number].double(), here.max(-1).values.exp(), atol=1e-6, rtol=1e-5
        )
        divergence = (last.exp() * (last - here)).sum(-1)
        torch.testing.assert_close(lens.divergences[number].double(), divergence, atol=1e-5, rtol=1e-5)
    assert lens.divergences[-1].abs().max() < 1e-6 < lens.divergences[0].min()


@pytest.mark.parametrize("backbone", ["gpt2", "pythia", "llama"])
def test_lens_is_the_model_whose_later_layers_write_nothing(backbone):
    model, input_ids = of_design("residual_gains", backbone, final_norm_type="rmsnorm", logits_multiplier=0.5)
    lens = logit_lens(model, input_ids)
    with torch.no_grad():
        model.model.layers[1].residual_gains[[1, 3]] = 0
    here = model(input_ids).logits.softmax(-1).max(-1)
    assert lens.tokens.shape == (3, 2, 9) and lens.tokens[1].equal(here.indices)
    torch.testing.assert_close(lens.probabilities[1].double(), here.values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
def test_padding_on_either_side_changes_nothing(backbone, side):
    model, text, rest = tiny_model("SM+R", backbone), random_ids(1, 6), random_ids(1, 3)
    padded = torch.cat([rest, text] if side == "left" else [text, rest], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6 if side == "left" else [1] * 6 + [0] * 3])
    alone, beside = logit_lens(model, text), logit_lens(model, padded, attention_mask=mask)
    torch.testing.assert_close(beside.probabilities[..., mask[0] == 1], alone.probabilities, atol=1e-5, rtol=1e-4)
    alone = attribute_logits(model, text, 5, linearize=True)
    beside = attribute_logits(model, padded, 5, linearize=True, attention_mask=mask)
    for name, part in alone.parts.items():
        torch.testing.assert_close(beside.parts[name][:, mask[0] == 1], part, atol=1e-5, rtol=1e-4)


def test_lens_in_half_precision():
    model, text = tiny_model("SM+R", "pythia"), random_ids(1, 6)
    half = model.bfloat16()
    expected = half(text).logits.double().softmax(-1).max(-1).values
    torch.testing.assert_close(logit_lens(half, text).probabilities[-1].double(), expected, atol=1e-6, rtol=1e-5)


# ---- patching


CALLS = (attribution_patching, activation_patching)


def answer(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def patched_by_hand(model, clean_ids, corrupted_ids, layer: int, head: int | None, position: int, metric):
    """One part's output at one position, exchanged by a hook of the test's own."""
    theirs, width = {}, model.config.head_dim
    block = model.model.layers[layer]
    columns = slice(None) if head is None else slice(head * width, (head + 1) * width)

    def note(module, args, output=None):
        theirs["output"] = (args[0] if output is None else output).detach()

    def put(module, args, output=None):
        states = (args[0] if output is None else output).clone()
        states[:, position, columns] = theirs["output"][:, position, columns]
        return (states,) if output is None else states

    register = (
        block.self_attn.o_proj.register_forward_pre_hook if head is not None else block.mlp.register_forward_hook
    )
    hook = register(note)
    corrupted = metric(model(corrupted_ids).logits)
    hook.remove()
    hook = register(put)
    changed = metric(model(clean_ids).logits)
    hook.remove()
    return changed, corrupted


@pytest.mark.parametrize("name", ["residual_gains", "gated", "peri", "attention_gains", "no MLP"])
def test_patching_is_what_a_hook_by_hand_does(name):
    model, clean_ids = of_design(name, "gpt2")
    corrupted_ids = random_ids(2, 9, vocab_size=61)

    def metric(logits):
        return logits[:, -2, 5] - logits[:, -1, 7] ** 2

    real = activation_patching(model, clean_ids, corrupted_ids, metric)
    assert real.heads.shape == (2, 4, 2, 9) and real.mlps.shape == (2, 2, 9)
    clean = metric(model(clean_ids).logits)
    torch.testing.assert_close(real.clean, clean.detach())
    for layer, head, position in ((0, 2, 3), (1, 0, 7), (1, 3, 8), (0, None, 2), (1, None, 7)):
        changed, corrupted = patched_by_hand(model, clean_ids, corrupted_ids, layer, head, position, metric)
        found = (real.mlps[layer] if head is None else real.heads[layer, head])[:, position]
        torch.testing.assert_close(found, (changed - clean).detach())
        torch.testing.assert_close(real.corrupted, corrupted.detach())
    assert (real.mlps.abs().max() < 1e-12) == (name == "no MLP")


def test_estimate_is_exact_for_what_the_logits_read_directly():
    """No final norm: the last feed-forward layer is linear in the logits, and so are heads beside it, in parallel."""
    for backbone in ("gpt2", "pythia"):
        model = tiny_model("SM+G-noLNf", backbone).double().requires_grad_(False)
        clean_ids, corrupted_ids = random_ids(2, 9), random_ids(2, 9)
        estimate, real = (call(model, clean_ids, corrupted_ids, answer) for call in CALLS)
        assert real.mlps[-1].abs().max() > 0.1
        torch.testing.assert_close(estimate.mlps[-1], real.mlps[-1])
        torch.testing.assert_close(estimate.clean, real.clean)
        if backbone == "pythia":
            torch.testing.assert_close(estimate.heads[-1], real.heads[-1])
        # what is not the last is not linear
        assert (estimate.mlps[0] - real.mlps[0]).abs().max() > 1e-3
        wrong = [(a - b).abs().sum() for a, b in ((estimate.heads, real.heads), (estimate.mlps, real.mlps))]
        assert estimate.error(real) == pytest.approx(
            (sum(wrong) / (real.heads.abs().sum() + real.mlps.abs().sum())).item()
        )
        assert 0 < estimate.error(real) < 1
    normed = tiny_model("SM+LN+G").double()
    estimate, real = (call(normed, clean_ids, corrupted_ids, answer) for call in CALLS)
    assert (estimate.mlps[-1] - real.mlps[-1]).abs().max() > 1e-3


def test_default_metric_is_the_clean_answer_less_the_corrupted_one():
    model = tiny_model("SM+G-noLNf")
    # each token's own row of the tied projection decides
    clean_ids = random_ids(2, 9)
    corrupted_ids = clean_ids.flip(1)
    with pytest.raises(ValueError, match="^metric must be given for texts with the same likeliest token"):
        attribution_patching(model, clean_ids, clean_ids)
    with pytest.raises(ValueError, match="^metric must be given for texts with the same likeliest token"):
        attribution_patching(model, clean_ids, torch.cat([clean_ids[:1], corrupted_ids[1:]]))
    found = attribution_patching(model, clean_ids, corrupted_ids)
    clean, corrupted = model(clean_ids).logits[:, -1], model(corrupted_ids).logits[:, -1]
    right, wrong, rows = clean.argmax(-1), corrupted.argmax(-1), torch.arange(2)
    assert (right != wrong).all()
    torch.testing.assert_close(found.clean.float(), (clean[rows, right] - clean[rows, wrong]).detach())
    torch.testing.assert_close(found.corrupted.float(), (corrupted[rows, right] - corrupted[rows, wrong]).detach())


def test_a_text_for_itself_changes_nothing():
    model, input_ids = tiny_model("SM+R"), random_ids(2, 9)
    estimate, real = (call(model, input_ids, input_ids, answer) for call in CALLS)
    assert not real.heads.any() and not real.mlps.any() and estimate.error(real) == 0
    other = attribution_patching(model, input_ids, input_ids.flip(1), answer)
    assert other.error(real) == float("inf")


def test_estimate_is_the_first_order_of_patching():
    """Between texts that nearly agree, by embeddings that do, the two are one."""
    model = design_model("peri")
    clean_ids = random_ids(2, 9, vocab_size=60)
    corrupted_ids = clean_ids.clone()
    corrupted_ids[:, 4] = 60
    errors = []
    for size in (1e-1, 1e-3):
        with torch.no_grad():
            embedding = model.model.embed_tokens.weight
            embedding[60] = embedding[clean_ids[0, 4]] + size
            clean_ids[:, 4] = clean_ids[0, 4]
        pair = (call(model, clean_ids, corrupted_ids, lambda logits: logits[:, -1, 3]) for call in CALLS)
        estimate, real = pair
        errors.append(estimate.error(real))
    assert errors[1] < 0.1 * errors[0] and errors[1] < 1e-2


def test_attribution_leaves_no_hook_behind():
    model = tiny_model("SM+R-noLNf")
    input_ids = random_ids(1, 5)
    attribute_logits(model, input_ids, neurons=True)
    logit_lens(model, input_ids)
    for call in CALLS:
        call(model, input_ids, random_ids(1, 5), answer)
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    assert not any(before or after for before, after in hooks)
    assert isinstance(model, LNFreeForCausalLM) and all(p.grad is None for p in model.parameters())
