"""`lnfree measure`: what causal language models make of texts, side by side."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_lnfree.int8 import simulate_int8
from modeling_lnfree.likelihood import Likelihood, Reading
from modeling_lnfree.measurement import Measurement, Meter, TextFigures, check_measured, int8_ways

from .data import check_reachable
from .errors import UserError, explained, refused
from .files import aside_of, check_outputs, to_json, write_atomically
from .harness import check_tasks, run_tasks
from .measured import describe, draw, report, tabulate_measured
from .plots import check_picture, save_picture
from .recipe import check_model_id
from .runs import library_versions
from .tables import to_markdown, to_text
from .texts import Texts, load_reader


# a row a text; entropies in nats
_FIGURES = pa.schema(
    {
        "row": pa.int64(),  # in the dataset
        "num_tokens": pa.int64(),
        "perplexity": pa.float64(),
        "nll": pa.list_(pa.float32()),  # of each predicted token, in nats
        "entropy": pa.list_(pa.list_(pa.float32())),  # (layers, heads), mean over the text's queries
        "position_entropy": pa.list_(pa.list_(pa.float32())),  # (layers, queries), mean over the heads
    }
)


def measure(
    model_id: str | list[str],
    *,
    dataset: str,
    config: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    rolling: bool = False,
    concatenate: bool = False,
    int8: bool = False,
    int8_clip: float | None = None,
    tasks: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    revision: str | list[str] | None = None,
    json_path: str | Path | None = None,
    markdown_path: str | Path | None = None,
    heat_map_path: str | Path | None = None,
    parquet_path: str | Path | None = None,
) -> dict[str, Any] | list[dict[str, Any]]:
    """
    Measures models on the texts of a dataset, with a progress bar: `modeling_lnfree.measure`, and what is around it.

    Ctrl-C or SIGTERM ends behind the batch that is read, and a second one at once; what was measured is shown and
    written then, as it is where a later model cannot be measured.

    Args:
        model_id: Hub ids or folders of causal language models with their tokenizers.
        dataset, config, split, text_column, max_samples, streaming: see `Texts`.
        max_length, batch_size, stride, rolling, concatenate, int8, int8_clip: see `modeling_lnfree.measure`.
        tasks: of lm-eval, with commas between them, or `.yaml` files of tasks.
        device: by default an accelerator, if there is one.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default that of the weights.
        trust_remote_code: whether the code that comes with a model may be run.
        revision: branch, tag or commit of the model; several, of one model, are measured one after the other.
        json_path: where to write the results; `-` is the standard output, which holds nothing else then.
        markdown_path: where to write the table and what was left out, or `-`.
        heat_map_path: where to draw the entropy of every layer and head; of several revisions a film strip, and curves
            of all quantities.
        parquet_path: where to write the figures of every text of one model, a row each: the negative log-likelihood of
            its tokens, its entropy by layer and head, and by layer and position.

    Returns:
        `Measurement.to_dict` of the model, and all that it depends on; of several models a list.

    Raises:
        UserError: for a model, dataset or task that cannot be loaded or measured, for options that do not go together,
            and for files that cannot be written.
        KeyboardInterrupt: after what was measured was shown and written.
    """
    for name, number in (("batch_size", batch_size), ("max_samples", max_samples), ("max_length", max_length)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")
    if int8_clip is not None and not 0 < int8_clip <= 1:
        raise UserError(f"int8_clip must be a quantile above 0 and at most 1, got {int8_clip}")
    ids = [model_id] if isinstance(model_id, str) else list(model_id)
    revisions = revision if isinstance(revision, list) else [revision]
    if len(ids) > 1 and len(revisions) > 1:
        raise UserError(f"several revisions are of one model, got {len(ids)} models")
    sources = [(name, each) for name in ids for each in revisions]
    if len(sources) > 1 and parquet_path is not None:
        raise UserError("parquet_path is of one model: the figures of its texts")
    outputs = _check_outputs(json_path, markdown_path, heat_map_path, parquet_path, inputs=[dataset, *ids])
    for name, each in sources:
        check_model_id(name, each)
    harness_tasks = check_tasks(tasks)
    stdout = sys.stdout
    results: list[dict[str, Any]] = []
    stopped: BaseException | None = None
    figures = None if outputs.parquet is None else _FiguresFile(outputs.parquet)
    with redirect_stdout(sys.stderr if outputs.stream else stdout):
        texts = Texts(
            dataset,
            config=config,
            split=split,
            text_column=text_column,
            max_samples=max_samples,
            streaming=streaming,
        )
        for name in ids:
            check_reachable("model", name)
        try:
            for name, each in sources:
                model, tokenizer, length = load_reader(
                    name,
                    max_length=max_length,
                    device=device,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    revision=each,
                )
                with refused(f"model {name!r} cannot be measured"):
                    way: dict[str, Any] = {"stride": stride, "rolling": rolling, "concatenate": concatenate}
                    reading = Reading(tokenizer, length, batch_size, **way)
                    result = _describe_source(name, each, model, texts, reading, config, max_samples)
                    results.append(result)
                    _measure(result, model, reading, texts, int8_ways(int8, int8_clip), figures)
                if result["interrupted"]:
                    raise KeyboardInterrupt
                print(describe(result))
                if harness_tasks:
                    result["tasks"] = run_tasks(model, tokenizer, harness_tasks, batch_size, length)
        # who reads the output may close it
        except (KeyboardInterrupt, UserError, BrokenPipeError) as error:
            stopped = error
        finally:
            if figures is not None:
                figures.close()
        results = [result for result in results if "summary" in result]
        failures = [] if figures is None else figures.failures
        if results:
            found: dict[str, Any] | list[dict[str, Any]] = results[0] if len(sources) == 1 else results
            failures += _tell(results, found, outputs, stdout)
    # told at the end, after what was measured all the same
    if stopped is not None:
        raise stopped
    if failures:
        raise UserError("; ".join(failures))
    return found


class _Outputs(NamedTuple):
    """Where results go: to files, those that are wanted, or alone to the standard output."""

    json: Path | None
    markdown: Path | None
    heat_map: Path | None
    parquet: Path | None
    stream: Literal["json", "markdown"] | None


def _check_outputs(
    json_path: str | Path | None,
    markdown_path: str | Path | None,
    heat_map_path: str | Path | None,
    parquet_path: str | Path | None,
    inputs: list[str],
) -> _Outputs:
    """As `check_outputs`, of the paths that `measure` takes."""
    if json_path == markdown_path == "-":
        raise UserError("json_path and markdown_path must be two files, got the standard output for both")
    paths = {
        "json_path": None if json_path == "-" else json_path,
        "markdown_path": None if markdown_path == "-" else markdown_path,
        "heat_map_path": heat_map_path,
        "parquet_path": parquet_path,
    }
    json_file, markdown_file, heat_map_file, parquet_file = check_outputs(paths, inputs)
    check_picture(heat_map_file)
    stream: Literal["json", "markdown"] | None = "json" if json_path == "-" else None
    stream = "markdown" if markdown_path == "-" else stream
    return _Outputs(json_file, markdown_file, heat_map_file, parquet_file, stream)


def _tell(
    results: list[dict[str, Any]],
    found: dict[str, Any] | list[dict[str, Any]],
    outputs: _Outputs,
    stdout: TextIO,
) -> list[str]:
    """Prints the table, and writes what is wanted, also where nobody reads what is printed; why it could not."""
    page, failures = to_markdown(report(results)) + "\n", []
    try:
        if results[-1]["interrupted"]:
            print(describe(results[-1]))
        print("\n" + to_text([tabulate_measured(results)]))
        if outputs.stream is not None:
            print({"json": to_json(found) + "\n", "markdown": page}[outputs.stream], end="", file=stdout)
    finally:
        for path, write in (
            (outputs.json, lambda path: write_atomically(path, to_json(found))),
            (outputs.markdown, lambda path: write_atomically(path, page)),
            (outputs.heat_map, lambda path: save_picture(draw(results), path)),
        ):
            if path is not None:
                failures += _attempt(path, partial(write, path))
    return failures


def _describe_source(
    model_id: str,
    revision: str | None,
    model: PreTrainedModel,
    texts: Texts,
    reading: Reading,
    config: str | None,
    max_samples: int | None,
) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        "model": model_id,
        "revision": revision,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "dataset": texts.dataset,
        "config": config,
        "split": texts.split,
        "text_column": texts.column,
        "max_samples": max_samples,
        "max_length": reading.max_length,
        "batch_size": reading.batch_size,
        "stride": reading.stride,
        "rolling": reading.rolling,
        "concatenate": reading.concatenate,
        "interrupted": False,
    }


def _measure(
    result: dict[str, Any],
    model: PreTrainedModel,
    reading: Reading,
    texts: Texts,
    ways: dict[str, dict[str, Any]],
    figures: "_FiguresFile | None",
) -> None:
    """Adds to `result` what was measured; of a measurement that is interrupted, what was read until then."""
    started = time.perf_counter()
    found = Measurement()
    with _until_interrupted() as interrupted:
        meter = Meter(model, reading, found, None if figures is None else figures.write)
        _read(meter, texts, "measuring", interrupted)
        if not interrupted():
            if found.predicted_tokens == 0:
                raise UserError(f"dataset {texts.dataset!r} has no text of two tokens in the column {texts.column!r}")
            check_measured(found)
        if figures is not None:
            figures.finish()
        for name, options in ways.items():
            if not interrupted():
                likelihood = Likelihood()
                with simulate_int8(model, **options):
                    _read(Meter(model, reading, likelihood), texts, f"int8 {name}", interrupted)
                # of some texts, it would not stand beside that of all
                if not interrupted():
                    found.int8[name] = likelihood
    if found.predicted_tokens:
        result |= found.to_dict()
    result |= {
        "interrupted": interrupted(),
        "seconds": time.perf_counter() - started,
        "versions": library_versions(),
    }


def _read(meter: Meter, texts: Texts, what: str, interrupted: Callable[[], bool]) -> None:
    """Reads the texts, or as many as there is time for."""
    reading = meter.reading
    cuts = reading.stride is None and not reading.rolling and not reading.concatenate
    progress = tqdm(total=texts.number if cuts else None, desc=what, unit="text" if cuts else "window")
    with torch.no_grad(), progress, closing(meter.read(texts)) as batches:
        for number in batches:
            progress.update(number)
            if interrupted():
                break


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Within, the first interruption only sets what the function tells; the second is one."""
    signals: list[int] = []

    def note(number: int, frame: Any) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt
        print("\ninterrupted: ends behind this batch, and at once if it is again", file=sys.stderr)

    # only the main thread may
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _FiguresFile:
    """A row a text of `_FIGURES`, in a file that is whole or not there. A full disk ends it, not the measurement."""

    def __init__(self, path: Path):
        self.path = path
        self.failures: list[str] = []
        self.writer = pq.ParquetWriter(aside_of(path), _FIGURES)

    def write(self, figures: TextFigures):
        """The row of one text."""
        row = {
            "row": figures.row,
            "num_tokens": figures.num_tokens,
            "perplexity": figures.nll.mean().exp().item(),
            "nll": figures.nll.tolist(),
            "entropy": [layer.mean(1).tolist() for layer in figures.entropies],
            "position_entropy": [layer.mean(0).tolist() for layer in figures.entropies],
        }
        self._attempt(lambda: self.writer.write(pa.RecordBatch.from_pylist([row], _FIGURES)))

    def finish(self):
        """Gives the file its name."""
        self._attempt(self.writer.close)
        self._attempt(lambda: os.replace(aside_of(self.path), self.path))

    def close(self):
        """Removes what is left of a file that was not finished."""
        with suppress(OSError):
            self.writer.close()
        aside_of(self.path).unlink(missing_ok=True)

    def _attempt(self, write: Callable[[], None]):
        if not self.failures:
            self.failures += _attempt(self.path, write)


def _attempt(path: Path, write: Callable[[], Any]) -> list[str]:
    """Why a file could not be written, if so."""
    try:
        with explained(f"{path} cannot be written"):
            write()
    except UserError as error:
        return [str(error)]
    return []
