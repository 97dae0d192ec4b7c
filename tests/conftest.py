"""What every test shares: no network, one thread, fixed seeds, and few but repeatable random
examples."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# also for the processes that tests start: they run side by side
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import logging
import random
from pathlib import Path

import datasets
import hypothesis
import numpy as np
import pytest
import torch
import transformers
from factories import tiny_model
from PIL import Image
from transformers import ViTImageProcessorPil

from ofb_hf.workflow import measure

TESTS = Path(__file__).parent

torch.set_num_threads(1)
# pytest listens to every logger that does not propagate. This one, as soon as somebody listens,
# describes each compilation in full, which costs as much time as a third of the compilation.
logging.getLogger("torch.__trace").propagate = True
transformers.utils.logging.disable_progress_bar()

# `HYPOTHESIS_PROFILE=thorough pytest` looks at many more examples, and at other ones every time.
hypothesis.settings.register_profile(
    "quick", max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# The files that take longest, the longest first. They begin first, so that at the end of the suite
# no process works on a long one while the others have nothing left to do. (Processes get whole
# files, `--dist loadfile --no-loadscope-reorder`: what a file's tests share is made once.)
LONGEST = (
    "search/test_planted_task.py",
    "workflow/test_hub_search.py",
    "release/test_export.py",
    "test_benchmarks.py",
    "workflow/test_generated.py",
    "workflow/test_streamed_search.py",
    "masks/test_masking.py",
    "search/test_joint_search.py",
    "search/test_search_trainer.py",
    "masks/test_gates.py",
    "search/test_distributed.py",
    "workflow/test_token_workflow.py",
    "search/test_synchronisation.py",
    "workflow/test_workflow.py",
    "release/test_publish.py",
    "workflow/test_recipe_configs.py",
    "data/test_streaming.py",
    "space/test_uniform.py",
    "workflow/test_resuming.py",
    "models/test_token_reduction.py",
    "workflow/test_several_budgets.py",
    "training/test_interruption.py",
    "workflow/test_two_machines.py",
)


def pytest_collection_modifyitems(items):
    """Order the files, and leave out, unless `THOROUGH` is set, what shows once more what another
    test shows, and takes long."""
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    if not os.environ.get("THOROUGH"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="THOROUGH=1 runs it"))


def pytest_collection_finish():
    """Spares the garbage collector what is there by now and stays: a million objects of imported
    modules. accelerate collects garbage after every training, which takes half a second with them,
    and nothing without."""
    gc.collect()
    gc.freeze()


measure.SECONDS_PER_ROUND = 0.01  # speed is reported by these tests, and judged by none


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of `datasets` that holds nothing yet."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders with 3 colours of noise, 8 training and 4 test images each."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def save_checkpoint(family, folder):
    """A stock classifier as the Hub holds them: old key names, an image processor beside it."""
    model = tiny_model(family)
    model.config.id2label = {0: "blue", 1: "green", 2: "red"}
    model.config.label2id = {"blue": 0, "green": 1, "red": 2}
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A stock ViT."""
    return save_checkpoint("vit", tmp_path_factory.mktemp("checkpoint") / "vit-tiny")


@pytest.fixture(scope="session")
def swin_checkpoint(tmp_path_factory):
    """A stock Swin."""
    return save_checkpoint("swin", tmp_path_factory.mktemp("checkpoint") / "swin-tiny")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with 8 parquet shards of numbered images, and one to evaluate on."""
    # takes seconds, which tests without data need not wait for
    from pictures import repository, write

    return write(tmp_path_factory.mktemp("shards"), repository())
