"""Exported files compute what the model computes, in runtimes that know nothing of it."""

import json
import sys
import zipfile

import numpy
import onnx
import onnxruntime
import pytest
import torch
from factories import non_uniform_swin, non_uniform_vit, tiny_images, tiny_model
from onnxruntime.quantization import quantize_dynamic
from runs import run_code
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from ofb_hf import cli
from ofb_hf.families.description import UnsupportedArchitectureError
from ofb_hf.release import export
from ofb_hf.release.export import FORMATS, ExportError, export_onnx, export_torch

MODELS = {
    "vit": lambda: tiny_model("vit"),
    "swin": lambda: tiny_model("swin"),
    "ofb_vit": non_uniform_vit,
    "ofb_swin": non_uniform_swin,
}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small ViT of unequal widths and its image processor."""
    folder = tmp_path / "checkpoint"
    non_uniform_vit().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def logits_of(model, images):
    with torch.no_grad():
        return model.eval()(images).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit", pytest.param("swin", marks=pytest.mark.thorough), "ofb_vit", "ofb_swin"]
)
def test_onnx_runtime_computes_the_same_for_every_batch_size(tmp_path, name):
    model = MODELS[name]()
    done = export_onnx(model, tmp_path)
    assert done.path == tmp_path / "model.onnx"
    assert done.size == done.path.stat().st_size
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    size = model.config.image_size
    assert (pixels.name, pixels.shape[1:], logits.name) == (
        "pixel_values",
        [3, size, size],
        "logits",
    )
    for count in (1, 3, 8):
        images = tiny_images(count=count, size=size, seed=count)
        (found,) = session.run(None, {"pixel_values": images.numpy()})
        numpy.testing.assert_allclose(found, logits_of(model, images).numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ofb_vit", "ofb_swin"])
def test_onnx_runtime_quantizes_the_file_as_it_is(tmp_path, name):
    """Stated shapes of what is inside of the graph stopped it."""
    model = MODELS[name]()
    done = export_onnx(model, tmp_path)
    quantized = tmp_path / "int8.onnx"
    quantize_dynamic(done.path, quantized)
    kinds = {weight.data_type for weight in onnx.load(quantized).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    session = onnxruntime.InferenceSession(quantized, providers=["CPUExecutionProvider"])
    images = tiny_images(count=8, size=model.config.image_size)
    (found,) = session.run(None, {"pixel_values": images.numpy()})
    wanted = logits_of(model, images)
    difference = torch.from_numpy(found) - wanted
    assert difference.norm() < 0.2 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_program_of_torch_needs_no_transformers_and_no_pickle(tmp_path, name):
    model = MODELS[name]()
    done = export_torch(model, tmp_path / "new")
    with zipfile.ZipFile(done.path) as archive:
        assert not [
            entry
            for entry in archive.namelist()
            if archive.read(entry)[:1] == b"\x80" and "weight" not in entry
        ]
        (samples,) = [entry for entry in archive.infolist() if "sample_inputs" in entry.filename]
        assert samples.file_size == 0
    images = tiny_images(count=3, size=model.config.image_size)
    torch.save(images, tmp_path / "images")
    program = (
        "import sys, torch\n"
        "sys.modules['transformers'] = sys.modules['ofb_hf'] = None\n"
        f"images = torch.load({str(tmp_path / 'images')!r}, weights_only=True)\n"
        f"logits = torch.export.load({str(done.path)!r}).module()(pixel_values=images)\n"
        "print(logits.tolist())\n"
    )
    status, said = run_code(tmp_path, program)
    assert status == 0, said[-3000:]
    torch.testing.assert_close(
        torch.tensor(json.loads(said.splitlines()[-1])), logits_of(model, images), rtol=0, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_half_precision_is_exported_as_float32_and_the_model_stays(tmp_path, kind):
    model = non_uniform_vit().to(torch.bfloat16).train()
    implementation = model.config._attn_implementation
    assert FORMATS[kind](model, tmp_path).difference < 1e-4
    assert model.dtype == torch.bfloat16
    assert model.training
    assert model.config._attn_implementation == implementation
    if kind == "onnx":
        weights = onnx.load(tmp_path / "model.onnx").graph.initializer
        assert onnx.TensorProto.BFLOAT16 not in {weight.data_type for weight in weights}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, kind):
    (tmp_path / "model.onnx").write_text("of yesterday")

    class Fickle(export._Classifier):
        def forward(self, pixel_values):
            return super().forward(pixel_values) + (0 if torch.compiler.is_exporting() else 1e-3)

    monkeypatch.setattr(export, "_Classifier", Fickle)
    with pytest.raises(
        ExportError, match=r"for 2 images the logits differ by 0\.001 from PyTorch's"
    ):
        FORMATS[kind](non_uniform_vit(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "of yesterday"


def test_without_the_extra_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'onnxruntime.*pip install "ofb-hf\[onnx\]"'):
        export_onnx(non_uniform_vit(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_models_are_refused_by_name(tmp_path):
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    with pytest.raises(UnsupportedArchitectureError, match="ResNetForImageClassification"):
        export_torch(resnet, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_the_command_writes_a_folder(checkpoint, tmp_path, capsys, kind, file):
    cli.main(["export", str(checkpoint), "--format", kind, "--output_dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        file,
        "config.json",
        "preprocessor_config.json",
    }
    size = (tmp_path / "out" / file).stat().st_size
    assert f"{file} ({size:,} bytes); logits differ by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model_name_or_path is missing"),
        (["CHECKPOINT"], "--output_dir is missing"),
        (["CHECKPOINT", "--output_dir", "CHECKPOINT"], "is not an empty folder; give a new one"),
        (
            ["CHECKPOINT", "--output_dir", "NEW", "--format", "tflite"],
            "known formats are onnx, torch",
        ),
        (["NOWHERE", "--output_dir", "NEW"], "has no image processor"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    checkpoint, tmp_path, capsys, words, message
):
    places = {"CHECKPOINT": checkpoint, "NEW": tmp_path / "new", "NOWHERE": tmp_path / "nowhere"}
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *(str(places.get(word, word)) for word in words)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_processor_for_other_images_is_refused(checkpoint, tmp_path, capsys):
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(checkpoint)
    with pytest.raises(SystemExit):
        cli.main(["export", str(checkpoint), "--output_dir", str(tmp_path / "out")])
    assert "they have [32, 32] pixels, and image_size is 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_config_beside_an_export_says_what_was_exported(checkpoint, tmp_path):
    non_uniform_vit().to(torch.float16).save_pretrained(checkpoint)
    cli.main(
        ["export", str(checkpoint), "--format", "torch", "--output_dir", str(tmp_path / "out")]
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
