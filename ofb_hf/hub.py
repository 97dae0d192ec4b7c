"""Publishing: a folder that says everything about a checkpoint and nothing about the machine, in one commit."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResultEntry, HfApi, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from . import models
from ._version import __version__
from .flops import count_macs, count_params
from .leaks import require_no_leaks, require_no_token
from .model_card import final_results, plain_card
from .network import patiently
from .stock import pad_to_stock

logger = logging.get_logger(__name__)

CARD, RESULTS, SUBNET, PREPROCESSOR = "README.md", "eval_results.json", "subnet.json", "preprocessor_config.json"
# What of a search's output folder is published, where it is there; everything else stays.
OPTIONAL = (PREPROCESSOR, SUBNET, CARD, RESULTS, "search_history.jsonl", "search.png")
STOCK_REVISION = "stock"
EVALUATIONS = ".eval_results"
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")


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

    One commit holds `config.json` (whose `auto_map` names the code), `model.safetensors`, the model's two code files,
    and what a search leaves beside them: image processor, subnet, results, history, picture, card. Publishing the same
    again changes nothing. A ViT also goes to the branch `stock`, padded to a checkpoint of transformers' own class.

    Args:
        model: an output folder of a search or of `save_pretrained`, or a model.
        repo_id: `owner/name`; made if it is not there. None: only write `output_dir`.
        output_dir: where to write what is, or would be, published; must be empty or absent.
        private: whether a repository that is made now is private.
        revision: branch to commit to, made if it is not there; `main` by default.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch. Its stock twin is left out.
        stock: also publish the padded twin of a ViT.
        token: access token; by default the one of `hf auth login` or HF_TOKEN.

    Returns:
        The commit, or `output_dir` if there is no `repo_id`.

    Raises:
        ValueError: for a folder that holds no classifier of ours, and for an `output_dir` that is not empty.
        LeakError: if a file holds a token, the name of an account or machine, or a folder of this machine.
        PublishError: if the Hub refuses, or cannot be reached; says what is on the Hub now.
    """
    if repo_id is None and output_dir is None:
        raise ValueError("neither repo_id nor output_dir is given; say where the checkpoint is to go.")
    if output_dir is not None and Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise ValueError(f"output_dir {output_dir} is not empty; give a new folder.")
    with tempfile.TemporaryDirectory() as temporary:
        folder, twin = Path(temporary) / "main", Path(temporary) / STOCK_REVISION
        secrets = {token} if token else set()
        loaded = _stage(model, folder, secrets)
        with_twin = stock and not create_pr and revision is None and _stage_stock(loaded, folder, twin)
        owner = {repo_id.partition("/")[0]} if repo_id else set()
        require_no_leaks(folder, owner, secrets)
        if output_dir is not None:
            shutil.copytree(folder, output_dir, dirs_exist_ok=True)
        if repo_id is None:
            return Path(output_dir)
        api = HfApi(token=token)
        message = commit_message or f"Publish {loaded.config.model_type} with ofb-hf {__version__}"
        with _refusals_in_words(api, repo_id, revision):
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True), f"making {repo_id}")
            commit = _commit(api, repo_id, folder, message, revision, create_pr)
        if with_twin:
            with _refusals_in_words(api, repo_id, STOCK_REVISION):
                _commit(api, repo_id, twin, f"{message}, padded to a stock ViT", STOCK_REVISION, create_pr=False)
    return commit


def require_write_access(repo_id: str | None, token: str | None = None) -> None:
    """Finds out before a long run whether its result can be published.

    Raises:
        ValueError: without a `repo_id` of the form owner/name, or a token that may write.
    """
    if repo_id is None or repo_id.count("/") != 1:
        raise ValueError(f"hub_model_id is {repo_id!r}; --push_to_hub needs the repository to push to, OWNER/NAME.")
    api = HfApi(token=token)
    try:
        account = patiently(api.whoami, "asking the Hub who you are")
    except (HfHubHTTPError, httpx.RequestError, OSError, ValueError) as error:  # ValueError: there is no token
        raise ValueError(f"--push_to_hub: {_reason(error, repo_id, api.endpoint)} Nothing was started.") from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"--push_to_hub: your token may only read. Take one with write access to {repo_id}. Nothing was started."
        )


def _stage(model: PreTrainedModel | str | Path, folder: Path, secrets: set[str]) -> PreTrainedModel:
    """Fills a folder with everything that is published; returns the classifier in it."""
    folder.mkdir()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        source = Path(model)
        for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME):
            if not (source / name).is_file():
                raise ValueError(f"{source} has no {name}; give the output folder of a search, or a model.")
        if (source / TRAINING_ARGS_NAME).is_file():
            require_no_token(source / TRAINING_ARGS_NAME, secrets)
        for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME, *OPTIONAL):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    classes = next((row for row in models.REGISTERED if type(loaded) is row[2]), None)
    if classes is None:
        ours = ", ".join(row[2].__name__ for row in models.REGISTERED)
        raise ValueError(
            f"the classifier is a {type(loaded).__name__}; publish takes {ours}. Others have their own push_to_hub."
        )
    _add_code(folder, classes)
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8")) if (folder / RESULTS).is_file() else {}
    _describe_weights(folder, loaded, results.get("source", {}))
    if "/" in results.get("data", ""):
        _add_evaluation(folder, results)
    if not (folder / CARD).is_file():
        (folder / CARD).write_text(plain_card(count_macs(loaded), count_params(loaded)), encoding="utf-8")
    return loaded


