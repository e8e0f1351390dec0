"""What pictures show: the numbers that are drawn, in their order and units."""

import json
import math

import numpy as np
import pytest
import torch

from modeling_lnfree.attribution import LogitAttribution
from modeling_lnfree.measurement import QUANTITIES
from training.files import append_record
from training.measured import draw
from training.plots import plot_attribution, plot_evaluations, plot_heat_maps, plot_norm_removal, plot_seconds

from .compare.test_seeds import fake_run


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def picture(axis) -> np.ndarray:
    [image] = axis.images
    return image.get_array()


def test_heat_maps_are_on_one_scale():
    measurements = [
        {"entropy": [[0.5, 1.0], [0.2, 0.1]], "max_entropy": [[3.0, 3.0]] * 2},
        {"entropy": [[2.0, 2.5], [2.2, 2.1]], "max_entropy": [[4.0, 4.0]] * 2},
    ]
    figure = plot_heat_maps(measurements, ["first", "second"])
    for axis, measurement, title in zip(figure.axes, measurements, ("first", "second"), strict=False):
        assert picture(axis).tolist() == measurement["entropy"] and axis.get_title() == title
        assert axis.images[0].get_clim() == (0, 4.0)


def measured(step: int, perplexity: float) -> dict:
    summary = {**dict.fromkeys((quantity.name for quantity in QUANTITIES), 1.0), "perplexity": perplexity}
    entropy = {"entropy": [[perplexity, 1.0]], "max_entropy": [[20.0, 20.0]]}
    of_a_step = {"model": "me/model", "revision": f"step-{step}", "attention_entropy": entropy, "summary": summary}
    return {**of_a_step, "dataset": "texts", "num_tokens": 7, "parameters": 5}


def test_revisions_stand_as_named_and_their_curves_are_over_the_steps():
    figure = draw([measured(8, 9.0), measured(128, 3.0), measured(16, 6.0)])
    film, curves = figure.subfigs
    assert [axis.get_title() for axis in film.axes[:3]] == ["step-8", "step-128", "step-16"]
    assert [picture(axis)[0, 0] for axis in film.axes[:3]] == [9.0, 3.0, 6.0]
    # what does not change is no curve
    drawn = {axis.get_title(): axis.lines[0] for axis in curves.axes if axis.lines}
    assert list(drawn) == ["perplexity"]
    assert (list(drawn["perplexity"].get_xdata()), list(drawn["perplexity"].get_ydata())) == ([8, 16, 128], [9, 6, 3])


def test_evaluations_are_over_millions_of_tokens_and_their_mean_is_that_of_the_losses(tmp_path):
    # a hundred tokens a step
    runs = [
        fake_run(tmp_path, "SM+R", 1, 1.0, [(10, 8.0), (20, 2.0)]),
        fake_run(tmp_path, "SM+R", 2, 1.0, [(10, 2.0), (20, 0.5)]),
    ]
    [axis] = plot_evaluations(runs).axes
    [line] = axis.lines
    assert list(line.get_xdata()) == pytest.approx([0.001, 0.002]) and axis.get_xlabel() == "million training tokens"
    assert list(line.get_ydata()) == pytest.approx([4.0, 1.0]) and line.get_label() == "SM+R (2)"
    assert plot_evaluations(runs[:0]) is None


def test_attribution_is_of_the_last_position():
    heads, mlps, biases = numbers(2, 3, 1, 4), numbers(2, 1, 4), numbers(2, 1, 4)
    token, position, final, logits = (numbers(1, 4) for _ in range(4))
    targets = torch.zeros(1, 4, dtype=torch.long)
    figure = plot_attribution(LogitAttribution(logits, targets, token, position, heads, mlps, biases, final))
    by_head, by_layer = figure.subfigs[0].axes[:2]
    assert (picture(by_head) == heads[:, :, 0, -1].numpy()).all()
    bars = {text.get_text(): bar.get_height() for text, bar in zip(by_layer.get_xticklabels(), by_layer.patches)}  # noqa: B905
    assert bars == pytest.approx(
        {
            **{"MLP 0": mlps[0, 0, -1].item(), "MLP 1": mlps[1, 0, -1].item()},
            **{"biases": biases[:, 0, -1].sum().item(), "token": token[0, -1].item()},
            **{"position": position[0, -1].item(), "norm's bias": final[0, -1].item()},
        }
    )


