"""Masked images through a supernet: what is hidden is not seen, and every token repaints the pixels
it stands for."""

import copy
from typing import Any

import pytest
import torch
from factories import randomize_masks_, search_config, tiny_images, tiny_model, tiny_supernet
from invariants import assert_close, images_for, masked_patches, open_masks_
from torch import Tensor, nn
from torch.nn import functional as F

from ofb_hf import install_bi_masks
from ofb_hf.search.pmim import (
    cut_patches,
    mask_patches,
    normalize_target,
    reconstruction_loss,
    refine_mask,
)
from ofb_hf.search.supernet import Supernet

# A ViT ignores the pixels that no patch covers, a Swin pads: its grids of 9, and of 9 x 7, are odd.
SIZES = [
    ("vit", 16),
    ("vit", [16, 24]),
    ("vit", 18),
    ("swin", 16),
    ("swin", 18),
    ("swin", 17),
    ("swin", [18, 14]),
]
every_size = pytest.mark.parametrize(("family", "image_size"), SIZES, ids=str)


def supernet_for(family: str, **overrides: Any) -> Supernet:
    """A supernet of a tiny model with these config fields, random masks and mask token."""
    dense = tiny_model(family, dtype=torch.float64, **overrides)
    supernet = install_bi_masks(dense, search_config(family)).double()
    randomize_masks_(supernet)
    return supernet


def picture_of(supernet: Supernet, images: Tensor, hidden: Tensor) -> Tensor:
    """What all final tokens paint, as a picture (B, channels, height, width)."""
    patches, architecture = (
        supernet(images, bool_masked_pos=hidden).reconstruction,
        supernet.architecture,
    )
    return F.pixel_shuffle(
        patches.mT.unflatten(2, architecture.token_grid), architecture.token_size
    )


def paint_(images: Tensor, patch: int, columns: int, size: int) -> Tensor:
    """Other pixels in one patch of a grid with this number of columns."""
    row, column = (size * index for index in divmod(patch, columns))
    images = images.clone()
    images[..., row : row + size, column : column + size] += 1
    return images


@every_size
def test_hidden_patches_are_not_seen_and_all_others_are(family, image_size):
    supernet = supernet_for(family, image_size=image_size)
    architecture, images = supernet.architecture, images_for(supernet, 1)
    hidden = masked_patches(supernet, 1)
    expected = supernet(images, bool_masked_pos=hidden)
    for patch in range(0, hidden.numel(), 3):
        other = paint_(images, patch, architecture.patch_grid[1], architecture.patch_size)
        output = supernet(other, bool_masked_pos=hidden)
        assert torch.equal(output.logits, expected.logits) == hidden[0, patch]
        assert torch.equal(output.reconstruction, expected.reconstruction) == hidden[0, patch]


@every_size
def test_the_picture_covers_the_image_by_whole_tokens(family, image_size):
    """Swin's picture reaches over the border by less than a token; a ViT's falls short of what no
    patch covers."""
    supernet = supernet_for(family, image_size=image_size)
    images, stride = images_for(supernet), supernet.architecture.token_size
    picture = picture_of(supernet, images, masked_patches(supernet))
    assert picture.shape[:2] == images.shape[:2]
    for painted, pixels in zip(picture.shape[2:], images.shape[2:], strict=True):
        assert painted % stride == 0
        assert 0 <= (painted - pixels if family == "swin" else pixels - painted) < stride


@torch.no_grad()
def stop_mixing_(model: nn.Module) -> None:
    """Blocks that add nothing to the residual stream: every token stays where it is."""
    for name, parameter in model.named_parameters():
        if ".o_proj." in name or ".fc2." in name:
            parameter.zero_()


@every_size
def test_every_token_repaints_the_pixels_it_was_made_of(family, image_size):
    supernet = supernet_for(family, image_size=image_size)
    stop_mixing_(supernet.model)
    architecture, images = supernet.architecture, images_for(supernet, 1)
    nothing = torch.zeros_like(masked_patches(supernet, 1))
    picture, stride = picture_of(supernet, images, nothing), architecture.token_size
    rows, columns = architecture.token_grid
    for token in (0, columns - 1, columns, (rows - 1) * columns, rows * columns - 1):
        # The first pixel of a token lies in the image, whatever reaches over its border.
        other = images.clone()
        row, column = (stride * index for index in divmod(token, columns))
        other[..., row, column] += 1
        changed = (picture_of(supernet, other, nothing) != picture).any(1)[0]
        assert changed[row : row + stride, column : column + stride].all()
        assert changed.sum() == stride**2


