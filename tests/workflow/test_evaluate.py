"""Measuring alone: all images that there are, and how many is said."""

import pytest
from factories import tiny_vit
from pictures import picture, write
from transformers import ViTImageProcessorPil

from ofb_hf import cli


@pytest.fixture
def model(tmp_path):
    """A tiny classifier of cats and dogs."""
    made = tiny_vit(num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    made.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("place", "flags", "count"),
    [
        ("", "", 40),
        ("test/", "", 40),
        ("Test/", "--train_split test --eval_split test", 40),
        ("", "--eval_share 1.0", 40),
        # what a training would have been measured on
        ("", "--eval_share 0.1", 4),
        ("", "--max_eval_samples 6", 6),
    ],
)
def test_all_images_are_measured(model, tmp_path, place, flags, count):
    files = {
        f"{place}{name}/{n}.png": picture(2 * n + label)
        for label, name in enumerate(("cat", "dog"))
        for n in range(20)
    }
    folder = write(tmp_path / "photos", files)
    words = ["--model_name_or_path", str(model), "--data_dir", str(folder), "--use_cpu"]
    assert cli.evaluate([*words, *flags.split()])["num_examples"] == count
