"""Token schedules for any plain ViT, from all tokens to the fewest, in the shape of published ones.

Where in the network tokens should go was learned by the authors of DiffRate on ImageNet
(`tokens/published.py`): gradually, from the first third of the layers on. That shape, at the same
relative depth and for the same fraction of the tokens, is a good start for other networks; how far
to go is decided for each network.
"""

import numpy as np
from transformers import ViTConfig

from ..families.description import macs_of
from .published import PUBLISHED
from .schedules import (
    SMALLEST,
    Cost,
    Schedule,
    full_schedule,
    num_tokens,
    ranking_layers,
    schedule_cost,
)

# Neighbours in the list differ in cost by about this fraction of the dense cost, at most.
LARGEST_GAP = 0.03
# How far the largest schedule within a budget may be from the next larger one, in levels.
FINENESS = 1e-3


def graded_schedules(
    config: ViTConfig, target: int | None = None, cost: Cost = macs_of
) -> list[Schedule]:
    """Return token schedules from all tokens to one patch; costs fall along the list.

    For the shapes of DeiT-T, S and B at 224 pixels the published schedules are among them, but for
    the last layer, behind which no patch is read: there one patch is left.

    Args:
        config: of a ViT. A layer without attention hands on all tokens that enter it.
        target: a budget, in what `cost` counts. The largest schedule within it is then the
            last of the list: with fewer tokens, the budget could not be used up.
        cost: what counts.
    """
    levels = _levels(config)
    dense = schedule_cost(config, full_schedule(config), cost)

    def cost_at(grade: float) -> int:
        return schedule_cost(config, _schedule(config, _between(levels, grade)), cost)

    grades = [0.0]
    for level in range(len(levels) - 1):
        gap = (cost_at(level) - cost_at(level + 1)) / dense
        steps = max(1, int(gap / LARGEST_GAP) + 1)
        grades += [level + step / steps for step in range(1, steps + 1)]
    if target is not None and cost_at(grades[-1]) <= target < dense:
        low, high = 0.0, grades[-1]
        while high - low > FINENESS:
            middle = (low + high) / 2
            low, high = (low, middle) if cost_at(middle) <= target else (middle, high)
        grades = [grade for grade in grades if grade < high] + [high]
    schedules: list[Schedule] = []
    for grade in grades:
        schedule = _schedule(config, _between(levels, grade))
        if schedule not in schedules:
            schedules.append(schedule)
    return schedules


def _levels(config: ViTConfig) -> list[np.ndarray]:
    """Return counts [kept, left] of each layer, (layers, 2), from all tokens to the fewest."""
    tokens = num_tokens(config)
    layers = config.num_hidden_layers
    everything = np.full((layers, 2), float(tokens))
    # Nothing reads the patches behind the last attention: to drop them there loses nothing.
    all_but_last = everything.copy()
    all_but_last[-1] = SMALLEST
    width = min(PUBLISHED, key=lambda channels: abs(channels - config.hidden_size))
    published = []
    for _, (kept, left) in sorted(PUBLISHED[width].items(), reverse=True):
        counts = np.stack([_stretched(kept, layers), _stretched(left, layers)], 1)  # (layers, 2)
        published.append(counts * tokens / kept[0])
    fewest = np.full((layers, 2), float(SMALLEST[0]))
    fewest[0] = tokens
    return [everything, all_but_last, *published, fewest]


def _between(levels: list[np.ndarray], grade: float) -> np.ndarray:
    """Return the counts at a grade: a level, or between that and the next one."""
    level = min(int(grade), len(levels) - 2)
    return levels[level] + (levels[level + 1] - levels[level]) * (grade - level)


def _stretched(counts: list[int], layers: int) -> np.ndarray:
    """Return counts for another number of layers, at the same relative depth, (layers,).

    The last layer drops what is not read any more, whatever the depth: it is set apart.
    """
    places = np.arange(1, len(counts)) / len(counts)
    wanted = np.arange(1, layers) / layers
    stretched = np.interp(wanted, places, counts[:-1])
    return np.append(stretched, counts[-1])


def _schedule(config: ViTConfig, counts: np.ndarray) -> Schedule:
    """Return whole counts that do not rise, reduced only by layers that can rank tokens.

    Args:
        config: of the model.
        counts: [kept, left] of each layer, (layers, 2).
    """
    able = ranking_layers(config)
    entering = num_tokens(config)
    schedule: Schedule = []
    for layer, (kept, left) in enumerate(counts):
        if layer in able and layer > 0:
            kept = min(entering, max(SMALLEST[0], round(float(kept))))
            left = min(kept, max(SMALLEST[1], round(float(left))))
            # Nothing reads the patches behind the last layer.
            if layer == len(counts) - 1 and left < entering:
                kept = left = SMALLEST[1]
        else:
            kept = left = entering
        schedule.append([kept, left])
        entering = left
    return schedule
