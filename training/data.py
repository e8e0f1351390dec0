"""Documents -> tokens -> blocks of exactly T tokens; the embedded corpus and any dataset with a text column alike."""

import functools
import hashlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .recipe import DataArguments, RecipeError


END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}


def load_documents(arguments: DataArguments, seed: int) -> DatasetDict:
    """
    The documents to train and to evaluate on, in a column `arguments.text_column`.

    Args:
        seed: of the order of the documents to train on.

    Returns:
        `DatasetDict` with `"train"` (shuffled) and `"eval"`. Without evaluation data of its own, a dataset is split by
        a hash of each document's text, so that no text stands in both.

    Raises:
        RecipeError: for a dataset that cannot be loaded, or that has no such column.
    """
    if arguments.dataset == "stdlib":
        source = {"root": sysconfig.get_path("stdlib"), "version": sys.version, "text_column": arguments.text_column}
        loaded = {"train": Dataset.from_generator(_stdlib_documents, gen_kwargs=source)}
    else:
        loaded = _load(arguments.dataset, arguments.dataset_config)
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if arguments.eval_dataset is not None:
        loaded = _load(arguments.eval_dataset, None)
        held_out = loaded.get("validation", loaded.get("test", next(iter(loaded.values()))))
    else:
        held_out = loaded.get("validation", loaded.get("test"))
    for split in (train, held_out):
        if split is not None and arguments.text_column not in split.column_names:
            raise RecipeError(
                f"text_column={arguments.text_column!r} is not a column of the dataset, which has "
                f"{', '.join(split.column_names)}"
            )
    if held_out is None:
        split = functools.partial(train.filter, _is_held_out, input_columns=arguments.text_column)
        held_out = split(fn_kwargs={"fraction": arguments.eval_fraction, "wanted": True})
        train = split(fn_kwargs={"fraction": arguments.eval_fraction, "wanted": False})
    return DatasetDict({"train": train.shuffle(seed=seed), "eval": held_out})


def find_revision(arguments: DataArguments) -> str | None:
    """The commit of the evaluation data on the Hub; Python's version for the embedded corpus; None for a file."""
    name = arguments.eval_dataset or arguments.dataset
    if name == "stdlib":
        return f"python-{platform.python_version()}"
    if Path(name).exists():
        return None
    config = None if arguments.eval_dataset else arguments.dataset_config
    return datasets.load_dataset_builder(name, config).hash


def _load(name: str, config: str | None) -> DatasetDict:
    try:
        if Path(name).is_file():
            builder = BUILDERS.get(Path(name).suffix)
            if builder is None:
                raise RecipeError(f"dataset {name} must end in one of {', '.join(BUILDERS)}")
            return datasets.load_dataset(builder, data_files=name)
        return datasets.load_dataset(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"dataset {name!r} cannot be loaded: {' '.join(str(error).split())}") from error


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


def load_tokenizer(arguments: DataArguments, train: Dataset, vocab_size: int | None) -> PreTrainedTokenizerFast:
    """
    The tokenizer that `arguments` name, or a byte-level BPE of `vocab_size` trained once on `train` and then cached.

    Raises:
        RecipeError: for a tokenizer that cannot be loaded, or that has no end-of-text token to separate documents by.
    """
    if arguments.tokenizer is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"tokenizer {arguments.tokenizer!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        if tokenizer.eos_token_id is None:
            raise RecipeError(f"tokenizer {arguments.tokenizer!r} has no eos_token to separate documents by")
        return tokenizer
    key = hashlib.sha256(f"{train._fingerprint} {arguments.text_column}".encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "lnfree" / f"bpe-{vocab_size}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            bpe = ByteLevelBPETokenizer()
            texts = (row[arguments.text_column] for row in train)
            bpe.train_from_iterator(texts, vocab_size, special_tokens=[END_OF_TEXT, PAD], show_progress=False)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=bpe._tokenizer,
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


def tokenize_blocks(
    documents: DatasetDict, tokenizer: PreTrainedTokenizerFast, arguments: DataArguments
) -> DatasetDict:
    """
    Tokens in blocks: every document is followed by the end-of-text token, all are laid end to end, and the row is cut
    in blocks of exactly `arguments.block_size` tokens. What is left after each thousand documents is dropped.

    Returns:
        `DatasetDict` with one column `input_ids`, cached by `datasets`.

    Raises:
        RecipeError: if a part is too small for one block.
    """
    backend = tokenizer.backend_tokenizer
    blocks = documents.map(
        _tokenize,
        batched=True,
        remove_columns=documents["train"].column_names,
        fn_kwargs={
            # the cache's key must not depend on the truncation and padding of the tokenizer's last use
            "tokenizer_json": json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None}),
            "end_of_text": tokenizer.eos_token_id,
            "block_size": arguments.block_size,
            "text_column": arguments.text_column,
        },
        desc="tokenising",
    )
    for name, part in blocks.items():
        if len(part) == 0:
            raise RecipeError(
                f"the {name} part of the dataset has fewer than block_size={arguments.block_size} tokens"
            )
    return blocks.with_format("torch")


@functools.lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


def _tokenize(batch, tokenizer_json: str, end_of_text: int, block_size: int, text_column: str):
    tokens = []
    for encoding in _tokenizer(tokenizer_json).encode_batch_fast(batch[text_column], add_special_tokens=False):
        tokens += [*encoding.ids, end_of_text]
    return {"input_ids": [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]}
