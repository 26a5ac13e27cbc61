"""Tries ideas for the baselines: trains one task alone, measures it on a development folder.

    python .assets/try_ideas.py seg --data data --dev DIR --seed 0 1 2 --idea base levels trunk5

An idea changes the run's arguments or replaces a function of a module; its name is in IDEAS.
Scores are appended to --log, a JSON file, and printed as mean ± std over the seeds of each idea.
"""
import argparse
import json
import statistics
import sys
from copy import deepcopy
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
from data import TASKS, MiniSet
from model import SEG, OneHead


class Levels(OneHead):
    """Segmentation from the sum of the logits of all levels, each upsampled to the finest."""

    def forward(self, images, tasks=TASKS):
        if "seg" not in tasks:
            return super().forward(images, tasks)
        maps = self.fpn(dict(enumerate(self.backbone(images)))).values()
        maps = [self.head(level)[:, SEG] for level in maps]
        size = maps[0].shape[2:]
        return {"seg": sum(F.interpolate(m, size, mode="bilinear") for m in maps)}


def change(**values):
    """An idea that changes arguments."""
    return lambda args: vars(args).update(values)


def put(module, name, value):
    """An idea that replaces a name in a module."""
    return lambda args: setattr(module, name, value)


def average(decay):
    """An idea: measures a moving average of the weights."""
    def start(args):
        step, measure, kept = train.train_step, train.evaluate, {}

        def averaged_step(net, *rest):
            found = step(net, *rest)
            now = {k: v.detach().clone() for k, v in net.state_dict().items()}
            for key, value in now.items():
                if value.is_floating_point() and key in kept:
                    value.lerp_(kept[key], decay)
            kept.update(now)
            return found

        def measured(net, *rest):
            net = deepcopy(net)
            net.load_state_dict(kept)
            return measure(net, *rest)
        train.train_step, train.evaluate = averaged_step, measured
    return start


def mixup(args):
    """An idea: classification of pairs of photos, blended (arXiv:1710.09412)."""
    augment, loss = train.augment, train.task_loss

    def blended(images, target):
        images, target = augment(images, target)
        share = torch.distributions.Beta(0.2, 0.2).sample()
        other = torch.randperm(len(images))
        images = share * images + (1 - share) * images[other]
        return images, target | {"other": target["labels"][other], "share": share}

    def both(task, out, target):
        second = loss(task, out, {"labels": target["other"]})
        return target["share"] * loss(task, out, target) + (1 - target["share"]) * second
    train.augment, train.task_loss = blended, both


def smooth(args):
    """An idea: label smoothing in classification."""
    train.task_loss = lambda task, out, target: F.cross_entropy(
        out["cls"], target["labels"][:, 0], label_smoothing=0.1)


def focal(args):
    """An idea: focal loss for the confidence, gamma = 2 (arXiv:1708.02002)."""
    plain = F.binary_cross_entropy_with_logits

    def loss(logits, target, reduction):
        wrong = (logits.sigmoid() - target).abs()
        return (wrong ** 2 * plain(logits, target, reduction="none")).sum()
    losses.F = SimpleNamespace(**{**vars(F), "binary_cross_entropy_with_logits": loss})


IDEAS = {
    "base": change(),
    "trunk5": change(trunk_lr=[0.05] * 3), "trunk0": change(trunk_lr=[0.0] * 3),
    "trunk50": change(trunk_lr=[0.5] * 3),
    "half": change(epochs=[10, 10, 5]), "double": change(epochs=[40, 40, 20]),
    "lr2": change(lr=[2e-3] * 3), "lr.5": change(lr=[5e-4] * 3),
    "batch16": change(batch_size=16), "batch4": change(batch_size=4),
    "width192": put(train, "OneHead", partial(OneHead, width=192)),
    "levels": put(train, "OneHead", Levels),
    "levels192": put(train, "OneHead", partial(Levels, width=192)),
    "zoom.35": put(train, "augment", partial(data.augment, zoom=(0.35, 1.1))),
    "zoom1.4": put(train, "augment", partial(data.augment, zoom=(0.4, 1.4))),
    "colour.5": put(train, "augment", partial(data.augment, colour=0.5)),
    "average": average(0.99),
    "mixup": mixup, "smooth": smooth, "focal": focal,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--idea", nargs="+", choices=IDEAS, default=["base"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--data", default="data")
    parser.add_argument("--dev", required=True)
    parser.add_argument("--log", default="ideas.json")
    options = parser.parse_args()
    log = json.loads(Path(options.log).read_text()) if Path(options.log).exists() else []
    task, original = options.task, {m: dict(vars(m)) for m in (data, losses, model, train)}
    samples = {task: MiniSet(options.data, task, "train", options.size)}
    dev = {task: MiniSet(options.dev, task, "val", options.size, samples[task].classes)}
    for idea in options.idea:
        for seed in options.seed:
            args = train.parse(["--data", options.data, "--image-size", str(options.size),
                                "--epochs", "20", "20", "10"])
            args.seed = seed
            IDEAS[idea](args)
            run = SimpleNamespace(args=args, train=samples, val=dev, time_left=lambda: "?")
            score = train.train_stage(train.new_model(args), task, run)[-1]
            for module, names in original.items():
                vars(module).update(names)
            key = {"task": task, "idea": idea, "size": options.size, "seed": seed}
            log.append(key | {"score": score[task], "map_50_95": score.get("map_50_95")})
            Path(options.log).write_text(json.dumps(log, indent=0))
        scores = [row["score"] for row in log if (row["task"], row["idea"]) == (task, idea)]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        print(f"{task} {idea}: {statistics.mean(scores):.3f} ± {spread:.3f}, {len(scores)} seeds")


if __name__ == "__main__":
    main()
