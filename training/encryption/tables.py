"""Counts of operations as tables and sentences."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from modeling_lnfree.variants import BASELINE

from ..pages import format_cell
from ..tables import Block, Table, to_markdown
from .counting import OUTSIDE, PROTOCOLS, count_operations
from .prices import NETWORKS, UNKNOWN, Network, Protocol, local_seconds
from .published import Total


Rows = list[dict[str, Any]]
BOTH = tuple(NETWORKS.values())
# columns: what is counted in rows, what stands first and last in a table
_ROWS = ("softmax", "layer_norm", "rms_norm")
_FIRST = (*_ROWS, "gelu", "relu", "leaky_relu")
_LAST = ("comparison", "opening", "truncation")
# as the field writes them; an operation that is not here is called what torch calls it
_TITLES = {
    **{"layer_norm": "LayerNorm", "rms_norm": "RMSNorm", "gelu": "GELU", "relu": "ReLU", "leaky_relu": "leaky ReLU"},
    **{"silu": "SiLU", "clamp": "clipping", "clamp_min": "clipping below", "clamp_max": "clipping above"},
    **{"reciprocal": "reciprocals", "comparison": "comparisons", "opening": "openings", "truncation": "truncations"},
}
# and where an operation has a row of its own
_PARTS = {
    "opening": "products (openings)",
    "embedding": "token embedding (one-hot product)",
    "sampling": "sampling (by the client)",
}
# the same in every variant, and rows of their own where costs are shown
_ENDS = {"embedding", "sampling"}


def tabulate(counts: list[tuple[str, dict[str, Any]]], heading: str) -> Table:
    """
    A row for each of the named `counts` (dictionaries by operation): rows of softmax and norms with their lengths,
    elements of all else that occurs.
    """
    found = {name for _, count in counts for name in count} - {"matmul", *_ENDS}
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


def compare_costs(
    named: list[tuple[str, dict[str, Any]]],
    baseline: dict[str, Any] | None,
    networks: Sequence[Network] = BOTH,
    against: str = BASELINE,
) -> list[Block]:
    """
    The totals of each of the named phases (`total` and `estimates`), what each has more or fewer of than `baseline`,
    the phase that is called `against`, and by both cost models its rounds, bytes and seconds.
    """
    counts = tabulate([(name, phase["total"]) for name, phase in named], "configuration")
    return [counts, to_table(cost_rows(named, networks, baseline, against))]


def cost_rows(
    named: list[tuple[str, dict[str, Any]]],
    networks: Sequence[Network],
    baseline: dict[str, Any] | None = None,
    against: str | None = None,
) -> Rows:
    """
    Of every cost model and phase a row: rounds, MB, seconds, the offline phase, what has no figure, and the change, by
    operation if it is said against what.
    """
    rows = []
    for protocol in PROTOCOLS:
        for name, phase in named:
            cost = phase["estimates"][protocol.name]
            row = {"protocol": protocol.name, "configuration": name, **_cells(cost, networks)}
            row["s of computing"] = local_seconds(protocol, cost)
            row["MB offline"] = cost["offline_bytes"] / 1e6
            missing = cost["without_figure"].items()
            row["without a figure"] = ", ".join(f"{count['elements']:,} {_title(key)}" for key, count in missing)
            if baseline is not None:
                theirs = baseline["estimates"][protocol.name]
                for network in networks:
                    change = 100 * (_seconds(network, cost) / _seconds(network, theirs) - 1)
                    row[f"change on {network.name}"] = "0" if phase is baseline else f"{change:+.1f} %"
                if against is not None:
                    row[f"against {against}"] = ", ".join(difference(phase["total"], baseline["total"])) or "the same"
            rows.append(row)
    return rows


def operation_rows(phase: dict[str, Any], networks: Sequence[Network]) -> Rows:
    """By operation, the largest first, in both cost models; below them what could be done instead, in no total."""
    estimates = {protocol.name: phase["estimates"][protocol.name] for protocol in PROTOCOLS}
    first = next(iter(estimates.values()))
    names = sorted(first["by_operation"], key=lambda name: -_seconds(networks[0], first["by_operation"][name]))
    rows = []
    for name in names:
        costs = {protocol: found["by_operation"].get(name) for protocol, found in estimates.items()}
        rows.append({"operation": _PARTS.get(name, _title(name)), **_side_by_side(costs, networks)})
    for title in first["instead"]:
        costs = {protocol: found["instead"][title] for protocol, found in estimates.items()}
        name, how = title.split(", ", 1)
        rows.append(
            {"operation": f"instead: {_PARTS.get(name, name).split(' (')[0]}, {how}", **_side_by_side(costs, networks)}
        )
    return rows


def place_rows(phase: dict[str, Any], networks: Sequence[Network]) -> Rows:
    """By block, the largest first, in both cost models."""
    estimates = {protocol.name: phase["estimates"][protocol.name] for protocol in PROTOCOLS}
    first = next(iter(estimates.values()))["by_place"]
    names = sorted(first, key=lambda name: -_seconds(networks[0], first[name]))
    rows = []
    for name in names:
        costs = {protocol: found["by_place"][name] for protocol, found in estimates.items()}
        rows.append({"block": "outside of them" if name == OUTSIDE else name, **_side_by_side(costs, networks)})
    return rows


def step_rows(phase: dict[str, Any]) -> Rows:
    """Every step that an operation is composed of, in both cost models."""
    return [
        {
            "protocol": protocol.name,
            "operation": _PARTS.get(name, _title(name)),
            "step": step["what"],
            "source": step["source"],
            "rounds": step["rounds"],
            "bytes sent by each party": step["bytes_per_party"],
        }
        for protocol in PROTOCOLS
        for name, cost in phase["estimates"][protocol.name]["by_operation"].items()
        for step in cost["steps"]
    ]


def published_rows(named: list[tuple[str, dict[str, Any], list[Total]]]) -> Rows:
    """Totals of papers beside ours, both for the forward pass: of each model its name, phase and what is published."""
    rows = []
    for name, phase, totals in named:
        costs = {protocol.name: phase["estimates"][protocol.name] for protocol in PROTOCOLS}
        for total in totals:
            ours = {f"{protocol}: GB": 2 * cost["bytes_per_party"] / 1e9 for protocol, cost in costs.items()}
            ours |= {f"{protocol}: s there": _seconds(total.network, cost) for protocol, cost in costs.items()}
            network = f"{total.network.round_trip_ms:g} ms, {total.network.gbit_per_second:g} Gbit/s"
            theirs = {"source": total.source, "GB": total.gigabytes, "s": total.seconds, "network": network}
            rows.append({"configuration": name, **theirs, **ours, "what differs": total.differs})
    return rows


def describe_sources() -> list[Block]:
    """Where the steps are from, by the names that they have in their table."""
    sources: list[Block] = [
        f"{protocol.name}, {what}: {source}." for protocol in PROTOCOLS for what, source in protocol.sources.items()
    ]
    return [*sources, *(f"{protocol.name}, offline: {protocol.offline}." for protocol in PROTOCOLS)]


def to_table(rows: Rows) -> Table:
    return Table(list(rows[0]), [[format_cell(value) for value in row.values()] for row in rows])


def explain(networks: Sequence[Network], phases: Sequence[dict[str, Any]]) -> str:
    """How seconds are made of rounds and bytes, and what in these phases has no figure."""
    lines = "; ".join(network.title for network in networks)
    text = (
        "Seconds are rounds x round trip + bytes sent by each party / bandwidth, one operation after the other, each "
        f"way of the line with its full bandwidth: {lines}. "
        + " ".join(f"{protocol.name}: {protocol.setting}." for protocol in PROTOCOLS)
        + " Triples come from a dealer. `lnfree cost --steps` has every step and source."
    )
    computing = (f"for {p.name} {'not measured' if p.rates is None else p.rates[-1]}" for p in PROTOCOLS)
    text += f" Seconds of computing come on top: {'; '.join(computing)}."
    for protocol in PROTOCOLS:
        for name in dict.fromkeys(name for phase in phases for name in _missing(phase, protocol)):
            text += f" {protocol.name} has no figure for {_title(name)}: {protocol.absent.get(name, UNKNOWN)}."
    return text


def _missing(phase: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    return phase["estimates"][protocol.name]["without_figure"]


def _seconds(network: Network, cost: dict[str, Any]) -> float:
    return network.seconds(cost["rounds"], cost["bytes_per_party"])


def _cells(cost: dict[str, Any] | None, networks: Sequence[Network]) -> dict[str, Any]:
    if cost is None:
        return {
            "rounds": None,
            "MB sent by each party": None,
            **{f"s on {network.name}": None for network in networks},
        }
    seconds = {f"s on {network.name}": _seconds(network, cost) for network in networks}
    return {"rounds": cost["rounds"], "MB sent by each party": cost["bytes_per_party"] / 1e6, **seconds}


def _side_by_side(costs: dict[str, dict[str, Any] | None], networks: Sequence[Network]) -> dict[str, Any]:
    return {
        f"{protocol}: {head}": value
        for protocol, cost in costs.items()
        for head, value in _cells(cost, networks).items()
    }


def describe_forward(model_class: type[PreTrainedModel], config: PreTrainedConfig, length: int) -> str:
    """Markdown: what one forward pass over `length` tokens costs, beside SM+LN+G for a model of another variant."""
    counts = count_operations(model_class, config, length=length)
    named, baseline = [(counts["variant"], counts["forward"])], counts["forward"]
    if "baseline" in counts:
        baseline = counts["baseline"]["forward"]
        named.insert(0, (BASELINE, baseline))
    return to_markdown([*compare_costs(named, baseline), explain(BOTH, [phase for _, phase in named])])


def _title(name: str) -> str:
    return f"{_TITLES.get(name, name)}{' rows' if name in _ROWS else ''}"


def difference(total: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """What a total has more or fewer of than another: `-1,536 LayerNorm rows`, `+65,536 ReLU`."""
    changes = []
    others = sorted({*total, *baseline} - {*_FIRST, *_LAST, "matmul", *_ENDS})
    for name in (*_FIRST, *others, *_LAST):
        ours, theirs = (_amount(name, counts.get(name)) for counts in (total, baseline))
        if ours != theirs:
            changes.append(f"{ours - theirs:+,} {_title(name)}")
    return changes


def _amount(name: str, count: dict[str, Any] | None) -> int:
    if count is None:
        return 0
    return sum(count["rows"].values()) if name in _ROWS else count["elements"]
