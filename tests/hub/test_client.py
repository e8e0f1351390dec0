"""How long the Hub is waited for."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from training.hub.client import _pause


def pause(asked: str | None) -> float | None:
    headers = {} if asked is None else {"Retry-After": asked}
    response = httpx2.Response(429, headers=headers, request=httpx2.Request("GET", "http://hub"))
    return _pause(HfHubHTTPError("too many requests", response=response), wait=3.0)


def after(seconds: int) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("7", 7), ("0", 0), (None, 3), ("soon", 3), ("Thu, 01 Jan 2026 00:00:00 GMT", 0)],
)
def test_pause_is_the_one_asked_for(asked, seconds):
    assert pause(asked) == seconds


def test_pause_may_be_asked_for_by_a_date():
    assert 25 < pause(after(30)) <= 30
    # nobody waits for a day
    assert pause(after(86_400)) is None
