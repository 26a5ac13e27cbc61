"""One network, one head, three tasks. By default:

    image -> MobileNetV3-Small -> FPN -> Conv3x3, ReLU, Conv1x1 -+- [ 0:21]  segmentation logits
             (backbone)          (neck)  (the one head, shared   |- [21:36]  box, confidence, class
                                          by all FPN levels)     +- [36:46]  classification logits

The head is a single branch: one convolution emits all 46 channels of a cell at once. Every level of
the pyramid gets the same one, as in FCOS and RetinaNet (arXiv:1904.01355, 1708.02002).
"""
import io
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation as ConvNorm  # convolution, BatchNorm, ReLU
from torchvision.ops import FeaturePyramidNetwork, batched_nms

from data import UserError, write_whole

SEG, DET, CLS = slice(0, 21), slice(21, 36), slice(36, 46)  # the channel map of the head
ROWS = {"seg": SEG, "det": DET, "cls": CLS}  # of the output layer, by task
NETWORK = ("backbone", "taps", "neck", "width", "hidden", "head_layers", "head_stride")  # flags
PRIOR = 0.01  # confidence of every cell before training (RetinaNet, section 3.3)


# -- Backbones
def fast_scnn():
    """Fast-SCNN (Poudel, Liwicki, Cipolla 2019, arXiv:1902.04502, table 1), its classifier replaced
    by our head: one map (B, 128, H/8, W/8), the sum of outlines and of what the scene is."""
    learning_to_downsample = nn.Sequential(
        ConvNorm(3, 32, 3, 2),  # (B, 32, H/2, W/2)
        separable(32, 48, 2),  # (B, 48, H/4, W/4)
        separable(48, 64, 2))  # (B, 64, H/8, W/8)
    features = nn.Sequential(learning_to_downsample, GlobalAndFusion())
    return nn.ModuleDict({"features": features})


class GlobalAndFusion(nn.Module):
    """Fast-SCNN's deep branch at stride 32, added to the shallow one at stride 8."""

    def __init__(self):
        super().__init__()
        self.bottlenecks = nn.Sequential(
            *bottlenecks(64, 64, 2),  # (B, 64, H/16, W/16)
            *bottlenecks(64, 96, 2),  # (B, 96, H/32, W/32)
            *bottlenecks(96, 128, 1))  # (B, 128, H/32, W/32)
        self.bins = nn.ModuleDict({str(bins): ConvNorm(128, 32, 1) for bins in (1, 2, 3, 6)})
        self.pyramid = ConvNorm(256, 128, 1)
        self.deep = nn.Sequential(ConvNorm(128, 128, 3, groups=128, dilation=4),
                                  ConvNorm(128, 128, 1, activation_layer=None))
        self.shallow = ConvNorm(64, 128, 1, activation_layer=None)

    def forward(self, x):
        """(B, 64, H/8, W/8) -> (B, 128, H/8, W/8)"""
        deep = self.bottlenecks(x)  # (B, 128, H/32, W/32)
        pooled = [resize(layer(F.adaptive_avg_pool2d(deep, int(bins))), deep.shape[2:])
                  for bins, layer in self.bins.items()]  # 4 of (B, 32, H/32, W/32)
        deep = self.pyramid(torch.cat([deep, *pooled], 1))
        return F.relu(self.shallow(x) + self.deep(resize(deep, x.shape[2:])))


def separable(into, out, stride):
    """A depthwise separable convolution: each channel alone, then all channels of a pixel."""
    return nn.Sequential(ConvNorm(into, into, 3, stride, groups=into), ConvNorm(into, out, 1))


def bottlenecks(into, out, stride):
    """Three inverted residuals of MobileNetV2 with expansion 6; the first has the stride."""
    return [InvertedResidual(into, out, stride, 6),
            *(InvertedResidual(out, out, 1, 6) for _ in range(2))]


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear")


# Constructor, tapped blocks of its `features` (finest first), ImageNet weights. Another one is one
# more entry, for instance
#     "mobilenet_v3_large": (models.mobilenet_v3_large, (6, 12, 16),
#                            models.MobileNet_V3_Large_Weights.IMAGENET1K_V2),
# Block 8 of MobileNetV3-Small is its last one at stride 16.
BACKBONES = {
    "mobilenet_v3_small": (models.mobilenet_v3_small, (3, 8, 12),
                           models.MobileNet_V3_Small_Weights.IMAGENET1K_V1),
    "efficientnet_b0": (models.efficientnet_b0, (3, 5, 8),
                        models.EfficientNet_B0_Weights.IMAGENET1K_V1),
    "fast_scnn": (fast_scnn, (1,), None)}

