"""Publishing: one commit for a checkpoint, one for its stock twin, and one sentence for whatever
goes wrong."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers import PreTrainedModel
from transformers.utils import logging

from .._version import __version__
from ..hub_retries import patiently
from .folder import is_ours, stage, stage_stock
from .leaks import require_no_leaks
from .stock import has_stock_twin

logger = logging.get_logger(__name__)

STOCK_REVISION = "stock"
RETRY = "Publish again when it is up; what is there already is not sent twice."


class PublishError(RuntimeError):
    """The Hub did not take a checkpoint. What was to be published is still where it was."""


def publish(
    model: PreTrainedModel | str | Path,
    repo_id: str | None = None,
    *,
    output_dir: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    stock: bool = True,
    token: str | None = None,
) -> CommitInfo | Path:
    """Puts a compressed classifier on the Hub, loadable with and without this package.

    One commit holds `config.json` (whose `auto_map` names the code), `model.safetensors`, the
    model's two code files, and what a search leaves beside them: image processor, subnet, results,
    history, picture, card. Publishing the same again changes nothing; what an earlier checkpoint
    left there goes. A ViT also goes to the branch `stock`, as a checkpoint of transformers' own
    class, padded with zeros where its layers differ in width, unless it has a token schedule, which
    that class would not follow: then that branch, if there is one, is emptied of what an earlier
    checkpoint put there, with a warning.

    Args:
        model: an output folder of a search or of `save_pretrained`, or a model.
        repo_id: `owner/name`; made if it is not there. None: only write `output_dir`.
        output_dir: where to write what is, or would be, published, the stock twin in its subfolder
            `stock`; must be empty or absent.
        private: whether a repository that is made now is private.
        revision: branch to commit to, made if it is not there; `main` by default. Its stock twin is
            left out.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch. Its stock twin is left
            out.
        stock: also publish the stock twin of a ViT.
        token: access token; by default the one of `hf auth login` or HF_TOKEN.

    Returns:
        The commit, or `output_dir` if there is no `repo_id`.

    Raises:
        ValueError: for a folder that holds no classifier of ours, a `repo_id` that is not
            owner/name, and an `output_dir` that is not empty.
        LeakError: if a file holds a token, the name of an account or machine, or a folder of this
            machine.
        PublishError: if the Hub refuses, or cannot be reached; says what is on the Hub now.
    """
    if repo_id is None and output_dir is None:
        raise ValueError(
            "neither repo_id nor output_dir is given; say where the checkpoint is to go."
        )
    if repo_id is not None and repo_id.count("/") != 1:
        raise ValueError(f"repo_id is {repo_id!r}; give OWNER/NAME.")
    if output_dir is not None and Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise ValueError(f"output_dir {output_dir} is not empty; give a new folder.")
    with tempfile.TemporaryDirectory() as temporary:
        folder, twin = Path(temporary) / "main", Path(temporary) / STOCK_REVISION
        secrets = {token} if token else set()
        loaded = stage(model, folder, secrets)
        with_twin = (
            stock and not create_pr and revision is None and stage_stock(loaded, folder, twin)
        )
        owner = {repo_id.partition("/")[0]} if repo_id else set()
        require_no_leaks(Path(temporary), owner, secrets)
        if output_dir is not None:
            shutil.copytree(folder, output_dir, dirs_exist_ok=True)
            if with_twin:
                shutil.copytree(twin, Path(output_dir) / STOCK_REVISION)
        if repo_id is None:
            return Path(output_dir)
        api = HfApi(token=token)
        message = commit_message or f"Publish {loaded.config.model_type} with ofb-hf {__version__}"
        with _refusals_in_words(api, repo_id, revision, create_pr):
            _make_repository(api, repo_id, private)
            if revision is not None:
                _make_branch(api, repo_id, revision)
            commit = _commit(api, repo_id, folder, message, revision, create_pr)
        if with_twin:
            with _refusals_in_words(api, repo_id, STOCK_REVISION, published=commit):
                # From the first commit: the branch is to hold the twin, and nothing of the
                # checkpoint with our code.
                start = patiently(
                    lambda: api.list_repo_commits(repo_id), f"looking at {repo_id}", advice=RETRY
                )[-1]
                _make_branch(api, repo_id, STOCK_REVISION, start.commit_id)
                _commit(
                    api,
                    repo_id,
                    twin,
                    f"{message}, as a stock ViT",
                    STOCK_REVISION,
                    create_pr=False,
                )
        elif revision is None and not create_pr:
            with _refusals_in_words(api, repo_id, STOCK_REVISION, published=commit):
                _outdate_twin(api, repo_id, twin, message, remove=not has_stock_twin(loaded))
    return commit


def _outdate_twin(api: HfApi, repo_id: str, nothing: Path, message: str, remove: bool) -> None:
    """Says so if the branch `stock` holds the twin of an earlier checkpoint, and empties it where
    there is no new one.

    Args:
        nothing: a folder to be made.
        remove: whether to empty it; the checkpoint has no twin that could take its place.
    """
    try:
        there = patiently(
            lambda: api.list_repo_files(repo_id, revision=STOCK_REVISION),
            f"looking at {repo_id}",
            advice=RETRY,
        )
    except RevisionNotFoundError:
        return
    if not any(map(is_ours, there)):
        return
    if not remove:
        logger.warning(
            f"the branch `{STOCK_REVISION}` of {repo_id} holds an earlier checkpoint; stock is "
            f"False."
        )
        return
    nothing.mkdir()
    _commit(
        api,
        repo_id,
        nothing,
        f"{message}, which has no stock twin",
        STOCK_REVISION,
        create_pr=False,
    )
    logger.warning(
        f"the branch `{STOCK_REVISION}` of {repo_id} held an earlier checkpoint; this one has no "
        f"stock twin, so its "
        "files there were removed. They are in the history of that branch."
    )


def require_write_access(repo_id: str | None, token: str | None = None) -> None:
    """Finds out before a long run whether its result can be published.

    Raises:
        ValueError: without a `repo_id` of the form owner/name, or a token that may write there.
    """
    if repo_id is None or repo_id.count("/") != 1:
        raise ValueError(
            f"hub_model_id is {repo_id!r}; --push_to_hub needs the repository to push to, "
            f"OWNER/NAME."
        )
    api, owner = HfApi(token=token), repo_id.partition("/")[0]
    try:
        account = patiently(api.whoami, "asking the Hub who you are", advice=RETRY)
    # ValueError: there is no token
    except (HfHubHTTPError, httpx.RequestError, OSError, ValueError) as error:
        raise ValueError(
            f"--push_to_hub: {_reason(error, repo_id, api.endpoint)} Nothing was started."
        ) from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"--push_to_hub: your token may only read. Take one with write access to {repo_id}. "
            f"Nothing was started."
        )
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if owner.lower() not in map(str.lower, owners):
        raise ValueError(
            f"--push_to_hub: {repo_id} belongs to {owner}, and your account is {owners[0]}, of "
            f"the organizations "
            f"{owners[1:]}. Nothing was started."
        )


def _make_repository(api: HfApi, repo_id: str, private: bool | None) -> None:
    def make() -> None:
        api.create_repo(repo_id, private=private, exist_ok=True)

    patiently(make, f"making {repo_id}", advice=RETRY)


def _make_branch(api: HfApi, repo_id: str, name: str, start: str | None = None) -> None:
    def make() -> None:
        api.create_branch(repo_id, branch=name, revision=start, exist_ok=True)

    patiently(make, f"making the branch {name}", advice=RETRY)


def _commit(
    api: HfApi, repo_id: str, folder: Path, message: str, revision: str | None, create_pr: bool
) -> CommitInfo:
    """One commit with all files of a folder. Those that are there already are not sent again, and
    those that another checkpoint of ours left there go."""
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }

    def commit() -> CommitInfo:
        there = api.list_repo_files(repo_id, revision=revision)
        operations = [CommitOperationAdd(name, str(files[name])) for name in sorted(files)]
        operations += [
            CommitOperationDelete(name) for name in there if is_ours(name) and name not in files
        ]
        try:
            return api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr or None,
            )
        except ConnectionError as error:
            if "xet-write-token" not in str(error) or "404" not in str(error):
                raise
        # Out here, where the error above is not in its context: asking again would not help.
        raise ValueError(
            f"{api.endpoint} does not take uploads through Xet; set HF_HUB_DISABLE_XET=1"
        )

    # A commit whose answer was lost has landed: done again, it changes nothing. A pull request
    # would be a second one.
    return commit() if create_pr else patiently(commit, f"committing to {repo_id}", advice=RETRY)


@contextmanager
def _refusals_in_words(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    create_pr: bool = False,
    published: CommitInfo | None = None,
) -> Iterator[None]:
    """Turns what the client raises into one sentence: why, what is on the Hub now, and what to
    do."""
    try:
        yield
    except (
        HfHubHTTPError,
        HFValidationError,
        httpx.RequestError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        reason = _reason(error, repo_id, api.endpoint)
        if published is not None:
            said = (
                f"published to {repo_id} (main) at commit {published.oid[:8]}, but without its "
                f"stock twin: {reason} "
                f"What is on the branch `{revision}` is not this checkpoint."
            )
        else:
            said = f"not published: {reason} {_state(api, repo_id, revision)}"
        also = " Look first whether a pull request was opened all the same." if create_pr else ""
        raise PublishError(
            f"{said} The files are where they were; run the same command again (what is there "
            f"already is not sent "
            f"twice).{also}"
        ) from error


def _reason(error: Exception, repo_id: str, endpoint: str) -> str:
    response = getattr(error, "response", None)
    known = {
        401: f"the Hub does not accept your token. Make one that may write at "
        f"{endpoint}/settings/tokens, then run "
        "`hf auth login`, or set HF_TOKEN.",
        403: f"your token may not write to {repo_id}. Take one with write access, of an account "
        f"that may.",
        404: f"{repo_id} is not there, or your account may not see it.",
        409: f"somebody else changed {repo_id} at the same time.",
        412: f"somebody else changed {repo_id} at the same time.",
    }
    if response is not None and response.status_code in known:
        return known[response.status_code]
    words = (
        getattr(error, "server_message", None)
        or (str(error).strip().splitlines() or [type(error).__name__])[0]
    )
    status = f" (status {response.status_code})" if response is not None else ""
    return f"{words.strip().rstrip('.')}{status}."


def _state(api: HfApi, repo_id: str, revision: str | None) -> str:
    """What is on the Hub after a failure, as far as can be found out."""
    where = f"{repo_id} ({revision or 'main'})"
    try:
        commit = api.repo_info(repo_id, revision=revision).sha
    except RepositoryNotFoundError:
        return f"There is no {repo_id} on the Hub, or none that your account may see."
    except Exception:  # whatever failed before may fail again; then nothing is known
        return f"What is in {where} now could not be found out."
    return f"{where} is at commit {commit[:8]}."
