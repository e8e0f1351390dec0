"""What forbids to publish a folder, found before anything is pushed."""

import getpass
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open

from model_cards import card

from ..encryption import counting
from ..errors import one_line
from .publication import Publication, format_size


# https://huggingface.co/docs/hub/storage-limits
MAX_FILE_SIZE, MAX_FOLDER_ENTRIES = 50 * 10**9, 10_000
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml")


# a vocabulary holds whatever its corpus held
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_LOCAL_PATH = re.compile(
    r"(?<![\w.:/~-])(/(home|Users|root|tmp|private|var|mnt|media|scratch|workspace|work|opt|srv)/[\w.-]+|~/[\w.-]+"
    r"|[A-Za-z]:\\\\?[\w.-]+)"
)


def find_problems(publication: Publication, private_strings: Sequence[str] = ()) -> list[str]:
    """
    What forbids to publish a folder: links that leave it, files over the Hub's limits, pickles, broken weights, a card
    without results, the token, a local path or the user's name.
    """
    problems = []
    root = publication.folder.resolve()
    token = get_token()
    for path in sorted(publication.folder.rglob("*")):
        name = f"{publication}: {path.relative_to(publication.folder)}"
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            problems.append(f"{name} is a link out of the folder")
        elif path.is_dir():
            if sum(1 for _ in path.iterdir()) > MAX_FOLDER_ENTRIES:
                problems.append(f"{name} has more than {MAX_FOLDER_ENTRIES:,} entries")
        elif path.stat().st_size > MAX_FILE_SIZE:
            problems.append(
                f"{name} has {format_size(path.stat().st_size)}, the Hub takes {format_size(MAX_FILE_SIZE)}"
            )
        elif _is_pickle(path):
            problems.append(f"{name} is a pickle, which runs code when it is loaded")
        else:
            # weights may be large, and hold no text
            data = path.read_bytes() if path.suffix != ".safetensors" else b""
            if token and token.encode() in data:
                problems.append(f"{name} holds the token")
            if path.suffix == ".safetensors":
                problems += [f"{name}: {problem}" for problem in _find_broken_weights(path)]
            if path.suffix in _TEXTS and path.name not in _VOCABULARIES:
                found = _find_private(data.decode("utf-8"), private_strings)
                if found is not None:
                    problems.append(f"{name} holds {found!r}")
    if publication.kind == "model":
        problems += [f"{publication}: {problem}" for problem in _find_card_problems(publication.folder)]
    return problems


def _is_pickle(path: Path) -> bool:
    if path.suffix in _PICKLES:
        return True
    with path.open("rb") as file:
        start = file.read(2)
    # the first opcode of protocols 2 to 5, and what torch.save wraps it in
    return (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")) or (
        zipfile.is_zipfile(path) and any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    )


def _find_broken_weights(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return [
                f"{name} has NaN or infinite entries"
                for name in file.keys()  # noqa: SIM118  (not a dictionary)
                if not file.get_tensor(name).isfinite().all()
            ]
    except SafetensorError as error:
        return [f"is not safetensors ({error})"]


def _find_private(text: str, private_strings: Sequence[str]) -> str | None:
    for private in private_strings:
        # a name is also half of an id of the Hub, which is public
        before, after = (r"\w.-", r"\w-") if "/" in private else (r"\w.@/-", r"\w/-")
        if re.search(rf"(?<![{before}]){re.escape(private)}(?![{after}])", text):
            return private
    match = _LOCAL_PATH.search(text)
    return match[0] if match else None


def _find_card_problems(folder: Path) -> list[str]:
    try:
        data = ModelCard.load(folder / "README.md").data
    except (OSError, ValueError, KeyError) as error:
        return [f"its card cannot be read ({one_line(error)})"]
    values = {result.metric_type: result.metric_value for result in data.eval_results or []}
    problems = []
    for metric in ("perplexity", "attention_entropy"):
        if not isinstance(values.get(metric), float) or not np.isfinite(values[metric]):
            problems.append(f"its card has no result for {metric} ({values.get(metric)})")
    return problems


def find_private_strings(runs_dir: Path, namespace: str, aside: Path) -> list[str]:
    """What says where, and by whom, a file was made."""
    folders = [Path.home(), Path.cwd(), runs_dir, runs_dir.resolve(), aside, Path(tempfile.gettempdir())]
    paths = {str(folder) for folder in folders if folder.is_absolute() and len(folder.parts) > 1}
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody, as in some containers
        user = ""
    # a name that is a word of the cards cannot be told from it
    sources = [card.TEMPLATE, Path(card.__file__), *Path(counting.__file__).parent.glob("*.py")]
    spoken = set(re.findall(r"\w+", "".join(source.read_text(encoding="utf-8") for source in sources)))
    return sorted(paths) + ([user] if user not in spoken | {namespace, ""} else [])
