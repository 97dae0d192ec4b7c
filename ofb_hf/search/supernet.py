"""The supernet: a classifier with bi-masks and a PMIM decoder on top, which come off again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput

from ..cost.counting import count_macs
from ..families.description import (
    Architecture,
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
from ..pruning.surgery import slice_model
from ..space.configuration import BiMaskConfig, default_config
from ..space.search_space import SearchSpace
from ..training.activation_checkpointing import without_reentry
from .decisions import Decisions
from .pmim import PMIMDecoder, window_for_patch
from .searched_tokens import SearchedTokens


@dataclass
class SupernetOutput(ImageClassifierOutput):
    """Classifier output with `reconstruction` (B, K, channels * size^2), pixels of K patches."""

    reconstruction: Tensor | None = None


class Supernet(nn.Module):
    """A classifier whose units are scaled by bi-masks.

    `install_bi_masks` makes one, `compress` takes the masks off again.

    Args:
        model: the classifier, one of our models; it becomes a part of the supernet.
        config: what to search.

    Attributes:
        model: the classifier, with the state-dict keys it always had. It shrinks during the search.
        bi_masks: one `BiMask` per searched submodule; `named_masks` gives them by name.
        tokens: what is known and decided about tokens, or None where they are not searched.
        decisions: what is still to be chosen, and how.
        pmim_decoder: repaints masked patches, or None; it is removed with the first tokens.
        pmim_window: side of the window in pixels by which repainted pixels are normalised.
        bi_mask_config, space: what is searched, and the candidates for the dense model.
        dense_architecture, dense_sizes, dense_macs: of the model before the search.
        dense_cost, target: in the budget's unit.
        lam: buffer, weight of importance in the bi-mask.
        importance_known: buffer, whether importance has been set from observed gradients.
        folded: buffer, whether the bi-masks are part of the weights (`fold_`); `is_folded` is the
            same as a bool, so that asking for it does not wait for the device.
        pmim_ratio: buffer, classification / reconstruction loss of the last step, the weight of
            PMIM.
    """

    main_input_name = "pixel_values"

    def __init__(self, model: PreTrainedModel, config: BiMaskConfig):
        super().__init__()
        self.model = model
        self.bi_mask_config = config
        self.space = config.search_space(model.config)
        self.dense_architecture = self.architecture
        self.dense_sizes = self.dense_architecture.sizes
        self.dense_macs = count_macs(model)
        self.tokens = SearchedTokens(model.config) if config.search_tokens else None
        self.bi_masks = _bi_masks(self.space, config.normalize_importance)
        self.decisions = Decisions(model, config, self.space, self.bi_masks, self.tokens)
        self.dense_cost = self.decisions.dense_cost
        self.target = self.decisions.target
        self.pmim_decoder = None
        self.pmim_window = config.pmim_window
        if self.pmim_window is None:
            self.pmim_window = window_for_patch(self.dense_architecture.token_size)
        if config.pmim:
            self._add_decoder()
        self.register_buffer("lam", torch.tensor(config.importance_start))
        self.register_buffer("importance_known", torch.tensor(False))
        self.register_buffer("folded", torch.tensor(False))
        self.is_folded = False
        self.register_buffer("pmim_ratio", torch.tensor(1.0))
        self._gate_store = GateStore()
        install_gates(model, self._searched_submodules(), self._gate_store)
        self.follow_shapes_()
        self.to(device=model.device)

    def _add_decoder(self) -> None:
        """Add what PMIM needs: the decoder, and a mask token that stands for hidden patches."""
        architecture = self.dense_architecture
        last_width = architecture.sizes[architecture.last_width][0]
        decoder = PMIMDecoder(last_width, architecture.token_size, architecture.num_channels)
        self.pmim_decoder = decoder.to(self.model.dtype)
        add_mask_token_(self.model)

    @property
    def architecture(self) -> Architecture:
        """Submodules and costs of the network as it is now."""
        return describe(self.model.config)

    @property
    def config(self) -> PreTrainedConfig:
        """The classifier's config; it follows the network as it shrinks."""
        return self.model.config

    @property
    def named_masks(self) -> dict[str, BiMask]:
        """Submodule name -> its bi-mask."""
        return {mask.name: mask for mask in self.bi_masks}

    @property
    def repaints(self) -> bool:
        """Whether a training step repaints patches, hidden or not."""
        if self.pmim_decoder is None:
            return False
        return not (self.is_folded and self.bi_mask_config.pmim_until_settled)

    @property
    def is_fresh(self) -> bool:
        """Whether no search has moved it yet: full widths, every candidate active, first lambda."""
        complete = self.architecture.sizes == self.dense_sizes and all(
            mask.alive.all() for mask in self.bi_masks
        )
        undecided = self.decisions.num_active_candidates == self.space.num_candidates
        start = torch.tensor(self.bi_mask_config.importance_start)
        return complete and undecided and bool(self.lam.cpu() == start)

    # ------------------------------------------------------------------------------- forward pass

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        repainted: Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | SupernetOutput:
        """Run the classifier under its bi-masks.

        In training no more of it is computed than logits and repainted patches follow from, by way
        of its `forward_chosen`: hooks on the classifier as a whole see evaluations only.

        Args:
            pixel_values: (B, channels, height, width).
            bool_masked_pos: (B, N) bool, patches to hide; the decoder then repaints.
            repainted: (B, K) indices of the final tokens whose patches to repaint; by default all,
                in their order.
            kwargs: for the classifier (`labels`, `output_hidden_states`, ...), without masked
                patches only.

        Raises:
            ValueError: for masked images of another size than the config's, and for masked images
                with more arguments.
        """
        masks_images = bool_masked_pos is not None
        if masks_images:
            self._check_masked_images(pixel_values, kwargs)
        self.refresh_gates()
        if self._gate_store.separates:
            self._gate_store.separate_(len(pixel_values))
        if not masks_images and (kwargs or not self.training):
            # Evaluation, or more outputs than logits: the whole classifier.
            return self.model(pixel_values=pixel_values, **kwargs)
        # In training: of the last layer only the tokens that something follows from.
        if repainted is None:
            rows, columns = self.dense_architecture.token_grid
            count = rows * columns if masks_images else 0
            every = torch.arange(count, device=pixel_values.device)
            repainted = every.expand(len(pixel_values), -1)  # (B, K)
        logits, tokens = self.model.forward_chosen(pixel_values, bool_masked_pos, repainted)
        if not masks_images:
            return ImageClassifierOutput(logits=logits)
        return SupernetOutput(logits=logits, reconstruction=self.pmim_decoder(tokens))

    def _check_masked_images(self, pixel_values: Tensor, others: dict) -> None:
        if others:
            raise ValueError(
                f"{sorted(others)} are given with bool_masked_pos, but the output for hidden "
                "patches is logits and a reconstruction only; compute losses from these, or leave "
                "bool_masked_pos out."
            )
        height, width = image_sides(self.config)
        pixels = tuple(pixel_values.shape[-2:])
        if pixels != (height, width):
            raise ValueError(
                f"pixel_values are {pixels[0]} x {pixels[1]} pixels, but the config's image_size "
                f"is {height} x {width}; masked image modelling needs images of that size."
            )

    def refresh_gates(self) -> None:
        """Compute the bi-mask values that the gated modules read until the next call."""
        # A new dict, and the old one is not looked at: so compiled code does not depend on what it
        # held.
        self._gate_store.values = {} if self.is_folded else self._stacks.gates(self.lam)
        if not torch.compiler.is_compiling():
            self.refresh_liveness()

    def refresh_liveness(self) -> None:
        """Tell the norms which channels are alive.

        `forward` does so by itself unless it is compiled: then it has to be called after candidates
        retired and before the next forward pass.
        """
        for mask in self.bi_masks:
            self._gate_store.refresh_liveness(mask.name, mask.alive)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs
    ) -> None:
        """Trade compute for memory in the classifier's blocks; arguments as in transformers.

        Raises:
            ValueError: for `use_reentrant=True`, which cannot share the gates between blocks.
        """
        settings = without_reentry(
            activation_checkpointing_kwargs,
            "all blocks share the gates of one forward pass, which reentrant checkpointing would "
            "run backward through block by block",
        )
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        if enable is None:  # transformers before the method got this name
            enable = self.model.gradient_checkpointing_enable
        enable(settings, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kwargs
    ) -> None:
        """Do what `activation_checkpointing_enable` does; this is its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # -------------------------------------------------------------------------------- observation

    @contextmanager
    def separate_images(self) -> Iterator[None]:
        """Give every image of a forward pass inside gates of its own.

        Their values are the same, so one backward pass finds the gradients of every image for
        `changes_of_images`. Nothing except these gates has gradients meanwhile: it would take time
        and not be used.
        """
        resting = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._gate_store.separates = True
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            self._gate_store.separates = False
            self._gate_store.of_images = {}
            for parameter in resting:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def changes_of_images(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives of every image's loss after a backward pass of `separate_images`.

        Returns:
            By the gates of all bi-masks, one after the other, (B, U). And what merging its tokens
            would change to first order, (B, entries of `first_order_of_tokens`).
        """
        derivatives = []
        for mask in self.bi_masks:
            gate = self._gate_store.of_images[mask.name]  # (B, U of this mask)
            # A gate that the loss does not depend on has no gradient.
            derivatives.append(torch.zeros_like(gate) if gate.grad is None else gate.grad)
        units = torch.cat(derivatives, 1)
        if self.tokens is None:
            return units, units[:, :0]
        # (B, layers, K) -> (B, layers * K)
        return units, self.tokens.changes(self.model, len(units)).flatten(1)

    def watch_tokens_(self, on: bool) -> None:
        """Begin to observe tokens, where they are searched, or end it."""
        if self.tokens is not None and not self.tokens.acts:
            self.tokens.watch_(self.model, on)

    @property
    def first_order_of_tokens(self) -> Tensor:
        """The buffer of what was observed of tokens, (layers, K); empty where none are searched."""
        return self.lam.new_zeros(0) if self.tokens is None else self.tokens.first_order

    # ------------------------------------------------------------------------ losses of the masks

    def sizes(self, on: str) -> Tensor:
        """Return differentiable amounts of all quantities in cost terms, as `quantities` has them.

        Args:
            on: `bi_mask` for sums of the bi-mask values of the last forward pass, `sparsity` for
                the sizes that alpha expects.

        Returns:
            (Q,)
        """
        # Folded masks have no gates, and one candidate each: what alpha expects is what there is.
        if on != "bi_mask" or self.is_folded:
            return self._stacks.sizes()
        # After a pass with gates for every image there are no common values.
        gates = self._gate_store.values or self._stacks.gates(self.lam)
        return self._stacks.sizes(gates)

    def one_hot_loss(self) -> Tensor:
        """Return the sum of the adaptive one-hot losses of all submodules, scalar."""
        return self._stacks.one_hot_loss()

    def importance_penalty(self) -> Tensor:
        """Return the L1 penalty on importance of the published code (arXiv:2403.15835), scalar."""
        return self._stacks.importance_penalty()

    # --------------------------------------------------------------------------------- new shapes

    def follow_shapes_(self) -> None:
        """Bring up to date what depends on the shapes of the masks, after they have changed."""
        stacks = MaskStacks(self.bi_masks, quantities(self.dense_sizes))
        self._stacks = stacks.to(self.lam.device)
        self._gate_store.clear()

    def remove_decoder_(self) -> None:
        """Remove the PMIM decoder and the mask token."""
        if self.pmim_decoder is not None:
            self.pmim_decoder = None
            drop_mask_token_(self.model)

    # ------------------------------------------------------------------------------------ folding

    def _searched_submodules(self) -> list[Submodule]:
        """Return the submodules of the network as it is now that have bi-masks."""
        names = self.named_masks.keys()
        return [submodule for submodule in self.architecture.submodules if submodule.name in names]

    @torch.no_grad()
    def scale_(self, tensors: dict[str, Tensor]) -> None:
        """Multiply the present mask values into tensors, in place.

        Args:
            tensors: named and shaped like the classifier's parameters.
        """
        self.refresh_gates()
        apply_gates_(tensors, self._searched_submodules(), self._gate_store)

    @torch.no_grad()
    def fold_(self) -> dict[nn.Parameter, None]:
        """Make the bi-masks part of the weights, in place.

        The function stays the same and costs what the network alone costs: no gates, and no patches
        to repaint where that ends with the choice.

        Returns:
            {parameter: None} for those that have nothing left to learn, as
            `pruning.surgery.slice_optimizer_` takes them.

        Raises:
            RuntimeError: while there is anything left to choose or to remove.
        """
        all_alive = all(mask.alive.all() for mask in self.bi_masks)
        if not self.decisions.is_settled or not all_alive:
            raise RuntimeError(
                "bi-masks are folded for good once the choice is final and dead units are removed "
                "(decisions.settle_, then shrink_), not before."
            )
        self.scale_(dict(self.model.named_parameters()))
        return self.rest_()

    def rest_(self) -> dict[nn.Parameter, None]:
        """Let the bi-masks rest, which are part of the weights; so does a decoder that is done.

        Returns:
            As `fold_`.
        """
        self.folded.fill_(True)
        self.is_folded = True
        self._gate_store.clear()
        # DDP must not wait for gradients that never come, and AdamW would go on decaying.
        resting = list(self.bi_masks.parameters())
        if self.pmim_decoder is not None and not self.repaints:
            resting += [*self.pmim_decoder.parameters(), mask_token_of(self.model)]
        return {
            parameter.requires_grad_(False): None
            for parameter in resting
            if parameter.requires_grad
        }

    @torch.no_grad()
    def fold(self) -> PreTrainedModel:
        """Return the classifier as it is, with the mask values multiplied into its weights.

        It has the same logits and no masks. Units that are not alive are left out. The supernet
        stays as it was.
        """
        # A state dict shares memory with the model, which has to stay as it is.
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.scale_(state)
        folded = rebuild_classifier(self.model, copy.deepcopy(self.config), state)
        living = {mask.name: mask.kept_now() for mask in self.bi_masks}
        subnet = SubnetSpec(living, self.decisions.token_schedule)
        return slice_model(folded, subnet).train(self.training)


