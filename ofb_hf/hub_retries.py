"""What the Hub can do to a run: fail for a while, or refuse. Waiting for the one, words for the other.

`huggingface_hub` repeats a request five times after errors of the connection, 408, 429 and 5xx, with waits of 1, 2, 4,
8 and 8 seconds or what the server asks for; `datasets` opens and reads a file up to twenty times. What still fails
comes here.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import SystemRandom
from typing import Any, TypeVar

from datasets import config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers.utils import logging

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
# Seconds between attempts. Somebody watches a run that starts; one that has run for days waits for half an hour.
WAITS_AT_START = (1, 2, 4, 8)
WAITS_IN_A_RUN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300)
TEMPORARY = (408, 429)
CONTINUE = "--resume_from_checkpoint auto continues an interrupted training."


class StreamBrokenError(ConnectionError):
    """The network failed for longer than a run waits for it."""


class DatasetAccessError(ValueError):
    """The Hub does not hand out a data set: it is gated, private or not there."""


def is_network_fault(error: BaseException) -> bool:
    """Whether asking again may help: connections that fail or break off, and servers that are down or busy."""
    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled | StreamBrokenError) for cause in causes):
        return False
    return any(_is_fault(cause) for cause in causes)


def patiently(
    action: Callable[[], Result], what: str, waits: tuple[float, ...] = WAITS_AT_START, advice: str = CONTINUE
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


def wait_or_give_up(error: Exception, attempt: int, what: str, waits: tuple[float, ...], advice: str = CONTINUE) -> int:
    """Waits after a failed attempt, the first being 0, and returns the number of the next.

    Raises:
        StreamBrokenError: after the last of `waits`. The error itself, if it is no network fault.
    """
    if not is_network_fault(error):
        raise error
    if attempt == len(waits):
        raise StreamBrokenError(
            f"{what}: {attempt + 1} attempts in a row failed, the last one with {_brief(error)}. Check the network and "
            f"the server. {advice}"
        ) from error
    # Not everybody at once: all workers lose their connections in the same moment.
    seconds = waits[attempt] * SystemRandom().uniform(1, 1.25)
    logger.warning(f"{what}: {_brief(error)}; attempt {attempt + 2} of {len(waits) + 1} in {seconds:.0f} s.")
    time.sleep(seconds)
    return attempt + 1


@contextmanager
def hub_refusals_in_words(name: str) -> Iterator[None]:
    """Says what to do where the Hub refuses a data set.

    Raises:
        DatasetAccessError: instead of the errors of `datasets` and `huggingface_hub`.
    """
    try:
        yield
    except Exception as error:
        message = _refusal(error, name)
        if message is None:
            raise
        raise DatasetAccessError(message) from error


def _refusal(error: Exception, name: str) -> str | None:
    causes, page = list(_causes(error)), f"{config.HF_ENDPOINT}/datasets/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read gated repositories"
    # `datasets` keeps the words of the Hub's answer, but not always its type and status.
    gated = [cause for cause in causes if isinstance(cause, GatedRepoError) or " is a gated dataset" in str(cause)]
    if any(_status(cause) == 403 or "to ask for access" in str(cause) for cause in gated):
        return (
            f"{name} is gated, and your account has not been let in. Open {page}, accept the terms, and wait for the "
            "approval if the owners ask for one; the token must belong to that account and may read gated repositories."
        )
    if gated:
        return f"{name} is gated, and you are not logged in. Accept the terms on {page}, then {login}."
    if any(isinstance(cause, HfHubHTTPError) and "Invalid credentials" in str(cause) for cause in causes):
        return (
            f"The Hub does not accept your token for {name}. Make a new one at {config.HF_ENDPOINT}/settings/tokens, "
            "then run `hf auth login` again, or correct HF_TOKEN."
        )
    if any(isinstance(cause, RepositoryNotFoundError | DatasetNotFoundError) for cause in causes):
        return f"{name} is not on the Hub, or it is private. Check its name at {page}; if it is private, {login}."
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError) and (status := _status(error)) is not None:
        return status in TEMPORARY or status >= 500
    if "aiohttp" in sys.modules and isinstance(error, sys.modules["aiohttp"].ClientResponseError):
        return error.status in TEMPORARY or error.status >= 500
    faults: tuple[Any, ...] = (ConnectionError, TimeoutError, asyncio.TimeoutError, httpx.RequestError)
    if "aiohttp" in sys.modules:  # slow to import, and not raised where it was never imported
        faults = (*faults, sys.modules["aiohttp"].ClientError)
    return isinstance(error, faults)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _brief(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
