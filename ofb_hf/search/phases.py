"""Everything that changes during a search, as pure functions of the global optimizer step.

Pure functions make a resumed run equal to an uninterrupted one: there is no schedule state to save.
"""


def ramp(step: float, warmup_steps: float, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at `warmup_steps`, `end` afterwards (also when there
    is no warm-up)."""
    share = 1.0 if warmup_steps <= 0 else min(max(step / warmup_steps, 0.0), 1.0)
    # the sum may miss it by a rounding error
    return end if share == 1.0 else start + (end - start) * share


def importance_weight(
    step: float, warmup_steps: float, start: float = 0.99, end: float = 0.1
) -> float:
    """lambda(t), the weight of the importance score in the bi-mask (arXiv:2403.15835; constants of
    its code).

    Importance leads first, sparsity decides later: 0.99 falls to 0.10 over the warm-up.
    """
    return ramp(step, warmup_steps, start, end)


def keep_ratio(step: float, warmup_steps: float, start: float = 0.95, end: float = 0.75) -> float:
    """Share of patches that PMIM leaves visible; the masked share grows from 5 % to 25 % (constants
    of the code)."""
    return ramp(step, warmup_steps, start, end)


def one_hot_weight(step: float, begin_step: float, end_step: float, final: float) -> float:
    """Weight of the one-hot loss: 0 until `begin_step`, then linear up to `final` at `end_step`."""
    if step < begin_step:
        return 0.0
    return ramp(step - begin_step, end_step - begin_step, 0.0, final)


def is_retirement_step(step: int, every: int, begin_step: float = 0) -> bool:
    """Whether weak candidates retire after optimizer step `step` (1-based): every `every` steps
    once begun."""
    return step > begin_step and step % every == 0


def settlement_step(share: float, total: int) -> int:
    """The optimizer step (1-based) after which the final choice is made, at least the first and at
    most the last."""
    return min(total, max(1, round(share * total)))
