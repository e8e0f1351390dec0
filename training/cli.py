"""
`lnfree`: what a person does with the project, a function a verb, which declares its arguments and names what runs it.
Nothing heavy is imported before a verb runs, and then only what it needs.
"""

import argparse
import importlib
import importlib.metadata
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0 only on success, and prints one line for an error that a user can mend."""
    options = _parse(argv)
    verb, (module, function) = options.pop("verb"), options.pop("runs").split(":")
    for stream in (sys.stdout, sys.stderr):
        # names and texts may hold what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.flags.optimize > 1:
        print(
            f"lnfree {verb}: error: python -OO strips the docstrings that transformers reads: use -O", file=sys.stderr
        )
        return 1
    try:
        os.getcwd()
    except FileNotFoundError:
        # libraries would end the process without a word of this
        print(f"lnfree {verb}: error: the working folder is gone: go to another", file=sys.stderr)
        return 1
    try:
        with _ending_cleanly():
            return _run(verb, module, function, options)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if verb in ("train", "sweep", "remove-norms", "publish") else ""
        print(f"lnfree {verb}: interrupted{goes_on}", file=sys.stderr)
        return 130
    except OSError as error:
        # who reads the output may close it, as head does
        if not isinstance(error, BrokenPipeError):
            print(f"lnfree {verb}: error: {error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            # what is left of it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Within, SIGTERM, by which schedulers end a process, is what Ctrl-C is: nothing half-written is left."""
    # only the main thread may
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(verb: str, module: str, function: str, options: dict) -> int:
    from .errors import UserError

    try:
        getattr(importlib.import_module(f".{module}", __package__), function)(**options)
        sys.stdout.flush()
    except UserError as error:
        print(f"lnfree {verb}: error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; `runs` of its result is the function of a verb, whose arguments are the rest."""
    parser = argparse.ArgumentParser(
        prog="lnfree", description="Train, compare, export and measure GPT models without LayerNorm."
    )
    version = f"lnfree {importlib.metadata.version('lnfree')}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _train,
        _recipes,
        _sweep,
        _compare,
        _export,
        _measure,
        _attribute,
        _cost,
        _import,
        _remove_norms,
        _publish,
        _benchmark,
    ):
        add(verbs)
    return parser


