"""Progressive masked image modelling, a loss of the search that keeps features rich.

A growing fraction of the patches is hidden (arXiv:2403.15835): a mask token takes their place, and
a one-layer decoder repaints them from the final tokens. Only hidden patches count, so only those
have to be painted. It is used while a supernet is trained, and `compress` drops it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW_AT_PATCH_16 = 47


def window_for_patch(patch_size: int) -> int:
    """Return the side of the normalisation window in pixels, an odd number.

    It is 47 for 16-pixel patches, as published, and in proportion for others.
    """
    window = WINDOW_AT_PATCH_16 * patch_size / 16
    to_each_side = round((window - 1) / 2)
    return max(3, 2 * to_each_side + 1)


@torch.no_grad()
def normalize_target(pixels: Tensor, window: int) -> Tensor:
    """Standardise every pixel by the mean and variance of the window around it.

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
        height, width = pixels.shape[-2:]
        rows = _window_sum(height, window, pixels)  # (H, H)
        columns = _window_sum(width, window, pixels)  # (W, W)
        inside_rows = rows.sum(1, keepdim=True)  # (H, 1)
        inside_columns = columns.sum(0)  # (W,)
        count = inside_rows * inside_columns  # (H, W), pixels in the window of every pixel
        rows = rows / inside_rows
        columns = columns / inside_columns
        mean = rows @ pixels @ columns  # (B, C, H, W)
        variance = rows @ pixels.square() @ columns
        # In place: new memory for a picture of every step takes longer than the arithmetic.
        variance.addcmul_(mean, mean, value=-1)
        unbiased = count / (count - 1).clamp(min=1)  # (H, W)
        variance.mul_(unbiased)
        variance.clamp_(min=0)
        deviation = variance.add_(1e-6).sqrt_()
        return pixels.sub_(mean).div_(deviation)


