"""Rewrite a network in an equivalent basis: the same function, with units that are easier to cut.

A channel of a trained network is rarely important or unimportant on its own: what matters is spread
over all of them. The network leaves freedom that costs nothing, and this module uses it to gather
what matters in few channels:

- **Queries and keys, values and output.** Of a head, q' = A q and k' = A^-T k give the same logits
  for any invertible A; v' = B v and W_o' = W_o B^-1 the same output. Both are one problem. Let x be
  the channels of one side with second moments C = E[x x'], and G what the other side makes of them
  (the second moments of the keys, or W_o' W_o). With the eigenvectors U and eigenvalues S^2 of
  C^1/2 G C^1/2,

      A = S^1/2 U' C^-1/2,    A^-T = S^-1/2 U' C^1/2

  both sides get the moments S: uncorrelated, balanced, sorted. The first r channels are then the
  best r for the product, in the least-squares sense.
- **Residual stream.** LayerNorm commutes with every orthogonal Q that keeps the mean (Q 1 = 1), so
  writers Q W and readers W Q' compute the same. Q leads from the principal components of what the
  norms give out to the orthonormal basis that is nearest to single channels.
- What stands in the way moves first: scales and shifts of norms into the layers that read them, the
  values' bias through the attention (its rows sum to 1) into the output's bias. The keys' bias adds
  one constant to all logits of a query, which softmax does not see: it is dropped.

MLP channels keep their basis, for the activation stands between their two layers.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.bases import HeadBasis, NormReaders, StreamBasis
from ..families.registry import family_of, require_classifier
from .sums import Sums

# Second moments are held away from singular by this fraction of their mean: what a head never uses
# would otherwise be divided by nothing.
FLOOR = 1e-6
# Where there is no mean at all, as in a head that gives out zeros.
TINY = 1e-30


@torch.no_grad()
def equivalent_basis(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    heads: bool = True,
    streams: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreTrainedModel:
    """Return a copy of a classifier that computes the same logits in a basis that is easier to cut.

    Args:
        model: a stock classifier or one of this package; it stays as it is.
        batches: images as the model takes them, (B, channels, height, width), the same on all
            processes, which share the work. No labels are needed, and some hundred images are
            enough.
        heads: rewrite queries, keys, values and output projections, head by head.
        streams: rotate the residual streams that the family allows to rotate.
        progress: is called with the numbers of batches done and to do.

    Returns:
        A classifier of this package in evaluation mode; its config names the basis. Half-precision
        weights are widened to float32, for their rounding would change the function. Logits and
        attention maps are those of `model` up to rounding (1e-10 of the largest logit in float64,
        1e-4 in float32); hidden states are not, once a stream was rotated.

    Raises:
        UnsupportedArchitectureError: if the model belongs to no supported family.
        ValueError: without images, and if a layer gives out numbers that are not finite.
    """
    require_classifier(model)
    family = family_of(model.config)
    is_ours = isinstance(model, family.model_class)
    result = copy.deepcopy(model) if is_ours else family.from_dense(model)
    family.pin(result.config)
    if torch.finfo(result.dtype).bits < 32:
        result = result.float()
    result.eval()
    bases = family.bases(result.config)
    rotated = []
    if streams:
        rotated = [stream for stream in bases.streams if _absorb_norms_(result, stream)]
    if heads:
        for head in bases.heads:
            _absorb_value_bias_(result, head)
    batches = list(batches) if not isinstance(batches, Sequence) else batches
    moments = _observe(result, batches, bases.heads if heads else (), rotated, progress)
    for head in bases.heads if heads else ():
        _rewrite_heads_(result, head, moments)
    for stream in rotated:
        _rotate_(result, stream, _rotation(_mean(moments, stream.name)))
    if streams:
        result.config.basis = "equivalent"
    elif heads:
        result.config.basis = "heads"
    return result


# --------------------------------------------------------------------------- what stands in the way


def _absorb_norms_(model: PreTrainedModel, stream: StreamBasis) -> bool:
    """Move scales and shifts of a stream's norms into their readers; remove the stream's mean.

    Returns:
        Whether that was possible. If not, nothing was changed.
    """
    norms = [(model.get_submodule(norm.norm), norm) for norm in stream.norms]
    if any(not _can_absorb(model, module, norm) for module, norm in norms):
        return False
    for module, norm in norms:
        _absorb_norm_(model, module, norm)
    # A norm over several tokens side by side sees the differences of their means.
    if all(norm.tiles == 1 for norm in stream.norms):
        _center_(model, stream)
    return True


def _shift_moves(model: PreTrainedModel, norm: NormReaders) -> bool:
    """Return whether the shift of a norm can become part of its readers' biases."""
    readers = [model.get_submodule(path) for path in norm.readers]
    return not norm.padded and all(reader.bias is not None for reader in readers)