def _parse(argv: list[str] | None) -> dict:
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks: eval "$(register-python-argcomplete lnfree)"
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives `overrides` only what stands before the first option
    if rest and (arguments.verb not in ("train", "remove-norms") or any(value.startswith("-") for value in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options = vars(arguments)
    if rest:
        options["overrides"] += rest
    return options


def _add_verb(verbs, name: str, runs: str, summary: str, example: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(runs=runs)
    return verb


def _train(verbs):
    verb = _add_verb(
        verbs,
        "train",
        "train.command:run",
        "train a recipe's model, or go on where it was interrupted",
        "lnfree train quick variant=SM+R seed=1",
    )
    verb.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name (lnfree recipes lists them) or a .yaml file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="fields, which --fields lists")
    verb.add_argument("--fields", action="store_true", help="show every field with its help, type and default")
    verb.add_argument("--plan", action="store_true", help="print memory, steps and time, and start nothing")
    verb.add_argument("--processes", type=int, metavar="N", help="of the plan: processes, one a GPU (default: 1)")
    verb.add_argument("--flops", type=float, metavar="F", help="of the plan: FLOP/s that a process sustains")


def _recipes(verbs):
    _add_verb(
        verbs,
        "recipes",
        "catalog:print_recipes",
        "the recipes and sweeps that may be named, with one line each",
        "lnfree recipes",
    )


def _sweep(verbs):
    verb = _add_verb(
        verbs,
        "sweep",
        "sweep:sweep",
        "train the runs of a sweep that are not finished, each in its own process",
        "lnfree sweep study --jobs 2",
    )
    verb.add_argument("path", metavar="SWEEP", help="a name (lnfree recipes lists them) or a .yaml file")
    verb.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")


def _compare(verbs):
    verb = _add_verb(
        verbs,
        "compare",
        "compare.comparison:compare",
        "the paper's table, heat maps and curves from finished runs",
        "lnfree compare runs/quickstart",
    )
    verb.add_argument(
        "runs_dir", metavar="RUNS_DIR", help="folder whose subfolders are runs, or a docs/data/NAME.parquet of one"
    )
    verb.add_argument("--output", metavar="DIR", help="where to write the report (default: RUNS_DIR/report)")
    verb.add_argument("--docs", metavar="DIR", help="of a checkout: put the tables into its pages too")


def _export(verbs):
    verb = _add_verb(
        verbs,
        "export",
        "hub.export:export",
        "a finished run as a folder for the Hub, loaded back in a clean process",
        "lnfree export runs/quickstart/SM+R exports/lnfree-gpt2-sm-r-t128",
    )
    verb.add_argument("run_dir", metavar="RUN_DIR")
    verb.add_argument("out_dir", metavar="OUT_DIR")


def _measure(verbs):
    verb = _add_verb(
        verbs,
        "measure",
        "measure:measure",
        "perplexity, attention and the residual stream of causal language models on any texts, side by side",
        "lnfree measure runs/quickstart/SM+G/model runs/quickstart/SM+R/model --dataset stdlib --heat-map heads.png\n"
        "  lnfree measure EleutherAI/pythia-70m --revision step1000 step10000 step100000 --dataset texts.jsonl "
        "--heat-map film.png",
    )
    verb.add_argument("model_id", nargs="+", metavar="MODEL", help="models of the Hub, or folders")
    verb.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a model")
    verb.add_argument("--revision", nargs="+", metavar="REVISION", help="branches, tags or commits of one model")
    _add_texts(verb, required=True)
    verb.add_argument("--streaming", action="store_true", help="read the dataset while measuring")
    verb.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: the model's positions)")
    verb.add_argument("--stride", type=int, metavar="N", help="read on past it, in windows that begin N tokens apart")
    verb.add_argument("--rolling", action="store_true", help="read on past it as lm-eval does, in disjoint windows")
    verb.add_argument("--concatenate", action="store_true", help="one text of all, with an empty line between them")
    verb.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts in a forward pass (default: 8)")
    verb.add_argument("--int8", action="store_true", help="perplexity in simulated int8 too, by tensor and by token")
    verb.add_argument("--int8-clip", type=float, metavar="Q", help="and clipped at a quantile of the tokens, as 0.99")
    verb.add_argument("--tasks", metavar="TASK,...", help="tasks of lm-eval too, where it is installed")
    verb.add_argument("--device", help="default: an accelerator, if there is one")
    verb.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the weights")
    verb.add_argument("--json", dest="json_path", metavar="FILE", help="write all results; -: the standard output")
    verb.add_argument(
        "--markdown",
        dest="markdown_path",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the table as Markdown (default: the standard output)",
    )
    pictures = "draw layers x heads; of revisions curves too"
    verb.add_argument("--heat-map", dest="heat_map_path", metavar="FILE.png", help=pictures)
    verb.add_argument("--parquet", dest="parquet_path", metavar="FILE", help="write the figures of every text")
    for option, now in (("--private-cost", "lnfree cost MODEL"), ("--fixed-point", "lnfree cost MODEL --fixed-point")):
        verb.add_argument(option, nargs="?", action=_Moved, dest=argparse.SUPPRESS, const=now, help=argparse.SUPPRESS)


class _Moved(argparse.Action):
    """An option of an earlier version: names what does it now."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.exit(2, f"{parser.prog}: error: {option_string} is now '{self.const}'\n")


def _attribute(verbs):
    verb = _add_verb(
        verbs,
        "attribute",
        "attribute:attribute",
        "which heads, feed-forward layers and neurons make a model's next token",
        "lnfree attribute runs/first/model 'def main(' --lens --picture attributed.png\n"
        "  lnfree attribute runs/first/model 'x = [' --corrupted 'x = (' --real",
    )
    verb.add_argument(
        "model_id",
        metavar="MODEL",
        help="of the Hub, or a folder: of this family, or one that `lnfree import` takes",
    )
    verb.add_argument("text", metavar="TEXT", help="what the token follows")
    verb.add_argument("--revision", help="branch, tag or commit of the model")
    verb.add_argument("--target", metavar="TOKEN", help="the token whose logit is split (default: the likeliest)")
    verb.add_argument("--against", metavar="TOKEN", help="split the difference to this token's logit")
    verb.add_argument("--neurons", action="store_true", help="split the feed-forward layers too")
    verb.add_argument(
        "--linearize",
        action="store_true",
        help="hold a final norm at its scale, and say what that gets wrong (default: an error where there is one)",
    )
    verb.add_argument("--lens", action="store_true", help="also the next token by layer, read off the residual stream")
    verb.add_argument(
        "--corrupted",
        metavar="TEXT",
        help="in place of the sum: whose output matters for the answer to TEXT, not to this one of as many tokens",
    )
    verb.add_argument("--real", action="store_true", help="of --corrupted: also exchange every output, one by one")
    verb.add_argument("--json", dest="json_path", metavar="FILE", help="write all results")
    verb.add_argument("--picture", dest="picture_path", metavar="FILE.png", help="draw them")


def _cost(verbs):
    verb = _add_verb(
        verbs,
        "cost",
        "cost:cost",
        "what a model costs under encryption, by its configuration alone; or the bits of fixed point that it needs",
        "lnfree cost runs/quickstart/SM+R/model --length 128 --new-tokens 8\n"
        "  lnfree cost SM+LN+G SM+R gpt2-xl:SM+R llama-3.1-8b --tokens 128 --network wan\n"
        "  lnfree cost runs/quickstart/SM+R/model --fixed-point --dataset stdlib",
    )
    verb.add_argument(
        "model_ids",
        nargs="+",
        metavar="MODEL",
        help="model of the Hub, a folder with a configuration, or a name: gpt2 to gpt2-xl, pythia-14m to -12b, "
        "llama-3.2-1b, -3b, llama-3.1-8b, llama-2-7b; SM+R and other variants at GPT-2's sizes; gpt2-xl:SM+R; "
        "SM+R:hidden_size=512,num_hidden_layers=6; several are compared with the first",
    )
    verb.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a model")
    verb.add_argument("--revision", help="branch, tag or commit of the models")
    verb.add_argument(
        "--length", "--tokens", type=int, metavar="N", help="tokens of the input (default: the models' positions)"
    )
    verb.add_argument("--batch-size", type=int, metavar="N", help="inputs (default: 1, with --fixed-point 8)")
    verb.add_argument("--new-tokens", type=int, default=0, metavar="N", help="count also generating N tokens after it")
    verb.add_argument(
        "--network",
        action="append",
        dest="networks",
        metavar="lan|wan|MS,GBPS",
        help="round trip and bandwidth that seconds are of; may be repeated (default: lan, 0.8 ms and 3 Gbit/s, and "
        "wan, 80 ms and 0.2 Gbit/s)",
    )
    verb.add_argument("--steps", action="store_true", help="print also the steps that operations are composed of")
    verb.add_argument(
        "--fixed-point",
        action="store_true",
        help="find the largest values on texts, and the fewest bits that keep perplexity within 1 %%",
    )
    _add_texts(verb)
    verb.add_argument("--device", help="of --fixed-point; default: an accelerator, if there is one")
    verb.add_argument("--json", dest="json_path", metavar="FILE", help="write all results")
    verb.add_argument(
        "--docs",
        dest="docs_path",
        metavar="DOCS/data/NAME.json",
        help="of a checkout: write the tables NAME, NAME-token, -operations, -steps, -published that its pages show",
    )


def _add_texts(verb: argparse.ArgumentParser, required: bool = False):
    verb.add_argument(
        "--dataset",
        required=required,
        metavar="NAME_OR_FILE",
        help="dataset of the Hub, a folder, a .json, .jsonl, .parquet, .csv or .txt file, or 'stdlib'",
    )
    verb.add_argument("--config", help="configuration (subset) of the dataset")
    verb.add_argument("--split", help="default: validation, else test, else the first")
    verb.add_argument("--text-column", metavar="NAME", help="default: the only column that holds texts")
    verb.add_argument("--max-samples", type=int, metavar="N", help="read the first N rows only")


def _import(verbs):
    verb = _add_verb(
        verbs,
        "import",
        "convert.convert:convert",
        "a GPT-2, GPT-NeoX, Llama, Mistral or Qwen as a model of this family, with equal logits, or the other way",
        "lnfree import openai-community/gpt2 imported/gpt2",
    )
    verb.add_argument("model_id", metavar="MODEL", help="model of the Hub, or a folder")
    verb.add_argument("out_dir", metavar="OUT_DIR")
    verb.add_argument("--to-stock", action="store_true", help="write a model of this family as the stock class")
    verb.add_argument("--revision", help="branch, tag or commit of the model")


def _remove_norms(verbs):
    verb = _add_verb(
        verbs,
        "remove-norms",
        "remove_norms:remove_norms",
        "a trained GPT-2, Pythia or Llama without its norms: fine-tuned while they are taken out, folded and exported",
        "lnfree remove-norms openai-community/gpt2 gpt2-without-norms --dataset texts.jsonl max_steps=300",
    )
    verb.add_argument("model_id", metavar="MODEL_ID_OR_PATH", help="model of the Hub, or a folder, with its tokenizer")
    verb.add_argument("out_dir", metavar="OUT_DIR")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe remove_norms")
    verb.add_argument("--dataset", metavar="NAME_OR_FILE", help="texts to fine-tune on (default: the recipe's)")
    verb.add_argument("--keep-final-norm", action="store_true", help="leave the norm before the output projection")
    verb.add_argument("--no-control", dest="control", action="store_false", help="no second run that keeps its norms")


def _publish(verbs):
    verb = _add_verb(
        verbs,
        "publish",
        "hub.publish:publish",
        "finished runs on the Hub: a repository a variant, metric, results and collection, loaded back from there",
        "lnfree publish runs/quickstart --namespace YOUR_NAME --dry-run",
    )
    verb.add_argument("runs_dir", metavar="RUNS_DIR", help="folder whose subfolders are runs")
    verb.add_argument("--namespace", required=True, metavar="NAME", help="user or organization of the Hub")
    verb.add_argument("--private", action="store_true", help="create private repositories")
    verb.add_argument("--dry-run", action="store_true", help="build and check everything, list what would change")
    verb.add_argument(
        "--seed", type=int, metavar="N", help="publish the runs of this seed (default: the lowest finished one)"
    )
    verb.add_argument(
        "--checkpoints", action="store_true", help="publish the runs' checkpoints too, as revisions step-N"
    )


def _benchmark(verbs):
    verb = _add_verb(
        verbs,
        "benchmark",
        "benchmark.benchmark:benchmark",
        "what training, measuring, generating and starting cost beside stock models",
        "lnfree benchmark step entropy --sizes quick gpt2 --json benchmark.json",
    )
    verb.add_argument("sections", nargs="*", metavar="SECTION", help="default: all; a wrong one lists them")
    verb.add_argument("--sizes", nargs="+", default=["quick"], metavar="SIZE", help="quick, gpt2, pythia70m")
    verb.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of a median (default: 7)")
    verb.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 512, 1024, 2048, 4096],
        metavar="T",
        help="of the sections entropy and attention",
    )
    verb.add_argument("--compiled", action="store_true", help="the sections step and bf16 also by torch.compile")
    verb.add_argument("--json", dest="json_path", metavar="FILE", help="write all figures")
    verb.add_argument("--docs", metavar="DIR", help="of a checkout: put the tables into its pages too")


if __name__ == "__main__":
    sys.exit(main())
