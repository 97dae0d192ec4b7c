"""Progressive masked image modelling (arXiv:2403.15835): a search-time loss that keeps the features rich.

The growing share of hidden patches is replaced by a mask token; a one-layer decoder repaints them from the final
tokens. Only the hidden pixels count. Used while training a supernet, thrown away by `compress`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW_AT_PATCH_16 = 47


def window_for_patch(patch_size: int) -> int:
    """Side of the normalisation window: 47 pixels for 16-pixel patches, scaled to the nearest odd size otherwise."""
    return max(3, 2 * round((WINDOW_AT_PATCH_16 * patch_size / 16 - 1) / 2) + 1)


@torch.no_grad()
def normalize_target(pixels: Tensor, window: int) -> Tensor:
    """Standardises every pixel by the mean and variance of the window around it.

    A window is cut at the image's border and only pixels inside count. Averages are separable: a product with a band
    matrix for each axis (the published 47 x 47 pooling costs more than the network).

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
        # E[x^2] - E[x]^2 cancels badly for bright flat images; the overall mean has no effect on the result.
        pixels = pixels - pixels.mean((-2, -1), keepdim=True)
        rows, columns = (_window_sum(side, window, pixels) for side in pixels.shape[-2:])
        inside_rows, inside_columns = rows.sum(1, keepdim=True), columns.sum(0)
        count = inside_rows * inside_columns  # pixels in the window of every pixel
        rows, columns = rows / inside_rows, columns / inside_columns
        mean, variance = rows @ pixels @ columns, rows @ pixels.square() @ columns
        # In place: new memory for a picture of every step takes longer than the arithmetic.
        variance.addcmul_(mean, mean, value=-1).mul_(count / (count - 1).clamp(min=1)).clamp_(min=0).add_(1e-6).sqrt_()
        return pixels.sub_(mean).div_(variance)


def _window_sum(length: int, window: int, like: Tensor) -> Tensor:
    """The matrix (length, length) that adds up the entries within a window around each one. It is symmetric.

    Products with it are many times faster than pooling along one axis.
    """
    position = torch.arange(length, device=like.device)
    return ((position[:, None] - position).abs() <= window // 2).to(like.dtype)


def refine_mask(masked: Tensor, grid: tuple[int, int], finer: tuple[int, int], factor: int) -> Tensor:
    """The same hidden regions on a finer grid.

    A network that merges patches is masked in units of its final tokens, as SimMIM does (arXiv:2111.09886): the
    neighbours of a single small patch would give it away.

    Args:
        masked: (B, N) bool over `grid` (rows, columns).
        finer: the other grid, each cell of `grid` covering `factor` x `factor` of its cells; cells of `grid` may reach
            beyond its border.

    Returns:
        (B, M) bool over `finer`.
    """
    masked = masked.unflatten(1, grid).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return masked[:, : finer[0], : finer[1]].flatten(1)


def mask_patches(batch_size: int, num_patches: int, keep_ratio: float, generator: torch.Generator) -> Tensor:
    """Hides a random set of patches of every image.

    Args:
        keep_ratio: share of patches left visible, in [0, 1]; `int(num_patches * keep_ratio)` of them stay.
        generator: on the CPU; seed it from step and rank, so that a resumed run hides the same patches.

    Returns:
        (B, N) bool on the CPU, True = hidden (`bool_masked_pos` of transformers).
    """
    if not 0 <= keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; it is a share of patches between 0 and 1.")
    noise = torch.rand(batch_size, num_patches, generator=generator)
    rank = noise.argsort(dim=1).argsort(dim=1)
    return rank >= int(num_patches * keep_ratio)


class PMIMDecoder(nn.Module):
    """Repaints an image from its final tokens: a 1x1 convolution to stride^2 * channels, then a pixel shuffle.

    Args:
        hidden_size: C, width of the tokens (shrinks with the network).
        stride: pixels per token along a side.
        num_channels: colour channels of the image.
    """

    def __init__(self, hidden_size: int, stride: int, num_channels: int = 3):
        super().__init__()
        self.stride = stride
        self.projection = nn.Conv2d(hidden_size, stride**2 * num_channels, kernel_size=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, N, C), N = rows * columns of `grid` -> image (B, channels, rows * stride, columns * stride).

        Raises:
            ValueError: for another number of tokens, as images of another size than the config's give.
        """
        if tokens.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"the network gave {tokens.shape[1]} tokens, but its config's image_size makes {grid[0]} x {grid[1]}; "
                "masked image modelling needs images of that size."
            )
        # A 1x1 convolution is a linear layer, and tokens are in order for one; on CPUs that is faster.
        pixels = F.linear(tokens, self.projection.weight.flatten(1), self.projection.bias)
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, grid), self.stride)


def reconstruction_loss(reconstruction: Tensor, target: Tensor, masked_patches: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over the pixels of the hidden patches.

    Args:
        reconstruction: (B, C, H, W), as large as all patches together.
        target: (B, C, H', W'); a border that no patch covers, and one that no pixel covers, are left out.
        masked_patches: (B, N) bool, True = hidden, N = (H // patch_size) * (W // patch_size).

    Returns:
        Scalar; 0 when nothing is hidden.
    """
    height, width = (min(sides) for sides in zip(reconstruction.shape[-2:], target.shape[-2:], strict=True))
    grid, pixels = tuple(side // patch_size for side in reconstruction.shape[-2:]), (height, width)
    hidden = refine_mask(masked_patches, grid, pixels, patch_size).unflatten(1, pixels)[:, None].to(target.dtype)
    reconstruction, target = reconstruction[..., :height, :width], target[..., :height, :width]
    difference = (reconstruction.to(target.dtype) - target).abs() * hidden
    return difference.sum() / (hidden.sum() + 1e-5) / target.shape[1]
