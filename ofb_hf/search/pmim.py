"""Progressive masked image modelling (arXiv:2403.15835): a search-time loss that keeps the features
rich.

The growing share of hidden patches is replaced by a mask token; a one-layer decoder repaints them
from the final tokens. Only hidden patches count, and so no others need be painted. Used while
training a supernet, thrown away by `compress`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW_AT_PATCH_16 = 47


def window_for_patch(patch_size: int) -> int:
    """Side of the normalisation window: 47 pixels for 16-pixel patches, scaled to the nearest odd
    size otherwise."""
    return max(3, 2 * round((WINDOW_AT_PATCH_16 * patch_size / 16 - 1) / 2) + 1)


@torch.no_grad()
def normalize_target(pixels: Tensor, window: int) -> Tensor:
    """Standardises every pixel by the mean and variance of the window around it.

    A window is cut at the image's border and only pixels inside count. Averages are separable: a
    product with a band matrix for each axis (the published 47 x 47 pooling costs more than the
    network).

    Args:
        pixels: (B, C, H, W).
        window: odd side of the window in pixels.

    Returns:
        (B, C, H, W) in float32 or the wider input type; zeros for a constant image.

    Raises:
        ValueError: for an even or non-positive window.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}; it needs a centre, so give an odd number of pixels.")
    with torch.autocast(pixels.device.type, enabled=False):
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        # E[x^2] - E[x]^2 cancels badly for bright flat images; the overall mean has no effect on
        # the result.
        pixels = pixels - pixels.mean((-2, -1), keepdim=True)
        rows, columns = (_window_sum(side, window, pixels) for side in pixels.shape[-2:])
        inside_rows, inside_columns = rows.sum(1, keepdim=True), columns.sum(0)
        count = inside_rows * inside_columns  # pixels in the window of every pixel
        rows, columns = rows / inside_rows, columns / inside_columns
        mean, variance = rows @ pixels @ columns, rows @ pixels.square() @ columns
        # In place: new memory for a picture of every step takes longer than the arithmetic.
        variance.addcmul_(mean, mean, value=-1).mul_(count / (count - 1).clamp(min=1)).clamp_(
            min=0
        ).add_(1e-6).sqrt_()
        return pixels.sub_(mean).div_(variance)


def _window_sum(length: int, window: int, like: Tensor) -> Tensor:
    """The matrix (length, length) that adds up the entries within a window around each one. It is
    symmetric.

    Products with it are many times faster than pooling along one axis.
    """
    position = torch.arange(length, device=like.device)
    return ((position[:, None] - position).abs() <= window // 2).to(like.dtype)


def refine_mask(
    masked: Tensor, grid: tuple[int, int], finer: tuple[int, int], factor: int
) -> Tensor:
    """The same hidden regions on a finer grid.

    A network that merges patches is masked in units of its final tokens, as SimMIM does
    (arXiv:2111.09886): the neighbours of a single small patch would give it away.

    Args:
        masked: (B, N) bool over `grid` (rows, columns).
        finer: the other grid, each cell of `grid` covering `factor` x `factor` of its cells; cells
            of `grid` may reach beyond its border.

    Returns:
        (B, M) bool over `finer`.
    """
    masked = masked.unflatten(1, grid).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return masked[:, : finer[0], : finer[1]].flatten(1)


def mask_patches(
    batch_size: int, num_patches: int, keep_ratio: float, generator: torch.Generator
) -> Tensor:
    """Hides a random set of patches of every image.

    Args:
        keep_ratio: share of patches left visible, in [0, 1]; `int(num_patches * keep_ratio)` of
            them stay.
        generator: on the CPU; seed it from step and rank, so that a resumed run hides the same
            patches.

    Returns:
        (B, N) bool on the CPU, True = hidden (`bool_masked_pos` of transformers).
    """
    if not 0 <= keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; it is a share of patches between 0 and 1.")
    noise = torch.rand(batch_size, num_patches, generator=generator)
    rank = noise.argsort(dim=1).argsort(dim=1)
    return rank >= int(num_patches * keep_ratio)


def hidden_first(masked: Tensor, count: int) -> Tensor:
    """Which patches to repaint: all hidden ones, and after them others, so that there are as many
    at every step.

    Args:
        masked: (B, N) bool, at most `count` hidden in an image.

    Returns:
        (B, count) indices of patches.
    """
    return masked.byte().argsort(dim=1, descending=True, stable=True)[:, :count]


class PMIMDecoder(nn.Module):
    """Repaints patches from final tokens: a 1x1 convolution to stride^2 * channels.

    Args:
        hidden_size: C, width of the tokens (shrinks with the network).
        stride: pixels per token along a side.
        num_channels: colour channels of the image.
    """

    def __init__(self, hidden_size: int, stride: int, num_channels: int = 3):
        super().__init__()
        self.projection = nn.Conv2d(hidden_size, stride**2 * num_channels, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, K, C) -> pixels of their patches (B, K, channels * stride * stride), as
        `cut_patches` has them."""
        # A 1x1 convolution is a linear layer, and tokens are in order for one; on CPUs that is
        # faster.
        return F.linear(tokens, self.projection.weight.flatten(1), self.projection.bias)


def cut_patches(images: Tensor, grid: tuple[int, int], size: int, chosen: Tensor) -> Tensor:
    """The pixels of some patches.

    Args:
        images: (B, C, H, W). A border that no patch covers is left out; patches that reach beyond
            it have zeros there.
        grid: rows and columns of patches.
        size: side of a patch in pixels.
        chosen: (B, K) indices of patches, row by row.

    Returns:
        (B, K, C * size * size), channel by channel.
    """
    beyond = [size * side - pixels for side, pixels in zip(grid, images.shape[-2:], strict=True)]
    if any(beyond):
        images = F.pad(images, (0, beyond[1], 0, beyond[0]))
    patches = (
        images.unflatten(3, (grid[1], size)).unflatten(2, (grid[0], size)).permute(0, 2, 4, 1, 3, 5)
    )
    every = torch.arange(len(images), device=images.device)[:, None]
    return patches[every, chosen // grid[1], chosen % grid[1]].flatten(2)


def reconstruction_loss(
    reconstruction: Tensor,
    target: Tensor,
    masked: Tensor,
    grid: tuple[int, int],
    size: int,
    repainted: Tensor,
) -> Tensor:
    """Mean absolute error over the pixels of the hidden patches.

    Args:
        reconstruction: (B, K, C * size * size), what the decoder makes of the tokens of
            `repainted`.
        target: (B, C, H, W); a border that no patch covers, and what is painted beyond the image,
            are left out.
        masked: (B, N) bool, True = hidden, for the N = rows * columns patches of `grid`, `size`
            pixels wide.
        repainted: (B, K) indices of patches, all that are hidden among them.

    Returns:
        Scalar; 0 when nothing is hidden.
    """
    channels, inside = (
        target.shape[1],
        target.new_ones(1, 1, *target.shape[2:]).expand(len(target), -1, -1, -1),
    )
    difference = (
        reconstruction.to(target.dtype) - cut_patches(target, grid, size, repainted)
    ).abs()
    counted = cut_patches(inside, grid, size, repainted) * masked.gather(1, repainted)[..., None]
    total = (difference.unflatten(2, (channels, -1)) * counted[:, :, None]).sum()
    return total / (counted.sum() + 1e-5) / channels
