"""What a report is made of, and how a terminal and a Markdown page show it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is that of the page."""

    level: int
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells below a row of heads, as they are shown."""

    heads: list[str]
    rows: list[list[str]]


# a paragraph is its text
Block = Heading | Table | str


def to_markdown(blocks: Iterable[Block]) -> str:
    """The blocks with an empty line between them."""
    return "\n\n".join(map(_block_to_markdown, blocks))


def _block_to_markdown(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    lines = [_row_to_markdown(block.heads), "|---" * len(block.heads) + "|"]
    return "\n".join([*lines, *map(_row_to_markdown, block.rows)])


def _row_to_markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
