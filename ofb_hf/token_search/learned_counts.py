"""Learn how many tokens each layer keeps, with all weights frozen (DiffRate, arXiv:2305.17997).

Every layer has two counts, tokens kept after dropping and tokens left after merging. Each is the
expectation over candidates under a softmax, whose logits learn. Meanwhile no token is removed, only
hidden, so that the gradient of the loss says what another token would be worth.
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
from ..families.registry import family_of
from ..families.token_reduction import (
    scheduled,
    set_token_reduction_,
    token_reductions,
    with_fewest_tokens,
)
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

# Size of a hidden token, by which attention to it is multiplied: the constant of the masked softmax
# in the published code.
HIDDEN = 1e-6


@dataclass
class TokenSearchConfig(Budget):
    """How tokens are searched, and what the result may cost.

    Raises:
        ValueError: for two budgets, for a budget, gap, rate or weight out of range, and for a
            latency table that is missing or cannot be read. The message names the field.

    Example:

    ```python
    >>> from ofb_hf import TokenSearchConfig

    >>> TokenSearchConfig(token_granularity=4).budget
    ('target_macs', 0.7)
    ```"""

    default_macs: ClassVar[float] = 0.7

    target_macs: float | None = field(
        default=None,
        metadata={
            "help": "Budget in MACs: at most 1 = fraction of the model with all its tokens, above "
            "1 = absolute. 0.7 if no target is given."
        },
    )
    token_granularity: int = field(
        default=1,
        metadata={"help": "Gap between candidate token counts (DiffRate's default is 4)."},
    )
    token_learning_rate: float = field(
        default=0.2,
        metadata={
            "help": "Learning rate of the logits of token counts; weights do not learn (DiffRate: "
            "0.01)."
        },
    )
    token_macs_weight: float = field(
        default=10.0,
        metadata={
            "help": "Weight of the squared relative gap between expected cost and budget "
            "(DiffRate: 106 for DeiT-S)."
        },
    )

    def __post_init__(self):
        self.check_budget()
        _require_gap(self.token_granularity)
        for name in ("token_learning_rate", "token_macs_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be positive.")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)

    def target_for(self, config: ViTConfig) -> int:
        """Return the budget for a model that keeps all its tokens, in MACs or picoseconds.

        Raises:
            ValueError: for a budget above what the model costs, and for a latency table of another
                model.
            UnreachableBudgetError: for a budget below the cost of the smallest token schedule,
                which it names.
        """
        every = full_schedule(config)
        self.require_fit(scheduled(config, every), with_fewest_tokens(config))
        dense = schedule_cost(config, every, self.terms_of)
        fewest = smallest_schedule(config, self.terms_of)
        smallest = schedule_cost(config, fewest, self.terms_of)
        target = self.target(dense)
        if smallest > target:
            raise UnreachableBudgetError(
                f"{self.budget[0]} is {self.show(target)}, below the smallest token schedule, "
                f"which costs {self.show(smallest)}; {self._advice(dense, smallest)}.",
                smallest,
            )
        return target

    def _advice(self, dense: int, smallest: int) -> str:
        """Return what to do about a budget that no token schedule meets."""
        if smallest < dense:
            return "raise it to at least that, or make the model narrower first"
        # The price of a reduction is more than all that it saves.
        advice = f"all tokens cost {self.show(dense)}, so fewer gain nothing here"
        if self.target_latency_ms is not None:
            advice += "; more images in a batch may"
        return advice


def _require_gap(granularity: Any, patches: float = math.inf) -> None:
    """Raise ValueError unless candidates that far apart leave something to choose from.

    Args:
        granularity: gap between candidate token counts.
        patches: of an image, where it is known.
    """
    is_whole = isinstance(granularity, int) and not isinstance(granularity, bool)
    if is_whole and 1 <= granularity < patches:
        return
    below = ""
    if patches < math.inf:
        below = f" and below the {patches} patches of an image, or there is nothing to choose from"
    raise ValueError(
        f"token_granularity is {granularity!r}; it is a gap in tokens, a whole number of at least "
        f"1{below}."
    )


class LearnedCount(nn.Module):
    """Token count that learns: an expectation over candidates (DiffRate, section 3.2).

    Args:
        tokens: N, the largest candidate, class token included.
        granularity: gap between candidates.

    Attributes:
        logits: (K,), 0 at the start.
        candidates: (K,) token counts, falling from N, all at least 2.
    """

    def __init__(self, tokens: int, granularity: int = 1):
        super().__init__()
        candidates = torch.arange(tokens, 1, -granularity)
        self.logits = nn.Parameter(torch.zeros(len(candidates)))
        self.register_buffer("candidates", candidates.float(), persistent=False)

    def expected(self) -> Tensor:
        """Return the expected count, a scalar."""
        return (self.logits.softmax(0) * self.candidates).sum()

    def forward(self) -> Tensor:
        """Return the expected count rounded up, a scalar with the gradient of the expectation."""
        expected = self.expected()
        # Without the margin a rounding error of the sum would count as a token.
        rounded = torch.ceil(expected - 1e-3)
        return expected + (rounded - expected).detach()  # straight-through

    def survival(self) -> Tensor:
        """Return the probability that the token of rank r is kept, for r = 0 ... N - 1. (N,)

        A token of rank r is kept by all candidates above r.
        """
        ranks = torch.arange(int(self.candidates[0]), device=self.logits.device)
        keeps_rank = self.candidates[None] > ranks[:, None]  # (N, K)
        return (keeps_rank * self.logits.softmax(0)).sum(1)


class LearnedReduction(nn.Module):
    """Stand-in for the `TokenReduction` of a layer while its counts are learned.

    Tokens that would be dropped or merged stay in place with a size of almost 0. Attention is
    proportional to size, so no token attends to them, and the gradient with respect to their size
    says what removing them costs or gains. Their own features go on unread.

    Args:
        tokens: N, class token included.
        granularity: gap between candidate counts.

    Attributes:
        kept: count of the tokens kept after dropping.
        merged: count of the tokens left after merging.
    """

    def __init__(self, tokens: int, granularity: int = 1):
        super().__init__()
        self.kept = LearnedCount(tokens, granularity)
        self.merged = LearnedCount(tokens, granularity)

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return all tokens and new sizes, the hidden tokens' almost 0.

        Args:
            tokens: (B, N, C), class token first.
            sizes: (B, N), patches in each token; None for 1 everywhere.
            importance: (B, N - 1), of the patch tokens.

        Returns:
            Tokens (B, N, C), where those that absorb others became means, and sizes (B, N).
        """
        if sizes is None:
            sizes = torch.ones_like(F.pad(importance, (1, 0)))
        alive = sizes.detach() > 0.5  # (B, N): not hidden by an earlier layer
        ranks = _ranks(importance.detach(), alive)

        is_kept = ranks < self.kept()
        is_left = ranks < self.merged()
        merges = alive & is_kept & ~is_left
        absorbs = alive & is_kept & is_left
        tokens, gained = _merge_in_place(tokens, sizes.detach(), merges, absorbs)

        # A token that is merged away counts as not hidden by dropping, and a dropped one as not
        # hidden by merging: each is hidden by one mask only. Behind two masks of almost 0, the
        # gradient of neither count would show what the token is worth.
        dropping = _mask(is_kept, self.kept.survival()[ranks])
        merging = _mask(~merges, self.merged.survival()[ranks])
        sizes = (sizes + gained) * dropping * merging
        return tokens, sizes.clamp(min=HIDDEN)


