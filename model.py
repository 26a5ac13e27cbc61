"""One network, one head, three tasks.

    image ─ MobileNetV3-Small ─ FPN ─ Conv3×3 → ReLU → Conv1×1 ─┬─ [ 0:21]  segmentation logits
                                      (the one head, shared by  ├─ [21:36]  tx ty tw th, confidence, 10 class logits
                                       every pyramid level)     └─ [36:46]  classification logits

The head is a single branch: one convolution emits all 46 channels of a cell at once. It is applied to every level
of the pyramid with the same weights, as FCOS and RetinaNet share theirs (arXiv:1904.01355, 1708.02002).
"""
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_convert

from data import UserError

SEG, DET, CLS = slice(0, 21), slice(21, 36), slice(36, 46)  # the channel map of the head
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, for values 0-255
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

        seg: logits (B, 21, H, W), upsampled to the input size; upsample=False leaves them at (B, 21, H/8, W/8) for
             those who upsample to another size (the loss to the mask's, the metric to the original's).
        det: (B, N, 15) = cx, cy, w, h in input pixels, confidence logit, 10 class logits, one row per cell of
             every level (`locations` lists the cells in the same order).
        cls: logits (B, 10), the mean over the coarsest level, which stays closest to ImageNet's features.
        """
        maps = self.taps(images)  # (B, 24, H/8, W/8), (B, 48, H/16, W/16), (B, 576, H/32, W/32)
        pyramid = self.fpn(dict(enumerate(maps)))  # the same three sizes, 128 channels each
        levels = [pyramid[i] for i in range(len(self.strides))]
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
        cells = []
        for s in self.strides:
            y, x = (torch.arange(-(-n // s), device=images.device) * s + s / 2 for n in images.shape[-2:])
            grid = torch.cartesian_prod(y, x)  # (H/s * W/s, 2), row by row as the maps are flattened
            cells.append(F.pad(grid.flip(1), (0, 1), value=s))  # (H/s * W/s, 3)
        return torch.cat(cells)

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


def collate(samples, device="cpu"):
    """[(image, target)] -> normalised images (B, 3, H, W) in channels_last, and the batch's target: masks (B, H, W)
    for seg; {"boxes": (B, M, 4), "labels": (B, M), padded with -1} for det; labels (B,) for cls."""
    images = torch.stack([image for image, _ in samples]).to(device)  # (B, 3, H, W) uint8
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    images = images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)
    columns = {key: [target[key] for _, target in samples] for key in samples[0][1]}
    if "mask" in columns:
        return images, torch.stack(columns["mask"]).to(device, torch.int64)
    if "label" in columns:
        return images, torch.tensor(columns["label"], device=device)
    return images, {"boxes": pad_sequence([b.reshape(-1, 4) for b in columns["boxes"]], batch_first=True).to(device),
                    "labels": pad_sequence(columns["labels"], batch_first=True, padding_value=-1).to(device)}


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


def detections(det, floor=0.01, iou=0.6, most=100):
    """One image's rows (N, 15) -> boxes (K, 4) xyxy in input pixels, scores (K,) in (0, 1], labels (K,), best first.

    score = sigmoid(confidence) · softmax(class). Every class of a row is a candidate; class-aware NMS. The floor
    is low on purpose: a precision-recall curve needs its tail.
    """
    scores = det[:, 4:5].sigmoid() * det[:, 5:].softmax(1)  # (N, 10)
    row, label = (scores > floor).nonzero(as_tuple=True)
    boxes, scores = box_convert(det[row, :4], "cxcywh", "xyxy"), scores[row, label]
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
