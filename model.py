"""One network, one head, three tasks.

    image ─ MobileNetV3-Small ─ FPN ─ Conv3×3 → ReLU → Conv1×1 ─┬─ [ 0:21]  segmentation logits
                                      (the one head, shared by  ├─ [21:36]  tx ty tw th, confidence, 10 class logits
                                       every pyramid level)     └─ [36:46]  classification logits

The head is a single branch: one convolution emits all 46 channels of a cell at once. It is applied to every level
of the pyramid with the same weights, as FCOS and RetinaNet share theirs (arXiv:1904.01355, 1708.02002).
"""
import os
from functools import cache
from math import log
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_convert

from data import IGNORE, UserError

SEG, DET, CLS = slice(0, 21), slice(21, 36), slice(36, 46)  # the channel map of the head
PRIOR = 0.01  # confidence of every cell before training (RetinaNet, section 3.3)


class OneHead(nn.Module):
    """MobileNetV3-Small + FPN + a two-layer head that emits segmentation, detection and classification.

    taps: indices of the trunk's blocks that feed the FPN, finest first. width: channels of neck and head.
    levels: how many pyramid levels the head is applied to, finest first. OneHead((3, 6, 12), levels=1) is the
    challenge's reference configuration with 1,605,582 parameters; tapping block 8 instead of 6 (the last one at
    stride 16, two blocks deeper) and three levels give large objects a coarse grid of their own.
    """

    def __init__(self, taps=(3, 8, 12), width=128, levels=3):
        super().__init__()
        self.arch = {"taps": list(taps), "width": width, "levels": levels}
        self.features = mobilenet_v3_small(weights=None).features
        with torch.no_grad():  # read the taps' channels and strides off a dummy image, in eval mode: BN unmoved
            maps = self.eval().taps(torch.zeros(1, 3, 64, 64))
        self.strides = [64 // m.shape[-1] for m in maps[:levels]]  # 8, 16, 32
        self.fpn = FeaturePyramidNetwork([m.shape[1] for m in maps], width)
        self.head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 46, 1))
        nn.init.normal_(self.head[2].weight, std=0.01)
        nn.init.zeros_(self.head[2].bias)
        with torch.no_grad():  # sigmoid(bias) = PRIOR: thousands of empty cells must not drown the first steps
            self.head[2].bias[DET][4] = -torch.log(torch.tensor((1 - PRIOR) / PRIOR))
        for layer in self.batchnorms().values():
            layer.momentum, layer.fixed = 0.1, False  # torchvision's 0.01 needs hundreds of steps to settle
        self.train()

    def taps(self, x):
        """(B, 3, H, W) -> the tapped feature maps, finest first."""
        maps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.arch["taps"]:
                maps.append(x)
        return maps

    def forward(self, images, tasks=("seg", "det", "cls"), upsample=True):
        """images (B, 3, H, W), normalised -> dict with the outputs of `tasks`.

        seg: logits (B, 21, H, W) of the finest level, upsampled to the input size; upsample=False leaves them at
             (B, 21, H/8, W/8) for those who upsample to another size (the loss to the mask's, the metric to the
             original's).
        det: (B, N, 15) = cx, cy, w, h in input pixels, confidence logit, 10 class logits, one row per cell of
             every level (`locations` lists the cells in the same order).
        cls: logits (B, 10), the mean over the coarsest level, which stays closest to ImageNet's features.
        """
        maps = self.taps(images)  # (B, 24, H/8, W/8), (B, 48, H/16, W/16), (B, 576, H/32, W/32)
        if tuple(tasks) == ("cls",) and len(self.strides) == len(maps):
            maps = maps[-1:]  # the coarsest level does not depend on the finer ones
        levels = [*self.fpn(dict(enumerate(maps))).values()][:len(self.strides)]  # the same sizes, 128 channels each
        used = levels if "det" in tasks else [levels[0]] * ("seg" in tasks) + [levels[-1]] * ("cls" in tasks)
        maps = [self.head(level) for level in used]  # (B, 46, H/s, W/s) for each level
        out = {}
        if "seg" in tasks:
            out["seg"] = maps[0][:, SEG]  # (B, 21, H/8, W/8)
            if upsample:
                out["seg"] = F.interpolate(out["seg"], images.shape[-2:], mode="bilinear")  # (B, 21, H, W)
        if "det" in tasks:
            raw = torch.cat([m[:, DET].flatten(2) for m in maps], 2).transpose(1, 2)  # (B, N, 15)
            boxes = decode(raw[..., :4], self.locations(images))  # (B, N, 4)
            out["det"] = torch.cat([boxes, raw[..., 4:]], 2)  # (B, N, 15)
        if "cls" in tasks:
            out["cls"] = maps[-1][:, CLS].mean((2, 3))  # (B, 10)
        return out

    def locations(self, images):
        """The cells of all levels for images (B, 3, H, W): x, y of the centre and stride, in pixels, (N, 3)."""
        return cells(*images.shape[-2:], tuple(self.strides), images.device)

    def batchnorms(self):
        return {name: m for name, m in self.named_modules() if isinstance(m, nn.BatchNorm2d)}

    def fix_batchnorm(self, names=None):
        """Keeps these BatchNorm layers (default: all) in eval mode from now on, after every .train() too.

        Their statistics describe the data they were learned on; left live, a later stage's images overwrite them
        and every old output moves, even with all weights frozen.
        """
        for name, layer in self.batchnorms().items():
            layer.fixed |= names is None or name in names
        self.train(self.training)

    def free_batchnorm(self):
        """Lets every BatchNorm layer follow the images of each stage: the mistake that `--bn live` demonstrates."""
        for layer in self.batchnorms().values():
            layer.fixed = False

    def train(self, mode=True):
        super().train(mode)
        for layer in self.batchnorms().values():
            layer.train(mode and not getattr(layer, "fixed", False))
        return self


