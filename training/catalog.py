"""Files of recipes and sweeps: those that come with the project, by their names, and how they are read."""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UserError, explained


RECIPES, SWEEPS = Path(__file__).with_name("recipes"), Path(__file__).with_name("sweeps")


def print_recipes():
    """Prints the names of all recipes and sweeps, with the first line of their files."""
    for title, verb, folder in (("recipes", "train", RECIPES), ("sweeps", "sweep", SWEEPS)):
        named = {path.stem: summarize(path) for path in sorted(folder.glob("*.yaml"))}
        width = max(map(len, named))
        print(f"{title}, by 'lnfree {verb} NAME':")
        print("\n".join(f"  {name:<{width}}  {summary}" for name, summary in named.items()))


def summarize(path: Path) -> str:
    """The comment in the first line of a file."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def find_file(name: str | Path, kind: Literal["recipe", "sweep"], base: Path = Path()) -> Path:
    """
    The file of a recipe or a sweep: what has a folder or an ending in it, or exists, is a path from `base`; all else
    is the name of one that comes with the project. Raises UserError for a name that is none of theirs.
    """
    path = base / name
    if path.is_file() or Path(name).name != str(name) or path.suffix:
        return path
    folder = RECIPES if kind == "recipe" else SWEEPS
    names = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if str(name) not in names:
        nearest = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
        raise UserError(
            f"{kind} {str(name)!r} is neither a file nor one that 'lnfree recipes' lists; the nearest: "
            f"{', '.join(nearest)}"
        )
    return names[str(name)]


def read_values(path: str | Path, kind: str) -> dict[str, Any]:
    """The `key: value` lines of a YAML file; raises UserError, which calls it a `kind`, for any other file."""
    with explained(f"the {kind} {path} cannot be read"):
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"the {kind} {path} must be lines of 'key: value', got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and a key given twice an error, not the last one silently the winner."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a point and a sign in it
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+"), list("+-.0123456789")
)


def read_yaml(text: str) -> Any:
    """What a text says by `_Loader`; raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)