def _add_code(folder: Path, classes: tuple[type, ...]) -> None:
    """The two files that define the model, and the entries of the config by which transformers finds them."""
    auto_map = {}
    for auto, cls in zip(AUTO_CLASSES, classes, strict=True):
        file = Path(models.__file__).with_name(f"{cls.__module__.rpartition('.')[2]}.py")
        shutil.copyfile(file, folder / file.name)
        auto_map[auto] = f"{file.stem}.{cls.__name__}"
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["auto_map"] = auto_map
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """Top-1 in the format in which the Hub collects results by data set, for data that is on the Hub."""
    data, final = results["data"], final_results(results)
    notes = f"top-1 in percent on {final['num_examples']:,} images"
    entry = EvalResultEntry(data, "image-classification", final["top1"], notes=notes)
    file = folder / EVALUATIONS / f"{data.replace('/', '--')}.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


def _describe_weights(folder: Path, model: PreTrainedModel, source: dict[str, Any]) -> None:
    """Writes into the header of the weights what they are; the tensors stay as they are, byte for byte."""
    file, subnet = folder / SAFE_WEIGHTS_NAME, folder / SUBNET
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    metadata = header.pop("__metadata__", {}) | {"format": "pt", "ofb_hf_version": __version__}
    metadata |= {"macs": str(count_macs(model)), "params": str(count_params(model))}
    metadata |= {f"source_{key}": str(value) for key, value in source.items() if value is not None}
    if subnet.is_file():
        metadata["subnet_sha256"] = hashlib.sha256(subnet.read_bytes()).hexdigest()
    # Not by safetensors' own function: it orders these entries by chance, and publishing again would change the file.
    words = json.dumps({"__metadata__": dict(sorted(metadata.items()))} | header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    aside = file.with_name(f"new-{file.name}")
    aside.write_bytes(len(words).to_bytes(8, "little") + words + content[begin:])
    aside.replace(file)  # not into the file itself, which the loaded model may have mapped into its memory


def _stage_stock(model: PreTrainedModel, main: Path, folder: Path) -> bool:
    """The stock twin, with the image processor and the card of what it is a twin of; False if there is none."""
    if not isinstance(model, models.OFBViTForImageClassification):
        return False
    pad_to_stock(model).save_pretrained(folder)
    if (main / PREPROCESSOR).is_file():
        AutoImageProcessor.from_pretrained(main).save_pretrained(folder)
    shutil.copyfile(main / CARD, folder / CARD)
    return True


def _commit(api: HfApi, repo_id: str, folder: Path, message: str, revision: str | None, create_pr: bool) -> CommitInfo:
    """One commit with all files of a folder. Those that are there already are not sent again."""
    if revision is not None:
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), f"making the branch {revision}")

    def commit() -> CommitInfo:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
        try:
            return api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr or None
            )
        except ConnectionError as error:
            if "xet-write-token" not in str(error) or "404" not in str(error):
                raise
        # Out here, where the error above is not in its context: asking again would not help.
        raise ValueError(f"{api.endpoint} does not take uploads through Xet; set HF_HUB_DISABLE_XET=1")

    # A commit whose answer was lost has landed: done again, it changes nothing. A pull request would be a second one.
    return commit() if create_pr else patiently(commit, f"committing to {repo_id}")


@contextmanager
def _refusals_in_words(api: HfApi, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what the client raises into one sentence: why, what is on the Hub now, and what to do."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, httpx.RequestError, OSError, RuntimeError, ValueError) as error:
        reason = _reason(error, repo_id, api.endpoint)
        raise PublishError(
            f"not published: {reason} {_state(api, repo_id, revision)} The files are where they were; run the same "
            "command again (what is there already is not sent twice)."
        ) from error


def _reason(error: Exception, repo_id: str, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    known = {
        401: f"the Hub does not accept your token. Make one that may write at {endpoint}/settings/tokens, then run "
        "`hf auth login`, or set HF_TOKEN.",
        403: f"your token may not write to {repo_id}. Take one with write access, of an account that may.",
        404: f"{repo_id} is not there, or your account may not see it.",
        409: f"somebody else changed {repo_id} at the same time.",
        412: f"somebody else changed {repo_id} at the same time.",
    }
    return known.get(status, f"{words.rstrip('.')}.")


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
