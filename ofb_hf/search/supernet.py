"""The supernet: a classifier with bi-masks and a PMIM decoder on top, searchable, shrinkable, and
removable again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput

from ..cost.counting import count_macs, evaluate_terms
from ..families.description import (
    Architecture,
    Slot,
    Submodule,
    UnsupportedArchitectureError,
    image_sides,
    quantities,
)
from ..families.loading import rebuild_classifier
from ..families.mask_token import add_mask_token_, drop_mask_token_, mask_token_of
from ..families.registry import describe, family_of, require_classifier
from ..families.subnet import SubnetSpec
from ..masks.bi_mask import BiMask, TiedBiMask
from ..masks.gates import GateStore, apply_gates_, install_gates
from ..masks.stack import MaskStacks
from ..models.modeling_ofb_vit import require_biased_attention
from ..pruning.surgery import Entries, resize_, slice_model, slice_tensors_, unit_group_plan
from ..space.configuration import BiMaskConfig, default_config
from ..training.activation_checkpointing import without_reentry
from .decisions import Choices
from .pmim import PMIMDecoder, window_for_patch
from .searched_tokens import SearchedTokens


@dataclass
class SupernetOutput(ImageClassifierOutput):
    """Classifier output plus `reconstruction` (B, K, channels * size * size), the pixels of K
    patches."""

    reconstruction: Tensor | None = None


class Supernet(Choices):
    """A classifier whose units are scaled by bi-masks. Made by `install_bi_masks`; `compress` takes
    the masks off.

    Attributes:
        model: the classifier, with the state-dict keys it always had. It shrinks during the search.
        bi_masks: one `BiMask` per searched submodule; `named_masks` gives them by name.
        tokens: what is known and decided about tokens, or None where they are not searched.
        pmim_decoder: repaints masked patches, or None; gone as soon as there are fewer tokens.
        bi_mask_config, space: what is searched, and the candidates for the dense model.
        dense_architecture, dense_sizes, dense_macs: of the model before the search.
        dense_cost, target: in the budget's unit.
        lam: buffer, weight of importance in the bi-mask.
        importance_known: buffer, whether importance has been set from what was observed.
        folded: buffer, whether the bi-masks are part of the weights (`fold_`); `is_folded` says so
            without waiting.
        pmim_ratio: buffer, classification / reconstruction loss of the last step, the weight of
            PMIM.
    """

    main_input_name = "pixel_values"

    def __init__(self, model: PreTrainedModel, config: BiMaskConfig):
        super().__init__()
        self.model, self.bi_mask_config = model, config
        architecture = self.dense_architecture = self.architecture
        self.space = config.search_space(model.config)
        self.tokens = SearchedTokens(model.config) if config.search_tokens else None
        self.dense_sizes, self.dense_macs = architecture.sizes, count_macs(model)
        self.dense_cost = evaluate_terms(self.terms, quantities(architecture.sizes))
        self.target = config.target(self.dense_cost)
        self.bi_masks = nn.ModuleList()
        for space in self.space:
            leader = () if space.tied_to is None else (self.named_masks[space.tied_to],)
            mask_class = TiedBiMask if leader else BiMask
            self.bi_masks.append(
                mask_class(space, *leader, normalize_importance=config.normalize_importance)
            )
        self.pmim_decoder = None
        self.pmim_window = config.pmim_window or window_for_patch(architecture.token_size)
        if config.pmim:
            last = architecture.sizes[architecture.last_width][0]
            self.pmim_decoder = PMIMDecoder(
                last, architecture.token_size, architecture.num_channels
            ).to(model.dtype)
            add_mask_token_(model)
        self.register_buffer("lam", torch.tensor(config.importance_start))
        self.register_buffer("importance_known", torch.tensor(False))
        self.register_buffer("folded", torch.tensor(False))
        self.is_folded = False
        self.register_buffer("pmim_ratio", torch.tensor(1.0))
        self.expect_costs_()
        self._stack_masks()
        self._gate_store = GateStore()
        install_gates(model, self._searched(architecture), self._gate_store)
        self.to(device=model.device)

    @property
    def architecture(self) -> Architecture:
        """Submodules and costs of the network as it is now."""
        return describe(self.model.config)

    @property
    def config(self):
        """The classifier's config; it follows the network as it shrinks."""
        return self.model.config

    @property
    def repaints(self) -> bool:
        """Whether patches may still be hidden and repainted."""
        return self.pmim_decoder is not None and not (
            self.is_folded and self.bi_mask_config.pmim_until_settled
        )

    @property
    def is_fresh(self) -> bool:
        """Whether no search has moved it yet: full widths, everything in the race, lambda at its
        start."""
        start = torch.tensor(self.bi_mask_config.importance_start)
        complete = self.architecture.sizes == self.dense_sizes and all(
            mask.alive.all() for mask in self.bi_masks
        )
        undecided = self.num_active_candidates == self.space.num_candidates
        return complete and undecided and bool(self.lam.cpu() == start)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs
    ) -> None:
        """Trades compute for memory in the classifier's blocks; arguments as in transformers.

        Raises:
            ValueError: for `use_reentrant=True`, which cannot share the gates between blocks.
        """
        settings = without_reentry(
            activation_checkpointing_kwargs,
            "all blocks share the gates of one forward pass, which reentrant checkpointing would "
            "run backward through "
            "block by block",
        )
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None)
            or self.model.gradient_checkpointing_enable
        )
        enable(settings, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kwargs
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        repainted: Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | SupernetOutput:
        """The classifier under its bi-masks; in training, no more of it than logits and repainted
        patches follow from.

        That is by way of its `forward_chosen`: hooks on the classifier as a whole see evaluations
        only.

        Args:
            pixel_values: (B, channels, height, width).
            bool_masked_pos: (B, N) bool, patches to hide; the decoder then repaints.
            repainted: (B, K) indices of the final tokens whose patches to repaint; by default all,
                in their order.
            kwargs: for the classifier (`labels`, `output_hidden_states`, ...), without masked
                patches only.

        Raises:
            ValueError: for masked images of another size than the config's, and for masked ones
                with more arguments.
        """
        if bool_masked_pos is not None and kwargs:
            raise ValueError(
                f"{sorted(kwargs)} are given beside bool_masked_pos, but what hidden patches "
                f"leave are logits and a "
                "reconstruction alone; compute losses from these, or leave bool_masked_pos out."
            )
        sides, pixels = image_sides(self.config), tuple(pixel_values.shape[-2:])
        if bool_masked_pos is not None and pixels != sides:
            raise ValueError(
                f"pixel_values are {pixels[0]} x {pixels[1]} pixels, but the config's image_size "
                f"is "
                f"{sides[0]} x {sides[1]}; masked image modelling needs images of that size."
            )
        self.refresh_gates()
        if self._gate_store.separates:
            self._gate_store.separate_(len(pixel_values))
        if bool_masked_pos is None and (kwargs or not self.training):
            return self.model(pixel_values=pixel_values, **kwargs)
        rows, columns = self.dense_architecture.token_grid
        if repainted is None:
            count = 0 if bool_masked_pos is None else rows * columns
            repainted = torch.arange(count, device=pixel_values.device).expand(
                len(pixel_values), -1
            )
        logits, tokens = self.model.forward_chosen(pixel_values, bool_masked_pos, repainted)
        if bool_masked_pos is None:
            return ImageClassifierOutput(logits=logits)
        return SupernetOutput(logits=logits, reconstruction=self.pmim_decoder(tokens))

    def refresh_gates(self) -> None:
        """Computes the bi-mask values that the gated modules read until the next call."""
        # A new dict, and nobody looks at the last one: compiled code does not depend on what it
        # held.
        self._gate_store.values = {} if self.is_folded else self._stacks.gates(self.lam)
        if not torch.compiler.is_compiling():
            self.refresh_liveness()

    def refresh_liveness(self) -> None:
        """Tells the norms which channels live. `forward` does so by itself, unless it is compiled:
        then whoever retires candidates has to call this before the next forward pass."""
        for mask in self.bi_masks:
            self._gate_store.refresh_liveness(mask.name, mask.alive)

    @contextmanager
    def separate_images(self) -> Iterator[None]:
        """Inside, every image of a forward pass has gates of its own, equal to those of the others:
        one backward pass tells `changes_of_images`. Nothing else has gradients, for nobody would
        look at them.
        """
        resting = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._gate_store.separates = True
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self._gate_store.separates, self._gate_store.of_images = False, {}
            for parameter in resting:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def changes_of_images(self) -> tuple[Tensor, Tensor]:
        """What the last backward pass of `separate_images` said of every image, as derivatives of
        the loss.

        Returns:
            By the gates of all bi-masks, one after the other, (B, U). And what merging its tokens
            would change to first order, (B, entries of `first_order_of_tokens`).
        """
        gates = [self._gate_store.of_images[mask.name] for mask in self.bi_masks]
        units = torch.cat(
            [torch.zeros_like(gate) if gate.grad is None else gate.grad for gate in gates], 1
        )
        if self.tokens is None:
            return units, units[:, :0]
        return units, self.tokens.changes(self.model, len(units)).flatten(1)

    def _searched(self, architecture: Architecture) -> list[Submodule]:
        names = set(self.named_masks)
        return [submodule for submodule in architecture.submodules if submodule.name in names]

    def sizes(self, on: str) -> Tensor:
        """Differentiable values of all quantities that cost terms multiply, in the order of
        `quantities`: (Q,).

        Args:
            on: `bi_mask` = sums of the bi-mask values of the last forward; `sparsity` = expected
                sizes under alpha.
        """
        if on != "bi_mask" or self.is_folded:
            return self._stacks.sizes()
        return self._stacks.sizes(self._gate_store.values or self._stacks.gates(self.lam))

    def one_hot_loss(self) -> Tensor:
        """Sum of the adaptive one-hot losses of all submodules."""
        return self._stacks.one_hot_loss()

    def importance_penalty(self) -> Tensor:
        """The published L1 penalty on importance scores (arXiv:2403.15835, its code)."""
        return self._stacks.importance_penalty()

    def _stack_masks(self) -> None:
        stacks = MaskStacks(self.bi_masks, quantities(self.dense_sizes))
        self._stacks = stacks.to(self.lam.device)

    @torch.no_grad()
    def shrink_(self) -> tuple[dict[nn.Parameter, nn.Parameter | None], dict[str, Entries]]:
        """Removes all units that are not alive, physically, from classifier, masks and decoder;
        attentions and MLPs that have none left lose their layers and their norm.

        Returns:
            Old parameter -> new parameter, or None where nothing is left to train, and the plan
            {parameter name: ((axis, indices), ...)} for those that stay. With these the optimizer
            and a weight average follow. Both empty if there was nothing to remove.
        """
        gone = [mask for mask in self.bi_masks if not mask.alive.all()]
        ready = self.token_schedule is not None and self.is_settled and not self.tokens.acts
        retired = self._reduce_tokens_() if ready else {}
        if not gone:
            return retired, {}
        kept = {mask.name: mask.alive.flatten().nonzero()[:, 0] for mask in gone}
        submodules, before = self._submodules_with_decoder(), set(self.parameters())
        living = {
            mask.name: tuple(indices.shape[-1] for indices in mask.alive_units()) for mask in gone
        }
        resize_(self.model, self.architecture.sizes | living)
        plan = unit_group_plan(submodules, kept, set(self.state_dict()))
        for index, mask in enumerate(self.bi_masks):
            if mask.name in kept:
                plan |= {
                    f"bi_masks.{index}.{name}": entries
                    for name, entries in mask.shrink_plan().items()
                }
        replaced = dict.fromkeys(before - set(self.parameters())) | slice_tensors_(self, plan)
        # Masks of what is gone: nothing in the forward pass reads them any more, so DDP must not
        # wait for them.
        idle = {
            p.requires_grad_(False)
            for mask in gone
            if not mask.alive.numel()
            for p in mask.parameters()
        }
        replaced = retired | {old: None if new in idle else new for old, new in replaced.items()}
        self._stack_masks()
        self._gate_store.clear()
        return replaced, plan

    def _reduce_tokens_(self) -> dict[nn.Parameter, None]:
        """Lets the model reduce its tokens; the decoder, which paints from all of them, goes.

        Returns:
            The parameters that are gone.
        """
        before = set(self.parameters())
        self.tokens.acts.fill_(True)
        self.config.token_schedule = self.config.meant_schedule(self.token_schedule)
        if self.pmim_decoder is not None:
            self.pmim_decoder = None
            drop_mask_token_(self.model)
        resize_(self.model, self.architecture.sizes)
        return dict.fromkeys(before - set(self.parameters()))

    def _submodules_with_decoder(self) -> list[Submodule]:
        """The model's submodules with slots named as in the supernet, the decoder's input
        included."""
        decoder = Slot("pmim_decoder.projection.weight", 1)
        submodules = []
        for submodule in self.architecture.submodules:
            slots = tuple(
                replace(slot, parameter=f"model.{slot.parameter}") for slot in submodule.slots
            )
            slots += (decoder,) if submodule.name == self.architecture.last_width else ()
            submodules.append(replace(submodule, slots=slots))
        return submodules

    @torch.no_grad()
    def shrink_to_(self, state: dict[str, Tensor]) -> None:
        """Shrinks to the shapes of a saved supernet, so that its state can be loaded.

        Args:
            state: the saved supernet's state dict (`unit_ids` say which units it still has).

        Raises:
            ValueError: if it was saved from another search space.
        """
        for index, mask in enumerate(self.bi_masks):
            saved = f"bi_masks.{index}."
            ids = state.get(f"{saved}unit_ids")
            if ids is None or not torch.isin(ids, mask.unit_ids.cpu()).all():
                raise ValueError(
                    f"the checkpoint's units of {mask.name!r} are not among this supernet's units."
                )
            mask.alive.copy_(torch.isin(mask.unit_ids, ids.to(mask.unit_ids.device)))
            present = [
                torch.isin(sizes, state[f"{saved}candidate_sizes_{axis}"].to(sizes.device))
                for axis, sizes in enumerate(mask.candidate_axes)
            ]
            mask.active_candidates.copy_(
                present[0][:, None] & present[1] if mask.is_grid else present[0]
            )
        self.shrink_()
        if self.tokens is not None:
            self.tokens.schedule.copy_(state["tokens.schedule"])
            self.expect_costs_()
            if state["tokens.acts"]:
                self._reduce_tokens_()
        if state["folded"]:
            self._rest_()

    @torch.no_grad()
    def scale_(self, tensors: dict[str, Tensor]) -> None:
        """Multiplies the present mask values into tensors named and shaped like the classifier's
        parameters."""
        self.refresh_gates()
        apply_gates_(tensors, self._searched(self.architecture), self._gate_store)

    @torch.no_grad()
    def fold_(self) -> dict[nn.Parameter, None]:
        """Makes the bi-masks part of the weights, once one candidate of each is left and dead units
        are gone.

        The function stays, and costs what the network alone costs: no gates, and no patches to
        repaint where that ends with the choice.

        Returns:
            The parameters that have nothing left to learn, for the optimizer to forget: {parameter:
            None}.

        Raises:
            RuntimeError: while there is anything left to choose or to remove.
        """
        if not self.is_settled or not all(mask.alive.all() for mask in self.bi_masks):
            raise RuntimeError(
                "bi-masks are folded for good after settle_() and shrink_(), not before."
            )
        self.scale_(dict(self.model.named_parameters()))
        return self._rest_()

    def _rest_(self) -> dict[nn.Parameter, None]:
        self.folded.fill_(True)
        self.is_folded = True
        self._gate_store.clear()
        resting = list(self.bi_masks.parameters())
        if self.pmim_decoder is not None and not self.repaints:
            resting += [
                *self.pmim_decoder.parameters(),
                mask_token_of(self.model),
            ]
        return {
            parameter.requires_grad_(False): None
            for parameter in resting
            if parameter.requires_grad
        }

    @torch.no_grad()
    def fold(self) -> PreTrainedModel:
        """The classifier as it is, with the mask values multiplied into its weights: same logits,
        no masks.

        Units that are not alive are left out. The supernet stays as it was.
        """
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.scale_(state)
        folded = rebuild_classifier(self.model, copy.deepcopy(self.config), state)
        living = {mask.name: mask.kept_now() for mask in self.bi_masks}
        return slice_model(folded, SubnetSpec(living, self.token_schedule)).train(self.training)


def install_bi_masks(model: PreTrainedModel, config: BiMaskConfig | None = None) -> Supernet:
    """Puts bi-masks on a copy of a classifier. `model` itself stays as it is and can serve as the
    teacher.

    Args:
        model: a stock transformers classifier of a family in `families/registry.py`, or one of this
            package.
        config: what to search; the default is half the MACs with the default preset.

    Returns:
        A supernet that computes what `model` computes, each unit scaled by its bi-mask value.

    Raises:
        UnsupportedArchitectureError: if the model cannot be searched.
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible value.
    """
    require_classifier(model)
    if getattr(model.config, "token_schedule", None) is not None:
        raise UnsupportedArchitectureError(
            "the model has a token_schedule, and widths cannot be searched on top of it: masked "
            "images are repainted "
            "from all tokens, and heads that are switched off would still vote on which tokens "
            "stay. Search widths "
            "first (load the model with token_schedule=None), then tokens; or both together "
            "(search_tokens=True)."
        )
    family = family_of(model.config)
    config = config if config is not None else default_config(model.config)
    if config.search_tokens:
        require_biased_attention(model.config)
    activation = describe(model.config).activation
    if ACT2FN[activation](torch.zeros(1)).item() != 0:
        raise ValueError(
            f"hidden_act is {activation!r}, which is not 0 at 0: a masked MLP channel would still "
            f"contribute. "
            "Search models with gelu, relu, silu or another activation through the origin."
        )
    ours = (
        copy.deepcopy(model) if isinstance(model, family.model_class) else family.from_dense(model)
    )
    family.pin(ours.config)
    supernet = Supernet(ours, config)
    for mask in supernet.bi_masks:
        mask.initialize_(config.importance_init_mean, config.importance_init_std, config.alpha_init)
    supernet.best_choice()  # an unreachable budget is refused here, before anything is trained
    return supernet.train(model.training)


def read_subnet(supernet: Supernet) -> SubnetSpec:
    """Which units of the dense model `compress` would keep if it were called now."""
    return copy.deepcopy(supernet).settle_()


def compress(supernet: Supernet) -> PreTrainedModel:
    """The small dense classifier: settles under the budget, folds the masks into the weights,
    slices.

    Returns:
        A new model without masks and decoder, in the supernet's training mode; the supernet stays
        as it was. `count_macs` of it is at most the budget.

    Raises:
        UnreachableBudgetError: naming the smallest possible cost.
    """
    settled = copy.deepcopy(supernet)
    settled.settle_()
    return settled.fold()


def dense_parent(supernet: Supernet) -> PreTrainedModel:
    """The classifier as it was before masks scaled it. Meant for a supernet that has not been
    trained yet."""
    model = supernet.model
    return rebuild_classifier(model, copy.deepcopy(model.config), model.state_dict()).eval()