def _bi_masks(space: SearchSpace, normalize_importance: bool) -> nn.ModuleList:
    """Return a bi-mask for every submodule of a space; a tied one takes its leader's alpha."""
    masks: dict[str, BiMask] = {}
    for submodule in space:
        if submodule.tied_to is None:
            mask = BiMask(submodule, normalize_importance=normalize_importance)
        else:
            leader = masks[submodule.tied_to]
            mask = TiedBiMask(submodule, leader, normalize_importance=normalize_importance)
        masks[submodule.name] = mask
    return nn.ModuleList(masks.values())


def install_bi_masks(model: PreTrainedModel, config: BiMaskConfig | None = None) -> Supernet:
    """Put bi-masks on a copy of a classifier.

    `model` itself stays as it is and can serve as the teacher.

    Args:
        model: a classifier of a family in `ofb_hf.families.registry`, stock or one of our models.
        config: what to search; by default half the MACs, by the preset "bi_mask".

    Returns:
        A supernet that computes what `model` computes, each unit scaled by its bi-mask value.

    Raises:
        UnsupportedArchitectureError: if the model cannot be searched.
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible value.
    """
    require_classifier(model)
    if config is None:
        config = default_config(model.config, preset="bi_mask")
    _require_searchable(model.config, config)
    family = family_of(model.config)
    if isinstance(model, family.model_class):
        flexible = copy.deepcopy(model)
    else:
        flexible = family.from_dense(model)
    family.pin(flexible.config)
    supernet = Supernet(flexible, config)
    for mask in supernet.bi_masks:
        mask.initialize_(config.importance_init_mean, config.importance_init_std, config.alpha_init)
    # An unreachable budget is refused here, before anything is trained.
    supernet.decisions.best_choice()
    return supernet.train(model.training)


