"""The search: one training run that learns weights, importance and widths together, and shrinks the
network."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_NAME

from ..cost.counting import count_macs, count_params
from ..cost.latency import count_latency, milliseconds
from ..families.subnet import SubnetSpec
from ..pruning.compensation import Compensation
from ..pruning.surgery import rebuild_ddp_, slice_optimizer_
from ..space.configuration import BiMaskConfig
from ..tokens.schedules import Schedule
from ..training.arguments import OFBTrainingArguments, check_search_arguments
from ..training.distillation import DistillationTrainer
from ..training.losses import flops_loss
from ..training.ranks import decided_by_rank_0, require_identical_ranks
from ..training.resumable import require_same_search
from . import phases as schedule
from .observation import OBSERVED_IMAGES, Observation
from .parameter_groups import parameter_groups
from .pmim import hidden_first, mask_patches, normalize_target, reconstruction_loss, refine_mask
from .supernet import Supernet, compress, dense_parent, install_bi_masks, read_subnet
from .trial_cuts import nearest_choice

BI_MASK_CONFIG_FILE = "bi_mask_config.json"


class OFBTrainer(DistillationTrainer):
    """Searches a classifier under a budget; `compress` gives the small model afterwards.

    Args:
        model: a classifier (bi-masks are installed on a copy of it) or a supernet from
            `install_bi_masks`.
        args: `OFBTrainingArguments`; `max_steps` or `num_train_epochs` is the length of the search.
        bi_mask_config: what to search, when `model` is no supernet yet.
        teacher: classifier to learn from; by default the dense model itself where the preset
            distils.
        kwargs: as for `DistillationTrainer`.

    Raises:
        ValueError: for arguments that contradict each other or a search, before any data is read.

    Example:

    ```python
    trainer = OFBTrainer(model, OFBTrainingArguments("out", max_steps=1000), ViTBiMaskConfig(target_macs=0.5),
                         train_dataset=train, eval_dataset=test)
    trainer.train()
    small = trainer.compress()
    ```"""

    def __init__(
        self,
        model: nn.Module,
        args: OFBTrainingArguments,
        bi_mask_config: BiMaskConfig | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        check_search_arguments(args)
        if isinstance(model, Supernet) and bi_mask_config is not None:
            raise ValueError(
                "bi_mask_config is given, but the model is a supernet that already has one; leave "
                "it out."
            )
        # the masks' random start belongs to the run, as the order of the data does
        set_seed(args.seed)
        supernet = model if isinstance(model, Supernet) else install_bi_masks(model, bi_mask_config)
        dense = dense_parent(supernet) if supernet.is_fresh else None
        weight = args.distillation_weight
        if weight is None:
            # Not all of it: a dense model that learns from itself has no gradient, and nothing
            # could be observed.
            weight = supernet.bi_mask_config.distillation_weight or float(teacher is not None)
        if teacher is None and weight > 0:
            if weight == 1 and supernet.bi_mask_config.importance_hold:
                raise ValueError(
                    "distillation_weight is 1 and the teacher is the dense model itself: it "
                    "agrees with itself, so "
                    "there are no gradients to rank units by. Leave labels a share (0.5), or give "
                    "another teacher."
                )
            if dense is None:
                raise ValueError(
                    "the supernet has been searched already, so the dense model to learn from is "
                    "no longer in it; "
                    "give that model as teacher, or distillation_weight=0."
                )
            teacher = dense
        config = supernet.bi_mask_config
        # A network that trains on with its choice learns by itself what a fit, long afterwards,
        # would undo.
        fits = config.compensate and (config.prune_during_search or config.settle_at == 1)
        self.compensation = Compensation(dense) if fits and dense is not None else None
        super().__init__(
            model=supernet, args=args, teacher=teacher, distillation_weight=weight, **kwargs
        )
        self.supernet, self.bi_mask_config = supernet, supernet.bi_mask_config
        self.add_callback(SearchCallback(self))
        self._pmim_sums = torch.zeros(2, device=args.device)
        self._schedule: dict[str, float] = {}
        self._handed_over = False
        self._resting_choice: tuple[Tensor, ...] | None = None
        self.observation = Observation(supernet, self.accelerator)

    def training_losses(
        self, model: nn.Module, pixel_values: Tensor, labels: Tensor
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Classification, PMIM, budget, one-hot and importance losses of one micro-batch."""
        supernet, config, now = self.supernet, self.bi_mask_config, self._schedule
        is_new = not self.observation.repeats
        if is_new and self.compensation is not None and self.args.process_index == 0:
            self.compensation.remember(pixel_values)
        if is_new and supernet.tokens is not None and now["importance_phase"]:
            self.observation.images.append(pixel_values)
        hides = supernet.repaints and not self._is_observing
        if hides:
            grid, size = (
                supernet.dense_architecture.token_grid,
                supernet.dense_architecture.token_size,
            )
            hidden, repainted = self._hide_tokens(len(pixel_values))
            factor = size // supernet.dense_architecture.patch_size
            masked_patches = refine_mask(
                hidden, grid, supernet.dense_architecture.patch_grid, factor
            )
            outputs = model(
                pixel_values=pixel_values, bool_masked_pos=masked_patches, repainted=repainted
            )
        else:
            outputs = model(pixel_values=pixel_values)
        parts = {"task": self.task_loss(outputs.logits, pixel_values, labels)}
        loss = parts["task"]
        if hides:
            target = normalize_target(pixel_values, supernet.pmim_window)
            parts["pmim"] = reconstruction_loss(
                outputs.reconstruction, target, hidden, grid, size, repainted
            )
            loss = loss + config.pmim_weight * supernet.pmim_ratio * parts["pmim"]
            self._pmim_sums += torch.stack(
                [parts["task"].detach().float(), parts["pmim"].detach().float()]
            )
        elif supernet.pmim_decoder is not None:
            parts["pmim"] = torch.zeros_like(parts["task"])

        expected, parts["expected_macs"], parts["one_hot"], parts["importance"] = self._choice()
        parts["flops"] = flops_loss(expected, supernet.target, supernet.dense_cost)
        if not now["importance_phase"]:
            loss = loss + config.flops_weight * parts["flops"]
        loss = loss + now["one_hot_weight"] * parts["one_hot"]
        if config.importance_penalty:
            loss = loss + config.importance_penalty * parts["importance"]
        return outputs, parts, loss

    def _choice(self) -> tuple[Tensor, ...]:
        """Expected cost, expected MACs, one-hot loss and importance penalty; scalars."""
        if self._resting_choice is not None:
            return self._resting_choice
        supernet = self.supernet
        sizes = supernet.sizes("bi_mask" if self._schedule["importance_phase"] else "sparsity")
        costs = supernet.expected_cost(sizes), supernet.expected_macs(sizes)
        choice = (*costs, supernet.one_hot_loss(), supernet.importance_penalty())
        if supernet.is_folded or self._is_observing:  # no mask moves
            self._resting_choice = tuple(part.detach() for part in choice)
            return self._resting_choice
        return choice

    def _hide_tokens(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Which final tokens lose their patches (B, N), and which are repainted (B, K).

        Nothing hidden is a mask like any other, and as many are repainted at every step: the same
        graph to compile, and every parameter takes part under DDP.
        """
        config, grid = self.bi_mask_config, self.supernet.dense_architecture.token_grid
        tokens = grid[0] * grid[1]
        masked = mask_patches(batch_size, tokens, self._schedule["keep_ratio"], self.generator)
        most = tokens - int(tokens * min(config.keep_ratio_start, config.keep_ratio_end))
        drawn = masked, hidden_first(masked, most)
        if self.args.device.type == "cuda":
            # from ordinary memory it waits for all that is queued
            drawn = [tensor.pin_memory() for tensor in drawn]
        return tuple(tensor.to(self.args.device, non_blocking=True) for tensor in drawn)

    def begin_search(self) -> None:
        """Finds out, once, whether a resumed run has its importance phase behind it.

        Raises:
            ValueError: for a supernet whose choice is made, if there would be units to rank.
        """
        observes = self._observes and self.state.global_step < self._hold_steps(
            self.state.max_steps
        )
        if observes and self.supernet.is_folded:
            raise ValueError(
                "the supernet has made its choice, and its bi-masks are part of its weights: "
                "there is nothing left to "
                "search in it. compress() gives the network; another search begins with that one."
            )
        self._handed_over = not self.bi_mask_config.importance_hold or bool(
            self.supernet.importance_known
        )
        self.supernet.watch_tokens_(self._observes and not self._handed_over)

    def begin_search_step(self) -> None:
        """Sets everything that follows the global step; the step about to run is
        `state.global_step`."""
        config, supernet = self.bi_mask_config, self.supernet
        step, total = self.state.global_step, self.state.max_steps
        hold, warmup = self._hold_steps(total), config.warmup * total
        shrinks = hold <= step < schedule.settlement_step(config.settle_at, total)
        hides = supernet.pmim_decoder is not None and (shrinks or not config.pmim_until_settled)
        lam = schedule.importance_weight(
            step - hold, warmup, config.importance_start, config.importance_end
        )
        keep = schedule.keep_ratio(step, warmup, config.keep_ratio_start, config.keep_ratio_end)
        self._schedule = {
            "lam": lam,
            "keep_ratio": keep if hides else 1.0,
            "importance_phase": step < hold,
            "one_hot_weight": schedule.one_hot_weight(
                step,
                config.one_hot_begin * total,
                config.one_hot_end * total,
                config.one_hot_weight,
            ),
        }
        supernet.lam.fill_(lam)
        supernet.refresh_liveness()
        self._pmim_sums.zero_()
        self.observation.images = []

    @property
    def _observes(self) -> bool:
        return self.bi_mask_config.importance_hold > 0

    @property
    def _is_observing(self) -> bool:
        return self._observes and self._schedule["importance_phase"]

    def _hold_steps(self, total: int) -> int:
        """Steps of the importance phase; at least one where there has to be something to observe,
        and not too many."""
        hold, args = self.bi_mask_config.importance_hold, self.args
        if not hold:
            return 0
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        enough = min(
            math.ceil(OBSERVED_IMAGES / batch),
            schedule.settlement_step(self.bi_mask_config.settle_at, total),
        )
        return min(max(1, round(hold * total)), enough)

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Ends the importance phase: importance as it was observed, alpha as importance
        suggests."""
        masks = self.supernet.bi_masks
        self.supernet.watch_tokens_(False)

        def decide() -> tuple[list[tuple[Tensor, Tensor]], Schedule | None]:
            self.supernet.estimate_importance_(
                lambda found: nearest_choice(self.supernet, found, self.observation.images)
            )
            self.supernet.fit_alpha_()
            return [
                (mask.importance_logits.cpu(), mask.alpha.cpu()) for mask in masks
            ], self.supernet.token_schedule

        scores, token_schedule = decided_by_rank_0(decide)
        self.supernet.decide_tokens_(token_schedule)
        for mask, (importance, alpha) in zip(masks, scores, strict=True):
            mask.importance_logits.copy_(importance)
            mask.alpha.copy_(alpha)
        # Everything rested: moments of nothing, grown old, make large first steps.
        self.optimizer.state.clear()
        self.supernet.importance_known.fill_(True)
        self._handed_over, self._resting_choice = True, None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One forward and backward pass; or one that is only observed, and teaches nothing."""
        if not self._is_observing:
            return super().training_step(model, inputs, num_items_in_batch)
        # The bare network: ranks add up what they saw afterwards, and nothing is compiled for so
        # few steps.
        backward = partial(
            super().training_step, self.supernet, num_items_in_batch=num_items_in_batch
        )
        return self.observation.observe(inputs, backward, self.current_gradient_accumulation_steps)

    @torch.no_grad()
    def end_search_step(self) -> None:
        """Retires candidates or settles at their steps, and shrinks."""
        supernet, config = self.supernet, self.bi_mask_config
        step, total = self.state.global_step, self.state.max_steps
        if supernet.repaints:
            # every rank goes on with the same weight
            task, pmim = self.accelerator.reduce(self._pmim_sums)
            ratio = (task / pmim.clamp(min=1e-8)).clamp(max=config.pmim_max_ratio)
            supernet.pmim_ratio.copy_(torch.where(pmim > 0, ratio, supernet.pmim_ratio))

        if not self._handed_over and step >= self._hold_steps(total):
            self._hand_over()
        last = schedule.settlement_step(config.settle_at, total)
        every, begin = max(1, total // config.retire_events), config.retire_begin * total
        settles = step == last
        retires = step < last and schedule.is_retirement_step(step, every, begin)
        if settles or retires:
            self._decide(supernet.settle_ if settles else supernet.retire_candidates)
        if step == total or (config.prune_during_search and (settles or retires)):
            self.shrink(fold=settles or step == total)
        elif settles or retires:
            self._require_identical_ranks()

    def _decide(self, decide: Callable[[], Any]) -> None:
        """Lets rank 0 retire candidates; all ranks do as it did."""
        masks = self.supernet.bi_masks
        before = [mask.active_candidates.clone() for mask in masks]

        def decision() -> tuple[list[tuple[Tensor, Tensor]], Schedule | None]:
            decide()
            return [
                (mask.active_candidates.cpu(), mask.alive.cpu()) for mask in masks
            ], self.supernet.token_schedule

        choices, token_schedule = decided_by_rank_0(decision)
        self.supernet.decide_tokens_(token_schedule)
        for mask, (active, alive), previous in zip(masks, choices, before, strict=True):
            mask.active_candidates.copy_(active)
            mask.alive.copy_(alive)
            if not torch.equal(mask.active_candidates, previous):
                # A softmax over fewer candidates is another problem: its momentum starts afresh
                # (published).
                self.optimizer.state.pop(mask.alpha, None)

    def shrink(self, fold: bool = False) -> None:
        """Removes dead units from the network, its average and the optimizer, and tells DDP about
        it.

        Args:
            fold: make the bi-masks part of the weights as well; for a settled supernet.

        Raises:
            RanksDifferError: if the ranks no longer hold the same network; checked whether or not
                anything was removed.
        """
        replaced, plan = self.supernet.shrink_()
        names = {parameter: name for name, parameter in self.supernet.named_parameters()}
        stayed = {old: names[new] for old, new in replaced.items() if new is not None}
        entries = {old: plan[name] for old, name in stayed.items() if not name.endswith(".alpha")}
        slice_optimizer_(self.optimizer, replaced, entries)
        if self.average is not None:
            self.average.slice_(plan, names.values())
        if fold:
            replaced |= self._fold()
        # before DDP is rebuilt: copying rank 0's values would hide a difference
        self._require_identical_ranks()
        if not replaced:
            return
        # torch.compile wraps once more
        wrapped = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        if wrapped is not self.model_wrapped:
            # The code compiled for the larger network is never needed again, and counts towards the
            # number of variants after which torch gives up and runs eagerly.
            torch.compiler.reset()
        if isinstance(wrapped, DistributedDataParallel):
            rebuild_ddp_(wrapped)

    def _fold(self) -> dict[nn.Parameter, None]:
        if self.average is not None:
            with self.average.applied_to(self.supernet):  # it has masks of its own
                self.supernet.scale_(self.average.part_of("model."))
        # Moments of the weights stay as they are: Adam does not see a common factor of a gradient.
        resting = self.supernet.fold_()
        slice_optimizer_(self.optimizer, resting, {})
        if self.compensation is not None:
            self._compensate()
        return resting

    @torch.no_grad()
    def _compensate(self) -> None:
        small, compensation, self.compensation = self.supernet.model, self.compensation, None
        if self.average is not None and self.state.global_step == self.state.max_steps:
            # no step will follow: the average is what is kept, so it is fitted
            self.average.copy_to_(self.supernet)
        for name, values in decided_by_rank_0(
            lambda: compensation.fit_(small, self.read_subnet())
        ).items():
            parameter = small.get_parameter(name)
            parameter.copy_(values)
            self.optimizer.state.pop(parameter, None)
        if self.average is not None:
            # layers fitted to each other, not to averages of what they were
            self.average.restart(self.supernet)

    def _require_identical_ranks(self) -> None:
        if self.args.world_size > 1:
            require_identical_ranks(self.supernet, self.optimizer, self.state.global_step)

    def compress(self) -> PreTrainedModel:
        """The small dense model that the search arrived at; its MACs or parameters are within the
        budget."""
        return compress(self.supernet)

    def read_subnet(self) -> SubnetSpec:
        """The units of the dense model that `compress` keeps."""
        return read_subnet(self.supernet)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One AdamW with the groups of `parameter_groups`.

        Fused where `args.optim` says so, which is transformers' default: the same update in one
        pass over the weights.
        """
        if self.optimizer is None:
            fused = self.args.optim == OptimizerNames.ADAMW_TORCH_FUSED
            groups = parameter_groups(self.supernet, self.args)
            self.optimizer = torch.optim.AdamW(groups, eps=self.args.adam_epsilon, fused=fused)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """One LambdaLR: weights and decoder follow `lr_scheduler_type`, the masks as their preset
        says."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            hold = self._hold_steps(num_training_steps)
            # the schedule of the weights begins when they begin to move
            reference = get_scheduler(
                self.args.lr_scheduler_type,
                # Some schedules end at a given learning rate: they have to know the one they start
                # from.
                torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate),
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps - hold,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
            constant = lambda step: 1.0  # noqa: E731
            follow = lambda step: reference.lr_lambdas[0](max(step - hold, 0))  # noqa: E731
            masks = follow if self.bi_mask_config.masks_follow_schedule else constant
            factors = {
                "weights": lambda step: 0.0 if step < hold else follow(step),
                "importance": lambda step: 0.0 if step < hold else masks(step),
            }
            factors["weights_no_decay"] = factors["pmim_decoder"] = factors["weights"]
            factors["architecture"] = factors["importance"]
            self.lr_scheduler = LambdaLR(
                optimizer, [factors[group["name"]] for group in optimizer.param_groups]
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds schedule values and the real size of the network to the parts of the loss."""
        if "loss" in logs:
            logs |= {name: self._schedule[name] for name in ("lam", "keep_ratio")}
            config = self.supernet.config
            logs |= {"macs": count_macs(config), "params": count_params(config)}
            if self.bi_mask_config.table is not None:
                logs["latency_ms"] = milliseconds(count_latency(config, self.bi_mask_config.table))
            logs["active_candidates"] = self.supernet.num_active_candidates
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            self.bi_mask_config.save(folder / BI_MASK_CONFIG_FILE)
            if self.compensation is not None:
                self.compensation.save(folder)

    def _load_weights(self, checkpoint: Path) -> None:
        saved = type(self.bi_mask_config).load(checkpoint / BI_MASK_CONFIG_FILE)
        require_same_search(saved.to_dict(), self.bi_mask_config.to_dict(), checkpoint)
        self.supernet.shrink_to_(safetensors.torch.load_file(checkpoint / SAFE_WEIGHTS_NAME))
        if self.supernet.is_folded:
            self.compensation = None
        elif self.compensation is not None:
            self.compensation.load(checkpoint, self.args.device)
        super()._load_weights(checkpoint)


class SearchCallback(TrainerCallback):
    """Moves the search on: schedules before a step; retirement, shrinking and choice
    after it."""

    def __init__(self, trainer: "OFBTrainer"):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Looks at where the supernet stands; a checkpoint has been loaded by now."""
        self.trainer.begin_search()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Sets lambda, keep ratio, budget and one-hot weight for this step."""
        self.trainer.begin_search_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Decides and cuts. Gradients are gone here, and a checkpoint of this step includes the
        cut."""
        self.trainer.end_search_step()
