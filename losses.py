"""The losses of the three tasks, and the distances that distillation puts between two outputs.

Detection is a hand-written YOLO-style loss; here is one box of it in numbers. A dog stands at
xyxy = (40, 60, 104, 124) of a 256x256 image: centre (72, 92), size 64x64. Its longer side is in
[64, 128), so it belongs to the level of stride 16. Its centre lies in the cell of column
floor(72 / 16) = 4 and row floor(92 / 16) = 5, row-major index 5 * 16 + 4 = 84 of that level's
map. The neighbours of that cell whose centres lie inside the box, less than 1.5 strides from its
centre, are positive as well ("centre sampling", FCOS, section 3.3: more positives per object):
columns 3 to 5 of rows 4 to 6.

Say that this cell predicts (48, 60, 112, 124), 8 px too far right. The two boxes share 56 * 64 =
3,584 px, together they cover 2 * 4,096 - 3,584 = 4,608, and the smallest box around both has
72 * 64 = 4,608, of which nothing is uncovered:

    GIoU = 3,584 / 4,608 - 0 / 4,608 = 0.778, and the box loss is 1 - 0.778 = 0.222, with weight 2

Besides, every positive cell learns its class by cross-entropy, and as its confidence the GIoU of
its own box, 0.778: of several boxes around the dog the best one is to be ranked first (an IoU-aware
score, Wu et al. 2020, arXiv:1912.05992). Every other cell of all levels learns confidence 0.
"""
import torch
import torch.nn.functional as F

from data import IGNORE
from model import encode

SMOOTHING = 0.1  # of the labels of classification (Szegedy et al. 2016, arXiv:1512.00567)
TEMPERATURE = 2.0  # softens the classes that distillation compares (Li & Hoiem, section 3)


def task_loss(task, out, target, box_loss="giou", conf_loss="bce"):
    """The loss of what the model says about one task -> scalar. target: that of `data.augment`."""
    if task == "seg":
        return seg_loss(out["seg"].float(), target["mask"])
    if task == "det":
        return det_loss(out["det"].float(), target, out["cells"], box_loss, conf_loss)
    return F.cross_entropy(out["cls"].float(), target["labels"][:, 0], label_smoothing=SMOOTHING)


def seg_loss(logits, mask):
    """logits (B, 21, h, w), mask (B, H, W) -> mean cross-entropy over the pixels that are not 255,
    at the mask's size; 0, not NaN, if every pixel is ignored."""
    logits = logits.contiguous(memory_format=torch.channels_last)  # which the softmax likes
    logits = F.interpolate(logits, mask.shape[1:], mode="bilinear")  # (B, 21, H, W)
    total = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum")
    return total / (mask != IGNORE).sum().clamp(min=1)


def distance(task, out, taught):
    """How far what a model says about a task is from what its teacher says -> scalar >= 0.
    Classification, the last task, is never an old one."""
    distil = {"seg": distil_seg, "det": distil_det}[task]
    return distil(out[task].float(), taught[task].float())


def distil_seg(logits, taught):
    """Logits of segmentation and a teacher's, both (B, 21, h, w) -> scalar >= 0.

    The mean over cells of T² KL(teacher ‖ student). What the teacher takes for an object weighs
    up to five times as much as background, most of every photo but one class of 21 in the mIoU.
    """
    weight = 1 + 4 * (1 - taught.softmax(1)[:, 0])  # (B, h, w)
    return (weight * softened_kl(logits, taught, 1)).sum() / weight.sum()


def softened_kl(logits, taught, dim):
    """T² · KL(teacher ‖ student) of logits softened by the temperature T (arXiv:1503.02531)."""
    now = (logits / TEMPERATURE).log_softmax(dim)
    then = (taught / TEMPERATURE).log_softmax(dim)
    return TEMPERATURE ** 2 * (then.exp() * (then - now)).sum(dim)


