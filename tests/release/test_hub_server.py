"""The Hub of `hub_server.py` returns what clients upload, and reports what goes wrong."""

import io
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import httpx2
import pytest
from hub_server import HubServer, Token
from hub_uploads import GIT_ATTRIBUTES, Large
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

TOKENS = {
    "hf_write": Token("ann", organizations=("lab",)),
    "hf_read": Token("ann", "read"),
    "hf_other": Token("bob"),
    "hf_old": Token("ann", expired=True),
}
LARGE = ("model.safetensors", "curve.png")


def picture(number: int) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 0, 7)).save(file, "PNG")
    return file.getvalue()


def model(number: int) -> dict[str, bytes]:
    """Files of a model; another number makes all of them others."""
    return {
        "config.json": json.dumps({"number": number}).encode(),
        "model.safetensors": (2).to_bytes(8, "little") + b"{}" + bytes([number]) * 2_000_000,
        "curve.png": picture(number),
        "README.md": f"---\nlicense: apache-2.0\n---\n# Model {number}\n".encode(),
    }


# What runs in the process of a client


def ask(method: str, *args: object, token: str | bool = "hf_write", **settings: object) -> object:
    """Whatever `HfApi` can."""
    return getattr(HfApi(token=token), method)(*args, **settings)


def upload(
    name: str, files: dict[str, bytes], token: str | bool = "hf_write", **settings: object
) -> CommitInfo:
    """Brings all files in one commit."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return HfApi(token=token).create_commit(name, operations, commit_message="Upload", **settings)


def download(
    name: str, paths: list[str], cache: Path, revision: str | None = None
) -> dict[str, bytes]:
    """Files, into a cache."""
    found = {
        path: hf_hub_download(name, path, revision=revision, cache_dir=cache, token="hf_write")
        for path in paths
    }
    return {path: Path(file).read_bytes() for path, file in found.items()}


def push(folder: Path, name: str, cache: Path) -> tuple[str, bool]:
    """A model to a branch with transformers, and back: where it went, and whether its numbers are
    the same."""
    from transformers import AutoModelForImageClassification

    pushed = AutoModelForImageClassification.from_pretrained(folder)
    where = pushed.push_to_hub(name, token="hf_write", revision="stock", commit_message="Stock")
    found = AutoModelForImageClassification.from_pretrained(
        name, revision="stock", cache_dir=cache, token="hf_write"
    )
    numbers = found.state_dict()
    return str(where), all(value.equal(numbers[key]) for key, value in pushed.state_dict().items())


# What starts it, and looks at the Hub


@contextmanager
def process(environment: dict[str, str]) -> Iterator[Callable]:
    """Calls functions in a process of its own, without what conftest.py has set here; errors come
    back as they are."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(os.getpid).result(60)
        yield lambda function, *args, **settings: pool.submit(function, *args, **settings).result(
            60
        )


