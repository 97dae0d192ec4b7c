"""Generate commands that cannot work, and odd ones that can, from the settings' own descriptions.

Everything is drawn from a seed, so that a failing case has a number by which it can be run again:

    python tests/generated.py --invalid 200 --valid 100 --seed 0
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml
from factories import tiny_swin, tiny_vit
from PIL import Image
from transformers import (
    DeiTImageProcessorPil,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from ofb_hf import cli

COMMANDS = {
    "search": cli.SEARCH,
    "search-tokens": cli.SEARCH_TOKENS,
    "finetune": cli.FINETUNE,
    "compress": cli.COMPRESS,
    "evaluate": cli.EVALUATE,
    "plan": cli.PLAN,
}
CHOICES = ("augmentation", "preset", "basis", "importance_source", "distillation_type")
CHOICES += ("lr_scheduler_type", "optim", "save_strategy", "eval_strategy", "dtype")
# Numbers below zero that mean "not given", or are as good as others.
SIGNED = ("max_steps", "finetune_max_steps", "seed", "data_seed", "alpha_init")
SIGNED += ("importance_init_mean",)


@dataclass
class Place:
    """Where cases are made: files that are right, and a folder for those that are not."""

    checkpoint: Path
    images: Path
    folder: Path


@dataclass
class Case:
    """A command.

    Attributes:
        kind: what is odd about it. words: the command line. output: the folder it names, if any.
    """

    kind: str
    words: list[str]
    output: Path | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {' '.join(self.words)}"


def fields_of(command: str) -> list[Field]:
    """Return all settings of a command."""
    fields: list[Field] = []
    for each in COMMANDS[command].classes:
        fields += [field for field in dataclasses.fields(each) if field.init]
    return fields


def is_number(field: Field, kinds: tuple[type, ...] = (int, float)) -> bool:
    """Return whether a setting is a single number of these kinds, or may be one."""
    accepted = get_args(field.type) or (field.type,)
    accepted = [kind for kind in accepted if kind is not type(None)]
    return bool(accepted) and all(kind in kinds for kind in accepted) and bool not in accepted


def right_words(command: str, place: Place, output: Path | None) -> list[str]:
    """Return a short command that works."""
    if command == "plan":
        return ["plan", str(place.checkpoint), "--num_images", "8", "--use_cpu", "true"]
    if command == "compress":
        words = ["compress", str(place.checkpoint), str(place.images), "--target_macs", "0.6"]
        return [*words, "--output_dir", str(output), "--use_cpu", "true"]
    words = [command, "--model_name_or_path", str(place.checkpoint), "--data_dir"]
    words += [str(place.images), "--use_cpu", "true", "--report_to", "none"]
    if command == "evaluate":
        return words
    words += ["--max_steps", "2", "--per_device_train_batch_size", "8", "--output_dir", str(output)]
    return words


# ------------------------------------------------------------------------ commands that cannot work


def number_as_word(draw: random.Random, command: str, place: Place) -> list[str]:
    """A word where a number is wanted."""
    field = draw.choice([field for field in fields_of(command) if is_number(field)])
    return [f"--{field.name}", draw.choice(["many", "1,5", "0x", "", "1e", "half", "1.2.3"])]


def no_number(draw: random.Random, command: str, place: Place) -> list[str]:
    """A number that is none, or is infinite."""
    field = draw.choice([field for field in fields_of(command) if is_number(field, (float,))])
    return [f"--{field.name}", draw.choice(["nan", "inf", "-inf"])]


def below_zero(draw: random.Random, command: str, place: Place) -> list[str]:
    """A negative count or fraction."""
    of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = [
        field
        for field in fields_of(command)
        if is_number(field) and field.name not in of_transformers and field.name not in SIGNED
    ]
    return [f"--{draw.choice(fields).name}", draw.choice(["-1", "-3"])]


def no_choice(draw: random.Random, command: str, place: Place) -> list[str]:
    """A word that is not among those allowed."""
    fields = [field for field in fields_of(command) if field.name in CHOICES]
    if not fields:
        return number_as_word(draw, command, place)
    return [f"--{draw.choice(fields).name}", draw.choice(["best", "Adam", "none of them", "0"])]


def typo(draw: random.Random, command: str, place: Place) -> list[str]:
    """A setting with a letter too many in its middle."""
    name = draw.choice(fields_of(command)).name
    at = draw.randrange(1, len(name))
    return [f"--{name[:at]}q{name[at:]}", "1"]


def of_another_command(draw: random.Random, command: str, place: Place) -> list[str]:
    """A setting that another command has."""
    own = {field.name for field in fields_of(command)}
    others = {
        field.name for other in COMMANDS for field in fields_of(other) if field.name not in own
    }
    # argparse takes the beginning of a name for the name
    others = {name for name in others if not any(mine.startswith(name) for mine in own)}
    return [f"--{draw.choice(sorted(others))}", "1"]


def missing_path(draw: random.Random, command: str, place: Place) -> list[str]:
    """A file or folder that does not exist."""
    names = [
        field.name
        for field in fields_of(command)
        if field.name in ("model_name_or_path", "data_dir", "latency_table", "config_file")
    ]
    missing = place.folder / draw.choice(["nowhere", "no such/place", "ende.json"])
    return [f"--{draw.choice(names)}", str(missing)]


def broken_yaml(draw: random.Random, command: str, place: Place) -> list[str]:
    """A file of settings that is none, or holds what is no setting."""
    contents: list[bytes] = [
        b"- target_macs\n- 0.5\n",
        b"learning_rate: [1, 2\n",
        b"\x00\xff\xfe",
        b"just a sentence",
        yaml.safe_dump({"learning_rates": 0.1}).encode(),
        yaml.safe_dump({"seed": {"a": 1}}).encode(),
        yaml.safe_dump({"seed": "many"}).encode(),
        yaml.safe_dump({1: 2}).encode(),
    ]
    file = place.folder / f"{draw.randrange(10**9)}.yaml"
    file.write_bytes(draw.choice(contents))
    return ["--config", str(file)]


def broken_checkpoint(draw: random.Random, command: str, place: Place) -> list[str]:
    """A checkpoint that lacks something, or is of another kind."""
    copy = place.folder / f"checkpoint-{draw.randrange(10**9)}"
    shutil.copytree(place.checkpoint, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    content = json.loads(config.read_text())
    damages: list[Callable[[], Any]] = [
        config.unlink,
        weights.unlink,
        lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        lambda: weights.write_bytes(b""),
        lambda: config.write_text("{"),
        lambda: config.write_text(json.dumps(content | {"model_type": "bert"})),
        lambda: config.write_text(json.dumps(content | {"hidden_size": 3 * 7})),
        lambda: config.write_text(json.dumps(content | {"num_hidden_layers": 9})),
    ]
    draw.choice(damages)()
    return ["--model_name_or_path", str(copy)]


def broken_images(draw: random.Random, command: str, place: Place) -> list[str]:
    """A folder without usable images."""
    if command == "plan":
        return missing_path(draw, command, place)
    copy = place.folder / f"images-{draw.randrange(10**9)}"
    kind = draw.choice(["empty", "text", "flat file", "no images", "zero bytes", "other labels"])
    if kind == "flat file":
        copy.write_text("not a folder")
    elif kind == "empty":
        copy.mkdir()
    elif kind == "text":
        copy.mkdir()
        (copy / "notes.txt").write_text("no image")
    elif kind == "no images":
        for label in ("red", "green", "blue"):
            (copy / "train" / label).mkdir(parents=True)
    elif command == "compress" and kind == "other labels":
        copy.mkdir()  # it needs no labels
    else:
        shutil.copytree(place.images, copy)
        for path in sorted(copy.rglob("*.png")):
            if kind == "zero bytes":
                path.write_bytes(b"")
        if kind == "other labels":
            for number, folder in enumerate(sorted(copy.glob("*/*"))):
                folder.rename(folder.with_name(f"animal {number % 3}"))
    return ["--images" if command == "compress" else "--data_dir", str(copy)]


INVALID = (
    number_as_word,
    no_number,
    below_zero,
    no_choice,
    typo,
    of_another_command,
    missing_path,
    broken_yaml,
    broken_checkpoint,
    broken_images,
)


def invalid_cases(seed: int, count: int, place: Place) -> Iterator[Case]:
    """Yield commands that cannot work, all kinds and commands in turn."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        kind = INVALID[number % len(INVALID)]
        command = draw.choice(list(COMMANDS))
        output = place.folder / f"out-{number}"
        words = right_words(command, place, output)
        yield Case(kind.__name__, words + kind(draw, command, place), output)


