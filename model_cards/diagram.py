"""One block of a model, drawn from its configuration."""

from pathlib import Path

from matplotlib.figure import Figure


NORM, PART, LINE = "#dbe7c9", "#e8eef7", "#44546a"
STREAM = -2.9  # where the residual stream stands
# by norm position: whether a norm stands before attention and the MLP, behind each, and over the sums with each
PLACES = {
    "pre": ((True, True), (False, False), (False, False)),
    "post": ((False, False), (False, False), (True, True)),
    "peri": ((True, True), (True, True), (False, False)),
    "hybrid": ((False, False), (False, False), (True, False)),
}


def draw_block(config, path: Path):
    """
    Draws the block of an `LNFreeConfig`, from the bottom to the top: its norms or none, attention and feed-forward
    layer with their biases, one after the other or side by side, and the residual stream around them with what it is
    multiplied by. Where blocks differ it is the first.
    """
    layer = config.per_layer_config[0]
    norm = [(describe_norm(config.norm_type), NORM)] * (config.norm_type != "none")
    texts = [_describe_attention(config, layer), *([] if layer.mlp_type == "none" else [_describe_mlp(config, layer)])]
    figure = Figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    y, right, top = 0.4, 2.4, 0.0
    before, behind, over = PLACES[layer.norm_position]
    for index, text in enumerate(texts):
        parts = [*norm * before[index], (text, PART), *norm * behind[index]]
        gains = layer.residual_gains[2 * index : 2 * index + 2] if layer.residual_gains else None
        x = 4.6 * index if config.parallel_residual else 0.0
        # side by side, the second comes back above the first
        top = _branch(axis, x, y, parts, gains, least=top + 1.2)
        right = max(right, x + 2.4)
        for name, color in norm * over[index]:
            top += 0.9
            _box(axis, STREAM, top, name, color)
        if not config.parallel_residual:
            y = top + 0.9
    height = top + 0.9
    _line(axis, (STREAM, -0.6), (STREAM, height), arrow=True)
    differs = f", block 0 of {config.num_hidden_layers}: they differ" if config.is_heterogeneous else ""
    axis.text(STREAM, -0.75, f"residual stream{differs}", ha="left", va="top", fontsize=8, color=LINE)
    axis.set(xlim=(STREAM - 0.8, right), ylim=(-1.4, height + 0.3))
    # 0.58 inches a unit, whatever is drawn
    figure.set_size_inches(0.58 * (right - STREAM + 0.8), 0.58 * (height + 1.7))
    figure.savefig(path, dpi=150, facecolor="white")


def _branch(axis, x: float, y: float, parts: list[tuple[str, str]], gains: list[float] | None, least: float) -> float:
    """Out of the residual stream at `y`, through the parts, and back into it, at `least` or above; where that is."""
    middle, middles = y, []
    for text, _ in parts:
        half = 0.14 * (text.count("\n") + 1) + 0.2
        middles.append(middle + half)
        middle += 2 * half + 0.45
    top = max(middle + 0.2, least)
    _line(axis, (STREAM, y - 0.3), (x, y - 0.3))
    _line(axis, (x, y - 0.3), (x, top))
    for (text, color), place in zip(parts, middles, strict=True):
        _box(axis, x, place, text, color)
    _line(axis, (x, top), (STREAM + 0.22, top), arrow=True)
    axis.text(STREAM, top, "+", ha="center", va="center", fontsize=10, bbox={"boxstyle": "circle,pad=0.15", "fc": "w"})
    if gains is not None:
        style = {"fontsize": 8, "color": LINE}
        axis.text(STREAM + 0.1, top - 0.5, f"x {gains[0]:.3g}", ha="left", va="center", **style)
        axis.text(STREAM + 0.5, top + 0.1, f"x {gains[1]:.3g}", ha="left", va="bottom", **style)
    return top


def _box(axis, x: float, y: float, text: str, color: str):
    box = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": LINE}
    axis.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)


def _line(axis, start: tuple[float, float], end: tuple[float, float], arrow: bool = False):
    style = {"arrowstyle": "-|>" if arrow else "-", "color": LINE, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=style, zorder=0)


def _describe_attention(config, layer) -> str:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    grouped = f" ({kv_heads} of keys and values)" if kv_heads != heads else ""
    found = [f"attention, {heads} heads{grouped}", *describe_heads(config, layer)]
    return "\n".join([*found, _biases(config, ("q", "k", "v", "o"))])


def describe_heads(config, layer) -> list[str]:
    """What attention has beside projections, and which of these it has not: `RMSNorm of q, k`, `identity: v, o`."""
    return [
        text
        for text, value in (
            (f"RMSNorm of {_letters(config.normalized_projections)}", config.normalized_projections),
            (f"identity: {_letters(layer.identity_projections)}", layer.identity_projections),
            ("scores / learned temperature", config.softmax_temperature),
            (f"scores capped at {config.attn_logit_softcapping}", config.attn_logit_softcapping),
            (f"weights clipped, {config.softmax_clipping}", config.softmax_clipping),
            ("a I + b softmax - c uniform", config.attention_gains),
            ("gated by head", config.attention_gate_init),
        )
        if value
    ]


def _describe_mlp(config, layer) -> str:
    if layer.mlp_type == "fused":
        return f"feed-forward, one matrix\n{_biases(config, ('fused',))}"
    kind = "gated feed-forward" if layer.mlp_type == "gated" else "feed-forward"
    names = (*(("gate",) if layer.mlp_type == "gated" else ()), "up", "down")
    return f"{kind}, {config.intermediate_size}\n{describe_activation(config)}\n{_biases(config, names)}"


def describe_norm(norm_type: str) -> str:
    """As papers write it: `LayerNorm`, `none`."""
    names = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "dyt": "DyT", "derf": "Derf"}
    return names.get(norm_type, norm_type)


def describe_activation(config) -> str:
    """As papers write it: `ReLU`, `leaky ReLU, slope 0.1`."""
    names = {
        "gelu": "GELU",
        "gelu_pytorch_tanh": "GELU (tanh)",
        "relu": "ReLU",
        "silu": "SiLU",
        "linear": "no activation",
    }
    if config.hidden_act != "leaky_relu":
        return names.get(config.hidden_act, config.hidden_act)
    slopes = {
        None: f"slope {config.negative_slope:g}",
        "layer": "a learned slope a layer",
        "global": "one learned slope",
    }
    return f"leaky ReLU, {slopes[config.slope_sharing]}"


def _letters(projections: list[str]) -> str:
    return ", ".join(name.removesuffix("_proj") for name in projections)


def _biases(config, projections: tuple[str, ...]) -> str:
    found = [name for name in projections if f"{name}_proj" in config.biased_projections]
    return f"biases: {', '.join(found)}" if found else "no biases"
