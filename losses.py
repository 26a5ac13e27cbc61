"""The three losses. Detection is a hand-written YOLO-style loss; here is one box of it in numbers.

A dog stands at xyxy = (40, 60, 104, 124) of a 256×256 image: centre (72, 92), size 64×64. Its longer side is in
[64, 128), so it belongs to the level of stride 16. Its centre lies in the cell of column floor(72 / 16) = 4 and row
floor(92 / 16) = 5, row-major index 5 · 16 + 4 = 84 of that level's 16×16 map. The cell's centre is (4.5 · 16,
5.5 · 16) = (72, 88), which makes the regression target

    tx = (72 - 72) / 16 = 0      ty = (92 - 88) / 16 = 0.25      tw = th = log(64 / (4 · 16)) = 0

The neighbours of that cell whose centres lie inside the box are positive as well ("centre sampling", FCOS, section
3.3: more positives per object), with offsets of ±1 stride. Every positive cell learns the box by GIoU, the class
by cross-entropy and confidence 1; every other cell of all levels learns confidence 0.
"""
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from data import IGNORE


def seg_loss(logits, mask):
    """Mean cross-entropy over the pixels that are not 255, of logits upsampled bilinearly to the mask's size.

    logits (B, 21, h, w), mask (B, H, W) -> scalar; 0, not NaN, if every pixel is ignored.
    """
    logits = logits.contiguous(memory_format=torch.channels_last)  # the 21 side by side, which the softmax likes
    logits = F.interpolate(logits, mask.shape[1:], mode="bilinear")  # (B, 21, H, W)
    return F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum") / (mask != IGNORE).sum().clamp(min=1)


def giou_loss(boxes, others, eps=1e-7):
    """1 - GIoU of pairs of boxes, both (..., 4) xyxy -> (...) in [0, 2] (arXiv:1902.09630, algorithm 1).

    GIoU = intersection / union - (hull - union) / hull, where hull is the area of the smallest box around both: unlike
    IoU it has a gradient for boxes that do not touch. torchvision's would make a GPU wait in each step.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes.unbind(-1), others.unbind(-1)
    width, height = torch.minimum(x2, u2) - torch.maximum(x1, u1), torch.minimum(y2, v2) - torch.maximum(y1, v1)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
    hull = (torch.maximum(x2, u2) - torch.minimum(x1, u1)) * (torch.maximum(y2, v2) - torch.minimum(y1, v1))
    return 1 - intersection / (union + eps) + (hull - union) / (hull + eps)


def assign(boxes, labels, locations, radius=1.5):
    """Which box each cell has to predict: boxes (B, M, 4) xyxy, labels (B, M), locations (N, 3) -> (B, N), -1 = none.

    A cell takes a box of its level if it holds the box's centre, or if its own centre lies inside the box and less
    than `radius` strides from the box's centre in x and y. Where several boxes claim a cell the smallest gets it
    (FCOS's rule, torchvision's fcos.py): a large one has other cells.
    """
    x, y, stride = (v.view(1, -1, 1) for v in locations.unbind(1))  # each (1, N, 1)
    x1, y1, x2, y2 = (v.unsqueeze(1) for v in boxes.unbind(2))  # each (B, 1, M)
    cx, cy, longer = (x1 + x2) / 2, (y1 + y2) / 2, torch.maximum(x2 - x1, y2 - y1)
    finest, coarsest = stride.min(), stride.max()
    fits = ((longer >= 4 * stride) | (stride == finest)) & ((longer < 8 * stride) | (stride == coarsest))  # (B, N, M)
    # A centre on the far border of the image (x = W) belongs to the last cell, as floor would leave the map.
    home = torch.stack([((c / stride).floor().clamp(max=v.max() // stride) == (v / stride).floor())
                        for c, v in ((cx, x), (cy, y))]).all(0)  # (B, N, M)
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    near = ((x - cx).abs() < radius * stride) & ((y - cy).abs() < radius * stride)
    candidate = fits & (home | (inside & near)) & (labels >= 0).unsqueeze(1)  # (B, N, M)
    area = torch.where(candidate, (x2 - x1) * (y2 - y1), torch.inf)  # (B, N, M)
    best, index = area.min(2)  # (B, N)
    return torch.where(best.isinf(), -1, index)


def det_loss(det, target, locations):
    """Box, confidence and class loss of a batch, each a sum over cells divided by max(1, number of positives).

    det: (B, N, 15) from the model, target: {"boxes": (B, M, 4) xyxy in input pixels, "labels": (B, M), -1 = padding},
    locations: (N, 3) -> scalar. The division makes the loss independent of how many objects a batch shows.
    """
    index = assign(target["boxes"], target["labels"], locations)  # (B, N)
    positive, index = index >= 0, index.clamp(min=0)
    boxes = target["boxes"].gather(1, index[..., None].expand(-1, -1, 4))  # (B, N, 4); of no meaning where not positive
    labels = torch.where(positive, target["labels"].gather(1, index), IGNORE)  # (B, N)
    box_loss = giou_loss(box_convert(det[..., :4], "cxcywh", "xyxy"), boxes)  # (B, N)
    class_loss = F.cross_entropy(det[..., 5:].flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    confidence_loss = F.binary_cross_entropy_with_logits(det[..., 4], positive.to(det.dtype), reduction="sum")
    return (2 * (box_loss * positive).sum() + class_loss + confidence_loss) / positive.sum().clamp(min=1)


def task_loss(task, out, target, locations):
    """The loss of one task -> scalar. out: what the model says, not upsampled, target: that of `model.augment`,
    locations: the cells of the images, see `OneHead.locations`."""
    out = out[task].float()
    if task == "seg":
        return seg_loss(out, target["mask"])
    if task == "det":
        return det_loss(out, target, locations)
    return F.cross_entropy(out, target["labels"][:, 0])
