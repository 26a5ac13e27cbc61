"""Remedies against forgetting, each a small class. `--strategy` names one, or several joined by +.

To add one, write a class with those methods of `Remedy` that it needs, and enter it in REMEDIES
before freeze and isolation, which change the model. Its flags, if any, go into
`train.add_settings`, and those with three values also into the first row of STRENGTHS. Autograd
does the rest.

MAS (arXiv:1711.09601), for instance, is a child of EWC with its own `importance`. Copy that method
without its `continue` and the `if` above, and change two lines: the gradient is that of
    model(images, (task,))[task].square().sum()  (of detection without the boxes: [..., 4:])
and what is added up is `gradient.abs()`. The strength is then --ewc-lambda.
"""
import argparse
import random
from copy import deepcopy
from itertools import islice

import torch
import torch.nn.functional as F

from data import TASKS, augment, cover, take
from losses import distance, task_loss

PAIRS = (("det", "seg"), ("cls", "seg"), ("cls", "det"))  # a stage's new task and an old task in it
# Default strengths: a value for each of PAIRS, or, for shared_lr and own_channels, for each stage.
# All rows apply whose remedies are in the strategy ("from scratch": with --weights none), and where
# they differ the last one counts. Strategies that no row names have not been tuned.
STRENGTHS = {
    "otherwise": dict(replay_weight=[1, 1, 1], replay_teacher=[6, 6, 3], replay_batch=4,
                      lwf_weight=[5, 1, 1], ewc_lambda=[5, 5, 10], own_channels=[0, 128, 64],
                      shared_lr=[1, 1, 1]),
    # Shapes, learned from scratch: the teacher alone, since labels would be learned by heart
    "replay from scratch": dict(replay_weight=[0, 0, 0], replay_teacher=[1.6, 3.6, 1.6],
                                replay_batch=6, shared_lr=[1, 0.6, 0.2]),
    # Drift is corrected twice: softer springs, and shared layers that learn faster
    "ewc+lwf": dict(lwf_weight=[1, 0.3, 2], ewc_lambda=[0.5, 5, 10], shared_lr=[1, 2, 1]),
    "ewc+lwf from scratch": dict(shared_lr=[1, 1, 1]),  # twice that rate diverged
    "replay+lwf": dict(replay_teacher=[2, 2, 1], lwf_weight=[1, 2, 2]),
    # Nothing corrects the backbone's drift, other than in the mix: it stands still
    "isolation": dict(shared_lr=[1, 0, 0]),
    # Only the backbone is shared, held by replay (in Stage 2) and LwF: so it may follow detection
    "replay+lwf+isolation": dict(replay_weight=[1, 0, 0], replay_teacher=[2, 0, 0],
                                 lwf_weight=[1, 1, 1], own_channels=[0, 64, 64],
                                 shared_lr=[1, 2, 1]),
    "replay+lwf+isolation from scratch": dict(shared_lr=[1, 1, 1])}


class Remedy:
    """What a remedy does where it does not say otherwise: nothing."""
    stores_weights = False  # if it does, it cannot be joined with isolation, which adds weights

    def __init__(self, args):
        self.args = args
        self.losses = args.box_loss, args.conf_loss  # of detection

    def remember(self, task, model, samples):
        """Called after each stage but the last: stores what it needs of the model, or of the task's
        training set, a MiniSet."""

    def wants(self, task):
        """The old tasks whose outputs `penalty` needs for the new images of `task`."""
        return ()

    def penalty(self, task, model, images, out):
        """What a step of `task` adds to its loss -> scalar. images (B, 3, s, s), normalised; out:
        the outputs of `task` and of all that was wanted. No state: an interruption would lose it.
        """
        return 0.0


class Replay(Remedy):
    """Rehearsal (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal") with labels
    and the previous model's answers (DER++, Buzzega et al. 2020, arXiv:2004.07211, eq. 6).

        L = L_new + Σ_old (weight_old · L_old + teacher_old · D_old(outputs now, those before))

    on at most 10 stored images per old task, chosen once with the run's seed so that they cover the
    classes. Ten images are soon learned by heart; answers say more about each than its labels do.
    DER++ stores them; here each draw is another window, and so the previous model is asked anew.
    """

    def __init__(self, args):
        super().__init__(args)
        self.buffer, self.teacher = {}, None  # of each old task: a batch as in MiniSet
        self.weight = dict(zip(PAIRS, args.replay_weight))
        self.teaching = dict(zip(PAIRS, args.replay_teacher))

    def remember(self, task, model, samples):
        self.teacher = previous(model)
        if task in self.args.replay_tasks:
            labels = {i: set(samples.labels(i).tolist()) for i in range(len(samples))}
            order = cover(labels, random.Random(self.args.seed))
            chosen = torch.tensor(list(islice(order, self.args.replay_images)))
            self.buffer[task] = take(samples.batch, chosen, self.args.device)

    def penalty(self, task, model, images, out):
        total = 0.0
        for old, stored in self.buffer.items():
            weight, teaching = self.weight[task, old], self.teaching[task, old]
            if weight or teaching:
                drawn = torch.randperm(len(stored[0]))[:self.args.replay_batch]
                x, target = augment(*take(stored, drawn))
                now = model(x, (old,))
            if weight:
                total = total + weight * task_loss(old, now, target, *self.losses)
            if teaching:
                total = total + teaching * distance(old, now, self.teacher(x, (old,)))
        return total


