"""Keep the import paths of version 0.1 working: `from ofb_hf.bi_mask import BiMask` still gives the
class.

Modules moved into sub-packages. An old path resolves to a stand-in that looks names up where they
are now, with a `DeprecationWarning`. Names that are called something else now, in these modules and
in those that are still there, are not found, and the error says what they are called.
"""

import dis
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
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
    "compensation": ("pruning.compensation", "pruning.fit"),
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


# Old name -> the new one, None if nothing has taken its place. Arguments may be others, too: so the
# old name is refused with an explanation, and does not give the new object.
RENAMED: dict[str, str | None] = {
    "architectures.BLOCK_HALVES": None,
    "architectures.CLASSIFIERS": None,
    "architectures.VIT_LAYERS": "families.vit.LAYERS",
    "architectures.vit_layer_parts": "families.token_reduction.layer_parts",
    "architectures.vit_parts": "families.token_reduction.schedule_parts",
    "architectures.vit_query_parameters": "families.description.StockTwin",
    "architectures.with_vit_layers": "families.description.StockTwin",
    "candidates.candidate_options": "choice.scores.scored_candidates",
    "candidates.first_order_options": "choice.scores.first_order_candidates",
    "choices.Choices": "search.decisions.Decisions",
    "data.epochs.Share": "data.epochs.Batching",
    "data.transforms.LIGHT_SHARE": "data.transforms.LIGHT_CHANGE",
    "flops.meant_schedule": "families.token_reduction.followed_schedule",
    "losses.budget_loss": None,
    "network.hub_refusals_in_words": "data.access.explained_hub_refusals",
    "plots.plot_family": "pictures.plots.plot_accuracy_over_cost",
    "schedule.budget_share": None,
    "schedule.settlement_step": "search.phases.settling_step",
    "searched_tokens.ROUNDS": None,
    "settlement.Option": "choice.problem.Candidate",
    "settlement.RELAXATION_STEPS": "choice.relaxation.STEPS",
    "settlement.Settlement": "choice.problem.Choice",
    "settlement.settle": "choice.knapsack.best_choice",
    "staging.is_ours": "release.folder.is_published_file",
    "stock.SIZES": "families.description.StockTwin",
    "token_choice.best_in_family": "choice.schedule_candidates.best_schedule",
    "token_choice.schedule_family": "choice.schedule_candidates.candidate_schedules",
    "token_choice.spread_over_family": "choice.schedule_candidates.spread_choices",
    "token_measure.nearest_settlement": "search.trial_cuts.nearest_choice",
    "token_pictures.GREY": "pictures.token_maps.DIMMED",
    "unit_groups.block_params": "families.blocks.Block",
    "workflow.arguments.DECISIVE": "workflow.settings.DECISIVE",
    "workflow.arguments.DEMO_CONFIG": "workflow.command_line.DEMO_CONFIG",
    "workflow.arguments.command_line": "workflow.command_line.command_line",
    "workflow.arguments.parse": "workflow.command_line.parse",
    "workflow.arguments.phase_arguments": "workflow.run.Run.phase_arguments",
    "workflow.arguments.training_settings": "workflow.settings.training_settings",
    "workflow.family.run": "workflow.several_budgets.run_several_budgets",
    "workflow.finetune.Finetuning": "workflow.run.Run",
    "workflow.finetune.run": "workflow.finetune.run_finetune",
    "workflow.latency_table.CALLS": "workflow.timing.CALLS",
    "workflow.report.LATENCY": "workflow.report.LATENCY_COLUMNS",
    "workflow.report.family_rows": "workflow.report.budget_rows",
    "workflow.search.SUBNET_FILE": "workflow.output.SUBNET",
    "workflow.search.Walk": "workflow.run.Run",
    "workflow.search.datasets": "workflow.run.Run.datasets",
    "workflow.search.draw_token_pictures": "workflow.results.token_picture",
    "workflow.search.finetune": "workflow.run.Run.finetune_searched",
    "workflow.search.is_done": "workflow.run.Run.is_done",
    "workflow.search.license_of": "workflow.results.license_of",
    "workflow.search.output_of": "workflow.run.Run.unfinished",
    "workflow.search.push": "workflow.results.push",
    "workflow.search.run": "workflow.search.run_search",
    "workflow.search.run_phase": "workflow.run.Run.train",
    "workflow.search.run_settings": "workflow.run.search_settings",
    "workflow.search.save_dense": "workflow.results.save_dense",
    "workflow.search.train_dense": "workflow.run.Run.train_dense",
    "workflow.tokens.run": "workflow.search_tokens.run_search_tokens",
    "workflow.tokens.subnet_of": "workflow.inputs.load_subnet",
}


def refusing_renamed(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that is still there and has lost names.

    Args:
        module: its `__name__`.
    """

    def get(name: str) -> Any:
        _refuse_renamed(module, name, sys._getframe(1))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


def _refuse_renamed(module: str, name: str, caller: FrameType) -> None:
    """Raise an error that says what an old name is called now; return for all other names.

    Args:
        module: in which it is looked up, with the package.
        caller: the frame that looks it up.
    """
    old = f"{module.partition('.')[2]}.{name}"
    if old not in RENAMED:
        return
    new = RENAMED[old]
    message = f"{module}.{name} has been removed, and nothing has taken its place."
    if new is not None:
        message = f"{module}.{name} is now {__package__}.{new}; its arguments may have changed."
    # `from module import name` puts a message of its own in the place of an AttributeError's.
    if caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]:
        raise ImportError(message, name=module)
    raise AttributeError(message)


class _StandIn(ModuleType):
    """An old module whose names are looked up in the modules that hold them now."""

    def __init__(self, name: str, homes: tuple[str, ...]):
        super().__init__(name, f"Moved to {' and '.join(homes)}.")
        self._homes = homes

    def __getattr__(self, name: str) -> Any:
        _refuse_renamed(self.__name__, name, sys._getframe(1))
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
