"""Files that are whole or not there, and files of JSON lines that a kill may have cut short."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError, one_line


def write_atomically(path: Path, text: str):
    """Writes a text file that is whole or not there."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # a power cut may keep the new name and lose what was not on the disk yet
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def flush(folder: Path):
    """Waits until a folder's files are on the disk: a power cut may keep a name and lose what was not there yet."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a measurement file; a line that a kill cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def append_record(path: Path, record: dict[str, Any]):
    """One more line of a measurement file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def drop_records_after(path: Path, step: int):
    """Makes a measurement file what it was at `step`; a run that starts again at step 0 also measures that again."""
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_json(path: Path) -> Any:
    """What a file of a run holds. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def check_output(path: str | Path | None) -> Path | None:
    """The path of a file to write, whose folder is made. Raises UserError for one that cannot be written."""
    if path is None:
        return None
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: it is a folder, or its folder is read-only")
    return path
