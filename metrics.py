"""The three metrics, parameters and latency, and the challenge's verdict; `python metrics.py runs/*` compares runs.

Every number is computed once over a whole split, never averaged over batches or images.
"""
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import IGNORE, TASKS, UserError
from model import collate, detections

NAMES = {"seg": "mIoU", "det": "mAP@50", "cls": "Top-1"}
LEARNED = {"seg": 0.05, "det": 0.01, "cls": 0.20}  # a reference below this is chance: nothing to forget
MAX_DROP, MAX_PARAMS, MAX_LATENCY_MS, MAX_SECONDS = 0.05, 8_000_000, 150, 7200


def confusion(predicted, truth, classes=21):
    """Pixel counts [truth, predicted] (classes, classes) of two integer arrays of one shape; truth 255 is left out."""
    keep = truth != IGNORE
    pairs = truth[keep].astype(np.int64) * classes + predicted[keep]
    return np.bincount(pairs, minlength=classes ** 2).reshape(classes, classes)


def mean_iou(counts):
    """mIoU in [0, 1] of one confusion matrix for the whole split (VOC's protocol; background counts as a class).

    IoU = TP / (TP + FP + FN). A class in neither truth nor prediction is left out of the mean; a class that is
    predicted but absent, or present but never found, counts as 0. Without any pixel: 0.
    """
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = union > 0
    return float((counts.diagonal()[present] / union[present]).mean()) if present.any() else 0.0


