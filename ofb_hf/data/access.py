"""Explanations for data sets that the Hub refuses: gated, private, or missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ..hub_retries import causes_of, status_of


class DatasetAccessError(ValueError):
    """Report that the Hub refuses a data set: it is gated, private or missing."""


@contextmanager
def explained_hub_refusals(name: str) -> Iterator[None]:
    """Replace the errors of a Hub that refuses a data set by one that says what to do.

    Args:
        name: of the data set, for the message.

    Raises:
        DatasetAccessError: instead of the errors of `datasets` and `huggingface_hub`.
    """
    try:
        yield
    except Exception as error:
        message = _explanation(list(causes_of(error)), name)
        if message is None:
            raise
        raise DatasetAccessError(message) from error


def _explanation(causes: list[BaseException], name: str) -> str | None:
    """Return what to do, None if the errors are no refusal."""
    page = f"{config.HF_ENDPOINT}/datasets/{name}"
    log_in = (
        "log in with `hf auth login`, or set HF_TOKEN to a token that may read gated repositories"
    )
    gated = [cause for cause in causes if _is_gated(cause)]
    if any(_is_not_admitted(cause) for cause in gated):
        return (
            f"{name} is gated, and your account has not been let in. Open {page}, accept the "
            "terms, and wait for the approval if the owners ask for one; the token must belong to "
            "that account and be allowed to read gated repositories."
        )
    if gated:
        return (
            f"{name} is gated, and you are not logged in. Accept the terms on {page}, then "
            f"{log_in}."
        )
    if any(_is_bad_token(cause) for cause in causes):
        return (
            f"The Hub does not accept your token for {name}. Make a new one at "
            f"{config.HF_ENDPOINT}/settings/tokens, then run `hf auth login` again, or correct "
            "HF_TOKEN."
        )
    # The Hub has one answer for both, so as not to reveal private repositories.
    if any(isinstance(cause, RepositoryNotFoundError | DatasetNotFoundError) for cause in causes):
        return (
            f"{name} is not on the Hub, or it is private. Check its name at {page}; if it is "
            f"private, {log_in}."
        )
    return None


# `datasets` keeps the text of the Hub's answer, but not always its type and its status, so these
# look at the text as well.


def _is_gated(error: BaseException) -> bool:
    return isinstance(error, GatedRepoError) or " is a gated dataset" in str(error)


def _is_not_admitted(error: BaseException) -> bool:
    return status_of(error) == 403 or "to ask for access" in str(error)


def _is_bad_token(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and "Invalid credentials" in str(error)
