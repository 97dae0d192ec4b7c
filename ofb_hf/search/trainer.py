"""The search: one training run that learns weights, importance and widths, and shrinks the network.

The methods of `OFBTrainer` come in the order of a search: what happens before the first step,
before a step, in a step, and after it; then what is read from the result.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
    set_seed,
)
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..choice.problem import Choice
from ..cost.counting import count_macs, count_params
from ..cost.latency import count_latency, milliseconds
from ..families.subnet import SubnetSpec
from ..pruning.compensation import Compensation
from ..pruning.surgery import rebuild_ddp_, slice_optimizer_
from ..space.configuration import BiMaskConfig
from ..tokens.schedules import Schedule
from ..training.arguments import OFBTrainingArguments, check_search_arguments
from ..training.distillation import DistillationTrainer
from ..training.full_precision import in_full_precision
from ..training.losses import flops_loss
from ..training.ranks import decided_by_rank_0, require_identical_ranks
from ..training.resumable import require_same_search
from .curve_scores import require_curves, score_by_error_curves_
from .first_choice import (
    images_to_choose_by,
    require_something_to_cut,
    settle_first_,
    take_weights_,
)
from .hidden_patches import HiddenPatches
from .observation import Observation
from .own_teacher import require_own_teacher
from .parameter_groups import learning_rate_factors, parameter_groups
from .phases import Phases, SearchStep
from .rewriting import images_for_basis, in_basis
from .shrinking import shrink_, shrink_to_
from .supernet import Supernet, compress, dense_parent, install_bi_masks, read_subnet
from .trial_cuts import nearest_choice

logger = logging.get_logger(__name__)

BI_MASK_CONFIG_FILE = "bi_mask_config.json"
# The dense network in the basis that is searched, in every checkpoint of a search that rewrote it.
REWRITTEN_FILE = "rewritten_dense.safetensors"


class ChoiceLosses(NamedTuple):
    """What a step needs to know about the open choice, scalars."""

    expected_cost: Tensor  # in the budget's unit
    expected_macs: Tensor
    one_hot: Tensor
    importance: Tensor


class OFBTrainer(DistillationTrainer):
    """Search a classifier under a budget; `compress` gives the small model afterwards.

    Args:
        model: a classifier (bi-masks are installed on a copy of it, in float32) or a supernet from
            `install_bi_masks`. `compress` gives back the type that it has.
        args: `OFBTrainingArguments`; `max_steps` or `num_train_epochs` is the length of the search.
        bi_mask_config: what to search, when `model` is no supernet yet. With a `basis` other than
            "given" the model is rewritten first, by images of `calibration_dataset`.
        teacher: classifier to learn from; by default the dense model itself where the preset
            distils.
        calibration_dataset: rows like those of `train_dataset`, but as an image processor makes
            them, not augmented: some of them say which basis is best, what units are worth, and fit
            what is left. `train_dataset` if not given.
        kwargs: as for `DistillationTrainer`.

    Attributes:
        rewritten_dense: the given classifier in the basis that is searched, whose units
            `read_subnet` counts; None if it is searched as it is.

    Raises:
        ValueError: for arguments that contradict each other or a search, before any data is read.

    Example:

    ```python
    args = OFBTrainingArguments("out", max_steps=1000)
    config = ViTBiMaskConfig(target_macs=0.5)
    trainer = OFBTrainer(model, args, config, train_dataset=train, eval_dataset=test)
    trainer.train()
    small = trainer.compress()
    ```"""

    unserved: ClassVar[dict[str, str]] = DistillationTrainer.unserved | dict.fromkeys(
        ("optimizers", "optimizer_cls_and_kwargs"),
        "trains a copy of the network, and slices the state of its own AdamW with it; leave it "
        "out, and set learning_rate, weight_decay and lr_scheduler_type in args",
    )

    def __init__(
        self,
        model: nn.Module,
        args: OFBTrainingArguments,
        bi_mask_config: BiMaskConfig | None = None,
        teacher: PreTrainedModel | None = None,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ):
        self.require_arguments(model, args, kwargs)
        check_search_arguments(args)
        # The random start of the masks belongs to the run, as the order of the data does.
        set_seed(args.seed)
        self.stored_type = next(model.parameters()).dtype
        given = model = in_full_precision(model)
        if not isinstance(model, Supernet):
            model = in_basis(
                given, bi_mask_config, args, calibration_dataset=calibration_dataset, **kwargs
            )
            supernet = install_bi_masks(model, bi_mask_config)
        elif bi_mask_config is None:
            supernet = model
        else:
            raise ValueError(
                "bi_mask_config is given, but the model is a supernet that already has one; leave "
                "it out."
            )
        config = supernet.bi_mask_config
        if config.chooses_first:
            require_something_to_cut(supernet)
        elif config.importance_source == "error_curves":
            require_curves(supernet)
        dense = dense_parent(supernet) if supernet.is_fresh else None
        self.rewritten_dense = dense if model is not given else None
        weight = args.distillation_weight
        if weight is None:
            weight = config.distillation_weight or float(teacher is not None)
        if teacher is None and weight > 0:
            require_own_teacher(dense, weight, config)
            teacher = dense
        # A network that trains on after the choice without a cut would undo a fit by itself.
        fits = config.compensate and (config.prune_during_search or config.settle_at == 1)
        fits = fits and not config.chooses_first  # then the choice comes with its own fit
        self.compensation = Compensation(dense) if fits and dense is not None else None
        super().__init__(
            model=supernet, args=args, teacher=teacher, distillation_weight=weight, **kwargs
        )
        self.supernet = supernet
        self.calibration_dataset = calibration_dataset
        self.bi_mask_config = config
        self.observation = Observation(supernet, self.accelerator)
        self.hidden_patches = HiddenPatches(supernet, self.generator, args)
        # The network of a choice that was made before the first step, until its weights are taken.
        self._fitted: PreTrainedModel | None = None
        # Losses of the choice as long as no mask moves.
        self._resting_choice: ChoiceLosses | None = None
        self.add_callback(SearchCallback(self))

    # ---------------------------------------------------------------------- before the first step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return one AdamW with the groups of `parameter_groups`.

        It is fused where `args.optim` says so, which is transformers' default: the same update in
        one pass over the weights.
        """
        if self.optimizer is None:
            fused = self.args.optim == OptimizerNames.ADAMW_TORCH_FUSED
            groups = parameter_groups(self.supernet, self.args)
            self.optimizer = torch.optim.AdamW(groups, eps=self.args.adam_epsilon, fused=fused)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return one LambdaLR with the factors of `learning_rate_factors`."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            phases = self._phases_of(num_training_steps)
            factors = learning_rate_factors(self.bi_mask_config, self.args, phases)
            in_order = [factors[group["name"]] for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, in_order)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _phases_of(self, total_steps: int) -> Phases:
        args = self.args
        images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return Phases.of(self.bi_mask_config, total_steps, images_per_step)

    def begin_search(self) -> None:
        """Lay out the phases, and see where in them the supernet stands.

        A checkpoint has been loaded by now.

        Raises:
            ValueError: for a supernet whose choice is final, if there would be units to rank.
        """
        supernet = self.supernet
        self.phases = self._phases_of(self.state.max_steps)
        self._resting_choice = None
        observes = self.phases.at(self.state.global_step).observes
        if observes and supernet.is_folded:
            raise ValueError(
                "the supernet has made its choice, and its bi-masks are part of its weights: "
                "there is nothing left to search in it. compress() gives the network; another "
                "search begins with that one."
            )
        is_known = bool(supernet.importance_known)
        supernet.watch_tokens_(observes and not is_known)
        if self.bi_mask_config.chooses_first and not is_known:
            self.settle_first()
        if self.phases.observed_steps and not observes and not is_known:
            # Resumed with fewer steps than before, a search may find its observation over.
            self._hand_over()

    @torch.no_grad()
    def settle_first(self) -> None:
        """Choose by error curves, cut, and train on from what fits best."""
        dataset, augmentation = self.calibration_dataset, None
        if dataset is None:
            dataset, augmentation = self.train_dataset, self.batch_augmentation
        # A resumed search does none of this, and has to draw the same random numbers afterwards.
        with torch.random.fork_rng():
            dense = dense_parent(self.supernet)
            count = images_to_choose_by(dense)
            batches = list(images_for_basis(dataset, self.args, augmentation, count))
            self._fitted = settle_first_(self.supernet, dense, batches, self.args.seed)
            self.shrink(fold=True)

    @property
    def may_be_compared(self) -> bool:
        """Whether the network has its final sizes, and is still to be trained."""
        return self.supernet.is_folded and self.state.global_step < self.state.max_steps

    # ------------------------------------------------------------------------------ before a step

    def begin_search_step(self) -> None:
        """Set what follows from the number of the step; `state.global_step` steps are complete."""
        self.search_step: SearchStep = self.phases.at(self.state.global_step)
        self.supernet.lam.fill_(self.search_step.lam)
        self.supernet.refresh_liveness()
        self.hidden_patches.begin_step()
        self.observation.images = []

    # ---------------------------------------------------------------------------------- in a step

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one forward and backward pass, or observe one, from which nothing learns."""
        if not self.search_step.observes:
            return super().training_step(model, inputs, num_items_in_batch)
        # Of the bare network: ranks add up what they saw afterwards, and compiling takes longer
        # than so few steps.
        backward = partial(
            super().training_step, self.supernet, num_items_in_batch=num_items_in_batch
        )
        return self.observation.observe(inputs, backward, self.current_gradient_accumulation_steps)

    def training_losses(
        self, model: nn.Module, pixel_values: Tensor, labels: Tensor
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Compute the losses of one micro-batch.

        Classification and reconstruction are of the images, budget, one-hot loss and penalty are of
        the masks. Arguments and result as for `DistillationTrainer`.
        """
        self._remember(pixel_values)
        if self.supernet.repaints and not self.search_step.observes:
            keep_ratio = self.search_step.keep_ratio
            outputs, parts, loss = self.hidden_patches.losses(
                model, pixel_values, labels, keep_ratio, self.task_loss
            )
        else:
            outputs, parts, loss = super().training_losses(model, pixel_values, labels)
            if self.supernet.pmim_decoder is not None:
                # The same parts are logged in every step.
                parts["pmim"] = torch.zeros_like(loss)
        choice = self._choice_losses()
        parts["expected_macs"] = choice.expected_macs
        parts["one_hot"] = choice.one_hot
        parts["importance"] = choice.importance
        parts["flops"] = flops_loss(
            choice.expected_cost, self.supernet.target, self.supernet.dense_cost
        )
        if self.search_step.observes:
            return outputs, parts, loss
        config = self.bi_mask_config
        loss = loss + config.flops_weight * parts["flops"]
        loss = loss + self.search_step.one_hot_weight * parts["one_hot"]
        if config.importance_penalty:
            loss = loss + config.importance_penalty * parts["importance"]
        return outputs, parts, loss

    def _remember(self, pixel_values: Tensor) -> None:
        """Keep images (B, C, H, W) of the first steps for decisions that will look at them."""
        if self.observation.repeats:  # they have been kept already
            return
        # Rank 0 fits for all of them.
        if self.compensation is not None and self.args.process_index == 0:
            self.compensation.remember(pixel_values)
        if self.supernet.tokens is not None and self.search_step.observes:
            self.observation.images.append(pixel_values)

    def _choice_losses(self) -> ChoiceLosses:
        """Compute what a step needs to know about the open choice; once as long as masks rest."""
        if self._resting_choice is not None:
            return self._resting_choice
        supernet = self.supernet
        sizes = supernet.sizes("bi_mask" if self.search_step.observes else "sparsity")
        choice = ChoiceLosses(
            expected_cost=supernet.decisions.expected_cost(sizes),
            expected_macs=supernet.decisions.expected_macs(sizes),
            one_hot=supernet.one_hot_loss(),
            importance=supernet.importance_penalty(),
        )
        if self.search_step.observes or supernet.is_folded:
            choice = self._resting_choice = ChoiceLosses(*(part.detach() for part in choice))
        return choice

    # ------------------------------------------------------------------------------- after a step

    @torch.no_grad()
    def end_search_step(self) -> None:
        """Hand over, retire, settle and shrink, where the phases say so."""
        step = self.search_step
        decisions = self.supernet.decisions
        if self.supernet.repaints:
            self.hidden_patches.update_ratio(self.accelerator)
        # The buffer is read in one step of the search only: reading it waits for the device.
        if step.hands_over and not self.supernet.importance_known:
            self._hand_over()
        if step.settles:
            self._decide(decisions.settle_)
            if self.bi_mask_config.freeze_weights:
                # The weights rested: moments of what they did not follow are no start.
                self.optimizer.state.clear()
        elif step.retires:
            self._decide(decisions.retire_candidates)
        if step.shrinks:
            self.shrink(fold=step.folds)
        elif step.settles or step.retires:
            self._require_identical_ranks()

    @torch.no_grad()
    def _hand_over(self) -> None:
        """End the observation: set importance from it, and alpha from importance."""
        supernet = self.supernet
        decisions = supernet.decisions
        supernet.watch_tokens_(False)
        if self.bi_mask_config.importance_source == "error_curves":
            images = images_for_basis(self.train_dataset, self.args, self.batch_augmentation)
            score_by_error_curves_(supernet, list(images), self.args.seed)

        def nearest(choices: list[Choice]) -> Choice:
            return nearest_choice(supernet, choices, self.observation.images)

        def decide() -> tuple[list[tuple[Tensor, Tensor]], Schedule | None]:
            decisions.estimate_importance_(nearest)
            decisions.fit_alpha_()
            scores = [
                (mask.importance_logits.cpu(), mask.alpha.cpu()) for mask in supernet.bi_masks
            ]
            return scores, decisions.token_schedule

        scores, token_schedule = decided_by_rank_0(decide)
        decisions.decide_tokens_(token_schedule)
        for mask, (importance, alpha) in zip(supernet.bi_masks, scores, strict=True):
            mask.importance_logits.copy_(importance)
            mask.alpha.copy_(alpha)
        # Moments of parameters that rested are 0 and count as old ones: the first steps would be
        # too large.
        self.optimizer.state.clear()
        supernet.importance_known.fill_(True)
        self._resting_choice = None

    def _decide(self, decide: Callable[[], Any]) -> None:
        """Let rank 0 retire candidates, and retire the same ones on all ranks."""
        masks = self.supernet.bi_masks
        decisions = self.supernet.decisions
        before = [mask.active_candidates.clone() for mask in masks]

        def decision() -> tuple[list[tuple[Tensor, Tensor]], Schedule | None]:
            decide()
            states = [(mask.active_candidates.cpu(), mask.alive.cpu()) for mask in masks]
            return states, decisions.token_schedule

        states, token_schedule = decided_by_rank_0(decision)
        decisions.decide_tokens_(token_schedule)
        for mask, (active, alive), previous in zip(masks, states, before, strict=True):
            mask.active_candidates.copy_(active)
            mask.alive.copy_(alive)
            if not torch.equal(mask.active_candidates, previous):
                # A softmax over fewer candidates is another problem: its moments start afresh, as
                # in the published code.
                self.optimizer.state.pop(mask.alpha, None)

    @torch.no_grad()
    def shrink(self, fold: bool = False) -> None:
        """Remove dead units from the network, its average and the optimizer, and renew DDP.

        Args:
            fold: make the bi-masks part of the weights as well; for a settled supernet.

        Raises:
            RanksDifferError: if the ranks no longer hold the same network; checked whether or not
                anything was removed.
        """
        supernet = self.supernet
        replaced, plan = shrink_(supernet)
        names = {parameter: name for name, parameter in supernet.named_parameters()}
        sliced = {}
        for old, new in replaced.items():
            # Alpha starts with fresh moments: its softmax runs over fewer candidates now.
            if new is not None and not names[new].endswith(".alpha"):
                sliced[old] = plan[names[new]]
        slice_optimizer_(self.optimizer, replaced, sliced)
        if self.average is not None:
            self.average.slice_(plan, names.values())
        if fold and not supernet.is_folded:
            replaced |= self._fold()
        # Before DDP is rebuilt: that copies rank 0's values and would hide a difference.
        self._require_identical_ranks()
        if replaced:
            self._renew_wrappers()

    def _fold(self) -> dict[nn.Parameter, None]:
        """Fold masks into weights and average, fit what is left; return what stops learning."""
        if self.average is not None:
            with self.average.applied_to(self.supernet):  # it has masks of its own
                self.supernet.scale_(self.average.part_of("model."))
        # Moments of the weights stay as they are: Adam does not see a common factor of a gradient.
        resting = self.supernet.fold_()
        slice_optimizer_(self.optimizer, resting, {})
        if self.compensation is not None:
            self._compensate()
        if self._fitted is not None:
            take_weights_(self.supernet, self._fitted, self.args)
            self._fitted = None
            if self.average is not None:
                self.average.restart(self.supernet)
        # The guard remembers the weights that the rest of the training begins with.
        self.begin_result()
        return resting

    def _compensate(self) -> None:
        """Fit the layers that write into the residual stream to what they wrote before the cut."""
        small = self.supernet.model
        compensation = self.compensation
        self.compensation = None
        if self.average is not None and self.state.global_step == self.state.max_steps:
            # No step follows: the average is what is kept, so the average is fitted.
            self.average.copy_to_(self.supernet)
        fitted = decided_by_rank_0(lambda: compensation.fit_(small, self.read_subnet()))
        for name, values in fitted.items():
            parameter = small.get_parameter(name)
            parameter.copy_(values)
            self.optimizer.state.pop(parameter, None)
        if self.average is not None:
            # Layers are fitted to each other, not to averages of what they were.
            self.average.restart(self.supernet)

    def _renew_wrappers(self) -> None:
        """Let torch.compile and DDP see the parameters that the network has now."""
        wrapped = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        if wrapped is not self.model_wrapped:
            # The code compiled for the larger network is never needed again, and counts towards the
            # number of variants after which torch gives up and runs eagerly.
            torch.compiler.reset()
        if isinstance(wrapped, DistributedDataParallel):
            rebuild_ddp_(wrapped)

    def _require_identical_ranks(self) -> None:
        if self.args.world_size > 1:
            require_identical_ranks(self.supernet, self.optimizer, self.state.global_step)

    # --------------------------------------------------------------------------------- the result

    def compress(self) -> PreTrainedModel:
        """Return the small dense model that the search arrived at, within the budget.

        Raises:
            ValueError: if nothing is known yet of what units are worth.
        """
        # without a training there are 0 steps of 0
        if self.supernet.is_fresh and self.state.global_step < max(1, self.state.max_steps):
            raise ValueError(
                f"{self.ended_early or 'nothing has been searched'}: random scores would decide "
                "what compress() keeps. Call train() first, and let it end."
            )
        if self.ended_early is not None:
            logger.warning(f"{self.ended_early}; compress() cuts what was known by then.")
        return compress(self.supernet).to(self.stored_type)

    def read_subnet(self) -> SubnetSpec:
        """Return the units of the dense model that `compress` keeps."""
        return read_subnet(self.supernet)

    # ----------------------------------------------------------------------- logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with values of the phases and the real size of the network next to the losses."""
        if "loss" in logs:
            config = self.supernet.config
            logs["lam"] = self.search_step.lam
            logs["keep_ratio"] = self.search_step.keep_ratio
            logs["macs"] = count_macs(config)
            logs["params"] = count_params(config)
            table = self.bi_mask_config.table
            if table is not None:
                logs["latency_ms"] = milliseconds(count_latency(config, table))
            logs["active_candidates"] = self.supernet.decisions.num_active_candidates
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            self.bi_mask_config.save(folder / BI_MASK_CONFIG_FILE)
            if self.compensation is not None:
                self.compensation.save(folder)
            if self.rewritten_dense is not None:
                weights = self.rewritten_dense.state_dict()
                safetensors.torch.save_file(weights, folder / REWRITTEN_FILE)

    def _load_weights(self, checkpoint: Path) -> None:
        saved = type(self.bi_mask_config).load(checkpoint / BI_MASK_CONFIG_FILE)
        require_same_search(saved.to_dict(), self.bi_mask_config.to_dict(), checkpoint)
        if self.rewritten_dense is not None:
            # This machine may just have found another basis than the one that is searched. The
            # network is that of teacher and compensation.
            weights = safetensors.torch.load_file(checkpoint / REWRITTEN_FILE)
            self.rewritten_dense.load_state_dict(weights)
        state = safetensors.torch.load_file(checkpoint / SAFE_WEIGHTS_NAME)
        shrink_to_(self.supernet, state)
        if self.supernet.is_folded:
            self.compensation = None
        elif self.compensation is not None:
            self.compensation.load(checkpoint, self.args.device)
        super()._load_weights(checkpoint)


class SearchCallback(TrainerCallback):
    """Take the steps of a search around the optimizer steps of its trainer."""

    def __init__(self, trainer: OFBTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Look at where the supernet stands; a checkpoint has been loaded by now."""
        self.trainer.begin_search()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Set lambda, keep ratio and one-hot weight for this step."""
        self.trainer.begin_search_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Decide and cut. Gradients have been cleared; a checkpoint of this step has the cut."""
        self.trainer.end_search_step()
