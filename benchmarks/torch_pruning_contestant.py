"""Prune a ViT with the library torch-pruning, as a contestant of `search_quality.py`.

Importance and pruner are torch-pruning's; the result is loaded into our class. Version 1.6 needs
these workarounds for transformers' ViT:

- Attention must be eager, because the dependency graph does not follow sdpa.
- Heads are declared layer by layer and keep their number; with pruned heads, queries and values
  would end up with different widths.
- The pruned modules still reshape by the old head width, so the weights move to our class, which
  reads widths from its config.
- `global_pruning` prunes no attention at all, so each layer loses the same fraction of its width.
"""

import copy

import torch
import torch_pruning
from transformers import PreTrainedModel, ViTForImageClassification

from ofb_hf import OFBViTConfig, OFBViTForImageClassification, count_macs
from ofb_hf.space.configuration import BiMaskConfig

MULTIPLE = 8


def prune(dense: PreTrainedModel, config: BiMaskConfig) -> OFBViTForImageClassification:
    """Return the largest network of the pruner under the budget, by bisection of its ratio.

    Raises:
        TypeError: for anything but a stock ViT.
    """
    if not isinstance(dense, ViTForImageClassification):
        raise TypeError(f"got a {type(dense).__name__}; this contestant prunes transformers' ViT.")
    target = config.target(count_macs(dense))
    low = 0.0
    high = 1.0
    best = None
    for _ in range(12):
        ratio = (low + high) / 2
        candidate = _pruned(dense, ratio)
        if count_macs(candidate) <= target:
            high = ratio
            if best is None or count_macs(candidate) > count_macs(best):
                best = candidate
        else:
            low = ratio
    return best


def _pruned(dense: ViTForImageClassification, ratio: float) -> OFBViTForImageClassification:
    model = copy.deepcopy(dense).cpu().eval()
    model.set_attn_implementation("eager")
    heads = model.config.num_attention_heads
    layers = [layer.attention for layer in model.vit.layers]
    size = model.config.image_size
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"pixel_values": torch.zeros(1, model.config.num_channels, size, size)},
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=min(ratio, 0.95),
        ignored_layers=[model.classifier],
        num_heads={
            part: heads for layer in layers for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        },
        round_to=MULTIPLE,
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    fields = {
        k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")
    }
    fields["hidden_size"] = model.vit.embeddings.cls_token.shape[-1]
    config = OFBViTConfig(
        **fields,
        num_attention_heads_per_layer=[heads] * len(layers),
        head_dim_per_layer=[layer.q_proj.out_features // heads for layer in layers],
        intermediate_size_per_layer=[layer.mlp.fc1.out_features for layer in model.vit.layers],
        attention_scale=(dense.config.hidden_size // heads) ** -0.5,
    )
    small = OFBViTForImageClassification(config)
    small.load_state_dict(model.state_dict())
    return small.to(dense.device)