@every_size
def test_the_loss_counts_the_pixels_of_hidden_patches_and_no_others(family, image_size):
    """Hidden in units of final tokens, as a search does it."""
    supernet = supernet_for(family, image_size=image_size)
    architecture, images = supernet.architecture, images_for(supernet)
    (rows, columns), patch = architecture.token_grid, architecture.patch_size
    tokens = mask_patches(2, rows * columns, 0.7, torch.Generator().manual_seed(1))
    patches = refine_mask(
        tokens, (rows, columns), architecture.patch_grid, architecture.token_size // patch
    )
    picture = picture_of(supernet, images, patches)
    picture.retain_grad()
    target, size = normalize_target(images, supernet.pmim_window), architecture.token_size
    every = torch.arange(rows * columns).expand(2, -1)
    loss = reconstruction_loss(
        cut_patches(picture, (rows, columns), size, every),
        target,
        tokens,
        (rows, columns),
        size,
        every,
    )
    loss.backward()
    assert loss.isfinite()
    counted = torch.zeros(2, *picture.shape[2:], dtype=torch.bool)
    for image, index in patches.nonzero().tolist():
        row, column = (patch * position for position in divmod(index, architecture.patch_grid[1]))
        counted[image, row : row + patch, column : column + patch] = True
    counted[:, images.shape[2] :], counted[:, :, images.shape[3] :] = False, False
    assert counted.any()
    assert not counted.all()
    assert torch.equal((picture.grad != 0).all(1), counted)
    assert torch.equal((picture.grad != 0).any(1), counted)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("vit", {}), ("swin", {}), ("swin", {"use_absolute_embeddings": True})],
    ids=str,
)
def test_all_that_enters_the_residual_stream_is_scaled_by_the_mask(family, overrides):
    """Visible patches, the token in the place of hidden ones, positions and the class token."""
    supernet = supernet_for(family, **overrides)
    opened, mask = copy.deepcopy(supernet), supernet.named_masks[supernet.architecture.first_width]
    open_masks_(opened)
    scaled, entering = first_hidden_state(supernet), first_hidden_state(opened)
    assert_close(scaled, entering * mask.prunability(supernet.lam))
    mask.settle_(13)
    assert (first_hidden_state(supernet)[..., ~mask.alive] == 0).all()
    assert (entering != 0).all()


def first_hidden_state(supernet: Supernet) -> Tensor:
    """What the embeddings give for images with hidden patches: (B, N, C)."""
    captured = []
    owner, _, _ = supernet.architecture.mask_token.rpartition(".")
    embeddings = supernet.model.get_submodule(owner)
    hook = embeddings.register_forward_hook(lambda module, args, output: captured.append(output))
    supernet(images_for(supernet), bool_masked_pos=masked_patches(supernet))
    hook.remove()
    return captured[0][0] if isinstance(captured[0], tuple) else captured[0]


@every_size
def test_tokens_that_are_not_asked_for_are_not_painted_and_the_others_as_ever(family, image_size):
    supernet = supernet_for(family, image_size=image_size)
    images, hidden = images_for(supernet), masked_patches(supernet)
    every = supernet(images, bool_masked_pos=hidden).reconstruction
    repainted = torch.stack([torch.randperm(every.shape[1])[:3] for _ in images])
    some = supernet(images, bool_masked_pos=hidden, repainted=repainted).reconstruction
    assert_close(
        some,
        torch.stack([of_image[chosen] for of_image, chosen in zip(every, repainted, strict=True)]),
    )


def test_images_of_another_size_are_refused_in_words_when_they_are_to_be_repainted():
    supernet = tiny_supernet(family="swin")
    with pytest.raises(ValueError, match="24 x 24 pixels, but the config's image_size is 16 x 16"):
        supernet(tiny_images(size=24), bool_masked_pos=torch.zeros(2, 144, dtype=torch.bool))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_arguments_that_masked_images_would_lose_are_refused(family):
    supernet = supernet_for(family)
    for lost in ({"labels": torch.tensor([0, 1])}, {"output_hidden_states": True}):
        with pytest.raises(
            ValueError, match=f"{next(iter(lost))}.* are given with bool_masked_pos"
        ):
            supernet(images_for(supernet), bool_masked_pos=masked_patches(supernet), **lost)
