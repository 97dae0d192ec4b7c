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


def normalize_target(pixels: Tensor, window: int) -> Tensor:
    """Standardises every pixel by the mean and variance of the window around it.

    A window is cut at the image's border and only pixels inside count. The two averages are separable, which
    replaces window^2 additions per pixel by 2 * window (the published 47 x 47 pooling costs more than the network).

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
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    # E[x^2] - E[x]^2 cancels badly for bright flat images; the overall mean has no effect on the result.
    pixels = pixels - pixels.mean((-2, -1), keepdim=True)

    def window_mean(x: Tensor) -> Tensor:
        for kernel in ((window, 1), (1, window)):
            x = F.avg_pool2d(x, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
        return x

    def pixels_inside(length: int) -> Tensor:
        position = torch.arange(length, device=pixels.device)
        half = window // 2
        return torch.clamp(position + half, max=length - 1) - torch.clamp(position - half, min=0) + 1

    count = (pixels_inside(pixels.shape[-2])[:, None] * pixels_inside(pixels.shape[-1])[None, :]).to(pixels.dtype)
    mean = window_mean(pixels)
    variance = (window_mean(pixels.square()) - mean.square()) * (count / (count - 1).clamp(min=1))
    return (pixels - mean) / torch.sqrt(variance.clamp(min=0) + 1e-6)


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
    """Repaints an image from its patch tokens: a 1x1 convolution to stride^2 * channels, then a pixel shuffle.

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
        """tokens (B, N, C), N = rows * columns of `grid` -> image (B, channels, rows * stride, columns * stride)."""
        features = tokens.transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(self.projection(features), self.stride)


def reconstruction_loss(reconstruction: Tensor, target: Tensor, masked_patches: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over the pixels of the hidden patches.

    Args:
        reconstruction: (B, C, H, W), as large as all patches together.
        target: (B, C, H', W'); a border that no patch covers is left out.
        masked_patches: (B, N) bool, True = hidden, N = (H // patch_size) * (W // patch_size).

    Returns:
        Scalar; 0 when nothing is hidden.
    """
    target = target[..., : reconstruction.shape[-2], : reconstruction.shape[-1]]
    grid = (target.shape[-2] // patch_size, target.shape[-1] // patch_size)
    hidden = masked_patches.unflatten(1, grid)[:, None].to(target.dtype)
    hidden = hidden.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    difference = (reconstruction.to(target.dtype) - target).abs() * hidden
    return difference.sum() / (hidden.sum() + 1e-5) / target.shape[1]
