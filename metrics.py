"""The three metrics, latency, the challenge's verdict; `python metrics.py runs/*` compares runs.

Every number is computed once over a whole split, never averaged over batches or images.
"""
import argparse
import contextlib
import hashlib
import json
import os
import sys
import textwrap
import time
from glob import glob
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.functional import pil_to_tensor

from data import (FOLDERS, IGNORE, SHAPES, TASKS, VOC_PALETTE, MiniSet, UserError, command,
                  normalise, open_image, take, try_folder, write_whole)
from model import NETWORK, detections, load_model

NAMES = {"seg": "mIoU", "det": "mAP@50", "cls": "Top-1"}
LEARNED = {"seg": 0.05, "det": 0.01, "cls": 0.20}  # a score below this is chance
MAX_DROP, MAX_PARAMS, MAX_LATENCY_MS, MAX_SECONDS = 0.05, 8_000_000, 150, 7200
OF_BASELINES = (*NETWORK, "report", "weights", "image_size", "epochs", "lr", "trunk_lr",
                "batch_size", "box_loss", "conf_loss", "conf_warmup")  # flags that matter to them


# -- The metrics
def confusion(predicted, truth, classes=21):
    """Pixel counts [truth, predicted], without truth 255, of two integer arrays of one shape."""
    keep = truth != IGNORE
    pairs = truth[keep].astype(np.int64) * classes + predicted[keep]
    return np.bincount(pairs, minlength=classes ** 2).reshape(classes, classes)


def mean_iou(counts):
    """mIoU in [0, 1] of one confusion matrix for the whole split, as in VOC; 0 without any pixel.

    IoU = TP / (TP + FP + FN). A class in neither truth nor prediction is left out of the mean; one
    that is predicted but absent, or present but never found, counts as 0. Background is a class.
    """
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = union > 0
    return float((counts.diagonal()[present] / union[present]).mean()) if present.any() else 0.0


