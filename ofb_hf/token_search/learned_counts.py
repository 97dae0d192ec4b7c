"""Learning how many tokens each layer keeps, with the weights at rest (DiffRate, arXiv:2305.17997).

Every layer has two counts, kept after dropping and kept after merging, each the expectation over
candidates under a softmax whose logits learn. Meanwhile no token is removed, only hidden, so that
the loss can say what another one would be worth.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTConfig

from ..cost.budget import Budget, UnreachableBudgetError
from ..families.description import macs_of
from ..families.vit import scheduled, with_fewest_tokens
from ..models import OFBViTForImageClassification
from ..models.modeling_ofb_vit import TokenReduction, require_biased_attention, token_directions
from ..tokens.schedules import (
    SMALLEST,
    Cost,
    full_schedule,
    learned_schedule,
    learning_layers,
    num_tokens,
    require_class_token,
    schedule_cost,
    smallest_schedule,
)

# Size of a token that is hidden: its attention is multiplied by this, as in the published code's
# masked softmax.
HIDDEN = 1e-6


@dataclass
class TokenSearchConfig(Budget):
    """How tokens are searched, and what the result may cost.

    Raises:
        ValueError: for two budgets, one that is no share and no count, a latency table that is
            missing or none, and values out of range, naming them.

    Example:

    ```python
    >>> from ofb_hf.learned_tokens import TokenSearchConfig

    >>> TokenSearchConfig(token_granularity=4).budget
    ('target_macs', 0.7)
    ```"""

    default_macs: ClassVar[float] = 0.7

    target_macs: float | None = field(
        default=None,
        metadata={
            "help": "Budget in MACs: at most 1 = share of the model with all its tokens, above 1 "
            "= absolute. 0.7 if no "
            "target is given."
        },
    )
    token_granularity: int = field(
        default=1,
        metadata={"help": "Gap between candidate token counts (ours; DiffRate's default is 4)."},
    )
    token_learning_rate: float = field(
        default=0.2,
        metadata={
            "help": "Learning rate of the counts' logits, all that learns (ours; DiffRate: 0.01)."
        },
    )
    token_macs_weight: float = field(
        default=10.0,
        metadata={
            "help": "Weight of the squared relative gap to the budget (ours; DiffRate's is 106 "
            "for DeiT-S)."
        },
    )

    def __post_init__(self):
        self.check_budget()
        _require_gap(self.token_granularity)
        for name in ("token_learning_rate", "token_macs_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    def target_for(self, config: ViTConfig) -> int:
        """The budget for a model that keeps all its tokens, as an absolute cost in MACs or
        picoseconds.

        Raises:
            ValueError: for a budget above what the model costs, and for a latency table of another
                model.
            UnreachableBudgetError: for one below the smallest schedule, naming what that costs.
        """
        every = full_schedule(config)
        self.require_fit(scheduled(config, every), with_fewest_tokens(config))
        fewest = smallest_schedule(config, self.terms_of)
        dense, smallest = (schedule_cost(config, each, self.terms_of) for each in (every, fewest))
        target = self.target(dense)
        if smallest > target:
            advice = "raise it to at least that, or make the model narrower first"
            if smallest >= dense:
                advice = f"all tokens cost {self.show(dense)}, so fewer gain nothing here"
                advice += (
                    "; more images in a batch may" if self.target_latency_ms is not None else ""
                )
            raise UnreachableBudgetError(
                f"{self.budget[0]} is {self.show(target)}, below the smallest token schedule, "
                f"which costs "
                f"{self.show(smallest)}; {advice}.",
                smallest,
            )
        return target


def _require_gap(granularity: Any, patches: float = math.inf) -> None:
    """Raises ValueError, in words, unless there are several candidates that far apart."""
    if (
        isinstance(granularity, bool)
        or not isinstance(granularity, int)
        or not 1 <= granularity < patches
    ):
        below = (
            f" and below the {patches} patches of an image, or there is nothing to choose"
            if patches < math.inf
            else ""
        )
        raise ValueError(
            f"token_granularity is {granularity!r}; it is a gap in tokens, a whole number of at "
            f"least 1{below}."
        )


class LearnedCount(nn.Module):
    """How many tokens to keep, as an expectation over candidates (DiffRate's differentiable
    discrete proxy, 3.2).

    Args:
        tokens: N, the largest candidate; class token included.
        granularity: gap between candidates.

    Attributes:
        logits: (K,), 0 at the start. candidates: (K,) token counts, falling from N, all at least 2.
    """

    def __init__(self, tokens: int, granularity: int = 1):
        super().__init__()
        candidates = torch.arange(tokens, 1, -granularity)
        self.logits = nn.Parameter(torch.zeros(len(candidates)))
        self.register_buffer("candidates", candidates.float(), persistent=False)

    def expected(self) -> Tensor:
        """The expected count, a scalar."""
        return (self.logits.softmax(0) * self.candidates).sum()

    def forward(self) -> Tensor:
        """The expected count, rounded up; its gradient is that of the expectation
        (straight-through)."""
        expected = self.expected()
        # Rounding errors of the sum must not count as a token.
        return expected + (torch.ceil(expected - 1e-3) - expected).detach()

    def survival(self) -> Tensor:
        """Probability that the token of rank r = 0 ... N - 1 is kept: that of all candidates above
        r. (N,)"""
        ranks = torch.arange(int(self.candidates[0]), device=self.logits.device)
        return ((self.candidates[None] > ranks[:, None]) * self.logits.softmax(0)).sum(1)


class LearnedReduction(nn.Module):
    """Takes the place of a layer's `TokenReduction` while its counts are learned.

    Tokens that are dropped or merged away stay in place with a size of almost nothing: proportional
    attention makes nobody look at them, and passes on what that costs or gains. Their features go
    on, and are read by none.
    """

    def __init__(self, tokens: int, granularity: int = 1):
        super().__init__()
        self.kept, self.merged = (
            LearnedCount(tokens, granularity),
            LearnedCount(tokens, granularity),
        )

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TokenReduction.forward`, but all N tokens come out."""
        sizes = torch.ones_like(F.pad(importance, (1, 0))) if sizes is None else sizes
        lives = sizes.detach() > 0.5
        ranks = (
            importance.detach()
            .masked_fill(~lives[:, 1:], -1)
            .argsort(1, descending=True)
            .argsort(1)
            + 1
        )
        ranks = F.pad(ranks, (1, 0))
        stays, absorbs = ranks < self.kept(), ranks < self.merged()
        leaves = lives & stays & ~absorbs
        tokens, gained = _merge_in_place(tokens, sizes.detach(), leaves, lives & stays & absorbs)
        # Each token is hidden by one mask only: behind two, neither count would hear what it is
        # worth.
        dropping, merging = (
            _mask(stays, self.kept.survival()[ranks]),
            _mask(~leaves, self.merged.survival()[ranks]),
        )
        return tokens, ((sizes + gained) * dropping * merging).clamp(min=HIDDEN)


