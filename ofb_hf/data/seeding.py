"""Random numbers of single examples, which do not depend on what was computed before them."""

import torch

# A prime number. Times and places below it never give two examples of a run the same seed.
FACTOR = 1_000_003


def seed_example(seed: int, time: int, place: int) -> None:
    """Seed torch's global generator for the random transforms of one example.

    An interrupted and resumed run then sees the images that it would have seen, whatever its loader
    had fetched ahead, and an example is augmented alike whether it is streamed or loaded.

    Args:
        seed: the seed of the run.
        time: how many times the example was seen before: the epoch, if it is once in an epoch.
        place: its number in the data.
    """
    seed_of_example = (seed * FACTOR + time) * FACTOR + place
    # The generator takes at most 64 bits.
    torch.default_generator.manual_seed(seed_of_example % 2**63)
