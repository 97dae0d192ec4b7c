"""A classifier for other runtimes, ONNX Runtime or torch.export: written, read back, and compared
before it counts."""

import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.registry import describe, require_classifier

TOLERANCE = 1e-5
# The model is traced with the first of these batch sizes and must serve all of them.
BATCH_SIZES = (2, 1, 5)
INPUT, OUTPUT = "pixel_values", "logits"


class ExportError(RuntimeError):
    """What was exported does not compute what the model computes."""


@dataclass(frozen=True)
class Exported:
    """A file that another runtime can load.

    Args:
        path: the file; weights of more than 2 GB lie beside it.
        size: bytes of everything that was written.
        difference: largest difference of any logit from PyTorch's, over batches of 1, 2 and 5
            images.
    """

    path: Path
    size: int
    difference: float


def export_onnx(model: PreTrainedModel, output_dir: str | Path) -> Exported:
    """Writes `model.onnx`, in float32: `pixel_values` (B, C, H, W) to `logits` (B, labels), for any
    batch size B.

    Args:
        model: an image classifier, stock or ours. H and W are its `config.image_size`.
        output_dir: folder for the file, made if it is not there.

    Raises:
        UnsupportedArchitectureError: for models of other families.
        ImportError: without onnx, onnxscript and onnxruntime (`pip install "ofb-hf[onnx]"`).
        ExportError: if ONNX Runtime computes other logits, by more than 1e-5 of the largest.
            Nothing is written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  needed by torch.onnx
    except ImportError as error:
        raise ImportError(
            f'{error}; exporting to ONNX needs `pip install "ofb-hf[onnx]"`.'
        ) from error

    def write(classifier: nn.Module, images: Tensor, path: Path) -> None:
        batch = {INPUT: {0: torch.export.Dim("batch")}}
        names = {"input_names": [INPUT], "output_names": [OUTPUT]}
        program = torch.onnx.export(
            classifier, (images,), dynamo=True, dynamic_shapes=batch, verbose=False, **names
        )
        program.save(path)

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return _export(model, Path(output_dir) / "model.onnx", write, read)


def export_torch(model: PreTrainedModel, output_dir: str | Path) -> Exported:
    """Writes `model.pt2`, in float32, a program that `torch.export.load` reads without transformers
    or this package.

    Args:
        model, output_dir: as for `export_onnx`.

    Raises:
        UnsupportedArchitectureError: for models of other families.
        ExportError: if the program computes other logits, by more than 1e-5 of the largest. Nothing
            is written then.
    """

    def write(classifier: nn.Module, images: Tensor, path: Path) -> None:
        batch = {INPUT: {0: torch.export.Dim("batch")}}
        program = torch.export.export(classifier, (), {INPUT: images}, dynamic_shapes=batch)
        program.example_inputs = None  # would be stored as a pickle
        torch.export.save(program, path)

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        program = torch.export.load(path).module()
        return lambda images: program(**{INPUT: images})

    return _export(model, Path(output_dir) / "model.pt2", write, read)


FORMATS: dict[str, Callable[[PreTrainedModel, str | Path], Exported]] = {
    "onnx": export_onnx,
    "torch": export_torch,
}


class _Classifier(nn.Module):
    """Pixels in, logits out: no classes of transformers in what is exported."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def _export(
    model: PreTrainedModel,
    path: Path,
    write: Callable[[nn.Module, Tensor, Path], None],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
) -> Exported:
    """Writes aside, compares, and moves into place."""
    require_classifier(model)
    plain = copy.deepcopy(model).cpu().float().eval()
    plain.set_attn_implementation("eager")  # the only one that exporters trace in every family
    classifier = _Classifier(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as aside,
        _quiet(),
        torch.inference_mode(),
    ):
        written = Path(aside) / path.name
        write(classifier, _images(model, BATCH_SIZES[0]), written)
        difference = _difference(classifier, read(written), model)
        files = list(Path(aside).iterdir())
        size = sum(file.stat().st_size for file in files)
        for file in files:
            shutil.move(file, path.parent / file.name)
    return Exported(path, size, difference)


def _difference(
    expected: Callable[[Tensor], Tensor], got: Callable[[Tensor], Tensor], model: PreTrainedModel
) -> float:
    largest = 0.0
    for count in BATCH_SIZES:
        images = _images(model, count)
        wanted, found = expected(images), got(images)
        if wanted.shape != found.shape:
            raise ExportError(
                f"{count} images give logits of shape {tuple(found.shape)}, not "
                f"{tuple(wanted.shape)}."
            )
        difference = (wanted - found).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise ExportError(
                f"for {count} images the logits differ by {difference:.2g} from PyTorch's."
            )
        largest = max(largest, difference)
    return largest


def _images(model: PreTrainedModel, count: int) -> Tensor:
    """Random images in the model's own size: (count, C, H, W)."""
    architecture = describe(model.config)
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, architecture.num_channels, height, width, generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about operators of other packages and their own future."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
