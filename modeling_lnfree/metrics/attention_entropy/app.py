"""A page that shows the attention entropy of a chosen model on a typed text: `python app.py`."""

import argparse
from html import escape
from pathlib import Path
from typing import Any

import evaluate
import gradio as gr
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


METRIC = evaluate.load(str(Path(__file__).with_name("attention_entropy.py")))
HEADER = ["layer", "mean (nats)", "share of the largest", "lowest head (nats)", "highest head (nats)", "NaN weights"]
INTRODUCTION = """
# Attention entropy

How evenly each head of a causal language model looks at the text before it: 0 nats where it looks at one token only,
the top of the scale where it looks at all alike. Exact, before dropout, on as many tokens as the model has positions
([arXiv 2410.09637](https://arxiv.org/abs/2410.09637)).
"""


def draw_heat_map(result: dict[str, Any]) -> Figure:
    """Layers x heads, on a scale from 0 to the largest entropy that the text allows."""
    # (layers, heads); layers may have different numbers of them
    heads = max(map(len, result["entropy"]))
    entropy = np.array([[*row, *[np.nan] * (heads - len(row))] for row in result["entropy"]])
    # of one size, as the page fits it to its column: a larger one would have smaller letters
    figure = Figure(figsize=(5, 4.5), layout="constrained", dpi=200)
    axis = figure.subplots()
    # a broken head is NaN, and nothing is drawn over the grey
    axis.set_facecolor("lightgrey")
    image = axis.imshow(entropy, vmin=0, vmax=max(map(max, result["max_entropy"])), cmap="viridis", aspect="auto")
    axis.set(xlabel="head", ylabel="layer")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(MaxNLocator(12, integer=True))
    figure.colorbar(image, label="attention entropy (nats)")
    return figure


def tabulate(result: dict[str, Any]) -> list[list[int | str]]:
    """A row a layer, under `HEADER`."""
    return [
        [
            layer,
            f"{np.mean(heads):.3f}",
            f"{100 * np.mean(heads) / np.mean(result['max_entropy'][layer]):.0f} %",
            f"{np.min(heads):.3f}",
            f"{np.max(heads):.3f}",
            int(np.sum(result["nan_count"][layer])),
        ]
        for layer, heads in enumerate(result["entropy"])
    ]


def build_page(trust_remote_code: bool) -> gr.Blocks:
    """The page; `trust_remote_code` lets a model bring code of its own."""

    def measure(model_id: str, text: str) -> tuple[str, Figure, list[list[int | str]]]:
        model_id = model_id.strip()
        try:
            if not model_id or not text:
                raise ValueError("a model and a text are needed")
            result = METRIC.compute(predictions=[text], model_id=model_id, trust_remote_code=trust_remote_code)
            if result["num_queries"] < 2:
                raise ValueError("the text must have two tokens or more, as one token can look at itself only")
        except Exception as error:  # whatever a stranger's model raises; shown as HTML
            raise gr.Error(f"This cannot be measured: {escape(str(error))}", print_exception=False) from error
        shares = ", ".join(f"{100 * share:.0f} %" for share in result["head_distribution"])
        summary = (
            f"**{result['mean_entropy']:.3f} nats** on average over {result['num_queries']} tokens. "
            f"Heads in the four quarters of their largest entropy, from the lowest: {shares}."
        )
        broken = np.isnan(np.concatenate(result["entropy"]))
        if broken.any():
            summary += f" Broken, and grey in the map: {broken.sum()} of {broken.size} heads."
        return summary, draw_heat_map(result), tabulate(result)

    with gr.Blocks(title="Attention entropy") as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                model_id = gr.Textbox(label="Model (Hub id or folder)", value="openai-community/gpt2")
                text = gr.Textbox(label="Text", lines=8, value="def add(a, b):\n    return a + b\n")
                button = gr.Button("Measure", variant="primary")
            with gr.Column():
                summary = gr.Markdown()
                # a label would lie over the map
                heat_map = gr.Plot(show_label=False)
        table = gr.Dataframe(headers=HEADER, label="By layer")
        shown = [summary, heat_map, table]
        # or the last model's figures would stand beside the next one's error
        quietly = {"api_visibility": "private", "show_progress": "hidden"}
        button.click(lambda: ("", None, None), outputs=shown, **quietly).then(measure, [model_id, text], shown)
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a model")
    build_page(parser.parse_args().trust_remote_code).launch()