class LwF(Remedy):
    """Learning without Forgetting (Li & Hoiem 2016, arXiv:1606.09282, eq. 1-3).

        L = L_new + Σ_old weight_old · D_old(outputs now, outputs of the previous model)

    The previous model teaches the old tasks on the images of the new one: no image is stored. Li &
    Hoiem's warm-up of the new output rows alone is left out. In the stage of classification, which
    itself reads the coarsest level alone, both models see the images in half size: all levels in
    full size would take almost three times as long as a plain step.
    """

    def __init__(self, args):
        super().__init__(args)
        self.weight = dict(zip(PAIRS, args.lwf_weight))

    def remember(self, task, model, samples):
        self.teacher = previous(model)

    def wants(self, task):
        return () if task == "cls" else TASKS[:TASKS.index(task)]

    def penalty(self, task, model, images, out):
        old_tasks = TASKS[:TASKS.index(task)]
        if not old_tasks:
            return 0.0
        if task == "cls":
            images = F.avg_pool2d(images, 2)  # (B, 3, s/2, s/2)
            out = model(images, old_tasks)
        taught = self.teacher(images, old_tasks)
        return sum(self.weight[task, old] * distance(old, out, taught) for old in old_tasks)


def previous(model):
    """A copy of the model that learns no more: the teacher of the next stage."""
    return deepcopy(model).eval().requires_grad_(False)


class EWC(Remedy):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3).

        L = L_new + Σ_old λ_old/2 Σ_i F_i (θ_i - θ*_i)²

    θ* are the weights at the end of the old task's stage, F the diagonal of its Fisher
    information, here the empirical one: at the true labels of its training images. Unlike in the
    paper F is divided by its mean (means differ thirtyfold by task): λ is the mean stiffness.
    """
    stores_weights = True

    def __init__(self, args):
        super().__init__(args)
        self.terms = {}  # of each old task: (F, θ*), each a vector of all weights
        self.stiffness = dict(zip(PAIRS, args.ewc_lambda))

    def remember(self, task, model, samples):
        fisher = self.importance(task, model, samples)
        fisher = fisher / fisher.mean().clamp(min=1e-30)  # 0/0 would be NaN
        self.terms[task] = fisher, flat(model.parameters()).detach()

    def importance(self, task, model, samples):
        """1/N Σ_n (∂L(image n) / ∂θ)² -> a vector. One training image at a time (the square
        of their mean gradient is another thing), augmented once, in eval mode."""
        fisher = torch.zeros_like(flat(model.parameters()))
        stored = take(samples.batch, slice(None), self.args.device)
        model.eval()
        for i in range(len(samples)):
            images, target = augment(*take(stored, slice(i, i + 1)))
            if task == "det" and (target["labels"] < 0).all():
                continue  # all objects left the window; a mean over none would outweigh all others
            model.zero_grad()
            task_loss(task, model(images, (task,)), target, *self.losses).backward()
            gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad
                            for p in model.parameters())
            fisher = fisher + gradient.square() / len(samples)
        return fisher

    def penalty(self, task, model, images, out):
        weights = flat(model.parameters())
        return sum(self.stiffness[task, old] / 2 * (fisher * (weights - anchor).square()).sum()
                   for old, (fisher, anchor) in self.terms.items())


def flat(tensors):
    """All values of some tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class Freeze(Remedy):
    """Feature extraction (Donahue et al. 2014, arXiv:1310.1531).

        θ_backbone (with `--freeze neck` θ_neck too) of Stages 2 and 3 = that of Stage 1

    BatchNorm statistics stop as well, even under `--bn live`: while they move, frozen weights
    protect nothing.
    """

    def remember(self, task, model, samples):
        model.features.requires_grad_(False)
        if self.args.freeze == "neck":
            model.neck.requires_grad_(False)
        model.fix_batchnorm()


class Isolation(Remedy):
    """Parameter isolation (Rusu et al. 2016, arXiv:1606.04671; Mallya & Lazebnik 2018,
    arXiv:1711.05769): a new task gets channels of its own in neck and hidden layer.

        y_old = f(x; θ_shared, θ_old)    y_new = f(x; θ_shared, θ_new)    θ_old is held

    Unlike in those papers new channels do not read old ones (`OneHead.widen`), which gained nothing
    here. θ_shared is the backbone: `--shared-lr` slows or stops it, other remedies may hold it.
    """

    def remember(self, task, model, samples):
        stage = TASKS.index(task) + 1  # the next one, from 0
        torch.manual_seed(self.args.seed)  # what ran before leaves no trace
        model.held = []  # a stage without channels of its own trains all that there are
        if self.args.own_channels[stage]:
            model.widen(self.args.own_channels[stage], TASKS[:stage])


# In the order in which they remember: freeze and isolation change the model, so they come last
REMEDIES = {"replay": Replay, "ewc": EWC, "lwf": LwF, "freeze": Freeze, "isolation": Isolation}


def strategy(text):
    """The type of `--strategy`: none, joint, or names of REMEDIES joined by +, in any order."""
    if text in ("none", "joint"):
        return text
    names = [name for name in REMEDIES if name in text.split("+")]
    if len(names) != len(text.split("+")):
        raise argparse.ArgumentTypeError(f"{text}: choose none, joint, or any of "
                                         f"{', '.join(REMEDIES)}, each once, joined by +")
    if "isolation" in names and any(REMEDIES[name].stores_weights for name in names):
        raise argparse.ArgumentTypeError(f"{text}: isolation widens the network, and stored "
                                         "weights do not fit any more; leave it out")
    return "+".join(names)


def build(args):
    """The remedies of args.strategy, in the order of REMEDIES."""
    return [REMEDIES[name](args) for name in args.strategy.split("+") if name in REMEDIES]


def default_strengths(strategy, weights):
    """The flags of STRENGTHS for a strategy and the initial weights (the value of --weights)."""
    flags, there = {}, {"otherwise", *strategy.split("+")}
    for row, values in STRENGTHS.items():
        names = row.removesuffix(" from scratch")
        if there.issuperset(names.split("+")) and (names == row or weights == "none"):
            flags |= values
    return flags
