"""Counts of operations as tables and sentences."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from modeling_lnfree.variants import BASELINE

from ..tables import Block, Table, to_markdown
from .counting import count_operations
from .prices import PROTOCOL, SOURCES


_ROWS = ("softmax", "layer_norm", "rms_norm")


_FIRST = (*_ROWS, "gelu", "relu", "leaky_relu")


_LAST = ("comparison", "opening", "truncation")


# as the field writes them; an operation that is not here is called what torch calls it
_TITLES = {
    **{"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "gelu": "GELU", "relu": "ReLU", "leaky_relu": "leaky ReLU"},
    **{
        "silu": "SiLU",
        "clamp": "clipping",
        "comparison": "comparisons",
        "opening": "openings",
        "truncation": "truncations",
    },
}


def tabulate(counts: list[tuple[str, dict[str, Any]]], heading: str) -> Table:
    """
    A row for each of the named `counts` (dictionaries by operation): rows of softmax and norms with their lengths,
    elements of all else that occurs.
    """
    found = {name for _, count in counts for name in count} - {"matmul"}
    others = sorted(found - {*_FIRST, *_LAST})
    columns = [name for name in (*_FIRST, *others, *_LAST) if name in found]
    heads = [f"{_title(name)} x length" if name in _ROWS else _title(name) for name in columns]
    return Table([heading, *heads], [[name, *(_cell(count.get(c)) for c in columns)] for name, count in counts])


def _cell(count: dict[str, Any] | None) -> str:
    if count is None:
        return "0"
    if "rows" not in count:
        return f"{count['elements']:,}"
    rows = list(count["rows"].items())
    if len(rows) == 1:
        return f"{rows[0][1]:,} x {rows[0][0]}"
    return f"{sum(number for _, number in rows):,} x {rows[0][0]} to {rows[-1][0]}"


def compare_costs(named: list[tuple[str, dict[str, Any]]], baseline: dict[str, Any] | None) -> list[Block]:
    """
    The totals of each of the named phases (`total` and `estimate`), the estimate, and what each has more or fewer of
    than `baseline`, the phase of SM+LN+G.
    """
    heads, rows = ["configuration", "rounds", "MB sent by each party", "without a figure"], []
    for name, phase in named:
        cost = phase["estimate"]
        missing = ", ".join(_amount_of(name, count) for name, count in cost["without_figure"].items()) or "nothing"
        rows.append([name, f"{cost['rounds']:,}", f"{cost['bytes_per_party'] / 1e6:.2f}", missing])
        if baseline is not None:
            rows[-1].append(", ".join(difference(phase["total"], baseline["total"])) or "the same")
    if baseline is not None:
        heads.append(f"against {BASELINE}")
    kinds = {name: count["what"] for _, phase in named for name, count in phase["estimate"]["without_figure"].items()}
    return [
        tabulate([(name, phase["total"]) for name, phase in named], "configuration"),
        Table(heads, rows),
        f"Rounds (one operation after the other) and MB are those of one protocol ({PROTOCOL}), composed of "
        f"{SOURCES['kernels']}; GELU as {SOURCES['gelu']}. What has no published figure that could be checked is not "
        "in them: " + "; ".join(f"{_TITLES.get(name, name)} ({what})" for name, what in kinds.items()) + ".",
    ]


def describe_forward(model_class: type[PreTrainedModel], config: PreTrainedConfig, length: int) -> str:
    """Markdown: what one forward pass over `length` tokens costs, beside SM+LN+G for a model of another variant."""
    counts = count_operations(model_class, config, length=length)
    named, baseline = [(counts["variant"], counts["forward"])], counts["forward"]
    if "baseline" in counts:
        baseline = counts["baseline"]["forward"]
        named.insert(0, (BASELINE, baseline))
    return to_markdown(compare_costs(named, baseline))


def _amount_of(name: str, count: dict[str, Any]) -> str:
    return f"{_amount(name, count):,} {_title(name)}"


def _title(name: str) -> str:
    return f"{_TITLES.get(name, name)}{' rows' if name in _ROWS else ''}"


def difference(total: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """What a total has more or fewer of than another: `-1,536 LayerNorm rows`, `+65,536 ReLU`."""
    changes = []
    others = sorted({*total, *baseline} - {*_FIRST, *_LAST, "matmul"})
    for name in (*_FIRST, *others, *_LAST):
        ours, theirs = (_amount(name, counts.get(name)) for counts in (total, baseline))
        if ours != theirs:
            changes.append(f"{ours - theirs:+,} {_title(name)}")
    return changes


def _amount(name: str, count: dict[str, Any] | None) -> int:
    if count is None:
        return 0
    return sum(count["rows"].values()) if name in _ROWS else count["elements"]
