"""Unified-OneHead: one network with one two-layer head learns three tasks one after another without forgetting.

    python train.py --strategy replay                         the whole challenge, on built-in shapes or on data/
    python train.py --eval RUN/model.pt --data DIR --tasks all                        measures a saved model
    python train.py --benchmark                               measures this machine
"""
import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import PIL
import torch
import torchvision

from data import FOLDERS, TASKS, MiniSet, UserError, draw_shapes
from forgetting import REMEDIES, add_flags, build, images_per_epoch, preset
from losses import task_loss
from metrics import (NAMES, Clock, acting, benchmark, compare, device_name, digest, duration, evaluate, evaluate_saved,
                     interleaved, judge, latencies, load_run, show, write_json)
from model import OneHead, augment, load_weights, save_model, take

# What depends on the data: drawn shapes are learned from scratch in minutes, photos from an ImageNet trunk.
DEFAULTS = {"shapes": dict(weights="none", image_size=96, epochs=[22, 22, 16], lr=[2e-3, 2e-3, 1e-3],
                           trunk_lr=[1.0] * 3, batch_size=16),
            "photos": dict(weights="imagenet", image_size=320, epochs=[40, 40, 15], lr=[1e-3],
                           trunk_lr=[0.2, 0.2, 0.05], batch_size=8)}
