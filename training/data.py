"""
Documents -> tokens -> blocks of exactly T tokens; the embedded corpus and any dataset with a text column alike.

A dataset is prepared once and cached, or with `streaming=true` read, shuffled and tokenized while training goes on.
"""

import functools
import glob
import hashlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import Dataset, IterableDataset
from datasets.data_files import FILES_TO_IGNORE, get_data_patterns
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from datasets.packaged_modules.text.text import TextConfig
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import validate_repo_id
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_lnfree.metrics.attention_entropy.reading import ask_for_model, ask_hub

from .errors import UserError, explained, one_line
from .files import kind_of
from .json_texts import JsonTexts
from .recipe import DataArguments


END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}


def load_documents(arguments: DataArguments, seed: int) -> dict[str, Dataset | IterableDataset]:
    """
    The documents to train and to evaluate on, in a column `arguments.text_column`.

    Args:
        seed: of the order of the documents to train on; of a stream, of the order of its files.

    Returns:
        `"train"` (shuffled, or a stream) and `"eval"`. Without evaluation data of its own, a dataset is split by a
        hash of each document's text, so that no text stands in both. Texts that are equal but for white space stand in
        one part only as well: left out of the evaluation, or out of a stream, which is not known beforehand.

    Raises:
        UserError: for a dataset that cannot be loaded, or that has no such column of texts; for a stream without
            evaluation data of its own.
    """
    loaded = _load(arguments.dataset, arguments, arguments.dataset_config, arguments.streaming)
    # the only split of a dataset may have any name
    train = loaded.pop("train" if "train" in loaded else next(iter(loaded)))
    if arguments.eval_dataset is not None:
        held_out = evaluation_split(_load(arguments.eval_dataset, arguments))
    else:
        held_out = loaded.get("validation", loaded.get("test"))
    for split in (train, held_out):
        with reading(f"dataset {arguments.dataset!r} cannot be read"):
            names = [] if split is None else _column_names(split)
        if split is not None and arguments.text_column not in names:
            raise UserError(
                f"text_column={arguments.text_column!r} is not a column of the dataset, which has {', '.join(names)}"
            )
    train = _texts_only(train, arguments.text_column)
    held_out = None if held_out is None else _texts_only(held_out, arguments.text_column)
    if arguments.streaming:
        if held_out is None:
            raise UserError(
                "streaming=True needs evaluation data of its own, as holding some out would read the whole stream: "
                "name an eval_dataset, or a dataset with a validation or test split"
            )
        return _stream(train, held_out, arguments.text_column, seed)
    if held_out is None:
        split = functools.partial(train.filter, _is_held_out, input_columns=arguments.text_column)
        held_out = split(fn_kwargs={"fraction": arguments.eval_fraction, "wanted": True})
        train = split(fn_kwargs={"fraction": arguments.eval_fraction, "wanted": False})
    held_out = _without_duplicates(held_out, train, arguments.text_column)
    return {"train": train.shuffle(seed=seed), "eval": held_out}


def _load(name: str, arguments: DataArguments, config: str | None = None, streaming: bool = False):
    if name != "stdlib":
        return load_splits(name, config, streaming=streaming)
    if config is not None:
        raise UserError(f"dataset 'stdlib' has no configurations, got config={config!r}")
    source = {"root": sysconfig.get_path("stdlib"), "version": sys.version, "text_column": arguments.text_column}
    documents = Dataset.from_generator(_stdlib_documents, gen_kwargs=source)
    return {"train": documents.to_iterable_dataset() if streaming else documents}


def find_revision(arguments: DataArguments) -> str | None:
    """The commit of the evaluation data on the Hub; Python's version for the embedded corpus; None for a file."""
    name = arguments.eval_dataset or arguments.dataset
    if name == "stdlib":
        return f"python-{platform.python_version()}"
    if os.path.exists(name):
        return None
    config = None if arguments.eval_dataset else arguments.dataset_config
    return datasets.load_dataset_builder(name, config).hash