# ---------------------------------------------------------------------- odd commands that can work

MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK")
NAMES = ("cat", "a dog", "Käse & Brot", "x", "猫", "n01440764", "0", "tench, Tinca tinca", "-3")
FORMATS = {"RGB": "png jpg webp bmp tiff gif", "L": "png jpg bmp tiff", "RGBA": "png webp tiff"}
FORMATS |= {"P": "png gif bmp", "LA": "png", "1": "png bmp tiff", "CMYK": "jpg tiff"}
MEANS = ([0.5, 0.5, 0.5], [0.485, 0.456, 0.406], [0.0, 0.0, 0.0])
STDS = ([0.5, 0.5, 0.5], [0.229, 0.224, 0.225], [1.0, 1.0, 1.0])
LAYOUTS = (("train", "test"), ("train", "validation"), ("train", "val"), ("train", "valid"))


@dataclass
class ValidCase(Case):
    """A command that works, and the images that its result is measured on.

    Attributes:
        evaluated: file -> name of its class.
    """

    evaluated: dict[Path, str] = dataclasses.field(default_factory=dict)
    checkpoint: Path = Path()


def odd_image(draw: random.Random, mode: str) -> Image.Image:
    """Return noise of an odd size."""
    sides = [draw.choice([1, 2, 7, 16, 33, 120]) for _ in range(2)]
    numbers = np.random.default_rng(draw.randrange(2**32))
    low = draw.randrange(200)
    pixels = numbers.integers(low, low + 56, (*sides, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if mode == "LA" else mode)
    return image.convert("LA") if mode == "LA" else image


def odd_folder(
    draw: random.Random, folder: Path, names: list[str], layout: tuple[str, str]
) -> dict[Path, str]:
    """Write class folders of odd images; return those of the second split with their classes."""
    evaluated = {}
    for split in layout:
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(draw.randint(3, 6)):
                mode = draw.choice(MODES)
                suffix = draw.choice(FORMATS[mode].split())
                stem = draw.choice(["img", "IMG 0", "bild.v2", "ü", "a,b", "x(1)"])
                path = folder / split / name / f"{stem}{number}.{suffix}"
                odd_image(draw, mode).save(path)
                if split == layout[1]:
                    evaluated[path] = name
    return evaluated


def odd_processor(draw: random.Random, sides: tuple[int, int]) -> Any:
    """Return an image processor that gives images of these sides."""
    height, width = sides
    statistics = {"image_mean": draw.choice(MEANS), "image_std": draw.choice(STDS)}
    statistics["do_normalize"] = draw.random() < 0.9
    resample = draw.choice([0, 2, 3])
    size = {"height": height, "width": width}
    if draw.random() < 0.5:
        return ViTImageProcessorPil(size=size, resample=resample, **statistics)
    larger = {"height": height + 5, "width": width + 3}
    return DeiTImageProcessorPil(size=larger, crop_size=size, resample=resample, **statistics)


def odd_checkpoint(draw: random.Random, folder: Path, names: list[str]) -> None:
    """Write a tiny classifier of these classes, with random weights."""
    order = list(names)
    draw.shuffle(order)
    labels = {
        "id2label": dict(enumerate(order)),
        "label2id": {name: number for number, name in enumerate(order)},
        "num_labels": len(order),
    }
    if draw.random() < 0.3:
        sides = (16, 16)
        model = tiny_swin(seed=draw.randrange(1000), **labels)
    else:
        sides = draw.choice([(16, 16), (12, 12), (24, 24), (16, 24)])
        model = tiny_vit(
            seed=draw.randrange(1000),
            image_size=sides,
            num_hidden_layers=draw.choice([1, 2, 3]),
            qkv_bias=draw.random() < 0.8,
            **labels,
        )
    model.save_pretrained(folder)
    odd_processor(draw, sides).save_pretrained(folder)


def valid_cases(seed: int, count: int, folder: Path) -> Iterator[ValidCase]:
    """Yield odd commands that work, with all that they need in a folder of their own each."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        here = folder / f"case-{number}"
        names = draw.sample(NAMES, draw.randint(2, 5))
        checkpoint = here / draw.choice(["model", "my model", "vit.v1"])
        odd_checkpoint(draw, checkpoint, names)
        evaluated = odd_folder(draw, here / "images", names, draw.choice(LAYOUTS))
        place = Place(checkpoint, here / "images", here)
        command = draw.choice(["compress", "compress", "finetune", "search"])
        output = here / draw.choice(["out", "a/b", "out put"])
        words = right_words(command, place, output)
        if command == "compress":
            words += ["--num_images", str(draw.choice([2, 3, 64]))]
            words += ["--basis", draw.choice(["given", "equivalent"])]
        elif command == "search":
            words += ["--target_macs", "0.7", "--finetune_max_steps", "1", "--max_steps", "8"]
        yield ValidCase(command, words, output, evaluated, checkpoint)


def by_pipeline(folder: Path, evaluated: dict[Path, str]) -> dict[Path, str]:
    """Return the first class of every image, as `transformers.pipeline` gives it file by file."""
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    return {path: classify(str(path), top_k=1)[0]["label"] for path in evaluated}


def differences(case: ValidCase, results: dict[str, Any]) -> list[str]:
    """Return what a result says otherwise than `transformers.pipeline` finds, file by file."""
    wrong = []
    model = "finetuned" if "finetuned" in results else "compressed"
    found = {"dense": by_pipeline(case.checkpoint, case.evaluated)}
    found[model] = by_pipeline(case.output, case.evaluated)
    for name, labels in found.items():
        right = sum(labels[path] == label for path, label in case.evaluated.items())
        top1 = 100 * right / len(case.evaluated)
        if abs(results[name]["top1"] - top1) > 1e-3:
            wrong.append(f"{name}: top1 {results[name]['top1']}, by pipeline {top1:.4f}")
        if results[name]["num_examples"] != len(case.evaluated):
            wrong.append(f"{name}: {results[name]['num_examples']} images of {len(case.evaluated)}")
    if "agreement" in results[model]:
        same = sum(found["dense"][path] == found[model][path] for path in case.evaluated)
        agreement = 100 * same / len(case.evaluated)
        if abs(results[model]["agreement"] - agreement) > 1e-3:
            wrong.append(f"agreement {results[model]['agreement']}, by pipeline {agreement:.4f}")
    return wrong


# ------------------------------------------------------------------------------------ running them


def refusal_fault(case: Case) -> str | None:
    """Run a command that cannot work; return what is wrong with how it is refused, if anything."""
    errors = io.StringIO()
    outcome = "it was accepted"
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(case.words)
        except SystemExit as stop:
            outcome = f"exit status {stop.code}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
    said = errors.getvalue()
    if outcome != "exit status 2":
        return outcome
    if "error: " not in said or "Traceback" in said:
        return f"it says {said[-300:]!r}"
    if case.output is not None and case.output.exists():
        return "its output folder was written to"
    return None


def result_faults(case: ValidCase) -> list[str]:
    """Run a command that works; return what its result says otherwise than `pipeline`."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            cli.main(case.words)
        except SystemExit as stop:
            return [f"exit status {stop.code}: {errors.getvalue()[-300:]}"]
    results = json.loads((case.output / "eval_results.json").read_text(encoding="utf-8"))
    return differences(case, results)


def write_place(folder: Path) -> Place:
    """Write a checkpoint and images that are right, and a folder for those that are not."""
    names = ["red", "green", "blue"]
    draw = random.Random(0)
    checkpoint, images, broken = folder / "vit-tiny", folder / "images", folder / "broken"
    tiny_vit(
        id2label=dict(enumerate(sorted(names))),
        label2id={name: number for number, name in enumerate(sorted(names))},
    ).save_pretrained(checkpoint)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(checkpoint)
    odd_folder(draw, images, names, ("train", "test"))
    broken.mkdir()
    return Place(checkpoint, images, broken)


def main() -> None:
    """Run as many cases as asked for, and print those that fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--invalid", type=int, default=200)
    parser.add_argument("--valid", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, case in enumerate(
            invalid_cases(wanted.seed, wanted.invalid, write_place(folder))
        ):
            if fault := refusal_fault(case):
                failed += 1
                sys.stdout.write(f"invalid {number}: {case}\n    {fault}\n")
        for number, valid in enumerate(valid_cases(wanted.seed, wanted.valid, folder)):
            if faults := result_faults(valid):
                failed += 1
                sys.stdout.write(f"valid {number}: {valid}\n    {faults}\n")
    sys.stdout.write(
        f"{wanted.invalid} invalid commands, {wanted.valid} valid ones: {failed} failed\n"
    )
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
