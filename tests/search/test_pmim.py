"""Masked image modelling: the separable normalisation equals the naive one, and only hidden patches
count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ofb_hf.search.pmim import (
    PMIMDecoder,
    cut_patches,
    hidden_first,
    mask_patches,
    normalize_target,
    reconstruction_loss,
    refine_mask,
    window_for_patch,
)


def naive_target(pixels: torch.Tensor, window: int) -> torch.Tensor:
    """Every pixel standardised by the unbiased variance of the pixels in its window, one window at
    a time."""
    half, (height, width) = window // 2, pixels.shape[-2:]
    target = torch.empty_like(pixels)
    for row in range(height):
        for column in range(width):
            rows, columns = (
                slice(max(0, row - half), row + half + 1),
                slice(max(0, column - half), column + half + 1),
            )
            patch = pixels[..., rows, columns].flatten(-2)
            variance = patch.var(-1, correction=1 if patch.shape[-1] > 1 else 0)
            target[..., row, column] = (pixels[..., row, column] - patch.mean(-1)) / (
                variance + 1e-6
            ).sqrt()
    return target


@pytest.mark.parametrize(
    ("height", "width", "window"), [(9, 13, 3), (9, 13, 5), (7, 6, 11), (5, 8, 47), (4, 3, 1)]
)
def test_normalized_target_equals_the_naive_one(height, width, window):
    pixels = 2 * torch.randn(2, 3, height, width, dtype=torch.float64) + 5
    torch.testing.assert_close(
        normalize_target(pixels, window), naive_target(pixels, window), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("window", [3, 11, 47])
def test_brightness_and_contrast_do_not_matter(window):
    pixels = torch.randn(2, 3, 20, 24)
    target = normalize_target(pixels, window)
    torch.testing.assert_close(
        normalize_target(50 * pixels + 1000, window), target, atol=2e-2, rtol=2e-2
    )
    assert (normalize_target(torch.full_like(pixels, 300.0), window).abs() < 1e-3).all()


def test_noise_comes_out_standardised():
    target = normalize_target(3 * torch.randn(1, 3, 64, 64) - 7, 47)
    assert target.mean().abs() < 0.02
    assert target.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_normalization_is_done_in_at_least_float32(dtype):
    target = normalize_target(torch.randn(1, 3, 8, 8).to(dtype), 5)
    assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert target.isfinite().all()


@pytest.mark.parametrize("window", [0, -1, 2, 46])
def test_a_window_without_a_centre_is_refused(window):
    with pytest.raises(ValueError, match=f"window is {window}"):
        normalize_target(torch.zeros(1, 3, 8, 8), window)


def test_the_window_grows_with_the_patch():
    windows = {patch: window_for_patch(patch) for patch in range(1, 65)}
    assert windows[16] == 47
    assert windows[4] == 11
    for patch, window in windows.items():
        assert window % 2 == 1
        assert window == 3 if patch == 1 else abs(window - 47 * patch / 16) <= 1


@given(st.integers(1, 200), st.floats(0, 1), st.integers(1, 4), st.integers(0, 2**31))
def test_the_kept_share_is_rounded_down_in_every_image(patches, keep, images, seed):
    masked = mask_patches(images, patches, keep, torch.Generator().manual_seed(seed))
    assert masked.shape == (images, patches)
    assert masked.dtype == torch.bool
    assert (~masked).sum(1).tolist() == [int(patches * keep)] * images


def test_patches_are_hidden_at_random_but_repeatably():
    draw = [mask_patches(64, 49, 0.75, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert len({tuple(row.tolist()) for row in draw[0]}) == 64
    assert (draw[0].float().mean(0) - 13 / 49).abs().max() < 0.25


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_a_keep_ratio_that_is_no_share_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep_ratio is {keep}"):
        mask_patches(1, 4, keep, torch.Generator())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.data())
def test_a_refined_mask_hides_the_same_regions(rows, columns, factor, data):
    """Every fine cell is hidden if the coarse cell that covers it is; coarse cells may reach beyond
    the fine grid."""
    finer = tuple(factor * side - data.draw(st.integers(0, factor - 1)) for side in (rows, columns))
    masked = torch.rand(2, rows * columns) < 0.5
    refined = refine_mask(masked, (rows, columns), finer, factor)
    assert refined.shape == (2, finer[0] * finer[1])
    assert refined.dtype == torch.bool
    expected = [
        masked[:, (row // factor) * columns + column // factor]
        for row in range(finer[0])
        for column in range(finer[1])
    ]
    assert torch.equal(refined, torch.stack(expected, 1))


def test_a_refined_mask_at_a_ragged_border():
    """3 x 5 cells under 2 x 3 cells of two by two: the last row and column are half as large."""
    coarse = torch.tensor([[True, False, True, False, False, True]])
    fine = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert (
        refine_mask(coarse, (2, 3), (3, 5), 2).view(3, 5).tolist()
        == torch.tensor(fine).bool().tolist()
    )


def test_a_mask_that_needs_no_refinement_stays_as_it_is():
    masked = torch.rand(3, 12) < 0.5
    assert torch.equal(refine_mask(masked, (3, 4), (3, 4), 1), masked)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_cut_patches_are_the_pixels_of_the_patches_that_were_asked_for(rows, columns, size, data):
    """Whether the grid covers the image, falls short of its border or reaches beyond it."""
    beyond = [data.draw(st.integers(1 - size, 2)) for _ in range(2)]
    sides = [side * size + more for side, more in zip((rows, columns), beyond, strict=True)]
    images = 1 + torch.rand(2, 3, *sides)
    chosen = torch.randint(rows * columns, (2, 5))
    cut = cut_patches(images, (rows, columns), size, chosen)
    padded = torch.zeros(2, 3, max(sides[0], rows * size), max(sides[1], columns * size))
    padded[..., : sides[0], : sides[1]] = images
    for image, of_image, patches in zip(padded, chosen.tolist(), cut, strict=True):
        for patch, pixels in zip(of_image, patches, strict=True):
            row, column = (size * index for index in divmod(patch, columns))
            assert torch.equal(
                pixels.view(3, size, size), image[:, row : row + size, column : column + size]
            )


def test_hidden_patches_come_first_among_those_that_are_repainted():
    masked = mask_patches(5, 12, 0.75, torch.Generator().manual_seed(0))
    repainted = hidden_first(masked, 4)
    assert repainted.shape == (5, 4)
    assert all(len(set(row)) == 4 for row in repainted.tolist())
    assert (masked.gather(1, repainted) == torch.tensor([True, True, True, False])).all()
    assert hidden_first(masked, 0).shape == (5, 0)


def test_the_decoder_paints_a_token_as_its_patch_would_be_cut():
    """Like a 1x1 convolution whose channels a pixel shuffle spreads out (arXiv:2403.15835)."""
    decoder, tokens = PMIMDecoder(hidden_size=5, stride=4, num_channels=2), torch.randn(1, 6, 5)
    picture = F.pixel_shuffle(decoder.projection(tokens.mT.unflatten(2, (2, 3))), 4)
    chosen = torch.tensor([[4, 0, 5]])
    torch.testing.assert_close(
        decoder(tokens[:, chosen[0]]), cut_patches(picture, (2, 3), 4, chosen)
    )


@pytest.mark.parametrize(("hidden", "params"), [(384, 295_680), (768, 590_592)])
def test_the_decoder_has_the_published_size(hidden, params):
    assert sum(parameter.numel() for parameter in PMIMDecoder(hidden, 16).parameters()) == params


def loss_of(picture, target, masked, grid, count=None):
    """The loss of a painted picture with patches of 4 pixels, of which `count` are looked at."""
    repainted = hidden_first(masked, masked.shape[1] if count is None else count)
    return reconstruction_loss(
        cut_patches(picture, grid, 4, repainted), target, masked, grid, 4, repainted
    )


@pytest.mark.parametrize("count", [2, 3, 6])
def test_reconstruction_loss_sees_hidden_patches_only(count):
    target, picture = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12)
    masked = torch.tensor(
        [[True, False, False, False, False, True], [False, True, False, False, False, False]]
    )
    errors = (picture - target).abs().mean(1)
    hidden = [errors[0, :4, :4], errors[0, 4:, 8:], errors[1, :4, 4:8]]
    loss = loss_of(picture, target, masked, (2, 3), count)
    assert loss.item() == pytest.approx(torch.stack(hidden).mean().item(), rel=1e-5)
    picture[0, :, :4, 4:8] += 100  # visible
    assert loss_of(picture, target, masked, (2, 3), count).item() == pytest.approx(loss.item())


def test_reconstruction_beyond_the_image_does_not_count():
    """6 x 9 pixels under 2 x 3 patches of 4: what is painted on padding is left out, of hidden
    patches too."""
    target, picture = torch.randn(2, 3, 6, 9), torch.randn(2, 3, 8, 12)
    masked = torch.tensor(
        [[True, False, False, False, True, True], [False, False, True, False, False, False]]
    )
    errors = (picture[..., :6, :9] - target).abs().mean(1)
    hidden = [errors[0, :4, :4], errors[0, 4:, 4:8], errors[0, 4:, 8:], errors[1, :4, 8:]]
    expected = torch.cat([region.flatten() for region in hidden]).mean().item()
    assert loss_of(picture, target, masked, (2, 3)).item() == pytest.approx(expected, rel=1e-5)
    picture[..., 6:, :] = picture[..., 9:] = 1e6
    assert loss_of(picture, target, masked, (2, 3)).item() == pytest.approx(expected, rel=1e-5)


def test_pixels_that_no_patch_covers_do_not_count():
    """9 x 6 pixels over 2 x 1 patches of 4: a border of one and two pixels is never painted."""
    target, picture = torch.randn(1, 3, 9, 6), torch.randn(1, 3, 8, 4)
    expected = (picture[:, :, 4:] - target[:, :, 4:8, :4]).abs().mean().item()
    masked = torch.tensor([[False, True]])
    assert loss_of(picture, target, masked, (2, 1)).item() == pytest.approx(expected, rel=1e-5)
    target[..., 8:, :] = target[..., 4:] = 1e6
    assert loss_of(picture, target, masked, (2, 1)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_reconstruction_loss_without_hidden_patches_is_zero_and_differentiable(count):
    picture = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = loss_of(
        picture, torch.randn(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.bool), (2, 2), count
    )
    loss.backward()
    assert loss.item() == 0
    assert (picture.grad == 0).all()


def test_reconstruction_loss_of_half_precision_is_taken_in_the_targets_precision():
    picture = torch.randn(1, 3, 8, 8).bfloat16().requires_grad_()
    loss = loss_of(picture, torch.randn(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.bool), (2, 2))
    loss.backward()
    assert loss.dtype == torch.float32
    assert picture.grad.isfinite().all()