def load_splits(
    name: str, config: str | None = None, split: str | None = None, streaming: bool = False
) -> dict[str, Dataset | IterableDataset] | Dataset | IterableDataset:
    """
    The splits of a dataset of the Hub, a folder or a file by their names; only that one where `split` names it. All
    cells of a CSV file are texts.

    Raises:
        UserError: if it cannot be loaded.
    """
    # unlike those of `Path`, these take any text
    is_file, is_folder = os.path.isfile(name), os.path.isdir(name)
    if os.path.lexists(name) and not is_file and not is_folder:
        raise UserError(f"dataset {name!r} must be a file or a folder, got a {kind_of(Path(name))}")
    # as a relative path hf://x is of the Hub, json a builder, and the name of the working folder a pattern
    path = str(Path(name).resolve() if is_folder else Path(name).parent.resolve() / Path(name).name)
    if "::" in path and (is_file or is_folder):
        raise UserError(
            f"dataset {name!r} must not have '::' in its path, which datasets takes for a file in a file: {path}"
        )
    if is_file:
        kind = BUILDERS.get(Path(name).suffix.lower())
        if kind is None:
            raise UserError(f"dataset {name} must end in one of {', '.join(BUILDERS)}")
        if config is not None:
            raise UserError(f"dataset {name} is a file and has no configurations, got config={config!r}")
        if Path(name).stat().st_size == 0:
            raise UserError(f"dataset {name!r} cannot be loaded: it is empty")
        source: dict[str, Any] = {"path": kind, "data_files": glob.escape(path)}
    elif is_folder:
        source = _folder(name, path, config)
    elif name in BUILDERS.values():
        raise UserError(f"dataset {name!r} is no file or folder")
    else:
        check_reachable("dataset", name)
        source = {"path": name, "name": config}
    with reading(f"dataset {name!r} cannot be loaded"):
        builder = datasets.load_dataset_builder(**source)
        files = list((builder.config.data_files or {}).values())
        for file in (file for part in files for file in part):
            if os.path.expandvars(file) != file:
                raise UserError(
                    f"dataset {name!r} must not have a variable in a path, which would be replaced: {file}"
                )
        if is_folder and config is None:
            _report_left_out(name, Path(path), [file for part in files for file in part])
        if isinstance(builder.config, CsvConfig):
            source |= _cells_as_texts(name, builder.config, [part[0] for part in files])
        elif isinstance(builder.config, TextConfig):
            # a byte order mark is no text
            source["encoding"] = "utf-8-sig"
        elif isinstance(builder.config, JsonConfig):
            # logs of assistants are columns too
            source["parse_agent_traces"] = False
            features = _json_features(source, streaming)
            # nor is a column without texts in the first part known to have none; which it has, a stream finds out late
            more = () if streaming else ("null",)
            if texts := [column for column, feature in features.items() if _may_be_text(feature, more)]:
                strings = datasets.Features({**features, **dict.fromkeys(texts, datasets.Value("string"))})
                as_texts = JsonTexts.like(builder, strings)
                if streaming:
                    return as_texts.as_streaming_dataset(split)
                as_texts.download_and_prepare()
                return as_texts.as_dataset(split)
        return datasets.load_dataset(**source, split=split, streaming=streaming)


def _cells_as_texts(name: str, config: CsvConfig, first_files: list[str]) -> dict[str, Any]:
    """What makes every cell its text: NA is not nothing, and 0012 is not 12."""
    columns: dict[str, Any] = {}
    for file in first_files:
        first = pd.read_csv(file, **{**config.pd_read_csv_kwargs, "nrows": 1, "chunksize": None})
        if not isinstance(first.index, pd.RangeIndex):
            # pandas takes the first cell for the name of the row, and shifts the others
            raise UserError(f"dataset {name!r} cannot be loaded: its rows have more cells than its header")
        columns |= dict.fromkeys(first, str)
    return {"converters": columns, "keep_default_na": False}


def _json_features(source: dict[str, Any], streaming: bool) -> datasets.Features:
    """Of a dataset of JSON, from its first rows; none where a stream of it does not tell."""
    features = next(iter(datasets.load_dataset(**source, streaming=True).values())).features
    if features is None and not streaming:
        features = next(iter(datasets.load_dataset(**source).values())).features
    return features or datasets.Features()


