"""Patience with a network or a Hub that fails for a while: what to repeat, and for how long.

`huggingface_hub` repeats a request five times after errors of the connection, 408, 429 and 5xx,
with waits of 1, 2, 4, 8 and 8 seconds or what the server asks for; `datasets` opens and reads a
file up to twenty times. Requests that still fail are repeated here, with longer waits.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from random import SystemRandom
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from transformers.utils import logging

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
# Seconds between attempts. A run that starts is watched, and should fail soon; one that has run for
# days waits for half an hour.
WAITS_AT_START = (1, 2, 4, 8)
WAITS_IN_A_RUN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300)
# HTTP status: request timeout, too many requests. Those from 500 on are temporary, too.
TEMPORARY = (408, 429)
CONTINUE = "--resume_from_checkpoint auto continues an interrupted training."


class StreamBrokenError(ConnectionError):
    """Report that the network failed for longer than a run waits for it."""


def is_network_fault(error: BaseException) -> bool:
    """Return whether to ask again: the connection failed, or the server is down or busy."""
    causes = list(causes_of(error))
    # Both contain connection errors as their causes, but asking again does not help.
    if any(isinstance(cause, OfflineModeIsEnabled | StreamBrokenError) for cause in causes):
        return False
    return any(_is_fault(cause) for cause in causes)


def patiently(
    action: Callable[[], Result],
    what: str,
    waits: tuple[float, ...] = WAITS_AT_START,
    advice: str = CONTINUE,
) -> Result:
    """Return the result of an action, which is repeated after network faults.

    Args:
        action: takes no arguments; it may be called several times.
        what: what the action does, for messages, e.g. "reading the footers".
        waits: seconds between attempts.
        advice: what to do when the last attempt has failed, for the message.

    Raises:
        StreamBrokenError: when the attempt after the last wait fails, too.
    """
    attempt = 0
    while True:
        try:
            return action()
        except Exception as error:
            attempt = wait_or_give_up(error, attempt, what, waits, advice)


def wait_or_give_up(
    error: Exception, attempt: int, what: str, waits: tuple[float, ...], advice: str = CONTINUE
) -> int:
    """Wait after a failed attempt, and return the number of the next one.

    Args:
        error: the error of the attempt.
        attempt: its number, from 0.
        what, waits, advice: as for `patiently`.

    Raises:
        StreamBrokenError: after the last of `waits`.
        Exception: `error` itself, if it is no network fault.
    """
    if not is_network_fault(error):
        raise error
    if attempt == len(waits):
        raise StreamBrokenError(
            f"{what}: {attempt + 1} attempts in a row failed, the last one with {_brief(error)}. "
            f"Check the network and the server. {advice}"
        ) from error
    # All workers lose their connections in the same moment; they must not all return in one.
    seconds = waits[attempt] * SystemRandom().uniform(1, 1.25)
    logger.warning(
        f"{what}: {_brief(error)}; attempt {attempt + 2} of {len(waits) + 1} in {seconds:.0f} s."
    )
    time.sleep(seconds)
    return attempt + 1


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and then the errors that led to it."""
    seen: set[int] = set()  # a chain of errors may be a circle
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError) and status_of(error) is not None:
        return _is_temporary(status_of(error))
    # aiohttp is slow to import, and its errors are not raised where it was never imported.
    aiohttp = sys.modules.get("aiohttp")
    if aiohttp is not None and isinstance(error, aiohttp.ClientResponseError):
        return _is_temporary(error.status)
    faults: list[type[BaseException]] = [
        ConnectionError,
        TimeoutError,
        asyncio.TimeoutError,
        httpx.RequestError,
    ]
    if aiohttp is not None:
        faults.append(aiohttp.ClientError)
    return isinstance(error, tuple(faults))


def _is_temporary(status: int) -> bool:
    return status in TEMPORARY or status >= 500


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, None if it has no answer of a server."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _brief(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else name
