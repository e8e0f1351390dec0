"""Files that are whole or not there, and files of JSON lines that a kill may have cut short."""

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError, one_line


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write a file at, which then is whole under its own name or not there."""
    aside = aside_of(path)
    try:
        yield aside
        with aside.open("rb+") as file:
            # a power cut may keep the new name and lose what was not on the disk yet
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return path.with_name(f"{path.name}.{os.getpid()}.aside")


def write_atomically(path: Path, text: str):
    """Writes a text file that is whole or not there."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Stands around what writes a path: a disk that is full or read-only is a `UserError` of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error


def check_outputs(outputs: dict[str, str | Path | None], inputs: Sequence[str | Path] = ()) -> list[Path | None]:
    """
    The paths of files to write, whose folders are made.

    Args:
        outputs: by the names of the arguments that they come from.
        inputs: files and folders that are read; what is in them is not overwritten.

    Raises:
        UserError: for what is neither new nor a plain file, such as a folder, a link, a device or a pipe; for an
            input; for two outputs at one path; and for a place where no file can be written.
    """
    paths: dict[Path, str] = {}
    read = [Path(name).resolve() for name in inputs if os.path.exists(name)]
    for name, given in outputs.items():
        if given is None:
            continue
        if str(given) in ("", "-"):
            raise UserError(f"{name} must be a file, got {str(given)!r}")
        path = Path(given)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise UserError(f"{name} must be a new or a plain file, got {path}, which is a {kind_of(path)}")
            real = path.resolve()
            aside_of(path).touch()
            aside_of(path).unlink()
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be written: {one_line(error)}") from None
        if path.exists() and any(real == source or source in real.parents or real.samefile(source) for source in read):
            raise UserError(f"{name} must not overwrite what is read, got {path}")
        for other in paths:
            if real == other or real.exists() and other.exists() and real.samefile(other):
                raise UserError(f"{name} and {paths[other]} must be two files, got {path} for both")
        paths[real] = name
    return [None if given is None else Path(given) for given in outputs.values()]


def is_taken(path: Path) -> bool:
    """Whether a path is anything but new or an empty folder, to which a folder could be moved."""
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))


def kind_of(path: Path) -> str:
    """What a path is that is no plain file, in a word."""
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISLNK, "link"), (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "device")


def to_json(value: Any) -> str:
    """JSON text in which numbers that are not finite, for which JSON has no name, are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), indent=1, allow_nan=False)


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
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(record, dict):
                break
            records.append(record)
    return records


def append_record(path: Path, record: dict[str, Any]):
    """One more line of a measurement file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def drop_records_after(path: Path, step: int):
    """Makes a measurement file what it was at `step`; a run that starts again at step 0 also measures that again."""
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_json(path: Path, kind: type = dict) -> Any:
    """What a file of a run holds; a list is one of dictionaries. Raises UserError for what is no `kind`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    entries = found if isinstance(found, list) and kind is list else []
    if not isinstance(found, kind) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} cannot be read: it is no {kind.__name__} of JSON")
    return found