def _may_be_text(feature: Any, more: tuple[str, ...] = ()) -> bool:
    """JSON has no dates: what was read as one is a text."""
    kinds = ("string", "timestamp", "date", "time", *more)
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """As `explained`, for what `datasets` reads."""
    with explained(what, datasets.exceptions.DatasetsError):
        try:
            yield
        except datasets.exceptions.DatasetGenerationError as error:
            # "an error occurred while generating the dataset" is all that it says itself
            raise error.__cause__ or error from None
        # the ways of datasets to say that there is no row
        except StopIteration:
            raise UserError(f"{what}: it is empty") from None
        except ValueError as error:
            if "corresponds to no data" not in str(error):
                raise
            raise UserError(f"{what}: it is empty") from None


def _folder(name: str, path: str, config: str | None) -> dict[str, Any]:
    """What names a folder to `datasets`, which takes * ? and [ in its path for a pattern."""
    escaped = glob.escape(path)
    if escaped == path:
        return {"path": path, "name": config}
    card = Path(path, "README.md")
    if config is not None or card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"dataset {name!r} has configurations and one of *?[ in its path: rename the folder")
    with explained(f"dataset {name!r} cannot be loaded"):
        splits = get_data_patterns(escaped)
    return {"path": path, "data_files": {split: [f"{escaped}/{p}" for p in splits[split]] for split in splits}}


def _report_left_out(name: str, folder: Path, read: list[str]):
    """Says which files of a folder belong to no split, or are of another kind than the others."""
    found = {
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in BUILDERS
        and path.name not in (*FILES_TO_IGNORE, "state.json")
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    }
    if left := sorted(os.path.relpath(path, folder) for path in found.difference(read)):
        names = f"{', '.join(left[:3])}{' ...' * (len(left) > 3)}"
        _report(f"dataset {name!r}: {len(left)} of {len(found)} files are not read: {names}")


def evaluation_split(splits: dict[str, Dataset | IterableDataset]) -> Dataset | IterableDataset:
    """The validation split, else the test split, else the first."""
    return splits.get("validation", splits.get("test", next(iter(splits.values()))))


def _column_names(split: Dataset | IterableDataset) -> list[str]:
    # a stream of JSON does not know them before its first row
    return split.column_names or list(next(iter(split), {}))


def _texts_only(split: Dataset | IterableDataset, text_column: str) -> Dataset | IterableDataset:
    """Without rows that have no text; raises UserError for a column of another type. A stream's are not known."""
    if not isinstance(split, Dataset):
        return split
    # as read, not as stored: a column of mixed values is stored as texts of JSON
    feature = split.features[text_column]
    if feature not in (datasets.Value("string"), datasets.Value("large_string")):
        raise UserError(f"text_column={text_column!r} must hold texts, got {getattr(feature, 'dtype', feature)}")
    column = split.data.column(text_column)
    if column.null_count == 0:
        return split
    _report(f"{column.null_count} of {len(split)} documents have no text: left out")
    return split.filter(_is_text, input_columns=text_column)


def _is_text(text: str | None) -> bool:
    # the columns of a stream have no types before they are read
    if text is not None and not isinstance(text, str):
        raise UserError(f"the text column must hold texts, got {type(text).__name__}")
    return text is not None


def _stream(train: IterableDataset, held_out: Dataset | IterableDataset, text_column: str, seed: int):
    # the evaluation part is finite and read often
    with reading("the evaluation data cannot be read"):
        held_out = Dataset.from_list(list(held_out.select_columns(text_column)))
    held_out = _texts_only(held_out, text_column)
    known = {_content_hash(text) for text in held_out[text_column]}
    train = train.select_columns(text_column).filter(_is_text, input_columns=text_column)
    train = train.filter(_is_known, input_columns=text_column, fn_kwargs={"known": known, "wanted": False})
    _report(f"documents of the stream that equal one of the {len(held_out)} to evaluate on are left out of it")
    # an epoch other than 0 puts the files in an order of its own; `shuffle` would lose its buffer on resuming
    train.set_epoch(1 + seed)
    return {"train": train, "eval": held_out}


