"""What a report is made of, and how a terminal and a Markdown page show it."""

from collections.abc import Collection, Iterable
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


def to_text(blocks: Iterable[Block]) -> str:
    """The blocks for a terminal: the columns of a table stand below each other, all but the first to the right."""
    return "\n\n".join(_block_to_text(block) for block in blocks)


def _block_to_text(block: Block) -> str:
    if isinstance(block, Heading):
        return block.text
    if isinstance(block, str):
        return block
    rows = [block.heads, *block.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )


def _block_to_markdown(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    return "\n".join([*head_to_markdown(block.heads), *map(row_to_markdown, block.rows)])


def head_to_markdown(heads: Collection[str], to_the_right: Collection[str] = ()) -> list[str]:
    """The first two lines of a table, and which columns a page sets to the right."""
    marks = ("---:|" if head in to_the_right else "---|" for head in heads)
    return [row_to_markdown(heads), "|" + "".join(marks)]


def row_to_markdown(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
