"""Fill the folder that is published: all about a checkpoint, nothing about the machine it is on."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .. import models
from .._version import __version__
from ..cost.counting import count_macs, count_params
from ..durable import move
from ..families.loading import load_complete_classifier
from .card import final_results, plain_card, read_results
from .leaks import require_no_token
from .stock import has_stock_twin, pad_to_stock

CARD = "README.md"
RESULTS = "eval_results.json"
SUBNET = "subnet.json"
PREPROCESSOR = "preprocessor_config.json"
# What is published of an output folder if it is there. Everything else stays, pictures of the data
# for example.
OPTIONAL = (
    PREPROCESSOR,
    SUBNET,
    CARD,
    RESULTS,
    "search_history.jsonl",
    "search.png",
    "finetune.png",
    "compress.png",
)
# Larger than any weights, in bytes.
ONE_FILE = 2**62
EVALUATIONS = ".eval_results"
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")


def is_published_file(path: str) -> bool:
    """Return whether a file of a repository is one that `publish` writes, for whatever model."""
    names = {CONFIG_NAME, SAFE_WEIGHTS_NAME, *OPTIONAL}
    for classes in models.REGISTERED:
        names |= {_code_file(cls).name for cls in classes}
    return path in names or path.startswith(f"{EVALUATIONS}/")


def stage(model: PreTrainedModel | str | Path, folder: Path, secrets: set[str]) -> PreTrainedModel:
    """Fill a new folder with what is published.

    Args:
        model: an output folder of a search or of `save_pretrained`, or a model.
        folder: to create.
        secrets: strings, besides tokens, that a `training_args.bin` in the output folder must not
            hold.

    Returns:
        The classifier in the folder.

    Raises:
        ValueError: for a folder without a complete classifier of this package, or with results that
            cannot be read.
        LeakError: for a token in a `training_args.bin`.
    """
    folder.mkdir()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, max_shard_size=ONE_FILE)
    else:
        _copy(Path(model), folder, secrets)
    loaded = load_complete_classifier(folder)
    _add_code(folder, _registered_classes(loaded))
    results = {}
    if (folder / RESULTS).is_file():
        results = read_results(folder / RESULTS)
    _describe_weights(folder, loaded, results.get("source", {}))
    # a data set on the Hub; without labels there is no accuracy
    is_measured = "top1" in final_results(results) if results else False
    if "/" in results.get("data", "") and is_measured and not results.get("held_out"):
        _add_evaluation(folder, results)
    if not (folder / CARD).is_file():
        schedule = getattr(loaded.config, "token_schedule", None)
        card = plain_card(count_macs(loaded), count_params(loaded), schedule)
        (folder / CARD).write_text(card, encoding="utf-8")
    return loaded


def _registered_classes(model: PreTrainedModel) -> tuple[type, ...]:
    """Return the config, encoder and classifier class of a model of this package."""
    for classes in models.REGISTERED:
        if type(model) is classes[2]:
            return classes
    classifiers = ", ".join(classes[2].__name__ for classes in models.REGISTERED)
    raise ValueError(
        f"the classifier is a {type(model).__name__}; publish takes {classifiers}. Others have "
        "their own push_to_hub."
    )


def _copy(source: Path, folder: Path, secrets: set[str]) -> None:
    """Copy what is published of an output folder."""
    if not (source / CONFIG_NAME).is_file():
        raise ValueError(
            f"{source} has no {CONFIG_NAME}; give the output folder of a search, or a model."
        )
    # Not published, but the Trainer of transformers pickles its arguments with the token in them,
    # and a folder like this one is easily passed on.
    if (source / TRAINING_ARGS_NAME).is_file():
        require_no_token(source / TRAINING_ARGS_NAME, secrets)
    if not (source / SAFE_WEIGHTS_NAME).is_file():
        # in shards, or in a format that is not published: transformers reads both
        load_complete_classifier(source).save_pretrained(folder, max_shard_size=ONE_FILE)
    for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME, *OPTIONAL):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def stage_stock(model: PreTrainedModel, main: Path, folder: Path) -> bool:
    """Fill a new folder with the stock twin of a ViT, its image processor and its card.

    Args:
        model: the classifier.
        main: folder that `stage` has filled.
        folder: to create.

    Returns:
        Whether the model has a stock twin; otherwise no folder is created.
    """
    if not has_stock_twin(model):
        return False
    pad_to_stock(model).save_pretrained(folder)
    if (main / PREPROCESSOR).is_file():
        # Loaded and saved, so that the twin's file is written as transformers writes it.
        AutoImageProcessor.from_pretrained(main).save_pretrained(folder)
    shutil.copyfile(main / CARD, folder / CARD)
    return True


def _code_file(cls: type) -> Path:
    """Return the file of `models/` that defines a class."""
    module = cls.__module__.rpartition(".")[2]
    return Path(models.__file__).with_name(f"{module}.py")


def _add_code(folder: Path, classes: tuple[type, ...]) -> None:
    """Add the two files that define the model, and the config entries that name its classes."""
    auto_map = {}
    for auto_class, cls in zip(AUTO_CLASSES, classes, strict=True):
        file = _code_file(cls)
        shutil.copyfile(file, folder / file.name)
        auto_map[auto_class] = f"{file.stem}.{cls.__name__}"
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["auto_map"] = auto_map  # by which transformers finds the code of a checkpoint
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(content, encoding="utf-8")


def _add_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """Add top-1 in the format in which the Hub collects results by data set."""
    data = results["data"]
    final = final_results(results)
    notes = f"top-1 in percent on {final['num_examples']:,} images"
    entry = EvalResultEntry(data, "image-classification", final["top1"], notes=notes)
    content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    file = folder / EVALUATIONS / f"{data.replace('/', '--')}.yaml"
    file.parent.mkdir()
    file.write_text(content, encoding="utf-8")


def _describe_weights(folder: Path, model: PreTrainedModel, source: dict[str, Any]) -> None:
    """Write cost, source and subnet of a checkpoint into the header of its weights.

    The tensors stay as they are, byte for byte.

    Args:
        folder: with the weights, and the subnet if there is one.
        model: the same model, loaded.
        source: the entry of `eval_results.json`: model, revision, ...
    """
    file = folder / SAFE_WEIGHTS_NAME
    # A safetensors file: the length of the header in 8 bytes, the header as JSON, the tensors.
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    tensors = content[begin:]

    metadata = header.pop("__metadata__", {})
    metadata["format"] = "pt"
    metadata["ofb_hf_version"] = __version__
    metadata["macs"] = str(count_macs(model))
    metadata["params"] = str(count_params(model))
    for key, value in source.items():
        if value is not None:
            metadata[f"source_{key}"] = str(value)
    if (folder / SUBNET).is_file():
        subnet = (folder / SUBNET).read_bytes()
        metadata["subnet_sha256"] = hashlib.sha256(subnet).hexdigest()

    # Not written by safetensors itself: it orders these entries at random, so publishing the same
    # checkpoint again would change the file.
    header = {"__metadata__": dict(sorted(metadata.items()))} | header
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes
    length = len(encoded).to_bytes(8, "little")
    # Not into the file itself, which the loaded model may have mapped into its memory.
    aside = file.with_name(f"new-{file.name}")
    aside.write_bytes(length + encoded + tensors)
    move(aside, file)
