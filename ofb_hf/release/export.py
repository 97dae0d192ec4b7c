"""Export a classifier to ONNX or torch.export: written, read back, compared, and only then kept."""

import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.description import image_sides
from ..families.registry import describe, require_classifier

# Largest accepted difference of a logit, relative to the largest logit (or to 1, if that is more).
TOLERANCE = 1e-5
# The model is traced with the first of these batch sizes and must serve all of them.
BATCH_SIZES = (2, 1, 5)
INPUT = "pixel_values"
OUTPUT = "logits"


class ExportError(RuntimeError):
    """Report that an exported file does not compute what the model computes."""


@dataclass(frozen=True)
class Exported:
    """Describe a file that another runtime can load.

    Args:
        path: the file; weights of more than 2 GB are in further files next to it.
        size: bytes of all files that were written.
        difference: largest difference of any logit from PyTorch's, over batches of 1, 2 and 5
            images.
    """

    path: Path
    size: int
    difference: float


def export_onnx(model: PreTrainedModel, output_dir: str | Path) -> Exported:
    """Write `model.onnx` in float32: `pixel_values` (B, C, H, W) to `logits` (B, labels), any B.

    Args:
        model: an image classifier, of transformers or of this package. H and W are its
            `config.image_size`.
        output_dir: folder for the file, created if it does not exist.

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
        program = torch.onnx.export(
            classifier,
            (images,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamo=True,
            dynamic_shapes=_any_batch_size(),
            verbose=False,
        )
        _drop_inner_shapes_(program.model.graph)
        program.save(path)

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
            return torch.from_numpy(logits)

        return run

    return _export(model, Path(output_dir) / "model.onnx", write, read)


def _drop_inner_shapes_(graph: Any) -> None:
    """Leave out of an exported graph what runtimes find out by themselves: shapes inside of it.

    ONNX Runtime's quantization transposes weights, and stops where a stated shape contradicts it.

    Args:
        graph: an `onnx_ir.Graph`; inputs, outputs and weights keep their shapes.
    """
    inner = list(graph.initializers.values())
    for node in graph:
        inner += node.outputs
    for value in inner:
        if not value.is_graph_output():
            value.shape = value.type = None


def export_torch(model: PreTrainedModel, output_dir: str | Path) -> Exported:
    """Write `model.pt2`, as `export_onnx` does, for `torch.export.load`.

    Neither transformers nor this package is needed to read it.

    Args:
        model: as for `export_onnx`.
        output_dir: as for `export_onnx`.

    Raises:
        UnsupportedArchitectureError: for models of other families.
        ExportError: if the program computes other logits, by more than 1e-5 of the largest. Nothing
            is written then.
    """

    def write(classifier: nn.Module, images: Tensor, path: Path) -> None:
        program = torch.export.export(
            classifier, (), {INPUT: images}, dynamic_shapes=_any_batch_size()
        )
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


def _any_batch_size() -> dict[str, Any]:
    """Return the exporters' description of shapes: axis 0 of the images may have any length."""
    return {INPUT: {0: torch.export.Dim("batch")}}


class _Classifier(nn.Module):
    """Module from pixels to logits, so that no class of transformers is in the exported file."""

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
    """Export aside, compare with the model, and move the files into place.

    Args:
        model: to export.
        path: file to write.
        write: (classifier, example images, file) -> None.
        read: file -> function from images to logits.
    """
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
        example = _random_images(model, BATCH_SIZES[0])
        write(classifier, example, written)
        difference = _largest_difference(classifier, read(written), model)
        size = 0
        for file in list(Path(aside).iterdir()):
            size += file.stat().st_size
            shutil.move(file, path.parent / file.name)
    return Exported(path, size, difference)


def _largest_difference(
    classifier: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    model: PreTrainedModel,
) -> float:
    """Return the largest difference of any logit; raise ExportError if that is too much."""
    largest = 0.0
    for count in BATCH_SIZES:
        images = _random_images(model, count)
        expected = classifier(images)  # (count, labels)
        found = exported(images)
        if expected.shape != found.shape:
            raise ExportError(
                f"{count} images give logits of shape {tuple(found.shape)}, not "
                f"{tuple(expected.shape)}."
            )
        difference = (expected - found).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:  # also where it is NaN
            raise ExportError(
                f"for {count} images the logits differ by {difference:.2g} from PyTorch's."
            )
        largest = max(largest, difference)
    return largest


def _random_images(model: PreTrainedModel, count: int) -> Tensor:
    """Return random images in the model's own size, (count, C, H, W)."""
    channels = describe(model.config).num_channels
    height, width = image_sides(model.config)
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, channels, height, width, generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings about operators of other packages and about their future."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
