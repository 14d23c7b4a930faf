"""The Hub fails at times: what may pass is asked again, what stays becomes a sentence."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")
TRIES = 5  # of a request that fails, before it is given up
PAUSE = 1.0  # seconds before the second try, doubled before each later one
LONGEST = 300.0  # seconds of a pause, whatever the Hub asks for
PASSING = (408, 425, 429)  # the answers below 500 that may be another one later


def patiently(ask: Callable[[], T], also: tuple[int, ...] = ()) -> T:
    """What `ask` returns; it is called up to TRIES times while the network or the Hub itself fails
    (or the Hub answers with one of the statuses `also`), after as long as the Hub asks for."""
    for number in range(TRIES - 1):
        try:
            return ask()
        except Exception as error:
            if not may_pass(error, also):
                raise
            wait = _wait(error, PAUSE * 2**number)
            print(f"the Hub failed ({_said(error)}); again in {wait:.0f} s", flush=True)
            time.sleep(wait)
    return ask()


def may_pass(error: Exception, also: tuple[int, ...] = ()) -> bool:
    """Whether the same request can succeed later: the network failed, or the Hub's own side."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (status := _status(error)) is not None:
        return status >= 500 or status in (*PASSING, *also)
    chain = list(_causes(error))
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return False
    # A proxy's page is no JSON. The Hub's client raises OSError without an errno, which those of
    # the disk have, and datasets a plain FileNotFoundError where a connection broke; the Hub's
    # uploader, a library in Rust, knows RuntimeError alone.
    network = (httpx2.HTTPError, ConnectionError, TimeoutError)
    passing = (*network, json.JSONDecodeError, RuntimeError)
    return any(
        isinstance(each, passing) or (isinstance(each, OSError) and each.errno is None)
        for each in chain
    )


@contextmanager
def told(what: str) -> Iterator[None]:
    """Errors of the Hub in the block as sentences: ValueError for what it refuses, ConnectionError
    where it does not answer. What is a sentence already comes through, as does the disk's."""
    try:
        yield
    except Exception as error:
        if type(error) is ConnectionError:  # ours; what the network raises is of a narrower type
            raise
        if may_pass(error):
            raise ConnectionError(
                f"{what}: the Hub does not answer ({_said(error)}): check the network and "
                "HF_ENDPOINT and run it again; what is there already is not sent twice"
            ) from None
        if (status := _status(error)) is not None:
            raise ValueError(f"{what}: {_refusal(error, status)} ({_said(error)})") from None
        raise


@contextmanager
def bars() -> Iterator[None]:
    """The Hub's progress bars (bytes, rate, time left), where a person looks on."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _refusal(error: Exception, status: int) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    if status == 404 or isinstance(error, RepositoryNotFoundError):  # 401 to who is not known
        return (
            "the Hub has no such repository, revision or file, or hides it from the token here: "
            "check the name, log in (hf auth login) or set HF_TOKEN"
        )
    if status in (401, 403):
        return (
            "the Hub refuses it to the token here: log in (hf auth login) or set HF_TOKEN to one "
            "that may do this"
        )
    return f"the Hub refuses it with status {status}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    """The HTTP status that is behind an error."""
    answers = (getattr(each, "response", None) for each in _causes(error))
    return next((each.status_code for each in answers if each is not None), None)


def _wait(error: Exception, least: float) -> float:
    """Seconds: `least`, or what the answer's Retry-After says (seconds, or a date)."""
    answers = (getattr(each, "response", None) for each in _causes(error))
    headers: Mapping[str, str] = next((a.headers for a in answers if a is not None), {})
    said = headers.get("Retry-After", "").strip()
    try:
        date = 0.0 if said.isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
    except ValueError:
        return least
    return min(LONGEST, max(least, float(said) if said.isdigit() else date))


def _said(error: Exception) -> str:
    """What the error says first, without the token."""
    from huggingface_hub import get_token

    text = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".:")[:200]
    return line.replace(get_token() or "\0", "***")
