"""`lnfree benchmark`: what training, measuring, generating and starting cost, beside what else a user could take."""

import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import write_atomically
from .models import SIZES
from .sections import SECTIONS, Settings


def benchmark(
    sections: list[str],
    sizes: list[str],
    rounds: int,
    lengths: list[int],
    compiled: bool = False,
    json_path: str | None = None,
) -> dict[str, Any]:
    """
    Runs the sections of `SECTIONS` (all if none is named) at the sizes of `SIZES`, and prints a Markdown table for
    each, row by row.

    Args:
        rounds: over which the medians are taken.
        lengths: sequence lengths of the section `entropy`.
        compiled: the section `step` also with `torch.compile`.
        json_path: file of all figures, written anew after each row.

    Raises:
        UserError: for a section or a size that there is not, and for a number below 1.
    """
    sections = sections or list(SECTIONS)
    for value in (rounds, *lengths):
        if value < 1:
            raise UserError(f"rounds and lengths must be at least 1, got {value}")
    for name, given, known in (("section", sections, SECTIONS), ("size", sizes, SIZES)):
        for value in given:
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    document = {"device": name, "rounds": rounds, "versions": {"python": platform.python_version(), **versions}}
    print(
        f"{name}; medians of {rounds} rounds; torch {versions['torch']}, transformers {versions['transformers']}",
        end="\n\n",
    )
    settings = Settings(sizes, rounds, lengths, device, compiled)
    document["sections"] = {}
    for section in sections:
        rows = document["sections"][section] = []
        title, run = SECTIONS[section]
        print(f"## {title}\n")
        # row by row: at the paper's sizes each takes minutes
        for row in run(settings):
            if not rows:
                print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
            print(f"| {' | '.join(_format(name, value) for name, value in row.items())} |", flush=True)
            rows.append(row)
            if json_path is not None:
                write_atomically(Path(json_path), json.dumps(document, indent=1))
        print(flush=True)
    return document


def _processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if match:
            return match[1]
    return platform.processor() or "CPU"


def _format(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if name.startswith(("of ", "peak of", "record /", "maps /", "speed-up", "exponent", "share", "time outside")):
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
