"""Published checkpoints are complete, in one commit, and load in three ways, with any Hub fault."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import non_uniform_swin, non_uniform_vit, tiny_images
from hub_server import HubServer, Repository, Token
from hub_uploads import Commit
from huggingface_hub import parse_eval_result_entries
from runs import places, run_code, run_fresh, run_search
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from ofb_hf import SubnetSpec, cli, count_macs, publish
from ofb_hf.release.leaks import LeakError

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
PUBLISH = TESTS / "publish_process.py"
COMMAND = "from ofb_hf.cli import main; main()"
TOKENS = {
    "hf_write": Token("ann", organizations=("lab",)),
    "hf_read": Token("ann", "read"),
    "hf_other": Token("bob"),
}
TOKENS |= {"hf_old": Token("ann", expired=True)}
PUBLISHED = {
    *(
        "README.md",
        "config.json",
        "configuration_ofb_vit.py",
        "eval_results.json",
        "model.safetensors",
    ),
    *(
        "modeling_ofb_vit.py",
        "preprocessor_config.json",
        "search.png",
        "search_history.jsonl",
        "subnet.json",
    ),
}
# Which request fails, how, how often, and the outcome: None for success, or text of the error.
REQUESTS = {
    "create": "/repos/create",
    "card": "/validate-yaml",
    "preupload": "/preupload/",
    "batch": "/objects/batch",
    "put": "/objects/lab",
    "verify": "/verify",
    "commit": "/commit/",
    "branch": "/branch/",
    "commits": "/commits/",
}
DOWN = "5 attempts in a row failed"
FAULTS: dict[str, tuple[str, Any, int, str | None]] = {
    f"{kind}-{status}": (part, (status, 1) if status == 429 else status, 2, None)
    for kind, part in REQUESTS.items()
    for status in (500, 503, 429)
}
FAULTS |= {
    f"{kind}-down": (REQUESTS[kind], 503, 999, DOWN)
    for kind in ("create", "preupload", "batch", "put", "commit")
}
# After the commit to main: it stays, and the error has to say so.
TWIN_FAULTS = {"branch": "/branch/", "commits": "/commits/", "stock": "/commit/stock"}
FAULTS |= {f"{kind}-down": (part, 503, 999, DOWN) for kind, part in TWIN_FAULTS.items()}
FAULTS |= {
    "create-lose": ("/repos/create", "lose", 1, None),
    "put-cut": ("/objects/lab", "cut upload", 1, None),
    "commit-lose": ("/commit/", "lose", 1, None),
    "commit-cut": ("/commit/", "cut upload", 1, None),
    "commit-conflict": ("/commit/", 412, 1, "somebody else changed lab/commit-conflict"),
}
SCHEDULE = [[17, 17], [9, 7]]
REFUSED = {
    "hf_wrong": "does not accept your token",
    "hf_old": "does not accept your token",
    "hf_read": "your token may not write to lab/",
    "hf_other": "your token may not write to lab/",
}


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def output(checkpoint, images, tmp_path_factory):
    """The output folder of a search."""
    folder = tmp_path_factory.mktemp("publish") / "half"
    run_search(checkpoint, images, folder)
    return folder


@pytest.fixture(scope="module")
def hub():
    """A Hub on which nothing is yet."""
    with HubServer({"case/x": Repository({})}, tokens=TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def outcomes(hub, output, tmp_path_factory):
    """The outcome of every case, by name."""
    cases = [
        ["first", str(output), "lab/half", "hf_write", {}],
        ["again", str(output), "lab/half", "hf_write", {}],
    ]
    better = shutil.copytree(output, tmp_path_factory.mktemp("better") / "half")
    (better / "README.md").write_text((output / "README.md").read_text() + "\nBetter.\n")
    cases += [
        ["pr", str(better), "lab/half", "hf_write", {"create_pr": True, "commit_message": "Better"}]
    ]
    cases += [["branch", str(output), "lab/half", "hf_write", {"revision": "v2", "private": True}]]
    scheduled = shutil.copytree(output, tmp_path_factory.mktemp("scheduled") / "half")
    config = json.loads((output / "config.json").read_text())
    (scheduled / "config.json").write_text(json.dumps(config | {"token_schedule": SCHEDULE}))
    cases += [["twin", str(output), "lab/tokens", "hf_write", {}]]
    cases += [["no-twin", str(scheduled), "lab/tokens", "hf_write", {}] for _ in range(2)]
    cases += [[name, str(output), f"lab/{name}", "hf_write", {}] for name in FAULTS]
    cases += [[token, str(output), f"lab/{token[3:]}", token, {}] for token in REFUSED]
    current, left = [""], {name: times for name, (_, _, times, _) in FAULTS.items()}

    def fault(path: str) -> Any:
        if "/models/case/" in path:
            current[0] = path.rpartition("/")[2]
            return None
        part, what, _, _ = FAULTS.get(current[0], ("nothing", None, 0, None))
        if part not in path or left.get(current[0], 0) == 0:
            return None
        left[current[0]] -= 1
        return what

    hub.fault, before = fault, digest(output)
    repositories = {f"case/{name}": Repository({}) for name, *_ in cases}
    hub.repositories.update(repositories)
    environment = hub.environment(tmp_path_factory.mktemp("hf"))
    status, said = run_fresh(PUBLISH, json.dumps(cases), environment=environment)
    assert status == 0, said[-4000:]
    assert digest(output) == before
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {line["name"]: line | {"faults left": left.get(line["name"])} for line in lines}


def test_one_commit_holds_everything_and_a_second_one_nothing(hub, output, outcomes):
    repository = hub.repositories["lab/half"]
    assert outcomes["again"]["oid"] == outcomes["first"]["oid"] == repository.references["main"]
    on_main = [
        commit for commit in repository.commits if commit.revision == "main" and commit.parent
    ]
    assert len(on_main) == 1
    assert set(repository.files) - {".gitattributes"} == PUBLISHED
    config = json.loads(repository.files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_ofb_vit.OFBViTConfig",
        "AutoModel": "modeling_ofb_vit.OFBViTModel",
        "AutoModelForImageClassification": "modeling_ofb_vit.OFBViTForImageClassification",
    }
    assert repository.files["README.md"] == (output / "README.md").read_bytes()


def test_a_model_without_a_stock_twin_leaves_none_of_an_earlier_one(hub, outcomes):
    repository = hub.repositories["lab/tokens"]
    assert json.loads(repository.files["config.json"])["token_schedule"] == SCHEDULE
    on_stock = [commit for commit in repository.commits if commit.revision == "stock"]
    assert "model.safetensors" in on_stock[-2].files
    assert set(on_stock[-1].files) == set(repository.at("stock").files) == {".gitattributes"}
    assert outcomes["no-twin"]["oid"] == repository.references["main"]


def test_the_weights_say_what_they_are(hub, output, outcomes, tmp_path):
    file, results = (
        tmp_path / "model.safetensors",
        json.loads((output / "eval_results.json").read_text()),
    )
    file.write_bytes(hub.repositories["lab/half"].files["model.safetensors"])
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert int(metadata["macs"]) == results["finetuned"]["macs"]
    assert int(metadata["params"]) == results["finetuned"]["params"]
    assert metadata["source_model"] == results["source"]["model"]
    assert (
        metadata["subnet_sha256"]
        == hashlib.sha256((output / "subnet.json").read_bytes()).hexdigest()
    )
    ours, theirs = load_file(output / "model.safetensors"), load_file(file)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_the_stock_branch_holds_a_stock_model_and_no_code(hub, outcomes):
    files = hub.repositories["lab/half"].at("stock").files
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert json.loads(files["config.json"])["model_type"] == "vit"


def test_what_another_checkpoint_left_goes_and_what_is_not_ours_stays(hub, output, tmp_path):
    hub.fault = lambda path: None
    non_uniform_swin().save_pretrained(tmp_path / "swin")
    cases = [
        ["a", str(output), "lab/turn", "hf_write", {}],
        ["b", str(tmp_path / "swin"), "lab/turn", "hf_write", {}],
    ]
    environment = hub.environment(tmp_path / "hf")
    hub.repositories.update({"case/a": Repository({}), "case/b": Repository({})})
    for case in cases:
        _, said = run_fresh(PUBLISH, json.dumps([case]), environment=environment)
        assert '"oid"' in said, said[-2000:]
        repository = hub.repositories["lab/turn"]
        if case[0] == "a":
            head = repository.at("main")
            repository.add(
                Commit("5" * 40, head.files | {"NOTES.md": b"mine"}, "notes", "", "main", head.sha)
            )
    code = {"configuration_ofb_swin.py", "modeling_ofb_swin.py"}
    assert (
        set(repository.files)
        == {".gitattributes", "NOTES.md", "README.md", "config.json", "model.safetensors"} | code
    )


def test_pull_requests_and_branches(hub, outcomes):
    repository = hub.repositories["lab/half"]
    assert outcomes["pr"]["pr"].endswith("/discussions/1")
    assert repository.at("refs/pr/1").message.startswith("Better")
    assert set(repository.references) >= {"main", "stock", "v2", "refs/pr/1"}


DOORS = {
    "package": ("import ofb_hf", {}),
    "remote code": ("sys.modules['ofb_hf'] = None", {"trust_remote_code": True}),
    "stock": ("sys.modules['ofb_hf'] = None", {"revision": "stock"}),
}


@pytest.mark.parametrize("door", DOORS)
def test_it_loads_through_three_doors_in_processes_that_never_saw_it(
    hub, output, outcomes, tmp_path, door
):
    first, settings = DOORS[door]
    save_file({"images": tiny_images()}, tmp_path / "images.safetensors")
    script = f"""
