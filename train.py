"""One network with one two-layer head learns three tasks one after another without forgetting.

    python train.py --strategy replay                     the challenge, on shapes or on data/
    python train.py --eval RUN/model.pt --data DIR        measures a saved model
    python train.py --predict RUN/model.pt PHOTO ...      looks at photos of yours
    python train.py --benchmark                           measures this machine
"""
import argparse
import ast
import hashlib
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

try:
    import resource
except ImportError:  # on Windows
    resource = None

import numpy as np
import PIL
import torch
import torchvision

from data import (FOLDERS, TASKS, MiniSet, UserError, augment, command, take, try_folder,
                  write_shapes)
from forgetting import REMEDIES, STRENGTHS, Replay, build, default_strengths, strategy
from losses import task_loss
from metrics import (NAMES, compare, digest, draw_curves, draw_examples, evaluate, evaluate_saved,
                     examples, judge, latency, load_run, predict, show, write_json)
from model import (BACKBONES, NECKS, NETWORK, OneHead, load_weights, read_checkpoint, save_model,
                   write_checkpoint)

# What depends on the data: shapes are learned from scratch, photos from an ImageNet backbone
RECIPES = {"shapes": dict(weights="none", image_size=128, epochs=[20, 20, 16],
                          lr=[2e-3, 2e-3, 1e-3], trunk_lr=[1.0, 1.0, 1.0], batch_size=16),
           "photos": dict(weights="imagenet", image_size=320, epochs=[20, 20, 15],
                          lr=[1e-3, 1e-3, 1e-3], trunk_lr=[0.05, 0.2, 0.05], batch_size=8)}
# Five published systems (see .assets/reports.md) as flags; what they leave open stays as it is
REPORTS = {
    None: {},
    0: dict(strategy="replay+ewc+freeze", taps=[12], neck="conv2", width=256, epochs=[5, 5, 5],
            box_loss="mse", replay_tasks=["seg"], replay_weight=[1, 1, 0],
            replay_teacher=[0, 0, 0], ewc_lambda=[5, 0, 0]),
    1: dict(strategy="replay", backbone="fast_scnn", neck="none", weights="none",
            trunk_lr=[1.0, 1.0, 1.0], shared_lr=[1, 1, 0.2], replay_weight=[1, 1, 1],
            replay_teacher=[0, 0, 0]),
    2: dict(strategy="replay", taps=[3, 6, 12], head_stride=8, epochs=[20, 20, 20],
            box_loss="mse", replay_tasks=["seg"], replay_batch=4, replay_weight=[0.8, 0.8, 0],
            replay_teacher=[0, 0, 0]),
    3: dict(strategy="ewc", taps=[12], neck="none", head_layers=3, epochs=[30, 30, 15],
            lr=[5e-4, 5e-4, 1e-4], box_loss="smooth_l1", ewc_lambda=[3, 5, 5]),
    4: dict(strategy="ewc", taps=[12], neck="conv1x1", width=160, hidden=160, head_stride=16,
            epochs=[10, 40, 10], box_loss="smooth_l1", conf_loss="focal", conf_warmup=10)}
