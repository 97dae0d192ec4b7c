"""State of the Hub of `hub_server.py`, and requests that change it: branches, objects, commits.

Large files are objects of their own next to git, as in LFS.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

import yaml

SHA = "0123456789abcdef0123456789abcdef01234567"
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE_SUFFIXES = (".safetensors", ".png", ".bin", ".pt", ".parquet")
LARGE_SIZE = 10_000_000
INVALID_TOKEN = "Invalid credentials in Authorization header"


class Refusal(Exception):
    """Report that the Hub refuses a request.

    Args:
        status: of the answer.
        message: in its body and in X-Error-Message.
        code: X-Error-Code, if there is one.
        more: further entries of the body.
    """

    def __init__(self, status: int, message: str, code: str = "", **more: object):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.more = more


@dataclass(frozen=True)
class Token:
    """Describe an access token.

    Args:
        user: owner; also a namespace.
        role: "write", or "read".
        organizations: namespaces in which the user may write too.
        expired: whether it was valid once.
    """

    user: str
    role: str = "write"
    organizations: tuple[str, ...] = ()
    expired: bool = False

    def may_write(self, namespace: str) -> bool:
        """Return whether it may create and change repositories of this namespace."""
        return self.role == "write" and namespace in (self.user, *self.organizations)


class Large(bytes):
    """Content of a large file, which is stored under its SHA-256 and not in git."""

    @property
    def oid(self) -> str:
        """Return the name of the object."""
        return hashlib.sha256(self).hexdigest()

    @property
    def pointer(self) -> bytes:
        """Return the pointer that git holds instead."""
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.oid}",
            f"size {len(self)}",
            "",
        )
        return "\n".join(lines).encode()


def git_hash(content: bytes) -> str:
    """Return the name that git gives to a file."""
    content = content.pointer if isinstance(content, Large) else content
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """Store all files of one commit; large ones as `Large`."""

    sha: str
    files: dict[str, bytes]
    message: str = "initial commit"
    description: str = ""
    revision: str = "main"
    parent: str | None = None


@dataclass
class Repository:
    """Store a data set or a model.

    Args:
        files: path -> content, on main.
        denied: status, X-Error-Code and X-Error-Message of all answers about it.
        listed: whether its list of files and its README.md are shown nevertheless.
        private: whether only accounts that may write in its namespace see it.
        commits: of all branches, the oldest first.
        references: branches and pull requests (`refs/pr/1`) -> SHA of the commit.
        objects: uploaded large files, by SHA-256.
    """

    files: dict[str, bytes]
    denied: tuple[int, str, str] | None = None
    listed: bool = False
    private: bool = False
    commits: list[Commit] = field(init=False)
    references: dict[str, str] = field(init=False)
    objects: dict[str, bytes] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.commits = [Commit(SHA, self.files)]
        self.references = {"main": SHA}

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, a pull request, or a SHA or its beginning."""
        sha = self.references.get(revision, revision)
        found = (
            [commit for commit in self.commits if commit.sha.startswith(sha)]
            if len(sha) >= 7
            else []
        )
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def add(self, commit: Commit) -> None:
        """Add a commit, and move its branch to it."""
        self.commits.append(commit)
        self.references[commit.revision] = commit.sha
        self.files = self.at("main").files


