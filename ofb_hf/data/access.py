"""What to do where the Hub refuses a data set: gated, private, or not there."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ..hub_retries import causes_of, status_of


class DatasetAccessError(ValueError):
    """The Hub does not hand out a data set: it is gated, private or not there."""


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
    causes, page = list(causes_of(error)), f"{config.HF_ENDPOINT}/datasets/{name}"
    login = (
        "log in with `hf auth login`, or set HF_TOKEN to a token that may read gated repositories"
    )
    # `datasets` keeps the words of the Hub's answer, but not always its type and status.
    gated = [
        cause
        for cause in causes
        if isinstance(cause, GatedRepoError) or " is a gated dataset" in str(cause)
    ]
    if any(status_of(cause) == 403 or "to ask for access" in str(cause) for cause in gated):
        return (
            f"{name} is gated, and your account has not been let in. Open {page}, accept the "
            f"terms, and wait for the "
            "approval if the owners ask for one; the token must belong to that account and may "
            "read gated repositories."
        )
    if gated:
        return (
            f"{name} is gated, and you are not logged in. Accept the terms on {page}, then {login}."
        )
    if any(
        isinstance(cause, HfHubHTTPError) and "Invalid credentials" in str(cause)
        for cause in causes
    ):
        return (
            f"The Hub does not accept your token for {name}. Make a new one at "
            f"{config.HF_ENDPOINT}/settings/tokens, "
            "then run `hf auth login` again, or correct HF_TOKEN."
        )
    if any(isinstance(cause, RepositoryNotFoundError | DatasetNotFoundError) for cause in causes):
        return f"{name} is not on the Hub, or it is private. Check its name at {page}; if it is private, {login}."
    return None
