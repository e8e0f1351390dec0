"""One block of a model, drawn from its configuration."""

from pathlib import Path

from matplotlib.figure import Figure


NORM, PART, LINE = "#dbe7c9", "#e8eef7", "#44546a"
STREAM = -2.4  # where the residual stream stands


def draw_block(config, path: Path):
    """
    Draws the block of an `LNFreeConfig`, from the bottom to the top: its norms or none, attention and feed-forward
    layer with their biases, one after the other or side by side, and the residual stream around them.
    """
    norms = [("LayerNorm", NORM)] * (config.norm_type != "none")
    biased = set(config.biased_projections)
    attention = f"attention, {config.num_attention_heads} heads\n{_biases(biased, ('q', 'k', 'v', 'o'))}"
    feed_forward = (
        f"feed-forward, {config.intermediate_size}\n{describe_activation(config)}\n{_biases(biased, ('up', 'down'))}"
    )
    figure = Figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    y, right = 0.4, 2.4
    for index, part in enumerate((attention, feed_forward)):
        parts = [*norms, (part, PART)]
        top = y + 1.4 * len(parts) + 0.5
        _branch(axis, 4.0 * index if config.parallel_residual else 0.0, y, parts, top)
        if config.parallel_residual:
            right += 2.0
        else:
            y = top + 0.9
    height = top + 0.9
    _line(axis, (STREAM, -0.6), (STREAM, height), arrow=True)
    axis.text(STREAM, -0.75, "residual stream", ha="left", va="top", fontsize=8, color=LINE)
    axis.set(xlim=(STREAM - 0.8, right), ylim=(-1.4, height + 0.3))
    # 0.58 inches a unit, whatever is drawn
    figure.set_size_inches(0.58 * (right - STREAM + 0.8), 0.58 * (height + 1.7))
    figure.savefig(path, dpi=150, facecolor="white")


def _branch(axis, x: float, y: float, parts: list[tuple[str, str]], top: float):
    """Out of the residual stream at `y`, through the parts, and back into it at `top`."""
    _line(axis, (STREAM, y - 0.3), (x, y - 0.3))
    _line(axis, (x, y - 0.3), (x, top))
    for index, (text, color) in enumerate(parts):
        box = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": LINE}
        axis.text(x, y + 0.7 + 1.4 * index, text, ha="center", va="center", fontsize=8, bbox=box)
    _line(axis, (x, top), (STREAM + 0.22, top), arrow=True)
    axis.text(STREAM, top, "+", ha="center", va="center", fontsize=10, bbox={"boxstyle": "circle,pad=0.15", "fc": "w"})


def _line(axis, start: tuple[float, float], end: tuple[float, float], arrow: bool = False):
    style = {"arrowstyle": "-|>" if arrow else "-", "color": LINE, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=style, zorder=0)


def describe_activation(config) -> str:
    """As the field writes it: `ReLU`, `leaky ReLU, slope 0.1`."""
    names = {"gelu": "GELU", "gelu_pytorch_tanh": "GELU (tanh)", "relu": "ReLU"}
    if config.hidden_act != "leaky_relu":
        return names[config.hidden_act]
    slopes = {
        None: f"slope {config.negative_slope:g}",
        "layer": "a learned slope a layer",
        "global": "one learned slope",
    }
    return f"leaky ReLU, {slopes[config.slope_sharing]}"


def _biases(biased: set[str], projections: tuple[str, ...]) -> str:
    found = [name for name in projections if f"{name}_proj" in biased]
    return f"biases: {', '.join(found)}" if found else "no biases"
