"""What to search and with which recipe: one config class per model family, with two presets."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from transformers import PreTrainedConfig, SwinConfig, ViTConfig

from ..cost.budget import Budget
from ..families.description import Architecture, Submodule
from ..families.registry import describe
from ..families.token_reduction import supports_tokens, with_fewest_tokens
from .idle_settings import require_effect
from .presets import PRESETS
from .search_space import SearchSpace, SubmoduleSpace

# Which halves of a block may be left out.
DepthSearch = Literal[False, True, "attention", "mlp"]


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class BiMaskConfig(Budget):
    """What a search may change, how it decides and what the result may cost.

    Use the subclass of your model's family, `ViTBiMaskConfig` or `SwinBiMaskConfig`. Fields that
    say "preset" take their value from `preset` unless given: `"ours"` (led by data and budget) or
    `"paper"` (the published constants). A list of candidates serves all submodules of its kind:
    each takes the sizes up to its own full one.

    Raises:
        ValueError: for an unknown preset, two budgets, a budget that is no share and no count, a
            latency table that is missing or none, and for fractions and weights out of range. The
            message names the field, the value and what is allowed.
    """

    family: ClassVar[type[PreTrainedConfig] | None] = None

    preset: str = _field("ours", "Source of all fields left at None: 'ours' or 'paper'.")
    target_macs: float | None = _field(
        None,
        "Budget in MACs: at most 1 = share of the dense model, above 1 = absolute. 0.5 if no "
        "target is given.",
    )
    target_params: float | None = _field(
        None, "Budget in parameters instead, likewise. Give one target, not both."
    )
    search_embedding: bool = _field(
        True, "Search the width of the residual stream (of every stage)."
    )
    search_attention: bool = _field(
        True, "Search heads x channels per head, jointly, in every attention."
    )
    search_mlp: bool = _field(True, "Search the hidden width of every MLP.")
    search_depth: DepthSearch = field(
        default=False,
        metadata={
            "help": "Let attentions and MLPs be left out altogether: True for both, 'attention' "
            "or 'mlp' for one kind.",
            # the flag without a value is True, as with other switches
            **{"nargs": "?", "const": True},
        },
    )
    search_tokens: bool = _field(
        False,
        "Search how many tokens each layer keeps, too, under the same budget in MACs or "
        "milliseconds. ViT only.",
    )
    embedding_candidates: list[int] | None = _field(
        None, "Residual widths to choose from; every full one included."
    )
    head_candidates: list[int] | None = _field(
        None, "Numbers of heads to choose from; every full one included."
    )
    head_dim_candidates: list[int] | None = _field(
        None, "Channels per head to choose from; every full one included."
    )
    mlp_candidates: list[int] | None = _field(
        None, "MLP widths to choose from; every full one included."
    )
    uniform_across_layers: bool = _field(
        False,
        "Tie the sizes of all attentions, and of all MLPs, that are equally large in the dense "
        "model: one choice for "
        "all of them, importance of each its own. A ViT then loads as a stock checkpoint without "
        "padding.",
    )
    multiple_of: int | None = _field(
        None, "Channel counts are multiples of this where the dense size is. Preset."
    )
    smallest_share: float | None = _field(
        None, "Smallest residual width as a share of the full one. Preset."
    )
    prune_during_search: bool = _field(
        True, "Remove units physically while searching; False cuts once, at the end."
    )

    importance_start: float = _field(
        0.99, "lambda, the weight of the importance score, at step 0 (paper's code)."
    )
    importance_end: float = _field(0.1, "lambda after the warm-up (paper's code).")
    importance_hold: float | None = _field(
        None,
        "Fraction of the steps in which nothing learns and gradients of the given network are "
        "observed, at most 2,048 images; then importance and alpha are set from them. 0 = no such "
        "phase. Preset.",
    )
    warmup: float | None = _field(
        None, "Share of the steps over which lambda and the keep ratio move. Preset."
    )
    importance_init_mean: float | None = _field(
        None, "Mean of the initial importance logits. Preset."
    )
    importance_init_std: float | None = _field(
        None, "Their standard deviation, truncated at two of it. Preset."
    )
    alpha_init: str | None = _field(
        None, "Initial architecture logits: 'zeros' or 'uniform' in [0, 1). Preset."
    )
    normalize_importance: bool | None = _field(
        None, "Divide importance by its maximum in a submodule. Preset."
    )
    importance_learning_rate: float | None = _field(
        None, "Learning rate of the importance logits. Preset."
    )
    architecture_learning_rate: float | None = _field(None, "Learning rate of alpha. Preset.")
    architecture_weight_decay: float | None = _field(None, "Weight decay of alpha. Preset.")
    masks_follow_schedule: bool | None = _field(
        None,
        "Whether the two learning rates above follow lr_scheduler_type or stay constant. Preset.",
    )

    flops_weight: float | None = _field(
        None, "Weight of the squared relative gap to the budget. Preset."
    )
    one_hot_weight: float | None = _field(
        None, "Final weight of the adaptive one-hot loss. Preset."
    )
    one_hot_begin: float | None = _field(
        None, "Share of the steps before one-hot pressure starts to build up. Preset."
    )
    one_hot_end: float | None = _field(
        None, "Share of the steps at which it has reached its full weight. Preset."
    )
    importance_penalty: float | None = _field(
        None,
        "Factor on the L1 penalty of importance (paper: 2e-4 per attention unit, 5e-5 elsewhere). "
        "Preset.",
    )
    retire_threshold: float = _field(
        0.2, "A candidate retires at probability threshold / active candidates (paper)."
    )
    retire_begin: float | None = _field(
        None, "Share of the steps before candidates may retire. Preset."
    )
    settle_at: float | None = _field(
        None,
        "Share of the steps after which the final choice is made; the rest trains what was "
        "chosen. Preset.",
    )
    compensate: bool | None = _field(
        None,
        "Right after the choice, fit the layers that write into the residual stream by least "
        "squares, so that what "
        "stays makes up for what went; not where training goes on before the cut "
        "(prune_during_search=False). Preset.",
    )
    retire_events: int = _field(
        40, "How many times in a search weak candidates retire, evenly spaced."
    )

    pmim: bool = _field(True, "Progressive masked image modelling as an auxiliary loss.")
    keep_ratio_start: float = _field(
        0.95, "Share of patches left visible at step 0 (paper's code)."
    )
    keep_ratio_end: float = _field(
        0.75, "Share of patches left visible after the warm-up (paper's code)."
    )
    pmim_until_settled: bool | None = _field(
        None,
        "Hide patches only while the network may shrink: after the importance phase, until the "
        "choice. Preset.",
    )
    pmim_window: int | None = _field(
        None, "Normalisation window in pixels, odd; 47 at 16-pixel patches if not given."
    )
    pmim_weight: float = _field(
        1.0, "The reconstruction loss counts this many times the classification loss."
    )
    pmim_max_ratio: float = _field(
        10.0, "Upper bound of classification / reconstruction loss in that weight."
    )

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; known presets are {sorted(PRESETS)}.")
        for name, value in PRESETS[self.preset].items():
            if name in self.__dataclass_fields__ and getattr(self, name) is None:
                setattr(self, name, value)
        self.check_budget()
        self._check_ranges()
        require_effect(self)

    def _check_ranges(self) -> None:
        shares = (
            "smallest_share importance_start importance_end importance_hold warmup one_hot_begin "
            "one_hot_end retire_begin settle_at retire_threshold keep_ratio_start keep_ratio_end"
        )
        for name in shares.split():
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share between 0 and 1.")
        amounts = (
            "flops_weight one_hot_weight importance_penalty importance_init_std "
            "importance_learning_rate architecture_learning_rate pmim_weight pmim_max_ratio"
        )
        for name in amounts.split():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or positive.")
        if not self.flops_weight > 0:
            raise ValueError(
                f"flops_weight is {self.flops_weight}; it must be positive, or no budget is ever "
                f"met."
            )
        for name in ("multiple_of", "retire_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.importance_hold and not self.importance_learning_rate:
            raise ValueError(
                "importance_hold and importance_learning_rate are 0, so nothing would find out "
                "which units matter. Give importance_hold a fraction of the steps (0.05), to rank "
                "units by observed gradients, or let importance learn."
            )
        if self.importance_hold > self.settle_at:
            raise ValueError(
                f"importance_hold is {self.importance_hold}, but settle_at is {self.settle_at}; "
                f"the choice cannot fall "
                "before importance is known."
            )
        if self.alpha_init not in ("zeros", "uniform"):
            raise ValueError(
                f"alpha_init is {self.alpha_init!r}; allowed are 'zeros' and 'uniform'."
            )
        if self.pmim_window is not None and (self.pmim_window < 3 or self.pmim_window % 2 == 0):
            raise ValueError(
                f"pmim_window is {self.pmim_window}; give an odd number of pixels, 3 or more."
            )
        if not (self.search_embedding or self.search_attention or self.search_mlp):
            raise ValueError(
                "nothing to search: turn on search_embedding, search_attention or search_mlp."
            )
        self._check_depth()
        self._check_tokens()

    def _check_tokens(self) -> None:
        if not self.search_tokens:
            return
        # {what it is: (whether it is a hindrance, what to do)}
        conflicts = {
            f"target_params is {self.target_params}, and tokens have no parameters": (
                self.target_params is not None,
                "give target_macs or target_latency_ms",
            ),
            "importance_hold is 0, and without observed gradients nothing tells what tokens are "
            "worth": (
                not self.importance_hold,
                "give importance_hold a fraction of the steps, 0.05 for example",
            ),
            f"pmim_until_settled is {self.pmim_until_settled}, and hidden patches are repainted "
            f"from all tokens": (
                self.pmim and not self.pmim_until_settled,
                "turn it on, or pmim off",
            ),
            f"prune_during_search is {self.prune_during_search}, and heads that are switched off "
            f"but still there would "
            "vote on which tokens stay": (not self.prune_during_search, "turn it on"),
        }
        for reason, (conflict, advice) in conflicts.items():
            if conflict:
                raise ValueError(
                    f"search_tokens is True, but {reason}; {advice}, or search tokens afterwards."
                )

    def _check_depth(self) -> None:
        if self.search_depth not in get_args(DepthSearch):
            raise ValueError(
                f"search_depth is {self.search_depth!r}; allowed are True, False, 'attention' and "
                f"'mlp'."
            )
        if not self.search_depth:
            return
        if not any(self._may_vanish(kind) for kind in ("attention", "mlp")):
            raise ValueError(
                f"search_depth is {self.search_depth!r}, search_attention "
                f"{self.search_attention}, search_mlp "
                f"{self.search_mlp}: nothing could be left out. Search what may go, or turn "
                f"search_depth off."
            )
        if self.uniform_across_layers:
            raise ValueError(
                f"search_depth is {self.search_depth!r} and uniform_across_layers True: layers "
                f"that choose together "
                "would all be left out together. Turn one of them off."
            )

    def _may_vanish(self, kind: str) -> bool:
        searched = {"attention": self.search_attention, "mlp": self.search_mlp}
        return searched.get(kind, False) and self.search_depth in (True, kind)

    @property
    def distillation_weight(self) -> float:
        """Share of distillation in the classification loss of this preset's search."""
        return PRESETS[self.preset]["distillation_weight"]

    def search_space(self, model_config: PreTrainedConfig) -> SearchSpace:
        """The candidates of every searched submodule of a model.

        Raises:
            ValueError: if the model is of another family, or given candidates or the latency table
                do not fit it.
        """
        if self.family is not None and not isinstance(model_config, self.family):
            raise ValueError(
                f"{type(self).__name__} searches {self.family.__name__} models, got a "
                f"{type(model_config).__name__}."
            )
        architecture: Architecture = describe(model_config)
        if self.search_tokens and not supports_tokens(model_config):
            raise ValueError(
                f"search_tokens is True, but a {type(model_config).__name__} has no class token "
                f"to rank tokens by (and "
                "Swin's windows need the whole grid); turn it off."
            )
        self.require_fit(
            architecture, *([with_fewest_tokens(model_config)] if self.search_tokens else [])
        )
        wanted = {
            "embedding": self.search_embedding,
            "attention": self.search_attention,
            "mlp": self.search_mlp,
        }
        searched = [s for s in architecture.submodules if wanted[s.kind] and math.prod(s.shape)]
        if not searched:
            raise ValueError(
                "nothing to search: the model has no units of the kinds that are to be searched."
            )
        self._check_candidates(searched)
        spaces = map(self._submodule_space, searched)
        return SearchSpace(tuple(_tie_layers(spaces) if self.uniform_across_layers else spaces))

    def fitted_to(self, model_config: PreTrainedConfig, **changes: Any) -> "BiMaskConfig":
        """The same search of a network that was cut from the one this config is for: lists without
        what is gone.

        Args:
            model_config: of the smaller network.
            changes: other fields to set, the budget for example.
        """
        largest = {
            name: max(full.values())
            for name, full in _full_sizes(describe(model_config).submodules).items()
            if full
        }
        lists = {name: _up_to(size, getattr(self, name)) or None for name, size in largest.items()}
        return replace(self, **lists | changes)

    def _check_candidates(self, searched: list[Submodule]) -> None:
        for name, full in _full_sizes(searched).items():
            given = getattr(self, name) or []
            if any(size < 1 for size in given):
                raise ValueError(
                    f"{name} is {given}; sizes are 1 or more, search_depth=True adds 0 to them."
                )
            if full and any(size > max(full.values()) for size in given):
                raise ValueError(
                    f"{name} is {given}, but the largest full size in this model is "
                    f"{max(full.values())}."
                )
            missing = [submodule for submodule, size in full.items() if size not in given]
            if given and missing:
                raise ValueError(
                    f"{name} is {given}, but the full size of {missing[0]!r} is "
                    f"{full[missing[0]]}; the full size "
                    "of every submodule must be among its candidates, so that the dense model is "
                    "in the space."
                )

    def _submodule_space(self, submodule: Submodule) -> SubmoduleSpace:
        nothing = [0] if self._may_vanish(submodule.kind) else []
        if submodule.kind == "attention":
            heads, dims = submodule.shape
            head_sizes = _up_to(heads, self.head_candidates) or self._head_sizes(heads)
            dim_sizes = _up_to(dims, self.head_dim_candidates)
            dim_sizes = dim_sizes or self._channel_sizes(dims, 0.25, max(dims // 8, 1))
            return SubmoduleSpace(
                submodule.name,
                submodule.kind,
                num_heads=heads,
                head_dim=dims,
                head_candidates=(*nothing, *head_sizes),
                dim_candidates=(*nothing, *dim_sizes),
            )
        units = submodule.shape[0]
        if submodule.kind == "embedding":
            step = min(units // 32, 12) if self.preset == "paper" else units // 32
            sizes = _up_to(units, self.embedding_candidates)
            sizes = sizes or self._channel_sizes(units, self.smallest_share, max(step, 1))
        else:
            step = units // (8 if self.preset == "paper" else 16)
            smallest = 1 / 4 if self.preset == "paper" else 1 / 16
            sizes = _up_to(units, self.mlp_candidates) or self._channel_sizes(
                units, smallest, max(step, 1)
            )
        return SubmoduleSpace(submodule.name, submodule.kind, units, (*nothing, *sizes))

    def _head_sizes(self, heads: int) -> list[int]:
        step = 2 if self.preset == "paper" else 1
        return sorted({*range(step, heads, step), heads})

    def _channel_sizes(self, full: int, smallest_share: float, step: int) -> list[int]:
        """Sizes from `smallest_share * full` to `full`, `step` apart, multiples of `multiple_of`
        where they can be."""
        unit = math.gcd(full, self.multiple_of)
        step = math.ceil(step / unit) * unit
        smallest = max(math.ceil(int(full * smallest_share) / unit) * unit, unit)
        return sorted(set(range(full, smallest - 1, -step)))

    def to_dict(self) -> dict[str, Any]:
        """All fields, preset values filled in."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the config as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BiMaskConfig":
        """The config with these fields.

        Raises:
            ValueError: naming unknown fields and the known ones.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"{cls.__name__} has no field {unknown}; its fields are {sorted(known)}."
            )
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "BiMaskConfig":
        """The config that `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class ViTBiMaskConfig(BiMaskConfig):
    """Search of a `ViTForImageClassification` (DeiT included): residual width, heads x channels,
    MLP widths.

    Example:

    ```python
    >>> from ofb_hf import ViTBiMaskConfig

    >>> ViTBiMaskConfig(target_macs=0.5, search_embedding=False).budget
    ('target_macs', 0.5)
    >>> ViTBiMaskConfig(target_macs=0.3, search_depth=True).search_depth  # attentions and MLPs may go altogether
    True
    ```"""

    family: ClassVar[type[PreTrainedConfig]] = ViTConfig


@dataclass
class SwinBiMaskConfig(BiMaskConfig):
    """Search of a `SwinForImageClassification`: one residual width per stage, heads x channels and
    MLP of every block.

    The paper reports a search of Swin but no space for it, nor is there public code of one: this
    space is our own. The stages' widths are independent, they need not double; a removed head takes
    its relative position bias along.

    Example:

    ```python
    >>> from ofb_hf import SwinBiMaskConfig

    >>> SwinBiMaskConfig(target_macs=0.5, search_mlp=False).budget
    ('target_macs', 0.5)
    ```"""

    family: ClassVar[type[PreTrainedConfig]] = SwinConfig


CONFIG_CLASSES: tuple[type[BiMaskConfig], ...] = (ViTBiMaskConfig, SwinBiMaskConfig)


def _tie_layers(spaces: Iterable[SubmoduleSpace]) -> Iterator[SubmoduleSpace]:
    """The spaces, each tied to the first of its kind and size; residual widths stay their own."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for space in spaces:
        leader = first.setdefault((space.kind, space.unit_shape), space.name)
        tied = leader != space.name and space.kind != "embedding"
        yield replace(space, tied_to=leader) if tied else space


def _full_sizes(submodules: Iterable[Submodule]) -> dict[str, dict[str, int]]:
    """For each field with candidates the submodules it is about, and how large they are along that
    axis."""
    axes = {"embedding": ["embedding_candidates"], "mlp": ["mlp_candidates"]}
    axes["attention"] = ["head_candidates", "head_dim_candidates"]
    submodules = list(submodules)
    return {
        name: {s.name: s.shape[axis] for s in submodules if s.kind == kind}
        for kind, names in axes.items()
        for axis, name in enumerate(names)
    }


def _up_to(full: int, sizes: list[int] | None) -> list[int]:
    return [size for size in sizes or [] if size <= full]


def default_config(model_config: PreTrainedConfig, **values: Any) -> BiMaskConfig:
    """The config class of the model's family, with the given fields."""
    describe(model_config)  # refuses unsupported families in words
    config_class = next(c for c in CONFIG_CLASSES if isinstance(model_config, c.family))
    return config_class(**values)


__all__ = ["BiMaskConfig", *(c.__name__ for c in CONFIG_CLASSES)]
