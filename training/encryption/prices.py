"""What operations cost under encryption: rounds and bytes by the tables of two protocols, and seconds on a network."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import UserError


class Shape(NamedTuple):
    """Of one call of an operation; of a product of two private tensors also what comes out of it."""

    elements: int
    row: int | None = None  # length of the rows that it works on
    output: int = 0  # elements of the product
    multiply_adds: int = 0
    weights: int = 0  # of its elements, the server's weights

    @property
    def rows(self) -> int:
        return self.elements // (self.row or self.elements)


@dataclass(frozen=True)
class Cost:
    """Rounds one after the other; `bytes` sent by both parties together; `dealt` bytes of the offline phase."""

    rounds: int = 0
    bytes: int = 0
    dealt: int = 0
    multiply_adds: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__annotations__))

    def __mul__(self, times: int) -> "Cost":
        return Cost(*(getattr(self, name) * times for name in self.__annotations__))

    def to_dict(self) -> dict[str, int]:
        return {
            "rounds": self.rounds,
            "bytes_per_party": self.bytes // 2,
            "offline_bytes": self.dealt,
            "multiply_adds": self.multiply_adds,
        }


class Step(NamedTuple):
    """A part of an operation's composition, which of a protocol's sources has it, and what it costs in one call."""

    what: str
    source: str
    cost: Cost


@dataclass(frozen=True)
class Protocol:
    """
    A cost model: for each operation the steps that it is composed of.

    Args:
        setting: parties, ring, what is counted.
        sources: where the figures are from, by what they are of.
        offline: who deals the triples, and how that is counted.
        operations: by name, from the shape of a call to its steps, one after the other.
        instead: the same for ways of doing an operation that are not in any total.
        absent: of operations that have no figure, why.
        rates: seconds that a party computes for a multiply-add, a byte and a round, and how they were measured.
    """

    name: str
    setting: str
    sources: dict[str, str]
    offline: str
    operations: dict[str, Callable[[Shape], list[Step]]]
    instead: dict[str, Callable[[Shape], list[Step]]]
    absent: dict[str, str]
    rates: tuple[float, float, float, str] | None = None


@dataclass(frozen=True)
class Network:
    """
    Seconds of a cost: every round waits for one round trip, and each party sends its bytes at full bandwidth while it
    receives the other's.
    """

    name: str
    round_trip_ms: float
    gbit_per_second: float

    def seconds(self, rounds: int, bytes_per_party: int) -> float:
        return rounds * self.round_trip_ms / 1e3 + bytes_per_party * 8 / (self.gbit_per_second * 1e9)

    @property
    def title(self) -> str:
        speed = f"{self.round_trip_ms:g} ms, {self.gbit_per_second:g} Gbit/s"
        return speed if self.name == speed else f"{self.name} {speed}"


NETWORKS = {"lan": Network("LAN", 0.8, 3.0), "wan": Network("WAN", 80.0, 0.2)}


def find_network(name: str) -> Network:
    """`lan`, `wan`, or `MS,GBPS`: milliseconds of a round trip and Gbit/s. Raises UserError for anything else."""
    if name in NETWORKS:
        return NETWORKS[name]
    try:
        round_trip, bandwidth = map(float, name.split(","))
    except ValueError:
        round_trip = bandwidth = math.nan
    if not (0 <= round_trip < math.inf and 0 < bandwidth < math.inf):
        raise UserError(
            f"network must be {', '.join(NETWORKS)} or MS,GBPS (milliseconds of a round trip, at least 0, and Gbit/s "
            f"above 0), got {name!r}"
        )
    return Network(f"{round_trip:g} ms, {bandwidth:g} Gbit/s", round_trip, bandwidth)


# counted for the reader, and priced as part of what needs them
_PARTS = {"matmul", "comparison"}
UNKNOWN = "no composition of it from a published source"


def estimate(protocol: Protocol, places: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    Prices the operations of every place of a model, one after the other.

    Args:
        places: of each place (a block, or what is outside of them) its tallies by operation, which have `shapes`:
            how often each `Shape` is called.

    Returns:
        `rounds`, `bytes_per_party` (sent by each of two parties), `offline_bytes`, `multiply_adds`; `by_operation`
        with the same and `steps`, `by_place`; `instead`, of ways that are in no total; `without_figure` (what is left
        out, by operation); `setting`, `offline`, `sources`.
    """
    operations: dict[str, Cost] = {}
    steps: dict[str, dict[tuple[str, str], Cost]] = {}
    by_place: dict[str, Cost] = {}
    instead: dict[str, Cost] = {}
    missing: dict[str, dict[str, Any]] = {}
    for place, tallies in places.items():
        here = Cost()
        for name, tally in tallies.items():
            if name in _PARTS:
                continue
            if name not in protocol.operations:
                found = missing.setdefault(name, {"elements": 0, "what": protocol.absent.get(name, UNKNOWN)})
                found["elements"] += tally.elements
                continue
            for shape, calls in tally.shapes.items():
                for what, source, cost in protocol.operations[name](shape):
                    cost = cost * calls
                    here += cost
                    operations[name] = operations.get(name, Cost()) + cost
                    by_step = steps.setdefault(name, {})
                    by_step[what, source] = by_step.get((what, source), Cost()) + cost
                for title, compose in protocol.instead.items():
                    if title.split(",")[0] == name:
                        cost = sum((step.cost * calls for step in compose(shape)), Cost())
                        instead[title] = instead.get(title, Cost()) + cost
        by_place[place] = here
    return {
        **sum(by_place.values(), Cost()).to_dict(),
        "by_operation": {
            name: {
                **cost.to_dict(),
                "steps": [
                    {"what": what, "source": source, **part.to_dict()} for (what, source), part in steps[name].items()
                ],
            }
            for name, cost in operations.items()
        },
        "by_place": {place: cost.to_dict() for place, cost in by_place.items()},
        "instead": {title: cost.to_dict() for title, cost in instead.items()},
        "without_figure": missing,
        "setting": protocol.setting,
        "offline": protocol.offline,
        "sources": protocol.sources,
    }


def local_seconds(protocol: Protocol, cost: dict[str, Any]) -> float | None:
    """Of what a party computes, while nothing is on its way, by the protocol's rates; None where it has none."""
    if protocol.rates is None:
        return None
    multiply_add, byte, a_round, _ = protocol.rates
    return cost["multiply_adds"] * multiply_add + 2 * cost["bytes_per_party"] * byte + cost["rounds"] * a_round