def _can_absorb(model: PreTrainedModel, module: nn.LayerNorm, norm: NormReaders) -> bool:
    """Return whether the scale of a norm can become 1 without a change of the function."""
    if _shift_moves(model, norm):
        return True
    # A shift that stays behind is divided by the scale that leaves.
    divisible = (module.weight != 0) | (module.bias == 0)
    return bool(divisible.all())


def _absorb_norm_(model: PreTrainedModel, module: nn.LayerNorm, norm: NormReaders) -> None:
    """Make the scale of a norm 1: W (g n + b) = (W g) n + W b."""
    scale, shift = module.weight.double(), module.bias.double()
    moves = _shift_moves(model, norm)
    for path in norm.readers:
        reader = model.get_submodule(path)
        weight = reader.weight.double()
        if moves:
            reader.bias.copy_(reader.bias.double() + weight @ shift)
        reader.weight.copy_(weight * scale)
    if moves:
        module.bias.zero_()
    else:
        # g n + b = g (n + b / g); where g is 0, so is b.
        divisor = torch.where(scale == 0, 1.0, scale)
        module.bias.copy_(shift / divisor)
    module.weight.fill_(1.0)


def _center_(model: PreTrainedModel, stream: StreamBasis) -> None:
    """Remove the mean over channels from everything that writes a stream: no norm sees it."""
    for path in stream.writers:
        writer = model.get_submodule(path)
        writer.weight.sub_(writer.weight.mean(0, keepdim=True))
        if writer.bias is not None:
            writer.bias.sub_(writer.bias.mean())
    for tensor in _tensors(model, stream):
        tensor.sub_(tensor.mean(-1, keepdim=True))


def _absorb_value_bias_(model: PreTrainedModel, head: HeadBasis) -> None:
    """Send the values' bias through the attention: the rows of its map sum to 1."""
    values, output = model.get_submodule(head.values), model.get_submodule(head.output)
    if values.bias is None or output.bias is None:
        return
    passed = output.weight.double() @ values.bias.double()
    output.bias.copy_(output.bias.double() + passed)
    values.bias.zero_()


def _tensors(model: PreTrainedModel, stream: StreamBasis) -> list[nn.Parameter]:
    """Return the parameters that are added to a stream; a model need not have all of them."""
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in stream.tensors if name in parameters]


# --------------------------------------------------------------------------------------- statistics