SHAPES_DIR = ".shapes/v1"  # drawn on first use
WEIGHT_DECAY = 0.01
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# -- Command line
def numbers(low, high=math.inf, kind=float):
    """An argparse type: a number from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return kind(text)
    return number


class OneOrThree(argparse.Action):
    """One value for all, or one for each stage (or each pair of a stage and an old task)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) not in (1, 3):
            parser.error(f"{option_string}: give one value, or three")
        setattr(namespace, self.dest, values * (3 // len(values)))


THREE = {"nargs": "+", "action": OneOrThree, "metavar": "X"}


class Help(argparse.RawDescriptionHelpFormatter):
    """Ends a flag's help with its default, unless that depends on data and strategy: None."""

    def _get_help_string(self, action):
        known = not any(action.default is v for v in (None, False, argparse.SUPPRESS))
        return action.help + " (default: %(default)s)" * known


def make_parser():
    tables = [f"  {row:34}" + ", ".join(f"{flag} {value}" for flag, value in values.items())
              for row, values in (RECIPES | STRENGTHS).items()]
    parser = argparse.ArgumentParser(
        usage="python train.py [--flag VALUE ...]", description=__doc__,
        formatter_class=partial(Help, max_help_position=30),
        epilog="\n".join(["other defaults, by data and strategy:", *tables]))
    add = parser.add_argument_group("the run").add_argument
    add("--strategy", type=strategy, default="replay", help="against forgetting: none, any of "
        f"{', '.join(REMEDIES)} joined by +, or joint: all tasks at once; on photos use "
        "replay+lwf+isolation")
    add("--data", help="folder of the mini-sets, or 'shapes' (default: data/ if it is prepared)")
    add("--out", help="folder of the run (default: runs/[reportN-]STRATEGY-seedN; several seeds "
        "append -seedN); of --predict the folder, of --eval and --benchmark the JSON file to write")
    add("--seed", type=numbers(0, 2**32, int), nargs="+", default=[0],
        help="fixes everything random; several make a run each")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="where to compute")
    add("--eval-every", type=numbers(0, kind=int), default=5,
        help="epochs between measurements, for curves.png; 0: only at a stage's end")
    add("--report", type=int, choices=range(5), help="the flags of a published system, "
        "see .assets/reports.md; flags given as well override them")
    group = parser.add_argument_group("instead of training")
    add = group.add_mutually_exclusive_group().add_argument
    add("--eval", metavar="MODEL", help="measure this model.pt on --data's val split")
    add("--predict", nargs="+", metavar=("MODEL", "PHOTO"), help="find masks, boxes and class in "
        "photos or folders of them; writes annotated copies and JSON")
    add("--benchmark", action="store_true", help="measure size and speed on this machine")
    group.add_argument("--tasks", nargs="+", choices=[*TASKS, "all"], default=["all"],
                       help="which --eval measures")
    add_settings(parser)
    return parser


def add_settings(parser):
    """The flags that a published system or an experiment of one's own may change."""
    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=BACKBONES, default="mobilenet_v3_small", help="makes features")
    add("--taps", type=numbers(0, kind=int), nargs="+", help="blocks of the backbone that feed the "
        "neck, finest first (default: those in model.BACKBONES)")
    add("--neck", choices=NECKS, default="fpn", help="brings features to one width")
    add("--width", type=numbers(1, 1024, int), default=128, help="channels of the neck")
    add("--hidden", type=numbers(1, 1024, int), default=128, help="of the head's hidden layer")
    add("--head-layers", type=int, choices=[2, 3], default=2, help="3: two hidden, with BatchNorm")
    add("--head-stride", type=int, choices=[8, 16, 32],
        help="of the one map that the head reads (default: every level of the neck)")

    add = parser.add_argument_group("training (X: one value, or three: seg det cls)").add_argument
    add("--weights", help="of the backbone: imagenet, none, or a file that holds one")
    add("--image-size", type=numbers(32, 4096, int), help="pixels a side, a multiple of 32")
    add("--epochs", **THREE, type=numbers(1, kind=int), help="of each stage")
    add("--lr", **THREE, type=numbers(1e-9), help="peak learning rate of neck and head")
    add("--trunk-lr", **THREE, type=numbers(0), help="the backbone's share of it")
    add("--batch-size", type=numbers(1, kind=int), help="images a step")
    add("--box-loss", choices=["giou", "smooth_l1", "mse"], default="giou",
        help="of detection: giou of the box, or a distance of its four offsets")
    add("--conf-loss", choices=["bce", "focal"], default="bce", help="of detection; focal: gamma 1")
    add("--conf-warmup", type=numbers(0, kind=int), default=0, help="epochs of bce before focal")
    add("--bn", choices=["fixed", "live"], default="fixed",
        help="live: BatchNorm statistics follow every stage's images, which forgets")

    add = parser.add_argument_group("remedies (X: one value, or three: of seg in Stage 2, seg in "
                                    "Stage 3, det in Stage 3, or as said)").add_argument
    add("--replay-images", type=numbers(1, 10, int), default=10, help="stored per old task")
    add("--replay-tasks", nargs="+", choices=TASKS[:2], default=["seg", "det"],
        help="old tasks to replay")
    add("--replay-batch", type=numbers(1, kind=int), help="stored images per old task in a step")
    add("--replay-weight", **THREE, type=numbers(0), help="weight of their labels")
    add("--replay-teacher", **THREE, type=numbers(0), help="weight of old answers on them")
    add("--lwf-weight", **THREE, type=numbers(0), help="weight of old answers on new images")
    add("--ewc-lambda", **THREE, type=numbers(0), help="mean stiffness of the springs")
    add("--own-channels", **THREE, type=numbers(0, 512, int), help="of each stage: channels that "
        "`isolation` adds before it (none before the first); with 0 it holds none either")
    add("--shared-lr", **THREE, type=numbers(0), help="of each stage but the first: share of --lr "
        "for all but the output layer, or for the backbone alone if the stage has own channels")
    add("--freeze", choices=["trunk", "neck"], default="trunk",
        help="what `freeze` holds after Stage 1: the backbone, or backbone and neck")