def _window_sum(length: int, window: int, like: Tensor) -> Tensor:
    """Return the matrix (length, length) that adds up the entries within a window around each one.

    It is symmetric. Products with it are many times faster than pooling along one axis.
    """
    position = torch.arange(length, device=like.device)
    distance = (position[:, None] - position).abs()  # (length, length)
    return (distance <= window // 2).to(like.dtype)


def refine_mask(
    masked: Tensor, grid: tuple[int, int], finer: tuple[int, int], factor: int
) -> Tensor:
    """Return the same hidden regions on a finer grid.

    A network that merges patches is masked in units of its final tokens, as SimMIM does
    (arXiv:2111.09886): the neighbours of a single small patch would give it away.

    Args:
        masked: (B, N) bool over the rows and columns of `grid`.
        grid: rows and columns of `masked`.
        finer: rows and columns of the finer grid.
        factor: patches of the finer grid along each side of one of `grid`, which may reach beyond
            its border.

    Returns:
        (B, M) bool over `finer`.
    """
    rows, columns = finer
    coarse = masked.unflatten(1, grid)  # (B, N) -> (B, R, C)
    # (B, R, C) -> (B, R * factor, C * factor)
    fine = coarse.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return fine[:, :rows, :columns].flatten(1)


def mask_patches(
    batch_size: int, num_patches: int, keep_ratio: float, generator: torch.Generator
) -> Tensor:
    """Hide a random set of patches of every image.

    Args:
        batch_size: B.
        num_patches: N.
        keep_ratio: fraction of patches left visible, in [0, 1]; `int(num_patches * keep_ratio)` of
            them stay.
        generator: on the CPU; seed it from step and rank, so that a resumed run hides the same
            patches.

    Returns:
        (B, N) bool on the CPU, True = hidden (`bool_masked_pos` of transformers).

    Raises:
        ValueError: for a ratio outside [0, 1].
    """
    if not 0 <= keep_ratio <= 1:
        raise ValueError(
            f"keep_ratio is {keep_ratio}; it is a fraction of the patches between 0 and 1."
        )
    noise = torch.rand(batch_size, num_patches, generator=generator)
    order = noise.argsort(dim=1)  # (B, N)
    rank = order.argsort(dim=1)  # (B, N), the inverse permutation
    visible = int(num_patches * keep_ratio)
    return rank >= visible


def hidden_first(masked: Tensor, count: int) -> Tensor:
    """Return which patches to repaint: all hidden ones, then visible ones up to `count`.

    Args:
        masked: (B, N) bool, at most `count` hidden in an image.
        count: K, the same in every step, so that shapes do not change.

    Returns:
        (B, K) indices of patches.
    """
    # Stable: visible patches follow in their order.
    order = masked.byte().argsort(dim=1, descending=True, stable=True)  # (B, N)
    return order[:, :count]


class PMIMDecoder(nn.Module):
    """Repaint patches from final tokens: a 1x1 convolution to stride^2 * channels.

    Args:
        hidden_size: C, width of the tokens (shrinks with the network).
        stride: pixels per token along a side.
        num_channels: colour channels of the image.
    """

    def __init__(self, hidden_size: int, stride: int, num_channels: int = 3):
        super().__init__()
        self.projection = nn.Conv2d(hidden_size, stride**2 * num_channels, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return pixels (B, K, channels * stride^2) of the patches of tokens (B, K, C).

        They are in the order of `cut_patches`.
        """
        # A 1x1 convolution is a linear layer, and tokens are in the order for one; on CPUs that is
        # faster.
        weight = self.projection.weight.flatten(1)  # (out, C, 1, 1) -> (out, C)
        return F.linear(tokens, weight, self.projection.bias)


def cut_patches(images: Tensor, grid: tuple[int, int], size: int, chosen: Tensor) -> Tensor:
    """Return the pixels of some patches.

    Args:
        images: (B, C, H, W). A border that no patch covers is left out; patches that reach beyond
            it have zeros there.
        grid: rows and columns of patches.
        size: side of a patch in pixels.
        chosen: (B, K) indices of patches, row by row.

    Returns:
        (B, K, C * size * size), channel by channel.
    """
    rows, columns = grid
    height, width = images.shape[-2:]
    below = size * rows - height
    right = size * columns - width
    if below or right:
        images = F.pad(images, (0, right, 0, below))  # negative padding cuts off
    # (B, C, H, W) -> (B, C, rows, size, columns, size)
    patches = images.unflatten(3, (columns, size)).unflatten(2, (rows, size))
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, size, size)
    every_image = torch.arange(len(images), device=images.device)
    row = chosen // columns  # (B, K)
    column = chosen % columns  # (B, K)
    found = patches[every_image[:, None], row, column]  # (B, K, C, size, size)
    return found.flatten(2)


def reconstruction_loss(
    reconstruction: Tensor,
    target: Tensor,
    masked: Tensor,
    grid: tuple[int, int],
    size: int,
    repainted: Tensor,
) -> Tensor:
    """Return the mean absolute error over the pixels of the hidden patches.

    Args:
        reconstruction: (B, K, C * size * size), what the decoder makes of the tokens of
            `repainted`.
        target: (B, C, H, W); a border that no patch covers, and what is painted beyond the image,
            are left out.
        masked: (B, N) bool, True = hidden, for the N = rows * columns patches of `grid`.
        grid: rows and columns of patches.
        size: side of a patch in pixels.
        repainted: (B, K) indices of patches, all hidden ones among them.

    Returns:
        Scalar; 0 when no patch is hidden.
    """
    channels = target.shape[1]
    wanted = cut_patches(target, grid, size, repainted)  # (B, K, C * size^2)
    painted = reconstruction.to(target.dtype)
    difference = (painted - wanted).abs()
    # 1 for pixels of the image, 0 for padding.
    ones = target.new_ones(1, 1, *target.shape[2:])
    ones = ones.expand(len(target), -1, -1, -1)  # (B, 1, H, W)
    inside = cut_patches(ones, grid, size, repainted)  # (B, K, size^2)
    is_hidden = masked.gather(1, repainted)  # (B, K)
    counted = inside * is_hidden[..., None]
    # (B, K, C * size^2) -> (B, K, C, size^2), against (B, K, 1, size^2)
    errors = difference.unflatten(2, (channels, -1)) * counted[:, :, None]
    return errors.sum() / (counted.sum() + 1e-5) / channels
