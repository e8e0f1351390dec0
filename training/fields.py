"""The fields of a recipe, as `lnfree train --fields` shows them."""

import re
import textwrap
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

from transformers import TrainingArguments

from modeling_lnfree import LNFreeConfig

from .recipe import MODEL_FIELDS, MODEL_HINTS, REFUSED, DataArguments


def print_fields():
    """Prints every field that a recipe may have: its type, its default, and what it is."""
    declared = {field.name: field for field in fields(LNFreeConfig)}
    # transformers' own are no field of the class
    model = [
        declared.get(name) or SimpleNamespace(name=name, type=hint, default=None)
        for name, hint in MODEL_HINTS.items()
        if name in MODEL_FIELDS and name not in REFUSED
    ]
    ours = [(field, field.metadata["help"]) for field in fields(DataArguments)]
    helps = _document_fields(LNFreeConfig)
    # transformers' own
    helps |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer says which")
    training = [field for field in fields(TrainingArguments) if field.init and field.name not in REFUSED]
    for title, described in (
        ("data and measurements", ours),
        ("the model (LNFreeConfig)", [(field, helps[field.name]) for field in model]),
        (
            "the optimization (transformers' TrainingArguments)",
            [(field, field.metadata["help"]) for field in training if field.name not in MODEL_FIELDS],
        ),
    ):
        print(f"# {title}")
        for field, text in described:
            print(f"{field.name}: {_type(field.type)} = {_default(field)}")
            print(textwrap.fill(" ".join(text.split()), 100, initial_indent="    ", subsequent_indent="    "))
        print()


def _document_fields(cls: type) -> dict[str, str]:
    """What the section `Args` of a docstring says of each name."""
    section = textwrap.dedent(cls.__doc__ or "").split("Args:\n", 1)[1].split("\nRaises:", 1)[0]
    entries = re.findall(r"^    (\w[\w, ]*) \(.*?\): (.*?)(?=^    \w|\Z)", section, re.MULTILINE | re.DOTALL)
    return {name: text for names, text in entries for name in names.split(", ")}


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _default(field: Any) -> Any:
    default = field.default if field.default is not MISSING else field.default_factory()
    return getattr(default, "value", default)
