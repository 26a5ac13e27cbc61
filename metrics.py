"""The three metrics, parameters and latency, and the challenge's verdict; `python metrics.py runs/*` compares runs.

Every number is computed once over a whole split, never averaged over batches or images.
"""
import contextlib
import hashlib
import io
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
from torchvision.models import mobilenet_v3_small
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from data import FOLDERS, IGNORE, TASKS, MiniSet, UserError
from forgetting import REMEDIES, preset
from model import detections, load_model, normalise, take

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
        for part in (slice(start, start + batch_size) for start in range(0, len(split), batch_size)):
            images, target = take(split.batch, part, device)
            out, truth = model(normalise(images), (task,), upsample=False)[task], split.truth[part]
            if task == "cls":
                correct += (out.argmax(1) == target["labels"][:, 0]).sum().item()
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


def evaluate_saved(args):
    """Measures the model of `--eval` on the val split of a folder in the layout -> the dict that it writes as JSON."""
    (model, size, classes), root = load_model(args.eval), Path(args.data)
    tasks = [t for t in TASKS if t in args.tasks or ("all" in args.tasks and (root / FOLDERS[t]).is_dir())]
    if not tasks:
        raise UserError(f"--data {root}: holds none of {', '.join(FOLDERS.values())}; name a folder in that layout.")
    for t in [t for t in TASKS if "all" in args.tasks and t not in tasks]:
        print(f"{root / FOLDERS[t]} is missing: {NAMES[t]} is not measured")
    val = {t: MiniSet(root, t, "val", size, classes[t], skip_unknown=True) for t in tasks}
    measured = evaluate(model.to(args.device, memory_format=torch.channels_last), val, args.device)
    result = {key: measured.get(key) for key in (*TASKS, "map_50_95")} | {"n": {t: len(val[t]) for t in tasks}}
    for t in tasks:
        extra = f" (mAP@50:95 {result['map_50_95']:.4f})" if t == "det" else ""
        print(f"{t}: {NAMES[t]} {result[t]:.4f}{extra} on {len(val[t])} images")
    file = Path(args.out or Path(args.eval).parent / "eval.json")
    write_json(file, result)
    print(f"Wrote {file}")
    return result


class Clock:
    """Time left, from the training images still to come at the speed of those seen so far."""

    def __init__(self, images):
        self.images, self.seen, self.seconds = images, 0, 0.0

    def tick(self, images, seconds):
        self.seen, self.seconds = self.seen + images, self.seconds + seconds

    def left(self):
        return duration(self.seconds / max(1, self.seen) * max(0, self.images - self.seen))


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def interleaved(calls, runs, device):
    """Calls every one of {name: function} in turn, `runs` times after 3 to warm up -> {name: [milliseconds]}. In turn,
    because a machine's other work then slows all of them alike: compare ratios, not times of different minutes."""
    times = {name: [] for name in calls}
    for _ in range(3 + runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if "cuda" in str(device):
                torch.cuda.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: ms[3:] for name, ms in times.items()}