# -- Necks and the head
# Constructors for the tapped maps' channels, finest first, and the neck's width. The FPN makes a
# level of each map, the others make one of the last map.
NECKS = {"fpn": FeaturePyramidNetwork,
         "conv1x1": lambda channels, width: ConvNorm(channels[-1], width, 1),
         "conv2": lambda channels, width: nn.Sequential(ConvNorm(channels[-1], width, 3),
                                                        ConvNorm(width, width, 3)),
         "none": lambda channels, width: nn.Identity()}


def make_head(into, hidden, layers):
    """Hidden layer, ReLU, output layer. Of three layers two are the hidden one, with BatchNorm."""
    first = nn.Conv2d(into, hidden, 3, padding=1)
    if layers == 3:
        first = nn.Sequential(ConvNorm(into, hidden, 3),
                              ConvNorm(hidden, hidden, 3, activation_layer=None))
    output = nn.Conv2d(hidden, 46, 1)
    nn.init.normal_(output.weight, std=0.01)
    nn.init.zeros_(output.bias)
    with torch.no_grad():  # or thousands of empty cells would drown the first steps
        output.bias[DET][4] = torch.tensor(PRIOR).logit()
    return nn.Sequential(first, nn.ReLU(), output)


class OneHead(nn.Module):
    """Backbone + neck + a head that emits all three tasks.

    backbone, neck: names in BACKBONES and NECKS; taps: the backbone's blocks that feed the neck,
    finest first (default: those in the table); width, hidden: channels of neck and hidden layer;
    head_layers: 2 or 3; head_stride: the stride of the one map that the head reads (default: every
    level of the neck). Raises UserError if the backbone lacks a tap or the FPN the stride.
    """

    def __init__(self, backbone="mobilenet_v3_small", taps=None, neck="fpn", width=128, hidden=128,
                 head_layers=2, head_stride=None):
        super().__init__()
        constructor, usual_taps, _ = BACKBONES[backbone]
        self.features = constructor().features
        taps = list(taps or usual_taps)
        if taps != sorted(set(taps) & set(range(len(self.features)))):
            raise UserError(f"--taps {taps}: {backbone} has the blocks 0 to "
                            f"{len(self.features) - 1}; name some in ascending order.")
        self.arch = {"backbone": backbone, "taps": taps, "neck": neck, "width": width,
                     "hidden": hidden, "head_layers": head_layers, "head_stride": head_stride}
        self.fixed = set()  # names of the BatchNorm layers that `fix_batchnorm` stopped
        self.held = []  # what `hold` keeps in this stage: (parameter, where it is held, its values)
        with torch.no_grad():  # channels and strides are read off a dummy image; eval: BN unmoved
            maps = self.eval().backbone(torch.zeros(1, 3, 64, 64))
        channels = [m.shape[1] for m in maps]
        self.tapped = [64 // m.shape[-1] for m in maps]  # strides: 8, 16, 32
        if neck == "fpn" and head_stride not in (None, *self.tapped):
            raise UserError(f"--head-stride {head_stride}: the FPN has {self.tapped}; take one.")
        self.strides = self.tapped if neck == "fpn" else self.tapped[-1:]  # of what the head reads
        if head_stride:
            self.strides = [head_stride]
        if head_layers == 3 and len(self.strides) > 1:
            raise UserError("--head-layers 3: its BatchNorm needs one map; give a --head-stride.")
        self.neck = NECKS[neck](channels, width)
        self.head = make_head(channels[-1] if neck == "none" else width, hidden, head_layers)
        for layer in self.batchnorms().values():
            layer.momentum = 0.1  # torchvision's 0.01 needs hundreds of steps to settle
        self.train()

    def backbone(self, x):
        """(B, 3, H, W) -> the tapped feature maps, finest first."""
        maps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.arch["taps"]:
                maps.append(x)
        return maps

    def levels(self, maps, size):
        """The tapped maps of images of a size (H, W) -> what the head reads, finest first."""
        stride = self.arch["head_stride"]
        if self.arch["neck"] != "fpn":
            level = self.neck(maps[-1])
            return [resize(level, [-(-n // self.strides[0]) for n in size])]
        levels = list(self.neck(dict(enumerate(maps))).values())
        return [levels[self.tapped.index(stride)]] if stride else levels

    def scene(self, level):
        """The head on the mean of a level (B, C, h, w), padded by itself -> (B, 46, 1, 1)."""
        mean = level.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return self.head(mean.expand(-1, -1, 3, 3))[..., 1:2, 1:2]

    def forward(self, images, tasks=("seg", "det", "cls")):
        """images (B, 3, H, W), normalised -> a dict with the outputs of `tasks`:

        seg    logits (B, 21, H/8, W/8), the sum over all levels, from the finest, which sees the
               outlines, to a single cell for the whole scene (ParseNet, arXiv:1506.04579)
        det    (B, N, 15) = x1, y1, x2, y2 in input pixels, confidence logit, 10 class logits: one
               row for each cell of every level
        cells  (N, 3), comes with det: x, y of each row's cell and its stride, in input pixels
        cls    logits (B, 10), the mean over the coarsest level, the closest to ImageNet's features
        """
        maps = self.backbone(images)  # (B, 24, H/8, W/8), (B, 48, H/16, W/16), (B, 576, H/32, W/32)
        if set(tasks) == {"cls"} and not self.arch["head_stride"]:
            maps = maps[-1:]  # the FPN starts with the last map: finer ones do not change it
        levels = self.levels(maps, images.shape[2:])
        outputs = [self.head(level) for level in levels]  # (B, 46, H/s, W/s) each

        out = {}
        if "seg" in tasks:
            out["seg"] = sum(resize(m[:, SEG], outputs[0].shape[2:]) for m in outputs)
            if len(levels) > 1:
                out["seg"] = self.scene(levels[-1])[:, SEG] + out["seg"]
        if "det" in tasks:
            rows = torch.cat([m[:, DET].flatten(2).mT for m in outputs], 1)  # (B, N, 15)
            out["cells"] = cells(*images.shape[-2:], tuple(self.strides), images.device)  # (N, 3)
            boxes = decode(rows[..., :4], out["cells"])  # (B, N, 4)
            out["det"] = torch.cat([boxes, rows[..., 4:]], 2)  # (B, N, 15)
        if "cls" in tasks:
            out["cls"] = outputs[-1][:, CLS].mean((2, 3))  # (B, 10)
        return out

    def batchnorms(self):
        return {name: m for name, m in self.named_modules() if isinstance(m, nn.BatchNorm2d)}

    def fix_batchnorm(self, names=None):
        """Keeps these BatchNorm layers (default: all) and no others in eval mode. Live ones follow
        a later stage's images: every old output moves, even if all weights are frozen."""
        self.fixed = set(self.batchnorms() if names is None else names)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for name, layer in self.batchnorms().items():
            layer.train(mode and name not in self.fixed)
        return self

    def widen(self, extra, learned):
        """Gives neck and hidden layer `extra` channels more, for the tasks to come.

        New channels, and the output rows of tasks not in `learned`, read the backbone and new
        channels; old ones read the backbone and old channels, and are held: from then
        on their outputs stay bit-identical, as long as the backbone stands still.
        """
        self.held = []
        old = list(range(self.arch["width"]))
        for block in self.neck.inner_blocks:
            self.held += add_channels(block[0], 0, extra, old)
        for block in self.neck.layer_blocks:
            self.held += add_channels(block[0], extra, extra, old)
        self.held += add_channels(self.head[0], extra, extra, list(range(self.arch["hidden"])))
        rows = [row for task in learned for row in range(46)[ROWS[task]]]
        self.held += add_channels(self.head[2], extra, 0, rows)
        self.arch["width"] += extra
        self.arch["hidden"] += extra

    @torch.no_grad()
    def hold(self):
        """Puts held values back after a step: AdamW's decay moves even weights without gradient."""
        for parameter, held, values in self.held:
            parameter.copy_(torch.where(held, values, parameter))


def add_channels(conv, inputs, outputs, old):
    """Adds inputs and outputs to a convolution, in place, as two blocks that do not meet -> what is
    held, as in `OneHead.held`: the rows `old`, which read old inputs. All others start afresh (as
    PyTorch starts a convolution) on new inputs or, where there are none, on the backbone.

                 old inputs   new inputs
        old      held         0, held
        others   0, held      fresh
    """
    out, into = conv.weight.shape[:2]
    new = [row for row in range(out + outputs) if row not in old]
    fresh = nn.Conv2d(inputs or into, len(new), conv.kernel_size)
    weight = conv.weight.new_zeros(out + outputs, into + inputs, *conv.kernel_size)
    weight = weight.to(memory_format=torch.channels_last)
    bias = conv.bias.new_zeros(out + outputs)
    with torch.no_grad():
        weight[old, :into] = conv.weight[old]
        weight[new, -fresh.in_channels:] = fresh.weight.to(weight.device)
        bias[:out] = conv.bias
    conv.out_channels, conv.in_channels = weight.shape[:2]
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    held_weight, held_bias = (torch.ones_like(p, dtype=torch.bool) for p in (weight, bias))
    held_weight[new, -fresh.in_channels:] = False
    held_bias[new] = False
    return [(conv.weight, held_weight, weight.clone()), (conv.bias, held_bias, bias.clone())]


@cache
def cells(height, width, strides, device):
    """The centres x, y and the stride of all levels' cells, row by row -> (N, 3), in pixels."""
    levels = []
    for s in strides:
        y, x = (torch.arange(-(-n // s), device=device) * s + s / 2 for n in (height, width))
        grid = torch.cartesian_prod(y, x).flip(1)  # (H/s · W/s, 2)
        levels.append(F.pad(grid, (0, 1), value=s))  # (H/s · W/s, 3)
    return torch.cat(levels)


def decode(t, cells):
    """tx, ty, tw, th (..., 4), seen from cells (..., 3), -> boxes xyxy in pixels (..., 4).

    The centre is offset by tx, ty strides, and the size is e^tw, e^th times four strides: an object
    of 32, 64 or 128 px is "size 1" on the level of stride 8, 16 or 32, which is what lets one head
    serve them all. Sizes are limited to e^±4 units, so that no early step overflows.
    """
    xy, stride = cells[..., :2], cells[..., 2:]
    centre = xy + t[..., :2] * stride  # (..., 2)
    half = 0.5 * (4 * stride * t[..., 2:].clamp(-4, 4).exp())  # (..., 2)
    return torch.cat([centre - half, centre + half], -1)


def encode(boxes, cells):
    """The inverse of `decode` for boxes that have a width and a height."""
    xy, stride = cells[..., :2], cells[..., 2:]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2  # (..., 2)
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)  # (..., 2): no logarithm of 0
    return torch.cat([(centre - xy) / stride, (size / (4 * stride)).log()], -1)


def detections(rows, floor=0.01, candidates=2000, iou=0.6, most=100):
    """One image's rows (N, 15) -> boxes (K, 4), scores (K,) in (0, 1], labels (K,), best first.

    score = sigmoid(confidence) · softmax(class). Each class of a row is a candidate. The best
    2,000 above the floor go through class-aware NMS: a low one, for a precision-recall curve needs
    its tail.
    """
    scores = rows[:, 4:5].sigmoid() * rows[:, 5:].softmax(1)  # (N, 10)
    best, at = scores.flatten().topk(min(candidates, scores.numel()))  # NMS is quadratic in them
    at, best = at[best > floor], best[best > floor]
    boxes, labels = rows[at // scores.shape[1], :4], at % scores.shape[1]
    keep = batched_nms(boxes, best, labels, iou)[:most]
    return boxes[keep], best[keep], labels[keep]


# -- Weights and files
def load_weights(model, weights):
    """Fills the backbone from "imagenet" (torchvision's weights), "none", or a file: a state dict
    with keys `features.*`, or a model.pt. Its BatchNorm layers are fixed. Raises UserError if the
    file is unreadable or of another backbone, or the download fails."""
    backbone, imagenet = model.arch["backbone"], weights == "imagenet"
    _, _, pretrained = BACKBONES[backbone]
    if weights == "none":
        return
    if imagenet and pretrained is None:
        raise UserError(f"--weights imagenet: {backbone} has none; pass a file or none.")
    try:
        state = pretrained.get_state_dict(check_hash=True) if imagenet else read_checkpoint(weights)
    except (OSError, RuntimeError) as e:
        raise UserError(f"The ImageNet weights could not be downloaded ({e}): try again, pass "
                        "a file as --weights PATH, or start from scratch with --weights none.")
    state = state.get("model", state)
    try:
        model.features.load_state_dict({key.removeprefix("features."): value
                                        for key, value in state.items()
                                        if key.startswith("features.")})
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"--weights {weights}: not this architecture; pass a file with the "
                        f"backbone {backbone}, or a model.pt.")
    model.fix_batchnorm(name for name in model.batchnorms() if name.startswith("features."))


def read_checkpoint(path):
    """A dict of tensors and plain values; nothing in the file is executed. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for a damaged or unsafe file
        raise UserError(f"{path}: not a readable checkpoint ({type(e).__name__}); name another.")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no state dict; name a file written by this project.")
    return state


def write_checkpoint(path, state):
    """Writes a dict of tensors and plain values; the file appears whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def save_model(path, model, image_size, classes):
    """Writes architecture, image size, class lists {task: [names]} and weights."""
    write_checkpoint(path, {"arch": model.arch, "image_size": image_size, "classes": classes,
                            "model": model.state_dict()})


def load_model(path):
    """A file of `save_model` -> (model in eval mode, image size, class lists). Raises UserError."""
    saved = read_checkpoint(path)
    try:
        model = OneHead(**saved["arch"])
        model.load_state_dict(saved["model"])
        return model.eval(), saved["image_size"], saved["classes"]
    except (LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: not a model.pt written by train.py ({type(e).__name__}).")
