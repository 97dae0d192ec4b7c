"""Two real processes: one network on both, whatever happens to its shape; and a check that notices
when it is not."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import finish, results, start, start_search

from ofb_hf.training.ranks import checksum, decided_by_rank_0, require_identical_ranks

RETIRING = {"importance_hold": 0.1, "retire_begin": 0.8, "settle_at": 0.9}
SHRINK_AT = [7, 10, 14]
# The last MLP retires its largest size six times at most; then nothing is all that is left of it.
LEAVE_OUT_AT = [5, 6, 7, 9, 10, 12]
NO_RANDOMNESS = {"pmim": False, "importance_init_std": 0.05}


def shrinks(result):
    """Steps at which the network became smaller."""
    macs = [step["macs"] for step in result["steps"]]
    return [index + 2 for index, (before, after) in enumerate(pairwise(macs)) if after < before]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_two_ranks_hold_the_same_network_after_every_step(tmp_path, family, depth):
    """With accumulated, clipped bf16 gradients, weight average and shrinks on the way; down to no
    MLP in the end."""
    arguments = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "bf16": True,
        "ema_decay": 0.9,
    }
    arguments |= {"max_steps": 20, "per_device_train_batch_size": 4}
    shrink_at = LEAVE_OUT_AT if depth else SHRINK_AT
    options = {
        "family": family,
        "config": RETIRING | {"search_depth": depth},
        "arguments": arguments,
    }
    options |= {"compare_ranks": True, "shrink_at": shrink_at}
    status, said = finish(start_search(tmp_path, options, ranks=2))
    assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert first["world_size"] == second["world_size"] == 2
    assert [step["different"] for step in first["steps"]] == [[]] * 20
    assert set(shrink_at) <= set(shrinks(first))
    assert first["weights"] == second["weights"]
    assert first["subnet"] == second["subnet"]
    assert (list(first["subnet"]["kept"].values())[-1] == []) == depth
    assert first["random"] != second["random"]
    hidden = list(zip(first["hidden"], second["hidden"], strict=True))
    # few patches: now and then they agree
    assert sum(one != other for one, other in hidden) > len(hidden) / 2


@pytest.mark.slow
def test_two_ranks_in_fp16_go_on_under_one_loss_scale(tmp_path):
    """While they observe, each lowers its own until its gradients are finite: other images overflow
    elsewhere."""
    options = {"loss_scale": 2.0**22, "compare_ranks": True}
    options["arguments"] = {"max_steps": 12, "max_grad_norm": 0.5, "per_device_train_batch_size": 4}
    status, said = finish(start_search(tmp_path, options, ranks=2))
    assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert [step["different"] for step in first["steps"]] == [[]] * 12
    assert first["weights"] == second["weights"]


@pytest.mark.slow
def test_two_ranks_choose_the_same_tokens(tmp_path):
    """Each sees other images; one of them decides. The decoder, which goes with the tokens, is
    missed by neither."""
    config = RETIRING | {"search_tokens": True, "search_depth": True, "target_macs": 0.45}
    options = {"config": config, "model": {"num_hidden_layers": 3}, "compare_ranks": True}
    options["arguments"] = {"max_steps": 20, "per_device_train_batch_size": 4, "ema_decay": 0.9}
    status, said = finish(start_search(tmp_path, options, ranks=2))
    assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert [step["different"] for step in first["steps"]] == [[]] * 20
    assert first["subnet"] == second["subnet"]
    assert first["subnet"]["token_schedule"][-1] == [2, 2]
    assert first["weights"] == second["weights"]


@pytest.mark.slow
def test_a_compiled_search_with_activation_checkpointing_is_the_same_on_both_ranks(tmp_path):
    arguments = {
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "activation_checkpointing": True,
    }
    options = {"config": RETIRING, "shrink_at": SHRINK_AT[:1], "compare_ranks": True}
    options["model"] = {"num_hidden_layers": 1}  # less to compile
    options["arguments"] = arguments | {"per_device_train_batch_size": 4, "max_steps": 10}
    status, said = finish(start_search(tmp_path, options, ranks=2))
    assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert [step["different"] for step in first["steps"]] == [[]] * 10
    assert SHRINK_AT[0] in shrinks(first)
    assert first["weights"] == second["weights"]


@pytest.mark.slow
def test_two_ranks_keep_the_same_best_model_and_share_the_data_again_in_a_second_training(tmp_path):
    status, said = finish(start("finetune_process.py", str(tmp_path), ranks=2))
    assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert first["world_size"] == 2
    for one, two in zip(first["trainings"], second["trainings"], strict=True):
        assert one["best"] == two["best"]
        assert Path(one["best"]).parent == tmp_path
        assert one["best"] != str(tmp_path / "checkpoint-4"), (
            "choose settings in which the last step is not the best"
        )
        assert one["weights"] == two["weights"]
        assert sorted(one["seen"] + two["seen"]) == list(range(32))
    assert first["trainings"][0]["seen"] != first["trainings"][1]["seen"]


@pytest.mark.slow
def test_ranks_that_drift_apart_are_caught_and_the_parameter_is_named(tmp_path):
    """Without rebuilding, DDP goes on averaging gradients of parameters that are no longer
    there."""
    options = {"config": RETIRING, "shrink_at": SHRINK_AT, "leave_rebuild_out": True}
    status, said = finish(start_search(tmp_path, options, ranks=2))
    assert status != 0
    assert "RanksDifferError" in said
    assert "hold different values of model.vit." in said
    assert "after step 10 " in said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.thorough)])
def test_two_ranks_search_as_one_with_twice_the_batch(tmp_path, family):
    """Same images per step, nothing random: the same losses up to rounding, and the same subnet."""
    runs = []
    for ranks, batch in ((2, 8), (1, 16)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        arguments = {"per_device_train_batch_size": batch, "learning_rate": 1e-5}
        options = {"family": family, "config": NO_RANDOMNESS, "arguments": arguments}
        options["model"] = {"drop_path_rate": 0.0} if family == "swin" else {}
        status, said = finish(start_search(folder, options, ranks))
        assert status == 0, said[-3000:]
        runs.append(results(folder)[0])
    two, one = runs
    assert (two["world_size"], one["world_size"]) == (2, 1)
    before = min(shrinks(one)) - 1
    assert before > 5
    assert two["losses"][:before] == pytest.approx(one["losses"][:before], abs=1e-5)
    assert two["subnet"] == one["subnet"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_checksum_sees_every_change(dtype):
    tensor = torch.randn(5, 7).mul(3).to(dtype)
    reference = checksum(tensor)
    assert torch.equal(checksum(tensor.clone()), reference)
    for index in range(tensor.numel()):
        changed = tensor.clone()
        entry = changed.view(-1)[index]
        changed.view(-1)[index] = ~entry if dtype == torch.bool else entry + 1
        assert checksum(changed) != reference
    # in a plain sum, what happens to the highest bits of two entries would cancel
    if dtype.is_floating_point:
        changed = tensor.clone()
        changed[0, :2] *= -1
        assert checksum(changed) != reference
    swapped = torch.arange(6).to(dtype)
    assert checksum(swapped) != checksum(swapped.flip(0))
    assert checksum(torch.zeros(0, dtype=dtype)) == 0


def test_one_process_agrees_with_itself_and_decides_for_itself():
    layer = torch.nn.Linear(3, 2)
    require_identical_ranks(layer, torch.optim.AdamW(layer.parameters()), step=1)
    assert decided_by_rank_0(lambda: [4]) == [4]
    with pytest.raises(ValueError, match="no way"):
        decided_by_rank_0(lambda: (_ for _ in ()).throw(ValueError("no way")))