@cache
def cells(height, width, strides, device):
    """See `OneHead.locations`; made once for each size."""
    levels = []
    for s in strides:
        y, x = (torch.arange(-(-n // s), device=device) * s + s / 2 for n in (height, width))
        grid = torch.cartesian_prod(y, x)  # (H/s * W/s, 2), row by row as the maps are flattened
        levels.append(F.pad(grid.flip(1), (0, 1), value=s))  # (H/s * W/s, 3)
    return torch.cat(levels)


@cache
def imagenet(device):
    """ImageNet's mean and standard deviation for the values 0-255, each (3, 1, 1), sent to a device only once."""
    return [torch.tensor(v, device=device).view(3, 1, 1)
            for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))]


def normalise(images):
    """uint8 (B, 3, H, W) -> float32, normalised, in channels_last, which convolutions on a CPU like best."""
    mean, std = imagenet(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def take(batch, index, device=None):
    """The samples at `index`, a slice or a tensor of positions, of a batch (images, {name: column})."""
    def pick(column):  # index_select copies ten times faster than column[tensor]
        return (column[index] if isinstance(index, slice) else column.index_select(0, index)).to(device)

    images, target = batch
    return pick(images), {name: pick(column) for name, column in target.items()}


def augment(images, target, zoom=None, aspect=1.3, colour=0.3, mask_stride=4):
    """Draws a window for each image of a batch, resamples it to the full size, flips it, and changes contrast,
    brightness and saturation.

    images (B, 3, S, S) uint8 and the target of `MiniSet.batch` -> normalised images and their target. The window's
    side is zoom · S, by default 0.5 to 1.1, and 0.6 to 1.4 where there are boxes: detection gains from many small and
    few cut objects, the other tasks from detail. Where it leaves the image it shows the mean colour, and 255 in the
    mask. Boxes of which less than a fifth, or less than 2 px a side, stays visible get the label -1. Masks are read
    at every fourth pixel: the logits are coarser still, and the window moves in every epoch. One pass over the
    batch, on the device that holds it.
    """
    (b, _, size, _), device = images.shape, images.device
    zoom = zoom or ((0.6, 1.4) if "boxes" in target else (0.5, 1.1))

    def uniform(low, high, *shape):
        return torch.empty(b, *shape, device=device).uniform_(low, high)

    # The window in units of the image, x and y in the last dimension: start + extent · t shows at t in [0, 1]
    side, ratio = uniform(*zoom, 1), uniform(-1, 1, 1).mul(log(aspect) / 2).exp()
    extent = torch.cat([side * ratio, side / ratio], 1)  # (B, 2)
    start = uniform(0, 1, 2) * (1 - extent)  # (B, 2) inside the image, or around it
    flip = torch.stack([uniform(0, 1) < 0.5, torch.zeros(b, dtype=torch.bool, device=device)], 1)  # (B, 2)
    start, extent = torch.where(flip, start + extent, start), torch.where(flip, -extent, extent)

    def sample(x, n, mode):
        t = (torch.arange(n, device=device) + 0.5) / n
        x_at, y_at = (2 * (start[..., None] + extent[..., None] * t) - 1).unbind(1)  # each (B, n) in [-1, 1]
        grid = torch.stack([x_at[:, None].expand(b, n, n), y_at[:, :, None].expand(b, n, n)], 3)  # (B, n, n, 2)
        return F.grid_sample(x, grid, mode, align_corners=False)

    mean, std = imagenet(device)
    x = sample(images.to(torch.float32).sub_(mean), size, "bilinear")  # (B, 3, S, S), 0 = the mean colour
    contrast, saturation = uniform(1 - colour, 1 + colour, 2, 1, 1).unbind(1)  # each (B, 1, 1)
    grey = torch.full((3, 3), 1 / 3, device=device)
    matrix = contrast * torch.lerp(grey, torch.eye(3, device=device), saturation) / std.view(3, 1)  # (B, 3, 3)
    brightness = 100 * uniform(-colour, colour, 1, 1) / std.view(3, 1)  # (B, 3, 1)
    x = torch.baddbmm(brightness, matrix, x.flatten(2)).view_as(x).contiguous(memory_format=torch.channels_last)
    if "mask" in target:
        mask = sample(target["mask"][:, None].float() - IGNORE, size // mask_stride, "nearest") + IGNORE
        return x, {"mask": mask[:, 0].long()}  # (B, S/4, S/4)
    if "boxes" in target:
        corners = (target["boxes"].unflatten(2, (2, 2)) / size - start[:, None, None]) / extent[:, None, None] * size
        whole = torch.cat([corners.amin(2), corners.amax(2)], 2)  # (B, M, 4)
        boxes = whole.clamp(0, size)
        (w, h), (w_whole, h_whole) = ((v[..., 2:] - v[..., :2]).unbind(2) for v in (boxes, whole))  # each (B, M)
        seen = (w * h > w_whole * h_whole / 5) & (w >= 2) & (h >= 2)
        return x, {"boxes": boxes, "labels": torch.where(seen, target["labels"], -1)}
    return x, target


def encode(boxes, locations):
    """Boxes cx, cy, w, h in pixels (..., 4), seen from cells (..., 3) = x, y, stride -> tx, ty, tw, th (..., 4).

    The offset of the centre in strides, and the logarithm of the size in units of four strides: an object of
    32, 64 or 128 px is "size 1" on the level of stride 8, 16 or 32, which is what lets one head serve them all.
    """
    xy, stride = locations[..., :2], locations[..., 2:]
    return torch.cat([(boxes[..., :2] - xy) / stride, (boxes[..., 2:] / (4 * stride)).log()], -1)


def decode(t, locations):
    """The inverse of `encode`; sizes are limited to e^±4 units, so that no early step overflows."""
    xy, stride = locations[..., :2], locations[..., 2:]
    return torch.cat([xy + t[..., :2] * stride, 4 * stride * t[..., 2:].clamp(-4, 4).exp()], -1)


def detections(det, floor=0.01, candidates=2000, iou=0.6, most=100):
    """One image's rows (N, 15) -> boxes (K, 4) xyxy in input pixels, scores (K,) in (0, 1], labels (K,), best first.

    score = sigmoid(confidence) · softmax(class). Every class of a row is a candidate, the best 2,000 above the floor
    go through class-aware NMS. The floor is low on purpose: a precision-recall curve needs its tail.
    """
    scores = det[:, 4:5].sigmoid() * det[:, 5:].softmax(1)  # (N, 10)
    best, at = scores.flatten().topk(min(candidates, scores.numel()))  # NMS is quadratic in them
    at, scores, classes = at[best > floor], best[best > floor], scores.shape[1]
    boxes, label = box_convert(det[at // classes, :4], "cxcywh", "xyxy"), at % classes
    keep = batched_nms(boxes, scores, label, iou)[:most]
    return boxes[keep], scores[keep], label[keep]


def load_weights(model, weights):
    """Fills the model from "imagenet" (torchvision's trunk), "none" or a path, and fixes the BatchNorm layers loaded.

    A path holds a state dict of the trunk alone (keys `features.*`; a classifier's are ignored), or a model.pt.
    Raises UserError if the file is missing, unreadable or of another architecture, or the download fails.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            state = MobileNet_V3_Small_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as e:
            raise UserError(f"The ImageNet weights could not be downloaded ({e}): connect and try again, or pass a "
                            "file fetched elsewhere as --weights PATH, or start from scratch with --weights none.")
    else:
        state = read_checkpoint(weights)
        state = state.get("model", state)
    if not any(key.startswith("head.") for key in state):  # a trunk, not a whole model
        state = {key: value for key, value in state.items() if key.startswith("features.")}
    own = {key: value for key, value in model.state_dict().items()
           if key.startswith("features.") or any(k.startswith("head.") for k in state)}
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"--weights {weights}: not this architecture ({len(wrong)} tensors differ, {min(wrong)} for "
                        "one); pass a MobileNetV3-Small trunk or a model.pt of the same configuration.")
    model.load_state_dict(state, strict=False)
    model.fix_batchnorm({name for name in model.batchnorms() if f"{name}.running_mean" in state})


def read_checkpoint(path):
    """A dict of tensors and plain values, without executing anything in the file. Raises UserError if unreadable."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name a checkpoint that exists.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for a damaged or unsafe file; the reader needs one sentence
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__}); save or download it again.")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no state dict; name a file written by this project or by torch.save.")
    return state


def save_model(path, model, image_size, classes):
    """Writes architecture, image size, class lists {task: [names]} and weights; never leaves half a file."""
    part = Path(f"{path}.part")
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    torch.save({"arch": model.arch, "image_size": image_size, "classes": classes, "model": state}, part)
    os.replace(part, path)


def load_model(path):
    """A file of `save_model` -> (model in eval mode, image size, class lists). Raises UserError if it is not one."""
    saved = read_checkpoint(path)
    try:
        model = OneHead(**saved["arch"])
        model.load_state_dict(saved["model"])
        return model.eval(), saved["image_size"], saved["classes"]
    except (KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{path}: not a model.pt of this project ({type(e).__name__}); name one written by train.py.")
