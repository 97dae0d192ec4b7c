"""Where a search stands in each of its optimizer steps, and what holds there.

    phase     steps                               what happens
    OBSERVE   the first `observed_steps`          nothing learns; gradients say what units are worth
    DECIDE    then until `settled_after`          weights, importance and alpha learn; candidates
                                                  retire, and the network shrinks
    RECOVER   the rest                            the chosen network learns

Everything follows from the number of the step, so a resumed run equals an uninterrupted one: there
is no state of a schedule to save. Without an observation (`importance_hold` 0, as in the preset
"paper") the search begins with DECIDE; with `settle_at` 1 it ends with it; with `settle_at` 0, as
in the preset "default", error curves have decided before the first step, and all steps RECOVER.
This file needs the standard library only.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

# Images that are observed at most: more of them rank units no better (docs/LOG.md).
OBSERVED_IMAGES = 2048


class Phase(Enum):
    """A stretch of a search."""

    OBSERVE = "observe"
    DECIDE = "decide"
    RECOVER = "recover"


class PhaseSettings(Protocol):
    """The fields of a `BiMaskConfig` that say when something happens."""

    importance_hold: float
    importance_start: float
    importance_end: float
    warmup: float
    pmim: bool
    pmim_until_settled: bool
    keep_ratio_start: float
    keep_ratio_end: float
    one_hot_weight: float
    one_hot_begin: float
    one_hot_end: float
    retire_begin: float
    retire_events: int
    settle_at: float
    prune_during_search: bool


@dataclass(frozen=True)
class SearchStep:
    """What holds during one optimizer step of a search, and what happens right after it.

    Attributes:
        phase: the phase that the step belongs to.
        lam: weight of importance in the bi-mask, in [0, 1].
        keep_ratio: fraction of the patches that stay visible, 1.0 where none are hidden.
        one_hot_weight: weight of the one-hot loss.
        hides_patches: whether patches are hidden and repainted, in a supernet that has a decoder.
        hands_over: the observation ends: importance and alpha are set from it.
        retires: weak candidates retire.
        settles: the choice is made final.
        shrinks: dead units are removed from the network.
        folds: the bi-masks become part of the weights, once the network has shrunk.
    """

    phase: Phase
    lam: float
    keep_ratio: float
    one_hot_weight: float
    hides_patches: bool
    hands_over: bool
    retires: bool
    settles: bool
    shrinks: bool
    folds: bool

    @property
    def observes(self) -> bool:
        """Whether gradients are only observed in this step."""
        return self.phase is Phase.OBSERVE


@dataclass(frozen=True)
class Phases:
    """The phases of one search; made by `Phases.of`.

    Attributes:
        settings: the search's config.
        total_steps: optimizer steps of the search.
        observed_steps: how many of them, the first ones, only observe.
        settled_after: number of steps after which the choice is final.
    """

    settings: PhaseSettings
    total_steps: int
    observed_steps: int
    settled_after: int

    @classmethod
    def of(cls, settings: PhaseSettings, total_steps: int, images_per_step: int) -> "Phases":
        """Lay out the phases of a search.

        Args:
            settings: the search's config.
            total_steps: optimizer steps, at least 1.
            images_per_step: of all ranks and micro-batches together; it bounds the observation.
        """
        settled_after = settling_step(settings.settle_at, total_steps)
        if not settings.importance_hold:
            return cls(settings, total_steps, 0, settled_after)
        # At least one step, or there would be nothing to rank units by.
        wanted = max(1, round(settings.importance_hold * total_steps))
        enough = math.ceil(OBSERVED_IMAGES / images_per_step)
        # The choice needs the ranking.
        observed_steps = min(wanted, enough, settled_after)
        return cls(settings, total_steps, observed_steps, settled_after)

    @property
    def learning_steps(self) -> int:
        """The number of steps in which weights learn."""
        return self.total_steps - self.observed_steps

    def phase_of(self, step: int) -> Phase:
        """Return the phase of a step (0 is the first)."""
        if step < self.observed_steps:
            return Phase.OBSERVE
        return Phase.DECIDE if step < self.settled_after else Phase.RECOVER

    def at(self, step: int) -> SearchStep:
        """Return what holds in a step.

        Args:
            step: how many steps are complete when it begins, 0 for the first.
        """
        settings = self.settings
        total = self.total_steps
        phase = self.phase_of(step)
        # What holds in the step. Lambda falls from the end of the observation on, the fraction of
        # visible patches from the first step.
        warmup = settings.warmup * total
        lam = importance_weight(
            step - self.observed_steps, warmup, settings.importance_start, settings.importance_end
        )
        hides = self._hides_in(phase)
        visible = keep_ratio(step, warmup, settings.keep_ratio_start, settings.keep_ratio_end)
        pressure = one_hot_weight(
            step,
            settings.one_hot_begin * total,
            settings.one_hot_end * total,
            settings.one_hot_weight,
        )
        # What happens after it, when one more step is complete.
        complete = step + 1
        retires = self._retires_after(complete)
        settles = complete == self.settled_after
        # Without pruning during the search everything is cut and folded after the last step.
        is_last = complete == total
        cuts = settings.prune_during_search and (retires or settles)
        folds = settings.prune_during_search and settles
        return SearchStep(
            phase=phase,
            lam=lam,
            keep_ratio=visible if hides else 1.0,
            one_hot_weight=pressure,
            hides_patches=hides,
            hands_over=complete == self.observed_steps,
            retires=retires,
            settles=settles,
            shrinks=cuts or is_last,
            folds=folds or is_last,
        )

    def _hides_in(self, phase: Phase) -> bool:
        """Return whether patches are hidden in the steps of a phase."""
        if not self.settings.pmim or phase is Phase.OBSERVE:
            return False
        return phase is Phase.DECIDE or not self.settings.pmim_until_settled

    def _retires_after(self, complete: int) -> bool:
        """Return whether weak candidates retire when this many steps are complete."""
        if complete >= self.settled_after:
            return False
        every = max(1, self.total_steps // self.settings.retire_events)
        begin = self.settings.retire_begin * self.total_steps
        return is_retirement_step(complete, every, begin)


def ramp(step: float, warmup_steps: float, start: float, end: float) -> float:
    """Return a value that moves linearly from `start` at step 0 to `end` at `warmup_steps`.

    It stays at `end` afterwards, and is `end` from the start if there is no warm-up.
    """
    fraction = 1.0 if warmup_steps <= 0 else min(max(step / warmup_steps, 0.0), 1.0)
    # The sum may miss the end by a rounding error.
    return end if fraction == 1.0 else start + (end - start) * fraction


def importance_weight(
    step: float, warmup_steps: float, start: float = 0.99, end: float = 0.1
) -> float:
    """Return lambda(t), the weight of importance in the bi-mask (arXiv:2403.15835).

    Importance leads first, sparsity decides later: lambda falls over the warm-up. The defaults are
    the constants of the published code.
    """
    return ramp(step, warmup_steps, start, end)


def keep_ratio(step: float, warmup_steps: float, start: float = 0.95, end: float = 0.75) -> float:
    """Return the fraction of patches that PMIM leaves visible.

    The hidden fraction grows from 5 % to 25 % with the constants of the published code.
    """
    return ramp(step, warmup_steps, start, end)


def one_hot_weight(step: float, begin_step: float, end_step: float, final: float) -> float:
    """Return the weight of the one-hot loss.

    It is 0 until `begin_step`, then grows linearly up to `final` at `end_step`.
    """
    if step < begin_step:
        return 0.0
    return ramp(step - begin_step, end_step - begin_step, 0.0, final)


def is_retirement_step(step: int, every: int, begin_step: float = 0) -> bool:
    """Return whether weak candidates retire when `step` steps are complete.

    They do in every multiple of `every` after `begin_step`.
    """
    return step > begin_step and step % every == 0


def settling_step(fraction: float, total: int) -> int:
    """Return after how many of `total` steps the choice is final.

    Args:
        fraction: of the steps, before the choice; at least one step, unless it is 0.
        total: number of steps.
    """
    if fraction == 0:
        return 0
    return min(total, max(1, round(fraction * total)))