def _observe(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    heads: tuple[HeadBasis, ...],
    streams: list[StreamBasis],
    progress: Callable[[int, int], None],
) -> Sums:
    """Return sums over rows of outer products and rows of what layers give out, by module path; of
    all norms of a stream together, by its name."""
    if not len(batches) and (heads or streams):
        raise ValueError("batches holds no image; give at least one batch (B, C, H, W) of images.")
    moments = Sums()
    state = PartialState()
    hooks = []

    def watch(path: str, key: str, view, before: bool = False) -> None:
        module = model.get_submodule(path)
        add = partial(_add, path=path, key=key, moments=moments, view=view)
        if before:
            hooks.append(module.register_forward_pre_hook(lambda module, args: add(args[0])))
        else:
            hooks.append(module.register_forward_hook(lambda module, args, output: add(output)))

    for head in heads:
        watch(head.queries, head.queries, partial(_per_head, head=head))
        watch(head.keys, head.keys, partial(_per_head, head=head, centered=True))
        watch(head.output, head.output, partial(_per_head, head=head), before=True)
    for stream in streams:
        for norm in stream.norms:
            watch(norm.norm, stream.name, partial(_per_token, tiles=norm.tiles))
    try:
        for number in range(state.process_index, len(batches), state.num_processes):
            model(pixel_values=batches[number].to(model.device, model.dtype))
            progress(min(number + state.num_processes, len(batches)), len(batches))
    finally:
        for hook in hooks:
            hook.remove()
    moments.reduce_()
    return moments


def _add(output: Tensor, path: str, key: str, moments: Sums, view) -> None:
    if not bool(output.isfinite().all()):
        raise ValueError(
            f"{path} gives out numbers that are not finite for these images; check the checkpoint "
            "and how the images are normalized."
        )
    rows = view(output)  # (..., N, D)
    moments.add((key, "products"), rows.mT @ rows)
    moments.add((key, "rows"), rows.shape[-2])


def _mean(moments: Sums, key: str) -> Tensor:
    """Return E[x x'], (..., D, D) in float64."""
    return moments[(key, "products")] / moments[(key, "rows")]


def _per_head(output: Tensor, head: HeadBasis, centered: bool = False) -> Tensor:
    """Return channels by head, (H, rows, D), from (..., N, H * D)."""
    output = output.unflatten(-1, (head.num_heads, head.head_dim))  # (..., N, H, D)
    if centered:
        # Softmax does not see what all keys of an image, or of a window, have in common.
        output = output - output.mean(-3, keepdim=True)
    return output.flatten(0, -3).transpose(0, 1)  # (H, rows, D)


def _per_token(output: Tensor, tiles: int) -> Tensor:
    """Return the channels of single tokens, (rows, C), from (..., tiles * C)."""
    return output.unflatten(-1, (tiles, -1)).flatten(0, -2)  # (rows, C)


# ---------------------------------------------------------------------------------------- rewriting


