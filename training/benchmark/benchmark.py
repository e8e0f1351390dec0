"""`lnfree benchmark`: what training, measuring, generating and starting cost, beside what else a user could take."""

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import check_outputs, to_json, write_atomically
from ..pages import check_docs, format_head, format_row, machine, write_table
from ..runs import library_versions
from .models import SIZES
from .sections import SECTIONS
from .timing import Settings


def benchmark(
    sections: list[str],
    sizes: list[str],
    rounds: int,
    lengths: list[int],
    compiled: bool = False,
    json_path: str | None = None,
    docs: str | None = None,
) -> dict[str, Any]:
    """
    Runs the sections of `SECTIONS` (all if none is named) at the sizes of `SIZES`, and prints a Markdown table for
    each, row by row.

    Args:
        rounds: over which the medians are taken.
        lengths: sequence lengths of the sections `entropy` and `attention`.
        compiled: the sections `step` and `bf16` also with `torch.compile`.
        json_path: file of all figures, written anew after each row.
        docs: folder `docs` of a checkout, in whose pages the sections' tables are replaced, each when it is whole.

    Raises:
        UserError: for a section or a size that there is not, for a number below 1, and for a folder of another kind.
    """
    sections = sections or list(SECTIONS)
    for number in (rounds, *lengths):
        if number < 1:
            raise UserError(f"rounds and lengths must be at least 1, got {number}")
    for name, given, known in (("section", sections, SECTIONS), ("size", sizes, SIZES)):
        for value in given:
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_outputs({"json_path": json_path})
    if docs is not None:
        check_docs(docs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    document: dict[str, Any] = {"device": machine(), "rounds": rounds, "versions": library_versions()}
    versions = f"torch {document['versions']['torch']}, transformers {document['versions']['transformers']}"
    print(f"{document['device']}; medians of {rounds} rounds; {versions}", end="\n\n")
    settings = Settings(sizes, rounds, lengths, device, compiled)
    document["sections"] = {}
    options = f"--rounds {rounds}" + " --compiled" * compiled
    for section in sections:
        rows: list[dict[str, Any]] = []
        document["sections"][section] = rows
        title, run = SECTIONS[section]
        print(f"## {title}\n")
        # row by row: at the paper's sizes each takes minutes
        for row in run(settings):
            if not rows:
                print("\n".join(format_head(row)))
            print(format_row(row), flush=True)
            rows.append(row)
            if json_path is not None:
                write_atomically(Path(json_path), to_json(document))
        print(flush=True)
        if docs is not None:
            for size in dict.fromkeys(row.get("size") for row in rows):
                name, sizes_option = (f"{section}-{size}", f" --sizes {size}") if size else (section, "")
                command = f"lnfree benchmark {section}{sizes_option} {options}"
                write_table(docs, name, [row for row in rows if row.get("size") == size], command)
    return document
