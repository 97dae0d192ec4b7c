"""Small networks, spaces and masks for tests: built from configs, offline, in milliseconds.

Sizes are awkward and pairwise different wherever they can be, so that a swapped axis cannot pass,
and weights are large enough that a forgotten factor shows in the logits.
"""

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ofb_hf import (
    OFBSwinForImageClassification,
    OFBViTForImageClassification,
    SwinBiMaskConfig,
    ViTBiMaskConfig,
    install_bi_masks,
    models,
)
from ofb_hf.cost.latency import LatencyTable, frame_of
from ofb_hf.families.registry import describe
from ofb_hf.families.token_reduction import scheduled
from ofb_hf.masks.bi_mask import BiMask
from ofb_hf.search.supernet import Supernet
from ofb_hf.space.configuration import BiMaskConfig
from ofb_hf.space.search_space import SubmoduleSpace
from ofb_hf.token_search.learned_counts import install_learned_counts

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

FAMILIES = ("vit", "swin")
SCHEDULE = [[17, 15], [12, 7], [7, 2]]

# Candidates that divide nothing: no multiple of 8 hides an index that is off by one.
AWKWARD = {
    "vit": {
        "embedding_candidates": [13, 24, 31, 40],
        "head_candidates": [2, 3, 5],
        "head_dim_candidates": [3, 5, 8],
        "mlp_candidates": [17, 29, 50, 72],
    },
    "swin": {
        "embedding_candidates": [7, 13, 20, 31, 40],
        "head_candidates": [1, 2, 3, 4],
        "head_dim_candidates": [3, 7, 10],
        "mlp_candidates": [11, 29, 36, 50, 72],
    },
}
CANDIDATES_OF = {
    "search_embedding": ("embedding_candidates",),
    "search_attention": ("head_candidates", "head_dim_candidates"),
    "search_mlp": ("mlp_candidates",),
}
OURS = {"vit": OFBViTForImageClassification, "swin": OFBSwinForImageClassification}
SEARCHES = {"vit": ViTBiMaskConfig, "swin": SwinBiMaskConfig}


