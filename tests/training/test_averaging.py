"""The running average of the weights."""

import torch
from factories import search_config, tiny_model
from invariants import assert_equal_states
from runs import searcher
from safetensors.torch import load_file

from ofb_hf.training.averaging import WeightAverage


def test_the_average_follows_the_published_warm_up(tmp_path):
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage(layer, decay=0.5)
    expected = layer.weight.detach().clone()
    for update in range(1, 12):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        average.update(layer)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(average.average["weight"], expected)
    average.save(tmp_path / "average.safetensors")
    again = WeightAverage(torch.nn.Linear(3, 2), decay=0.5)
    again.load(tmp_path / "average.safetensors")
    assert again.updates == 11
    again.copy_to_(layer)
    assert torch.equal(layer.weight, average.average["weight"])


def test_a_run_resumes_where_halves_are_gone_from_network_and_average(tmp_path):
    """Their names are in neither of the files."""
    sizes = {
        "embedding_candidates": [40],
        "head_candidates": [5],
        "head_dim_candidates": [8],
        "mlp_candidates": [72],
    }
    config = search_config(target_macs=0.35, search_depth=True, pmim=False, **sizes)

    def trainer(folder, **changes):
        return searcher(
            folder, config, tiny_model("vit", num_hidden_layers=4).train(), ema_decay=0.9, **changes
        )

    straight = trainer(tmp_path, save_strategy="steps", save_steps=20)
    straight.train()
    assert straight.supernet.architecture.left_out
    checkpoint = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert len(checkpoint) < len(trainer(tmp_path / "other").supernet.state_dict())
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert_equal_states(resumed.supernet.state_dict(), straight.supernet.state_dict())
