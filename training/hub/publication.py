"""A folder, and the repository of the Hub that is to hold it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


# a paper stands in collections alone
Kind = Literal["model", "dataset", "space", "paper"]


@dataclass
class Publication:
    """
    A folder, and the repository that is to hold it.

    Args:
        repo_id: of the Hub.
        kind: `"model"`, `"dataset"` or `"space"`.
        folder: what it is to hold.
        branch: `main`, or the revision of a checkpoint.
        seen: the commit that `folder` was compared with; None where there is no such branch yet.
        changes: by path, `"new"`, `"changed"`, `"removed"` or `"same"`.
        tags: of the repository, and their commits.
        commit: the commit that holds `folder`, once it is there.
    """

    repo_id: str
    kind: Kind
    folder: Path
    branch: str = "main"
    seen: str | None = None
    changes: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commit: str = ""

    @property
    def files(self) -> dict[str, Path]:
        """What is in the folder, by the path in the repository."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    @property
    def is_changed(self) -> bool:
        return any(change != "same" for change in self.changes.values())

    def __str__(self) -> str:
        name = self.repo_id if self.branch == "main" else f"{self.repo_id}@{self.branch}"
        return name if self.kind == "model" else f"{name} ({self.kind})"


def format_size(number: float) -> str:
    """Bytes as a person reads them: `1.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