def _ranks(importance: Tensor, alive: Tensor) -> Tensor:
    """Return the rank of each token, (B, N): 0 is the class token, 1 the most important patch.

    Args:
        importance: (B, N - 1), of the patch tokens, none negative.
        alive: (B, N) bool; the other tokens rank last.
    """
    importance = importance.masked_fill(~alive[:, 1:], -1)
    order = importance.argsort(1, descending=True)  # (B, N - 1)
    ranks = order.argsort(1) + 1  # the inverse permutation
    return F.pad(ranks, (1, 0))


def _mask(hard: Tensor, soft: Tensor) -> Tensor:
    """Return 1 where `hard`, almost 0 elsewhere, with the gradient of `soft` (DiffRate, 3.3)."""
    # `soft - soft.detach()` is exactly 0. `soft + (hard - soft).detach()` would be `hard` up to
    # rounding errors, and these are not small compared to almost 0: a value below HIDDEN is clamped
    # later, which lets no gradient through, and the gradient of its logarithm, by which attention
    # is scaled, would be off by as much as the value is.
    return hard.to(soft.dtype).clamp(min=HIDDEN) + (soft - soft.detach())


def _merge_in_place(
    tokens: Tensor, sizes: Tensor, merges: Tensor, absorbs: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `merge_tokens` does, but by masks, with all tokens in place.

    Args:
        tokens: (B, N, C), class token first.
        sizes: (B, N).
        merges: (B, N) bool, tokens to merge away.
        absorbs: (B, N) bool, tokens to merge them into.

    Returns:
        Tokens (B, N, C), and what their sizes gain (B, N).
    """
    targets = absorbs.clone()
    targets[:, 0] = False  # nothing is merged into the class token
    directions = token_directions(tokens)
    similarity = directions @ directions.mT  # (B, N, N)
    similarity = similarity.masked_fill(~targets[:, None], -2)  # below every cosine
    similarity, match = similarity.max(-1)  # (B, N)

    joins = F.one_hot(match, tokens.shape[1]).to(tokens.dtype)  # (B, N merged, N absorbing)
    joins = joins * merges[..., None]
    members = 1 + joins.sum(1)  # (B, N)
    means = (tokens + joins.mT @ tokens) / members[..., None]  # (B, N, C)

    weights = sizes * similarity.to(sizes.dtype).clamp(min=0)  # (B, N)
    gained = (joins * weights[..., None]).sum(1)  # (B, N)
    return means.to(tokens.dtype), gained


def install_learned_counts(model: PreTrainedModel, granularity: int = 1) -> PreTrainedModel:
    """Return a copy of a classifier in which all layers but two learn how many tokens to keep.

    Only the counts learn. The first layer keeps all tokens, because its class token has not seen
    the image yet (as in DiffRate). The last layer keeps one patch, because no attention reads the
    others; the published schedules learned that, down to their smallest candidate. "First" and
    "last" are among the layers with attention; layers without one let all tokens pass.

    Args:
        model: a ViT classifier, of transformers or of this package. If it has a token schedule, the
            copy starts from all tokens nevertheless.
        granularity: gap between candidate counts.

    Raises:
        UnsupportedArchitectureError: as `learning_layers`.
        ValueError: for a gap that leaves nothing to choose from, and for attention kernels that
            cannot count tokens by size.
    """
    require_class_token(model)
    *learning, last = learning_layers(model.config)
    require_biased_attention(model.config)
    _require_gap(granularity, num_tokens(model.config) - 1)
    learner = family_of(model.config).from_dense(model, token_schedule=full_schedule(model.config))
    learner.requires_grad_(False)
    for layer in learning:
        reduction = LearnedReduction(num_tokens(model.config), granularity)
        set_token_reduction_(learner, layer, reduction.to(model.device))
    set_token_reduction_(learner, last, TokenReduction(*SMALLEST))
    return learner


def learned_reductions(model: PreTrainedModel) -> list[LearnedReduction]:
    """Return the modules with learned counts, from the first layer to the last."""
    return [
        reduction
        for reduction in token_reductions(model)
        if isinstance(reduction, LearnedReduction)
    ]


def expected_cost(model: PreTrainedModel, cost: Cost = macs_of) -> Tensor:
    """Return the cost under the present counts, rounded up: a scalar to differentiate.

    As in the published code, a layer feels the price of its count even where an earlier layer left
    fewer tokens. Deviation: of the two counts of a layer only the smaller one feels it, because
    tokens that are merged away cost nothing more if fewer are dropped. (The published code presses
    on both, and so drops what it might have merged for the same price.)

    Args:
        model: with learned counts (`install_learned_counts`).
        cost: what counts.
    """
    config = model.config
    tokens = num_tokens(config)
    entering = torch.tensor(tokens, dtype=torch.float32, device=model.device)
    learned = []
    for reduction in learned_reductions(model):
        own = torch.minimum(reduction.kept(), reduction.merged())
        kept = torch.minimum(entering, reduction.kept())
        # No more tokens leave than enter, but the gradient is that of the layer's own count.
        entering = own + (torch.minimum(entering, own) - own).detach()
        learned.append([kept, entering])
    return schedule_cost(config, learned_schedule(config, learned), cost)


def read_expected_counts(model: PreTrainedModel) -> list[list[float]]:
    """Return [kept, left] of the layers that learn them, as expectations."""
    counts = []
    for reduction in learned_reductions(model):
        kept = reduction.kept.expected().item()
        left = reduction.merged.expected().item()
        counts.append([kept, left])
    return counts