def _mask(hard: Tensor, soft: Tensor) -> Tensor:
    """1 where `hard`, almost 0 elsewhere, with the gradient of `soft` (DiffRate, 3.3)."""
    # What is added is exactly 0. Rounding errors are not small beside what is almost 0: values
    # below it are clamped later, which lets no gradient through, and a gradient of their logarithm
    # is off by as much as they are.
    return hard.to(soft.dtype).clamp(min=HIDDEN) + (soft - soft.detach())


def _merge_in_place(
    tokens: Tensor, sizes: Tensor, leave: Tensor, absorb: Tensor
) -> tuple[Tensor, Tensor]:
    """`merge_tokens` by masks.

    Args:
        tokens: (B, N, C); sizes: (B, N).
        leave: (B, N) bool, tokens to merge away; absorb: (B, N) bool, tokens to merge them into.

    Returns:
        Tokens (B, N, C), and what their sizes gain (B, N).
    """
    directions = token_directions(tokens)
    targets = absorb.clone()
    targets[:, 0] = False  # nothing is merged into the class token
    similarity, match = (directions @ directions.mT).masked_fill(~targets[:, None], -2).max(-1)
    joins = F.one_hot(match, tokens.shape[1]).to(tokens.dtype) * leave[..., None]
    gained = (joins * (sizes * similarity.to(sizes.dtype).clamp(min=0))[..., None]).sum(1)
    return ((tokens + joins.mT @ tokens) / (1 + joins.sum(1))[..., None]).to(tokens.dtype), gained


def install_learned_counts(
    model: PreTrainedModel, granularity: int = 1
) -> OFBViTForImageClassification:
    """A copy of a classifier in which every layer but two learns how many tokens to keep, and
    nothing else learns.

    The first keeps all tokens: its class token has not seen the image yet (as in DiffRate). The
    last keeps one patch:
    no attention reads the others (the published schedules learned that, down to their smallest
    candidate). Layers without attention do not count: they let all tokens pass.

    Args:
        model: a ViT classifier, stock or ours; a schedule that it has does not count.

    Raises:
        UnsupportedArchitectureError: as `learning_layers`.
        ValueError: for a gap that leaves nothing to choose, and for attention kernels that cannot
            count tokens by size.
    """
    require_class_token(model)
    *learning, last = learning_layers(model.config)
    require_biased_attention(model.config)
    _require_gap(granularity, num_tokens(model.config) - 1)
    ours = OFBViTForImageClassification.from_dense(
        model, token_schedule=full_schedule(model.config)
    )
    ours.requires_grad_(False)
    for layer in learning:
        ours.vit.layers[layer].reduction = LearnedReduction(
            num_tokens(model.config), granularity
        ).to(model.device)
    ours.vit.layers[last].reduction = TokenReduction(*SMALLEST)
    return ours


def learned_reductions(model: OFBViTForImageClassification) -> list[LearnedReduction]:
    """What learns, from the first such layer to the last."""
    return [
        layer.reduction
        for layer in model.vit.layers
        if isinstance(layer.reduction, LearnedReduction)
    ]


def expected_cost(model: OFBViTForImageClassification, cost: Cost = macs_of) -> Tensor:
    """MACs, or what else counts, under the counts as they are now, rounded up; a scalar to
    differentiate.

    As in the published code, a layer feels the price of its count even where an earlier layer left
    fewer tokens. But of its two counts only the one that binds: tokens that are merged away cost
    nothing more if fewer are dropped. (The published code presses on both, and so drops what it
    might have merged for the same price.)
    """
    config = model.config
    left = model.classifier.weight.new_tensor(num_tokens(config), dtype=torch.float32)
    learned = []
    for reduction in learned_reductions(model):
        own = torch.minimum(reduction.kept(), reduction.merged())
        kept = torch.minimum(left, reduction.kept())
        left = own + (torch.minimum(left, own) - own).detach()
        learned.append([kept, left])
    return schedule_cost(config, learned_schedule(config, learned), cost)


def read_expected_counts(model: OFBViTForImageClassification) -> list[list[float]]:
    """Learned (kept, merged) of the layers that learn, as expectations."""
    return [
        [r.kept.expected().item(), r.merged.expected().item()] for r in learned_reductions(model)
    ]
