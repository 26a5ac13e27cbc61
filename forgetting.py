"""Remedies against forgetting, each a small class. `--strategy` names one, or several joined with +.

    acts on    class            what it adds to a step of a later stage
    data       Replay, Joint    batches()                        old images beside the new ones
    outputs    LwF              output_loss(model, images, out)  the previous model's answers, to be kept
    weights    EWC              pull(model, progress)            a spring that holds what old tasks need
    weights    Freeze           nothing: the trunk, or trunk and neck, stop learning

All of them get remember(task, model, samples) after the stage of `task`, if another stage follows.
"""
import random
from copy import deepcopy
from itertools import islice

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert
from torchvision.utils import make_grid

from data import TASKS, UserError, draw
from losses import giou_loss, task_loss
from model import augment, take


class Remedy:
    """What a remedy does where it does not say otherwise: nothing."""

    outputs = ()  # the tasks whose outputs output_loss compares,
    tiled = False  # and whether of the new images it compares mosaics only: then their `out` holds the new task alone
    sizes = {}  # images that a step draws, by task

    def __init__(self, args):
        self.args = args

    def remember(self, task, model, samples):
        pass

    def batches(self):
        """Further batches of this step: [(task, images, target, weight of its loss)]."""
        return []

    def output_loss(self, model, images, out):
        """Called for every batch of a step, and weighed by its share of the step's images. out: what `model` says."""
        return 0.0

    def pull(self, model, progress):
        """A penalty on the weights: adds its gradient to theirs, between backward and update, and returns it. By hand,
        as autograd takes several times as long. progress: the share of the stage that is done, in (0, 1]."""
        return 0.0


class Replay(Remedy):
    """Rehearsal from a buffer (Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal").

        L = L_new + weight · Σ_old L_old(images from the buffer)

    At most 10 images per old task, chosen once with the run's seed so that they cover the classes, stored without
    augmentation and augmented anew on each draw.
    """

    def __init__(self, args):
        super().__init__(args)
        self.buffer, self.keep, self.weight = {}, args.replay_images, args.replay_weight
        self.sizes = {t: min(args.replay_batch, args.replay_images) for t in args.replay_tasks}

    def remember(self, task, model, samples):
        if task not in self.sizes:
            return
        labels = {i: {*samples.labels(i).tolist()} for i in range(len(samples))}
        chosen = islice(draw(labels, random.Random(self.args.seed)), self.keep)
        self.buffer[task] = take(samples.batch, torch.tensor([*chosen]), self.args.device)

    def batches(self):
        drawn = {t: torch.randperm(len(stored[0]), device=self.args.device)[:self.sizes[t]]
                 for t, stored in self.buffer.items()}
        return [(t, *augment(*take(self.buffer[t], chosen)), self.weight) for t, chosen in drawn.items()]


class Joint(Replay):
    """Not a remedy but the upper target, multitask learning (Caruana 1997): L = L_seg + L_det + L_cls.

    One stage over all tasks, each step with images of the three, from the whole training sets, which remember() gets
    beforehand. Epochs and learning rate are those of Stage 1, the shares of a step those of the stages' epochs, so that
    each task's images are seen about as often as in its own stage, if the sets are of one size. From scratch BatchNorm
    learns a mean of the tasks: joint training is the upper target of photos, whose pretrained statistics are fixed.
    """

    def __init__(self, args):
        super().__init__(args)
        self.keep, self.weight = None, 1.0
        self.sizes = {t: max(1, round(args.batch_size * n / args.epochs[0]))
                      for t, n in zip(TASKS[1:], args.epochs[1:])}


def mosaics(images):
    """Fours of images at half size, 2 by 2: (B, 3, H, W) -> (ceil(B / 4), 3, H, W), where the last may repeat some."""
    tiles = F.avg_pool2d(images, 2)  # (B, 3, H/2, W/2)
    fours = [[tiles[i % len(tiles)] for i in range(start, start + 4)] for start in range(0, len(tiles), 4)]
    return torch.stack([make_grid(four, nrow=2, padding=0) for four in fours])  # (ceil(B / 4), 3, H, W)


