"""
What outlives a kill or a power cut: files that are whole or not there, and checkpoints that are verified when read,
each by a manifest of its files' sizes and hashes.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..files import flush
from ..runs import list_checkpoints, step_of


MANIFEST = "manifest.json"


def write_manifest(checkpoint: Path):
    """Writes size and SHA-256 of every file of a checkpoint into it, before it gets its name."""
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    (checkpoint / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    flush(checkpoint)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None for a whole one."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"it cannot be read: {error}"
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def last_whole_checkpoint(run_dir: Path) -> str | None:
    """The newest checkpoint that is whole; a damaged one is told, removed, and the one before it taken."""
    for checkpoint in reversed(list_checkpoints(run_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        print(f"{checkpoint} is damaged and removed: {damage}")
        shutil.rmtree(checkpoint)
    return None


def remove_old_checkpoints(run_dir: Path, kept: int | None, milestones: Sequence[int]):
    """
    Removes all checkpoints but the newest `kept` and those of the milestones. None, and as for the Trainer any number
    below 1, keeps all.
    """
    if kept is None or kept < 1:
        return
    checkpoints = [path for path in list_checkpoints(run_dir) if step_of(path) not in milestones]
    for checkpoint in checkpoints[:-kept]:
        shutil.rmtree(checkpoint)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
