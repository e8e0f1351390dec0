"""Totals that papers have for a GPT-2 of 12 layers, to stand beside ours, with what differs."""

from dataclasses import dataclass
from typing import Any

from modeling_lnfree.variants import BASELINE

from .prices import NETWORKS, Network


@dataclass(frozen=True)
class Total:
    """
    Of a pass over `length` tokens; GB where they are known, and the network that it was measured on. `source` also
    says in which text the figures were read.
    """

    source: str
    variant: str
    length: int
    gigabytes: float | None
    seconds: float
    network: Network
    differs: str


_ENTROPY = "arXiv 2501.03489v2, Table {}, in a transcription"
_AERO = "arXiv 2410.13060, Table {}, in a transcription"
# configuration, tokens, GB, minutes
_BUMBLEBEE = (
    (_ENTROPY.format(3), "SM+LN+G", 128, 25.32, 8.21),
    (_ENTROPY.format(3), "SM+LN+R", 128, 9.44, 6.06),
    (_AERO.format(4), "SM+Lin@ScFFN", 128, 6.95, 5.68),
    (_ENTROPY.format(3), "SM+Lin@ScFuFFN", 128, 6.43, 4.76),
    (_ENTROPY.format(3), "SM+Lin@AERO", 128, 6.43, 4.76),
    (_ENTROPY.format(7), "SM+LN+G", 256, 58.51, 16.57),
    (_ENTROPY.format(7), "SM+LN+R", 256, 26.73, 12.59),
    (_AERO.format(5), "SM+Lin@ScFFN", 256, 21.77, 11.91),
    (_ENTROPY.format(7), "SM+Lin@ScFuFFN", 256, 20.72, 10.45),
    (_ENTROPY.format(7), "SM+Lin@AERO", 256, 20.72, 10.45),
)
_SLOW = Network("80 ms, 0.1 Gbit/s", 80.0, 0.1)
_PUMA, _CLOUD = "PUMA (arXiv 2307.12533), Table 4, in a transcription of its ICLR submission", Network("", 1.0, 5.0)
TOTALS = [
    *(
        Total(
            *(source, variant, length, gigabytes, 60 * minutes, _SLOW),
            "no dealer, as in BumbleBee: homomorphic encryption and oblivious transfer, whose bytes are in the total; "
            "with computing, 32 threads",
        )
        for source, variant, length, gigabytes, minutes in _BUMBLEBEE
    ),
    Total(
        *(_PUMA, "SM+LN+G", 32, 3.774, 15.506, _CLOUD),
        "three parties with replicated shares, no triples; one-hot rows are made by the parties, and one token is "
        "generated; with computing, 32 vCPUs",
    ),
    Total(
        *(f"MPCFormer (CrypTen) as run by {_PUMA}", "SM+LN+G", 32, 4.999, 34.889, _CLOUD),
        "the same machines; its GELU and LayerNorm are not those of our CrypTen, and a third party deals",
    ),
    Total(
        *("SIGMA (IACR ePrint 2023/1269), in its abstract; the length by its artifact", "SM+LN+G", 128, None, 1.6),
        NETWORKS["lan"],
        "function secret sharing on GPUs, a dealer's keys not counted; its network was not read: ours here",
    ),
]


def find_published(config: Any, variant: str | None, length: int, batch_size: int) -> list[Total]:
    """Those of the same variant, length and GPT-2 of 12 layers; stock GPT-2 is the baseline, SM+LN+G."""
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    if sizes != (12, 768, 12) or config.model_type not in ("gpt2", "lnfree") or batch_size != 1:
        return []
    variant = variant or BASELINE
    return [total for total in TOTALS if (total.variant, total.length) == (variant, length)]