class LwF(Remedy):
    """Learning without Forgetting (Li & Hoiem 2016, arXiv:1606.09282, eq. 1-3; Hinton et al. 2015, arXiv:1503.02531).

        L = L_new + Σ_old weight_old · D_old(outputs of the previous model, outputs now)

    The teacher is the model as the last stage left it. It needs no stored image: both see the images of the new task,
    and those that `replay` draws, if it takes part. D is KL: for segmentation a mean over the cells of stride 8, in
    which what the teacher takes for an object weighs up to five times as much as background; for detection summed over
    all cells, weighed for box and class by the teacher's confidence, and divided by the sum of these confidences. Li &
    Hoiem's warm-up of the new rows alone is left out. In Stage 3 teacher and student see, in every second step and with
    twice the weight, the new images at half size in `mosaics` of four: an image that needs the teacher and all pyramid
    levels takes several times as long as one that is only classified, and smaller objects are what detection has
    learned. With live BatchNorm, whose statistics mosaics would bend, they see the batch itself in every step.
    """

    def __init__(self, args):
        super().__init__(args)
        self.teacher, self.steps = None, 0

    def remember(self, task, model, samples):
        self.teacher, self.outputs = deepcopy(model).eval().requires_grad_(False), (*self.outputs, task)
        self.tiled = task == "det" and self.args.bn == "fixed"

    def divergence(self, logits, taught, dim):
        """T² · KL(teacher ‖ student) of logits softened by the temperature T, over `dim` (Hinton, section 2)."""
        t = self.args.lwf_temperature
        now, then = (logits / t).log_softmax(dim), (taught / t).log_softmax(dim)
        return t * t * (then.exp() * (then - now)).sum(dim)

    def distance(self, task, out, taught):
        """D of one task, >= 0, and 0 where `out` = `taught`: both (B, 21, h, w) or (B, N, 15)."""
        if task == "seg":  # background, most of every photo, is one class of 21 in the mIoU
            weight = 1 + 4 * (1 - taught.softmax(1)[:, 0])  # (B, h, w)
            return (weight * self.divergence(out, taught, 1)).sum() / weight.sum()
        (now, then), confidence = (v[..., 4] for v in (out, taught)), taught[..., 4].sigmoid()  # each (B, N)
        kept = F.binary_cross_entropy_with_logits(now, confidence, reduction="none")
        kept = kept - F.binary_cross_entropy_with_logits(then, confidence, reduction="none")  # less the entropy: KL
        boxes = giou_loss(*(box_convert(v[..., :4], "cxcywh", "xyxy") for v in (out, taught)))  # (B, N)
        classes = self.divergence(out[..., 5:], taught[..., 5:], 2)  # (B, N)
        return (kept + confidence * (2 * boxes + classes)).sum() / confidence.sum().clamp(min=1)

    def output_loss(self, model, images, out):
        if not self.outputs:  # Stage 1
            return 0.0
        if "seg" not in out:  # the new images of Stage 3, which were classified only
            self.steps += 1
            if self.steps % 2 == 0:
                return 0.0
            seen = mosaics(images)  # (ceil(B / 4), 3, H, W)
            return 2 * self.output_loss(model, seen, model(seen, self.outputs, upsample=False))
        with torch.no_grad():
            taught = self.teacher(images, self.outputs, upsample=False)
        weights = self.args.lwf_weight[len(self.outputs) - 1:]  # Stage 2: [0], Stage 3: [1, 2]
        return sum(weight * self.distance(t, out[t].float(), taught[t].float())
                   for weight, t in zip(weights, self.outputs))