def test_norm_removal_is_shown_before_and_after(tmp_path):
    removed, control = (fake_run(tmp_path, variant, 1, 5.0) for variant in ("SM+R-noLNf", "SM+LN+R"))
    removed.attention_entropy["max_entropy"] = [[3.0, 3.0]] * 2
    for run, losses in ((removed, [5.0, 4.0]), (control, [5.5, 3.5])):
        log = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        (run.folder / "log_history.json").write_text(json.dumps(log))
    entropies = [[[0.1, 0.2], [0.3, 0.4]], [[1.1, 1.2], [1.3, 1.4]], [[2.1, 2.2], [2.3, 2.4]]]
    for step, entropy in enumerate(entropies):
        sinks = [[value / 10 for value in row] for row in entropy]
        record = {"step": step, "entropy": entropy, "sink_share": sinks}
        append_record(removed.folder / "attention_entropy.jsonl", record)
        deviation = {"model.layers.0.input_layernorm": [9.0, 2.0 + step], "model.norm": [3.0 + step]}
        append_record(
            removed.folder / "norm_removal.jsonl", {"step": step, "deviation": deviation, "starts": [7, 8][:step]}
        )
    loss, deviation, *others = plot_norm_removal(removed, control).axes
    entropy_before, entropy_after, sink_before, sink_after = (picture(axis) for axis in others if axis.images)
    assert (entropy_before.tolist(), entropy_after.tolist()) == (entropies[0], entropies[-1])
    assert np.allclose(sink_before, entropy_before / 10) and np.allclose(sink_after, entropy_after / 10)
    curves = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert (curves["norms removed"], curves["norms kept"]) == ([5.0, 4.0], [5.5, 3.5])
    assert [line.get_xdata()[0] for line in loss.lines[2:]] == [7, 8]
    assert [list(line.get_ydata()) for line in deviation.lines] == [[2.0, 3.0, 4.0], [3.0, 4.0, 5.0]]
    alone = plot_norm_removal(removed, None).axes[0].lines
    assert [line.get_label() for line in alone].count("norms kept") == 0 and math.isclose(alone[0].get_ydata()[0], 5)


def test_every_configuration_is_drawn_at_its_seconds():
    def point(name, perplexity, lan, wan, frontier):
        seconds = {"seconds": {"LAN": lan, "WAN": wan}, "frontier": {"LAN": frontier, "WAN": True}}
        return {"configuration": name, "perplexity": perplexity, **seconds}

    points = [point("a", 5.0, 1.0, 9.0, True), point("b", 6.0, 2.0, 8.0, False), point("c", math.inf, 0.1, 0.1, True)]
    lan, wan = plot_seconds([points], ["a setting"]).axes
    for axis, name, places, frontier in (
        (lan, "LAN", [[1.0, 5.0], [2.0, 6.0]], [[1.0, 5.0]]),
        (wan, "WAN", [[9.0, 5.0], [8.0, 6.0]], [[8.0, 6.0], [9.0, 5.0]]),
    ):
        assert [list(dot.get_offsets()[0]) for dot in axis.collections] == places
        assert axis.lines[0].get_xydata().tolist() == frontier
        assert axis.get_xlabel() == f"seconds of one private pass on {name}"
        assert [text.get_text() for text in axis.texts] == ["1", "2"]
    # the lowest perplexity first
    assert [text.get_text() for text in wan.get_legend().get_texts()] == ["1  a", "2  b"]
