"""What to search and with which recipe: one config class per model family, with two presets."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, SwinConfig, ViTConfig

from ..cost.budget import Budget
from ..families.description import Architecture
from ..families.registry import describe
from ..families.token_reduction import supports_tokens, with_fewest_tokens
from .candidates import check_candidates, full_sizes, submodule_space, tie_layers, up_to
from .checks import DepthSearch, check_settings, may_vanish
from .idle_settings import require_effect
from .presets import ADDED, ALIASES, PRESETS, require_one_preset, without_removed
from .search_space import SearchSpace


def _field(default: Any, help: str, **metadata: Any) -> Any:
    """Return a field with a help text for the command line."""
    return field(default=default, metadata={"help": help} | metadata)


@dataclass
class BiMaskConfig(Budget):
    """What a search may change, how it decides and what the result may cost.

    Use the subclass of your model's family, `ViTBiMaskConfig` or `SwinBiMaskConfig`. Fields that
    say "preset" take their value from `preset` unless given:

    - `"default"`: the choice is made before the first step, from error curves of the rewritten
      network, and every step trains what was chosen;
    - `"bi_mask"`: bi-masks choose while the weights train, led by data and budget;
    - `"paper"`: the same with the published constants.

    A list of candidates serves all submodules of its kind: each takes the sizes up to its own full
    one.

    Raises:
        ValueError: for an unknown preset, two budgets, a budget that is no fraction and no count, a
            latency table that is missing or invalid, and for fractions and weights out of range.
            The message names the field, the value and what is allowed.
    """

    family: ClassVar[type[PreTrainedConfig] | None] = None

    # What may change, and what the result may cost.
    preset: str = _field(
        "default",
        "Source of all fields left at None. 'default': choose before the first step, from error "
        "curves; 'bi_mask': choose by bi-masks while training; 'paper': the published constants.",
    )
    target_macs: float | None = _field(
        None,
        "Budget in MACs: at most 1 = fraction of the dense model, above 1 = absolute. 0.5 if no "
        "target is given.",
    )
    target_params: float | None = _field(
        None,
        "Budget in parameters instead, a fraction or absolute as for target_macs. Give one target, "
        "not both.",
    )
    search_embedding: bool = _field(
        True, "Search the width of the residual stream (of every stage)."
    )
    search_attention: bool = _field(
        True, "Search heads x channels per head, jointly, in every attention."
    )
    search_mlp: bool = _field(True, "Search the hidden width of every MLP.")
    search_depth: DepthSearch = _field(
        False,
        "Let attentions and MLPs be left out altogether: True for both, 'attention' or 'mlp' for "
        "one kind.",
        # As with other switches, the flag without a value is True.
        nargs="?",
        const=True,
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
        "model: one choice for all of them, importance of each its own. A ViT then loads as a "
        "stock checkpoint without padding.",
    )
    multiple_of: int | None = _field(
        None, "Channel counts are multiples of this where the dense size is. Preset."
    )
    smallest_share: float | None = _field(
        None, "Smallest residual width as a fraction of the full one. Preset."
    )
    basis: str | None = _field(
        None,
        "Rewrite the network, before its units are counted, in a basis in which they are easier to "
        "cut; no logit changes. 'given': leave it as it is; 'heads': queries, keys, values and "
        "output of every head; 'equivalent': residual streams as well, where the architecture "
        "allows it. subnet.json then counts "
        "units of the rewritten network, which --keep_dense keeps. Preset.",
    )
    prune_during_search: bool = _field(
        True, "Remove units physically while searching; False cuts once, at the end."
    )

    # How units are ranked and widths fitted.
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
    importance_source: str | None = _field(
        None,
        "What tells what units are worth, at the end of importance_hold or before the first step. "
        "'gradients': the observed first-order changes of the loss; 'error_curves': what leaving "
        "units out costs after the rest has made up for it, as ofb-hf compress measures it; this "
        "needs basis 'equivalent'. Preset.",
    )
    warmup: float | None = _field(
        None, "Fraction of the steps over which lambda and the keep ratio move. Preset."
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

    # How the choice is made.
    flops_weight: float | None = _field(
        None, "Weight of the squared relative gap to the budget. Preset."
    )
    one_hot_weight: float | None = _field(
        None, "Final weight of the adaptive one-hot loss. Preset."
    )
    one_hot_begin: float | None = _field(
        None, "Fraction of the steps before one-hot pressure starts to build up. Preset."
    )
    one_hot_end: float | None = _field(
        None, "Fraction of the steps at which it has reached its full weight. Preset."
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
        None, "Fraction of the steps before candidates may retire. Preset."
    )
    settle_at: float | None = _field(
        None,
        "Fraction of the steps after which the final choice is made; the remaining steps train the "
        "chosen network. 0 = before the first step, from error curves. Preset.",
    )
    compensate: bool | None = _field(
        None,
        "Right after the choice, fit the layers that write into the residual stream by least "
        "squares, so that the remaining units make up for the removed ones; not where training "
        "goes on before the cut (prune_during_search=False). Preset.",
    )
    freeze_weights: bool = _field(
        False,
        "Let only bi-masks learn until the choice; the weights rest. What is left is fitted, and "
        "trained in the remaining steps.",
    )
    retire_events: int = _field(
        40, "How many times in a search weak candidates retire, evenly spaced."
    )

    # Progressive masked image modelling.
    pmim: bool | None = _field(
        None, "Progressive masked image modelling as an auxiliary loss. Preset."
    )
    keep_ratio_start: float = _field(
        0.95, "Fraction of patches left visible at step 0 (paper's code)."
    )
    keep_ratio_end: float = _field(
        0.75, "Fraction of patches left visible after the warm-up (paper's code)."
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
        # Written to files from now on under its present name.
        self.preset = ALIASES.get(self.preset, self.preset)
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; known presets are {sorted(PRESETS)}.")
        require_one_preset(self.preset, self.to_dict())
        for name, value in PRESETS[self.preset].items():
            if name in self.__dataclass_fields__ and getattr(self, name) is None:
                setattr(self, name, value)
        self.check_budget()
        check_settings(self)
        require_effect(self)

    @property
    def chooses_first(self) -> bool:
        """Whether the choice is made before the first step of the search."""
        return self.settle_at == 0

    @property
    def distillation_weight(self) -> float:
        """Weight of distillation in the classification loss of this preset's search."""
        return PRESETS[self.preset]["distillation_weight"]

    def search_space(self, model_config: PreTrainedConfig) -> SearchSpace:
        """Return the candidates of every searched submodule of a model.

        Args:
            model_config: of the model, stock or ours.

        Raises:
            ValueError: if the model is of another family, or if given candidates or the latency
                table do not fit it.
        """
        architecture = self._checked_architecture(model_config)
        wanted = {
            "embedding": self.search_embedding,
            "attention": self.search_attention,
            "mlp": self.search_mlp,
        }
        searched = []
        for submodule in architecture.submodules:
            # Earlier searches may have left out some submodules: there is nothing to choose.
            if wanted[submodule.kind] and math.prod(submodule.shape):
                searched.append(submodule)
        if not searched:
            raise ValueError(
                "nothing to search: the model has no units of the kinds that are to be searched."
            )
        check_candidates(self, searched)
        spaces = [submodule_space(self, each, may_vanish(self, each.kind)) for each in searched]
        if self.uniform_across_layers:
            spaces = tie_layers(spaces)
        return SearchSpace(tuple(spaces))

    def _checked_architecture(self, model_config: PreTrainedConfig) -> Architecture:
        """Return the architecture of a model; raise ValueError if it cannot be searched like
        this."""
        if self.family is not None and not isinstance(model_config, self.family):
            raise ValueError(
                f"{type(self).__name__} searches {self.family.__name__} models, got a "
                f"{type(model_config).__name__}."
            )
        architecture = describe(model_config)
        if not self.search_tokens:
            self.require_fit(architecture)
            return architecture
        if not supports_tokens(model_config):
            raise ValueError(
                f"search_tokens is True, but a {type(model_config).__name__} has no class token "
                "to rank tokens by (and Swin's windows need the whole grid); turn it off."
            )
        # A search for tokens may come to forward parts that the model itself does not have.
        self.require_fit(architecture, with_fewest_tokens(model_config))
        return architecture

    def as_given(self) -> "BiMaskConfig":
        """Return the same search of a network that is not rewritten first."""
        if self.chooses_first or self.importance_source == "gradients":
            return replace(self, basis="given")
        return replace(self, basis="given", importance_source="gradients")

    def fitted_to(self, model_config: PreTrainedConfig, **changes: Any) -> "BiMaskConfig":
        """Return the same search for a network that was cut from the one this config is for.

        Args:
            model_config: of the smaller network. Lists of candidates lose the sizes above its own.
            changes: other fields to set, the budget for example.
        """
        lists: dict[str, list[int] | None] = {}
        for name, full in full_sizes(describe(model_config).submodules).items():
            if full:
                lists[name] = up_to(max(full.values()), getattr(self, name)) or None
        return replace(self, **lists | changes)

    def with_preset(self, preset: str, **changes: Any) -> "BiMaskConfig":
        """Return the same search under another preset.

        Fields that have the value of the present preset get that of the other one; fields that were
        set to something else stay as they are. (`dataclasses.replace` would keep all of them.)

        Args:
            preset: "default" or "paper".
            changes: other fields to set.

        Raises:
            ValueError: as for a new config, for example for fields that have no effect under the
                other preset.
        """
        left_to_it: dict[str, None] = {}
        for name, value in PRESETS[self.preset].items():
            if name in self.__dataclass_fields__ and getattr(self, name) == value:
                left_to_it[name] = None
        return replace(self, **left_to_it | {"preset": preset} | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, values of the preset filled in."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the config as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BiMaskConfig":
        """Return the config with these fields.

        Fields that version 0.2 removed are ignored where they changed nothing.

        Raises:
            ValueError: naming unknown fields and the known ones, and removed fields that the
                search no longer follows.
        """
        values = without_removed(values)
        known = {each.name for each in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {unknown}; its fields are {sorted(known)}."
            )
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "BiMaskConfig":
        """Return the config that `save` wrote."""
        return cls.from_dict(ADDED | json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass
class ViTBiMaskConfig(BiMaskConfig):
    """Search of a `ViTForImageClassification` (DeiT included): residual, head and MLP widths.

    Example:

    ```python
    >>> from ofb_hf import ViTBiMaskConfig

    >>> ViTBiMaskConfig(target_macs=0.5, search_embedding=False).budget
    ('target_macs', 0.5)
    >>> # attentions and MLPs may be left out altogether
    >>> ViTBiMaskConfig(target_macs=0.3, search_depth=True).search_depth
    True
    ```"""

    family: ClassVar[type[PreTrainedConfig]] = ViTConfig


@dataclass
class SwinBiMaskConfig(BiMaskConfig):
    """Search of a `SwinForImageClassification`: the width of every stage, heads and MLPs of blocks.

    The paper reports a search of Swin but describes no space for it, and no code of one is public:
    this space is designed for this package. The widths of the stages are independent, they need not
    double; a removed head takes its relative position bias along.

    Example:

    ```python
    >>> from ofb_hf import SwinBiMaskConfig

    >>> SwinBiMaskConfig(target_macs=0.5, search_mlp=False).budget
    ('target_macs', 0.5)
    ```"""

    family: ClassVar[type[PreTrainedConfig]] = SwinConfig


CONFIG_CLASSES: tuple[type[BiMaskConfig], ...] = (ViTBiMaskConfig, SwinBiMaskConfig)


def default_config(model_config: PreTrainedConfig, **values: Any) -> BiMaskConfig:
    """Return a config for the family of a model, with the given fields.

    A family without a config class of its own gets a `BiMaskConfig`.

    Raises:
        UnsupportedArchitectureError: for models of no family.
    """
    describe(model_config)
    for config_class in CONFIG_CLASSES:
        if isinstance(model_config, config_class.family):
            return config_class(**values)
    return BiMaskConfig(**values)


__all__ = ["BiMaskConfig", *(config_class.__name__ for config_class in CONFIG_CLASSES)]
