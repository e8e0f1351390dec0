"""How long the Hub is waited for."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from training.hub import client
from training.hub.client import _pause, describe_error, retry


def pause(asked: str | None) -> float | None:
    headers = {} if asked is None else {"Retry-After": asked.encode("latin-1")}
    response = httpx2.Response(429, headers=headers, request=httpx2.Request("GET", "http://hub"))
    return _pause(HfHubHTTPError("too many requests", response=response), wait=3.0)


def after(seconds: int) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    # ten minutes at most
    [
        *[("7", 7), ("0", 0), ("2.5", 2.5), (None, 3), ("600", 600), ("601", None), ("9" * 5000, None)],
        # all three formats of RFC 9110
        *[
            ("Thu, 01 Jan 2026 00:00:00 GMT", 0),
            ("Thursday, 01-Jan-26 00:00:00 GMT", 0),
            ("Thu Jan  1 00:00:00 2026", 0),
        ],
        *[
            ("soon", 3),
            ("-3", 3),
            ("\u00b2", 3),
            ("inf", 3),
            ("1, 2", 3),
            ("Tue, 01 Dec 9999999999999999 00:00:00 GMT", 3),
        ],
    ],
)
def test_pause_is_the_one_asked_for(asked, seconds):
    assert pause(asked) == seconds


def test_pause_may_be_asked_for_by_a_date():
    assert 25 < pause(after(30)) <= 30
    # nobody waits for a day
    assert pause(after(86_400)) is None


def test_wait_that_is_asked_for_is_told():
    asked = {"7": "and asks to wait 7 s", "Thu, 01 Jan 2099 00:00:00 GMT": "wait until Thu, 01 Jan 2099 00:00:00 GMT"}
    for header, told in asked.items():
        request = httpx2.Request("GET", "http://hub/api")
        response = httpx2.Response(503, headers={"Retry-After": header}, request=request)
        assert describe_error(HfHubHTTPError("busy", response=response)).endswith(told)


def answered(status: int, said: str | None = None) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://hub/api/models")
    response = httpx2.Response(status, request=request)
    return HfHubHTTPError(f"{status}", response=response, server_message=said)


WORTH_IT = [*(answered(status) for status in (408, 429, 500, 502, 503, 504)), ConnectionResetError("reset")]
WORTH_IT += [TimeoutError("slow"), httpx2.ConnectError("refused"), httpx2.ReadTimeout("slow")]
WORTHLESS = [*(answered(status) for status in (400, 401, 403, 404, 409, 412)), OfflineModeIsEnabled("off")]
WORTHLESS += [FileNotFoundError("gone"), RuntimeError("of another kind"), PermissionError("no")]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "as an upload wraps it"])
@pytest.mark.parametrize("error", [*WORTH_IT, *WORTHLESS], ids=repr)
def test_what_may_pass_is_tried_again_and_nothing_else(error, wrapped, monkeypatch, capsys):
    waited, tried = [], []
    monkeypatch.setattr(client.time, "sleep", waited.append)

    def request():
        tried.append(1)
        if len(tried) < 3:
            if wrapped:
                raise RuntimeError("an upload failed") from error
            raise error
        return "done"

    if error in WORTH_IT:
        assert retry(request) == "done" and waited == [1, 2] and len(tried) == 3
        assert capsys.readouterr().err.count("; trying again in") == 2
    else:
        with pytest.raises(RuntimeError if wrapped else type(error)):
            retry(request)
        assert len(tried) == 1 and waited == []


def test_patience_ends(monkeypatch):
    waited, tried = [], []
    monkeypatch.setattr(client.time, "sleep", waited.append)

    def request():
        tried.append(1)
        raise answered(503)

    with pytest.raises(HfHubHTTPError):
        retry(request)
    assert waited == [1, 2, 4, 8, 16] and len(tried) == 6


def test_token_is_told_in_no_error(monkeypatch):
    monkeypatch.setattr(client, "get_token", lambda: "hf_secret")
    for error in (
        *(answered(403, "hf_secret may not"), OSError("hf_secret"), httpx2.ConnectError("to hf_secret")),
        *(ValueError("a\nhf_secret\nb"), answered(429, "hf_secret")),
    ):
        said = describe_error(error)
        assert "hf_secret" not in said and "***" in said and "\n" not in said
    assert "log in by 'hf auth login'" in describe_error(answered(401))