class EWC(Remedy):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3), one term for each old task.

        L = L_new + Σ_old λ/2 Σ_i F_i (θ_i - θ*_i)²       F_i = f_i / mean(f)    f_i = 1/n Σ_n (∂L_old(image n) / ∂θ_i)²

    θ* are the weights at the end of the old task's stage, f the diagonal of its empirical Fisher information: squared
    gradients of one training image at a time (a square of a mean over images would be another thing), augmented once,
    at its true labels, in eval mode. An image is one observation, the task's own loss its negative log-likelihood: a
    mean over pixels, or over objects, as neighbouring pixels are far from independent. The division by the mean over
    all weights is ours, not the paper's: that mean differs thirtyfold between tasks, and more than halved for seg from
    192 px, 20 epochs to 320 px, 40 epochs. λ, one or three (seg in Stage 2; seg, det in Stage 3), is a mean stiffness.
    """

    def __init__(self, args):
        super().__init__(args)
        self.terms = {}  # of each old task: √F and θ*, two lists of tensors like the model's parameters

    def remember(self, task, model, samples):
        early, late, det = self.args.ewc_lambda
        self.lambdas = {"seg": early} if task == "seg" else {"seg": late, "det": det}  # of the stage that follows
        if not any((early, late) if task == "seg" else (det,)):
            return  # a spring that never pulls: spare the pass over all images
        parameters, stored = list(model.parameters()), take(samples.batch, slice(None), self.args.device)
        fisher = [torch.zeros_like(p) for p in parameters]
        model.eval()
        for i in range(len(samples)):
            images, target = augment(*take(stored, slice(i, i + 1)))
            if task == "det" and (target["labels"] < 0).all():
                continue  # a mean over no objects would here be a sum over all cells, and outweigh all other images
            loss = task_loss(task, model(images, (task,), upsample=False), target, model.locations(images))
            model.zero_grad()
            loss.backward()
            for f, p in zip(fisher, parameters):
                f += 0 if p.grad is None else p.grad.square() / len(samples)
        model.zero_grad()
        mean = torch.cat([f.flatten() for f in fisher]).mean().clamp(min=1e-30)  # clamp: 0/0 would be NaN
        self.terms[task] = [(f / mean).sqrt() for f in fisher], [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def pull(self, model, progress):
        penalty = 0.0
        for task, term in self.terms.items():
            strength = self.lambdas[task] * (progress if self.args.ewc_ramp else 1.0)
            if not strength:
                continue
            learning = [(p, root, anchor) for p, root, anchor in zip(model.parameters(), *term) if p.requires_grad]
            parameters, roots, anchors = (list(column) for column in zip(*learning))  # without frozen ones
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            # With s = √F (θ - θ*), the penalty is λ/2 Σ s² and its gradient λ √F s. Each call below handles all
            # tensors: there are 154, most of them tiny, and calling for each would take longer than the arithmetic.
            # (torch.foreach, the public name of these functions, is missing from older versions of torch.)
            stretched = torch._foreach_sub(parameters, anchors)
            torch._foreach_mul_(stretched, roots)
            torch._foreach_addcmul_([p.grad for p in parameters], roots, stretched, value=strength)
            penalty += strength / 2 * torch.stack(torch._foreach_norm(stretched)).square().sum()
        return penalty


class Freeze(Remedy):
    """Feature extraction (Donahue et al. 2014, arXiv:1310.1531; so called in Li & Hoiem 2016, section 2).

        θ_trunk (with `--freeze neck` θ_neck too) of Stages 2 and 3 = that of Stage 1

    Their BatchNorm statistics stay as they are, under `--bn live` too: weights that are frozen below statistics that
    move protect nothing.
    """

    def remember(self, task, model, samples):
        parts = ("features.", "fpn.")[:1 + (self.args.freeze == "neck")]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(parts))
        model.fix_batchnorm()  # all of it stands in the trunk


REMEDIES = {"replay": Replay, "lwf": LwF, "ewc": EWC, "freeze": Freeze}


def add_flags(add):
    """The remedies' own flags. `add`: an ArgumentParser's add_argument."""
    add("--replay-images", type=int, default=10, help="stored images per old task, 1 to 10 (default: %(default)s)")
    add("--replay-tasks", nargs="+", choices=TASKS[:2], default=list(TASKS[:2]), help="old tasks to replay (default: "
        "both)")
    add("--replay-batch", type=int, default=4, help="stored images per old task a step (default: %(default)s)")
    add("--replay-weight", type=float, default=1.0, help="weight of a replayed task's loss (default: %(default)s)")
    add("--lwf-weight", type=float, nargs="+", help="weight of the distance to the old outputs: one value, or three "
        "for seg in Stage 2, seg in Stage 3, det in Stage 3 (default: 1 0.3 2 beside ewc, else 5 1 1)")
    add("--lwf-temperature", type=float, default=2.0, help="softens the outputs it compares (default: %(default)s)")
    add("--ewc-lambda", type=float, nargs="+", help="mean stiffness of EWC's springs: one value, or three as above "
        "(default: 0.5 5 10 beside lwf, else 5 5 10)")
    add("--ewc-ramp", action="store_true", help="let EWC's weight grow from 0 to its full value within each stage")
    add("--freeze", choices=["trunk", "neck"], default="trunk", help="what `freeze` holds after Stage 1: the trunk, or "
        "trunk and neck (default: %(default)s)")


def preset(strategy, weights):
    """Defaults that depend on the strategy. Stage 2: beside LwF, EWC can be softer, and the shared layers can learn
    twice as fast, as drift is corrected twice (from scratch the doubled rate diverged). Stage 3: a stiff spring draws
    segmentation back to what Stage 1 left, which LwF's teacher, the model after Stage 2, cannot."""
    if "ewc" in strategy and "lwf" in strategy:
        rate = 1.0 if weights == "none" else 2.0
        return {"lwf_weight": [1.0, 0.3, 2.0], "ewc_lambda": [0.5, 5.0, 10.0], "shared_lr": [1.0, rate, 1.0]}
    return {"lwf_weight": [5.0, 1.0, 1.0], "ewc_lambda": [5.0, 5.0, 10.0], "shared_lr": [1.0, 1.0, 1.0]}


def build(args):
    """The remedies of `--strategy`: "none", "joint", or names joined with +, as in "replay+lwf" -> list of objects.

    Raises UserError for an unknown name, and for flags of theirs that are out of range.
    """
    if not 1 <= args.replay_images <= 10:
        raise UserError(f"--replay-images {args.replay_images}: the rules allow at most 10 stored images per old task.")
    if args.replay_batch < 1:
        raise UserError(f"--replay-batch {args.replay_batch}: must be at least 1.")
    if args.replay_weight < 0:
        raise UserError(f"--replay-weight {args.replay_weight}: must not be negative.")
    if args.lwf_temperature <= 0:
        raise UserError(f"--lwf-temperature {args.lwf_temperature}: must be above 0.")
    if args.strategy == "joint":
        return [Joint(args)]
    names = [] if args.strategy == "none" else args.strategy.split("+")
    for name in names:
        if name not in REMEDIES or names.count(name) > 1:
            raise UserError(f"--strategy {args.strategy}: '{name}' is unknown, repeated or not to be joined; choose "
                            f"none, joint, or any of {', '.join(REMEDIES)} joined with +.")
    return [remedy(args) for name, remedy in REMEDIES.items() if name in names]  # in this order: EWC before Freeze acts


def images_per_epoch(args, n, others, remedies):
    """Training images of one epoch over n of the current task, those that remedies draw of the `others` included."""
    return n + -(-n // args.batch_size) * sum(size for r in remedies for t, size in r.sizes.items() if t in others)
