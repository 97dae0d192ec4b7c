"""What the Hub can do to a run: fail for a while, or refuse. Waiting for the one, words for the
other.

`huggingface_hub` repeats a request five times after errors of the connection, 408, 429 and 5xx,
with waits of 1, 2, 4, 8 and 8 seconds or what the server asks for; `datasets` opens and reads a
file up to twenty times. What still fails comes here.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from random import SystemRandom
from typing import Any, TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx
from transformers.utils import logging

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
# Seconds between attempts. Somebody watches a run that starts; one that has run for days waits for
# half an hour.
WAITS_AT_START = (1, 2, 4, 8)
WAITS_IN_A_RUN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300)
TEMPORARY = (408, 429)
CONTINUE = "--resume_from_checkpoint auto continues an interrupted training."


class StreamBrokenError(ConnectionError):
    """The network failed for longer than a run waits for it."""


def is_network_fault(error: BaseException) -> bool:
    """Whether asking again may help: connections that fail or break off, and servers that are down
    or busy."""
    causes = list(causes_of(error))
    if any(isinstance(cause, OfflineModeIsEnabled | StreamBrokenError) for cause in causes):
        return False
    return any(_is_fault(cause) for cause in causes)


def patiently(
    action: Callable[[], Result],
    what: str,
    waits: tuple[float, ...] = WAITS_AT_START,
    advice: str = CONTINUE,
) -> Result:
    """The result of an action, repeated after network faults.

    Args:
        what: is being done, for messages; advice: what to do when it fails for good.
        waits: seconds between attempts.

    Raises:
        StreamBrokenError: when it still fails after the last of `waits` (seconds).
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
    """Waits after a failed attempt, the first being 0, and returns the number of the next.

    Raises:
        StreamBrokenError: after the last of `waits`. The error itself, if it is no network fault.
    """
    if not is_network_fault(error):
        raise error
    if attempt == len(waits):
        raise StreamBrokenError(
            f"{what}: {attempt + 1} attempts in a row failed, the last one with {_brief(error)}. "
            f"Check the network and "
            f"the server. {advice}"
        ) from error
    # Not everybody at once: all workers lose their connections in the same moment.
    seconds = waits[attempt] * SystemRandom().uniform(1, 1.25)
    logger.warning(
        f"{what}: {_brief(error)}; attempt {attempt + 2} of {len(waits) + 1} in {seconds:.0f} s."
    )
    time.sleep(seconds)
    return attempt + 1


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError) and (status := status_of(error)) is not None:
        return status in TEMPORARY or status >= 500
    if "aiohttp" in sys.modules and isinstance(error, sys.modules["aiohttp"].ClientResponseError):
        return error.status in TEMPORARY or error.status >= 500
    faults: tuple[Any, ...] = (
        ConnectionError,
        TimeoutError,
        asyncio.TimeoutError,
        httpx.RequestError,
    )
    if "aiohttp" in sys.modules:  # slow to import, and not raised where it was never imported
        faults = (*faults, sys.modules["aiohttp"].ClientError)
    return isinstance(error, faults)


def status_of(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _brief(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
