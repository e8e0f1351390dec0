"""What is measured, by its definition: in float64, one text at a time and so without padding, from full maps."""

import string
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..conftest import tiny_model
from ..entropy.models import FAMILIES, VOCAB_SIZE, make_model
from ..modeling.designs import design_model


TEXTS = ["aZb4Kc8dQefgh", "zz", "hellothere", "x", "8aB3cC7dD6eE5"]


def make_tokenizer(**special):
    """A token a letter, for the small vocabulary of the models."""
    letters = (string.ascii_letters + string.digits)[:VOCAB_SIZE]
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make(name):
    """A model of another family, or one of ours by its variant or by the name of its design."""
    if name.startswith("SM"):
        return tiny_model(name, vocab_size=VOCAB_SIZE)
    return make_model(name, "eager") if name in FAMILIES else design_model(name).float()


def reference(model):
    """The same weights in float64, by eager attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    options = {"attn_implementation": "eager", "dtype": torch.float64}
    copy = type(model)._from_config(config, **options).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


@contextmanager
def watched_softmax(seen):
    """Within, what is put into a softmax is kept."""
    softmax = nn.functional.softmax

    def keep(scores, *args, **kwargs):
        seen.append(scores.double())
        return softmax(scores, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", keep)
        yield


@torch.no_grad()
def read(model, token_ids):
    """Of one text: maps and scores `(layers, heads, T, T)`, states behind the layers `(layers, T, D)`, logits."""
    copy, scores, states = reference(model), [], []
    for module in copy.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            for layer in module:
                layer.register_forward_hook(
                    lambda _, args, output: states.append(output[0] if isinstance(output, tuple) else output)
                )
            break
    with watched_softmax(scores):
        output = copy(torch.tensor([token_ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
    states = torch.stack(states)[:, 0]
    # what transformers says of the states, but that its last is behind the final norm
    torch.testing.assert_close(states[:-1], torch.stack(output.hidden_states[1:-1])[:, 0])
    maps = torch.stack(output.attentions)[:, 0].double()
    # shaped attention calls it a second time a layer, with zero queries
    scores = torch.stack(scores)[:: len(scores) // len(maps), 0]
    return maps, scores, states, output.logits[0]


def by_definition(model, sequences):
    """Every quantity, of all texts together."""
    found = [read(model, token_ids) for token_ids in sequences]
    entropies, sinks, most, gaps, states, nll = [], [], [], [], [], []
    for (maps, scores, behind, logits), token_ids in zip(found, sequences, strict=True):
        # clipped weights do not add up to 1, nor do those of a query that has none left
        entropies.append(torch.special.entr(maps / maps.sum(-1, keepdim=True)).sum(-1))
        first = (scores > -1e30).int().argmax(-1, keepdim=True)  # that the query may see
        sinks.append(maps.gather(-1, first)[..., 0])
        most.append(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).amax((-1, -2)))
        if len(token_ids) > 1:
            sizes = torch.linalg.eigvals(maps).abs().sort(-1).values
            gaps.append(sizes[..., -1] - sizes[..., -2])
        states.append(behind)
        targets = torch.tensor(token_ids[1:], dtype=torch.long)
        nll.append(-logits[:-1].log_softmax(-1).gather(1, targets[:, None])[:, 0])
    result = {
        "entropy": torch.cat(entropies, -1).nanmean(-1),
        "sink_share": torch.cat(sinks, -1).mean(-1),
        "max_logit": torch.stack(most).amax(0),
        "spectral_gap": torch.stack(gaps).mean(0),
        "nll": torch.cat(nll),
    }
    names = ("norm", "infinity_norm", "pearson_kurtosis", "neuron_kurtosis", "cosine", "outlier_dimensions")
    layers = [by_layer([behind[layer] for behind in states]) for layer in range(len(states[0]))]
    return result | {name: [layer[name] for layer in layers] for name in names}


def by_layer(sequences):
    """Of the stream behind one layer, given by text, each `(T, D)`."""
    tokens = torch.cat(sequences)
    entries = tokens.flatten()
    deviations = entries - entries.mean()
    sizes = torch.stack([column.square().mean().sqrt() for column in tokens.T])
    pairs = [torch.cosine_similarity(rows[:, None], rows[None], dim=-1) for rows in sequences]
    cosines = torch.cat([each[~torch.eye(len(each), dtype=torch.bool)] for each in pairs])
    far = (tokens - entries.mean()).abs() > 6 * entries.std(unbiased=False)
    return {
        "norm": torch.stack([token.norm() for token in tokens]).mean().item(),
        "infinity_norm": entries.abs().max().item(),
        "pearson_kurtosis": ((deviations**4).mean() / (deviations**2).mean() ** 2).item(),
        "neuron_kurtosis": ((sizes**4).mean() / (sizes**2).mean() ** 2).item(),
        "cosine": cosines.mean().item(),
        "outlier_dimensions": far.any(0).nonzero().flatten().tolist(),
    }