@pytest.fixture(scope="module")
def hub():
    """A Hub without repositories."""
    with HubServer({}, tokens=TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Calls functions in the process of a client."""
    with process(hub.environment(tmp_path_factory.mktemp("hf"))) as call:
        yield call


@pytest.fixture
def name(hub, client, request):
    """A repository that was just made."""
    name = f"lab/{re.sub(r'[^a-z]+', '-', request.node.name)[:90].strip('-')}"
    client(ask, "create_repo", name)
    hub.requests.clear()
    return name


def once(faults: dict[str, object]) -> Callable[[str], object]:
    """Every fault at the first request for a path with that in it."""
    remaining = dict(faults)
    return lambda path: next(
        (remaining.pop(part) for part in faults if part in path and part in remaining), None
    )


def test_what_is_uploaded_is_downloaded(hub, client, name, tmp_path):
    done = client(upload, name, model(1))
    assert client(download, name, list(model(1)), tmp_path) == model(1)
    first, last = hub.repositories[name].commits
    assert first.files == {".gitattributes": GIT_ATTRIBUTES}
    assert last.files == first.files | model(1)
    assert (last.sha, last.message, last.revision, last.parent) == (
        done.oid,
        "Upload",
        "main",
        first.sha,
    )
    assert {path for path, content in last.files.items() if isinstance(content, Large)} == set(
        LARGE
    )
    assert done.commit_url == f"{hub.url}/{name}/commit/{done.oid}"
    assert sum(line.startswith("PUT ") for line in hub.requests) == 2


def test_lists_tell_what_is_large(client, name):
    client(upload, name, model(1) | {"sub/empty.png": b""})
    listed = {file.path: file for file in client(list_files, name)}
    info = client(ask, "model_info", name, files_metadata=True)
    assert {path for path, file in listed.items() if file.lfs} == set(LARGE)
    assert listed["model.safetensors"].lfs.sha256 == Large(model(1)["model.safetensors"]).oid
    assert {file.rfilename: (file.size, file.blob_id, file.lfs) for file in info.siblings} == {
        path: (file.size, file.blob_id, file.lfs) for path, file in listed.items()
    }
    assert [file.size for file in client(ask, "get_paths_info", name, ["curve.png", "no.txt"])] == [
        len(picture(1))
    ]


def list_files(name: str) -> list:
    """The whole tree; in the process of a client."""
    return list(HfApi(token="hf_write").list_repo_tree(name, recursive=True))


def test_what_is_there_already_is_not_brought_again(hub, client, name):
    first = client(upload, name, model(1))
    hub.requests.clear()
    assert client(upload, name, model(1)).oid == first.oid
    assert len(hub.repositories[name].commits) == 2
    client(upload, name, model(1) | {"config.json": b"{}"})
    assert len(hub.repositories[name].commits) == 3
    assert hub.repositories[name].files["config.json"] == b"{}"
    assert not any(line.startswith("PUT ") for line in hub.requests)


def test_files_are_deleted_in_the_same_commit(hub, client, name):
    client(upload, name, model(1) | {"old/a.txt": b"a", "old/b.txt": b"b"})
    operations = [CommitOperationDelete("old/"), CommitOperationDelete("curve.png")]
    client(ask, "create_commit", name, operations, commit_message="Less")
    assert set(hub.repositories[name].files) == {".gitattributes", *model(1)} - {"curve.png"}
    with pytest.raises(HfHubHTTPError, match="A file with this name doesn't exist"):
        client(ask, "create_commit", name, operations, commit_message="Less")


def test_branches_and_pull_requests_leave_main_alone(hub, client, name, tmp_path):
    main = client(upload, name, model(1))
    client(ask, "create_branch", name, branch="stock")
    stock = client(upload, name, model(2), revision="stock")
    opened = client(upload, name, model(3), create_pr=True)
    assert (opened.pr_revision, opened.pr_url) == ("refs/pr/1", f"{hub.url}/{name}/discussions/1")
    revisions = {"main": 1, "stock": 2, "refs/pr/1": 3, main.oid: 1, stock.oid: 2, opened.oid: 3}
    for revision, number in revisions.items():
        assert client(download, name, list(model(1)), tmp_path, revision) == model(number)
        assert (
            client(ask, "model_info", name, revision=revision).sha
            == hub.repositories[name].at(revision).sha
        )
    assert hub.repositories[name].files == {".gitattributes": GIT_ATTRIBUTES} | model(1)
    assert [commit.revision for commit in hub.repositories[name].commits] == [
        "main",
        "main",
        "stock",
        "refs/pr/1",
    ]
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: other"):
        client(upload, name, model(4), revision="other")


def test_what_exists_is_not_made_again(client, name):
    client(ask, "create_branch", name, branch="stock")
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        client(ask, "create_branch", name, branch="stock")
    client(ask, "create_branch", name, branch="stock", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        client(ask, "create_repo", name)
    assert client(ask, "create_repo", name, exist_ok=True).repo_id == name


def test_a_commit_on_something_older_is_refused(hub, client, name):
    before = client(upload, name, model(1))
    client(upload, name, model(2), parent_commit=before.oid)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        client(upload, name, model(3), parent_commit=before.oid)
    assert refused.value.response.status_code == 412
    assert hub.repositories[name].files["config.json"] == model(2)["config.json"]
    opened = client(upload, name, {"config.json": b"{}"}, parent_commit=before.oid, create_pr=True)
    assert hub.repositories[name].at(opened.pr_revision).files["README.md"] == model(1)["README.md"]


def test_private_models_are_hidden(client):
    client(ask, "create_repo", "lab/private", private=True)
    assert client(ask, "model_info", "lab/private").private
    for token in ("hf_other", False):
        with pytest.raises(RepositoryNotFoundError):
            client(ask, "model_info", "lab/private", token=token)


def test_whose_token_it_is(client):
    me = client(ask, "whoami")
    assert (me["name"], me["orgs"][0]["name"], me["auth"]["accessToken"]["role"]) == (
        "ann",
        "lab",
        "write",
    )
    assert client(ask, "whoami", token="hf_read")["auth"]["accessToken"]["role"] == "read"


@pytest.mark.parametrize(
    ("token", "status", "creating", "uploading"),
    [
        (
            "hf_none",
            401,
            "Invalid credentials in Authorization header",
            "Invalid credentials in Authorization header",
        ),
        ("hf_old", 401, 'User Access Token "tests" is expired', "Repository Not Found"),
        (
            "hf_read",
            403,
            "You don't have the rights to create a model under the namespace",
            "pass `create_pr=1`",
        ),
        (
            "hf_other",
            403,
            "You don't have the rights to create a model under the namespace",
            "pass `create_pr=1`",
        ),
        (False, 401, "Invalid username or password", "Repository Not Found"),
    ],
    ids=["unknown", "expired", "read-only", "of-somebody-else", "none"],
)
def test_tokens_that_do_not_allow_it(hub, client, name, token, status, creating, uploading):
    with pytest.raises(HfHubHTTPError, match=creating) as refused:
        client(ask, "create_repo", f"{name}-2", token=token)
    assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match=uploading) as refused:
        client(upload, name, {"config.json": b"{}"}, token)
    assert refused.value.response.status_code == status
    # The client takes an answer without a reason it knows for a missing repository.
    assert isinstance(refused.value, RepositoryNotFoundError) == (
        uploading == "Repository Not Found"
    )
    assert len(hub.repositories[name].commits) == 1
    assert f"{name}-2" not in hub.repositories


def test_large_files_need_the_right_to_write_before_they_travel(hub, client, name):
    for token in ("hf_read", "hf_other"):
        with pytest.raises(HfHubHTTPError, match="Authorization error"):
            client(upload, name, model(1), token)
    assert hub.repositories[name].objects == {}
    assert client(upload, name, model(1), "hf_other", create_pr=True).pr_revision == "refs/pr/1"


def test_the_card_is_looked_at_first(hub, client, name):
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        client(upload, name, {"README.md": b"---\nlicense: [\n---\n"})
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        client(upload, name, {"README.md": b"---\nlicense\n---\n"})
    assert hub.requests == ["POST /api/validate-yaml"] * 2


@pytest.mark.parametrize(
    ("fault", "error", "message", "landed"),
    [
        (503, HfHubHTTPError, "503 Service Unavailable", False),
        ((429, 7), HfHubHTTPError, "429 Too Many Requests", False),
        ("cut upload", httpx2.RemoteProtocolError, "Server disconnected", False),
        ("cut", httpx2.RemoteProtocolError, "peer closed connection", True),
        ("lose", httpx2.RemoteProtocolError, "Server disconnected", True),
    ],
)
def test_a_commit_is_sent_once(hub, client, name, monkeypatch, fault, error, message, landed):
    monkeypatch.setattr(hub, "fault", once({"/commit/": fault}))
    with pytest.raises(error, match=message) as failed:
        client(upload, name, model(1))
    if error is HfHubHTTPError:
        assert failed.value.response.headers.get("Retry-After") == (None if fault == 503 else "7")
    assert len(hub.repositories[name].commits) == 1 + landed
    client(upload, name, model(1))
    assert len(hub.repositories[name].commits) == 2
    assert sum("/commit/" in line for line in hub.requests) == (1 if landed else 2)
    assert sum(line.startswith("PUT ") for line in hub.requests) == 2


@pytest.mark.parametrize("path", ["/whoami-v2", "/repos/create", "/branch/", "/validate-yaml"])
def test_small_questions_are_asked_once(hub, client, name, monkeypatch, path):
    asked = {
        "/whoami-v2": partial(ask, "whoami"),
        "/repos/create": partial(ask, "create_repo", name),
        "/branch/": partial(ask, "create_branch", name, branch="stock"),
        "/validate-yaml": partial(upload, name, model(1)),
    }
    monkeypatch.setattr(hub, "fault", once({path: 503}))
    with pytest.raises(HfHubHTTPError, match="503 Service Unavailable"):
        client(asked[path])
    monkeypatch.setattr(hub, "fault", once({path: "lose"}))
    with pytest.raises(httpx2.RemoteProtocolError):
        client(asked[path])
    assert len(hub.requests) == 2
    assert hub.repositories[name].references.keys() == (
        {"main", "stock"} if path == "/branch/" else {"main"}
    )


def test_the_way_to_a_commit_is_repeated_by_the_client(hub, client, name, monkeypatch, tmp_path):
    large = Large(model(1)["model.safetensors"]).oid
    faults = {
        "/preupload/": 503,
        "/objects/batch": (429, 0),
        large: "cut upload",
        "/verify": "lose",
    }
    monkeypatch.setattr(hub, "fault", once(faults))
    client(upload, name, model(1))
    monkeypatch.setattr(hub, "fault", once({}))
    assert client(download, name, list(model(1)), tmp_path) == model(1)
    assert len(hub.repositories[name].commits) == 2
    times = {part: sum(part in line for line in hub.requests) for part in faults}
    assert times == {"/preupload/": 2, "/objects/batch": 2, large: 2, "/verify": 3}


def test_transformers_pushes_a_model_and_reads_it_back(hub, client, checkpoint, tmp_path):
    where, equal = client(push, checkpoint, "ann/pushed", tmp_path)
    assert equal
    made, stock = hub.repositories["ann/pushed"].commits
    assert where.endswith(f"/ann/pushed/commit/{stock.sha}")
    assert (made.revision, stock.revision, stock.message) == ("main", "stock", "Stock")
    assert {"config.json", "model.safetensors"} <= set(stock.files)


def test_with_xet_only_small_files_can_be_brought(hub, name, tmp_path):
    environment = {**hub.environment(tmp_path), "HF_HUB_DISABLE_XET": "0"}
    with process(environment) as client:
        with pytest.raises(ConnectionError, match=r"404 Not Found.*/xet-write-token/main"):
            client(upload, name, model(1))
        client(upload, name, {"config.json": b"{}"})
    assert hub.repositories[name].files["config.json"] == b"{}"
    assert "PUT" not in str(hub.requests)
