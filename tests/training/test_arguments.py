"""Training arguments that follow from others."""

import multiprocessing

import pytest
from runs import arguments

from ofb_hf import OFBTrainingArguments


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="not on this system"
)
@pytest.mark.parametrize(
    ("world_size", "workers", "given", "expected"),
    [
        (1, 2, None, None),
        (2, 0, None, None),
        (2, 2, None, "forkserver"),
        (2, 2, "fork", "fork"),
        (2, 2, "spawn", "spawn"),
    ],
)
def test_workers_are_not_forked_from_threads_that_talk_to_other_ranks(
    tmp_path, monkeypatch, world_size, workers, given, expected
):
    monkeypatch.setattr(OFBTrainingArguments, "world_size", world_size)
    args = arguments(
        tmp_path, dataloader_num_workers=workers, dataloader_multiprocessing_context=given
    )
    assert args.dataloader_multiprocessing_context == expected
