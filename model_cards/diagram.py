"""One block of a model, drawn from its configuration."""

from pathlib import Path

from matplotlib.figure import Figure


NORM, PART, LINE = "#dbe7c9", "#e8eef7", "#44546a"
STREAM = -2.4  # where the residual stream stands


def draw_block(config, path: Path):
    """
    Draws the block of an `LNFreeConfig`, from the bottom to the top: attention and feed-forward layer with their
    biases, one after the other or side by side, the residual stream around them, and the norms where they are. Of
    layers that differ it is the first; gains, gates and what is inside attention are not drawn.
    """
    layer = config.per_layer_config[0]
    norm = [] if config.norm_type == "none" else [(describe_norm(config.norm_type), NORM)]
    before = norm if layer.norm_position in ("pre", "peri") else []
    behind = norm if layer.norm_position == "peri" else []
    over_sums = {"post": (norm, norm), "hybrid": (norm, [])}.get(layer.norm_position, ([], []))
    biased = set(config.biased_projections)
    branches = [f"attention, {config.num_attention_heads} heads\n{_biases(biased, ('q', 'k', 'v', 'o'))}"]
    if layer.mlp_type == "fused":
        branches.append(f"feed-forward, one matrix\n{_biases(biased, ('fused',))}")
    elif layer.mlp_type != "none":
        gated = layer.mlp_type == "gated"
        title = f"{'gated ' if gated else ''}feed-forward, {config.intermediate_size}"
        biases = _biases(biased, ("gate", "up", "down") if gated else ("up", "down"))
        branches.append(f"{title}\n{describe_activation(config)}\n{biases}")
    figure = Figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    y, right = 0.4, 2.4
    for index, (branch, over_sum) in enumerate(zip(branches, over_sums, strict=False)):
        parts = [*before, (branch, PART), *behind]
        top = y + 1.4 * len(parts) + 0.5
        _branch(axis, 4.0 * index if config.parallel_residual else 0.0, y, parts, top)
        for part in over_sum:
            top += 1.0
            _box(axis, STREAM, top, *part)
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
        _box(axis, x, y + 0.7 + 1.4 * index, text, color)
    _line(axis, (x, top), (STREAM + 0.22, top), arrow=True)
    axis.text(STREAM, top, "+", ha="center", va="center", fontsize=10, bbox={"boxstyle": "circle,pad=0.15", "fc": "w"})


def _box(axis, x: float, y: float, text: str, color: str):
    box = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": LINE}
    axis.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)


def _line(axis, start: tuple[float, float], end: tuple[float, float], arrow: bool = False):
    style = {"arrowstyle": "-|>" if arrow else "-", "color": LINE, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=style, zorder=0)


def describe_norm(norm_type: str) -> str:
    """As papers write it: `LayerNorm`, `none`."""
    names = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "dyt": "DyT", "derf": "Derf"}
    return names.get(norm_type, norm_type)


def describe_activation(config) -> str:
    """As papers write it: `ReLU`, `leaky ReLU, slope 0.1`."""
    names = {"gelu": "GELU", "gelu_pytorch_tanh": "GELU (tanh)", "relu": "ReLU", "silu": "SiLU"}
    names["linear"] = "no activation"
    if config.hidden_act != "leaky_relu":
        return names.get(config.hidden_act, config.hidden_act)
    slopes = {
        None: f"slope {config.negative_slope:g}",
        "layer": "a learned slope a layer",
        "global": "one learned slope",
    }
    return f"leaky ReLU, {slopes[config.slope_sharing]}"


def _biases(biased: set[str], projections: tuple[str, ...]) -> str:
    found = [name for name in projections if f"{name}_proj" in biased]
    return f"biases: {', '.join(found)}" if found else "no biases"
