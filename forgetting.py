"""Remedies against forgetting. Each is a small class of two methods, so that they add up and combine with `+`:

    remember(task, model, samples)   after the stage of `task`: keep what the later stages will need
    penalty(model, device)           in each training step of a later stage: a scalar to add to its loss
"""
import random
from itertools import islice

import torch

from data import UserError, draw
from losses import task_loss
from model import augment, take


class Replay:
    """Rehearsal from a buffer (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal").

        L = L_new + weight · Σ_old L_old(images from the buffer)

    At most 10 images per old task, chosen once with the run's seed so that they cover the classes, stored without
    augmentation and augmented anew on each draw.
    """

    def __init__(self, args):
        self.args, self.buffer = args, {}

    def remember(self, task, model, samples):
        if task not in self.args.replay_tasks:
            return
        labels = {i: {*samples.labels(i)} for i in range(len(samples))}
        chosen = islice(draw(labels, random.Random(self.args.seed)), self.args.replay_images)
        self.buffer[task] = take(samples.batch, torch.tensor([*chosen]), self.args.device)

    def penalty(self, model, device):
        loss = 0.0
        for task, stored in self.buffer.items():
            chosen = torch.randperm(len(stored[0]), device=device)[:self.args.replay_batch]
            images, target = augment(*take(stored, chosen))
            loss = loss + self.args.replay_weight * task_loss(model, task, images, target)
        return loss


REMEDIES = {"replay": Replay}


def build(strategy, args):
    """"replay" or "none", or several joined with + -> list of remedies. Raises UserError for an unknown name."""
    names = [] if strategy == "none" else strategy.split("+")
    for name in names:
        if name not in REMEDIES:
            raise UserError(f"--strategy {strategy}: unknown remedy '{name}'; choose none or {', '.join(REMEDIES)}.")
    return [REMEDIES[name](args) for name in names]
