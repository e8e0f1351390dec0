"""`lnfree`: what a person does with the project, a verb each. Heavy imports wait until a verb runs."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0 only on success, and prints one line for an error that a user can mend."""
    parser = argparse.ArgumentParser(
        prog="lnfree", description="Train, compare and export GPT models without LayerNorm."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = _add_verb(
        verbs,
        "train",
        "train a recipe's model, or go on where it was interrupted",
        "lnfree train training/recipes/quick.yaml variant=SM+R seed=1",
    )
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="fields of the recipe, of LNFreeConfig, or of transformers' TrainingArguments",
    )

    compare = _add_verb(
        verbs,
        "compare",
        "the paper's table, heat maps and curves from finished runs",
        "lnfree compare runs/quick",
    )
    compare.add_argument("runs_dir", metavar="RUNS_DIR", help="folder whose subfolders are runs")
    compare.add_argument("--output", metavar="DIR", help="where to write the report (default: RUNS_DIR/report)")

    export = _add_verb(
        verbs,
        "export",
        "a finished run as a folder for the Hub, loaded back in a clean process",
        "lnfree export runs/quick/gpt2-sm-r-t128-seed1337 exports/lnfree-gpt2-sm-r-t128",
    )
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("out_dir", metavar="OUT_DIR")

    arguments = parser.parse_args(argv)
    from .recipe import RecipeError

    try:
        if arguments.verb == "train":
            from .recipe import load_recipe
            from .train import train

            train(load_recipe(arguments.recipe, arguments.overrides))
        elif arguments.verb == "compare":
            from .compare import compare

            compare(arguments.runs_dir, arguments.output)
        elif arguments.verb == "export":
            from .export import export

            export(arguments.run_dir, arguments.out_dir)
    except RecipeError as error:
        print(f"lnfree {arguments.verb}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lnfree {arguments.verb}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _add_verb(verbs, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main())
