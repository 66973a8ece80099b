"""Mask losses: equal to a loop over matched masks, in every type; images without masks; errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.losses import mask_losses
from detr_fast.structures import Targets


def batch(sizes: tuple[tuple[int, int, int], ...]) -> tuple[Tensor, Targets]:
    """Masks of 6 queries and annotated masks ``(objects, height, width)`` of each image."""
    generator = torch.Generator().manual_seed(0)
    masks = 4 * torch.randn(len(sizes), 6, 5, 7, dtype=torch.float64, generator=generator)
    targets = [
        {
            "labels": torch.zeros(count, dtype=torch.int64),
            "boxes": torch.full((count, 4), 0.5),
            "masks": torch.rand(count, height, width, generator=generator) > 0.6,
        }
        for count, height, width in sizes
    ]
    return masks, Targets.pack(targets)


def one_by_one(masks: Tensor, query_of_target: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    assert targets.masks is not None
    size = max(m.shape[1] for m in targets.masks), max(m.shape[2] for m in targets.masks)
    focal, dice, row = masks.new_zeros(()), masks.new_zeros(()), 0
    for image, annotated in enumerate(targets.masks):
        for mask in annotated:
            query, row = int(query_of_target[row]), row + 1
            if query < 0:
                continue
            logits = F.interpolate(masks[image, query][None, None], size, mode="bilinear", align_corners=False)[0, 0]
            goal = masks.new_zeros(size)
            goal[: mask.shape[0], : mask.shape[1]] = mask.to(masks)
            p = logits.sigmoid()
            agreement = torch.where(goal > 0, p, 1 - p)
            weight = torch.where(goal > 0, 0.25, 0.75)
            cross_entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
            focal = focal + (weight * (1 - agreement) ** 2 * cross_entropy).mean()
            dice = dice + 1 - (2 * (p * goal).sum() + 1) / (p.sum() + goal.sum() + 1)
    return focal, dice


QUERIES = torch.tensor([3, -1, 0, 5, 2], dtype=torch.int32)
SIZES = ((2, 8, 10), (0, 3, 3), (3, 12, 6))


def test_equal_to_a_loop_with_gradient() -> None:
    masks, targets = batch(SIZES)
    masks.requires_grad_()
    ours = mask_losses(masks, QUERIES, targets, torch.tensor(2.0, dtype=torch.float64))
    theirs = one_by_one(masks, QUERIES, targets)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected / 2, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(x, masks, retain_graph=True)[0] for x in (mine, expected / 2)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    masks = torch.randn(1, 2, 200, 275, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    large = [{"labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5), "masks": torch.ones(1, 800, 1100) > 0}]
    losses = mask_losses(masks, torch.tensor([1], dtype=torch.int32), Targets.pack(large), torch.tensor(1.0))
    exact = one_by_one(masks.detach().double(), torch.tensor([1]), Targets.pack(large))
    for loss, expected in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        assert abs(loss.item() / expected.item() - 1) < 100 * torch.finfo(torch.float32).eps
    sum(losses).backward()
    assert masks.grad is not None
    assert masks.grad.isfinite().all()


def test_no_objects_at_all() -> None:
    masks, targets = batch(((0, 4, 4), (0, 4, 4)))
    masks[0, 0, 0, 0] = torch.inf
    masks.requires_grad_()
    losses = mask_losses(masks, QUERIES[:0], targets, torch.tensor(1.0))
    sum(losses).backward()
    assert losses[0] == losses[1] == 0
    assert (masks.grad == 0).all()


def test_masks_must_be_there() -> None:
    masks, _ = batch(SIZES)
    plain = Targets.pack([{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}])
    with pytest.raises(ValueError, match="targets must have masks, got None"):
        mask_losses(masks, QUERIES, plain, torch.tensor(1.0))
    both = [{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)} for _ in range(2)]
    both[0]["masks"] = torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match="image 1 of the batch: 'masks' is missing"):
        Targets.pack(both)
    both[1]["masks"] = torch.ones(3, 4, 4)
    with pytest.raises(ValueError, match=r"image 1 of the batch: masks must be \[1, height, width\].* got \[3, 4, 4\]"):
        Targets.pack(both)
