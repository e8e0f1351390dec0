"""The recipes and sweeps that come with the project, by their names. Listing them loads nothing heavy."""

from pathlib import Path


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
