"""Scripts of `benchmarks/` run, at a size at which their figures mean nothing.

Those that compile, that start many processes or that know only large shapes are left out, because
they take minutes at any size.
"""

import pytest
from factories import tiny_vit
from runs import TESTS, finish
from transformers import ViTImageProcessorPil
from warm import start

BENCHMARKS = TESTS.parent / "benchmarks"
PLACES = "--model {model} --data_dir {images} --output_dir {out}"
# Name of a script -> words of a tiny run, and something that it prints at its end.
RUNS = {
    "frozen": (
        f"{PLACES} --fractions 0.6 --num_images 16 --contestants dense compress one_shot",
        "compress",
    ),
    "frozen_speed": (
        "--model {model} --data_dir {images} --num_images 16 --part command",
        "peak_mib",
    ),
    "inference": (
        "--shapes digits_vit --budgets 0.5 --engines eager --batch 1 --rounds 1 --seconds 0.01",
        "digits_vit",
    ),
    "int8": (
        "--models {model} --data_dir {images} --num_images 4 --batch 2 --rounds 1 --seconds 0.01",
        "Nearest to float32 on this processor: quantize_dynamic(..., per_channel=",
    ),
    "onnx_export": (
        "--shapes digits_vit --batch 2 --rounds 1 --seconds 0.01",
        "digits_vit",
    ),
    "planted_task": (
        "--seeds 0 --presets default --dense_steps 20 --search_steps 20",
        "default",
    ),
    "search_quality": (
        f"{PLACES} --budgets 0.6 --seeds 0 --contestants search frozen_finetuned --quick",
        "frozen_finetuned",
    ),
    "search_time": (
        "--model digits_vit --batch_size 2 --rounds 1 --num_images 100",
        "digits_vit",
    ),
    "search_step": ("--shape digits_vit --batch 2 --rounds 1 --cpu", "| search |"),
    "token_reduction": (
        f"{PLACES} --shares 0.9 --both 0.8 --steps 8 --batch_size 8 --cpu --only dense learned",
        "",
    ),
}
# What other tests run as well, at the same length.
MARKS = dict.fromkeys(("frozen_speed", "onnx_export"), pytest.mark.thorough)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint deep enough to search tokens in."""
    folder = tmp_path_factory.mktemp("checkpoint") / "vit-tiny"
    classifier = tiny_vit(num_hidden_layers=4)
    classifier.config.id2label = {0: "blue", 1: "green", 2: "red"}
    classifier.config.label2id = {"blue": 0, "green": 1, "red": 2}
    classifier.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in RUNS])
def test_the_script_runs(model, images, tmp_path, name):
    words, expected = RUNS[name]
    words = words.format(model=model, images=images, out=tmp_path / "out").split()
    status, said = finish(start(BENCHMARKS / f"{name}.py", *words))
    assert status == 0, said[-3000:]
    assert expected in said
