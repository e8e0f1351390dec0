"""`lnfree`: what a person does with the project, a verb each. Heavy imports wait until a verb runs."""

import argparse
import importlib.metadata
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0 only on success, and prints one line for an error that a user can mend."""
    parser = argparse.ArgumentParser(
        prog="lnfree", description="Train, compare, export and measure GPT models without LayerNorm."
    )
    version = f"lnfree {importlib.metadata.version('lnfree')}"
    parser.add_argument("--version", action="version", version=version)
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
    train.add_argument("--plan", action="store_true", help="print memory, steps and time, and start nothing")
    train.add_argument("--processes", type=int, metavar="N", help="of the plan: processes, one a GPU (default: 1)")
    train.add_argument("--flops", type=float, metavar="F", help="of the plan: FLOP/s that a process sustains")

    sweep = _add_verb(
        verbs,
        "sweep",
        "train the runs of a sweep that are not finished, each in its own process",
        "lnfree sweep training/sweeps/study.yaml --jobs 2",
    )
    sweep.add_argument("sweep", metavar="SWEEP.yaml")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")

    compare = _add_verb(
        verbs,
        "compare",
        "the paper's table, heat maps and curves from finished runs",
        "lnfree compare runs/quick",
    )
    compare.add_argument("runs_dir", metavar="RUNS_DIR", help="folder whose subfolders are runs")
    compare.add_argument("--output", metavar="DIR", help="where to write the report (default: RUNS_DIR/report)")
    compare.add_argument("--docs", metavar="DIR", help="of a checkout: put the tables into its pages too")

    export = _add_verb(
        verbs,
        "export",
        "a finished run as a folder for the Hub, loaded back in a clean process",
        "lnfree export runs/quick/gpt2-sm-r-t128-seed1337 exports/lnfree-gpt2-sm-r-t128",
    )
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("out_dir", metavar="OUT_DIR")

    measure = _add_verb(
        verbs,
        "measure",
        "perplexity and attention entropy of any causal language model on any texts",
        "lnfree measure runs/quick/SM+R/model --dataset stdlib --json measured.json --heat-map measured.png",
    )
    measure.add_argument("model_id", metavar="MODEL_ID_OR_PATH", help="model of the Hub, or a folder")
    measure.add_argument(
        "--dataset",
        required=True,
        metavar="NAME_OR_FILE",
        help="dataset of the Hub, a folder, a .json, .jsonl, .parquet, .csv or .txt file, or 'stdlib'",
    )
    measure.add_argument("--config", help="configuration (subset) of the dataset")
    measure.add_argument("--split", help="default: validation, else test, else the first")
    measure.add_argument("--text-column", default="content", metavar="NAME", help="default: content")
    measure.add_argument("--max-samples", type=int, metavar="N", help="read the first N rows only")
    measure.add_argument("--streaming", action="store_true", help="read the dataset while measuring")
    measure.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a text (default: the model's positions)"
    )
    measure.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts in a forward pass (default: 8)")
    measure.add_argument("--device", help="default: an accelerator, if there is one")
    measure.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the weights")
    measure.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    measure.add_argument("--revision", help="branch, tag or commit of the model")
    measure.add_argument(
        "--private-cost",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="count what costs under encryption in one forward pass over BATCH_SIZE x MAX_LENGTH tokens, "
        "and in generating N tokens after them",
    )
    measure.add_argument(
        "--fixed-point",
        action="store_true",
        help="find the largest values, and the fewest bits of fixed point that keep perplexity within 1 %%",
    )
    measure.add_argument("--json", dest="json_path", metavar="FILE", help="write all results")
    measure.add_argument("--heat-map", dest="heat_map_path", metavar="FILE.png", help="draw layers x heads")
    measure.add_argument("--parquet", dest="parquet_path", metavar="FILE", help="write the figures of every text")

    convert = _add_verb(
        verbs,
        "import",
        "a GPT-2 or GPT-NeoX checkpoint as a model of this family, with equal logits, or the other way",
        "lnfree import openai-community/gpt2 imported/gpt2",
    )
    convert.add_argument("model_id", metavar="MODEL_ID_OR_PATH", help="model of the Hub, or a folder")
    convert.add_argument("out_dir", metavar="OUT_DIR")
    convert.add_argument("--to-stock", action="store_true", help="write a model of this family as the stock class")
    convert.add_argument("--revision", help="branch, tag or commit of the model")

    publish = _add_verb(
        verbs,
        "publish",
        "finished runs on the Hub: a repository a variant, metric, results and collection, loaded back from there",
        "lnfree publish runs/quick --namespace YOUR_NAME --dry-run",
    )
    publish.add_argument("runs_dir", metavar="RUNS_DIR", help="folder whose subfolders are runs")
    publish.add_argument("--namespace", required=True, metavar="NAME", help="user or organisation of the Hub")
    publish.add_argument("--private", action="store_true", help="create private repositories")
    publish.add_argument("--dry-run", action="store_true", help="build and check everything, list what would change")
    publish.add_argument(
        "--seed", type=int, metavar="N", help="publish the runs of this seed (default: the lowest finished one)"
    )
    publish.add_argument(
        "--checkpoints", action="store_true", help="publish the runs' checkpoints too, as revisions step-N"
    )

    benchmark = _add_verb(
        verbs,
        "benchmark",
        "what training, measuring, generating and starting cost beside stock models",
        "lnfree benchmark step entropy --sizes quick gpt2 --json benchmark.json",
    )
    benchmark.add_argument("sections", nargs="*", metavar="SECTION", help="default: all; a wrong one lists them")
    benchmark.add_argument("--sizes", nargs="+", default=["quick"], metavar="SIZE", help="quick, gpt2, pythia70m")
    benchmark.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of a median (default: 7)")
    benchmark.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 512, 1024, 2048, 4096],
        metavar="T",
        help="of the section entropy",
    )
    benchmark.add_argument("--compiled", action="store_true", help="the section step also by torch.compile")
    benchmark.add_argument("--json", dest="json_path", metavar="FILE", help="write all figures")
    benchmark.add_argument("--docs", metavar="DIR", help="of a checkout: put the tables into its pages too")

    if "_ARGCOMPLETE" in os.environ:  # a shell asks: eval "$(register-python-argcomplete lnfree)"
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives `overrides` only what stands before the first option
    if rest and (arguments.verb != "train" or any(value.startswith("-") for value in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    if arguments.verb == "train" and not arguments.plan and (arguments.processes, arguments.flops) != (None, None):
        train.error("--processes and --flops are of --plan; torchrun starts processes: see the README")
    from .errors import UserError

    try:
        if arguments.verb == "train" and arguments.plan:
            from .recipe import load_recipe
            from .train.plan import print_plan

            recipe = load_recipe(arguments.recipe, arguments.overrides)
            print_plan(recipe, 1 if arguments.processes is None else arguments.processes, arguments.flops)
        elif arguments.verb == "train":
            from .recipe import load_recipe
            from .train.loop import train

            train(load_recipe(arguments.recipe, arguments.overrides))
        elif arguments.verb == "sweep":
            import signal

            from .sweep import sweep as run_sweep

            # as Ctrl-C: the runs end with the sweep
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            run_sweep(arguments.sweep, arguments.jobs)
        elif arguments.verb == "compare":
            from .compare.comparison import compare

            compare(arguments.runs_dir, arguments.output, arguments.docs)
        elif arguments.verb == "export":
            from .hub.export import export

            export(arguments.run_dir, arguments.out_dir)
        elif arguments.verb == "measure":
            from .measure import measure as run_measure

            options = {name: value for name, value in vars(arguments).items() if name not in ("verb", "model_id")}
            run_measure(arguments.model_id, **options)
        elif arguments.verb == "import":
            from .convert.convert import convert as run_convert

            run_convert(
                arguments.model_id, arguments.out_dir, to_stock=arguments.to_stock, revision=arguments.revision
            )
        elif arguments.verb == "publish":
            from .hub.publish import publish as run_publish

            run_publish(**{name: value for name, value in vars(arguments).items() if name != "verb"})
        elif arguments.verb == "benchmark":
            from .benchmark.benchmark import benchmark as run_benchmark

            run_benchmark(**{name: value for name, value in vars(arguments).items() if name != "verb"})
    except UserError as error:
        print(f"lnfree {arguments.verb}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if arguments.verb in ("train", "sweep", "publish") else ""
        print(f"lnfree {arguments.verb}: interrupted{goes_on}", file=sys.stderr)
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
