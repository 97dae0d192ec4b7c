"""When a search can learn from the network that it begins with."""

from transformers import PreTrainedModel

from ..space.configuration import BiMaskConfig


def require_own_teacher(dense: PreTrainedModel | None, weight: float, config: BiMaskConfig) -> None:
    """Raise ValueError unless a search can learn from its own dense model.

    Args:
        dense: the dense model, None if the supernet no longer holds it.
        weight: fraction of the classification loss that comes from the teacher.
        config: of the search.
    """
    if weight == 1 and config.importance_hold:
        raise ValueError(
            "distillation_weight is 1 and the teacher is the dense model itself: it agrees with "
            "itself, so there are no gradients to rank units by. Leave labels a fraction of the "
            "loss (0.5), or give another teacher."
        )
    if dense is None:
        raise ValueError(
            "the supernet has been searched already, so the dense model to learn from is no longer "
            "in it; give that model as teacher, or distillation_weight=0."
        )