@dataclass
class Call:
    """Store a request, and what it is made to.

    Args:
        url: of this Hub.
        repositories: on it, by name.
        token: None if the client sent none.
        body: of the request.
        create_pr: whether it opens a pull request.
    """

    url: str
    repositories: dict[str, Repository]
    token: Token | None = None
    body: bytes = b""
    create_pr: bool = False

    def may_write(self, name: str) -> bool:
        """Return whether this client may change a repository."""
        return self.token is not None and self.token.may_write(name.split("/")[0])

    def repository(self, name: str, public: bool = False) -> Repository:
        """Return a repository, if this client may see it."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not self.may_write(name)):
            if self.token is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if repository.denied is None or (repository.listed and public):
            return repository
        status, code, message = repository.denied
        raise Refusal(status, message, code)

    def signed_in(self) -> Token:
        """Return the token of the request; refuse requests without one."""
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        return self.token


def whoami(call: Call) -> dict:
    """GET /api/whoami-v2"""
    token = call.signed_in()
    organizations = [
        {"type": "org", "name": name, "roleInOrg": "write"} for name in token.organizations
    ]
    answer = {
        "type": "user",
        "id": "0",
        "name": token.user,
        "fullname": token.user,
        "orgs": organizations,
    }
    return answer | {
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": "tests", "role": token.role},
        }
    }


def create_repository(call: Call) -> dict:
    """POST /api/repos/create"""
    wanted, token = json.loads(call.body), call.signed_in()
    namespace = wanted.get("organization") or token.user
    name = f"{namespace}/{wanted['name']}"
    if not token.may_write(namespace):
        raise Refusal(
            403, f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        )
    if name in call.repositories:
        raise Refusal(409, "You already created this model repo", url=f"{call.url}/{name}")
    private = wanted.get("visibility") == "private"
    call.repositories[name] = Repository({".gitattributes": GIT_ATTRIBUTES}, private=private)
    return {"url": f"{call.url}/{name}", "name": name, "id": name}


def validate_card(call: Call) -> dict:
    """POST /api/validate-yaml"""
    header = re.match(r"---\n(.*?)\n---\s", json.loads(call.body)["content"] + "\n", re.DOTALL)
    if header is None:
        return {
            "errors": [],
            "warnings": [{"message": "empty or missing yaml metadata in repo card"}],
        }
    try:
        problem = "" if isinstance(yaml.safe_load(header[1]), dict) else "metadata is not a mapping"
    except yaml.YAMLError as error:
        problem = str(error)
    if problem:
        raise Refusal(400, "Invalid metadata", errors=[{"message": problem}], warnings=[])
    return {"errors": [], "warnings": []}


def create_branch(call: Call, name: str, branch: str) -> dict:
    """POST /api/models/{repo}/branch/{branch}"""
    call.signed_in()
    repository = call.repository(name)
    if not call.may_write(name):
        raise Refusal(403, "Authorization error.")
    if branch.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {branch}")
    if branch in repository.references:
        raise Refusal(409, "Reference already exists")
    start = json.loads(call.body or b"{}").get("startingPoint", "main")
    repository.references[branch] = repository.at(start).sha
    return {}


def list_references(call: Call, name: str) -> dict:
    """GET /api/models/{repo}/refs"""
    references = call.repository(name).references.items()
    branches = [
        {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in references
    ]
    branches = [branch for branch in branches if not branch["name"].startswith("refs/")]
    requests = [
        {"name": ref, "ref": ref, "targetCommit": sha}
        for ref, sha in references
        if ref.startswith("refs/")
    ]
    return {"branches": branches, "converts": [], "tags": [], "pullRequests": requests}


def list_commits(call: Call, name: str, revision: str) -> list[dict]:
    """GET /api/models/{repo}/commits/{revision}, the newest first"""
    repository = call.repository(name)
    commits, commit = [], repository.at(revision)
    while commit is not None:
        row = {"id": commit.sha, "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        commits.append(row | {"title": commit.message, "message": commit.description})
        commit = repository.at(commit.parent) if commit.parent else None
    return commits


def ask_upload_modes(call: Call, name: str, revision: str) -> dict:
    """POST /api/models/{repo}/preupload/{revision}: large or not, and what is there."""
    token = call.signed_in()
    if call.create_pr and token.role != "write":
        raise Refusal(403, "Authorization error.")
    files, answers = call.repository(name).at(revision).files, []
    for file in json.loads(call.body)["files"]:
        path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
        large = binary or file["size"] > LARGE_SIZE or path.endswith(LARGE_SUFFIXES)
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in files:
            content = files[path]
            answer["oid"] = content.oid if isinstance(content, Large) else git_hash(content)
        answers.append(answer)
    return {"files": answers}


def ask_upload_actions(call: Call, name: str) -> dict:
    """POST /{repo}.git/info/lfs/objects/batch: where to put which objects; none that are here."""
    call.signed_in()
    wanted, repository = json.loads(call.body), call.repository(name)
    # For a pull request the client names no branch here, and everybody may open one.
    if "ref" in wanted and not call.may_write(name):
        raise Refusal(403, "Authorization error.")
    answers = []
    for item in wanted["objects"]:
        answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
        if item["oid"] not in repository.objects:
            address = f"{call.url}/objects/{name}"
            upload = {"href": f"{address}/{item['oid']}", "header": {}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
        answers.append(answer)
    return {"transfer": "basic", "objects": answers}


def put_object(call: Call, name: str, oid: str) -> dict:
    """PUT, to the address from `ask_upload_actions`, which is as good as a token."""
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refusal(400, "the content is not what its SHA-256 says")
    call.repositories[name].objects[oid] = call.body
    return {}


def verify_object(call: Call, name: str) -> dict:
    """POST, after that."""
    wanted = json.loads(call.body)
    if len(call.repository(name).objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refusal(404, "object not found")
    return {}


def changed(
    files: dict[str, bytes], changes: list[dict], objects: dict[str, bytes]
) -> dict[str, bytes]:
    """Return the files after some changes, each a line of a request for a commit."""
    files = dict(files)
    for change in changes:
        kind, value = change["key"], change["value"]
        path = value["path"]
        if kind == "file":
            files[path] = base64.b64decode(value["content"])
        elif kind == "lfsFile" and value["oid"] in objects:
            files[path] = Large(objects[value["oid"]])
        elif kind == "lfsFile":
            raise Refusal(400, f"the object of {path} was not uploaded")
        else:
            deleted = [file for file in files if file == path]
            if kind == "deletedFolder":
                folder = path.rstrip("/") + "/"
                deleted += [file for file in files if file.startswith(folder)]
            if not deleted:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for file in deleted:
                del files[file]
    return files


def commit(call: Call, name: str, revision: str) -> dict:
    """POST /api/models/{repo}/commit/{revision}: all of it, or nothing."""
    call.signed_in()
    repository = call.repository(name)
    if not call.create_pr and not call.may_write(name):
        raise Refusal(
            403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
        )
    if revision not in repository.references:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head, *changes = (json.loads(line) for line in call.body.splitlines() if line)
    expected, parent = head["value"].get("parentCommit"), repository.at(revision)
    if expected and call.create_pr:
        parent = repository.at(expected)
    elif expected and not parent.sha.startswith(expected):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    answer = {"success": True}
    if call.create_pr:
        number = 1 + sum(reference.startswith("refs/pr/") for reference in repository.references)
        answer["pullRequestUrl"] = f"{call.url}/{name}/discussions/{number}"
        revision = f"refs/pr/{number}"
    files = changed(parent.files, changes, repository.objects)
    sha = hashlib.sha1(f"{parent.sha} {len(repository.commits)}".encode() + call.body).hexdigest()
    message, description = head["value"]["summary"], head["value"].get("description", "")
    repository.add(Commit(sha, files, message, description, revision, parent.sha))
    return answer | {"commitOid": sha, "commitUrl": f"{call.url}/{name}/commit/{sha}"}


NAME = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., dict]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repository),
    ("POST", "/api/validate-yaml", validate_card),
    ("GET", f"/api/models/{NAME}/refs", list_references),
    ("GET", f"/api/models/{NAME}/commits/([^/]+)", list_commits),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", create_branch),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", ask_upload_modes),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", ask_upload_actions),
    ("POST", f"/objects/{NAME}/verify", verify_object),
    ("PUT", f"/objects/{NAME}/([0-9a-f]{{64}})", put_object),
]


def answer(call: Call, command: str, path: str) -> dict | list | None:
    """Do what a request asks for; return None for requests that are not in ROUTES.

    Args:
        call: the request.
        command: its HTTP method.
        path: as it was sent, with %2F within a revision.
    """
    for method, pattern, function in ROUTES:
        if method == command and (match := re.fullmatch(pattern, path)):
            return function(call, *map(unquote, match.groups()))
    return None
