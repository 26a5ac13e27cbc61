"""The three metrics, latency, the challenge's verdict; `python metrics.py runs/*` compares runs.

Every number is computed once over a whole split, never averaged over batches or images.
"""
import contextlib
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import (FOLDERS, IGNORE, TASKS, MiniSet, UserError, command, normalise, take,
                  try_folder, write_whole)
from model import detections, load_model

NAMES = {"seg": "mIoU", "det": "mAP@50", "cls": "Top-1"}
LEARNED = {"seg": 0.05, "det": 0.01, "cls": 0.20}  # a score below this is chance
MAX_DROP, MAX_PARAMS, MAX_LATENCY_MS, MAX_SECONDS = 0.05, 8_000_000, 150, 7200
PLACES = ("data", "device", "out", "seed")  # arguments that do not name a row of the comparison
RECIPE = ("weights", "image_size", "epochs", "lr", "trunk_lr", "batch_size")  # of the baselines


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
    rows = []
    for image, found in enumerate(predictions):
        for (x1, y1, x2, y2), score, label in zip(*(column.tolist() for column in found)):
            rows.append((image, x1, y1, x2 - x1, y2 - y1, score, label))
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

    verdict = {}
    for t in TASKS:
        drops = results["drop"][t], results["drop_own"][t]
        verdict[t] = all(d is not None and d <= MAX_DROP + 1e-9 for d in drops)
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
        text += f" ± {format(statistics.stdev(known), style.replace('+', ''))}"
    return text + f" ({len(known)} of {len(values)})" * (len(known) < len(values))


def compare(folders):
    """Runs -> a Markdown table: for each data set and device a row of the baselines, then one for
    each setting: how many seeds pass, final scores and drops, as mean ± std over its seeds."""
    groups = {}  # {(data, device): (baselines, runs)}, each {name: {seed: results}}
    for folder in folders:
        try:
            results = load_run(folder)
        except UserError as e:
            print(f"skipped {e}", file=sys.stderr)
            continue
        args, recipe = results["args"], {key: results["defaults"][key] for key in RECIPE}
        alone = row_name(args | {"strategy": f"each task alone, on {args['device']}"}, recipe)
        where = json.dumps(results["data"]["sha256"]), args["device"]
        for rows, name in zip(groups.setdefault(where, ({}, {})), (alone, results["name"])):
            rows.setdefault(name, {})[args["seed"]] = results  # of two alike the last counts
    if not groups:
        raise UserError("No finished run among the folders; pass some, as in runs/*.")
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


if __name__ == "__main__":
    command(lambda: print(compare(sys.argv[1:])))