import sys; {first}
import torch, safetensors.torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
images = safetensors.torch.load_file({str(tmp_path / "images.safetensors")!r})["images"]
model = AutoModelForImageClassification.from_pretrained("lab/half", **{settings!r})
encoder = AutoModel.from_pretrained("lab/half", **{settings!r})
with torch.no_grad():
    answers = {{"logits": model(images).logits, "hidden": encoder(images).last_hidden_state}}
safetensors.torch.save_file(answers, {str(tmp_path / "answers.safetensors")!r})
AutoImageProcessor.from_pretrained("lab/half", **{settings!r})
print(type(model).__module__, sys.modules.get("ofb_hf") is not None)
"""
    environment = hub.environment(tmp_path / "hf") | {"PYTHONPATH": str(TESTS.parent)}
    status, said = run_code(tmp_path, script, environment=environment)
    assert status == 0, said[-3000:]
    module, has_us = said.splitlines()[-1].split()
    start = {
        "package": "ofb_hf.",
        "remote code": "transformers_modules.",
        "stock": "transformers.models.vit.",
    }[door]
    assert module.startswith(start)
    assert has_us == str(door == "package")
    model = cli_model(output)
    with torch.no_grad():
        expected = model(tiny_images()).logits
    answers = load_file(tmp_path / "answers.safetensors")
    tolerance = 1e-6 if door == "stock" else 0
    torch.testing.assert_close(answers["logits"], expected, rtol=0, atol=tolerance)
    assert answers["hidden"].shape[-1] == model.config.hidden_size


def cli_model(folder):
    """The classifier in a folder."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_in_success_or_in_a_sentence(hub, outcomes, name):
    *_, words = FAULTS[name]
    outcome, repository = outcomes[name], hub.repositories.get(f"lab/{name}")
    commits = repository.commits if repository is not None else []
    published = [commit for commit in commits if commit.revision == "main" and commit.parent]
    if words is None:
        assert "error" not in outcome, outcome
        assert outcome["faults left"] == 0, "the request that was to fail was never made"
        assert len(published) == 1
        assert set(repository.files) - {".gitattributes"} == PUBLISHED
        assert "stock" in repository.references
    elif name.removesuffix("-down") in TWIN_FAULTS:
        assert outcome["error"] == "PublishError"
        done = rf"^published to lab/{name} \(main\) at commit \w{{8}}, but without its stock twin: "
        assert re.search(rf"{done}.*{words}.*run the same", outcome["message"])
        assert len(published) == 1
        assert set(repository.files) - {".gitattributes"} == PUBLISHED
        assert "stock" not in repository.references or set(repository.at("stock").files) == {
            ".gitattributes"
        }
    else:
        assert outcome["error"] == "PublishError"
        state = (
            rf"lab/{name} \(main\) is at commit \w{{8}}"
            if repository
            else f"There is no lab/{name} on the Hub"
        )
        assert re.search(rf"^not published: .*{words}.*{state}.*run the same", outcome["message"])
        assert "\n" not in outcome["message"]
        assert not published
        assert "config.json" not in (repository.files if repository else {})