def golden(name: str) -> dict[str, Any]:
    """A fixture of reference numbers, by file name."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def vit_config(**overrides: Any) -> ViTConfig:
    """Config of a ViT with 17 tokens, 40 channels, 5 heads of 8, 72 MLP channels and 3 labels."""
    sizes = {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 72,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": 3,
    }
    return ViTConfig(**(sizes | overrides))


def swin_config(**overrides: Any) -> SwinConfig:
    """Config of a Swin with 8 x 8 and 4 x 4 tokens, windows of 3 that need padding and shifts, and
    drop path.

    Two stages of 20 and 40 channels with 2 and 1 blocks, heads of 10, MLPs of 36 and 72, 3 labels.
    """
    sizes = {
        "embed_dim": 20,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 3,
        "mlp_ratio": 1.8,
        "drop_path_rate": 0.1,
        "image_size": 16,
        "patch_size": 2,
        "num_labels": 3,
    }
    return SwinConfig(**(sizes | overrides))


@torch.no_grad()
def randomize_weights_(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter, biases, norms and tokens included, values that matter: logits spread
    over about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if name.endswith("weight") and parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(
                noise * (1.2 / parameter[0].numel() ** 0.5 if parameter.ndim in (2, 4) else 0.4)
            )


def tiny_vit(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    **overrides: Any,
) -> ViTForImageClassification:
    """A stock ViT classifier in eval mode; overrides are config fields."""
    config = vit_config(**overrides)
    model = ViTForImageClassification._from_config(config, attn_implementation=attn_implementation)
    randomize_weights_(model, seed)
    return model.to(dtype).eval()


def tiny_swin(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    **overrides: Any,
) -> SwinForImageClassification:
    """A stock Swin classifier in eval mode; overrides are config fields."""
    model = SwinForImageClassification._from_config(
        swin_config(**overrides), attn_implementation=attn_implementation
    )
    randomize_weights_(model, seed)
    return model.to(dtype).eval()


def tiny_model(family: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """A stock classifier of a family; the rest as for `tiny_vit` and `tiny_swin`."""
    return {"vit": tiny_vit, "swin": tiny_swin}[family](*args, **kwargs)


def tiny_images(
    count: int = 2,
    size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
) -> Tensor:
    """Normalised images (B, C, H, W)."""
    return torch.randn(
        count, channels, size, size, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def search_config(family: str = "vit", **overrides: Any) -> BiMaskConfig:
    """A search by bi-masks over awkward candidates, each of its phases long enough to look at;
    overrides are config fields."""
    phases = {
        "preset": "bi_mask",
        "importance_hold": 0.3,
        "warmup": 0.2,
        "one_hot_begin": 0.5,
        "one_hot_end": 0.75,
    }
    phases |= {"retire_begin": 0.5, "settle_at": 0.75}
    candidates = dict(AWKWARD[family])
    for searched, names in CANDIDATES_OF.items():
        if not overrides.get(searched, True):
            for name in names:
                del candidates[name]
    return SEARCHES[family](
        **(candidates | (phases if "preset" not in overrides else {}) | overrides)
    )


def tiny_supernet(
    seed: int = 0, dtype: torch.dtype = torch.float32, family: str = "vit", **overrides: Any
) -> Supernet:
    """A supernet of `tiny_model` with random masks, in eval mode; overrides are fields of the
    search config."""
    supernet = install_bi_masks(
        tiny_model(family, seed, dtype), search_config(family, **overrides)
    ).to(dtype)
    randomize_masks_(supernet, seed)
    return supernet


@torch.no_grad()
def randomize_masks_(
    supernet: Supernet, seed: int = 0, spread: float = 2.0, lam: float = 0.4
) -> None:
    """Random importance and architecture logits, mask tokens and mixing weight: nothing is left at
    a default."""
    generator = torch.Generator().manual_seed(seed)
    for mask in supernet.bi_masks:
        for parameter in (mask.importance_logits, mask.alpha):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((spread * noise).to(parameter))
    if supernet.pmim_decoder is not None:
        for name, parameter in supernet.model.named_parameters():
            if name.endswith("mask_token"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise.to(parameter))
    supernet.lam.fill_(lam)


def random_candidate(mask: BiMask, rng: random.Random) -> tuple[int, ...]:
    """The size of some active candidate."""
    index = rng.choice(mask.active_candidates.nonzero().tolist())
    return tuple(int(axis[i]) for axis, i in zip(mask.candidate_axes, index, strict=True))


def settle_randomly_(supernet: Supernet, seed: int, names: set[str] | None = None) -> None:
    """Leaves one random candidate in the named submodules (all of them by default)."""
    rng = random.Random(seed)
    for mask in supernet.bi_masks:
        if names is None or mask.name in names:
            mask.settle_(*random_candidate(mask, rng))


def retire_some_(supernet: Supernet, seed: int, share: float = 0.5) -> None:
    """Retires about this share of the candidates, never all of a submodule."""
    generator = torch.Generator().manual_seed(seed)
    for mask in supernet.bi_masks:
        weak = torch.rand(mask.alpha.shape, generator=generator) < share
        weak &= mask.active_candidates
        if bool((mask.active_candidates & ~weak).any()):
            mask.retire_(weak)


def non_uniform_vit(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> OFBViTForImageClassification:
    """One of our models with different widths in every layer and everywhere a scale that no width
    implies.

    The fourth layer has no attention, the fifth no MLP, the last one neither.
    """
    stock = vit_config(hidden_size=30, num_hidden_layers=6)
    config = OFBViTForImageClassification.config_class(
        **{
            k: v
            for k, v in stock.to_dict().items()
            if k not in ("model_type", "transformers_version")
        },
        num_attention_heads_per_layer=[2, 5, 1, 0, 3, 0],
        head_dim_per_layer=[7, 3, 11, 0, 4, 0],
        intermediate_size_per_layer=[19, 64, 23, 31, 0, 0],
        attention_scale=0.37,
    )
    model = OFBViTForImageClassification._from_config(config, attn_implementation="eager")
    randomize_weights_(model, seed)
    return model.to(dtype).eval()


def non_uniform_swin(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> OFBSwinForImageClassification:
    """One of our models: three stages of 20, 44 and 70 channels, every block different, scales no
    width implies.

    The first stage ends with a block without attention, the second with one that is empty; in the
    last stage the second block has no attention and the third no MLP.
    """
    stock = swin_config(image_size=32, window_size=4, depths=[3, 2, 4], num_heads=[2, 4, 8])
    config = OFBSwinForImageClassification.config_class(
        **{
            k: v
            for k, v in stock.to_dict().items()
            if k not in ("model_type", "transformers_version")
        },
        hidden_size_per_stage=[20, 44, 70],
        num_heads_per_block=[[2, 1, 0], [3, 0], [8, 0, 5, 1]],
        head_dim_per_block=[[7, 3, 0], [11, 0], [5, 0, 9, 4]],
        intermediate_size_per_block=[[19, 64, 27], [23, 0], [31, 90, 0, 12]],
        attention_scale_per_stage=[0.37, 0.21, 0.53],
    )
    model = OFBSwinForImageClassification._from_config(config, attn_implementation="eager")
    randomize_weights_(model, seed)
    return model.to(dtype).eval()


def optimizer_that_mirrors(module: nn.Module) -> torch.optim.AdamW:
    """An AdamW whose moments are p and 2 |p|: any slice that is misaligned shows."""
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        moments = {
            "exp_avg": parameter.detach().clone(),
            "exp_avg_sq": 2 * parameter.detach().abs(),
        }
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    return optimizer


NOTHING = st.sampled_from([(), (0,)])
DEPTHS = st.sampled_from([False, True, "attention", "mlp"])


@st.composite
def plain_spaces(draw: st.DrawFn) -> SubmoduleSpace:
    """A plain axis of 1 to 40 units with any candidates that include the full size, and sometimes
    0."""
    units, nothing = draw(st.integers(1, 40)), draw(NOTHING)
    return SubmoduleSpace("layers.0.mlp", "mlp", units, (*nothing, *_sizes(draw, units)))


@st.composite
def grid_spaces(draw: st.DrawFn) -> SubmoduleSpace:
    """A grid of 1 to 7 heads with 1 to 12 channels each, any candidates, sometimes with nothing
    among them."""
    heads, dims, nothing = draw(st.integers(1, 7)), draw(st.integers(1, 12)), draw(NOTHING)
    return SubmoduleSpace(
        "layers.0.attention",
        "attention",
        num_heads=heads,
        head_dim=dims,
        head_candidates=(*nothing, *_sizes(draw, heads)),
        dim_candidates=(*nothing, *_sizes(draw, dims)),
    )


def spaces() -> st.SearchStrategy[SubmoduleSpace]:
    """Plain axes and grids."""
    return plain_spaces() | grid_spaces()


def _sizes(draw: st.DrawFn, full: int) -> tuple[int, ...]:
    return tuple(sorted({*draw(st.sets(st.integers(1, full), max_size=6)), full}))


@st.composite
def masks(draw: st.DrawFn, spread: float = 3.0) -> BiMask:
    """A bi-mask in float64 over a random space with random scores, some of them tied, some
    candidates retired."""
    mask = BiMask(draw(spaces()), normalize_importance=draw(st.booleans())).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for parameter in mask.parameters():
            parameter.copy_(
                spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
        if draw(st.booleans()):
            mask.importance_logits.copy_(mask.importance_logits.round())
        weak = torch.rand(mask.alpha.shape, generator=generator) < draw(
            st.sampled_from([0.0, 0.3, 0.8])
        )
        weak.view(-1)[int(mask.candidate_probs().argmax())] = False
        mask.retire_(weak)
    return mask


@st.composite
def swin_shapes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Config fields of a random tiny Swin and candidates for it: `(overrides, candidates)`."""
    stages, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    head_dim, ratio = draw(st.integers(2, 5)), draw(st.sampled_from([1, 1.5, 2.5]))
    widths = [heads * head_dim * 2**stage for stage in range(stages)]
    overrides = {
        "embed_dim": widths[0],
        "depths": [draw(st.integers(1, 2)) for _ in range(stages)],
        "num_heads": [heads * 2**stage for stage in range(stages)],
        "window_size": draw(st.integers(2, 16 // 2**stages)),
        "mlp_ratio": ratio,
        "num_labels": draw(st.integers(2, 5)),
        "qkv_bias": draw(st.booleans()),
        "use_absolute_embeddings": draw(st.booleans()),
        "layer_norm_eps": 1e-3,
    }
    candidates = {
        "embedding_candidates": sorted({size for width in widths for size in _sizes(draw, width)}),
        "head_candidates": sorted(
            {size for heads in overrides["num_heads"] for size in _sizes(draw, heads)}
        ),
        "head_dim_candidates": list(_sizes(draw, head_dim)),
        "mlp_candidates": sorted(
            {size for width in widths for size in _sizes(draw, int(ratio * width))}
        ),
        "search_depth": draw(DEPTHS),
    }
    return overrides, candidates


@st.composite
def vit_shapes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Config fields of a random tiny ViT and candidates for it: `(overrides, candidates)`."""
    heads = draw(st.integers(1, 4))
    head_dim = draw(st.integers(2, 7))
    width, mlp = heads * head_dim, draw(st.integers(3, 33))
    overrides = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_labels": draw(st.integers(2, 5)),
        "qkv_bias": draw(st.booleans()),
        # two channels that happen to be equal must not blow rounding errors up
        "layer_norm_eps": 1e-3,
    }
    candidates = {
        "embedding_candidates": list(_sizes(draw, width)),
        "head_candidates": list(_sizes(draw, heads)),
        "head_dim_candidates": list(_sizes(draw, head_dim)),
        "mlp_candidates": list(_sizes(draw, mlp)),
        "search_depth": draw(DEPTHS),
    }
    return overrides, candidates


SHAPES = {"vit": vit_shapes, "swin": swin_shapes}


def invented_table(model: PreTrainedModel, seed: int = 0) -> LatencyTable:
    """A table for a model, with coefficients that nobody measured; they let tokens and widths count
    alike."""
    rng, architecture = random.Random(seed), describe(model.config)
    parts = list(architecture.parts)
    if isinstance(model.config, ViTConfig):
        half = (describe(model.config).patch_grid[0] ** 2 + 1) // 2
        parts += scheduled(model.config, [[half, half // 2]] * model.config.num_hidden_layers).parts
    return LatencyTable(
        model="tiny",
        sizes={name: list(size) for name, size in architecture.sizes.items()},
        frame=frame_of(architecture, architecture.sizes),
        settings={"batch_size": 1, "num_threads": 1, "device": "cpu", "dtype": "float32"},
        hardware="a machine",
        versions={},
        coefficients={
            part.kind: {
                name: rng.randrange(10**5, 10**7) / max(1, product.coefficient)
                for name, product in part.products.items()
            }
            for part in parts
        },
    )


def scheduled_vit(schedule=None, **options) -> OFBViTForImageClassification:
    """Three layers with 17 tokens; by default all of merging only, both, and merging down to the
    smallest."""
    model = tiny_vit(**({"num_hidden_layers": 3} | options))
    return OFBViTForImageClassification.from_dense(
        model, token_schedule=schedule or SCHEDULE
    ).eval()


def decided(schedule, **options):
    """A model whose learned counts are all but certain of a schedule."""
    learner = install_learned_counts(tiny_vit(num_hidden_layers=4, **options))
    for layer, counts in zip(learner.vit.layers[1:-1], schedule[1:-1], strict=True):
        for proxy, count in zip(
            (layer.reduction.kept, layer.reduction.merged), counts, strict=True
        ):
            proxy.logits.data[proxy.candidates == count] = 60.0
    return learner


def by_remote_code(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with classes of other modules, as `trust_remote_code` loads them."""
    package = "copied_models"
    if package not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            package, models.__file__, submodule_search_locations=[str(Path(models.__file__).parent)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    copied = getattr(sys.modules[package], type(model).__name__)
    assert not isinstance(model, copied)
    copy = copied(copied.config_class.from_dict(model.config.to_dict()))
    copy.load_state_dict(model.state_dict())
    return copy.to(model.dtype).train(model.training)
