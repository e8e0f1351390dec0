"""Requests to the Hub that are repeated where its client does not, and its answers in one line, without the token."""

import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled


# seconds before a request is tried again that the client itself does not repeat; what a server asks for goes first
WAITS, LONGEST_WAIT = (1, 2, 4, 8, 16), 600
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_Result = TypeVar("_Result")


def retry(request: Callable[[], _Result]) -> _Result:
    """
    Repeats a request that a busy server or a broken connection turned down. The client repeats uploads and reads by
    itself, but not commits, tags, branches, collections and the creation of repositories.
    """
    for wait in WAITS:
        try:
            return request()
        except (OSError, httpx2.TransportError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            pause = _pause(cause, wait)
            if pause is None:
                raise
            print(f"{describe_error(cause or error)}; trying again in {pause:.3g} s", file=sys.stderr)
            time.sleep(pause)
    return request()


def _pause(error: BaseException | None, wait: float) -> float | None:
    """Seconds until it is worth trying again; None if it is not."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError):
        return wait
    if not isinstance(error, HfHubHTTPError):
        return None
    status, asked = error.response.status_code, error.response.headers.get("Retry-After", "")
    if status == 429 or status == 408 or status >= 500:
        wait = _seconds_asked(asked, wait)
        return wait if wait <= LONGEST_WAIT else None
    return None


def _seconds_asked(asked: str, otherwise: float) -> float:
    """The seconds of a Retry-After header, which holds a number of them or a date (RFC 9110, section 10.2.3)."""
    if _NUMBER.fullmatch(asked):
        return float(asked)
    try:
        date = parsedate_to_datetime(asked)
        # the oldest of the three formats names no zone
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return otherwise


def describe_error(error: BaseException) -> str:
    """One line for a person, without the token."""
    # how the client wraps what went wrong in an upload
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError | httpx2.TransportError):
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "no token of the Hub; log in by 'hf auth login', or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError):
        response, said = error.response, error.server_message or ""
        asked = f"{response.request.method} {response.request.url.path}"
        text = f"the Hub answered {response.status_code} to {asked} {said}"
        if response.status_code == 401:
            text = "the Hub does not know the token; log in by 'hf auth login', or set HF_TOKEN"
        if wait := response.headers.get("Retry-After"):
            text += f", and asks to wait {f'{wait} s' if _NUMBER.fullmatch(wait) else f'until {wait}'}"
    elif isinstance(error, httpx2.TransportError):
        text = f"the Hub at {constants.ENDPOINT} cannot be reached: {error}"
    else:
        text = str(error)
    return " ".join(without_token(text).split())


def without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text
