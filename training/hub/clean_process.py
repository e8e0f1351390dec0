"""A check of what was written, in a process that does not know this project."""

import os
import subprocess
import sys
from pathlib import Path


def find_failure(script: Path, arguments: list[Path], folder: Path, **environment: str) -> str | None:
    """
    Runs a script as a stranger would: isolated from this project, with an empty cache in `folder`.

    Args:
        arguments: of the script.
        folder: where it runs.
        environment: variables for it beside those of this process, of which none of Python's and the Hub's is kept.

    Returns:
        The last line of what it said went wrong; None if nothing did.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    run = subprocess.run(
        [sys.executable, "-I", script, *arguments],
        cwd=folder,
        env={**inherited, "HF_HOME": str(folder), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    if run.returncode == 0:
        return None
    # one that was killed says nothing
    return (run.stderr.strip().splitlines() or [f"it ended with status {run.returncode}"])[-1]