def mean_ap(predictions, truth, classes=10):
    """(AP at IoU 0.50, AP averaged over IoU 0.50:0.95), both in [0, 1], by COCOeval: at most 100 detections an image.

    predictions: per image (boxes (K, 4) xyxy in original pixels, scores (K,), labels (K,)); truth: `MiniSet.truth`,
    per image {"width", "height", "annotations"}. A class without truth is left out of the mean, one with truth but
    no detection counts as 0, and crowds are neither hit nor miss. Raises UserError if there is no box at all.
    """
    annotations = [{**a, "image_id": i} for i, image in enumerate(truth) for a in image["annotations"]]
    if all(a["iscrowd"] for a in annotations):
        raise UserError("The detection split holds no boxes: mAP is undefined; name a folder with annotated images.")
    coco = COCO()
    coco.dataset = {"images": [{"id": i, "width": t["width"], "height": t["height"]} for i, t in enumerate(truth)],
                    "annotations": [{**a, "id": k} for k, a in enumerate(annotations, 1)],
                    "categories": [{"id": c} for c in range(classes)]}
    rows = [(i, x1, y1, x2 - x1, y2 - y1, score, label) for i, (boxes, scores, labels) in enumerate(predictions)
            for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist())]
    if not rows:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
        coco.createIndex()
        coco_eval = COCOeval(coco, coco.loadRes(np.array(rows)), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return float(coco_eval.stats[1]), float(coco_eval.stats[0])


@torch.no_grad()
def evaluate(model, splits, device, batch_size=8):
    """Measures a model on {task: MiniSet} -> {"seg": mIoU, "det": mAP@50, "cls": Top-1, "map_50_95"}.

    mIoU at the masks' original resolution (the *logits* are resized, then argmax), mAP in original pixels.
    """
    model.eval()
    result = {}
    for task, split in splits.items():
        counts, found, correct = np.zeros((21, 21), np.int64), [], 0
        for start in range(0, len(split), batch_size):
            images, target = collate(split[start:start + batch_size], device)
            out, truth = model(images, (task,), upsample=False)[task], split.truth[start:start + batch_size]
            if task == "cls":
                correct += (out.argmax(1) == target).sum().item()
            elif task == "seg":
                for logits, mask in zip(out, truth):
                    logits = F.interpolate(logits[None], mask.shape, mode="bilinear")  # (1, 21, original H, W)
                    counts += confusion(logits[0].argmax(0).cpu().numpy(), mask)
            else:
                for rows, image in zip(out, truth):
                    boxes, scores, labels = detections(rows)
                    scale = boxes.new_tensor([image["width"], image["height"]] * 2) / images.shape[-1]
                    found.append((boxes * scale, scores, labels))
        if task == "det":
            result["det"], result["map_50_95"] = mean_ap(found, split.truth)
        else:
            result[task] = mean_iou(counts) if task == "seg" else correct / len(split)
    return result


@torch.no_grad()
def latency_ms(model, device, size=512, runs=20):
    """Median milliseconds for one size×size image of noise, from the normalised tensor to all outputs after NMS."""
    model.eval()
    image = torch.randn(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    times = []
    for _ in range(runs + 5):
        start = time.perf_counter()
        out = model(image)
        detections(out["det"][0])
        if image.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[5:])


def drop(task, reference, final):
    """Relative loss (reference - final) / reference; None where the reference was never learned."""
    return None if reference < LEARNED[task] else (reference - final) / reference


def judge(results):
    """Adds `drop`, `drop_own`, `verdict` and `bonus` to a run's results, by the rules of the challenge.

    drop compares with the single-task baseline, drop_own with the score right after the task's own stage; a task
    passes if both are at most 5 %. The bonus is every final score at or above its baseline.
    """
    final, baseline, matrix = results["final"], results["baseline"], results["matrix"]
    results["drop"] = {t: drop(t, baseline[t], final[t]) for t in TASKS}
    results["drop_own"] = {t: drop(t, matrix[stage][t], final[t]) for stage, t in enumerate(TASKS)}
    verdict = {t: all(d is not None and d <= MAX_DROP + 1e-9 for d in (results["drop"][t], results["drop_own"][t]))
               for t in TASKS}
    verdict |= {"params": results["params"] < MAX_PARAMS, "latency": results["latency_ms"] <= MAX_LATENCY_MS,
                "time": results["seconds"]["stages"] <= MAX_SECONDS}
    results["verdict"] = {**verdict, "all": all(verdict.values())}
    results["bonus"] = all(d is not None and d <= 0 for d in results["drop"].values())


def percent(value):
    return "not learned" if value is None else f"{value:+.1%}"


def show(results):
    """The run's table as text: per task baseline, after own stage, final, both drops, PASS or FAIL."""
    rows = ["task  metric  baseline  own stage    final      drop  drop_own"]
    for stage, t in enumerate(TASKS):
        rows.append(f"{t:5} {NAMES[t]:7} {results['baseline'][t]:8.3f} {results['matrix'][stage][t]:10.3f} "
                    f"{results['final'][t]:8.3f} {percent(results['drop'][t]):>9} {percent(results['drop_own'][t]):>9} "
                    f"{'PASS' if results['verdict'][t] else 'FAIL'}")
    state = {key: "PASS" if ok else "FAIL" for key, ok in results["verdict"].items()}
    rows.append(f"mAP@50:95 {results['map_50_95']:.3f} · {results['params']:,} parameters {state['params']} · "
                f"{results['latency_ms']:.0f} ms at 512×512 {state['latency']} · "
                f"stages {results['seconds']['stages']:.0f} s {state['time']}")
    return "\n".join(rows + [f"all: {state['all']}" + " with bonus" * results["bonus"]])


def compare(folders):
    """Runs -> a Markdown table: a row per strategy, mean ± std over its seeds. Runs that differ in more than the seed
    stand in rows of their own, which name the arguments that differ."""
    groups = {}
    for folder in folders:
        try:
            results = json.loads((Path(folder) / "results.json").read_text())
            args = {k: v for k, v in results["args"].items() if k not in ("seed", "out", "data", "eval_every")}
            groups.setdefault(json.dumps([args, results["data"]["sha256"]]), {})[results["args"]["seed"]] = results
        except (OSError, ValueError, KeyError) as e:
            print(f"skipped {folder}: no finished run ({type(e).__name__})", file=sys.stderr)
    settings = [json.loads(key)[0] for key in groups]
    varying = [k for k in (settings[0] if settings else ()) if any(s.get(k) != settings[0][k] for s in settings)]

    def cell(values, style):
        known = [v for v in values if v is not None]
        if not known:
            return "not learned"
        spread = f" ± {format(statistics.stdev(known), style.lstrip('+'))}" if len(known) > 1 else ""
        return format(statistics.mean(known), style) + spread

    columns = [f"{NAMES[t]} {what}" for t in TASKS for what in ("baseline", "final", "drop")]
    head = ["strategy", "seeds", *columns, "pass"]
    lines = [head, ["---"] * len(head)]
    for args, runs in zip(settings, map(list, map(dict.values, groups.values()))):
        row = [", ".join([args["strategy"], *(f"{k} {args.get(k)}" for k in varying if k != "strategy")])]
        row.append(str(len(runs)))
        for t in TASKS:
            row += [cell([r["baseline"][t] for r in runs], ".3f"), cell([r["final"][t] for r in runs], ".3f"),
                    cell([r["drop"][t] for r in runs], "+.1%")]
        lines.append(row + [f"{sum(r['verdict']['all'] for r in runs)}/{len(runs)}"])
    if len(lines) == 2:
        raise UserError("No finished run among the folders; pass run folders that hold a results.json, as in runs/*.")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(compare(sys.argv[1:] or sys.exit("usage: python metrics.py RUN [RUN ...]")))
