"""The running average of the weights."""

import torch

from ofb_hf.averaging import WeightAverage


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