def _without_duplicates(held_out: Dataset, train: Dataset, text_column: str) -> Dataset:
    """The documents to evaluate on that do not stand in `train`; how many do is printed."""
    known = {_content_hash(text) for text in held_out[text_column]}
    found = functools.partial(train.filter, _is_known, input_columns=text_column, desc="looking for duplicates")
    seen = {_content_hash(text) for text in found(fn_kwargs={"known": known, "wanted": True})[text_column]}
    if not seen:
        return held_out
    kept = held_out.filter(_is_known, input_columns=text_column, fn_kwargs={"known": seen, "wanted": False})
    number = len(held_out) - len(kept)
    _report(f"{number} of {len(held_out)} documents to evaluate on are also trained on: left out of the evaluation")
    return kept


def _content_hash(text: str) -> bytes:
    """Equal for texts that differ in white space only."""
    return hashlib.sha256("".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def _is_known(text: str, known: set[bytes], wanted: bool) -> bool:
    return (_content_hash(text) in known) == wanted


def _report(line: str):
    if int(os.environ.get("RANK", 0)) == 0:
        print(line)


def _stdlib_documents(root: str, version: str, text_column: str):
    """The Python files of the standard library, in the order of their paths; `version` is part of the cache's key."""
    for path in sorted(Path(root).rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # some test files are in other encodings on purpose
            continue
        if text.strip():
            yield {text_column: text}


def _is_held_out(text: str, fraction: float, wanted: bool) -> bool:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") < fraction * 2**64) == wanted


def load_tokenizer(arguments: DataArguments, train: Dataset | None, vocab_size: int | None) -> PreTrainedTokenizerFast:
    """
    The tokenizer that `arguments` name, for which `train` and `vocab_size` are not needed; or a byte-level BPE of
    `vocab_size` trained once on `train` and then cached.

    Raises:
        UserError: for a tokenizer that cannot be loaded, or that has no end-of-text token to separate documents by.
    """
    if arguments.tokenizer is not None:
        check_reachable("tokenizer", arguments.tokenizer)
        with explained(f"tokenizer {arguments.tokenizer!r} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {arguments.tokenizer!r} has no eos_token to separate documents by")
        return tokenizer
    if train is None:
        raise ValueError("a tokenizer is trained on documents, got train=None")
    key = hashlib.sha256(f"{train._fingerprint} {arguments.text_column}".encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "lnfree" / f"bpe-{vocab_size}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            bpe = ByteLevelBPETokenizer()
            texts = (row[arguments.text_column] for row in train)
            bpe.train_from_iterator(texts, vocab_size, special_tokens=[END_OF_TEXT, PAD], show_progress=False)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(bpe.to_str()),
                bos_token=AddedToken(END_OF_TEXT, special=True),
                eos_token=AddedToken(END_OF_TEXT, special=True),
                pad_token=AddedToken(PAD, special=True),
                model_input_names=["input_ids", "attention_mask"],
            )
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                tokenizer.save_pretrained(aside)
                os.chmod(aside, 0o755)
                os.rename(aside, folder)
                os.mkdir(aside)  # for the context manager to remove
    return AutoTokenizer.from_pretrained(folder)


def check_reachable(kind: str, name: str):
    """
    Raises UserError at once for a name that is neither here, nor in the cache, nor can be an id of the Hub; and for
    one of which the Hub cannot be asked: loading it would try for half a minute.
    """
    ask = _ask_for_dataset if kind == "dataset" else ask_for_model
    try:
        ask_hub(ask, name, f"{kind} {name!r} is no {'file or ' * (kind == 'dataset')}folder")
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error


def _ask_for_dataset(name: str):
    if name.startswith("buckets/"):
        # what datasets reads, and is no repository
        bucket = "/".join(name.split("/")[1:3])
        validate_repo_id(bucket)
        HfApi().bucket_info(bucket)
        return
    validate_repo_id(name)
    *owner, last = name.split("/")
    if not Path(datasets.config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(last)])).is_dir():
        HfApi().dataset_info(name, timeout=10)


def has_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False for what `AutoTokenizer` makes of a folder without a tokenizer: special tokens are all that it has."""
    return len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) > 1


def vocabulary_size(tokenizer: PreTrainedTokenizerFast, wanted: int | None) -> int:
    """
    Tokens of a model: `wanted`, or as many as the tokenizer's ids need, of which some may be missing.

    Raises:
        UserError: if `wanted` is too small for the tokenizer.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    if wanted is not None and wanted < needed:
        raise UserError(f"vocab_size must be at least {needed}, the tokens of the tokenizer, got {wanted}")
    return needed if wanted is None else wanted