def mean_ap(predictions, truth, classes=10):
    """(AP at IoU 0.50, mean AP of IoU 0.50:0.95), both in [0, 1], of at most 100 boxes an image.

    predictions: per image (boxes (K, 4) in original pixels, scores (K,), labels (K,)); truth: that
    of `data.load_det`. A class without truth is left out of the mean, one with truth but no
    detection counts as 0, and crowds are neither hit nor miss. `truth` must have a box.
    """
    annotations = []
    for image, box in ((i, box) for i, record in enumerate(truth) for box in record["boxes"]):
        x1, y1, x2, y2 = box["xyxy"]
        annotations.append({"id": len(annotations) + 1, "image_id": image,
                            "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": box["label"],
                            "area": box["area"], "iscrowd": box["iscrowd"]})
    rows = [(image, x1, y1, x2 - x1, y2 - y1, score, label)
            for image, found in enumerate(predictions)
            for (x1, y1, x2, y2), score, label in zip(*(column.tolist() for column in found))]
    if not rows:
        return 0.0, 0.0
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in range(len(truth))], "annotations": annotations,
                    "categories": [{"id": c} for c in range(classes)]}
    with contextlib.redirect_stdout(None):  # pycocotools reports every step
        coco.createIndex()
        coco_eval = COCOeval(coco, coco.loadRes(np.array(rows)), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return float(coco_eval.stats[1]), float(coco_eval.stats[0])


def answers(model, task, split, device, batch_size):
    """What a model answers in one task to each image of a split."""
    for start in range(0, len(split), batch_size):
        images, _ = take(split.batch, slice(start, start + batch_size), device)
        yield from model(normalise(images), (task,))[task]


@torch.no_grad()
def evaluate(model, splits, device, batch_size=8):
    """A model on {task: MiniSet} -> {"seg": mIoU, "det": mAP@50, "map_50_95", "cls": Top-1}."""
    model.eval()
    scores = {}
    for task, split in splits.items():
        pairs = zip(answers(model, task, split, device, batch_size), split.truth)
        if task == "seg":
            counts = np.zeros((21, 21), np.int64)
            for logits, mask in pairs:  # at the original resolution
                logits = F.interpolate(logits[None], mask.shape, mode="bilinear")
                counts += confusion(logits[0].argmax(0).cpu().numpy(), mask)
            scores["seg"] = mean_iou(counts)
        elif task == "det":
            found, size = [], split.batch[0].shape[-1]
            for rows, record in pairs:
                boxes, confidences, labels = detections(rows)
                scale = boxes.new_tensor([record["width"], record["height"]] * 2) / size
                found.append((boxes * scale, confidences, labels))
            scores["det"], scores["map_50_95"] = mean_ap(found, split.truth)
        else:
            correct = sum(logits.argmax().item() == label for logits, label in pairs)
            scores["cls"] = correct / len(split)
    return scores


def evaluate_saved(args):
    """Measures the model of `--eval` on the val split of a folder -> the dict that it writes."""
    (model, size, classes), root = load_model(args.eval), Path(args.data)
    file = Path(args.out or Path(args.eval).parent / "eval.json")
    try_folder(file.parent)
    there = [t for t in TASKS if (root / FOLDERS[t]).is_dir()]
    tasks = (there or TASKS) if "all" in args.tasks else args.tasks  # absent ones are refused
    val = {t: MiniSet(root, t, "val", size, classes[t]) for t in tasks}
    model = model.to(args.device, memory_format=torch.channels_last)
    scores = dict.fromkeys((*TASKS, "map_50_95")) | evaluate(model, val, args.device)
    scores["n"] = {t: len(val[t]) for t in tasks}
    for t in TASKS:
        measured = f"{scores[t]:.4f} on {len(val[t])} images" if t in val else "is not measured"
        print(f"{t}: {NAMES[t]} {measured}")
    if "det" in val:
        print(f"mAP@50:95 {scores['map_50_95']:.4f}")
    write_json(file, scores)
    print(f"Wrote {file}")
    return scores


@torch.no_grad()
def latency(model, device, runs=20, size=512):
    """Milliseconds from one normalised size×size image of noise to boxes after NMS, class map and
    class -> a list of `runs` times, after three to warm up."""
    image = torch.randn(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    model.eval()
    times = []
    for _ in range(3 + runs):
        start = time.perf_counter()
        out = model(image)
        detections(out["det"][0])
        F.interpolate(out["seg"], (size, size), mode="bilinear").argmax(1)
        out["cls"].argmax(1).item()  # a GPU is waited for
        times.append(1000 * (time.perf_counter() - start))
    return times[3:]


# -- The verdict
def drop(task, reference, final):
    """Relative loss (reference - final) / reference; None where the reference was never learned."""
    return None if reference < LEARNED[task] else (reference - final) / reference


def judge(results):
    """Adds to a run's results `own`, the scores right after each task's own stage (joint training
    has but one); `drop` and `drop_own`, relative to baseline and own; `verdict`: both are at most
    5 %; `bonus`: no score is below its baseline."""
    final, baseline, matrix = results["final"], results["baseline"], results["matrix"]
    own = {t: matrix[min(stage, len(matrix) - 1)][t] for stage, t in enumerate(TASKS)}
    results["own"] = own
    results["drop"] = {t: drop(t, baseline[t], final[t]) for t in TASKS}
    results["drop_own"] = {t: drop(t, own[t], final[t]) for t in TASKS}
    results["bonus"] = all(d is not None and d <= 0 for d in results["drop"].values())
    drops = {t: (results["drop"][t], results["drop_own"][t]) for t in TASKS}
    verdict = {t: all(d is not None and d <= MAX_DROP + 1e-9 for d in drops[t]) for t in TASKS}
    verdict["params"] = results["params"] < MAX_PARAMS
    verdict["latency"] = results["latency_ms"] <= MAX_LATENCY_MS
    verdict["time"] = results["seconds"]["stages"] <= MAX_SECONDS
    results["verdict"] = {**verdict, "all": all(verdict.values())}


def show(results):
    """The run's table as text: per task baseline, after own stage, final, both drops, verdict."""
    state = {key: "PASS" if passed else "FAIL" for key, passed in results["verdict"].items()}
    lines = ["task  metric  baseline  own stage    final         drop     drop_own"]
    for t in TASKS:
        baseline, own, final = (results[key][t] for key in ("baseline", "own", "final"))
        drops = ["not learned" if d is None else f"{d:+.1%}"
                 for d in (results["drop"][t], results["drop_own"][t])]
        lines.append(f"{t:5} {NAMES[t]:7} {baseline:8.3f} {own:10.3f} {final:8.3f} {drops[0]:>12} "
                     f"{drops[1]:>12} {state[t]}")
    lines.append(f"mAP@50:95 {results['map_50_95']:.3f}, {results['params']:,} parameters "
                 f"{state['params']}, {results['latency_ms']:.0f} ms an image {state['latency']}, "
                 f"stages {results['seconds']['stages']:.0f} s {state['time']}")
    lines.append(f"all: {state['all']}" + " with bonus" * results["bonus"])
    return "\n".join(lines)


# -- Comparing runs
def load_run(folder):
    """The results of a finished run, judged by today's rules. Raises UserError."""
    try:
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        judge(results)
        return results | {"name": row_name(results["args"], results["defaults"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}: holds no results.json of a finished run ({type(e).__name__}).")


def row_name(args, defaults):
    """The strategy, and each flag of a run that differs from the defaults stored with it."""
    unusual = [f"--{key.replace('_', '-')} {args[key]}" for key, value in defaults.items()
               if key not in ("strategy", "data", "device", "out", "seed") and args[key] != value]
    return " ".join([args["strategy"], *unusual])


def mean_and_spread(values, style):
    """The mean ± standard deviation of those values that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return "not learned"
    text = format(np.mean(known), style)
    if len(known) > 1:
        text += f"±{format(np.std(known, ddof=1), style.replace('+', ''))}"
    return text + f" ({len(known)} of {len(values)})" * (len(known) < len(values))


def share_kept(row):
    """Final scores over baselines of a row (name, {seed: results}), the mean of tasks and seeds."""
    return np.mean([r["final"][t] / max(r["baseline"][t], LEARNED[t])
                    for r in row[1].values() for t in TASKS])


def compare(folders, picture=None):
    """Runs -> a Markdown table: for each data set and device a row of the baselines, then one for
    each setting, from what keeps least to what keeps most: how many seeds pass, final scores and
    drops, as mean ± std over its seeds. picture: a file for `draw_comparison`."""
    groups = {}  # {(data, device): (baselines, runs)}, each {name: {seed: results}}
    for folder in folders:
        try:
            results = load_run(folder)
        except UserError as e:
            print(f"skipped {e}", file=sys.stderr)
            continue
        args, defaults = results["args"], results["defaults"]
        recipe = {key: value for key, value in defaults.items() if key in OF_BASELINES}
        alone = row_name(args | {"strategy": f"each task alone, on {args['device']}"}, recipe)
        where = json.dumps(results["data"]["sha256"]), args["device"]
        for rows, name in zip(groups.setdefault(where, ({}, {})), (alone, results["name"])):
            rows.setdefault(name, {})[args["seed"]] = results  # of two alike the last counts
    groups = {where: (baselines, dict(sorted(named.items(), key=share_kept)))
              for where, (baselines, named) in groups.items()}
    if not groups:
        raise UserError("No finished run among the folders; pass some, as in runs/*.")
    if picture:
        draw_comparison(groups, picture)

    def means(runs, key, style):
        return [mean_and_spread([r[key][t] for r in runs.values()], style) for t in TASKS]
    drops = [f"{name} drop" for name in NAMES.values()]
    lines = [["run", "passed", *NAMES.values(), *drops], ["---"] * 8]
    for baselines, named in groups.values():
        for name, runs in baselines.items():
            lines.append([name, f"seeds: {len(runs)}", *means(runs, "baseline", ".3f"), *[""] * 3])
        for name, runs in named.items():
            passed = f"{sum(r['verdict']['all'] for r in runs.values())} of {len(runs)}"
            lines.append([name, passed, *means(runs, "final", ".3f"), *means(runs, "drop", "+.1%")])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- Files
def digest(path):
    """SHA-256 of a file, or of a folder's names and contents; links count as what they link to."""
    result, path = hashlib.sha256(), Path(path)
    names = glob("**", root_dir=path, recursive=True, include_hidden=True)
    for file in [path] if path.is_file() else sorted(path / name for name in names):
        if file.is_file():
            result.update(os.fsencode(file.relative_to(path)) + file.read_bytes())
    return result.hexdigest()


def write_json(path, value):
    """Writes JSON; the file appears whole or not at all."""
    write_whole(Path(path), json.dumps(value, indent=1).encode())


# -- Charts: drawn in double size and reduced at the end, which smooths their lines
LONG = {"seg": "segmentation", "det": "detection", "cls": "classification"}
COLOUR = {"seg": "#0072B2", "det": "#D55E00", "cls": "#009E73"}  # the colour-blind tell them apart
SIGN = {"seg": 24, "det": 4, "cls": 3}  # corners of a task's sign: disc, square, triangle
GREY, PALE = "#666666", "#CCCCCC"


def write(draw, at, text, anchor="lm", size=28):
    """Text with its left, middle or right (l, m, r) and top, middle or bottom (t, m, b) at `at`."""
    draw.text(at, text, "black", ImageFont.load_default(size), anchor, align="right")


def ticks(high):
    """Round values from 0 to `high`, at most eleven, with their texts."""
    step = next(n * 10 ** k for k in range(-3, 39) for n in (1, 2, 5) if high <= 10 * n * 10 ** k)
    return {i * step: f"{i * step:g}" for i in range(int(high / step + 1e-9) + 1)}


def axes(draw, area, high, marks):
    """A frame with grid lines -> the function from two values to a pixel. area: left, top, right,
    bottom in pixels; high: the largest x and y, both from 0; marks: {x: text} and {y: text}."""
    left, top, right, bottom = area

    def place(x, y):
        return left + x / high[0] * (right - left), bottom - y / high[1] * (bottom - top)
    for x, text in marks[0].items():
        draw.line([place(x, 0), place(x, high[1])], PALE, 2)
        write(draw, (place(x, 0)[0], bottom + 12), text, "mt")
    for y, text in marks[1].items():
        draw.line([place(0, y), place(high[0], y)], PALE, 2)
        write(draw, (left - 14, place(0, y)[1]), text, "rm")
    draw.rectangle(area, outline=GREY, width=2)
    return place


def curve(draw, points, task):
    """A line through points, each with the task's sign, framed in white to stay apart."""
    draw.line(points, COLOUR[task], 6)
    for point in points:
        draw.regular_polygon((*point, 16), SIGN[task], 0, COLOUR[task], "white", 3)


def chart(height, note):
    """A white canvas, 2,400 pixels wide, with the tasks' signs and a note at the top."""
    canvas = Image.new("RGB", (2400, height), "white")
    draw = ImageDraw.Draw(canvas)
    for x, task in zip((150, 620, 1090), TASKS):
        curve(draw, [(x, 50)], task)
        write(draw, (x + 26, 50), f"{NAMES[task]} ({LONG[task]})")
    write(draw, (1540, 50), note)
    return canvas, draw


def draw_curves(results, file):
    """A run's picture, 1,200 pixels wide: scores over the epochs of all stages, losses below."""
    rows = list(enumerate(results["history"], 1))
    starts = {row["stage"]: epoch - 1 for epoch, row in reversed(rows)}  # {stage: epochs before}
    end, top = len(rows), 1.05 * max(max(row["loss"], row["penalty"]) for _, row in rows)
    canvas, draw = chart(1720, "thin lines: 95 % of a task's baseline")
    write(draw, (2360, 1690), "epoch", "rm")
    write(draw, (130, 1070), "loss of the stage's task (coloured), penalty of the remedies (grey)")
    epochs = {epoch: str(epoch) for epoch in (*starts.values(), end)}
    scores = axes(draw, (130, 150, 2360, 960), (end, 1), (epochs, ticks(1)))
    losses = axes(draw, (130, 1100, 2360, 1630), (end, top), (epochs, ticks(top)))
    for stage, task in zip(sorted(starts), TASKS):
        title = f"Stage {stage}: {LONG[task]}" if len(starts) > 1 else "all tasks at once"
        write(draw, (scores(starts[stage], 1)[0], 124), title)
        for key, colour, width in (("penalty", GREY, 4), ("loss", COLOUR[task], 6)):
            points = [losses(epoch, row[key]) for epoch, row in rows if row["stage"] == stage]
            draw.line(points, colour, width, "curve")
    for task in TASKS:
        enough = (1 - MAX_DROP) * results["baseline"][task]
        draw.line([scores(0, enough), scores(end, enough)], COLOUR[task], 2)
        curve(draw, [scores(epoch, row[task]) for epoch, row in rows if task in row], task)
    canvas.reduce(2).save(file)


def draw_comparison(groups, file):
    """The picture of `compare`, 1,200 pixels wide: what share of its baseline each task keeps in
    the end, with a sign for each seed; one never learned has none."""
    settings = []  # (text, runs) from top to bottom
    for (_, device), (_, named) in groups.items():
        for name, runs in named.items():
            runs = list(runs.values())
            text = f"{name}, on {runs[0]['data']['folder']}, {device} (seeds: {len(runs)})"
            settings.append((textwrap.fill(text, 36, max_lines=3), runs))
    drops = [d for _, runs in settings for r in runs for d in r["drop"].values() if d is not None]
    high, count = max(110, 105 - 100 * min(drops, default=0)), len(settings)
    bottom, enough = 160 + 130 * count, 100 * (1 - MAX_DROP)
    canvas, draw = chart(bottom + 110, f"grey line: {enough:.0f} %")
    write(draw, (2340, bottom + 80), "final score in % of the task's baseline, of each seed", "rm")
    names = {count - 0.5 - row: text for row, (text, _) in enumerate(settings)}
    place = axes(draw, (620, 110, 2340, bottom), (high, count), (ticks(high), names))
    draw.line([place(enough, 0), place(enough, count)], GREY, 4)
    for (row, (_, runs)), (k, task) in product(enumerate(settings), enumerate(TASKS, 1)):
        kept = [100 - 100 * r["drop"][task] for r in runs if r["drop"][task] is not None]
        curve(draw, [place(share, count - row - k / 4) for share in kept], task)
    canvas.reduce(2).save(file, "PNG")


# -- What a model sees: found = {"seg": mask (H, W), "det": [(box xyxy, name, score)], best first,
# "cls": (name, probability)}, all in pixels of the photo. The truth has None for a score.


@torch.no_grad()
def look_at(photo, model, size, classes):
    """What a model finds in an RGB photo -> found. size: pixels a side that the model sees."""
    model.eval()
    image = pil_to_tensor(photo.resize((size, size), Image.BILINEAR))[None]  # (1, 3, size, size)
    out = model(normalise(image.to(next(model.parameters()).device)))
    shape = min(photo.height, 1024), min(photo.width, 1024)  # at most: each pixel has 21 logits
    logits = F.interpolate(out["seg"], shape, mode="bilinear")  # (1, 21, H, W)
    mask = Image.fromarray(logits[0].argmax(0).byte().cpu().numpy())
    rows = out["det"][0, :, :5 + len(classes["det"])].cpu()  # no class without a name
    boxes, scores, labels = detections(rows, floor=0.3)  # what is less sure is not shown
    right_bottom = torch.tensor(2 * photo.size)
    boxes = (boxes * right_bottom / size).clamp(min=0).minimum(right_bottom)  # (K, 4)
    names = [classes["det"][label] for label in labels.tolist()]
    chances = out["cls"][0, :len(classes["cls"])].softmax(0)
    return {"seg": np.array(mask.resize(photo.size, Image.NEAREST)),
            "det": list(zip(boxes.tolist(), names, scores.tolist())),
            "cls": (classes["cls"][chances.argmax()], chances.max().item())}


def mask_names(classes):
    """The names of a mask's classes; shapes are stored like VOC, but called what they are."""
    drawn = ["background", *SHAPES, *classes["seg"][11:]]
    return drawn if classes["det"] == SHAPES else classes["seg"]


def annotated(photo, found, names, side):
    """A copy of an RGB photo, its longer side `side` pixels, with whatever is in `found` drawn onto
    it. names: those of the mask's classes. A text that has no room is left out."""
    picture, texts = ImageOps.contain(photo, (side, side)), []  # [(left bottom, text)]
    if "seg" in found:
        mask = Image.fromarray(found["seg"]).resize(picture.size, Image.NEAREST)
        classes, there = np.array(mask), mask.point(lambda c: 255 * (c not in (0, IGNORE)))
        mask.putpalette(sum(VOC_PALETTE, ()))
        picture.paste(Image.blend(picture, mask.convert("RGB"), 0.6), mask=there)
        for c in set(np.unique(classes).tolist()) - {0, IGNORE}:
            y, x = (classes == c).nonzero()
            texts.append(((x.mean(), y.mean()), names[c]))
    draw, unit = ImageDraw.Draw(picture), 1 + side // 1000
    for box, name, score in found.get("det", []):
        box = [v * picture.width / photo.width for v in box]
        draw.rectangle(box, outline="black", width=4 * unit)
        draw.rectangle(box, outline="white", width=2 * unit)
        texts.append((box[:2], name if score is None else f"{name} {score:.2f}"))
    if "cls" in found:
        name, chance = found["cls"]
        texts.append(((0, side), name if chance is None else f"class {name} {chance:.2f}"))
    font, taken = ImageFont.load_default(max(12, side // 45)), np.zeros(picture.size[::-1], bool)
    for (x, y), text in texts:
        width, height = (int(v) + 5 for v in font.getbbox(text)[2:])
        x = max(0, min(int(x), picture.width - width))
        for line in (1, 0, -1, 2):  # above the point, below it, further below, or further up
            top = max(0, min(int(y) - line * height, picture.height - height))
            place = taken[top:top + height, x:x + width]
            if not place.any():
                place[:] = True
                draw.rectangle((x, top, x + width, top + height), "black")
                draw.text((x + 2, top + 1), text, "white", font)
                break
    return picture


def examples(splits, classes, model=None, side=200):
    """Two val images of each task with what the model finds, or without a model the truth -> six
    pictures. Always the same ones: they show what a stage has learned and forgotten."""
    pictures = []
    for task, i in ((task, len(splits[task]) * k // 7) for task in TASKS for k in (2, 5)):
        split = splits[task]
        photo, truth = open_image(split.paths[i]).convert("RGB"), split.truth[i]
        if model:
            found = look_at(photo, model, split.batch[0].shape[-1], classes)[task]
        elif task == "det":
            found = [(box["xyxy"], box["name"], None) for box in truth["boxes"]]
        else:
            found = truth if task == "seg" else (classes["cls"][truth], None)
        pictures.append(annotated(photo, {task: found}, mask_names(classes), side))
    return pictures


def draw_examples(strips, file, side=200):
    """predictions.png. strips: {text at the left: pictures of `examples`}, from top to bottom."""
    canvas = Image.new("RGB", (150 + 6 * (side + 8), 30 + len(strips) * (side + 8)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, task in enumerate(TASKS):
        write(draw, (150 + 2 * k * (side + 8), 16), LONG[task], size=16)
    for row, (text, pictures) in enumerate(strips.items()):
        y = 30 + row * (side + 8)
        write(draw, (138, y + side / 2), text, "rm", size=16)
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (150 + column * (side + 8), y + (side - picture.height) // 2))
    canvas.save(file)


def predict(args):
    """Looks with the model of `--predict` at photos -> the list that it writes as JSON, beside an
    annotated copy and a mask of each photo. Unreadable files are skipped and named."""
    (file, *paths), out, rows = args.predict, Path(args.out or "predictions"), []
    model, size, classes = load_model(file)
    photos = []
    for path in map(Path, paths):
        photos += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if any(out.resolve() in path.resolve().parents for path in photos):
        raise UserError(f"--out {out}: there are photos to look at; name another folder.")
    model, names = model.to(args.device, memory_format=torch.channels_last), mask_names(classes)
    for path in photos:
        try:
            photo = open_image(path).convert("RGB")
        except UserError as e:
            print(f"skipped {e}")
            continue
        (out / "masks").mkdir(parents=True, exist_ok=True)
        found, copy = look_at(photo, model, size, classes), f"{len(rows) + 1:03}-{path.stem}.png"
        annotated(photo, found, names, max(480, *photo.size)).save(out / copy)
        mask = Image.fromarray(found["seg"])
        mask.putpalette(sum(VOC_PALETTE, ()))
        mask.save(out / "masks" / copy)
        pixels = np.bincount(found["seg"].flatten()) / found["seg"].size
        boxes = [dict(zip(("xyxy", "label", "score"), box)) for box in found["det"]]
        label, chance = found["cls"]
        rows.append({"photo": str(path), "copy": copy, "width": photo.width,
                     "height": photo.height, "boxes": boxes,
                     "pixels": {names[c]: pixels[c].item() for c in pixels.nonzero()[0]},
                     "class": {"label": label, "probability": chance}})
        things = ", ".join(f"{name} {score:.2f}" for _, name, score in found["det"]) or "no boxes"
        print(f"{path}: class {label} {chance:.2f}; {things}")
    if not rows:
        raise UserError("--predict: no photo, or none of the photos is readable; name some.")
    write_json(out / "predictions.json", rows)
    print(f"{len(rows)} of {len(photos)} photos: annotated copies, masks/ and predictions.json are "
          f"in {out}")
    return rows


def main():
    parser = argparse.ArgumentParser(description="Compares finished runs: a table and a picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, as in runs/*")
    parser.add_argument("--out", default="comparison.png", help="(default: %(default)s)")
    args = parser.parse_args()
    print(f"{compare(args.runs, args.out)}\n\nThe picture is {args.out}")


if __name__ == "__main__":
    command(main)
