"""Tries ideas for the baselines: trains one task alone and measures it on other photos.

    python .assets/try_ideas.py det --data data --dev DIR --seed 0 1 2 --idea "" "epochs=40 focal=2"

An idea is a line of NAME=VALUE: the flags image_size, epochs, lr, trunk_lr and batch_size, and
weight_decay; of the network width, levels (those that segmentation reads) and scene=0; of the
augmentation zoom=LOW,HIGH, aspect, colour, erase (the share of images with a hole) and paste (that
of photos that get another one's objects); of the losses lovasz, balance (classes weigh by their
frequency to minus this), objects (weight of what is not background), smoothing, mixup, focal,
quality and radius; test_size; and average, the decay of a moving average of the weights. "" is the
recipe as it stands. Every result is a line of --log; the means over the seeds are printed. --val
measures on the data's own val split too: with the idea "" that is the table of the baselines.
"""
import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import losses
import model
import train
from data import IGNORE, TASKS, MiniSet
from metrics import evaluate

ARGUMENTS = "image_size epochs lr trunk_lr batch_size".split()


# -- Ideas for the network
class OtherLevels(model.OneHead):
    """Segmentation from the sum of the `count` finest levels, with or without the scene."""

    count, with_scene = 3, True

    def forward(self, images, tasks=TASKS):
        if "seg" not in tasks:
            return super().forward(images, tasks)
        levels = list(self.neck(dict(enumerate(self.backbone(images)))).values())
        maps = [self.head(level)[:, model.SEG] for level in levels[:self.count]]
        total = sum(F.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps)
        if self.with_scene:
            total = total + self.scene(levels[-1])[:, model.SEG]
        return {"seg": total}


# -- Ideas for the images
def paste_objects(images, target, share, **settings):
    """Objects of another photo of the batch, cut out along their masks (arXiv:2012.07177)."""
    images, target = data.augment(images, target, mask_stride=1, **settings)
    mask, other = target["mask"][:, None], target["mask"].roll(1, 0)[:, None]  # (B, 1, S, S)
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < share
    pasted = chosen & (other > 0) & (other != IGNORE)
    mask = torch.where(pasted, other, mask)[:, 0, 2::4, 2::4]  # (B, S/4, S/4)
    return torch.where(pasted, images.roll(1, 0), images), {"mask": mask}


def erased(augment, share):
    """A rectangle of some images is blanked (arXiv:1708.04896)."""
    def blanked(images, target):
        images, target = augment(images, target)
        for image in images:
            if torch.rand(()) < share:
                low, high = images.shape[-1] // 7, images.shape[-1] * 2 // 5
                height, width = torch.randint(low, high, (2,)).tolist()
                top, left = (int(torch.rand(()) * (images.shape[-1] - n)) for n in (height, width))
                image[:, top:top + height, left:left + width] = 0
        return images, target
    return blanked


def mixed_up(augment, strength):
    """Pairs of blended photos, learned as both classes (arXiv:1710.09412)."""
    def blended(images, target):
        images, target = augment(images, target)
        share = torch.distributions.Beta(strength, strength).sample()
        other = torch.randperm(len(images))
        images = share * images + (1 - share) * images[other]
        return images, target | {"other": target["labels"][other], "share": share}

    def both(task, out, target, *of_detection):
        first, second = (losses.task_loss(task, out, {"labels": target[key]})
                         for key in ("labels", "other"))
        return target["share"] * first + (1 - target["share"]) * second
    return blended, both


# -- Ideas for the losses
def lovasz(logits, mask):
    """Lovász-softmax, a surrogate of the IoU, over a batch's classes (arXiv:1705.08790)."""
    shares = F.interpolate(logits, mask.shape[1:], mode="bilinear").softmax(1)
    shares, truth = shares.permute(0, 2, 3, 1)[mask != IGNORE], mask[mask != IGNORE]
    total, classes = 0.0, truth.unique()
    for c in classes:
        error, order = ((truth == c).float() - shares[:, c]).abs().sort(descending=True)
        found = (truth == c).float()[order]
        iou = (found.sum() - found.cumsum(0)) / (found.sum() + (1 - found).cumsum(0))
        total = total + (error * -iou.diff(prepend=iou.new_ones(1))).sum()
    return total / max(1, len(classes))


def weighted_seg_loss(logits, mask, objects=1.0, balance=0.0):
    """Cross-entropy in which all classes but the background weigh `objects` times as much, and all
    by their frequency in the batch to the power -balance."""
    logits = F.interpolate(logits, mask.shape[1:], mode="bilinear")
    pixels = torch.bincount(mask[mask != IGNORE], minlength=21) + 1
    weight = torch.tensor([1.0] + 20 * [objects], device=mask.device)  # (21,)
    weight = weight * (pixels.sum() / pixels) ** balance
    return F.cross_entropy(logits, mask, weight, ignore_index=IGNORE)