@pytest.mark.parametrize("token", REFUSED)
def test_tokens_that_may_not_write_are_refused_in_words(hub, outcomes, token):
    assert outcomes[token]["error"] == "PublishError"
    assert REFUSED[token] in outcomes[token]["message"]
    assert f"lab/{token[3:]}" not in hub.repositories


def test_a_hub_without_xet_is_told_in_words_how_to_go_on(hub, output, tmp_path):
    """The default, without HF_HUB_DISABLE_XET."""
    hub.fault = lambda path: None
    environment = hub.environment(tmp_path / "hf", token="hf_write")
    del environment["HF_HUB_DISABLE_XET"]
    words = ["publish", str(output), "--repo_id", "lab/xet"]
    status, said = run_code(tmp_path, COMMAND, *words, environment=environment)
    assert status == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "does not take uploads through Xet; set HF_HUB_DISABLE_XET=1." in line
    assert "attempt" not in said
    assert [commit.message for commit in hub.repositories["lab/xet"].commits] == ["initial commit"]


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_write", None),
        ("hf_read", "your token may only read"),
        ("hf_other", "belongs to lab, and your account is bob"),
    ],
)
def test_a_search_publishes_its_result_or_says_at_once_that_it_cannot(
    hub, checkpoint, images, tmp_path, token, words
):
    hub.fault = lambda path: None
    output = tmp_path / "out"
    recipe = TESTS.parent / "recipes" / "search_deit.py"
    settings = [str(recipe)]
    settings += places(checkpoint, images, output)
    settings += ["--max_steps", "8", "--finetune_max_steps", "2", "--use_cpu"]
    settings += [
        "--report_to",
        "none",
        "--push_to_hub",
        "--hub_model_id",
        f"lab/search-{token[3:]}",
    ]
    environment = hub.environment(tmp_path / "hf", token=token)
    status, said = run_fresh(TESTS / "recipe_process.py", *settings, environment=environment)
    if words is None:
        assert status == 0, said[-3000:]
        assert set(hub.repositories["lab/search-write"].files) - {".gitattributes"} == PUBLISHED
    else:
        assert status == 2
        assert words in said
        assert not output.exists()