def balanced_maps(moments: Tensor, counterpart: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps of two sides of a product to balanced, uncorrelated, sorted channels.

    Args:
        moments: E[x x'] of one side, (H, D, D), positive semidefinite, float64.
        counterpart: the same of the other side, or its Gram matrix, (H, D, D).

    Returns:
        A and A^-T, (H, D, D) each: x' = A x and y' = A^-T y have x'.y' = x.y, and
        A moments A' = A^-T counterpart A^-1 = diag(S), largest first.
    """
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    diagonal = moments.diagonal(dim1=-2, dim2=-1)  # (H, D)
    level = diagonal.mean(-1).clamp(min=TINY)
    floor = FLOOR * level[..., None, None] * identity  # (H, D, D)
    values, vectors = torch.linalg.eigh(moments + floor)
    # Sums of products in float32 may have slightly negative eigenvalues.
    values = values.clamp(min=FLOOR * level[..., None])
    # C^1/2 and C^-1/2: columns of the eigenvectors are scaled.
    root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    inverse_root = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    squares, directions = torch.linalg.eigh(root @ counterpart @ root)
    # eigh sorts from small to large.
    squares = squares.flip(-1)  # S^2
    directions = directions.flip(-1)
    largest = squares[..., :1].clamp(min=TINY)
    # Channels that the other side does not use are not scaled without limit.
    squares = squares.clamp(min=FLOOR**2 * largest)
    scales = squares.pow(0.25)[..., None]  # S^1/2, (H, D, 1)
    first = scales * (directions.mT @ inverse_root)
    second = (directions.mT @ root) / scales
    return first, second


def _rewrite_heads_(model: PreTrainedModel, head: HeadBasis, moments: Sums) -> None:
    """Bring queries and keys, values and output projection of one attention into their basis."""
    queries, keys = model.get_submodule(head.queries), model.get_submodule(head.keys)
    values, output = model.get_submodule(head.values), model.get_submodule(head.output)
    of_queries, of_keys = balanced_maps(_mean(moments, head.queries), _mean(moments, head.keys))
    _map_rows_(queries, of_queries)
    _map_rows_(keys, of_keys)
    if keys.bias is not None:
        keys.bias.zero_()
    by_head = output.weight.double().unflatten(1, (head.num_heads, head.head_dim))  # (C, H, D)
    columns = by_head.transpose(0, 1)  # (H, C, D)
    gram = columns.mT @ columns  # (H, D, D)
    of_values, of_columns = balanced_maps(_mean(moments, head.output), gram)
    _map_rows_(values, of_values)
    mapped = columns @ of_columns.mT  # (H, C, D)
    output.weight.copy_(mapped.transpose(0, 1).flatten(1))  # (C, H * D)


def _map_rows_(layer: nn.Linear, maps: Tensor) -> None:
    """Apply a map per head, (H, D, D), to the outputs of a layer."""
    num_heads, head_dim = maps.shape[:2]
    weight = layer.weight.double().unflatten(0, (num_heads, head_dim))  # (H, D, C)
    layer.weight.copy_((maps @ weight).flatten(0, 1))
    if layer.bias is not None:
        bias = layer.bias.double().unflatten(0, (num_heads, head_dim))[..., None]  # (H, D, 1)
        layer.bias.copy_((maps @ bias).flatten())


def _rotation(moments: Tensor) -> Tensor:
    """Return the rotation of a stream with these second moments, (C, C), that keeps the mean.

    Principal components are taken in the complement of (1, ..., 1) and mapped to the orthonormal
    basis of that complement that is nearest to the first C - 1 single channels (symmetric
    orthonormalization), the strongest component to the first channel: a removed channel is then a
    component with little in it.
    """
    size = len(moments)
    ones = moments.new_ones(size, 1) / size**0.5
    onto_ones = ones @ ones.mT  # (C, C)
    complement = torch.eye(size, dtype=moments.dtype, device=moments.device) - onto_ones
    # Far below every other eigenvalue, so that it sorts to the end and nothing mixes with it.
    apart = moments.diagonal().sum() + 1.0
    within = complement @ moments @ complement
    vectors = torch.linalg.eigh(within - apart * onto_ones).eigenvectors
    components = vectors.flip(-1)[:, : size - 1]  # (C, C - 1)
    # Single channels, projected into the complement and made orthonormal: E (E'E)^-1/2.
    projected = complement[:, : size - 1]  # (C, C - 1)
    values, vectors = torch.linalg.eigh(projected.mT @ projected)
    inverse_root = (vectors * values.rsqrt()) @ vectors.mT
    nearest = projected @ inverse_root
    return nearest @ components.mT + onto_ones


def _rotate_(model: PreTrainedModel, stream: StreamBasis, rotation: Tensor) -> None:
    """Rotate a stream: writers Q W, tensors t Q', readers W Q', and shifts of its norms."""
    for path in stream.writers:
        writer = model.get_submodule(path)
        weight = writer.weight.double()
        rotated = rotation @ weight.flatten(1)  # (C, inputs)
        writer.weight.copy_(rotated.view_as(weight))
        if writer.bias is not None:
            writer.bias.copy_(rotation @ writer.bias.double())
    for tensor in _tensors(model, stream):
        tensor.copy_(tensor.double() @ rotation.mT)
    for norm in stream.norms:
        module = model.get_submodule(norm.norm)
        shift = module.bias.double().unflatten(0, (norm.tiles, -1))  # (tiles, C)
        module.bias.copy_((shift @ rotation.mT).flatten())
        for path in norm.readers:
            reader = model.get_submodule(path)
            weight = reader.weight.double().unflatten(1, (norm.tiles, -1))  # (outputs, tiles, C)
            reader.weight.copy_((weight @ rotation.mT).flatten(1))
