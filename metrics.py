"""The three metrics, latency, the challenge's verdict; `python metrics.py runs/*` compares runs.

Every number is computed once over a whole split, never averaged over batches or images.
"""
import argparse
import contextlib
import hashlib
import json
import os
import statistics
import sys
import textwrap
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from data import (FOLDERS, IGNORE, SHAPES, TASKS, VOC_PALETTE, MiniSet, UserError, command,
                  normalise, open_image, take, try_folder, write_whole)
from model import detections, load_model

NAMES = {"seg": "mIoU", "det": "mAP@50", "cls": "Top-1"}
LEARNED = {"seg": 0.05, "det": 0.01, "cls": 0.20}  # a score below this is chance
MAX_DROP, MAX_PARAMS, MAX_LATENCY_MS, MAX_SECONDS = 0.05, 8_000_000, 150, 7200
PLACES = ("data", "device", "out", "seed")  # arguments that do not name a row of the comparison
RECIPE = ("report", "backbone", "taps", "neck", "width", "hidden", "head_layers", "head_stride",
          "weights", "image_size", "epochs", "lr", "trunk_lr", "batch_size", "box_loss",
          "conf_loss", "conf_warmup")  # flags that matter to the baselines


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
    """(AP at IoU 0.50, AP averaged over IoU 0.50:0.95), both in [0, 1], by COCOeval: at most 100
    detections an image.

    predictions: per image (boxes (K, 4) in original pixels, scores (K,), labels (K,)); truth: that
    of `data.load_det`. A class without truth is left out of the mean, one with truth but no
    detection counts as 0, and crowds are neither hit nor miss. Raises UserError without any box.
    """
    annotations = []
    for image, box in ((i, box) for i, record in enumerate(truth) for box in record["boxes"]):
        x1, y1, x2, y2 = box["xyxy"]
        annotations.append({"id": len(annotations) + 1, "image_id": image,
                            "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": box["label"],
                            "area": box["area"], "iscrowd": box["iscrowd"]})
    if all(a["iscrowd"] for a in annotations):
        raise UserError("The detection split has no boxes, so no mAP; name a folder with some.")
    rows = [(image, x1, y1, x2 - x1, y2 - y1, score, label)
            for image, found in enumerate(predictions)
            for (x1, y1, x2, y2), score, label in zip(*(column.tolist() for column in found))]
    if not rows:
        return 0.0, 0.0
    images = [{"id": i, "width": r["width"], "height": r["height"]} for i, r in enumerate(truth)]
    categories = [{"id": c} for c in range(classes)]
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(None):  # pycocotools reports every step
        coco.createIndex()
        coco_eval = COCOeval(coco, coco.loadRes(np.array(rows)), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return float(coco_eval.stats[1]), float(coco_eval.stats[0])


@torch.no_grad()
def evaluate(model, splits, device, batch_size=8):
    """A model on {task: MiniSet} -> {"seg": mIoU, "det": mAP@50, "map_50_95", "cls": Top-1}."""
    model.eval()
    scores = {}
    for task, split in splits.items():
        counts, found, correct = np.zeros((21, 21), np.int64), [], 0
        for start in range(0, len(split), batch_size):
            part = slice(start, start + batch_size)
            images, target = take(split.batch, part, device)
            out = model(normalise(images), (task,))[task]
            if task == "seg":
                for logits, mask in zip(out, split.truth[part]):  # at the original resolution
                    logits = F.interpolate(logits[None], mask.shape, mode="bilinear")
                    counts += confusion(logits[0].argmax(0).cpu().numpy(), mask)
            elif task == "det":
                for rows, record in zip(out, split.truth[part]):
                    boxes, confidences, labels = detections(rows)
                    scale = boxes.new_tensor([record["width"], record["height"]] * 2)
                    found.append((boxes * (scale / images.shape[-1]), confidences, labels))
            else:
                correct += (out.argmax(1) == target["labels"][:, 0]).sum().item()
        if task == "seg":
            scores["seg"] = mean_iou(counts)
        elif task == "det":
            scores["det"], scores["map_50_95"] = mean_ap(found, split.truth)
        else:
            scores["cls"] = correct / len(split)
    return scores


def evaluate_saved(args):
    """Measures the model of `--eval` on the val split of a folder -> the dict that it writes."""
    (model, size, classes), root = load_model(args.eval), Path(args.data)
    file, every = Path(args.out or Path(args.eval).parent / "eval.json"), "all" in args.tasks
    try_folder(file.parent)
    tasks = [t for t in TASKS if t in args.tasks or every and (root / FOLDERS[t]).is_dir()]
    if not tasks:
        raise UserError(f"--data {root}: none of {', '.join(FOLDERS.values())} is there.")
    for t in [t for t in TASKS if every and t not in tasks]:
        print(f"{root / FOLDERS[t]} is missing: {NAMES[t]} is not measured")
    val = {t: MiniSet(root, t, "val", size, classes[t]) for t in tasks}
    model = model.to(args.device, memory_format=torch.channels_last)
    scores = evaluate(model, val, args.device)
    scores = {key: scores.get(key) for key in (*TASKS, "map_50_95")}
    scores["n"] = {t: len(val[t]) for t in tasks}
    for t in tasks:
        extra = f" (mAP@50:95 {scores['map_50_95']:.4f})" if t == "det" else ""
        print(f"{t}: {NAMES[t]} {scores[t]:.4f}{extra} on {len(val[t])} images")
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
    """Adds `own`, `drop`, `drop_own`, `verdict` and `bonus` to a run's results.

    own is the score right after the task's own stage. drop compares with the single-task baseline,
    drop_own with own; a task passes if both are at most 5 %. The bonus: no final score is below its
    baseline. Joint training has one stage, so own is final.
    """
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
    lines = ["task  metric  baseline  own stage    final      drop  drop_own"]
    for t in TASKS:
        baseline, own, final = (results[key][t] for key in ("baseline", "own", "final"))
        drops = ["not learned" if d is None else f"{d:+.1%}"
                 for d in (results["drop"][t], results["drop_own"][t])]
        lines.append(f"{t:5} {NAMES[t]:7} {baseline:8.3f} {own:10.3f} {final:8.3f} {drops[0]:>9} "
                     f"{drops[1]:>9} {state[t]}")
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
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: holds no results.json of a finished run ({type(e).__name__}).")


def row_name(args, defaults):
    """The strategy, and each flag of a run that differs from the defaults stored with it."""
    unusual = [f"--{key.replace('_', '-')} {args[key]}" for key, value in defaults.items()
               if key not in (*PLACES, "strategy") and args[key] != value]
    return " ".join([args["strategy"], *unusual])


def mean_and_spread(values, style):
    """The mean ± standard deviation of those values that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return "not learned"
    text = format(statistics.mean(known), style)
    if len(known) > 1:
        text += f"±{format(statistics.stdev(known), style.replace('+', ''))}"
    return text + f" ({len(known)} of {len(values)})" * (len(known) < len(values))


def compare(folders, picture=None):
    """Runs -> a Markdown table: for each data set and device a row of the baselines, then one for
    each setting: how many seeds pass, final scores and drops, as mean ± std over its seeds.
    picture: a file for `draw_comparison`."""
    groups = {}  # {(data, device): (baselines, runs)}, each {name: {seed: results}}
    for folder in folders:
        try:
            results = load_run(folder)
        except UserError as e:
            print(f"skipped {e}", file=sys.stderr)
            continue
        args, defaults = results["args"], results["defaults"]
        recipe = {key: value for key, value in defaults.items() if key in RECIPE}
        alone = row_name(args | {"strategy": f"each task alone, on {args['device']}"}, recipe)
        where = json.dumps(results["data"]["sha256"]), args["device"]
        for rows, name in zip(groups.setdefault(where, ({}, {})), (alone, results["name"])):
            rows.setdefault(name, {})[args["seed"]] = results  # of two alike the last counts
    if not groups:
        raise UserError("No finished run among the folders; pass some, as in runs/*.")
    if picture:
        draw_comparison(groups, picture)
    drops = [f"{name} drop" for name in NAMES.values()]
    lines = [["run", "passed", *NAMES.values(), *drops], ["---"] * 8]
    for baselines, named in groups.values():
        for name, runs in baselines.items():
            scores = [mean_and_spread([r["baseline"][t] for r in runs.values()], ".3f")
                      for t in TASKS]
            lines.append([name, f"seeds: {len(runs)}", *scores, "", "", ""])
        for name, runs in named.items():
            runs = runs.values()
            line = [name, f"{sum(r['verdict']['all'] for r in runs)} of {len(runs)}"]
            line += [mean_and_spread([r["final"][t] for r in runs], ".3f") for t in TASKS]
            line += [mean_and_spread([r["drop"][t] for r in runs], "+.1%") for t in TASKS]
            lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- Files
def digest(*paths):
    """SHA-256 over files and folders: contents, and names inside a folder, not its own path. Linked
    folders count as what they link to."""
    result = hashlib.sha256()
    for path in map(Path, paths):
        inside = (Path(at) / name for at, _, names in os.walk(path, followlinks=True)
                  for name in names)
        for file in [path] if path.is_file() else sorted(inside):
            if file.is_file():  # a broken link is none
                result.update(os.fsencode(file.relative_to(path)) + file.read_bytes())
    return result.hexdigest()


def write_json(path, value):
    """Writes JSON; the file appears whole or not at all."""
    write_whole(Path(path), json.dumps(value, indent=1).encode())


# -- Charts: drawn in double size and reduced at the end, which smooths their lines
LONG = {"seg": "segmentation", "det": "detection", "cls": "classification"}
COLOUR = {"seg": "#0072B2", "det": "#D55E00", "cls": "#009E73"}  # the colour-blind tell them apart
SIGN = {"seg": 24, "det": 4, "cls": 3}  # corners of a task's sign: disc, square, triangle
GREY, PALE = "#666666", "#DDDDDD"


def write(draw, at, text, anchor="lm", size=28):
    """Text with its left, middle or right (l, m, r) and top, middle or bottom (t, m, b) at `at`."""
    draw.text(at, text, "black", ImageFont.load_default(size), anchor, align="right")


def ticks(high):
    """Round values from 0 to `high`, at most eleven, with their texts."""
    step = next(n * 10 ** k for k in range(-3, 9) for n in (1, 2, 5) if high <= 10 * n * 10 ** k)
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
    draw.line(points, COLOUR[task], 6, "curve")
    for point in points:
        draw.regular_polygon((*point, 16), SIGN[task], 0, COLOUR[task], "white", 3)


def legend(draw, note):
    for x, task in zip((130, 600, 1070), TASKS):
        curve(draw, [(x + 20, 50)], task)
        write(draw, (x + 46, 50), f"{NAMES[task]} ({LONG[task]})")
    write(draw, (1540, 50), note)


def draw_curves(results, file):
    """A run's picture, 1,200 pixels wide: all scores over the epochs of its stages, and below them
    the losses."""
    rows, joint = list(enumerate(results["history"], 1)), len(results["matrix"]) == 1
    end, top = len(rows), 1.05 * max(max(row["loss"], row["penalty"]) for _, row in rows)
    canvas = Image.new("RGB", (2400, 1720), "white")
    draw = ImageDraw.Draw(canvas)
    legend(draw, "thin lines: 95 % of a task's baseline")
    write(draw, (2360, 1690), "epoch", "rm")
    write(draw, (130, 1070), "loss of the stage's task (coloured), penalty of the remedies (grey)")
    scores = axes(draw, (130, 150, 2360, 960), (end, 1), (ticks(end), ticks(1)))
    losses = axes(draw, (130, 1100, 2360, 1630), (end, top), (ticks(end), ticks(top)))
    for number, task in enumerate(TASKS[:len(results["matrix"])], 1):
        stage = [(epoch, row) for epoch, row in rows if row["stage"] == number]
        start = stage[0][0] - 1
        draw.line([scores(start, 0), scores(start, 1)], GREY, 4)
        draw.line([losses(start, 0), losses(start, top)], GREY, 4)
        title = "all tasks at once" if joint else f"Stage {number}: {LONG[task]}"
        write(draw, (scores(start, 1)[0], 124), title)
        draw.line([losses(epoch, row["penalty"]) for epoch, row in stage], GREY, 4, "curve")
        draw.line([losses(epoch, row["loss"]) for epoch, row in stage], COLOUR[task], 6, "curve")
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
    canvas = Image.new("RGB", (2400, bottom + 110), "white")
    draw = ImageDraw.Draw(canvas)
    legend(draw, f"grey line: {enough:.0f} %")
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
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SHOWN = 0.3  # boxes below this score are left out


@torch.no_grad()
def look_at(photo, model, size, classes):
    """What a model finds in an RGB photo -> found. size: pixels a side that the model sees."""
    model.eval()
    image = pil_to_tensor(photo.resize((size, size), Image.BILINEAR))[None]  # (1, 3, size, size)
    out = model(normalise(image.to(next(model.parameters()).device)))
    shape = [-(-n // max(1, max(photo.size) / 1024)) for n in photo.size[::-1]]  # saves memory
    logits = F.interpolate(out["seg"], [int(n) for n in shape], mode="bilinear")  # (1, 21, H, W)
    mask = Image.fromarray(logits[0].argmax(0).byte().cpu().numpy())
    rows = out["det"][0, :, :5 + len(classes["det"])].cpu()  # no class without a name
    boxes, scores, labels = detections(rows, SHOWN)
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


def tag(draw, at, text, size, taken):
    """White text on black whose left bottom is `at`, moved to where all of it is seen, and up or
    down to where no other one is; left out where that is too far. taken: the others' corners."""
    font, (right, bottom) = ImageFont.load_default(size), draw.im.size
    *_, width, height = (int(v) + 5 for v in draw.textbbox((0, 0), text, font))
    x = max(0, min(at[0], right - width))
    for line in (0, 1, -1, 2, -2):
        y = max(0, min(at[1] + line * height, bottom) - height)
        corners = x, y, x + width, y + height
        if all(x >= x2 or y >= y2 or corners[2] <= x1 or corners[3] <= y1
               for x1, y1, x2, y2 in taken):
            taken.append(corners)
            draw.rectangle(corners, "black")
            draw.text((x + 2, y + 1), text, "white", font)
            return


def annotated(photo, found, names, side):
    """A copy of an RGB photo, its longer side `side` pixels, with whatever is in `found` drawn onto
    it. names: those of the mask's classes."""
    picture, tags = ImageOps.contain(photo, (side, side)), []
    image, scale = pil_to_tensor(picture), picture.width / photo.width  # (3, H, W)
    if "seg" in found:
        mask = Image.fromarray(found["seg"]).resize(picture.size, Image.NEAREST)
        mask = torch.from_numpy(np.array(mask))  # (H, W)
        there = [c for c in mask.unique().tolist() if c not in (0, IGNORE)]
        for c in there:
            image = draw_segmentation_masks(image, mask == c, 0.6, VOC_PALETTE[c])
            y, x = (mask == c).nonzero().float().mean(0).tolist()
            tags.append(((x, y), names[c]))
    if found.get("det"):
        boxes = torch.tensor([box for box, *_ in found["det"]]) * scale  # (K, 4)
        for colour, width in (("black", 4), ("white", 2)):
            width = width * (1 + side // 1000)
            image = draw_bounding_boxes(image, boxes, colors=colour, width=width)
        for corner, (_, name, score) in zip(boxes[:, :2].tolist(), found["det"]):
            tags.append((corner, name if score is None else f"{name} {score:.2f}"))
    if "cls" in found:
        name, chance = found["cls"]
        tags.append(((0, side), name if chance is None else f"class {name} {chance:.2f}"))
    picture, taken = to_pil_image(image), []
    for at, text in tags:
        tag(ImageDraw.Draw(picture), at, text, max(12, side // 45), taken)
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


def photos_of(paths):
    """Files, and the images in folders and their subfolders, sorted. Raises UserError if none."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [p for p in inside if p == path or p.is_file() and p.suffix.lower() in IMAGES]
    if not found:
        raise UserError("--predict: no photo; name files or folders with some behind the model.")
    return found


def predict(args):
    """Looks with the model of `--predict` at photos -> the list that it writes as JSON, beside an
    annotated copy and a mask of each photo. Unreadable ones are skipped and named."""
    (file, *paths), out = args.predict, Path(args.out or "predictions")
    (model, size, classes), photos, rows = load_model(file), photos_of(paths), {}
    if any(out.resolve() in path.resolve().parents for path in photos):
        raise UserError(f"--out {out}: there are photos to look at; name another folder.")
    (out / "masks").mkdir(parents=True, exist_ok=True)
    model, names = model.to(args.device, memory_format=torch.channels_last), mask_names(classes)
    for path in photos:
        try:
            photo = open_image(path).convert("RGB")
        except UserError as e:
            print(f"skipped {e}")
            continue
        found, name = look_at(photo, model, size, classes), path.stem
        while f"{name}.png" in rows:  # of another folder
            name += "-2"
        annotated(photo, found, names, max(480, *photo.size)).save(out / f"{name}.png")
        mask = Image.fromarray(found["seg"])
        mask.putpalette(sum(VOC_PALETTE, ()))
        mask.save(out / "masks" / f"{name}.png")
        pixels = np.bincount(found["seg"].flatten()) / found["seg"].size
        shares = {names[c]: pixels[c].item() for c in pixels.nonzero()[0]}
        boxes = [dict(zip(("xyxy", "label", "score"), box)) for box in found["det"]]
        label, chance = found["cls"]
        rows[f"{name}.png"] = {"photo": str(path), "copy": f"{name}.png", "width": photo.width,
                               "height": photo.height, "boxes": boxes, "pixels": shares,
                               "class": {"label": label, "probability": chance}}
        print(f"{path}: class {label} {chance:.2f}; boxes: "
              + (", ".join(f"{box['label']} {box['score']:.2f}" for box in boxes) or "none")
              + "; pixels: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    if not rows:
        raise UserError("--predict: none of the photos is readable; name others.")
    write_json(out / "predictions.json", list(rows.values()))
    print(f"{len(rows)} of {len(photos)} photos: annotated copies, masks/ and predictions.json are "
          f"in {out}")
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description="Compares finished runs: a table and a picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, as in runs/*")
    parser.add_argument("--out", default="comparison.png", help="(default: %(default)s)")
    args = parser.parse_args()
    print(f"{compare(args.runs, args.out)}\n\nThe picture is {args.out}")


if __name__ == "__main__":
    command(main)