def test_a_published_checkpoint_is_verified(hub, outcomes, images, tmp_path):
    hub.fault = lambda path: None
    words = ["verify", "lab/half", "--data_dir", str(images), "--use_cpu", "--report_to", "none"]
    environment = hub.environment(tmp_path / "hf")
    status, said = run_code(tmp_path, COMMAND, *words, environment=environment)
    assert status == 0, said[-3000:]
    assert "Everything is as the card says." in said


# Without a Hub


@pytest.mark.parametrize("make", [non_uniform_vit, non_uniform_swin], ids=["vit", "swin"])
def test_a_model_is_written_to_a_folder_with_a_card_that_claims_nothing(tmp_path, make):
    model = make()
    assert publish(model, output_dir=tmp_path / "out") == tmp_path / "out"
    family = model.config.model_type.removeprefix("ofb_")
    code = {f"configuration_ofb_{family}.py", f"modeling_ofb_{family}.py"}
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"stock"}
    assert names == {"README.md", "config.json", "model.safetensors"} | code
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{count_macs(model):,} multiply-accumulates" in card
    assert "Nothing was measured" in card


def test_results_on_data_of_the_hub_are_published_by_data_set(output, tmp_path):
    copy = shutil.copytree(output, tmp_path / "copy")
    results = json.loads((copy / "eval_results.json").read_text()) | {"data": "lab/photos"}
    (copy / "eval_results.json").write_text(json.dumps(results))
    publish(copy, output_dir=tmp_path / "out")
    (file,) = (tmp_path / "out" / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.value) == ("lab/photos", results["finetuned"]["top1"])


