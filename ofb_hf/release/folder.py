"""The folder that is published: everything about a checkpoint, and nothing about the machine it was
made on."""

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
from ..families.loading import load_complete_classifier
from .card import final_results, plain_card, read_results
from .leaks import require_no_token
from .stock import has_stock_twin, pad_to_stock

CARD, RESULTS, SUBNET, PREPROCESSOR = (
    "README.md",
    "eval_results.json",
    "subnet.json",
    "preprocessor_config.json",
)
# What of a search's output folder is published, where it is there; everything else stays.
OPTIONAL = (
    PREPROCESSOR,
    SUBNET,
    CARD,
    RESULTS,
    "search_history.jsonl",
    "search.png",
    "finetune.png",
)
EVALUATIONS = ".eval_results"
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")


def is_ours(path: str) -> bool:
    """Whether a file of a repository is one that this package publishes, of whatever model."""
    code = {f"{cls.__module__.rpartition('.')[2]}.py" for row in models.REGISTERED for cls in row}
    return path in {CONFIG_NAME, SAFE_WEIGHTS_NAME, *OPTIONAL, *code} or path.startswith(
        f"{EVALUATIONS}/"
    )


def stage(model: PreTrainedModel | str | Path, folder: Path, secrets: set[str]) -> PreTrainedModel:
    """Fills a new folder with what is published.

    Args:
        model: an output folder of a search or of `save_pretrained`, or a model.
        folder: to be made.
        secrets: what must not be in a `training_args.bin` beside the model, besides tokens.

    Returns:
        The classifier that is in the folder.

    Raises:
        ValueError: for a folder without a whole classifier of ours, or with results that cannot be
            read.
        LeakError: for a token in a `training_args.bin`.
    """
    folder.mkdir()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        _copy(Path(model), folder, secrets)
    loaded = load_complete_classifier(folder)
    classes = next((row for row in models.REGISTERED if type(loaded) is row[2]), None)
    if classes is None:
        ours = ", ".join(row[2].__name__ for row in models.REGISTERED)
        raise ValueError(
            f"the classifier is a {type(loaded).__name__}; publish takes {ours}. Others have "
            f"their own push_to_hub."
        )
    _add_code(folder, classes)
    results = read_results(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    _describe_weights(folder, loaded, results.get("source", {}))
    if "/" in results.get("data", ""):
        _add_evaluation(folder, results)
    if not (folder / CARD).is_file():
        schedule = getattr(loaded.config, "token_schedule", None)
        card = plain_card(count_macs(loaded), count_params(loaded), schedule)
        (folder / CARD).write_text(card, encoding="utf-8")
    return loaded


def _copy(source: Path, folder: Path, secrets: set[str]) -> None:
    for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME):
        if not (source / name).is_file():
            raise ValueError(
                f"{source} has no {name}; give the output folder of a search, or a model."
            )
    if (source / TRAINING_ARGS_NAME).is_file():
        require_no_token(source / TRAINING_ARGS_NAME, secrets)
    for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME, *OPTIONAL):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def stage_stock(model: PreTrainedModel, main: Path, folder: Path) -> bool:
    """Fills a new folder with the stock twin of a ViT, its image processor and its card.

    Returns:
        Whether there is such a twin; else there is no folder either.
    """
    if not has_stock_twin(model):
        return False
    pad_to_stock(model).save_pretrained(folder)
    if (main / PREPROCESSOR).is_file():
        AutoImageProcessor.from_pretrained(main).save_pretrained(folder)
    shutil.copyfile(main / CARD, folder / CARD)
    return True


def _add_code(folder: Path, classes: tuple[type, ...]) -> None:
    """The two files that define the model, and the entries of the config by which transformers
    finds them."""
    auto_map = {}
    for auto, cls in zip(AUTO_CLASSES, classes, strict=True):
        file = Path(models.__file__).with_name(f"{cls.__module__.rpartition('.')[2]}.py")
        shutil.copyfile(file, folder / file.name)
        auto_map[auto] = f"{file.stem}.{cls.__name__}"
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["auto_map"] = auto_map
    (folder / CONFIG_NAME).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _add_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """Top-1 in the format in which the Hub collects results by data set, for data that is on the
    Hub."""
    data, final = results["data"], final_results(results)
    notes = f"top-1 in percent on {final['num_examples']:,} images"
    entry = EvalResultEntry(data, "image-classification", final["top1"], notes=notes)
    file = folder / EVALUATIONS / f"{data.replace('/', '--')}.yaml"
    file.parent.mkdir()
    file.write_text(
        yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8"
    )


def _describe_weights(folder: Path, model: PreTrainedModel, source: dict[str, Any]) -> None:
    """Writes into the header of the weights what they are; the tensors stay as they are, byte for
    byte."""
    file, subnet = folder / SAFE_WEIGHTS_NAME, folder / SUBNET
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    metadata = header.pop("__metadata__", {}) | {"format": "pt", "ofb_hf_version": __version__}
    metadata |= {"macs": str(count_macs(model)), "params": str(count_params(model))}
    metadata |= {f"source_{key}": str(value) for key, value in source.items() if value is not None}
    if subnet.is_file():
        metadata["subnet_sha256"] = hashlib.sha256(subnet.read_bytes()).hexdigest()
    # Not by safetensors' own function: it orders these entries by chance, and publishing again
    # would change the file.
    words = json.dumps(
        {"__metadata__": dict(sorted(metadata.items()))} | header, separators=(",", ":")
    ).encode()
    words += b" " * (-len(words) % 8)
    aside = file.with_name(f"new-{file.name}")
    aside.write_bytes(len(words).to_bytes(8, "little") + words + content[begin:])
    # not into the file itself, which the loaded model may have mapped into its memory
    aside.replace(file)
