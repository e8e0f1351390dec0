"""Totals that papers have for a GPT-2 of 12 layers, to stand beside ours, with what differs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Total:
    """Of a pass over `length` tokens (any, where it is None); GB of all parties together where they are known."""

    source: str
    variant: str
    length: int | None
    gigabytes: float | None
    seconds: float
    differs: str


_ENTROPY = "arXiv 2501.03489"
_DIFFERS = "its protocol, which was not read for this, and its machines; figures at second hand"
TOTALS = [
    Total(_ENTROPY, "SM+LN+G", 128, 25.32, 8.21 * 60, _DIFFERS),
    Total(_ENTROPY, "SM+LN+R", 128, 9.44, 6.06 * 60, _DIFFERS),
    Total(_ENTROPY, "SM+Lin@ScFFN", 128, 6.43, 4.76 * 60, _DIFFERS),
    Total(_ENTROPY, "SM+LN+G", 256, 58.51, 16.57 * 60, _DIFFERS),
    Total(_ENTROPY, "SM+LN+R", 256, 26.73, 12.59 * 60, _DIFFERS),
    Total(_ENTROPY, "SM+Lin@ScFFN", 256, 20.72, 10.45 * 60, _DIFFERS),
    Total(
        "PUMA, arXiv 2307.12533",
        "SM+LN+G",
        32,
        3.77,
        15.5,
        "three parties with replicated shares, no triples; one token is chosen under encryption; with computing",
    ),
    Total(
        "SIGMA",
        "SM+LN+G",
        None,
        None,
        1.6,
        "function secret sharing on GPUs, a dealer's keys not counted; length and network not read for this",
    ),
]


def find_published(config: Any, variant: str | None, length: int, batch_size: int) -> list[Total]:
    """Those of the same variant, length and GPT-2 of 12 layers; stock GPT-2 is SM+LN+G."""
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    if sizes != (12, 768, 12) or config.model_type not in ("gpt2", "lnfree") or batch_size != 1:
        return []
    variant = variant or "SM+LN+G"
    return [total for total in TOTALS if total.variant == variant and total.length in (None, length)]
