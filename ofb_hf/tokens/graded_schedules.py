"""Token schedules for any plain ViT, from all tokens to the fewest, in the shape of published ones.

Where in the network tokens should go was learned by the authors of DiffRate on ImageNet
(`tokens/published.py`): gradually, from the first third of the layers on. That shape, at the same
relative depth and for the same fraction of the tokens, is a good start for other networks; how far
to go is decided for each network.
"""

import itertools

import numpy as np
from transformers import ViTConfig

from .published import PUBLISHED
from .schedules import SMALLEST, Schedule, full_schedule, num_tokens, ranking_layers, schedule_cost

# Neighbours in the list differ in cost by about this fraction of the dense cost, at most.
LARGEST_GAP = 0.03


def graded_schedules(config: ViTConfig) -> list[Schedule]:
    """Return token schedules from all tokens to one patch; costs fall along the list.

    For the shapes of DeiT-T, S and B at 224 pixels the published schedules are among them.

    Args:
        config: of a ViT. A layer without attention hands on all tokens that enter it.
    """
    tokens = num_tokens(config)
    layers = config.num_hidden_layers
    width = min(PUBLISHED, key=lambda channels: abs(channels - config.hidden_size))
    levels = [np.full((layers, 2), float(tokens))]
    # Nothing reads the patches behind the last attention: to drop them there loses nothing.
    levels.append(levels[0].copy())
    levels[-1][-1] = SMALLEST
    for _, (kept, left) in sorted(PUBLISHED[width].items(), reverse=True):
        counts = np.stack([_stretched(kept, layers), _stretched(left, layers)], 1)  # (layers, 2)
        levels.append(counts * tokens / kept[0])
    levels.append(np.full((layers, 2), float(SMALLEST[0])))
    levels[-1][0] = tokens
    dense = schedule_cost(config, full_schedule(config))
    schedules: list[Schedule] = [full_schedule(config)]
    for before, after in itertools.pairwise(levels):
        costs = [schedule_cost(config, _schedule(config, level)) for level in (before, after)]
        steps = max(1, int((costs[0] - costs[1]) / dense / LARGEST_GAP) + 1)
        for step in range(1, steps + 1):
            between = before + (after - before) * step / steps
            schedule = _schedule(config, between)
            if schedule not in schedules:
                schedules.append(schedule)
    return schedules


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