def tokenize_blocks(
    documents: dict[str, Dataset | IterableDataset],
    tokenizer: PreTrainedTokenizerFast,
    arguments: DataArguments,
    seed: int = 0,
) -> dict[str, Dataset | IterableDataset]:
    """
    Tokens in blocks: every document is followed by the end-of-text token, all are laid end to end, and the row is cut
    in blocks of exactly `arguments.block_size` tokens. What is left after each thousand documents is dropped.

    In a stream the blocks of each `arguments.shuffle_buffer` documents are shuffled, what is left is filled up with
    end-of-text tokens to a block of its own, so that no token is lost, and after its last document it begins again.

    Args:
        seed: of the order of the blocks in a stream.

    Returns:
        `"train"` and `"eval"` with one column `input_ids`, cached by `datasets` where they are no stream.

    Raises:
        UserError: if a part is too small for one block.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {arguments.tokenizer!r} must be a fast one, got the Python class {type(tokenizer).__name__}"
        )
    tokenize = {
        # the cache's key must not depend on the truncation and padding of the tokenizer's last use
        "tokenizer_json": json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None}),
        "end_of_text": tokenizer.eos_token_id,
        "block_size": arguments.block_size,
        "text_column": arguments.text_column,
    }
    blocks = {}
    for name, part in documents.items():
        if isinstance(part, IterableDataset):
            blocks[name] = part.map(
                _tokenize_and_shuffle,
                batched=True,
                batch_size=arguments.shuffle_buffer,
                with_indices=True,
                remove_columns=arguments.text_column,
                fn_kwargs={**tokenize, "seed": seed},
            ).repeat(None)
            continue
        blocks[name] = part.map(
            _tokenize, batched=True, remove_columns=part.column_names, fn_kwargs=tokenize, desc="tokenizing"
        )
        if len(blocks[name]) == 0:
            raise UserError(f"the {name} part of the dataset has fewer than block_size={arguments.block_size} tokens")
    return {name: part.with_format("torch") for name, part in blocks.items()}


@functools.lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    # "<|endoftext|>" in a document is text, not the end of one
    tokenizer.encode_special_tokens = True
    return tokenizer


def _tokens(texts: list[str], tokenizer_json: str, end_of_text: int) -> list[int]:
    tokens = []
    for encoding in _tokenizer(tokenizer_json).encode_batch_fast(texts, add_special_tokens=False):
        tokens += [*encoding.ids, end_of_text]
    return tokens


def _tokenize(batch, tokenizer_json: str, end_of_text: int, block_size: int, text_column: str):
    tokens = _tokens(batch[text_column], tokenizer_json, end_of_text)
    return {"input_ids": [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]}


def _tokenize_and_shuffle(batch, indices, *, end_of_text: int, block_size: int, text_column: str, seed: int, **kwargs):
    tokens = _tokens(batch[text_column], end_of_text=end_of_text, **kwargs)
    tokens += [end_of_text] * (-len(tokens) % block_size)
    # follows from the place in the stream alone: a stream that was left and entered again goes on as it would have
    order = np.random.default_rng([seed, indices[0]]).permutation(len(tokens) // block_size)
    return {"input_ids": [tokens[i * block_size : (i + 1) * block_size] for i in order.tolist()]}


def digest_blocks(blocks: dict[str, Dataset | IterableDataset]) -> str:
    """
    SHA-256 of the blocks' number and the first thousand of each part, in the order of the seed: other documents, or
    another tokenizer, give another one. Of a stream nothing is read.
    """
    digest = hashlib.sha256()
    for part in blocks.values():
        if isinstance(part, Dataset):
            digest.update(f"{len(part)} ".encode() + part[:1000]["input_ids"].numpy().tobytes())
    return digest.hexdigest()


def document_positions(input_ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """
    Positions that start again after every end-of-text token; the model then attends within each document only.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, T)`).

    Returns:
        `torch.LongTensor` of shape `(batch, T)`.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    first = torch.zeros_like(input_ids)
    first[:, 1:] = torch.where(input_ids[:, :-1] == end_of_text, index[:, 1:], 0)
    return index - first.cummax(1).values
