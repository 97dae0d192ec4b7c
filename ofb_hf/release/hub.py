"""Publish a checkpoint: one commit for it, one for its stock twin, and refusals with a reason."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

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
from ..hub_retries import patiently, status_of
from .folder import is_published_file, stage, stage_stock
from .leaks import require_no_leaks, words_in
from .stock import has_stock_twin

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

STOCK_REVISION = "stock"
# What to do after the Hub failed for longer than `patiently` waits.
RETRY = "Publish again when it is up; what is there already is not sent twice."
# What the clients of the Hub raise, for whatever reason.
CLIENT_ERRORS = (
    HfHubHTTPError,
    HFValidationError,
    httpx.RequestError,
    OSError,
    RuntimeError,
    ValueError,
)


class PublishError(RuntimeError):
    """Report that the Hub did not take a checkpoint; all files are still where they were."""


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
    allow_words: Iterable[str] = (),
) -> CommitInfo | Path:
    """Publish a compressed classifier on the Hub, loadable with and without this package.

    One commit holds `config.json` (whose `auto_map` names the code), `model.safetensors`, the two
    code files of the model, and what a search writes: image processor, subnet, results, history,
    picture and card. Publishing the same checkpoint again changes nothing. Files of an earlier
    checkpoint that this one does not have are removed.

    A ViT also goes to the branch `stock`, as a checkpoint of transformers' own class, padded with
    zeros where its layers differ in width. A model with a token schedule has no such twin, because
    that class would keep all tokens; if the branch holds the twin of an earlier checkpoint, its
    files are removed, with a warning.

    Args:
        model: an output folder of a search or of `save_pretrained`, or a model.
        repo_id: `owner/name`, created if it does not exist; None to write `output_dir` only.
        output_dir: an empty or new folder for a copy of what is published, the stock twin in its
            subfolder `stock`.
        private: whether a repository that is created now is private.
        revision: branch to commit to, created if it does not exist, by default `main`. With a
            revision the stock twin is not published.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch. The stock twin is not
            published then.
        stock: whether to publish the stock twin of a ViT.
        token: access token, by default that of `hf auth login` or HF_TOKEN.
        allow_words: names that are no leak although this account or machine is called so.

    Returns:
        The commit, or `output_dir` if there is no `repo_id`.

    Raises:
        ValueError: for a folder without a classifier of this package, a `repo_id` that is not
            owner/name, and an `output_dir` that is not empty.
        LeakError: if a file holds a token, the name of an account or machine, or a folder of this
            machine.
        PublishError: if the Hub refuses or cannot be reached; says what is on the Hub now.
    """
    _check_destination(repo_id, output_dir)
    only_one_branch = create_pr or revision is not None
    secrets = {token} if token else set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "main"
        twin = Path(temporary) / STOCK_REVISION
        loaded = stage(model, folder, secrets)
        has_twin = stock and not only_one_branch and stage_stock(loaded, folder, twin)
        # Before anything is written to `output_dir` or sent. The owner of the repository is public
        # in any case, and so are the classes.
        public = words_in(loaded.config.id2label.values()) | set(allow_words)
        if repo_id is not None:
            public.add(repo_id.partition("/")[0])
        require_no_leaks(Path(temporary), public, secrets)
        if output_dir is not None:
            shutil.copytree(folder, output_dir, dirs_exist_ok=True)
            if has_twin:
                shutil.copytree(twin, Path(output_dir) / STOCK_REVISION)
        if repo_id is None:
            return Path(output_dir)

        repository = _Repository(repo_id, token)
        message = commit_message or f"Publish {loaded.config.model_type} with ofb-hf {__version__}"
        with _explained_refusals(repository, revision, create_pr=create_pr):
            repository.create(private)
            if revision is not None:
                repository.create_branch(revision)
            commit = repository.commit(folder, message, revision, create_pr=create_pr)
        # The checkpoint is published now. Whatever happens to the twin, the error has to say so.
        if not only_one_branch:
            with _explained_refusals(repository, STOCK_REVISION, published=commit):
                if has_twin:
                    _publish_twin(repository, twin, message)
                elif has_stock_twin(loaded):
                    _warn_of_old_twin(repository)
                else:
                    _remove_old_twin(repository, twin, message)
    return commit


def _check_destination(repo_id: str | None, output_dir: str | Path | None) -> None:
    """Raise ValueError unless there is somewhere to publish to."""
    if repo_id is None and output_dir is None:
        raise ValueError("neither repo_id nor output_dir is given; give one of them, or both.")
    if repo_id is not None and repo_id.count("/") != 1:
        raise ValueError(f"repo_id is {repo_id!r}; give OWNER/NAME.")
    if output_dir is not None:
        folder = Path(output_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output_dir {output_dir} is not empty; give a new folder.")


def _publish_twin(repository: "_Repository", twin: Path, message: str) -> None:
    """Commit the stock twin to its branch, which begins at the first commit of the repository.

    Begun at the checkpoint on main, the branch would hold the code of this package as well.
    """
    repository.create_branch(STOCK_REVISION, start=repository.first_commit())
    repository.commit(twin, f"{message}, as a stock ViT", STOCK_REVISION)


def _warn_of_old_twin(repository: "_Repository") -> None:
    """Warn if the branch `stock` holds the twin of an earlier checkpoint, which stays."""
    if repository.has_published_files(STOCK_REVISION):
        logger.warning(
            f"the branch `{STOCK_REVISION}` of {repository.name} holds an earlier checkpoint and "
            "stays as it is, because stock is False."
        )


def _remove_old_twin(repository: "_Repository", nothing: Path, message: str) -> None:
    """Remove the twin of an earlier checkpoint from the branch `stock`, if there is one.

    Args:
        repository: to remove it from.
        nothing: an empty folder, created here.
        message: of the commit to main.
    """
    if not repository.has_published_files(STOCK_REVISION):
        return
    nothing.mkdir()
    repository.commit(nothing, f"{message}, which has no stock twin", STOCK_REVISION)
    logger.warning(
        f"the branch `{STOCK_REVISION}` of {repository.name} held an earlier checkpoint. The new "
        "one has no stock twin, so the files there were removed; they are in the history of that "
        "branch."
    )


def require_write_access(repo_id: str | None, token: str | None = None) -> None:
    """Find out before a long run whether its result can be published.

    Args:
        repo_id: `owner/name`.
        token: access token, by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: without a `repo_id` of the form owner/name, and without a token that may write
            there.
    """
    if repo_id is None or repo_id.count("/") != 1:
        raise ValueError(
            f"hub_model_id is {repo_id!r}; --push_to_hub needs the repository to push to, "
            "OWNER/NAME."
        )
    api = HfApi(token=token)
    try:
        account = patiently(api.whoami, "asking the Hub who you are", advice=RETRY)
    # ValueError: there is no token
    except (HfHubHTTPError, httpx.RequestError, OSError, ValueError) as error:
        reason = _reason(error, repo_id, api.endpoint)
        raise ValueError(f"--push_to_hub: {reason} Nothing was started.") from error
    access_token = account.get("auth", {}).get("accessToken", {})
    if access_token.get("role") == "read":
        raise ValueError(
            f"--push_to_hub: your token may only read. Take one with write access to {repo_id}. "
            "Nothing was started."
        )
    name = account["name"]
    organizations = [organization["name"] for organization in account.get("orgs", [])]
    owner = repo_id.partition("/")[0]
    # The Hub does not tell names apart by their case.
    writable = {each.lower() for each in (name, *organizations)}
    if owner.lower() not in writable:
        raise ValueError(
            f"--push_to_hub: {repo_id} belongs to {owner}, and your account is {name}, of the "
            f"organizations {organizations}. Nothing was started."
        )


class _Repository:
    """A repository on the Hub, with patience for a Hub that fails for a while.

    Args:
        name: `owner/name`.
        token: access token, None for the one of this machine.
    """

    def __init__(self, name: str, token: str | None):
        self.name = name
        self.api = HfApi(token=token)

    def create(self, private: bool | None) -> None:
        """Create the repository unless it exists."""
        self._patiently(
            lambda: self.api.create_repo(self.name, private=private, exist_ok=True),
            f"creating {self.name}",
        )

    def create_branch(self, branch: str, start: str | None = None) -> None:
        """Create a branch unless it exists, at a commit or at the end of main."""
        self._patiently(
            lambda: self.api.create_branch(self.name, branch=branch, revision=start, exist_ok=True),
            f"creating the branch {branch}",
        )

    def first_commit(self) -> str:
        """Return the id of the first commit on main."""
        commits = self._patiently(
            lambda: self.api.list_repo_commits(self.name), f"looking at {self.name}"
        )
        return commits[-1].commit_id

    def has_published_files(self, revision: str) -> bool:
        """Return whether a branch holds files of a checkpoint that was published with `publish`."""
        try:
            files = self._patiently(
                lambda: self.api.list_repo_files(self.name, revision=revision),
                f"looking at {self.name}",
            )
        except RevisionNotFoundError:
            return False
        return any(is_published_file(file) for file in files)

    def commit(
        self, folder: Path, message: str, revision: str | None = None, create_pr: bool = False
    ) -> CommitInfo:
        """Commit all files of a folder, and remove those of another checkpoint.

        Files that are on the Hub already are not sent again.

        Args:
            folder: with the files.
            message: of the commit.
            revision: branch, None for main.
            create_pr: open a pull request instead.
        """
        if create_pr:
            # Only once: if the answer is lost, the pull request may be open, and a second attempt
            # would open another one.
            return self._commit(folder, message, revision, create_pr)
        # If the answer is lost, the commit may have landed; done again it changes nothing.
        return self._patiently(
            lambda: self._commit(folder, message, revision, create_pr),
            f"committing to {self.name}",
        )

    def _commit(
        self, folder: Path, message: str, revision: str | None, create_pr: bool
    ) -> CommitInfo:
        files = {}
        for path in folder.rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for name in sorted(files):
            operations.append(CommitOperationAdd(name, str(files[name])))
        for name in self.api.list_repo_files(self.name, revision=revision):
            if is_published_file(name) and name not in files:
                operations.append(CommitOperationDelete(name))
        try:
            return self.api.create_commit(
                self.name,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr or None,
            )
        except ConnectionError as error:
            if "xet-write-token" not in str(error) or "404" not in str(error):
                raise
        # Raised here, where the ConnectionError is not in its context: a network fault would be
        # repeated, and that would not help.
        raise ValueError(
            f"{self.api.endpoint} does not take uploads through Xet; set HF_HUB_DISABLE_XET=1"
        )

    def state(self, revision: str | None) -> str:
        """Return a sentence on what is in a branch now, as far as that can be found out."""
        where = f"{self.name} ({revision or 'main'})"
        try:
            commit = self.api.repo_info(self.name, revision=revision).sha
        except RepositoryNotFoundError:
            return f"There is no {self.name} on the Hub, or none that your account may see."
        except Exception:  # what failed before may fail again
            return f"What is in {where} now could not be found out."
        return f"{where} is at commit {commit[:8]}."

    def _patiently(self, action: Callable[[], Result], what: str) -> Result:
        return patiently(action, what, advice=RETRY)


@contextmanager
def _explained_refusals(
    repository: _Repository,
    revision: str | None,
    *,
    create_pr: bool = False,
    published: CommitInfo | None = None,
) -> Iterator[None]:
    """Turn errors of the Hub's client into a PublishError: why, what is on the Hub, what to do.

    Args:
        repository: to publish to.
        revision: branch that is written to, None for main.
        create_pr: whether a pull request is opened.
        published: the commit to main, if there is one already.
    """
    try:
        yield
    except CLIENT_ERRORS as error:
        reason = _reason(error, repository.name, repository.api.endpoint)
        if published is None:
            outcome = f"not published: {reason} {repository.state(revision)}"
        else:
            outcome = (
                f"published to {repository.name} (main) at commit {published.oid[:8]}, but "
                f"without its stock twin: {reason} What is on the branch `{revision}` is not this "
                "checkpoint."
            )
        advice = (
            "All files are where they were; run the same command again (what is on the Hub "
            "already is not sent twice)."
        )
        if create_pr:
            advice += " First check whether a pull request was opened nevertheless."
        raise PublishError(f"{outcome} {advice}") from error


def _reason(error: Exception, repo_id: str, endpoint: str) -> str:
    """Return a sentence on why the Hub refused."""
    status = status_of(error)
    if status == 401:
        return (
            "the Hub does not accept your token. Make one that may write at "
            f"{endpoint}/settings/tokens, then run `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return (
            f"your token may not write to {repo_id}. Take one with write access, of an account "
            "that may write there."
        )
    if status == 404:
        return f"{repo_id} does not exist, or your account may not see it."
    if status in (409, 412):
        return f"somebody else changed {repo_id} at the same time."
    message = getattr(error, "server_message", None)
    if not message:
        lines = str(error).strip().splitlines()
        message = lines[0] if lines else type(error).__name__
    message = message.strip().rstrip(".")
    return f"{message} (status {status})." if status is not None else f"{message}."