@pytest.mark.parametrize("name", ["eval_results.json", "config.json", "search_history.jsonl"])
def test_nothing_with_a_token_in_it_is_published(output, tmp_path, name):
    copy, token = shutil.copytree(output, tmp_path / "copy"), "hf_" + "Ab9" * 12
    content = (copy / name).read_text()
    planted = (
        content.replace('"', f'"hub_token": "{token}", "', 1)
        if name.endswith("json")
        else content + token
    )
    (copy / name).write_text(planted)
    with pytest.raises(LeakError, match=f"{name}.*an access token"):
        publish(copy, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_token_in_training_arguments_is_found_and_the_push_refused(hub, output, tmp_path):
    """The Trainer of transformers pickles its arguments, tokens included, next to the weights."""
    hub.fault = lambda path: None
    copy, token = shutil.copytree(output, tmp_path / "copy"), "hf_" + "Ab9" * 12
    torch.save(TrainingArguments("out", hub_token=token, use_cpu=True), copy / "training_args.bin")
    words = ["publish", str(copy), "--repo_id", "lab/arguments"]
    environment = hub.environment(tmp_path / "hf", token="hf_write")
    status, said = run_code(tmp_path, COMMAND, *words, environment=environment)
    assert status == 2
    assert "training_args.bin holds an access token" in said
    assert token not in said
    assert "lab/arguments" not in hub.repositories

    torch.save(TrainingArguments("out", use_cpu=True), copy / "training_args.bin")
    publish(copy, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_the_token_that_publishes_is_looked_for_whatever_it_looks_like(output, tmp_path):
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "README.md").write_text((copy / "README.md").read_text() + "\nan-odd-token\n")
    with pytest.raises(LeakError, match=r"README\.md, line \d+: the value of a secret"):
        publish(copy, output_dir=tmp_path / "out", token="an-odd-token")


def test_an_incomplete_checkpoint_is_not_published(output, tmp_path):
    copy = shutil.copytree(output, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["vit.layers.0.mlp.fc1.bias"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 of its tensors are missing, such as vit\.layers\.0\.mlp\.fc1\.bias"
    ):
        publish(copy, output_dir=tmp_path / "out")
    (copy / "model.safetensors").write_bytes((output / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load an image classifier"):
        publish(copy, output_dir=tmp_path / "out")


@pytest.mark.parametrize("stored", ["shards", "pickle"])
def test_weights_in_shards_are_published_as_one_file(stored, tmp_path):
    model = non_uniform_vit(dtype=torch.bfloat16)
    source = tmp_path / "source"
    if stored == "shards":
        model.save_pretrained(source, max_shard_size="20KB")
        assert len(list(source.glob("model-*.safetensors"))) > 1
    else:
        model.config.save_pretrained(source)
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    publish(source, output_dir=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    code = {"configuration_ofb_vit.py", "modeling_ofb_vit.py"}
    assert names == {"README.md", "config.json", "model.safetensors", "stock", *code}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_a_dry_run_lists_what_would_be_sent(output, tmp_path, capsys):
    cli.publish(
        [str(output), "--repo_id", "lab/half", "--dry_run", "--output_dir", str(tmp_path / "out")]
    )
    said = capsys.readouterr().out
    assert "would be published to lab/half" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == PUBLISHED | {"stock"}
    twin = {
        f"stock/{name}"
        for name in ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    }
    files = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*.*")
        if path.is_file()
    }
    assert files == PUBLISHED | twin
    assert [line.split()[-1] for line in said.splitlines()[1:]] == sorted(
        files, key=lambda name: tmp_path / name
    )
    assert SubnetSpec.from_json((tmp_path / "out" / "subnet.json").read_text()).sizes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model_dir is missing"),
        (["{output}"], "--repo_id is missing"),
        (["{output}", "--dry_run"], "say where with --output_dir"),
        (["{empty}", "--repo_id", "a/b"], "has no config.json"),
        (
            ["{stock}", "--repo_id", "a/b"],
            "the classifier is a ViTForImageClassification; publish takes OFBViT",
        ),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(
    output, checkpoint, tmp_path, capsys, words, message
):
    words = [word.format(output=output, empty=tmp_path, stock=checkpoint) for word in words]
    with pytest.raises(SystemExit) as refusal:
        cli.publish(words)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