def giou_loss(boxes, others, eps=1e-7):
    """1 - GIoU of pairs of boxes, both (..., 4) xyxy -> (...) in [0, 2] (arXiv:1902.09630).

    GIoU = intersection / union - (hull - union) / hull, where hull is the area of the smallest box
    around both. torchvision's function would make a GPU wait in every step.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    u1, v1, u2, v2 = others.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
    hull_width = torch.maximum(x2, u2) - torch.minimum(x1, u1)
    hull = hull_width * (torch.maximum(y2, v2) - torch.minimum(y1, v1))
    return 1 - intersection / (union + eps) + (hull - union) / (hull + eps)


def assign(boxes, labels, cells, radius=1.5):
    """Which box each cell has to predict: boxes (B, M, 4), labels (B, M), cells (N, 3) -> index
    (B, N), -1 = none.

    A box belongs to the level of which its longer side has 4 to 8 strides; the finest and the
    coarsest also take what is smaller or larger. A cell takes it if it holds the box's centre, or
    if its own centre lies inside the box and less than `radius` strides from the box's centre in
    x and y. Where several boxes claim a cell the smallest gets it (FCOS's rule): a large one has
    other cells.
    """
    x, y, stride = (v.view(1, -1, 1) for v in cells.unbind(1))  # each (1, N, 1)
    x1, y1, x2, y2 = (v.unsqueeze(1) for v in boxes.unbind(2))  # each (B, 1, M)
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2

    longer = torch.maximum(x2 - x1, y2 - y1)
    large_enough = (longer >= 4 * stride) | (stride == stride.min())
    fits = large_enough & ((longer < 8 * stride) | (stride == stride.max()))  # (B, N, M)

    # A centre on the far border of the image (x = W) belongs to the last cell: floor leaves the map
    same_column = (cx / stride).floor().clamp(max=x.max() // stride) == (x / stride).floor()
    same_row = (cy / stride).floor().clamp(max=y.max() // stride) == (y / stride).floor()
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    near = ((x - cx).abs() < radius * stride) & ((y - cy).abs() < radius * stride)

    claim = fits & ((same_column & same_row) | (inside & near)) & (labels >= 0).unsqueeze(1)
    area = torch.where(claim, (x2 - x1) * (y2 - y1), torch.inf)  # (B, N, M)
    smallest, index = area.min(2)  # (B, N)
    return torch.where(smallest.isinf(), -1, index)


def det_loss(det, target, cells, box_loss="giou", conf_loss="bce"):
    """det (B, N, 15) from the model, target {"boxes": (B, M, 4), "labels": (B, M)}, cells (N, 3)
    -> scalar: box, confidence and class loss, summed over cells and divided by the number of
    positive ones, so that it does not depend on how many objects a batch shows.

    box_loss: "giou", or "smooth_l1" or "mse" of the four offsets t; conf_loss: "bce", or "focal"
    with γ = 1, for soft targets (Li et al. 2020, arXiv:2006.04388, eq. 3).
    """
    index = assign(target["boxes"], target["labels"], cells)  # (B, N)
    positive, index = index >= 0, index.clamp(min=0)
    boxes = target["boxes"].gather(1, index[..., None].expand(-1, -1, 4))  # (B, N, 4)
    labels = target["labels"].gather(1, index).where(positive, IGNORE)  # (B, N)

    error = giou_loss(det[..., :4], boxes)  # (B, N) in [0, 2]
    quality = (1 - error.detach()).clamp(min=0) * positive  # (B, N): what confidence should be
    if box_loss != "giou":
        of_offsets = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[box_loss]
        t, true_t = encode(det[..., :4], cells), encode(boxes, cells)  # (B, N, 4)
        error = of_offsets(t, true_t, reduction="none").sum(2)  # (B, N)
    confidence = F.binary_cross_entropy_with_logits(det[..., 4], quality, reduction="none")
    if conf_loss == "focal":
        confidence = (det[..., 4].sigmoid() - quality).abs() * confidence
    class_loss = F.cross_entropy(det[..., 5:].flatten(0, 1), labels.flatten(),
                                 ignore_index=IGNORE, reduction="sum")
    total = 2 * (error * positive).sum() + class_loss + confidence.sum()
    return total / positive.sum().clamp(min=1)


def distil_det(det, taught):
    """Detections and a teacher's, both (B, N, 15) -> scalar >= 0, as `det_loss` but against soft
    targets: box and class of a cell count by the teacher's confidence in it."""
    confidence = taught[..., 4].sigmoid()  # (B, N)
    kept = F.binary_cross_entropy_with_logits(det[..., 4], confidence, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(taught[..., 4], confidence, reduction="none")
    boxes = giou_loss(det[..., :4], taught[..., :4])  # (B, N)
    classes = softened_kl(det[..., 5:], taught[..., 5:], 2)  # (B, N)
    total = (kept - entropy + confidence * (2 * boxes + classes)).sum()
    return total / confidence.sum().clamp(min=1)