SHAPES_DIR = ".shapes/v1"  # drawn on first use


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--strategy", default="replay", help=f"against forgetting: none, {', '.join(REMEDIES)}, several of them "
        "joined with +, or joint, which trains all tasks at once as the upper target (default: %(default)s)")
    add("--data", help="folder of the mini-sets, or 'shapes' (default: data/ if prepared, else shapes)")
    add("--out", help="folder of this run, new or unfinished (default: runs/STRATEGY-seedN); with --eval or "
        "--benchmark the JSON file to write (default: eval.json beside the model, benchmark.json)")
    add("--seed", type=int, default=0, help="fixes everything random (default: %(default)s)")
    add("--seeds", type=int, nargs="+", help="one run for each of these seeds; -seedN is appended to --out, and "
        "finished ones are skipped")
    add("--device", default="auto", help="auto, cpu or cuda; auto takes CUDA where there is one (default: %(default)s)")
    add("--weights", help="initial weights: imagenet (torchvision's trunk), none, or a .pth/.pt file "
        "(default: imagenet for photos, none for shapes)")
    add("--image-size", type=int, help="pixels of the square images, a multiple of 32 (default: 96 shapes, 320 photos)")
    add("--epochs", type=int, nargs="+", help="one value, or three for seg det cls "
        "(default: 22 22 16 for shapes, 40 40 15 for photos)")
    add("--lr", type=float, nargs="+", help="peak learning rate of neck and head, one value or three "
        "(default: 0.002 0.002 0.001 for shapes, 0.001 for photos)")
    add("--trunk-lr", type=float, nargs="+", help="the trunk's share of --lr (default: 1; photos: 0.2 0.2 0.05)")
    add("--shared-lr", type=float, nargs="+", help="share of --lr for trunk, neck and the head's first layer: one "
        "value or three; Stage 1 keeps 1 (default: 1; ewc with lwf from pretrained weights 1 2 1)")
    add("--batch-size", type=int, help="images of the current task a step (default: 16 shapes, 8 photos)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on all but the output layer (default: %(default)s)")
    add("--bn", choices=["fixed", "live"], default="fixed", help="fixed: BatchNorm statistics are kept once learned; "
        "live: they follow every stage's images, for comparison (default: %(default)s)")
    add_flags(add)
    add("--eval-every", type=int, default=0, help="epochs between measurements, for display (default: a stage's end)")
    add("--tasks", nargs="+", choices=[*TASKS, "all"], default=["all"], help="with --eval: which (default: all)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--eval", metavar="MODEL", help="measure this model.pt on the val split of --data instead of training")
    add("--benchmark", action="store_true", help="measure parameters, latency, training speed, memory and the cost of "
        "--strategy on this machine instead of training")
    args = parser.parse_args(argv)
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: there is no such device here; use --device cpu.")
    file = bool(args.eval or args.benchmark)
    if args.out and (Path(args.out).is_dir() or Path(args.out).suffix != ".json" if file else Path(args.out).is_file()):
        raise UserError(f"--out {args.out}: must be a {'.json file' if file else 'folder'}, but is not; name another.")
    if args.eval and not Path(args.eval).is_file():
        raise UserError(f"--eval {args.eval}: no such file; name the model.pt of a finished run.")
    args.data = find_data(args.data)
    if args.eval:
        return args
    defaults = DEFAULTS["shapes" if args.data == SHAPES_DIR else "photos"]
    for name, value in (defaults | preset(args.strategy, args.weights or defaults["weights"])).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in dict(epochs=1, lr=1e-9, trunk_lr=0, shared_lr=0, lwf_weight=0, ewc_lambda=0).items():
        values = getattr(args, name)
        if len(values) not in (1, 3) or min(values) < least:
            raise UserError(f"--{name.replace('_', '-')} {values}: give one value, or three, of at least {least}.")
        setattr(args, name, values * (3 // len(values)))
    args.shared_lr[0] = 1.0  # Stage 1 is the baseline of its task
    if args.image_size < 32 or args.image_size % 32:
        raise UserError(f"--image-size {args.image_size}: must be a multiple of 32, the coarsest stride.")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1.")
    if args.benchmark and args.strategy == "joint":
        raise UserError("--benchmark --strategy joint: joint training has no step of its own; name another strategy.")
    args.out = str(Path(args.out or ("benchmark.json" if args.benchmark else
                                     f"runs/{args.strategy}" + f"-seed{args.seed}" * (not args.seeds))))
    if (Path(args.out) / "results.json").exists() and not args.seeds:
        raise UserError(f"--out {args.out}: holds a finished run; name another folder, or delete that one.")
    return args


def find_data(name):
    """The folder to train on. None: data/ where it is prepared, else the shapes, drawn on first use."""
    if name is None and all((Path("data") / folder).is_dir() for folder in FOLDERS.values()):
        return "data"
    if name not in (None, "shapes"):
        if not Path(name).is_dir():
            raise UserError(f"--data {name}: no such folder; prepare it with `python data.py --out {name}`.")
        return name
    if name is None:
        print("*** No photos in data/: using the built-in SHAPES. For photos run `python data.py` first. ***")
    if not Path(SHAPES_DIR).exists():
        print(f"Drawing the shapes into {SHAPES_DIR} ...")
        draw_shapes(SHAPES_DIR)
    return SHAPES_DIR


def new_model(args):
    """The untrained model: the same for every training of one seed."""
    torch.manual_seed(args.seed)
    model = OneHead()
    load_weights(model, args.weights)
    return model.to(args.device, memory_format=torch.channels_last)


def make_optimizer(model, task, args, shared_lr=1.0):
    """AdamW, whose groups carry their share of the learning rate, and the scaler that keeps the gradients of half
    precision (on a GPU) from underflowing. Both work without waiting for a GPU. shared_lr: the share of all but the
    output layer, whose rows belong to one task each.
    Weight decay leaves out biases, BatchNorm and the output layer: there it would move the rows of tasks that get
    no gradient, and an old task's rows must stay bit-identical through a stage that does not touch them.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        output, trunk = name.startswith("head.2."), name.startswith("features.")
        decay = args.weight_decay if parameter.ndim > 1 and not output else 0.0
        share = 1.0 if output else shared_lr * (args.trunk_lr[TASKS.index(task)] if trunk else 1.0)
        groups.setdefault((share, decay), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": parameters, "share": share, "weight_decay": decay}
                                   for (share, decay), parameters in groups.items()], fused=True)
    return optimizer, torch.amp.GradScaler("cuda", enabled="cuda" in args.device)


def train_step(model, task, images, target, remedies, optimizer, scaler, progress=1.0):
    """One update -> (loss of the current task, penalty: all that remedies add), detached and left on the device:
    reading them would make a GPU wait. progress: the share of the stage that is done, in (0, 1]."""
    batches = [(task, images, target, 1.0), *(batch for r in remedies for batch in r.batches())]
    asked, tiled = {old for r in remedies for old in r.outputs}, any(r.tiled for r in remedies)
    with torch.autocast(images.device.type, torch.float16, enabled=scaler.is_enabled()):
        losses, penalty = [], torch.zeros((), device=images.device)
        for t, x, y, weight in batches:
            apart = tiled and t == task  # then a remedy asks for the old tasks itself, on mosaics
            out = model(x, {t} if apart else {t, *asked}, upsample=False)
            share = len(x) / sum(len(batch[1]) for batch in batches)  # of the step's images
            penalty = penalty + share * sum(r.output_loss(model, x, out) for r in remedies)
            losses.append(weight * task_loss(t, out, y, model.locations(x)))
        penalty = penalty + sum(losses[1:])
    optimizer.zero_grad()
    scaler.scale(losses[0] + penalty).backward()
    scaler.unscale_(optimizer)  # what pull adds is not scaled
    penalty = penalty.detach() + sum(r.pull(model, progress) for r in remedies)
    scaler.step(optimizer)
    scaler.update()
    return losses[0].detach(), penalty


def train_stage(model, task, samples, remedies, args, clock, title, measure=None, others=(), shared_lr=1.0):
    """Trains `model` on one task, in place -> the stage's history, one dict per epoch. others: tasks remedies draw.
    A fresh optimizer and schedule (linear warm-up over 5 %, then cosine to 0), and randomness seeded anew, so that
    what ran before leaves no trace. Raises UserError, naming the images, if the loss is not finite.
    """
    stage = TASKS.index(task)
    torch.manual_seed(1000 * args.seed + stage + 1)
    optimizer, scaler = make_optimizer(model, task, args, shared_lr)
    stored = take(samples.batch, slice(None), args.device)
    epochs, steps, step, history = args.epochs[stage], -(-len(samples) // args.batch_size), 0, []
    total = epochs * steps
    for epoch in range(1, epochs + 1):
        start, sums, finite = time.perf_counter(), torch.zeros(2, device=args.device), 0
        batches = torch.randperm(len(samples), device=args.device).split(args.batch_size)
        model.train()
        for batch in batches:
            step += 1
            lr = args.lr[stage] * min(step / (0.05 * total), 0.5 + 0.5 * math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            batch = augment(*take(stored, batch))
            sums += torch.stack(train_step(model, task, *batch, remedies, optimizer, scaler, step / total))
            finite += sums.isfinite().all()  # counts the steps before the first that was not, on the device
            if sys.stdout.isatty():
                print(f"\r{title} epoch {epoch}/{epochs} step {(step - 1) % steps + 1}/{steps} ", end="", flush=True)
        loss, penalty = (sums / steps).tolist()  # the one place of an epoch that waits for a GPU
        if finite < steps or scaler.get_scale() < 1:  # the scale shrinks with each gradient that overflows
            names = ", ".join(str(samples.paths[i]) for i in batches[min(int(finite), steps - 1)].tolist())
            raise UserError(f"{title}: loss {loss}, penalty {penalty} in epoch {epoch}, first with the images {names}; "
                            f"lower --lr (now {args.lr[stage]}) or look at these images.")
        seconds, images = time.perf_counter() - start, images_per_epoch(args, len(samples), others, remedies)
        clock.tick(images, seconds)
        history.append({"stage": stage + 1, "task": task, "epoch": epoch, "loss": loss, "penalty": penalty, "lr": lr})
        if measure and (epoch == epochs or (args.eval_every and epoch % args.eval_every == 0)):
            history[-1] |= measure(model)
        print(("\r" if sys.stdout.isatty() else "") + f"{title} epoch {epoch:3}/{epochs}  loss {loss:.4f}  penalty "
              f"{penalty:.4f}  lr {lr:.1e}  {images / seconds:.0f} images/s  {clock.left()} left", flush=True)
    return history


def baseline_file(task, args, digests):
    """Where the single-task training of these settings is cached: the name holds all that influences it."""
    stage, here = TASKS.index(task), Path(__file__).parent
    weights = digest(args.weights) if Path(args.weights).is_file() else args.weights
    key = [task, args.epochs[stage], args.lr[stage], weights, digests, torch.get_num_threads(),
           torch.__version__, torchvision.__version__, PIL.__version__, args.trunk_lr[stage],
           args.image_size, args.batch_size, args.weight_decay, args.seed, args.device, args.eval_every,
           digest(*(here / f"{name}.py" for name in ("train", "model", "data", "losses", "metrics")))]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(args.out).parent / ".baselines" / f"{task}-{name}.pt"


def single_task(task, args, file, samples, clock, measure):
    """The baseline: the initial model trained on this task alone with its own stage's settings, without any remedy
    and with the default BatchNorm rule -> {"state", "history", "seconds"}, from the cache if it was trained before."""
    if not file.exists():
        start, model = time.perf_counter(), new_model(args)
        history = train_stage(model, task, samples, [], args, clock, f"baseline {task}", measure)
        record = {"state": model.state_dict(), "history": history, "seconds": time.perf_counter() - start}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(record, f"{file}.part")
        os.replace(f"{file}.part", file)
    return torch.load(file, map_location=args.device, weights_only=True)


def trial_steps(task, sets, args):
    """Training steps of throw-away models -> (images a step, {name: function to be timed}, seconds of remember). bare:
    forward, loss, backward, update on a batch that is ready; whole: prepares its own; strategy: two with the remedies,
    as LwF acts in every second step of Stage 3."""
    model, stored = new_model(args), take(sets[task].batch, slice(None), args.device)
    remedies, start = build(args), time.perf_counter()
    for old, remedy in product(TASKS[:TASKS.index(task)], remedies):
        remedy.remember(old, model, sets[old])
    seconds = time.perf_counter() - start
    plain, remedied = ((m.train(), *make_optimizer(m, task, args)) for m in (new_model(args), model))  # for freeze

    def bare(batch=augment(*take(stored, slice(args.batch_size))), remedies=(), using=plain):
        train_step(using[0], task, *batch, remedies, *using[1:])

    def whole(*how):
        indices = torch.randperm(len(sets[task]), device=args.device)[:args.batch_size]
        bare(augment(*take(stored, indices)), *how)

    steps = {"whole": whole, "bare": bare, "strategy": lambda: [whole(remedies, remedied) for _ in range(2)]}
    return min(args.batch_size, len(sets[task])), steps, seconds


def run(args):
    """Trains seg, det and cls one after another, measures all tasks after each stage, and judges -> results."""
    start, out = time.perf_counter(), Path(args.out)
    remedies, joint = build(args), args.strategy == "joint"
    train = {t: MiniSet(args.data, t, "train", args.image_size) for t in TASKS}
    val = {t: MiniSet(args.data, t, "val", args.image_size, train[t].classes) for t in TASKS}
    classes = {t: train[t].classes for t in TASKS}
    digests = {t: digest(Path(args.data) / FOLDERS[t]) for t in TASKS}
    measure = partial(evaluate, splits=val, device=args.device)
    out.mkdir(parents=True, exist_ok=True)

    # The work ahead: baselines that are not cached, and the stages (the first one *is* its baseline unless bn is live)
    files = {t: baseline_file(t, args, digests) for t in TASKS}
    work = sum(args.epochs[s] * len(train[t]) for s, t in enumerate(TASKS) if not files[t].exists())
    stages, first = TASKS[:1] if joint else TASKS, 0 if joint or args.bn == "live" else 1  # the first one to train
    others = {t: TASKS[1:] if joint else TASKS[:s] for s, t in enumerate(stages)}
    work += sum(args.epochs[s] * images_per_epoch(args, len(train[t]), others[t], remedies)
                for s, t in enumerate(stages) if s >= first)
    images, steps, _ = trial_steps("seg", train, args)
    clock, seconds = Clock(work), work / images * interleaved({"": steps["whole"]}, 1, args.device)[""][0] / 1000
    print(f"{args.strategy} on {args.data} at {args.image_size} px, seed {args.seed}, {args.device}: {work:,} training "
          f"images, about {duration(seconds)} at the pace of plain steps; results go to {out}", flush=True)

    # Baselines: each task alone
    singles = {t: single_task(t, args, files[t], train[t], clock, measure) for t in TASKS}
    baseline = {t: singles[t]["history"][-1][t] for t in TASKS}

    # The sequence: each stage continues where the last one ended
    model, history, matrix, stage_seconds = new_model(args), [], [], []
    if args.bn == "live":
        model.free_batchnorm()
    for t in TASKS[1:] if joint else ():
        remedies[0].remember(t, model, train[t])
    for stage, task in enumerate(stages):
        begin = time.perf_counter()
        if stage < first:
            model.load_state_dict(singles[task]["state"])
            history += singles[task]["history"]
            begin -= singles[task]["seconds"]
        else:
            history += train_stage(model, task, train[task], remedies, args, clock,
                                   "joint" if joint else f"stage {stage + 1} {task}", measure, others[task],
                                   args.shared_lr[stage])
        if args.bn == "fixed":
            model.fix_batchnorm()
        matrix.append({t: history[-1][t] for t in TASKS})
        save_model(out / "model.pt", model, args.image_size, classes)
        print(f"after stage {stage + 1}: " + ", ".join(f"{NAMES[t]} {matrix[-1][t]:.3f}" for t in TASKS), flush=True)
        for remedy in remedies if task != stages[-1] else ():
            remedy.remember(task, model, train[task])
        stage_seconds.append(time.perf_counter() - begin)

    results = {
        "args": vars(args), "data": {"folder": args.data, "sha256": digests}, "classes": classes,
        "params": sum(p.numel() for p in model.parameters()),
        "latency_ms": statistics.median(latencies(model, args.device)["OneHead"]),
        "seconds": {"baselines": sum(singles[t]["seconds"] for t in TASKS[first:]),
                    "stages": sum(stage_seconds), "total": time.perf_counter() - start},
        "device": device_name(args.device), "torch": torch.__version__,
        "tasks": list(TASKS), "metrics": NAMES, "baseline": baseline, "matrix": matrix, "final": matrix[-1],
        "map_50_95": history[-1]["map_50_95"], "history": history}
    judge(results)
    write_json(out / "results.json", results)
    print(f"\n{show(results)}\n{duration(results['seconds']['total'])} in all; results.json and model.pt are in {out}")
    return results


def main(argv=None):
    """Runs the command line -> the results that it also writes as JSON, a list of them for `--seeds`. See `--help`."""
    args = parse(argv)
    torch.backends.cudnn.benchmark = True  # few sizes of batches: let cuDNN measure which of its kernels is fastest
    try:
        if args.benchmark:
            sets = {t: MiniSet(args.data, t, "train", args.image_size) for t in TASKS}
            return benchmark(new_model(args), {t: trial_steps(t, sets, args) for t in TASKS}, args)
        if args.eval:
            return evaluate_saved(args)
        if not args.seeds:
            return run(args)
        results, seeds = [], dict.fromkeys(args.seeds)
        runs = [argparse.Namespace(**vars(args) | {"seed": s, "out": f"{args.out}-seed{s}"}) for s in seeds]
        finished = {one.out: load_run(one.out) for one in runs if (Path(one.out) / "results.json").exists()}
        now = acting(vars(args)) | {"data": [digest(Path(args.data) / FOLDERS[t])[:6] for t in TASKS]}
        for folder, then in ((folder, results["common"]) for folder, results in finished.items()):
            if names := ", ".join(k for k in then | now if then.get(k) != now.get(k)):
                raise UserError(f"--out {folder}: holds a run with another {names}; name another --out.")
        for args in runs:  # Ctrl-C finds the folder of the present seed in args
            results.append(finished.get(args.out) or run(args))
        print(f"\n{compare(one.out for one in runs)}")
        return results
    except KeyboardInterrupt:
        if args.benchmark or args.eval:
            raise UserError("\nInterrupted; nothing was written.")
        saved = Path(args.out or "") / "model.pt"
        raise UserError("\nInterrupted. The same command starts again; baselines (and Stage 1) that were finished are "
                        "cached." + f" {saved} holds the model after the last finished stage." * saved.exists())


if __name__ == "__main__":
    main()
