"""The one error for whatever a person can mend, and what the libraries raise for files and values that they do."""

import pickle
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


class UserError(ValueError):
    """What a user can mend: a recipe, a file, a name, a refusal of the Hub. Its message is one line for them."""


# by a value of another type or size than expected, a cut file, a package that is missing, memory that is too small
LIBRARY_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError),
    *(ImportError, EOFError, MemoryError),
    *(pickle.UnpicklingError, yaml.YAMLError, SafetensorError, StrictDataclassError),
)
# their messages are a name or a number that says nothing without the class
_TERSE = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, EOFError, MemoryError)


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks, for a `UserError`; of a long one the beginning."""
    message = textwrap.shorten(str(error), 600, placeholder=" ...")
    return message if message and not isinstance(error, _TERSE) else f"{type(error).__name__}: {message}"


@contextmanager
def explained(what: str, *others: type[Exception]) -> Iterator[None]:
    """
    Stands around a call that loads or runs what a user has named: what a library raises for it, or one of `others`,
    becomes a `UserError` that begins with `what`. Our own code does not belong in it.
    """
    expected: tuple[type[Exception], ...] = (*LIBRARY_ERRORS, *others)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        raise UserError(f"{what}: {one_line(error)}") from error
    except Exception as error:
        # tokenizers raises no narrower class
        if type(error) is not Exception:
            raise
        raise UserError(f"{what}: {one_line(error)}") from error


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Stands around our own code: a ValueError, by which it refuses something, becomes a `UserError` after `what`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {one_line(error)}") from error
