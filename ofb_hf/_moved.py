"""Keep the import paths of version 0.1 working: `from ofb_hf.bi_mask import BiMask` still gives the
class.

Modules moved into sub-packages. An old path resolves to a stand-in that looks names up where they
are now, with a `DeprecationWarning`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Old module -> the modules that hold its names now; the first one is what the warning recommends.
MOVED: dict[str, tuple[str, ...]] = {
    "architectures": (
        "families.registry",
        "families.description",
        "families.blocks",
        "families.vit",
        "families.swin",
        "families.token_reduction",
    ),
    "averaging": ("training.averaging",),
    "baselines": ("choice.baselines",),
    "bi_mask": ("masks.bi_mask", "masks.arithmetic"),
    "budget": ("cost.budget",),
    "callbacks": ("training.callbacks", "training.history", "training.averaging", "search.trainer"),
    "candidates": ("choice.scores",),
    "checkpoints": ("training.checkpoints", "families.loading"),
    "choices": ("search.decisions",),
    "compensation": ("pruning.compensation",),
    "configuration": ("space.configuration",),
    "consistency": ("training.ranks",),
    "data.blocks": ("data.row_blocks",),
    "distillation": ("training.distillation", "training.classifier"),
    "export": ("release.export",),
    "flops": ("cost.counting", "families.token_reduction"),
    "hub": ("release.hub",),
    "interruption": ("training.interruption",),
    "latency": ("cost.latency", "cost.latency_entries"),
    "leaks": ("release.leaks",),
    "learned_tokens": ("token_search.learned_counts",),
    "losses": ("training.losses", "masks.one_hot"),
    "mask_stack": ("masks.stack",),
    "masked_layers": ("masks.gates",),
    "model_card": ("release.card",),
    "network": ("hub_retries", "data.access"),
    "observation": ("search.observation", "search.phases"),
    "parameter_groups": ("search.parameter_groups",),
    "parts": ("families.forward_parts",),
    "plots": ("pictures.plots",),
    "pmim": ("search.pmim",),
    "presets": ("space.presets",),
    "recomputation": ("training.activation_checkpointing",),
    "resumable": ("training.resumable",),
    "schedule": ("search.phases",),
    "search_space": ("space.search_space", "families.subnet"),
    "searched_tokens": ("search.searched_tokens",),
    "settlement": ("choice.knapsack", "choice.problem", "choice.picks", "cost.budget"),
    "staging": ("release.folder",),
    "stock": ("release.stock",),
    "supernet": ("search.supernet",),
    "surgery": ("pruning.surgery",),
    "token_choice": ("choice.schedule_candidates",),
    "token_measure": ("search.trial_cuts",),
    "token_pictures": ("pictures.token_maps",),
    "token_trainer": ("token_search.trainer",),
    "trainer": ("search.trainer",),
    "training_args": ("training.arguments",),
    "unit_groups": ("families.description", "families.blocks"),
    "workflow.family": ("workflow.several_budgets",),
    "workflow.tokens": ("workflow.search_tokens",),
}


class _StandIn(ModuleType):
    """An old module whose names are looked up in the modules that hold them now."""

    def __init__(self, name: str, homes: tuple[str, ...]):
        super().__init__(name, f"Moved to {' and '.join(homes)}.")
        self._homes = homes

    def __getattr__(self, name: str) -> Any:
        for home in self._homes:
            module = importlib.import_module(home)
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} moved to {self._homes}; no {name!r} there.")


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins. It comes last on `sys.meta_path`: a real module of that name wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old module path, None for every other name."""
        package, _, old = fullname.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the stand-in and warn where the names are now."""
        homes = tuple(f"{__package__}.{home}" for home in MOVED[spec.name.partition(".")[2]])
        warnings.warn(
            f"{spec.name} moved to {homes[0]}; the old path goes in version 1.0.",
            DeprecationWarning,
            stacklevel=2,
        )
        return _StandIn(spec.name, homes)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no code of its own."""


def install() -> None:
    """Make the old import paths of the package work; calling it again changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
