"""Images with a number in their pixels, in the formats that streams are read from, and streams."""

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from ofb_hf.data import DataArguments, ImageStream, load_image_data

LABELS = ("cat", "dog", "emu")
# Awkward on purpose: no two shards are equally long, and no shard is a whole number of row groups
# of 4.
SHARD_ROWS = (10, 11, 13, 14, 15, 17, 18, 9)
NUM_IMAGES = sum(SHARD_ROWS)


def picture(number: int) -> bytes:
    """Return a PNG file of 16 x 16 pixels, all of one colour that encodes its number."""
    file = io.BytesIO()
    PILImage.new("RGB", (16, 16), (number // 256, number % 256, 7)).save(file, "PNG")
    return file.getvalue()


def number_of(image: PILImage.Image) -> torch.Tensor:
    """Return the number of an image; a transform."""
    red, green, _ = image.getpixel((0, 0))
    return torch.tensor(256 * red + green)


def noisy_number_of(image: PILImage.Image) -> torch.Tensor:
    """Return an image's number and noise, (2,); a transform with random numbers."""
    return torch.stack([number_of(image).double(), torch.rand((), dtype=torch.float64)])


def parquet(
    contents: Sequence[bytes | None], first: int = 0, classes: Sequence[str] = LABELS
) -> bytes:
    """Return a parquet file of image files in row groups of 4, with labels in turn."""
    labels = [(first + index) % len(classes) for index in range(len(contents))]
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": labels}
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    file = io.BytesIO()
    Dataset.from_dict(rows, features=features).to_parquet(file, batch_size=4)
    return file.getvalue()


def repository(broken: Sequence[int] = ()) -> dict[str, bytes]:
    """Return a data set as it is on the Hub, path -> content; images in `broken` are cut off."""
    files = {"README.md": b"---\nlicense: mit\n---\n# Numbers\n"}
    first = 0
    for shard, count in enumerate(SHARD_ROWS):
        contents = [picture(n)[: 40 if n in broken else None] for n in range(first, first + count)]
        files[f"data/train-{shard:05d}-of-{len(SHARD_ROWS):05d}.parquet"] = parquet(contents, first)
        first += count
    files["data/validation-00000-of-00001.parquet"] = parquet([picture(n) for n in range(500, 506)])
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files into a folder, and return it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def archive(numbers: Sequence[int]) -> bytes:
    """Return a WebDataset shard: images with their class as an integer."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            for suffix, content in (
                ("png", picture(number)),
                ("cls", str(number % len(LABELS)).encode()),
            ):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def stream(
    folder: Path,
    transform: Callable[[PILImage.Image], torch.Tensor] = number_of,
    seed: int = 1,
    **kwargs: Any,
) -> ImageStream:
    """Return the training split of a folder, streamed with a small buffer."""
    args = DataArguments(data_dir=str(folder), streaming=True, **({"shuffle_buffer": 8} | kwargs))
    return ImageStream(load_image_data(args).train, transform, seed)


def numbers(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    """Return the numbers of the images of some batches."""
    return [number for batch in batches for number in batch["pixel_values"].tolist()]