@torch.no_grad()
def latencies(model, device, runs=20, rivals=False, size=512):
    """Milliseconds for one normalised size×size image of noise, to boxes after NMS, class map and class: {name: [ms]}.
    rivals: also of the three torchvision networks that one would otherwise run for these answers, in the same turns, as
    they come and in channels_last; untrained and biased towards background, so that they find no box: nor do we then.
    """
    image = torch.randn(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    model.eval()

    def ours():
        out = model(image)
        return detections(out["det"][0]), out["seg"].argmax(1), out["cls"].argmax(1)

    calls = {"OneHead": ours}
    for layout in ("contiguous_format", "channels_last") if rivals else ():
        no = {"weights": None, "weights_backbone": None}
        nets = (lraspp_mobilenet_v3_large(**no, num_classes=21), ssdlite320_mobilenet_v3_large(**no, num_classes=11),
                mobilenet_v3_small(num_classes=10))
        for layers in nets[1].head.classification_head.module_list:
            layers[-1].bias.view(-1, 11)[:, 0] = 8  # background: random weights would flood the NMS with boxes
        segment, detect, classify = (n.eval().to(device, memory_format=getattr(torch, layout)) for n in nets)
        x = image.contiguous(memory_format=getattr(torch, layout))
        calls |= {f"lraspp_mobilenet_v3_large {layout}": lambda x=x, net=segment: net(x)["out"].argmax(1),
                  f"ssdlite320_mobilenet_v3_large {layout}": lambda x=x, net=detect: net([x[0]]),
                  f"mobilenet_v3_small {layout}": lambda x=x, net=classify: net(x).argmax(1)}
    return interleaved(calls, runs, device)


def benchmark(model, steps, args):
    """Measures size and speed on this machine -> the dict that it prints and writes to args.out.

    steps: {task: (images a step, {"whole", "bare": a training step, "strategy": two}, seconds that the remedies took
    to remember the earlier tasks)}, see `train.trial_steps`. Medians of 20 rounds.
    """
    training = {}
    for task, (images, calls, seconds) in steps.items():
        ms = {name: statistics.median(times) for name, times in interleaved(calls, 20, args.device).items()}
        training[task] = {"images_per_s": 1000 * images / ms["whole"], "bare_images_per_s": 1000 * images / ms["bare"],
                          "whole_over_bare": ms["whole"] / ms["bare"],
                          "strategy_over_whole": ms["strategy"] / (2 * ms["whole"]), "remember_s": seconds}
        print(f"training {task} {training[task]['images_per_s']:7.1f} images/s at {args.image_size} px, "
              f"{ms['whole'] / ms['bare']:.3f} × the time of bare steps; {args.strategy}: × "
              f"{training[task]['strategy_over_whole']:.3f}, and {seconds:.1f} s to remember", flush=True)
    memory = peak_memory(args.device)
    latency = {name: dict(zip(("p50", "p95"), np.percentile(ms, (50, 95)).tolist()))
               for name, ms in latencies(model, args.device, rivals=True).items()}
    for name, ms in latency.items():
        print(f"{name:47} {ms['p50']:6.1f} ms a 512×512 image (p95 {ms['p95']:.1f})")
    ours, *rivals = (ms["p50"] for ms in latency.values())
    ratios = [sum(rivals[:3]) / ours, sum(rivals[3:]) / ours]
    print("three networks together: {:.2f} × OneHead as they come, {:.2f} × in channels_last".format(*ratios))
    result = {"args": vars(args), "device": device_name(args.device), "torch": torch.__version__,
              "parameters": sum(p.numel() for p in model.parameters()), "latency_ms": latency, "training": training,
              "rivals_over_ours": ratios, "peak_memory_gib": memory and round(memory / 2**30, 2)}
    print(f"{result['parameters']:,} parameters, peak memory while training {result['peak_memory_gib'] or 'unknown'} "
          f"GiB, {result['device']}")
    write_json(args.out, result)
    print(f"Wrote {args.out}")
    return result


def peak_memory(device):
    """The most bytes in use so far: on a GPU by tensors, else by the process; None where that is not counted."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device):
    return torch.cuda.get_device_name(device) if "cuda" in device else f"{device}, {torch.get_num_threads()} threads"


def digest(*paths):
    """SHA-256 over the contents of files and folders (names inside a folder count, its own path does not)."""
    result = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                result.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return result.hexdigest()


def write_json(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.part").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.part", path)


def drop(task, reference, final):
    """Relative loss (reference - final) / reference; None where the reference was never learned."""
    return None if reference < LEARNED[task] else (reference - final) / reference


def judge(results):
    """Adds `own`, `drop`, `drop_own`, `verdict` and `bonus` to a run's results, by the rules of the challenge.

    own is the score right after the task's own stage. drop compares with the single-task baseline, drop_own with own; a
    task passes if both are at most 5 %. The bonus is every final score at or above its baseline.

    And `continual`, the literature's measures of the matrix R[stage, task], in units of the scores: ACC, the mean of
    the final scores; BWT, backward transfer, the mean of R[last, j] - R[j, j] over the tasks j before the last
    (Lopez-Paz & Ranzato 2017, arXiv:1706.08840, section 2); forgetting, the mean of max_l R[l, j] - R[last, j] over the
    same tasks and the stages l before the last (Chaudhry et al. 2018, arXiv:1801.10112, eq. 3). Joint training has one
    stage: no R, own is final, and so its verdict looks at the drop alone.
    """
    final, baseline, matrix = results["final"], results["baseline"], results["matrix"]
    results["own"] = own = {t: matrix[min(stage, len(matrix) - 1)][t] for stage, t in enumerate(TASKS)}
    results["drop"] = {t: drop(t, baseline[t], final[t]) for t in TASKS}
    results["drop_own"] = {t: drop(t, own[t], final[t]) for t in TASKS}
    results["continual"] = {"ACC": statistics.mean(final.values()), "BWT": None, "forgetting": None}
    if len(matrix) > 1:
        best = {t: max(row[t] for row in matrix[:-1]) for t in TASKS}
        results["continual"] |= {"BWT": statistics.mean(final[t] - own[t] for t in TASKS[:-1]),
                                 "forgetting": statistics.mean(best[t] - final[t] for t in TASKS[:-1])}
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
    for t in TASKS:
        rows.append(f"{t:5} {NAMES[t]:7} {results['baseline'][t]:8.3f} {results['own'][t]:10.3f} "
                    f"{results['final'][t]:8.3f} {percent(results['drop'][t]):>9} {percent(results['drop_own'][t]):>9} "
                    f"{'PASS' if results['verdict'][t] else 'FAIL'}")
    state = {key: "PASS" if ok else "FAIL" for key, ok in results["verdict"].items()}
    rows.append(f"mAP@50:95 {results['map_50_95']:.3f} · {results['params']:,} parameters {state['params']} · "
                f"{results['latency_ms']:.0f} ms at 512×512 {state['latency']} · "
                f"stages {results['seconds']['stages']:.0f} s {state['time']}")
    return "\n".join(rows + [f"all: {state['all']}" + " with bonus" * results["bonus"]])


def acting(args):
    """The arguments that bear on a run's scores: not its seed and places, nor flags of remedies that took no part."""
    idle = {*REMEDIES, "seed", "seeds", "out", "data", "eval"} - {*args["strategy"].split("+")}
    return {k: v for k, v in args.items() if k.split("_")[0] not in idle}


def load_run(folder):
    """A finished run's results, judged by today's rules, and `common`, what its seeds agree in. Raises UserError."""
    try:
        results = json.loads((Path(folder) / "results.json").read_text())
        judge(results)
        data = [digest[:6] for digest in results["data"]["sha256"].values()]
        return results | {"common": acting(results["args"]) | {"data": data}}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: holds no results.json of a finished run ({type(e).__name__}).")


def compare(folders):
    """Runs -> a Markdown table: a row per strategy, mean ± std over its seeds, and how many of them pass (`judge`).
    Runs that differ in more than the seed have rows of their own, which name what is neither default nor most rows'."""
    groups = {}  # {seed: results} of runs that have all else in common; of two with one seed the last counts
    for folder in folders:
        try:
            results = load_run(folder)
            groups.setdefault(json.dumps(results["common"]), {})[results["args"]["seed"]] = results
        except UserError as e:
            print(f"skipped {e}", file=sys.stderr)
    settings = [json.loads(key) for key in groups]
    if not groups:
        raise UserError("No finished run among the folders; pass run folders that hold a results.json, as in runs/*.")
    usual = {k: statistics.multimode(str(s[k]) for s in settings if k in s) for one in settings for k in one}

    def cell(values, style, missing="–"):
        known = [v for v in values if v is not None]
        spread = f" ± {format(statistics.stdev(known), style.lstrip('+'))}" if len(known) > 1 else ""
        spread += f" ({len(known)} seeds)" * (len(known) < len(values))
        return format(statistics.mean(known), style) + spread if known else missing

    columns = [f"{NAMES[t]} {what}" for t in TASKS for what in ("baseline", "final", "drop", "drop_own", "pass")]
    lines = [head := ["strategy", "seeds", *columns, "ACC", "BWT", "forgetting", "all pass"], ["---"] * len(head)]
    for common, runs in zip(settings, ([*group.values()] for group in groups.values())):
        expected = usual | {k: [str(v)] for k, v in preset(common["strategy"], common["weights"]).items()}
        unusual = [f"{k} {v}" for k, v in common.items() if k != "strategy" and [str(v)] != expected[k]]
        row, target = [", ".join([common["strategy"], *unusual]), str(len(runs))], common["strategy"] == "joint"
        passes = {k: "–" if target else f"{sum(r['verdict'][k] for r in runs)}/{len(runs)}" for k in (*TASKS, "all")}
        for t in TASKS:
            row += [cell([r[key][t] for r in runs], ".3f") for key in ("baseline", "final")]
            row += [cell([r[k][t] for r in runs], "+.1%", "not learned") for k in ("drop", "drop_own")] + [passes[t]]
        measures = (cell([r["continual"][name] for r in runs], ".3f") for name in ("ACC", "BWT", "forgetting"))
        lines.append([*row, *measures, passes["all"]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(compare(sys.argv[1:] or sys.exit("usage: python metrics.py RUN [RUN ...]")))