def det_loss(det, target, cells, *names, focal=0.0, quality=1.0, radius=1.5):
    """`losses.det_loss` with a focal confidence (arXiv:1708.02002), with the confidence 1 in place
    of the quality of the box, or with positive cells up to another radius."""
    index = losses.assign(target["boxes"], target["labels"], cells, radius)
    positive, index = index >= 0, index.clamp(min=0)
    boxes = target["boxes"].gather(1, index[..., None].expand(-1, -1, 4))
    labels = target["labels"].gather(1, index).where(positive, IGNORE)
    distance = losses.giou_loss(det[..., :4], boxes)
    truth = (1 - quality * distance.detach()).clamp(min=0) * positive
    confidence = F.binary_cross_entropy_with_logits(det[..., 4], truth, reduction="none")
    confidence = confidence * (truth - det[..., 4].sigmoid()).abs() ** focal
    classes = F.cross_entropy(det[..., 5:].flatten(0, 1), labels.flatten(), ignore_index=IGNORE,
                              reduction="sum")
    total = 2 * (distance * positive).sum() + classes + confidence.sum()
    return total / positive.sum().clamp(min=1)


# -- One training
def averaged(decay):
    """Makes the step keep a moving average of the weights -> that average, filled in training."""
    step, kept = train.train_step, {}

    def averaged_step(net, *rest):
        found = step(net, *rest)
        for key, value in net.state_dict().items():
            kept.setdefault(key, value.clone())
            if value.is_floating_point():
                kept[key].lerp_(value, 1 - decay)
        return found
    train.train_step = averaged_step
    return kept


def prepare(task, idea, args):
    """Puts the idea into the arguments and the modules -> what `averaged` keeps, or None."""
    for name in ARGUMENTS:
        if name in idea:
            kind = int if name in ("image_size", "epochs", "batch_size") else float
            value = kind(idea.pop(name))
            setattr(args, name, value if name.endswith("size") else [value] * 3)
    network = OtherLevels if {"levels", "scene"} & set(idea) else model.OneHead
    OtherLevels.count = int(idea.pop("levels", 3))
    OtherLevels.with_scene = bool(int(idea.pop("scene", 1)))
    train.WEIGHT_DECAY = float(idea.pop("weight_decay", train.WEIGHT_DECAY))
    train.OneHead = network
    args.width = args.hidden = int(idea.pop("width", 128))

    settings = {name: float(idea.pop(name)) for name in ("aspect", "colour") if name in idea}
    if "zoom" in idea:
        settings["zoom"] = tuple(map(float, idea.pop("zoom").split(",")))
    train.augment = partial(data.augment, **settings)
    if "paste" in idea:
        share = float(idea.pop("paste"))
        train.augment = partial(paste_objects, share=share, **settings)
    if "erase" in idea:
        train.augment = erased(train.augment, float(idea.pop("erase")))
    losses.SMOOTHING = float(idea.pop("smoothing", losses.SMOOTHING))
    if "mixup" in idea:
        train.augment, train.task_loss = mixed_up(train.augment, float(idea.pop("mixup")))
    if "lovasz" in idea:
        weight, plain = float(idea.pop("lovasz")), losses.seg_loss
        losses.seg_loss = lambda *pair: plain(*pair) + weight * lovasz(*pair)
    of_seg = {name: float(idea.pop(name)) for name in ("objects", "balance") if name in idea}
    if of_seg:
        losses.seg_loss = partial(weighted_seg_loss, **of_seg)
    of_det = {name: float(idea.pop(name)) for name in ("focal", "quality", "radius")
              if name in idea}
    if of_det:
        losses.det_loss = partial(det_loss, **of_det)
    kept = averaged(float(idea.pop("average"))) if "average" in idea else None
    if idea:
        raise SystemExit(f"--idea: does not know {', '.join(idea)}")
    return kept


def try_idea(task, text, seed, options):
    """One training of one idea -> a row of the log. The modules are as before afterwards."""
    before = {module: dict(vars(module)) for module in (data, losses, model, train)}
    args = train.parse(["--data", options.data])
    args.seed, idea = seed, dict(pair.split("=") for pair in text.split())
    test_size = int(idea.pop("test_size", 0))
    kept = prepare(task, idea, args)
    samples = {task: MiniSet(options.data, task, "train", args.image_size)}
    train.evaluate = lambda *rest: {}  # the last epoch is measured below
    run = SimpleNamespace(args=args, train=samples, val={}, done=0, total=0, time_left=lambda: "?")
    net = train.new_model(args)
    seconds = sum(row["seconds"] for row in train.train_stage(net, task, run, measured=()))
    net.load_state_dict(kept or net.state_dict())

    row = {"task": task, "idea": text, "seed": seed, "seconds": round(seconds)}
    for name, root in {"dev": options.dev, "val": options.val and options.data}.items():
        if root:
            split = MiniSet(root, task, "val", test_size or args.image_size, samples[task].classes)
            scores = evaluate(net, {task: split}, args.device)
            row |= {name: scores[task]}
            row |= {f"{name} mAP@50:95": scores["map_50_95"]} if task == "det" else {}
    for module, names in before.items():
        vars(module).update(names)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, nargs="+")
    parser.add_argument("--idea", nargs="+", default=[""])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--dev", help="a folder in the layout of --data, of which val is read")
    parser.add_argument("--val", action="store_true")
    parser.add_argument("--log", default="ideas.jsonl")
    options = parser.parse_args()
    for task in options.task:
        for idea in options.idea:
            rows = [try_idea(task, idea, seed, options) for seed in options.seed]
            with open(options.log, "a", encoding="utf-8") as log:
                log.writelines(json.dumps(row) + "\n" for row in rows)
            for key in list(rows[0])[4:]:
                scores = [row[key] for row in rows]
                spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
                print(f"{task} [{idea}] {key}: {statistics.mean(scores):.3f}{spread}", flush=True)


if __name__ == "__main__":
    main()