def defaults_for(args):
    """{flag: its value if not given}, which depends on data, strategy and initial weights."""
    recipe = RECIPES["shapes" if args.data == SHAPES_DIR else "photos"]
    strengths = default_strengths(args.strategy, args.weights or recipe["weights"])
    return vars(make_parser().parse_args([])) | recipe | strengths | REPORTS[args.report]


def parse(argv):
    parser = make_parser()
    parser.set_defaults(**REPORTS[parser.parse_args(argv).report])  # other flags override them
    args = parser.parse_args(argv)
    if args.strategy == "joint" and (args.conf_warmup or args.benchmark):
        parser.error("--strategy joint: has no --conf-warmup and no --benchmark")
    if "isolation" in args.strategy.split("+") and (args.neck, args.head_layers) != ("fpn", 2):
        parser.error("--strategy: isolation widens an FPN and a head of two layers, no others")
    if args.image_size and args.image_size % 32:
        parser.error(f"--image-size {args.image_size}: must be a multiple of 32, the last stride")
    out = Path(args.out or "")
    if args.eval or args.benchmark:
        if args.out and (out.suffix != ".json" or out.is_dir()):
            parser.error(f"--out {out}: must be a .json file, but is not")
    elif out.is_file():
        parser.error(f"--out {out}: must be a folder, but is not")
    if not args.predict:
        args.data = find_data(args.data)
    for name, value in defaults_for(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def find_data(name):
    """The folder to train on. None: data/ if prepared, else the shapes, drawn on first use."""
    if name is None:
        if all((Path("data") / folder).is_dir() for folder in FOLDERS.values()):
            return "data"
        print("*** No photos in data/: using built-in SHAPES. For photos run data.py first. ***")
    elif name != "shapes" and Path(name) != Path(SHAPES_DIR):
        if not Path(name).is_dir():
            raise UserError(f"--data {name}: no such folder; run `python data.py --out {name}`.")
        return name
    if not Path(SHAPES_DIR).exists():
        print(f"Drawing the shapes into {SHAPES_DIR} ...")
        write_shapes(SHAPES_DIR)
    return SHAPES_DIR


# -- Training
def new_model(args):
    """The untrained model: the same for every training of one seed."""
    torch.manual_seed(args.seed)
    model = OneHead(**{name: getattr(args, name) for name in NETWORK})
    load_weights(model, args.weights)
    return model.to(args.device, memory_format=torch.channels_last)


def make_optimizer(model, task, args, shared_lr=1.0):
    """AdamW, whose groups carry their share of the learning rate. shared_lr: the share of what old
    tasks use too: all but the output layer or, where old channels are held, the backbone alone.

    Weight decay leaves out biases, BatchNorm and the output layer: there it would move the rows of
    tasks that get no gradient, a forgetting that no loss would see.
    """
    groups = {}  # {(share, decay): parameters}
    for name, parameter in model.named_parameters():
        output, backbone = name.startswith("head.2."), name.startswith("features.")
        decay = WEIGHT_DECAY if parameter.ndim > 1 and not output else 0.0
        share = 1.0 if output or (model.held and not backbone) else shared_lr
        if backbone:
            share *= args.trunk_lr[TASKS.index(task)]
        groups.setdefault((share, decay), []).append(parameter)
    return torch.optim.AdamW([{"params": parameters, "share": share, "weight_decay": decay}
                              for (share, decay), parameters in groups.items()], fused=True)


def learning_rate(step, total, peak):
    """The lower one of a linear warm-up over 5 % of the steps 1 to total and a cosine to 0."""
    return peak * min(step / (0.05 * total), 0.5 + 0.5 * math.cos(math.pi * step / total))


def train_step(model, task, batch, remedies, optimizer, scaler, losses=()):
    """One update -> (the task's loss, sum of the penalties). losses: --box-loss, --conf-loss."""
    images, target = batch
    wanted = {task, *(old for remedy in remedies for old in remedy.wants(task))}
    with torch.autocast(images.device.type, torch.float16, enabled=scaler.is_enabled()):
        out = model(images, wanted)
        loss = task_loss(task, out, target, *losses)
        penalty = loss.new_zeros(()) + sum(r.penalty(task, model, images, out) for r in remedies)
    optimizer.zero_grad()
    scaler.scale(loss + penalty).backward()
    scaler.step(optimizer)
    scaler.update()
    model.hold()
    return loss.item(), penalty.item()


def train_epoch(model, task, run, remedies, optimizer, scaler, epoch):
    """Shows every training image once -> (mean loss, mean penalty, last learning rate). Raises
    UserError, naming the images, if the loss is not finite."""
    args, stage, samples, sums = run.args, TASKS.index(task), run.train[task], np.zeros(2)
    batches = torch.randperm(len(samples), device=args.device).cpu().split(args.batch_size)
    losses = args.box_loss, (args.conf_loss if epoch > args.conf_warmup else "bce")
    model.train()
    for step, indices in enumerate(batches, (epoch - 1) * len(batches) + 1):
        lr = learning_rate(step, args.epochs[stage] * len(batches), args.lr[stage])
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        batch = augment(*take(samples.batch, indices, args.device))
        sums += train_step(model, task, batch, remedies, optimizer, scaler, losses)
        run.done += 1 / len(batches)
        if sys.stdout.isatty():
            done = step - (epoch - 1) * len(batches)
            print(f"\r{task} epoch {epoch:3}/{args.epochs[stage]}  loss {sums[0] / done:.4f}  "
                  f"[{'#' * (20 * done // len(batches)):20}]  {run.time_left()} left", end="\r",
                  flush=True)
        if not np.isfinite(sums).all():
            names = ", ".join(str(samples.paths[i]) for i in indices.tolist())
            raise UserError(f"{task}, epoch {epoch}: the loss is not finite on the images {names}; "
                            f"lower --lr (now {args.lr[stage]}) or look at them.")
    return *(sums / len(batches)).tolist(), lr


def train_stage(model, task, run, remedies=(), shared_lr=1.0, file=None, title="", measured=TASKS):
    """Trains `model` on one task, in place -> the stage's history, a dict for each epoch.

    Optimizer and schedule are fresh and randomness is seeded anew, so that what ran before leaves
    no trace. `file` keeps the state after each epoch: with it, the stage goes on where it stopped,
    and one that is complete trains nothing. title: what to print if something is trained; measured:
    tasks to evaluate every few epochs.
    """
    args, stage = run.args, TASKS.index(task)
    torch.manual_seed(1000 * args.seed + stage + 1)
    optimizer = make_optimizer(model, task, args, shared_lr)
    scaler = torch.amp.GradScaler("cuda", enabled="cuda" in args.device)  # for half precision
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    history = restore(file, parts) if file else []
    run.total -= len(history)
    if title and len(history) < args.epochs[stage]:
        print(title, flush=True)
    for epoch in range(len(history) + 1, args.epochs[stage] + 1):
        start = time.perf_counter()
        loss, penalty, lr = train_epoch(model, task, run, remedies, optimizer, scaler, epoch)
        speed = len(run.train[task]) / (time.perf_counter() - start)
        row = {"stage": stage + 1, "task": task, "epoch": epoch, "loss": loss, "penalty": penalty,
               "lr": lr, "images_per_s": speed}
        if epoch == args.epochs[stage] or (args.eval_every and epoch % args.eval_every == 0):
            row |= evaluate(model, {t: run.val[t] for t in measured}, args.device)
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        if file:
            keep(file, parts, history, args.device)
        print(f"{task} epoch {epoch:3}/{args.epochs[stage]}  loss {loss:.4f}  "
              f"penalty {penalty:.4f}  lr {lr:.1e}  {speed:.0f} images/s  {run.time_left()} left",
              flush=True)
    return history


def keep(file, parts, history, device):
    """Writes all that the rest of a stage depends on. parts: {name: what has a state_dict}."""
    states = {name: part.state_dict() for name, part in parts.items()}
    gpu = [torch.cuda.get_rng_state()] if "cuda" in device else []
    write_checkpoint(file, states | {"random": [torch.get_rng_state(), *gpu], "history": history})


def restore(file, parts):
    """Puts back what `keep` wrote -> the history; [] if there is no readable file."""
    try:
        saved = read_checkpoint(file)
    except UserError:
        return []
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    cpu, *gpu = saved["random"]
    torch.set_rng_state(cpu)
    for state in gpu:  # one, or none
        torch.cuda.set_rng_state(state)
    return saved["history"]


# -- The experiment
class Run:
    """What all trainings of one run share: its arguments, its data, and the time they take."""

    def __init__(self, args):
        self.args, self.start = args, time.perf_counter()
        self.train = {t: MiniSet(args.data, t, "train", args.image_size) for t in TASKS}
        self.classes = {t: self.train[t].classes for t in TASKS}
        self.val = {t: MiniSet(args.data, t, "val", args.image_size, self.classes[t])
                    for t in TASKS}
        for t in TASKS:
            if self.val[t].unknown:
                raise UserError(f"{args.data}: val has {t} classes that train lacks: "
                                f"{', '.join(self.val[t].unknown)}; add them or leave them out.")
            one_cell = args.image_size == 32 or args.backbone == "fast_scnn"  # in some maps
            if one_cell and (len(self.train[t]) - 1) % args.batch_size == 0:
                raise UserError(f"{t}'s last batch is one image, too few for BatchNorm on a map of "
                                "one cell; choose another --batch-size.")
        self.data = {t: digest(Path(args.data) / FOLDERS[t]) for t in TASKS}
        self.surroundings = surroundings(args)
        joint = args.strategy == "joint"
        self.tasks = TASKS[:1] if joint else TASKS  # of the stages
        self.starts_alone = args.bn == "fixed" and not joint  # Stage 1 is a baseline as well
        stages = args.epochs[1:] if self.starts_alone else args.epochs[:len(self.tasks)]
        self.done, self.total = 0, sum(args.epochs) + sum(stages)  # epochs

    def time_left(self):
        """What is left at the mean pace of the epochs done, as minutes:seconds."""
        pace = (time.perf_counter() - self.start) / self.done
        left = round(pace * max(0, self.total - self.done))
        return f"{left // 60}:{left % 60:02}"


def code_digest(*modules):
    """A hash of the code of some modules, as parsed: comments do not change it, docstrings do."""
    files = (Path(__file__).with_name(f"{name}.py") for name in modules)
    parsed = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256("".join(parsed).encode()).hexdigest()


def surroundings(args):
    """What a training depends on besides its arguments and its data, but for the remedies' code."""
    weights = digest(args.weights) if Path(args.weights).is_file() else args.weights
    return [weights, code_digest("train", "model", "data", "losses", "metrics"),
            torch.get_num_threads(), torch.__version__, torchvision.__version__, PIL.__version__]


def train_alone(task, run):
    """The baseline: the initial model trained on one task with its stage's settings, but for what
    belongs to strategies -> (model, history). Kept beside the runs, in a file whose name hashes
    all that influences it; one that cannot be read is replaced."""
    args, stage = run.args, TASKS.index(task)
    key = [task, args.epochs[stage], args.lr[stage], args.trunk_lr[stage], run.data, args.seed,
           args.image_size, args.batch_size, args.device, args.eval_every, run.surroundings,
           args.box_loss, args.conf_loss, args.conf_warmup, *(getattr(args, n) for n in NETWORK)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    whole = Path(args.out).parent / ".baselines" / f"{task}-{name}.pt"
    own = Path(args.out) / f"stage-{task}-alone.pt"  # no other run writes there
    model = new_model(args)
    file = whole if whole.exists() else own
    measured = TASKS if task == TASKS[0] else [task]  # segmentation's is Stage 1 as well
    history = train_stage(model, task, run, file=file, title=f"Baseline: {task} alone",
                          measured=measured)
    if file == own:
        own.replace(whole)
    return model, history


def all_at_once(run):
    """Multitask learning (Caruana 1997), often the upper target: L = L_seg + L_det + L_cls
    -> the remedies that turn Stage 1 into it: they replay the other training sets, in proportion
    to their epochs, so that an image is seen about as often as in its own stage. All learn at the
    rates of Stage 1."""
    args, remedies = run.args, []
    for task, epochs in zip(TASKS[1:], args.epochs[1:]):
        images = max(1, round(args.batch_size * epochs / args.epochs[0]))
        replay = Replay(argparse.Namespace(**vars(args) | {"replay_batch": images}))
        replay.weight["seg", task], replay.teaching["seg", task] = 1.0, 0.0
        replay.buffer[task] = take(run.train[task].batch, slice(None), args.device)
        remedies.append(replay)
    return remedies


def run_stages(run, baselines):
    """The protocol: for each stage train, measure every task, remember -> (model, history,
    {text: what it sees in `examples`} after each stage). Joint training has the first one only."""
    args, history, strips = run.args, [], {}
    joint = args.strategy == "joint"
    remedies = all_at_once(run) if joint else build(args)
    model = new_model(args)
    if args.bn == "live":
        model.fix_batchnorm([])
    for stage, task in enumerate(run.tasks):
        if stage == 0 and run.starts_alone:
            alone, rows = baselines[task]
            model.load_state_dict(alone.state_dict())
            history += [dict(row) for row in rows]
        else:
            shared_lr = args.shared_lr[stage] if stage else 1.0
            file = Path(args.out) / f"stage{stage + 1}.pt"
            history += train_stage(model, task, run, remedies, shared_lr, file,
                                   f"Stage {stage + 1}: {'all at once' if joint else task}")
        if args.bn == "fixed":
            model.fix_batchnorm()
        save_model(Path(args.out) / "model.pt", model, args.image_size, run.classes)
        print(f"after stage {stage + 1}: "
              + ", ".join(f"{NAMES[t]} {history[-1][t]:.3f}" for t in TASKS), flush=True)
        strips[f"after Stage {stage + 1}"] = examples(run.val, run.classes, model)
        if task != run.tasks[-1]:
            start = time.perf_counter()
            for remedy in remedies:
                remedy.remember(task, model, run.train[task])
            history[-1]["seconds"] += time.perf_counter() - start
    return model, history, strips


def finish(run, baselines, model, history, strips):
    """Judges a run, writes results.json and the pictures and prints the table -> results."""
    args = run.args
    ends = [row for row in history if row["epoch"] == args.epochs[row["stage"] - 1]]
    matrix = [{t: row[t] for t in TASKS} for row in ends]
    results = {
        "args": vars(args), "defaults": defaults_for(args),
        "data": {"folder": args.data, "sha256": run.data}, "classes": run.classes,
        "params": sum(p.numel() for p in model.parameters()),
        "latency_ms": float(np.median(latency(model, args.device))),
        "seconds": {"baselines": sum(row["seconds"] for _, rows in baselines.values()
                                     for row in rows),
                    "stages": sum(row["seconds"] for row in history)},
        "device": f"{args.device}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "tasks": TASKS, "metrics": NAMES, "matrix": matrix, "final": matrix[-1],
        "baseline": {t: rows[-1][t] for t, (_, rows) in baselines.items()},
        "map_50_95": history[-1]["map_50_95"], "history": history}
    judge(results)
    draw_curves(results, Path(args.out) / "curves.png")
    strips["truth"] = examples(run.val, run.classes)
    draw_examples(strips, Path(args.out) / "predictions.png")
    write_json(Path(args.out) / "results.json", results)
    print(f"\n{show(results)}\nresults.json, model.pt and the pictures are in {args.out}")
    return results


def run_seed(args):
    """One run of one seed -> its results. A finished one is not repeated, an interrupted one goes
    on from the files of its stages; UserError if either had other arguments or data."""
    this, out = Run(args), Path(args.out)
    now = vars(args) | {"data": this.data}
    stages = list(out.glob("stage*.pt"))
    finished = load_run(out) if (out / "results.json").exists() else None
    if finished:
        then = finished["args"] | {"data": finished["data"]["sha256"]}
    else:
        try:
            then = dict(json.loads((out / "args.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # nothing there, or nothing readable
            then = {}
    other = ", ".join(key for key in now if key != "out" and then.get(key) != now[key])
    if other and then and (finished or stages):
        raise UserError(f"--out {out}: holds a run with another {other}; name another folder, or "
                        "delete that one.")
    now["surroundings"] = [*this.surroundings, code_digest("forgetting")]
    if finished or then.get("surroundings") != now["surroundings"]:
        for file in stages:  # left by an interruption just before the end, or of another code
            file.unlink()
    if finished:
        print(f"{out} is finished already (after a change of the code delete it to train anew):\n"
              f"{show(finished)}")
        return finished
    try_folder(out.parent / ".baselines")
    write_json(out / "args.json", now)
    print(f"{args.strategy} on {args.data} at {args.image_size} px, seed {args.seed}, "
          f"{args.device}; results go to {out}", flush=True)
    baselines = {t: train_alone(t, this) for t in TASKS}
    results = finish(this, baselines, *run_stages(this, baselines))
    for file in out.glob("stage*.pt"):
        file.unlink()
    return results


def benchmark(args):
    """Measures size and speed on this machine -> the dict that it prints and writes. images/s are
    those of the new task in one epoch of its stage, with the remedies of --strategy."""
    file = Path(args.out or "benchmark.json")
    try_folder(file.parent)
    this, speed = Run(argparse.Namespace(**vars(args) | {"epochs": [1] * 3, "seed": 0})), {}
    this.total = len(TASKS)  # epochs, without baselines
    model, remedies = new_model(this.args), build(this.args)
    for task in TASKS:
        speed[task] = train_stage(model, task, this, remedies)[-1]["images_per_s"]
        if args.bn == "fixed":
            model.fix_batchnorm()
        for remedy in remedies if task != TASKS[-1] else ():
            remedy.remember(task, model, this.train[task])
    p50, p95 = np.percentile(latency(model, args.device), (50, 95))
    if "cuda" in args.device:
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:  # of the process, in bytes on macOS, in KiB on Linux
        unit = 2**30 if sys.platform == "darwin" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0.0
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {p50:.0f} ms for a 512×512 image (p95 {p95:.0f}), "
          f"peak memory {memory:.2f} GiB, training images/s: "
          + ", ".join(f"{task} {value:.1f}" for task, value in speed.items()))
    result = {"args": vars(args), "torch": torch.__version__, "parameters": parameters,
              "latency_ms": {"p50": p50, "p95": p95}, "images_per_s": speed,
              "peak_memory_gib": memory}
    write_json(file, result)
    return result


def main(argv=None):
    """Runs the command line -> the results, a list of them for several seeds. See `--help`."""
    args = parse(argv)
    torch.backends.cudnn.benchmark = True  # few sizes of batches: let cuDNN find fast kernels
    if args.eval:
        return evaluate_saved(args)
    if args.predict:
        return predict(args)
    if args.benchmark:
        return benchmark(args)
    report = "" if args.report is None else f"report{args.report}-"
    out = args.out or f"runs/{report}{args.strategy}"
    seeds = list(dict.fromkeys(args.seed))
    folders = [out] if args.out and len(args.seed) == 1 else [f"{out}-seed{seed}" for seed in seeds]
    results = [run_seed(argparse.Namespace(**vars(args) | {"seed": seed, "out": folder}))
               for seed, folder in zip(seeds, folders)]
    if len(results) == 1:
        return results[0]
    print(f"\n{compare(folders)}")
    return results


if __name__ == "__main__":
    command(main)