def _require_searchable(model_config: PreTrainedConfig, config: BiMaskConfig) -> None:
    """Raise an error with an explanation for a model that bi-masks cannot work on."""
    basis = getattr(model_config, "basis", None)
    if config.basis not in ("given", basis):
        raise ValueError(
            f"basis is {config.basis!r}, but the model is not in that basis (its config says "
            f"{basis!r}), and there are no images here by which to rewrite it. Give the result of "
            "ofb_hf.pruning.equivalent_basis.equivalent_basis, or let OFBTrainer rewrite it."
        )
    if getattr(model_config, "token_schedule", None) is not None:
        raise UnsupportedArchitectureError(
            "the model has a token_schedule, and widths cannot be searched on top of it: masked "
            "images are repainted from all tokens, and heads that are switched off would still "
            "vote on which tokens stay. Search widths first (load the model with "
            "token_schedule=None), then tokens; or both together (search_tokens=True)."
        )
    if config.search_tokens:
        require_biased_attention(model_config)
    # A gate scales the rows that write a hidden channel, so what the activation makes of 0 remains.
    activation = describe(model_config).activation
    if ACT2FN[activation](torch.zeros(1)).item() != 0:
        raise ValueError(
            f"hidden_act is {activation!r}, which is not 0 at 0: a masked MLP channel would still "
            "contribute. Search models with gelu, relu, silu or another activation through the "
            "origin."
        )


def read_subnet(supernet: Supernet) -> SubnetSpec:
    """Return which units of the dense model `compress` would keep if it were called now."""
    return copy.deepcopy(supernet).decisions.settle_()


def compress(supernet: Supernet) -> PreTrainedModel:
    """Return the small dense classifier: settle under the budget, fold the masks, slice.

    Returns:
        A new model without masks and decoder, in the supernet's training mode; the supernet stays
        as it was. `count_macs` of it is at most the budget.

    Raises:
        UnreachableBudgetError: naming the smallest possible cost.
    """
    # Deciding and folding happen in a copy: a search may go on after it.
    settled = copy.deepcopy(supernet)
    settled.decisions.settle_()
    return settled.fold()


def dense_parent(supernet: Supernet) -> PreTrainedModel:
    """Return the classifier as it was before masks scaled it.

    Meant for a supernet that has not been trained yet.
    """
    model = supernet.model
    return rebuild_classifier(model, copy.deepcopy(model.config), model.state_dict()).eval()
