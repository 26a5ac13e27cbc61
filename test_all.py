"""Tests in three layers: 1. oracles, computed by hand or by an independent slow implementation,
2. invariants, which must hold whatever the numbers are, 3. small whole runs.

    pytest test_all.py        needs no network and no photos
"""
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from copy import deepcopy
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import Conv2dNormActivation, box_iou, generalized_box_iou_loss
from torchvision.transforms.functional import pil_to_tensor

import data
import forgetting
import losses
import metrics
import train
from data import IGNORE, TASKS, MiniSet, UserError, augment, normalise, take
from model import (BACKBONES, CLS, DET, NECKS, SEG, OneHead, cells, decode, detections, encode,
                   load_model, load_weights, read_checkpoint, save_model)

VAL_BOXES = "mini_coco_det/annotations/mini_instances_val2017.json"


# -- What the tests share

def small_backbone():
    """Three layers with the strides 8, 16 and 32."""
    layers = [Conv2dNormActivation(into, out, 3, stride)
              for into, out, stride in ((3, 8, 8), (8, 16, 2), (16, 24, 2))]
    return SimpleNamespace(features=torch.nn.Sequential(*layers))


SMALL = small_backbone, (0, 1, 2), None  # as an entry in BACKBONES


@pytest.fixture(scope="session", autouse=True)
def what_takes_long():
    """Measures latency on small images, draws small ones and hashes the code once: nothing here
    depends on it. Knows the small backbone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "small", SMALL)
        patch.setattr(train, "code_digest", cache(train.code_digest))
        short = partial(metrics.latency, runs=2, size=64)
        patch.setattr(train, "latency", short)
        for name in ("examples", "draw_examples"):
            patch.setattr(train, name, partial(getattr(metrics, name), side=40))
        yield


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder of tiny mini-sets: 12 train and 10 val images of 64 px per task."""
    root = tmp_path_factory.mktemp("shapes") / "tiny"
    data.write_shapes(root, {"train": 12, "val": 10}, size=64, seed=3)
    return root


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """The same with four train and two val images per task."""
    root = tmp_path_factory.mktemp("shapes") / "few"
    data.write_shapes(root, {"train": 4, "val": 2}, size=64, seed=3)
    return root


@pytest.fixture
def shapes_copy(shapes, tmp_path):
    """A copy of the shapes that a test may damage."""
    return Path(shutil.copytree(shapes, tmp_path / "copy"))


def tiny_flags(shapes, out, *more):
    """A command line that trains for a second."""
    return ["--data", str(shapes), "--out", str(out), "--weights", "none", "--image-size", "64",
            "--epochs", "1", "--lr", "1e-3", "--trunk-lr", "1", "--batch-size", "6",
            "--device", "cpu", *more]


def small_flags(few, out, strategy):
    """A command line that trains the small backbone for a moment, two epochs in each stage."""
    return tiny_flags(few, out, "--strategy", strategy, "--backbone", "small", "--width", "16",
                      "--hidden", "16", "--own-channels", "8", "--epochs", "2", "--image-size",
                      "32", "--batch-size", "2")


def tiny_args(shapes, *more):
    """The same as parsed arguments of one run."""
    args = train.parse(tiny_flags(shapes, "unused", *more))
    args.seed = args.seed[0]
    return args


@pytest.fixture(scope="session")
def tiny_run(shapes):
    """What `train_stage` needs beside a model: arguments and loaded data."""
    return train.Run(tiny_args(shapes))


@pytest.fixture(scope="session")
def few_run(few):
    """The same with few images, for what looks at each of them."""
    return train.Run(tiny_args(few, "--batch-size", "2"))


@pytest.fixture(scope="session")
def after_stage_1(tiny_run):
    model = train.new_model(tiny_run.args)
    train.train_stage(model, "seg", tiny_run)
    model.fix_batchnorm()
    return model


@pytest.fixture
def trained_model(after_stage_1):
    """A model as a remedy meets it: after Stage 1, with fixed BatchNorm. A copy for each test."""
    return deepcopy(after_stage_1).train()


@pytest.fixture(scope="session")
def finished(shapes, tmp_path_factory):
    """One finished run with replay: (its folder, its results)."""
    out = tmp_path_factory.mktemp("runs") / "replay-seed0"
    return out, train.main(tiny_flags(shapes, out))


@pytest.fixture(scope="session")
def two_seeds(few, tmp_path_factory):
    """Two finished runs of one command: (its --out, both results)."""
    out = tmp_path_factory.mktemp("runs") / "two"
    return out, train.main([*small_flags(few, out, "none"), "--seed", "0", "1"])


def augmented(tiny_run, task, n=4, seed=0):
    """A batch of a task as a step of training sees it."""
    torch.manual_seed(seed)
    return augment(*take(tiny_run.train[task].batch, slice(n)))


def copies(named_tensors):
    return {name: tensor.detach().clone() for name, tensor in named_tensors}


def all_equal(before, named_tensors):
    return all(torch.equal(before[name], tensor) for name, tensor in named_tensors)


def jolt(model, seed=0):
    """Moves every weight a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)


def square_cells(size, strides=(8, 16, 32)):
    return cells(size, size, strides, torch.device("cpu"))


def file_contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes()
            for p in sorted(root.rglob("*")) if p.is_file()}


def photos_in(root):
    """The bytes of all photos below a folder."""
    return [content for name, content in file_contents(root).items()
            if name.lower().endswith(("jpg", "jpeg"))]


def edit_json(file, edit):
    """Rewrites a JSON file after edit(its content)."""
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------ layer 1: oracles
# -- Metrics

def slow_iou(predicted, truth, classes):
    """mIoU from sets of pixels, class by class."""
    ious = []
    for c in range(classes):
        p = {i for i, (a, b) in enumerate(zip(predicted, truth)) if a == c and b != IGNORE}
        t = {i for i, b in enumerate(truth) if b == c}
        if p | t:
            ious.append(len(p & t) / len(p | t))
    return sum(ious) / len(ious)


@pytest.mark.parametrize("seed", range(5))
def test_miou_agrees_with_pixel_sets(seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 3, 7, IGNORE], 500)
    predicted = np.where(rng.random(500) < 0.5, truth % 21, rng.integers(0, 9, 500))
    counts = metrics.confusion(predicted[:200], truth[:200])
    counts = counts + metrics.confusion(predicted[200:], truth[200:])
    expected = slow_iou(predicted, truth, 21)
    assert metrics.mean_iou(counts) == pytest.approx(expected, abs=1e-9)


def test_miou_of_oracle_background_and_nothing():
    truth = np.array([0] * 90 + [1] * 5 + [2] * 5 + [IGNORE] * 20)
    oracle = np.where(truth == IGNORE, 4, truth)  # what is said about ignored pixels is free
    confused = np.where(truth == 1, 3, oracle)
    for predicted, expected in ((oracle, 1), (0 * truth, 0.9 / 3), (confused, 2 / 4)):
        counts = metrics.confusion(predicted, truth)
        assert metrics.mean_iou(counts) == pytest.approx(expected)
    assert metrics.mean_iou(np.zeros((21, 21), int)) == 0


def interpolated_precision(hits, total):
    """Area under a precision-recall curve, read off at 101 recalls. hits: best score first."""
    tp = np.cumsum(hits)
    recall, precision = tp / total, tp / np.arange(1, len(hits) + 1)
    points = []
    for r in np.linspace(0, 1, 101):
        reached = recall >= r - 1e-12
        points.append(precision[reached].max() if reached.any() else 0)
    return np.mean(points)


def slow_ap(predictions, truth, iou, classes=10):
    """COCO's AP at one IoU threshold: matching from the best score on, each box once."""
    aps = []
    for c in range(classes):
        boxes = [[b["xyxy"] for b in record["boxes"] if b["label"] == c] for record in truth]
        total = sum(map(len, boxes))
        if not total:
            continue
        free = [[True] * len(b) for b in boxes]
        rows = [(s.item(), i, b) for i, p in enumerate(predictions) for b, s, k in zip(*p)
                if k == c]
        hits = []
        for _, i, box in sorted(rows, key=lambda row: -row[0]):
            best, best_iou = None, iou
            for j, other in enumerate(boxes[i]):
                other = torch.tensor([other], dtype=torch.float64)
                overlap = box_iou(box[None].double(), other).item()
                if free[i][j] and overlap >= best_iou:
                    best, best_iou = j, overlap
            if best is not None:
                free[i][best] = False
            hits.append(best is not None)
        aps.append(interpolated_precision(hits, total) if hits else 0)
    return float(np.mean(aps))


def random_box(rng):
    x, y = rng.uniform(0, 60, 2)
    w, h = rng.uniform(8, 40, 2)
    return {"name": "?", "label": int(rng.integers(0, 4)), "iscrowd": 0,
            "xyxy": [x, y, x + w, y + h], "area": w * h}


def random_scene(rng, images=6):
    """Predictions, of which some are near a true box and some are far, and their truth."""
    truth, predictions = [], []
    for _ in range(images):
        boxes = [random_box(rng) for _ in range(rng.integers(0, 6))]
        truth.append({"width": 100, "height": 100, "boxes": boxes})
        far = [random_box(rng) for _ in range(4)]
        near = [np.array(box["xyxy"]) + rng.normal(0, 2, 4) for box in boxes]
        found = np.array([*near, *(box["xyxy"] for box in far)])
        labels = [box["label"] for box in boxes + far]
        scores = rng.random(len(labels))
        predictions.append(tuple(map(torch.tensor, (found, scores, labels))))
    return predictions, truth


@pytest.mark.parametrize("seed", range(4))
def test_map_agrees_with_independent_computation(seed):
    predictions, truth = random_scene(np.random.default_rng(seed))
    ap50, ap = metrics.mean_ap(predictions, truth)
    assert 0 < ap < ap50 < 1
    assert ap50 == pytest.approx(slow_ap(predictions, truth, 0.5), abs=1e-6)
    slow = [slow_ap(predictions, truth, iou) for iou in np.linspace(0.5, 0.95, 10)]
    assert ap == pytest.approx(np.mean(slow), abs=1e-6)


def perfect_predictions(truth):
    return [(torch.tensor([b["xyxy"] for b in record["boxes"]]).reshape(-1, 4),
             torch.ones(len(record["boxes"])),
             torch.tensor([b["label"] for b in record["boxes"]], dtype=int))
            for record in truth]


def no_predictions(truth):
    return [(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=int)) for _ in truth]


def test_map_of_oracle_nothing_and_crowds():
    _, truth = random_scene(np.random.default_rng(2))
    perfect, nothing = perfect_predictions(truth), no_predictions(truth)
    assert metrics.mean_ap(perfect, truth) == pytest.approx((1, 1))
    assert metrics.mean_ap(nothing, truth) == (0, 0)
    for record in truth:  # a crowd that nobody found is no miss
        crowd = {"label": 0, "xyxy": [0, 0, 90, 90], "iscrowd": 1, "area": 8100}
        record["boxes"].append(crowd)
    assert metrics.mean_ap(perfect, truth) == pytest.approx((1, 1))


class Oracle(torch.nn.Module):
    """Answers with the truth of the images it is shown, in the order of the split."""

    def __init__(self, split):
        super().__init__()
        self.split, self.at = split, 0

    def forward(self, images, tasks):
        part = slice(self.at, self.at + len(images))
        self.at += len(images)
        _, target = take(self.split.batch, part)
        if tasks == ("cls",):
            return {"cls": F.one_hot(target["labels"][:, 0], 10).float()}
        if tasks == ("seg",):
            masks = torch.stack([torch.from_numpy(mask % 255) for mask in self.split.truth[part]])
            return {"seg": F.one_hot(masks.long(), 21).permute(0, 3, 1, 2) * 9.0}
        det = torch.full((len(images), 40, 15), -20.0)
        for row, boxes, labels in zip(det, target["boxes"], target["labels"]):
            m = (labels >= 0).sum()
            row[:m, :4] = boxes[:m]
            row[:m, 4] = 20
            row[range(m), 5 + labels[:m]] = 20
        return {"det": det}


def stretch(root, size=(96, 64)):
    """Makes every photo, mask and annotation of the val splits `size` instead of 64×64."""
    for pattern in ("*/val/*.jpg", "*/val/*.png", "*/val/*/*.JPEG"):
        for file in root.glob(pattern):
            Image.open(file).resize(size, Image.NEAREST).save(file)

    def widen(coco):
        for image in coco["images"]:
            image["width"], image["height"] = size
        for a in coco["annotations"]:
            a["bbox"] = [v * n / 64 for v, n in zip(a["bbox"], 2 * size)]
    edit_json(root / VAL_BOXES, widen)


@pytest.mark.parametrize("task, key", [("seg", "seg"), ("det", "map_50_95"), ("cls", "cls")])
def test_oracle_scores_one_in_every_metric_on_oblong_images(shapes_copy, task, key):
    stretch(shapes_copy)
    split = MiniSet(shapes_copy, task, "val", 32)
    scores = metrics.evaluate(Oracle(split), {task: split}, "cpu", batch_size=3)
    assert scores[key] == pytest.approx(1)
    if task == "seg":
        assert split.truth[0].shape == (64, 96)
    elif task == "det":
        truth = torch.tensor(split.truth[0]["boxes"][0]["xyxy"], dtype=torch.float32)
        expected = truth * torch.tensor([32 / 96, 32 / 64, 32 / 96, 32 / 64])
        torch.testing.assert_close(split.batch[1]["boxes"][0, 0], expected)


class LeftHalf(torch.nn.Module):
    """Answers class 1 on the left half of a 2×2 map and class 0 on the right half."""

    def forward(self, images, tasks):
        logits = torch.zeros(len(images), 21, 2, 2)
        logits[:, 0, :, 1] = logits[:, 1, :, 0] = 1
        return {"seg": logits}


def test_miou_is_measured_at_the_original_resolution(shapes_copy):
    mask = np.zeros((64, 96), np.uint8)
    mask[:, :72] = 1
    for file in (shapes_copy / "mini_voc_seg/val").glob("*.png"):
        Image.fromarray(mask).save(file)
        Image.new("RGB", (96, 64)).save(file.with_suffix(".jpg"))
    split = MiniSet(shapes_copy, "seg", "val", 32)
    scores = metrics.evaluate(LeftHalf(), {"seg": split}, "cpu")
    assert scores["seg"] == pytest.approx((48 / 72 + 24 / 48) / 2)


def made_up_results():
    matrix = [{"seg": 0.5, "det": 0, "cls": 0.1}, {"seg": 0.4, "det": 0.25, "cls": 0.1},
              {"seg": 0.475, "det": 0.2, "cls": 0.9}]
    return {"baseline": {"seg": 0.5, "det": 0.2, "cls": 0.9}, "matrix": matrix,
            "final": matrix[2], "params": 10, "latency_ms": 10, "seconds": {"stages": 1}}


def test_drops_and_verdict_follow_the_rules():
    results = made_up_results()
    metrics.judge(results)
    assert results["own"] == {"seg": 0.5, "det": 0.25, "cls": 0.9}
    assert results["drop"] == pytest.approx({"seg": 0.05, "det": 0, "cls": 0})
    assert results["drop_own"] == pytest.approx({"seg": 0.05, "det": 0.2, "cls": 0})
    assert results["verdict"] == {"seg": True, "det": False, "cls": True, "params": True,
                                  "latency": True, "time": True, "all": False}
    assert not results["bonus"]


def test_chance_cannot_be_forgotten_and_does_not_pass():
    results = made_up_results()
    results["baseline"]["cls"] = 0.19
    metrics.judge(results)
    assert results["drop"]["cls"] is None
    assert not results["verdict"]["cls"]
    results["map_50_95"] = 0
    header, *rows = metrics.show(results).splitlines()[:4]
    assert rows[2].index("not learned") + 11 == header.index("drop ") + 4
    assert len({row.rindex(" ") for row in rows}) == 1


def test_joint_training_has_one_stage_and_no_score_below_its_baseline_earns_the_bonus():
    results = made_up_results()
    results["baseline"]["seg"] = 0.4
    results["matrix"] = results["matrix"][2:]
    metrics.judge(results)
    assert results["own"] == results["final"]
    assert set(results["drop_own"].values()) == {0}
    assert results["verdict"]["all"] and results["bonus"]


def test_mean_and_spread_by_hand():
    assert metrics.mean_and_spread([0.1, 0.3], ".3f") == "0.200±0.141"
    assert metrics.mean_and_spread([0.1, None], "+.1%") == "+10.0% (1 of 2)"
    assert metrics.mean_and_spread([None], "+.1%") == "not learned"


# -- The model

def test_decode_and_encode_are_inverse():
    torch.manual_seed(0)
    grid = square_cells(128)
    t = torch.randn(len(grid), 4)
    boxes = decode(t, grid)
    torch.testing.assert_close(encode(boxes, grid), t, rtol=1e-4, atol=1e-4)
    again = decode(encode(boxes, grid), grid)
    torch.testing.assert_close(again, boxes, rtol=1e-4, atol=1e-3)


def test_outputs_come_from_their_levels():
    torch.manual_seed(0)
    model, images = OneHead().eval(), torch.randn(2, 3, 64, 96)
    out = model(images)
    levels = model.neck(dict(enumerate(model.backbone(images)))).values()
    *_, coarsest = levels
    maps = [model.head(level) for level in levels]
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (2, 3)]
    summed = sum(F.interpolate(m[:, SEG], (8, 12), mode="bilinear") for m in maps)
    scene = coarsest.mean((2, 3))[..., None, None].expand(2, 128, 9, 9)
    scene = model.head(scene)[:, SEG, 4:5, 4:5]  # far from the border
    torch.testing.assert_close(out["seg"], summed + scene)
    row = 96 + 7  # row 1, column 1 of the second level
    torch.testing.assert_close(out["det"][:, row, 4:], maps[1][:, DET][:, 4:, 1, 1])
    boxes = decode(maps[1][:, DET][:, :4, 1, 1], torch.tensor([24.0, 24, 16]))
    torch.testing.assert_close(out["det"][:, row, :4], boxes)
    torch.testing.assert_close(out["cls"], maps[2][:, CLS].mean((2, 3)))


def test_detections_are_per_class_sorted_and_limited():
    det = torch.full((4, 15), -9.0)
    det[:, :4] = torch.tensor([[6.0, 6, 14, 14], [6.5, 6, 14.5, 14], [6, 6, 14, 14],
                               [36, 36, 44, 44]])
    det[:, 4] = torch.tensor([2.0, 1.0, 0.0, -9.0])
    det[range(3), [5, 5, 7]] = 9.0
    boxes, scores, labels = detections(det)
    assert labels.tolist() == [0, 2]  # the second row is suppressed, the last below the floor
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert boxes[0].tolist() == [6, 6, 14, 14]
    torch.manual_seed(0)
    many = torch.rand(5000, 15)
    many[:, :2] *= 200
    many[:, 2:4] = many[:, :2] + 5
    assert len(detections(many)[0]) == 100
    assert len(detections(many, candidates=50)[0]) <= 50


# -- Losses

def test_worked_example_assigns_the_cell_84_and_its_neighbours():
    grid = square_cells(256)
    box, labels = torch.tensor([[[40.0, 60, 104, 124]]]), torch.tensor([[5]])
    positive = (losses.assign(box, labels, grid)[0] >= 0).nonzero()[:, 0]
    found = (positive - 32 * 32).tolist()  # behind the finer level's cells
    assert found == [16 * row + column for row in (4, 5, 6) for column in (3, 4, 5)]
    assert grid[32 * 32 + 84].tolist() == [72, 88, 16]
    assert encode(box[0, 0], grid[32 * 32 + 84]).tolist() == [0, 0.25, 0, 0]


def test_worked_example_costs_what_it_says():
    truth, predicted = torch.tensor([[40.0, 60, 104, 124], [48, 60, 112, 124]])
    loss = losses.giou_loss(predicted, truth).item()
    assert 1 - loss == pytest.approx(3584 / 4608, rel=1e-5)
    assert round(1 - loss, 3) == 0.778
    assert round(loss, 3) == 0.222


def slow_assign(boxes, labels, grid, radius=1.5):
    """The rule of `assign` as loops over cells and boxes."""
    strides = grid[:, 2].unique().tolist()
    index = []
    for x, y, s in grid.tolist():
        best = float("inf"), -1
        for j, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            longer, cx, cy = max(x2 - x1, y2 - y1), (x1 + x2) / 2, (y1 + y2) / 2
            level = next((t for t in strides if longer < 8 * t), strides[-1])
            home = cx // s == x // s and cy // s == y // s
            inside = x1 < x < x2 and y1 < y < y2
            near = abs(x - cx) < radius * s and abs(y - cy) < radius * s
            if labels[j] >= 0 and level == s and (home or inside and near):
                best = min(best, ((x2 - x1) * (y2 - y1), j))
        index.append(best[1])
    return index


@pytest.mark.parametrize("seed", range(3))
def test_assignment_agrees_with_loops(seed):
    torch.manual_seed(seed)
    grid = square_cells(192)
    corner = torch.rand(12, 2) * 150
    opposite = (corner + torch.rand(12, 1) ** 2 * 180 + 3).clamp(max=191)
    boxes, labels = torch.cat([corner, opposite], 1), torch.arange(12) % 6 - 1
    index = losses.assign(boxes[None], labels[None], grid)[0]
    assert index.tolist() == slow_assign(boxes, labels, grid)


def test_the_smaller_box_wins_a_contested_cell_and_rows_are_y():
    large, small = [0.0, 0, 60, 64], [24.0, 40, 36, 52]
    boxes = torch.tensor([[large, small], [small, large]])
    labels = torch.tensor([[1, 2], [2, 1]])
    index = losses.assign(boxes, labels, square_cells(64, (8,))).view(2, 8, 8)
    assert index[:, 5, 3].tolist() == [1, 0]  # y = 46 -> row 5, x = 30 -> column 3
    corner, label = torch.tensor([[[60.0, 60, 68, 68]]]), torch.tensor([[0]])
    index = losses.assign(corner, label, square_cells(64, (8,))).view(8, 8)
    assert index[7, 7] == 0  # a centre on the far border stays on the map


def test_giou_agrees_with_torchvision():
    torch.manual_seed(0)
    corners = torch.rand(2, 50, 2) * 30
    a, b = (torch.cat([xy, xy + 1 + torch.rand(50, 2) * 20], 1) for xy in corners)
    expected = generalized_box_iou_loss(a, b)
    torch.testing.assert_close(losses.giou_loss(a, b), expected, rtol=1e-4, atol=1e-5)


def test_detection_loss_by_hand():
    det = torch.zeros(1, 16, 15, requires_grad=True)  # confidence 1/2, all classes alike
    rows = det + torch.tensor([12.0, 12, 20, 20, *[0] * 11])
    box = torch.tensor([[[17.0, 9, 23, 15]]])  # in one cell: row 1, column 2
    distance = generalized_box_iou_loss(rows[0, 0, :4], box[0, 0]).item()
    one, none = torch.tensor([[4]]), torch.tensor([[-1]])
    grid = square_cells(32, (8,))
    loss = losses.det_loss(rows, {"boxes": box, "labels": one}, grid)
    assert loss.item() == pytest.approx(2 * distance + np.log(10) + 16 * np.log(2), rel=1e-5)
    loss = losses.det_loss(rows, {"boxes": box, "labels": none}, grid)
    assert loss.item() == pytest.approx(16 * np.log(2), rel=1e-5)
    loss.backward()
    assert det.grad[..., 4].abs().min() > 0  # confidence covers every cell
    assert det.grad.isfinite().all()


def test_detection_loss_agrees_with_loops_over_boxes():
    torch.manual_seed(0)
    grid = square_cells(64)
    corner = torch.rand(3, 4, 2) * 40
    boxes = torch.cat([corner, corner + 4 + torch.rand(3, 4, 2) * 20], 2)
    labels = torch.tensor([[3, 1, 9, -1], [-1, 2, 2, 0], [-1, -1, -1, -1]])
    det = torch.randn(3, len(grid), 15)
    det[..., :4] = decode(det[..., :4], grid)
    total, positives = 0.0, 0
    for i in range(3):
        for row, j in zip(det[i], slow_assign(boxes[i], labels[i], grid)):
            if j >= 0:
                total += 2 * generalized_box_iou_loss(row[:4], boxes[i, j])
                total += F.cross_entropy(row[5:], labels[i, j])
                positives += 1
            distance = generalized_box_iou_loss(row[:4], boxes[i, j]) if j >= 0 else torch.ones(())
            total += F.binary_cross_entropy(row[4].sigmoid(), (1 - distance).clamp(min=0))
    loss = losses.det_loss(det, {"boxes": boxes, "labels": labels}, grid)
    torch.testing.assert_close(loss, total / positives, rtol=1e-4, atol=1e-4)


def test_losses_of_offsets_and_the_focal_loss_agree_with_hand_computation():
    grid, box = square_cells(32, (8,)), torch.tensor([[[16.0, 8, 48, 40]]])  # centre (32, 24)
    t = torch.zeros(1, 16, 4)
    t[..., 0] = 3.0  # in all cells; in those at x = 28 the true one is (32 - 28) / 8 = 0.5
    det = torch.cat([decode(t, grid), torch.zeros(1, 16, 11)], 2)
    target = {"boxes": box, "labels": torch.tensor([[4]])}
    positive = losses.assign(*target.values(), grid)[0] >= 0
    true = encode(box[0], grid)[positive]  # (P, 4)
    error = (t[0, positive] - true).abs()
    smooth = torch.where(error < 1, error.square() / 2, error - 0.5)
    distance = losses.giou_loss(det[0, positive, :4], box[0])
    quality = torch.zeros(16)
    quality[positive] = (1 - distance).clamp(min=0)
    rest = math.log(10) * positive.sum()  # ten classes that are equally likely
    for name, boxes in (("mse", error.square()), ("smooth_l1", smooth)):
        by_hand = 2 * boxes.sum() + rest + 16 * math.log(2)  # at p = 0.5 no target matters
        loss = losses.det_loss(det, target, grid, name, "bce")
        torch.testing.assert_close(loss, by_hand / positive.sum(), rtol=1e-3, atol=1e-3)
    det[..., 4] = 1.0
    p = torch.sigmoid(det[0, :, 4])
    cross_entropy = -quality * p.log() - (1 - quality) * (1 - p).log()
    by_hand = 2 * distance.sum() + rest + ((p - quality).abs() * cross_entropy).sum()
    loss = losses.det_loss(det, target, grid, "giou", "focal")
    torch.testing.assert_close(loss, by_hand / positive.sum(), rtol=1e-4, atol=1e-4)


def test_classification_loss_is_smoothed_by_hand():
    logits = torch.tensor([[2.0, *[0.0] * 9]])
    p = logits.softmax(1)[0]
    by_hand = -(0.91 * p[0].log() + 0.09 * p[1].log())  # 0.9 + 0.1 / 10 and nine times 0.1 / 10
    loss = losses.task_loss("cls", {"cls": logits}, {"labels": torch.tensor([[0]])})
    torch.testing.assert_close(loss, by_hand)


def test_segmentation_loss_agrees_with_upsampled_cross_entropy():
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 21, 4, 6), torch.randint(0, 21, (3, 32, 48))
    mask[torch.rand(mask.shape) < 0.3] = IGNORE
    full = F.interpolate(logits, mask.shape[1:], mode="bilinear")
    expected = F.cross_entropy(full, mask, ignore_index=IGNORE)
    torch.testing.assert_close(losses.seg_loss(logits, mask), expected, rtol=1e-4, atol=1e-5)
    assert losses.seg_loss(logits, torch.full_like(mask, IGNORE)) == 0


# -- Distances of distillation

def test_segmentation_distance_agrees_with_loops_over_cells():
    torch.manual_seed(0)
    now, taught = torch.randn(2, 2, 21, 3, 4)
    taught[:, 0] += 3  # much background
    total, weights = 0, 0
    for a, b in zip(now.movedim(1, 3).reshape(-1, 21), taught.movedim(1, 3).reshape(-1, 21)):
        student, teacher = (a / 2).log_softmax(0), (b / 2).softmax(0)
        weight = 5 - 4 * b.softmax(0)[0]  # an object counts up to five times
        total += weight * 4 * F.kl_div(student, teacher, reduction="sum")
        weights += weight
    distance = losses.distil_seg(now, taught)
    torch.testing.assert_close(distance, total / weights, rtol=1e-4, atol=1e-5)


def test_detection_distance_agrees_with_loops_over_cells():
    torch.manual_seed(0)
    now, taught = torch.randn(2, 2, 6, 15)
    for rows in (now, taught):
        rows[..., 2:4] = rows[..., :2] + 4
    total, confidences = 0, 0
    for a, b in zip(now.flatten(0, 1), taught.flatten(0, 1)):
        q, p = a[4].sigmoid(), b[4].sigmoid()
        kept = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        boxes = generalized_box_iou_loss(a[:4], b[:4])
        student, teacher = (a[5:] / 2).log_softmax(0), (b[5:] / 2).softmax(0)
        classes = 4 * F.kl_div(student, teacher, reduction="sum")
        total += kept + p * (2 * boxes + classes)
        confidences += p
    assert confidences > 2
    distance = losses.distil_det(now, taught)
    torch.testing.assert_close(distance, total / confidences, rtol=1e-4, atol=1e-5)


# -- Remedies and the step

def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def part_of(vector, model, name):
    """The piece of a vector over all weights that belongs to one parameter, in its shape."""
    start = 0
    for other, p in model.named_parameters():
        if other == name:
            return vector[start:start + p.numel()].view(p.shape)
        start += p.numel()


def remedy_of(kind, shapes, *more):
    return kind(tiny_args(shapes, *more))


def slow_fisher(model, samples):
    """The mean squared gradient of det_loss over single images, divided by its mean."""
    fisher = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(samples)):
        images, target = augment(*take(samples.batch, slice(i, i + 1)))
        model.zero_grad()
        out = model(images, ("det",))
        losses.det_loss(out["det"], target, out["cells"]).backward()
        for sum_of_squares, p in zip(fisher, model.parameters()):
            if p.grad is not None and (target["labels"] >= 0).any():
                sum_of_squares += p.grad ** 2 / len(samples)
    mean = sum(f.sum() for f in fisher) / sum(f.numel() for f in fisher)
    return torch.cat([f.flatten() for f in fisher]) / mean


@pytest.fixture(scope="session")
def held_by_ewc(after_stage_1, shapes, few_run):
    """EWC after Stages 1 and 2 of a model that did not move: (model, remedy)."""
    model = deepcopy(after_stage_1)
    ewc = remedy_of(forgetting.EWC, shapes, "--ewc-lambda", "3", "5", "7")
    torch.manual_seed(5)
    ewc.remember("seg", model, few_run.train["seg"])
    torch.manual_seed(5)
    ewc.remember("det", model, few_run.train["det"])
    return model, ewc


def test_fisher_is_that_of_a_loop_over_single_images(held_by_ewc, few_run):
    model, ewc = deepcopy(held_by_ewc[0]).eval(), held_by_ewc[1]
    torch.manual_seed(5)
    expected = slow_fisher(model, few_run.train["det"])
    assert expected.count_nonzero() > 100_000
    torch.testing.assert_close(ewc.terms["det"][0], expected, rtol=1e-2, atol=1e-4)
    assert torch.equal(ewc.terms["det"][1], weights_of(model))


def test_ewc_penalty_and_its_gradient_by_hand(held_by_ewc):
    """One layer moves by 0.1: the spring of Stage 1 pulls with λ = 3 in the stage of det."""
    model, both = deepcopy(held_by_ewc[0]), held_by_ewc[1]
    ewc = forgetting.EWC(both.args)
    assert ewc.penalty("seg", model, None, None) == 0  # nothing to hold yet
    ewc.terms["seg"] = both.terms["seg"]
    assert ewc.penalty("det", model, None, None) == 0  # at the anchor
    with torch.no_grad():
        model.head[0].bias += 0.1
    fisher = part_of(ewc.terms["seg"][0], model, "head.0.bias")
    penalty = ewc.penalty("det", model, None, None)
    by_hand = 3 / 2 * (fisher * 0.1 ** 2).sum().item()
    assert penalty.item() == pytest.approx(by_hand, rel=1e-3)
    assert by_hand > 0
    model.zero_grad()
    penalty.backward()
    torch.testing.assert_close(model.head[0].bias.grad, 3 * fisher * 0.1, rtol=1e-3, atol=1e-5)


def test_ewc_adds_the_springs_of_both_old_tasks_by_hand(held_by_ewc):
    """All layers move: in Stage 3 λ is 5 for seg and 7 for det."""
    model, ewc = deepcopy(held_by_ewc[0]), held_by_ewc[1]
    before = weights_of(model)
    jolt(model)
    moved = weights_of(model) - before
    springs = 5 * ewc.terms["seg"][0] + 7 * ewc.terms["det"][0]
    penalty = ewc.penalty("cls", model, None, None)
    by_hand = (springs * moved ** 2).sum().item() / 2
    assert penalty.item() == pytest.approx(by_hand, rel=1e-3)
    model.zero_grad()
    penalty.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, springs * moved, rtol=1e-3, atol=1e-4)


def test_replay_penalty_is_the_loss_of_drawn_images(trained_model, shapes, tiny_run):
    replay = remedy_of(forgetting.Replay, shapes, "--replay-batch", "2",
                       "--replay-weight", "2", "2", "3", "--replay-teacher", "4", "4", "5")
    replay.remember("det", trained_model, tiny_run.train["det"])
    teacher = deepcopy(trained_model)
    jolt(trained_model)
    torch.manual_seed(5)
    penalty = replay.penalty("cls", trained_model, None, None)
    torch.manual_seed(5)
    images, target = augment(*take(replay.buffer["det"], torch.randperm(10)[:2]))
    out, taught = trained_model(images, ("det",)), teacher(images, ("det",))
    by_hand = 3 * losses.det_loss(out["det"], target, out["cells"])
    by_hand += 5 * losses.distil_det(out["det"], taught["det"])
    torch.testing.assert_close(penalty, by_hand, rtol=1e-4, atol=1e-5)


def test_lwf_penalty_in_stage_2_by_hand(trained_model, shapes, tiny_run):
    lwf = remedy_of(forgetting.LwF, shapes, "--lwf-weight", "5", "7", "11")
    assert lwf.penalty("seg", trained_model, None, {}) == 0  # no teacher yet
    lwf.remember("seg", trained_model, None)
    images, _ = augmented(tiny_run, "det")
    taught = trained_model(images, ("seg",))["seg"].detach()
    jolt(trained_model)
    assert lwf.wants("det") == ("seg",)
    out = trained_model(images, ("det", "seg"))
    by_hand = 5 * losses.distil_seg(out["seg"], taught)
    assert by_hand > 0.001
    penalty = lwf.penalty("det", trained_model, images, out)
    torch.testing.assert_close(penalty, by_hand, rtol=1e-3, atol=1e-5)


def test_lwf_penalty_in_stage_3_looks_at_images_in_half_size(trained_model, shapes, tiny_run):
    lwf = remedy_of(forgetting.LwF, shapes, "--lwf-weight", "5", "7", "11")
    lwf.remember("seg", trained_model, None)
    lwf.remember("det", trained_model, None)
    images = augmented(tiny_run, "cls")[0][..., :48, :48]
    half = images.reshape(4, 3, 24, 2, 24, 2).mean((3, 5))
    taught = {old: value.detach() for old, value in trained_model(half, ("seg", "det")).items()}
    jolt(trained_model)
    assert lwf.wants("cls") == ()
    now = trained_model(half, ("seg", "det"))
    by_hand = 7 * losses.distil_seg(now["seg"], taught["seg"])
    by_hand = by_hand + 11 * losses.distil_det(now["det"], taught["det"])
    assert by_hand > 0.001
    penalty = lwf.penalty("cls", trained_model, images, trained_model(images, ("cls",)))
    torch.testing.assert_close(penalty, by_hand, rtol=1e-3, atol=1e-5)


class KnownPenalty(forgetting.Remedy):
    """Adds a term of old images, one of the new images' old outputs and one of the weights."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def wants(self, task):
        return ("seg",)

    def penalty(self, task, model, images, out):
        replayed = F.cross_entropy(model(self.images, ("cls",))["cls"], self.labels,
                                   label_smoothing=0.1)
        weights = model.head[0].weight.square().sum()
        return 3 * replayed + out["seg"].square().mean() + 0.25 * weights


def test_a_step_follows_the_gradient_of_loss_and_penalty(trained_model, tiny_run):
    model, (images, target) = trained_model, augmented(tiny_run, "det")
    old, labels = augmented(tiny_run, "cls", 2)
    labels = labels["labels"][:, 0]
    out = model(images)
    loss = losses.det_loss(out["det"], target, out["cells"])
    penalty = 3 * F.cross_entropy(model(old)["cls"], labels, label_smoothing=0.1)
    penalty = penalty + out["seg"].square().mean() + 0.25 * model.head[0].weight.square().sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss + penalty, parameters)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, 0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    remedies = [KnownPenalty(old, labels)]
    found = train.train_step(model, "det", (images, target), remedies, optimizer, scaler)
    assert found == pytest.approx((loss.item(), penalty.item()), rel=1e-4)
    for p, start, gradient in zip(parameters, before, gradients):
        expected = start - 0.01 * gradient
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_learning_rate_warms_up_to_its_peak_and_ends_at_zero():
    rates = [train.learning_rate(step, 200, 0.5) for step in range(1, 201)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)], rel=0.01)
    assert max(rates) == rates[9] == pytest.approx(0.5, rel=0.01)  # after 5 % of the steps
    assert rates[99] == pytest.approx(0.25)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[199] == 0


# --------------------------------------------------------------------- layer 2: invariants
# -- The model

def test_shapes_of_the_outputs_and_channel_map():
    torch.manual_seed(0)
    model = OneHead().eval()
    out = model(torch.randn(2, 3, 64, 96))
    assert out["seg"].shape == (2, 21, 8, 12)
    assert out["det"].shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 15)
    assert out["cells"].shape == (out["det"].shape[1], 3)
    assert out["cls"].shape == (2, 10)
    assert (SEG.start, SEG.stop, DET.stop, CLS.stop) == (0, DET.start, CLS.start, 46)
    untrained = out["det"][..., 4].sigmoid().mean().item()
    assert untrained == pytest.approx(0.01, rel=0.5)  # the prior
    assert sum(p.numel() for p in model.parameters()) == 1_606_606
    assert sum(p.numel() for p in OneHead(taps=(3, 6, 12), head_stride=8).parameters()) == 1_605_582


@pytest.mark.parametrize("tasks", [("seg",), ("det",), ("cls",), ("seg", "cls")])
def test_asking_for_some_tasks_changes_nothing_but_the_work(tasks):
    torch.manual_seed(0)
    model, images = OneHead().eval(), torch.randn(2, 3, 64, 96)
    everything, some = model(images), model(images, tasks)
    assert set(some) - {"cells"} == set(tasks)
    for task in tasks:
        torch.testing.assert_close(some[task], everything[task], rtol=1e-4, atol=1e-5)


def test_fixed_batchnorm_is_bit_identical_after_a_stage_and_live_is_not(trained_model, tiny_run):
    untrained = train.new_model(tiny_run.args)
    before = copies(trained_model.named_buffers())
    assert not all_equal(before, untrained.named_buffers())  # new layers learn in Stage 1
    train.train_stage(trained_model, "det", tiny_run)
    assert all_equal(before, trained_model.named_buffers())
    trained_model.fix_batchnorm([])
    train.train_stage(trained_model, "det", tiny_run)
    assert not all_equal(before, trained_model.named_buffers())


@pytest.mark.parametrize("held, new", [((), "det"), (("seg",), "det"), (("seg", "det"), "cls")])
def test_output_rows_of_other_tasks_are_bit_identical_after_a_stage(held, new, shapes, few_run):
    model, ewc = train.new_model(few_run.args), remedy_of(forgetting.EWC, shapes)
    torch.manual_seed(0)
    for task in held:  # a spring at its rest position does not move them either
        ewc.remember(task, model, few_run.train[task])
    before = copies(model.head[2].named_parameters())
    train.train_stage(model, new, few_run, [ewc])
    for name, value in model.head[2].named_parameters():
        for task, rows in zip(TASKS, (SEG, DET, CLS)):
            assert torch.equal(value[rows], before[name][rows]) == (task != new)


@pytest.mark.parametrize("report, parameters", [
    (0, 3_145_934), (1, 1_252_766), (2, 1_605_582), (3, 1_744_462), (4, 1_257_454)])
def test_parameters_of_the_published_systems(report, parameters):
    flags = {name: train.REPORTS[report].get(name) for name in train.NETWORK}
    model = OneHead(**{name: value for name, value in flags.items() if value})
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("neck", NECKS)
def test_every_backbone_takes_every_neck(backbone, neck):
    model = OneHead(backbone, neck=neck).eval()
    out = model(torch.zeros(1, 3, 64, 96))
    finest = model.strides[0]
    assert out["seg"].shape == (1, 21, 64 // finest, 96 // finest)
    assert out["det"].shape[1] == sum(64 // s * 96 // s for s in model.strides)
    assert out["cls"].shape == (1, 10)


@pytest.mark.parametrize("neck", NECKS)
def test_the_head_reads_one_map_of_the_stride_it_is_given(neck):
    model = OneHead(neck=neck, head_stride=16).eval()
    assert model(torch.zeros(1, 3, 64, 96))["seg"].shape[2:] == (4, 6)


@pytest.mark.parametrize("flags, sentence", [
    ({"taps": [3, 99]}, "blocks 0 to 12"), ({"taps": [8, 3]}, "ascending"),
    ({"taps": [3, 8], "head_stride": 32}, "the FPN has"),
    ({"head_layers": 3}, "needs one map")])
def test_networks_that_cannot_be_built_end_in_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        OneHead(**flags)


def test_a_backbone_without_imagenet_weights_says_so():
    with pytest.raises(UserError, match="fast_scnn has none"):
        load_weights(OneHead("fast_scnn"), "imagenet")


def test_pretrained_backbone_is_loaded_and_its_batchnorm_fixed(tmp_path):
    torch.manual_seed(0)
    state = {f"features.{name}": value + 1 if value.is_floating_point() else value
             for name, value in OneHead().features.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, tmp_path / "backbone.pth")
    model = OneHead()
    assert all(layer.training for layer in model.batchnorms().values())
    load_weights(model, str(tmp_path / "backbone.pth"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert not any(layer.training for layer in model.train().batchnorms().values())


@pytest.mark.parametrize("report", range(5))
def test_saved_model_comes_back_whole(report, tmp_path):
    torch.manual_seed(0)
    flags = {name: train.REPORTS[report].get(name) for name in train.NETWORK}
    model = OneHead(**{name: value for name, value in flags.items() if value}).eval()
    save_model(tmp_path / "model.pt", model, 96, {"cls": ["a", "b"]})
    again, size, classes = load_model(tmp_path / "model.pt")
    assert (size, classes, again.arch) == (96, {"cls": ["a", "b"]}, model.arch)
    assert all_equal(copies(model.state_dict().items()), again.state_dict().items())
    with pytest.raises(UserError, match="not this architecture"):
        load_weights(OneHead("efficientnet_b0"), str(tmp_path / "model.pt"))


@pytest.mark.parametrize("flags", [{"neck": "conv1x1"}, {"neck": "conv2"},
                                   {"neck": "none", "head_layers": 3}])
def test_batchnorm_without_pretrained_statistics_goes_on_learning(flags, tmp_path):
    model, file = OneHead(**flags), tmp_path / "backbone.pth"
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("features.")}, file)
    load_weights(model, str(file))
    for name, layer in model.train().batchnorms().items():
        assert layer.training != name.startswith("features.")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("name", ["evil.pt", "cut.pt", "missing.pt", "list.pt", "other.pt"])
def test_bad_checkpoints_end_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    Path("cut.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save([1, 2], "list.pt")
    torch.save({"arch": {"taps": [3, 8, 12]}, "model": {}, "image_size": 1}, "other.pt")
    with pytest.raises(UserError, match=name):
        load_model(name)
    with pytest.raises(UserError, match=name):
        load_weights(OneHead(), name)
    assert not Path("evil").exists()


def test_weights_that_cannot_be_downloaded_end_in_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models.MobileNet_V3_Small_Weights.get_state_dict", offline)
    with pytest.raises(UserError, match="--weights PATH, or .* --weights none"):
        load_weights(OneHead(), "imagenet")


# -- The step

class Waits(TorchDispatchMode):
    """Collects the operations that would make the host wait for a GPU, or copy to it."""

    NAMES = "nonzero", "_local_scalar_dense", "masked_select", "lift_fresh", "_unique"

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.__name__, args[1] if len(args) > 1 else ()
        by_booleans = (name.startswith("index") and isinstance(indices, (list, tuple))
                       and any(i is not None and i.dtype == torch.bool for i in indices))
        if by_booleans or name.startswith(self.NAMES):
            self.found.add(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("task", TASKS)
def test_augmentation_loss_and_gradient_do_not_wait_for_a_gpu(trained_model, tiny_run, task):
    batch = tiny_run.train[task].batch
    augmented(tiny_run, task)  # sends the constants
    trained_model(torch.zeros(1, 3, 64, 64))
    with Waits() as waits:
        images, target = augment(*take(batch, torch.arange(4)))
        losses.task_loss(task, trained_model(images, (task,)), target).backward()
    assert waits.found == set()
    with Waits() as waits:
        images[images > 0].sum().item()
    assert len(waits.found) == 2  # it does notice


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_computed_in_full_precision(trained_model, tiny_run, task):
    images, target = augmented(tiny_run, task)
    loss = losses.task_loss(task, trained_model(images, (task,)), target)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses.task_loss(task, trained_model(images, (task,)), target)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), rel=0.1)


@pytest.mark.parametrize("name", ["replay", "lwf", "ewc"])
def test_penalties_can_be_computed_in_half_precision(name, trained_model, shapes, tiny_run):
    remedy = remedy_of(forgetting.REMEDIES[name], shapes, "--replay-weight", "1")
    images, _ = augmented(tiny_run, "det")
    for old, new in (("seg", "det"), ("det", "cls")):
        remedy.remember(old, trained_model, tiny_run.train[old])
        with torch.autocast("cpu", torch.bfloat16):
            out = trained_model(images)
            assert remedy.penalty(new, trained_model, images, out).isfinite()


@pytest.mark.parametrize("own, share_of_neck", [(0, 0.1), (32, 1)])
def test_slower_shared_layers_leave_what_is_not_shared_at_full_speed(own, share_of_neck, shapes):
    model, args = OneHead(), tiny_args(shapes, "--trunk-lr", "1", "0.2", "1")
    if own:
        model.widen(own, ["seg"])
    groups = train.make_optimizer(model, "det", args, 0.1).param_groups
    shares = {id(p): group["share"] for group in groups for p in group["params"]}
    expected = {"features": 0.02, "neck": share_of_neck, "head.0": share_of_neck, "head.2": 1}
    for name, p in model.named_parameters():
        share = next(share for start, share in expected.items() if name.startswith(start))
        assert shares[id(p)] == pytest.approx(share)


# -- Remedies

def test_cover_takes_rare_classes_first():
    labels = {f"{i:03}": {"common"} for i in range(100)}
    labels |= {"007": {"rare", "common"}, "050": {"second"}}
    empty = {f"empty{i}": set() for i in range(40)}
    for seed in range(5):
        first = set(islice(data.cover(labels | empty, random.Random(seed)), 4))
        assert {"007", "050"} <= first
    assert sorted(data.cover(labels, random.Random(0))) == sorted(labels)


@pytest.mark.parametrize("count", [3, 10])
def test_replay_stores_distinct_images_without_augmentation(count, trained_model, shapes, tiny_run):
    replay = remedy_of(forgetting.Replay, shapes, "--replay-images", str(count))
    samples = tiny_run.train["det"]
    replay.remember("det", trained_model, samples)
    images, target = replay.buffer["det"]
    assert len(images) == len(images.unique(dim=0)) == len(target["labels"]) == count
    for image in images:
        assert (samples.batch[0] == image).flatten(1).all(1).any()
    if count == 10:  # enough to cover the classes
        assert set(target["labels"].unique().tolist()) == {-1, *range(10)}


def test_replay_keeps_its_images_and_draws_some_a_step(trained_model, shapes, tiny_run):
    replay = remedy_of(forgetting.Replay, shapes, "--replay-batch", "2", "--replay-weight", "1")
    replay.remember("seg", trained_model, tiny_run.train["seg"])
    replay.remember("det", trained_model, tiny_run.train["det"])
    before = {task: images.clone() for task, (images, _) in replay.buffer.items()}
    torch.manual_seed(0)
    penalties = {replay.penalty("cls", trained_model, None, None).item() for _ in range(3)}
    assert len(penalties) == 3
    assert all_equal(before, ((task, images) for task, (images, _) in replay.buffer.items()))


def test_replay_of_one_task_ignores_the_other(trained_model, shapes, tiny_run):
    replay = remedy_of(forgetting.Replay, shapes, "--replay-tasks", "seg")
    replay.remember("det", trained_model, tiny_run.train["det"])
    assert replay.buffer == {}
    assert replay.penalty("cls", None, None, None) == 0


def test_lwf_learns_from_the_latest_model_and_moves_neither_it_nor_new_rows(trained_model, shapes,
                                                                            tiny_run):
    lwf = remedy_of(forgetting.LwF, shapes)
    lwf.remember("seg", trained_model, None)
    jolt(trained_model)
    lwf.remember("det", trained_model, None)
    before = copies(trained_model.state_dict().items())
    jolt(trained_model, seed=1)
    trained_model.zero_grad()
    images, _ = augmented(tiny_run, "cls")
    lwf.penalty("cls", trained_model, images, None).backward()
    assert all_equal(before, lwf.teacher.state_dict().items())
    assert not lwf.teacher.training
    assert all(p.grad is None for p in lwf.teacher.parameters())
    rows = trained_model.head[2].weight.grad
    assert rows[SEG].any() and rows[DET].any()
    assert not rows[CLS].any()


def test_ewc_leaves_the_statistics_of_a_live_batchnorm_alone(trained_model, shapes, few_run):
    trained_model.fix_batchnorm([])
    trained_model.train()
    before = copies(trained_model.named_buffers())
    torch.manual_seed(0)
    remedy_of(forgetting.EWC, shapes).remember("det", trained_model, few_run.train["det"])
    assert all_equal(before, trained_model.named_buffers())


def test_ewc_learns_nothing_from_images_without_objects(trained_model, few, shapes):
    empty = MiniSet(few, "det", "train", 64)
    empty.batch[1]["labels"][:] = -1
    ewc = remedy_of(forgetting.EWC, shapes)
    torch.manual_seed(0)
    ewc.remember("det", trained_model, empty)
    assert not ewc.terms["det"][0].any()


@pytest.mark.parametrize("extent", ["trunk", "neck"])
def test_freeze_leaves_backbone_and_its_batchnorm_bit_identical(extent, shapes, tiny_run):
    model = train.new_model(tiny_run.args)  # its BatchNorm layers are live still
    remedy_of(forgetting.Freeze, shapes, "--freeze", extent).remember("seg", model, None)
    before = copies(model.state_dict().items())
    train.train_stage(model, "det", tiny_run)
    same = {name for name, value in model.state_dict().items() if torch.equal(before[name], value)}
    backbone, neck = ({n for n in before if n.startswith(part)} for part in ("features.", "neck."))
    assert backbone <= same
    assert any("running_mean" in name for name in backbone)
    assert (neck <= same) == (extent == "neck")
    assert "head.0.weight" not in same


def test_joint_training_shows_every_task_as_often_as_its_stage(trained_model, shapes, monkeypatch):
    run = train.Run(tiny_args(shapes, "--batch-size", "8", "--epochs", "40", "20", "15"))
    remedies, shown = train.all_at_once(run), []
    real = forgetting.augment
    monkeypatch.setattr(forgetting, "augment", lambda x, y: shown.append(len(x)) or real(x, y))
    torch.manual_seed(0)
    for replay in remedies:
        replay.penalty("seg", trained_model, None, None)
    assert shown == [4, 3]  # of det and cls beside 8 of seg
    assert [{t: len(x) for t, (x, _) in r.buffer.items()} for r in remedies] == [{"det": 12},
                                                                               {"cls": 12}]


def test_new_channels_change_no_output_of_learned_tasks(trained_model, tiny_run):
    images, _ = augmented(tiny_run, "seg")
    before = trained_model.eval()(images)
    trained_model.widen(32, ["seg"])
    trained_model.widen(32, ["seg", "cls"])
    after = trained_model(images)
    torch.testing.assert_close(after["seg"], before["seg"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after["det"][..., 4].sigmoid().mean().item(), 0.01, rtol=0.1, atol=0)


def test_old_outputs_are_bit_identical_after_a_stage_with_own_channels(trained_model, tiny_run):
    images, _ = augmented(tiny_run, "seg")
    trained_model.widen(32, ["seg"])
    before = trained_model.eval()(images)
    train.train_stage(trained_model, "det", tiny_run, shared_lr=0.0)
    after = trained_model.eval()(images)
    assert torch.equal(before["seg"], after["seg"])
    assert not torch.equal(before["det"], after["det"])


def test_old_channels_and_rows_are_held_and_read_no_new_ones_nor_are_read(trained_model, tiny_run):
    before = copies(trained_model.state_dict().items())
    trained_model.widen(32, ["seg"])
    start = trained_model.head[0].weight.detach().clone()
    train.train_stage(trained_model, "det", tiny_run, shared_lr=0.0)
    hidden, last = trained_model.head[0].weight, trained_model.head[2].weight
    assert torch.equal(hidden[:128, :128], before["head.0.weight"])
    assert torch.equal(last[SEG, :128], before["head.2.weight"][SEG])
    assert not hidden[:128, 128:].any() and not hidden[128:, :128].any()
    assert not last[SEG, 128:].any() and not last[DET, :128].any()
    assert not torch.isclose(hidden[128:, 128:], start[128:, 128:]).any(0).all()  # they learn


def test_a_widened_model_comes_back_whole(trained_model, tmp_path):
    for learned in (["seg"], ["seg", "det"]):
        trained_model.widen(32, learned)
    save_model(tmp_path / "model.pt", trained_model, 64, {})
    again, *_ = load_model(tmp_path / "model.pt")
    assert all_equal(copies(trained_model.state_dict().items()), again.state_dict().items())


def test_ewc_looks_before_freeze_acts(shapes):
    remedies = forgetting.build(tiny_args(shapes, "--strategy", "freeze+ewc"))
    assert [type(remedy) for remedy in remedies] == [forgetting.EWC, forgetting.Freeze]


# -- Augmentation

def red_patch():
    """40 black images with a red patch -> (images, mask with the class 7, boxes)."""
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[10:30, 20:50] = 7
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    boxes = torch.tensor([20.0, 10, 50, 30]).repeat(40, 1, 1)
    return ((mask > 0) * red).repeat(40, 1, 1, 1), mask.repeat(40, 1, 1), boxes


def through_same_windows(images, target, **more):
    """Augments with windows that are the same in every call."""
    torch.manual_seed(1)
    return augment(images, target, **{"zoom": (0.6, 1.4), **more})


def test_augmentation_moves_image_and_mask_together():
    images, mask, _ = red_patch()
    x, target = through_same_windows(images, {"mask": mask}, mask_stride=1)
    seen, shown = x[:, 0] - x[:, 1] > 1.5, target["mask"] == 7
    difference = (seen != shown).float().mean((1, 2)).max().item()
    assert difference < 0.06  # bilinear against nearest borders
    assert not any(torch.equal(m, shown[0]) for m in shown[1:])  # a window for every image
    outside = x[(target["mask"] == IGNORE)[:, None].expand(x.shape)]
    assert len(outside) > 0
    assert (outside.abs() < 0.6).float().mean() > 0.9  # grey, but for a blend at the border


@pytest.mark.parametrize("zoom, size", [((0.6, 1.4), 64), ((1.2, 1.8), 96)])
def test_augmentation_moves_image_and_boxes_together(zoom, size):
    images, _, boxes = red_patch()
    labels = torch.full((40, 1), 3)
    x, target = through_same_windows(images, {"boxes": boxes, "labels": labels}, zoom=zoom)
    assert x.shape[2:] == (size, size)
    assert torch.equal(target["labels"], labels)
    for image, box in zip(x, target["boxes"][:, 0]):
        rows, columns = (image[0] - image[1] > 1.5).nonzero().unbind(1)
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (found - box).abs().max() < 3


def test_augmentation_reads_masks_at_every_fourth_pixel():
    images, mask, _ = red_patch()
    _, fine = through_same_windows(images, {"mask": mask}, mask_stride=1)
    _, coarse = through_same_windows(images, {"mask": mask})
    assert coarse["mask"].shape == (40, 16, 16)
    share = F.avg_pool2d((fine["mask"] == 7)[:, None].float(), 4)[:, 0]  # in each 4×4 block
    sure = (share == 0) | (share == 1)
    assert torch.equal((coarse["mask"] == 7)[sure], share[sure] == 1)


def test_augmentation_changes_contrast_brightness_and_saturation_alone():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    x, _ = augment(images, {}, zoom=(1, 1), aspect=1)
    deviation = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    factors = []
    for before, after in zip(images - mean, x * deviation):
        views = before, before.flip(2)  # mirrored or not
        before = min(views, key=lambda view: (view.mean(0) - after.mean(0)).std().item())
        grey, shown = before.mean(0), after.mean(0)
        tint = before - grey
        contrast = ((shown * grey).mean() - shown.mean() * grey.mean()) / grey.var(correction=0)
        saturation = ((after - shown) * tint).sum() / tint.square().sum() / contrast
        brightness = after.mean() - contrast * grey.mean()
        expected = contrast * (grey + saturation * tint) + brightness
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=0.1)
        factors.append([contrast, saturation, 1 + brightness / 100])
    factors = torch.tensor(factors)
    assert factors.min() > 0.69
    assert factors.max() < 1.31
    assert factors.std(0).min() > 0.05


def test_half_of_the_images_are_mirrored_and_keep_their_labels():
    torch.manual_seed(0)
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(400, 3, 64, 64)
    labels = torch.arange(400)[:, None]
    x, target = augment(ramp, {"labels": labels}, zoom=(1, 1), aspect=1)
    rising = (x[:, 0, 32, 63] > x[:, 0, 32, 0]).float().mean().item()
    assert 0.4 < rising < 0.6
    assert torch.equal(target["labels"], labels)


def test_boxes_cropped_away_are_no_targets():
    torch.manual_seed(0)
    corner, tiny = [0.0, 0, 10, 10], [20.0, 20, 21, 21]
    target = {"boxes": torch.tensor([corner, tiny]).expand(300, 2, 4),
              "labels": torch.tensor([3, 4]).expand(300, 2)}
    images = torch.zeros(300, 3, 64, 64, dtype=torch.uint8)
    _, target = augment(images, target, zoom=(0.6, 1.4), aspect=1)
    (labels, tiny_labels), moved = target["labels"].unbind(1), target["boxes"][:, 0]
    area = (moved[:, 2:] - moved[:, :2]).prod(1)
    assert set(tiny_labels.tolist()) == {-1}  # 1.7 px at most
    assert set(labels.tolist()) == {3, -1}
    largest, smallest = 10 / 0.6, 10 / 1.4  # sides of the whole box in the extreme windows
    assert area[labels == -1].max() <= largest ** 2 / 5 + 0.1
    assert area[labels == 3].min() >= smallest ** 2 / 5 - 0.1


# -- Reading mini-sets

def test_images_are_normalised_and_boxes_padded(tiny_run):
    split = tiny_run.train["det"]
    raw = split.batch[0][:6]
    images = normalise(raw)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = (raw / 255 - mean) / deviation
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for labels, record in zip(split.batch[1]["labels"], split.truth):
        count = len(record["boxes"])
        assert (labels[:count] >= 0).all()
        assert (labels[count:] == -1).all()


def test_write_coco_and_read_coco_are_inverse(tmp_path):
    dog = {"name": "dog", "xyxy": [1.25, 2, 30.5, 40], "area": 600, "iscrowd": 0}
    crowd = {"name": "cat", "xyxy": [0, 0, 64, 48], "area": 99.5, "iscrowd": 1}
    records = [{"id": 3, "file_name": "a.jpg", "width": 64, "height": 48, "boxes": [dog, crowd]},
               {"id": 7, "file_name": "b.jpg", "width": 10, "height": 20, "boxes": []}]
    data.write_coco(tmp_path, "val", records, ["cat", "dog"])
    file = tmp_path / "annotations/mini_instances_val2017.json"
    names, samples = data.read_coco(file, tmp_path / "val")
    assert names == ["cat", "dog"]
    assert samples == [(tmp_path / "val/a.jpg", records[0]), (tmp_path / "val/b.jpg", records[1])]


def test_boxes_are_clipped_scaled_and_skipped(shapes_copy, capsys):
    def replace(coco):
        boxes = [[-10, 8, 30, 16], [5, 5, 0, 9], [70, 5, 9, 9], [0, 0, 64, 64]]
        image = coco["images"][0]["id"]
        coco["annotations"] = [{"id": i, "image_id": image, "category_id": 2, "bbox": box,
                                "area": 1, "iscrowd": int(i == 3)} for i, box in enumerate(boxes)]
    edit_json(shapes_copy / VAL_BOXES, replace)
    split = MiniSet(shapes_copy, "det", "val", 32)
    target = split.batch[1]
    assert target["boxes"][0, 0].tolist() == [0, 4, 10, 12]  # clipped, and half the size
    assert target["labels"][0].tolist() == [1, -1]  # the crowd is no target
    assert (target["labels"][1:] == -1).all()
    assert [box["iscrowd"] for box in split.truth[0]["boxes"]] == [0, 1]
    assert "annotations [1, 2]" in capsys.readouterr().out


def test_boxes_and_photos_are_mapped_by_the_name_of_their_class(shapes_copy):
    before = MiniSet(shapes_copy, "det", "val", 64)

    def renumber(coco):
        for category in coco["categories"]:
            category["id"] = 90 - category["id"]
        coco["categories"].reverse()
        for a in coco["annotations"]:
            a["category_id"] = 90 - a["category_id"]
    edit_json(shapes_copy / VAL_BOXES, renumber)
    after = MiniSet(shapes_copy, "det", "val", 64, before.classes)
    assert torch.equal(before.batch[1]["labels"], after.batch[1]["labels"])
    names = sorted(data.SHAPES)
    shutil.rmtree(shapes_copy / "imagenette_160/val" / names[0])
    split = MiniSet(shapes_copy, "cls", "val", 64, names)
    assert split.batch[1]["labels"][:, 0].tolist() == list(range(1, 10))


@pytest.mark.parametrize("task", ["det", "cls"])
def test_unknown_classes_are_left_out_and_named(shapes, task, capsys):
    split = MiniSet(shapes, task, "val", 64, data.SHAPES[:5])
    labels = np.concatenate([split.labels(i) for i in range(len(split))])
    assert set(labels.tolist()) == set(range(5))
    text = capsys.readouterr().out
    assert f"leaves out the {task} classes" in text
    assert data.SHAPES[5] in text


def test_too_many_classes_and_no_known_class_are_errors(shapes):
    with pytest.raises(UserError, match="11 cls classes; the head has 10"):
        MiniSet(shapes, "cls", "val", 64, [*data.SHAPES, "mauve-blob"])
    with pytest.raises(UserError, match="of (a )?known class"):
        MiniSet(shapes, "cls", "val", 64, ["mauve-blob"])


def write_mask(file, values, mode="P"):
    """A mask with whatever colours."""
    mask = Image.fromarray(values)
    if mode == "P":
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    mask.convert(mode).save(file)


def test_palette_indices_survive_and_bad_masks_are_named(shapes_copy):
    file = shapes_copy / "mini_voc_seg/val/0003.png"
    values = np.full((64, 64), 5, np.uint8)
    values[:8] = IGNORE
    write_mask(file, values)
    split = MiniSet(shapes_copy, "seg", "val", 32)
    assert np.array_equal(split.truth[3], values)
    assert set(split.batch[1]["mask"][3].unique().tolist()) == {5, IGNORE}
    for bad, mode in ((values + 30, "P"), (values, "RGB"), (values[:9], "P")):
        write_mask(file, bad, mode)
        with pytest.raises(UserError, match="0003"):
            MiniSet(shapes_copy, "seg", "val", 32)


@pytest.mark.parametrize("task, file, content", [
    ("cls", f"imagenette_160/val/{data.SHAPES[0]}/0000.JPEG", b"\xff\xd8\xff cut off"),
    ("det", "mini_coco_det/val/0004.jpg", None), ("det", VAL_BOXES, b'{"images": [')])
def test_bad_files_are_named(shapes_copy, task, file, content):
    if content:
        (shapes_copy / file).write_bytes(content)
    else:  # a photo of another size than annotated
        Image.new("RGB", (30, 30)).save(shapes_copy / file)
    with pytest.raises(UserError, match=Path(file).name):
        MiniSet(shapes_copy, task, "val", 64)


def test_a_folder_without_images_is_named(shapes_copy):
    shutil.rmtree(shapes_copy / "mini_voc_seg/val")
    with pytest.raises(UserError, match="mini_voc_seg.*no images"):
        MiniSet(shapes_copy, "seg", "val", 64)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg"])
def test_photos_of_masks_may_end_in_any_spelling_of_jpg(suffix, shapes_copy):
    photo = shapes_copy / "mini_voc_seg/val/0003.jpg"
    photo.rename(photo.with_suffix(suffix))
    assert len(MiniSet(shapes_copy, "seg", "val", 64)) == 10


def test_a_linked_folder_counts_as_what_it_links_to(shapes_copy, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/val").symlink_to(shapes_copy / "mini_voc_seg/val")
    before = metrics.digest(tmp_path / "linked")
    (shapes_copy / "mini_voc_seg/val/0003.png").write_bytes(b"other")
    assert metrics.digest(tmp_path / "linked") != before


# -- Writing mini-sets

def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder may be there
    with pytest.raises(RuntimeError):
        with data.new_folder(tmp_path / "out") as new:
            (new / "half.txt").write_text("half")
            raise RuntimeError
    assert file_contents(tmp_path) == {}
    with data.new_folder(tmp_path / "out") as new:
        (new / "new.txt").write_text("new")
    assert file_contents(tmp_path) == {"out/new.txt": b"new"}


def test_shapes_are_reproducible_and_no_image_comes_twice(shapes, tmp_path):
    data.write_shapes(tmp_path / "again", {"train": 12, "val": 10}, size=64, seed=3)
    assert file_contents(tmp_path / "again") == file_contents(shapes)
    photos = photos_in(shapes)
    assert len(set(photos)) == len(photos) == 66


def draw_photo(path, rng, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    noise.resize(size, Image.BICUBIC).save(path)


def draw_voc(voc, split, rng):
    """Six photos with masks in the layout of VOC 2012."""
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{split}{i}" for i in range(6)]
    for i, name in enumerate(names, 1):
        draw_photo(voc / "JPEGImages" / f"{name}.jpg", rng)
        write_mask(voc / "SegmentationClass" / f"{name}.png", np.full((40, 48), i, np.uint8))
    (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))


def draw_coco(coco, split, rng):
    """Ten photos with one box each in the layout of COCO; the last shows no sampled class."""
    names = [f"{split}{i:012}.jpg" for i in range(10)]
    images = [{"id": i, "file_name": name, "width": 48, "height": 40, "coco_url": f"coco/{name}"}
              for i, name in enumerate(names)]
    for name in names:
        draw_photo(coco / f"{split}2017" / name, rng)
    boxes = [{"id": i, "image_id": i, "category_id": 99 if i == 9 else (1, 18)[i % 2],
              "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0} for i in range(10)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"},
                  {"id": 99, "name": "banana"}]
    (coco / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": boxes, "categories": categories}
    (coco / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """The three originals in small, with every defect that sampling must survive."""
    root, rng = tmp_path_factory.mktemp("originals"), np.random.default_rng(0)
    voc = root / "VOCdevkit/VOC2012"
    for split in ("train", "val"):
        draw_voc(voc, split, rng)
        draw_coco(root / "coco", split, rng)
        for i in range(16):
            draw_photo(root / f"imagenette2-160/{split}/n{i % 2}/{split}_{i}.JPEG", rng)
    folder = root / "coco/train2017"
    shutil.copy(voc / "JPEGImages/train0.jpg", folder / "train000000000000.jpg")  # comes twice
    (folder / "train000000000001.jpg").write_bytes(b"truncated")
    draw_photo(folder / "train000000000002.jpg", rng, (30, 30))  # not of the annotated size
    return root


@pytest.fixture
def few_photos(monkeypatch):
    """Lets data.py want as many photos as the small originals have."""
    monkeypatch.setattr(data, "COUNTS", {"train": 6, "val": 4})


def test_prepare_is_reproducible_exclusive_and_survives_defects(originals, tmp_path, few_photos,
                                                                capsys):
    for name in "ab":
        data.main(["--originals", str(originals), "--out", str(tmp_path / name)])
    assert file_contents(tmp_path / "a") == file_contents(tmp_path / "b")
    text = capsys.readouterr().out
    for defect in ("looks like an image", "not a readable image", "not of the annotated size"):
        assert defect in text
    photos = photos_in(tmp_path / "a")
    assert len(set(photos)) == len(photos) == 30
    counts = [len(photos_in(tmp_path / "a" / folder / split))
              for folder in data.FOLDERS.values() for split in ("train", "val")]
    assert counts == [6, 4] * 3
    sound = {f"train{i:012}.jpg" for i in range(3, 9)}
    assert {path.name for path in (tmp_path / "a/mini_coco_det/train").iterdir()} == sound
    assert MiniSet(tmp_path / "a", "det", "val", 32).classes == data.COCO_CLASSES


def test_prepare_from_too_few_photos_writes_nothing(originals, tmp_path):
    with pytest.raises(UserError, match="6 of 240 images"):
        data.main(["--originals", str(originals), "--out", str(tmp_path / "few")])
    with pytest.raises(UserError, match="0 of 240 images"):
        data.main(["--originals", str(tmp_path / "nowhere"), "--out", str(tmp_path / "few")])
    assert not (tmp_path / "few").exists()


def pack_archives(originals, folder):
    """The three archives that data.py downloads, from small originals."""
    folder.mkdir()
    with tarfile.open(folder / "VOCtrainval_11-May-2012.tar", "w") as tar:
        tar.add(originals / "VOCdevkit", "VOCdevkit")
    with tarfile.open(folder / "imagenette2-160.tgz", "w:gz") as tar:
        tar.add(originals / "imagenette2-160", "imagenette2-160")
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        for split in ("train", "val"):
            name = f"annotations/instances_{split}2017.json"
            archive.write(originals / "coco" / name, name)


class FakeNetwork:
    """Stands in for `download_url`: archives come from a folder, photos are drawn."""

    def __init__(self, archives):
        self.archives, self.photos = archives, 0
        self.rng = np.random.default_rng(1)

    def __call__(self, url, root, filename=None, md5=None):
        Path(root).mkdir(parents=True, exist_ok=True)
        if md5:
            shutil.copy(self.archives / Path(url).name, root)
        else:
            drawn = Path(root) / "drawn.jpg"
            draw_photo(drawn, self.rng)
            drawn.rename(Path(root) / filename)
            self.photos += 1


def test_download_and_preparation_in_one_command(originals, tmp_path, few_photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack_archives(originals, tmp_path / "archives")
    network = FakeNetwork(tmp_path / "archives")
    monkeypatch.setattr(data, "download_url", network)
    data.main([])
    assert network.photos == 10  # of COCO only those that are needed
    assert len(photos_in(tmp_path / "data")) == 30
    extracted = tmp_path / "originals/imagenette2-160"
    assert file_contents(extracted) == file_contents(originals / "imagenette2-160")


def test_a_damaged_photo_is_named_and_not_kept(tmp_path, monkeypatch):
    def cut_off(url, root, filename):
        (Path(root) / filename).write_bytes(b"cut off")
    monkeypatch.setattr(data, "download_url", cut_off)
    with pytest.raises(UserError, match="coco/7.jpg: the download failed"):
        data.fetch_image("coco/7.jpg", tmp_path / "7.jpg")
    assert not (tmp_path / "7.jpg").exists()
    monkeypatch.setattr(data, "download_url", FakeNetwork(None))
    data.fetch_image("coco/7.jpg", tmp_path / "7.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["7.jpg"]
    assert data.open_image(tmp_path / "7.jpg").size == (48, 40)


# -- Faults of every kind: nothing is lost, and no number is wrong without a word

@pytest.mark.parametrize("name", ["thesis.txt", "sample.json", "mini_voc_seg/train/my_own.jpg"])
def test_a_folder_with_anything_in_it_is_never_replaced(name, tmp_path, monkeypatch):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    monkeypatch.setattr(data, "download_originals", None)  # is not reached
    with pytest.raises(UserError, match="delete it, or name a new folder"):
        data.main(["--out", str(tmp_path / "out")])
    assert file_contents(tmp_path / "out") == {name: b"precious"}


def test_two_processes_may_draw_the_shapes_at_once(shapes, tmp_path):
    with pytest.raises(UserError, match="faster"):
        with data.new_folder(tmp_path / "shapes") as slower:
            (slower / "half.txt").touch()
            data.write_shapes(tmp_path / "shapes", {"train": 12, "val": 10}, size=64, seed=3)
    data.write_shapes(tmp_path / "shapes")  # is there: nothing to do
    assert file_contents(tmp_path) == {f"shapes/{k}": v for k, v in file_contents(shapes).items()}


@pytest.mark.parametrize("task", TASKS)
def test_files_that_are_no_sample_are_counted_and_named(task, shapes_copy, capsys):
    folder = shapes_copy / data.FOLDERS[task] / "val"
    Image.new("RGB", (64, 64)).save(folder / "extra.png")
    assert len(MiniSet(shapes_copy, task, "val", 32)) == 10
    assert "val: leaves out 1 files that are no sample, as extra.png" in capsys.readouterr().out


@pytest.mark.parametrize("key, edit, message", [
    ("images", {"id": 2}, "two images have the id 2"),
    ("images", {"file_name": "0001.jpg"}, "two images have the file_name 0001.jpg"),
    ("images", {"width": 0}, "has no width or height"),
    ("categories", {"id": 2}, "two categories have the id 2"),
    ("annotations", {"id": 2}, "two annotations have the id 2"),
    ("annotations", {"image_id": 99}, "annotation 1: .* not listed"),
    ("annotations", {"category_id": "1"}, "annotation 1: .* not listed"),
    ("annotations", {"bbox": None}, "annotation 1: "),
    ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "annotation 1: .* must be numbers"),
    ("annotations", {"bbox": ["1", "2", "3", "4"]}, "annotation 1: .* must be numbers"),
    ("annotations", {"area": None}, "annotation 1: .* must be numbers"),
    ("annotations", {"iscrowd": "0"}, "annotation 1: .* iscrowd 0 or 1")])
def test_annotations_that_would_give_wrong_numbers_are_refused(key, edit, message, shapes_copy):
    edit_json(shapes_copy / VAL_BOXES, lambda coco: coco[key][0].update(edit))
    with pytest.raises(UserError, match=f"mini_instances_val2017.json: .*{message}"):
        MiniSet(shapes_copy, "det", "val", 64)


def test_a_split_with_nothing_but_crowds_is_refused(shapes_copy):
    edit_json(shapes_copy / VAL_BOXES, lambda coco: [a.update(iscrowd=1)
                                                     for a in coco["annotations"]])
    with pytest.raises(UserError, match="val: no box of a known class but crowds"):
        MiniSet(shapes_copy, "det", "val", 64)


def test_photos_are_turned_upright(tmp_path):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(8, 6)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    upright.transpose(Image.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    assert np.array_equal(data.open_image(tmp_path / "lying.png"), upright)


def test_pixels_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="deep.png: .*more than 8 bits"):
        data.open_image(tmp_path / "deep.png")


def test_masks_that_mean_something_else_are_refused(tmp_path):
    file, values = tmp_path / "mask.png", np.zeros((8, 8), np.uint8)
    values[:4] = IGNORE  # as in binary masks
    write_mask(file, values)
    with pytest.raises(UserError, match="mask.png: .*not of 0 and 255 alone"):
        data.read_mask(file)
    mask = Image.fromarray(np.full((8, 8), 1, np.uint8))
    mask.putpalette([0, 0, 0, 192, 128, 128])  # VOC's colour of a person, who is 15
    mask.save(file)
    with pytest.raises(UserError, match="mask.png: VOC's colours, but not its indices"):
        data.read_mask(file)
    mask.putpalette([0, 0, 0, 128, 0, 0])
    mask.save(file)
    assert (data.read_mask(file) == 1).all()


@pytest.mark.parametrize("flags", ["--eval {model}", "--benchmark", ""])
def test_a_place_that_cannot_be_written_is_named_before_long_work(flags, shapes, finished, tmp_path,
                                                                  monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "train_stage", None)
    monkeypatch.setattr(metrics, "MiniSet", None)
    out = tmp_path / "file" / ("run.json" if flags else "run")
    flags = flags.format(model=finished[0] / "model.pt").split()
    with pytest.raises(UserError, match="nothing can be written there .*name another --out"):
        train.main(tiny_flags(shapes, out, *flags))


@pytest.mark.parametrize("trouble, sentence", [
    (UserError("flawed"), "flawed"), (KeyboardInterrupt(), "Interrupted"),
    (OSError(28, "No space left on device"), "No space left on device")])
def test_what_stops_a_command_ends_in_one_sentence(trouble, sentence, capfd, monkeypatch):
    def stopped():
        raise trouble
    monkeypatch.setattr(os, "dup2", lambda *given: None)
    with open(os.devnull, "w") as monkeypatched:
        monkeypatch.setattr(sys, "stdout", monkeypatched)
        with pytest.raises(SystemExit) as error:
            data.command(stopped)
    assert error.value.code == 2
    assert sentence in capfd.readouterr().err


def test_a_closed_pipe_ends_in_one_sentence(two_seeds):
    command = [sys.executable, metrics.__file__, f"{two_seeds[0]}-seed0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=two_seeds[0].parent) as process:
        process.stdout.close()
        assert "Broken pipe" in process.stderr.read()
    assert process.returncode == 2


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    def full(file, content):
        file.touch()
        raise OSError(28, "No space left on device")
    data.write_whole(tmp_path / "a", b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        data.write_whole(tmp_path / "a", b"new")
    assert file_contents(tmp_path) == {"a": b"old"}


def test_a_last_batch_too_small_for_batchnorm_is_refused(shapes):
    with pytest.raises(UserError, match="seg's last batch is one image"):
        train.Run(tiny_args(shapes, "--image-size", "32", "--batch-size", "11"))


class CutsOff(SimpleHTTPRequestHandler):
    """Serves files; while the server is `broken`, each answer ends half-way."""

    def log_message(self, *stuff):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[:len(content) // 2] if self.server.broken else content)


@pytest.fixture
def server(originals, tmp_path, monkeypatch):
    """A server on loopback with the three archives in the folder `served`."""
    folder = tmp_path / "served"
    pack_archives(originals, folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(CutsOff, directory=folder)) as server:
        server.broken = False
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        sums = {f"{address}/{file.name}": hashlib.md5(file.read_bytes()).hexdigest()
                for file in sorted(folder.iterdir())}
        monkeypatch.setattr(data, "ARCHIVES", sums)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.shutdown()


def test_a_download_that_breaks_off_is_whole_the_next_time(server, originals, tmp_path):
    server.broken = True
    with pytest.raises(UserError, match="try again: whole archives are kept"):
        data.download_originals(tmp_path / "root")
    server.broken = False
    data.download_originals(tmp_path / "root")
    for folder in ("VOCdevkit", "imagenette2-160"):
        assert file_contents(tmp_path / "root" / folder) == file_contents(originals / folder)


def test_an_archive_with_another_checksum_is_not_extracted(server, tmp_path):
    for file in (tmp_path / "served").iterdir():
        file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match="try again"):
        data.download_originals(tmp_path / "root")
    assert not any(path.is_dir() for path in (tmp_path / "root").iterdir())


def test_an_archive_cannot_write_outside_its_folder(server, tmp_path, monkeypatch):
    file = tmp_path / "served/imagenette2-160.tgz"
    with tarfile.open(file, "w:gz") as tar:
        tar.add(__file__, "../evil.py")
    sums = {url: hashlib.md5(file.read_bytes()).hexdigest() if url.endswith(file.name) else md5
            for url, md5 in data.ARCHIVES.items()}
    monkeypatch.setattr(data, "ARCHIVES", sums)
    with pytest.raises(UserError, match="outside"):
        data.download_originals(tmp_path / "root")
    assert not (tmp_path / "evil.py").exists()


def damage_annotations(root, rng):
    """Puts nonsense in place of one value, leaves one out, or doubles an entry."""
    coco = json.loads((root / VAL_BOXES).read_text(encoding="utf-8"))
    entries = coco[rng.choice(["images", "annotations", "categories"])]
    entry = rng.choice(entries)
    key = rng.choice(sorted(entry))
    kind = rng.randrange(3)
    if kind == 0:
        entry[key] = rng.choice([None, "text", [], {}, math.nan, math.inf, 1e30])
    elif kind == 1:
        del entry[key]
    else:
        entries.append(entry)
    (root / VAL_BOXES).write_text(json.dumps(coco), encoding="utf-8")


def damage_file(root, rng):
    """Cuts a file, overwrites its beginning, deletes it, or gives it another name."""
    folder = rng.choice(["mini_voc_seg", "mini_coco_det"])
    file = rng.choice(sorted(path for path in (root / folder).rglob("*") if path.is_file()))
    content = file.read_bytes()
    rng.choice([lambda: file.write_bytes(content[:rng.randrange(len(content) - 2)]),
                lambda: file.write_bytes(rng.randbytes(16) + content[16:]),
                file.unlink, lambda: file.rename(file.with_suffix(".txt"))])()


def damage_mask(root, rng):
    """Moves the values of a mask, so that some are no class."""
    file = rng.choice(sorted((root / "mini_voc_seg/val").glob("*.png")))
    moved = (np.array(Image.open(file)).astype(int) + rng.randrange(30, 200)).astype(np.uint8)
    Image.fromarray(moved).save(file)


def test_damaged_sets_are_refused_or_the_difference_is_named(shapes, tmp_path, capsys):
    val_only = tmp_path / "val_only"
    shutil.copytree(shapes, val_only, ignore=shutil.ignore_patterns("train", "*_train*"))
    whole = {task: MiniSet(val_only, task, "val", 32) for task in ("seg", "det")}
    rng = random.Random(0)
    for trial in range(int(os.environ.get("TRIALS", 50))):
        root = shutil.copytree(val_only, tmp_path / f"{trial}")
        rng.choice([damage_annotations, damage_file, damage_mask])(root, rng)
        capsys.readouterr()
        try:
            for task, before in whole.items():
                now = MiniSet(root, task, "val", 32, before.classes)
                same = len(now) == len(before) and torch.equal(now.batch[0], before.batch[0])
                same = same and all(torch.equal(now.batch[1][key], before.batch[1][key])
                                    for key in before.batch[1])
                assert same or capsys.readouterr().out, f"trial {trial}: wrong without a word"
        except UserError as e:
            assert "\n" not in str(e)
        shutil.rmtree(root)


# -- The command line

WRONG_FLAGS = [
    ("--strategy prayer", "prayer: choose none, joint"),
    ("--strategy joint+ewc", "joint+ewc: choose none, joint"),
    ("--strategy joint --conf-loss focal --conf-warmup 2", "joint: has no --conf-warmup"),
    ("--strategy joint --benchmark", "no --benchmark"),
    ("--strategy ewc+ewc", "each once"),
    ("--strategy isolation+ewc", "stored weights do not fit"),
    ("--strategy isolation --neck none", "isolation widens an FPN"),
    ("--report 5", "invalid choice: 5"),
    ("--neck wide", "invalid choice: 'wide'"),
    ("--ewc-lambda 1 2", "--ewc-lambda: give one value, or three"),
    ("--lwf-weight 1 -2 1", "-2: must be from 0"),
    ("--replay-weight -1", "-1: must be from 0"),
    ("--replay-images 11", "11: must be from 1 to 10"),
    ("--replay-tasks cls", "invalid choice: 'cls'"),
    ("--freeze head", "invalid choice: 'head'"),
    ("--shared-lr -1", "--shared-lr: -1: must be from 0"),
    ("--epochs 0", "0: must be from 1"),
    ("--epochs many", "invalid number value: 'many'"),
    ("--lr nan", "nan: must be from"),
    ("--image-size 16", "16: must be from 32 to 4096"),
    ("--batch-size 0", "0: must be from 1"),
    ("--seed -1", "-1: must be from 0"),
    ("--device abacus", "abacus"),
    ("--benchmark --out somewhere", "must be a .json file"),
    (f"--out {__file__}", "must be a folder")]


@pytest.mark.parametrize("flags, sentence", WRONG_FLAGS)
def test_wrong_flags_end_in_one_sentence(flags, sentence, shapes, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(tiny_flags(shapes, tmp_path / "out", *flags.split()))
    assert error.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in last_line


@pytest.mark.parametrize("flags, sentence", [
    ("--data nowhere", "nowhere"), ("--weights none.pth", "none.pth"),
    ("--eval nowhere.pt --out measured.json", "nowhere.pt")])
def test_missing_files_end_in_one_sentence(flags, sentence, shapes, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train.main(tiny_flags(shapes, tmp_path / "out", *flags.split()))


@pytest.fixture
def empty_cwd(tmp_path, monkeypatch):
    """An empty working directory, in which drawing the shapes takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "write_shapes", lambda root: Path(root).mkdir(parents=True))
    return tmp_path


def parsed(flags=""):
    return train.parse(["--device", "cpu", *flags.split()])


def test_without_photos_the_shapes_are_drawn(empty_cwd, capsys):
    args = parsed()
    assert "SHAPES" in capsys.readouterr().out
    assert Path(args.data) == Path(train.SHAPES_DIR)
    recipe = train.RECIPES["shapes"]
    assert {key: getattr(args, key) for key in recipe} == recipe


def test_with_photos_the_defaults_are_others(empty_cwd):
    for folder in data.FOLDERS.values():
        (empty_cwd / "data" / folder).mkdir(parents=True)
    args = parsed("--lr 0.5")
    assert (args.data, args.lr) == ("data", [0.5] * 3)
    expected = train.RECIPES["photos"] | {"lr": [0.5] * 3}
    assert {key: getattr(args, key) for key in expected} == expected
    assert parsed("--data shapes").data == train.SHAPES_DIR
    assert parsed(f"--data {train.SHAPES_DIR}/").data == train.SHAPES_DIR


@pytest.mark.parametrize("flags, expected", [
    ("--weights imagenet --strategy lwf", dict(lwf_weight=[5, 1, 1], shared_lr=[1, 1, 1])),
    ("--weights imagenet --strategy replay", dict(replay_teacher=[6, 6, 3], shared_lr=[1, 1, 1])),
    ("--strategy replay", dict(replay_teacher=[1.6, 3.6, 1.6], shared_lr=[1, 0.6, 0.2],
                               replay_weight=[0, 0, 0], replay_batch=6)),
    ("--report 1", dict(replay_weight=[1, 1, 1], replay_teacher=[0, 0, 0])),
    ("--weights imagenet --strategy lwf+ewc", dict(lwf_weight=[1, 0.3, 2], shared_lr=[1, 2, 1])),
    ("--strategy ewc+lwf", dict(lwf_weight=[1, 0.3, 2], shared_lr=[1, 1, 1])),
    ("--strategy isolation+lwf", dict(own_channels=[0, 128, 64], shared_lr=[1, 0, 0])),
    ("--weights imagenet --strategy isolation+lwf+replay", dict(own_channels=[0, 64, 64],
                                                              shared_lr=[1, 2, 1])),
    ("--weights imagenet --strategy ewc+lwf+replay", dict(ewc_lambda=[0.5, 5, 10],
                                                          replay_teacher=[2, 2, 1])),
    ("--strategy ewc+lwf --lwf-weight 0 --shared-lr 3", dict(lwf_weight=[0] * 3, shared_lr=[3] * 3))
])
def test_strengths_follow_strategy_and_weights(flags, expected, empty_cwd):
    args = parsed(f"--data shapes {flags}")
    assert {key: getattr(args, key) for key in expected} == expected


def test_a_run_is_named_by_strategy_and_seed(empty_cwd, monkeypatch):
    monkeypatch.setattr(train, "run_seed", lambda args: args.out)
    assert train.main(["--strategy", "ewc", "--seed", "4"]) == "runs/ewc-seed4"
    assert train.main(["--report", "2"]) == "runs/report2-replay-seed0"
    assert train.main(["--out", "mine"]) == "mine"


# -------------------------------------------------------------------- layer 3: whole runs
# -- One run

def test_a_run_writes_its_results_after_three_stages(finished):
    out, results = finished
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results))
    assert {"args", "defaults", "data", "params", "latency_ms", "seconds", "device", "baseline",
            "map_50_95", "own", "drop", "drop_own", "verdict"} <= set(results)
    stages = [(row["stage"], row["task"]) for row in results["history"]]
    assert stages == [(1, "seg"), (2, "det"), (3, "cls")]
    assert [set(row) for row in results["matrix"]] == [set(TASKS)] * 3
    assert results["final"] == results["matrix"][2]


def test_stage_1_is_its_own_baseline(finished, after_stage_1, tiny_run):
    _, results = finished
    assert results["matrix"][0]["seg"] == results["baseline"]["seg"]
    again = metrics.evaluate(after_stage_1, {"seg": tiny_run.val["seg"]}, "cpu")
    assert again["seg"] == results["baseline"]["seg"]


def test_other_baselines_measure_their_own_task_alone(finished):
    files = [*(finished[0].parent / ".baselines").glob("[!s]*.pt")]
    assert len(files) > 1
    for file in files:
        last = read_checkpoint(file)["history"][-1]
        assert set(last) & set(TASKS) == {last["task"]}


def test_same_seed_same_numbers(shapes, finished, tmp_path):
    again = train.main(tiny_flags(shapes, tmp_path / "again"))  # with baselines of its own
    for key in ("baseline", "matrix", "final", "map_50_95", "drop"):
        assert again[key] == finished[1][key]
    for row, other in zip(again["history"], finished[1]["history"]):
        assert (row["loss"], row["penalty"]) == (other["loss"], other["penalty"])


@pytest.mark.parametrize("strategy, bn", [
    ("none", "live"), ("replay", "live"), ("lwf", "live"), ("freeze", "live"),
    ("ewc+lwf", "fixed"), ("ewc+freeze+replay", "fixed"), ("joint", "fixed"),
    ("isolation", "fixed"), ("replay+lwf+isolation", "fixed")])
def test_every_strategy_runs_and_shares_the_baselines(strategy, bn, shapes, finished, capsys):
    out = finished[0].parent / f"{strategy}-{bn}"
    results = train.main(tiny_flags(shapes, out, "--strategy", strategy, "--bn", bn))
    assert results["baseline"] == finished[1]["baseline"]
    said = capsys.readouterr().out
    assert "Baseline: " not in said  # none was trained again
    assert [line for line in said.splitlines() if " epoch " in line][-1].endswith(" 0:00 left")
    penalised = [row["penalty"] > 0 for row in results["history"]]
    if strategy == "joint":
        assert penalised == [True]
    else:
        remedied = strategy not in ("none", "freeze", "isolation")
        assert penalised == [False, remedied, remedied]
    assert len(results["matrix"]) == len(penalised)
    assert (results["params"] > 1_606_606) == ("isolation" in strategy)


class MAS(forgetting.EWC):
    """Memory Aware Synapses: importance is the mean absolute gradient of ‖outputs‖²."""

    def importance(self, task, model, samples):
        total = torch.zeros_like(forgetting.flat(model.parameters()))
        model.eval()
        for i in range(len(samples)):
            images, _ = augment(*take(samples.batch, slice(i, i + 1)))
            out = model(images, (task,))[task]
            if task == "det":
                out = out[..., 4:]  # all but the boxes, which are pixels
            model.zero_grad()
            out.square().sum().backward()
            gradient = forgetting.flat(torch.zeros_like(p) if p.grad is None else p.grad
                                       for p in model.parameters())
            total += gradient.abs() / len(samples)
        return total


def test_a_remedy_from_outside_takes_part(shapes, finished, monkeypatch):
    monkeypatch.setitem(forgetting.REMEDIES, "mas", MAS)
    flags = tiny_flags(shapes, finished[0].parent / "mas", "--strategy", "mas")
    results = train.main(flags)
    assert [row["penalty"] > 0 for row in results["history"]] == [False, True, True]


def test_the_shared_layers_have_their_own_rate_in_each_later_stage(shapes, finished, monkeypatch):
    used, real = [], train.make_optimizer

    def recorded(model, task, args, shared_lr):
        used.append((task, shared_lr))
        return real(model, task, args, shared_lr)
    monkeypatch.setattr(train, "make_optimizer", recorded)
    monkeypatch.setattr(train, "train_step", lambda *given: (0.0, 0.0))
    flags = tiny_flags(shapes, finished[0].parent / "rates", "--strategy", "none")
    train.main([*flags, "--shared-lr", "9", "2", "3"])
    assert used[3:] == [("det", 2.0), ("cls", 3.0)]  # after the baselines, of which one is Stage 1


def test_a_loss_that_is_not_finite_ends_in_one_sentence(shapes, tmp_path):
    with pytest.raises(UserError, match=r"seg, epoch 1: .*\.jpg.*lower --lr"):
        train.main(tiny_flags(shapes, tmp_path / "out", "--lr", "1e30"))


# -- Interrupted runs

def assert_same_run(out, other):
    """Two finished folders hold the same figures and bit-identical weights."""
    results, others = (metrics.load_run(folder) for folder in (out, other))
    assert (results["baseline"], results["matrix"]) == (others["baseline"], others["matrix"])
    model, *_ = load_model(out / "model.pt")
    again, *_ = load_model(other / "model.pt")
    assert all_equal(copies(model.state_dict().items()), again.state_dict().items())


class Interruption:
    """Interrupts a run at the n-th moment from now: a step begins, half of a file is written, or
    it is about to take its place, or has taken it."""

    def __init__(self, monkeypatch):
        self.left, self.met = 0, []
        step, write, replace = train.train_step, Path.write_bytes, Path.replace

        def stepped(*given):
            self.reach("step")
            return step(*given)

        def written(file, content):
            write(file, content[:len(content) // 2])
            self.reach("half a file")
            write(file, content)

        def replaced(file, target):
            self.reach("before the replace")
            replace(file, target)
            self.reach("after the replace")
        monkeypatch.setattr(train, "train_step", stepped)
        monkeypatch.setattr(Path, "write_bytes", written)
        monkeypatch.setattr(Path, "replace", replaced)

    def reach(self, moment):
        self.left -= 1
        if self.left == 0:
            self.met.append(moment)
            raise KeyboardInterrupt


@pytest.mark.parametrize("strategy", ["replay+ewc+lwf", "replay+lwf+isolation"])
def test_a_run_interrupted_20_times_ends_bit_identical(strategy, few, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole/run", tmp_path / "cut/run"
    train.main(small_flags(few, whole, strategy))
    interruption, rng = Interruption(monkeypatch), random.Random(0)
    while len(interruption.met) < 20:
        for _ in range(30):
            interruption.left = rng.randint(1, 25)
            try:
                train.main(small_flags(few, cut, strategy))
                break
            except KeyboardInterrupt:
                pass
        assert_same_run(cut, whole)
        left = {path.name for path in cut.iterdir()}
        assert left == {"args.json", "results.json", "model.pt", "curves.png", "predictions.png"}
        pictures = [(way / "predictions.png").read_bytes() for way in (cut, whole)]
        assert pictures[0] == pictures[1]
        shutil.rmtree(tmp_path / "cut")
    assert len(set(interruption.met)) == 4


def kill_at(text, flags):
    """Starts the command in a process and kills it as soon as it says `text`."""
    command = [sys.executable, train.__file__, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            if text in line:
                process.kill()
    assert process.returncode not in (0, 2)


def test_a_process_killed_twice_loses_nothing(shapes, finished, tmp_path, capsys):
    mix = ["--strategy", "replay+lwf+isolation"]
    whole, cut = finished[0].parent / "replay+lwf+isolation-fixed", tmp_path / "run"
    train.main(tiny_flags(shapes, whole, *mix))  # perhaps finished already
    flags = tiny_flags(shapes, cut, *mix)
    kill_at("det epoch", flags)  # of a baseline
    kill_at("after stage 2", flags)
    capsys.readouterr()
    train.main(flags)
    said = capsys.readouterr().out
    assert "cls epoch" in said and not any(f"{task} epoch" in said for task in ("seg", "det"))
    assert_same_run(cut, whole)


def small_run(flags):
    BACKBONES["small"] = SMALL
    train.main(flags)


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes longer: KILLS=100 pytest -k kills_at")
def test_kills_at_any_moment_lose_nothing(few, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where the server below finds this module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])  # imports once for all processes
    whole, cut = tmp_path / "whole/run", tmp_path / "cut/run"
    flags = [small_flags(few, out, "replay+lwf+isolation") for out in (whole, cut)]
    train.main(flags[0])
    rng, kills = random.Random(0), 0
    while kills < int(os.environ["KILLS"]):
        process = context.Process(target=small_run, args=(flags[1],))
        process.start()
        process.join(timeout=rng.uniform(0, 2))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert_same_run(cut, whole)
            shutil.rmtree(tmp_path / "cut")


@pytest.fixture
def no_classification(monkeypatch):
    """Whatever begins to train classification is interrupted."""
    real = train.train_epoch

    def until_stage_3(model, task, *rest):
        if task == "cls":
            raise KeyboardInterrupt
        return real(model, task, *rest)
    monkeypatch.setattr(train, "train_epoch", until_stage_3)


@pytest.fixture
def unfinished(shapes, finished, no_classification, tmp_path):
    """The command line of a run that was interrupted in Stage 3."""
    cut = finished[0].parent / "unfinished"
    if not cut.exists():
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny_flags(shapes, cut, "--strategy", "none"))
    for folder in (cut, finished[0].parent / ".baselines"):
        shutil.copytree(folder, tmp_path / folder.name)
    return tiny_flags(shapes, tmp_path / "unfinished", "--strategy", "none")


def test_an_unfinished_run_with_other_arguments_is_refused_by_name(unfinished):
    with pytest.raises(UserError, match="a run with another lr;"):
        train.main([*unfinished, "--lr", "1e-4"])


@pytest.mark.parametrize("damage", [
    lambda file: edit_json(file, lambda args: args.update(surroundings="another code")),
    lambda file: file.write_text("{"), lambda file: file.unlink()])
def test_stages_of_another_code_or_unknown_arguments_are_trained_again(damage, unfinished, capsys):
    damage(Path(unfinished[3]) / "args.json")
    with pytest.raises(KeyboardInterrupt):
        train.main(unfinished)
    assert "det epoch" in capsys.readouterr().out


# -- Finished runs and cached baselines

def test_a_finished_run_is_not_repeated(shapes, finished, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_stage", None)  # training would fail
    (finished[0] / "stage2.pt").touch()  # as if it was interrupted just before the end
    results = train.main(tiny_flags(shapes, finished[0]))
    assert results["matrix"] == finished[1]["matrix"]
    assert "is finished already" in capsys.readouterr().out
    assert not (finished[0] / "stage2.pt").exists()


def test_a_finished_run_with_other_arguments_is_refused_by_name(shapes, finished, shapes_copy):
    before = file_contents(finished[0])
    flags = tiny_flags(shapes, finished[0], "--strategy", "none", "--batch-size", "5")
    with pytest.raises(UserError, match="a run with another strategy, batch_size, replay_batch, "):
        train.main(flags)
    next((shapes_copy / "mini_voc_seg").glob("*/*.jpg")).unlink()
    with pytest.raises(UserError, match="with another data;"):
        train.main(tiny_flags(shapes_copy, finished[0]))
    assert file_contents(finished[0]) == before


@pytest.mark.parametrize("text", ['{"args"', '{"final": 0, "baseline": 0, "matrix": []}', "[]"])
def test_damaged_results_are_named(text, shapes, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(text)
    with pytest.raises(UserError, match="out: holds no results.json of a finished run"):
        train.main(tiny_flags(shapes, tmp_path / "out"))


def test_an_unreadable_baseline_is_trained_again(shapes, finished, tmp_path, capsys):
    shutil.copytree(finished[0].parent / ".baselines", tmp_path / ".baselines")
    for file in (tmp_path / ".baselines").glob("det-*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    run = train.Run(tiny_args(shapes))
    run.args.out = tmp_path / "run"
    capsys.readouterr()
    again = {task: train.train_alone(task, run)[1][-1][task] for task in TASKS}
    text = capsys.readouterr().out
    trained = [task for task in TASKS if f"Baseline: {task} alone" in text]
    assert trained == ["det"]
    assert again == finished[1]["baseline"]


@pytest.fixture
def code_copy(tmp_path, monkeypatch):
    """A copy of the modules, whose code `train.code_digest` hashes anew in each call."""
    monkeypatch.setattr(train, "code_digest", train.code_digest.__wrapped__)
    for file in Path(train.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    return tmp_path


MODULES = ["train", "model", "data", "losses", "metrics", "forgetting"]


def test_a_comment_in_the_code_leaves_the_baselines_valid(code_copy):
    before = train.code_digest(*MODULES)
    file = code_copy / "losses.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(f"# A new first line\n{text}\n\n# and a last one\n", encoding="utf-8")
    assert train.code_digest(*MODULES) == before


@pytest.mark.parametrize("name", MODULES)
def test_an_edit_of_the_code_makes_what_it_trained_stale(name, code_copy, shapes):
    args = tiny_args(shapes)
    before, remedies = train.surroundings(args), train.code_digest("forgetting")
    with (code_copy / f"{name}.py").open("a", encoding="utf-8") as file:
        file.write("\nEDITED = True\n")
    assert (train.surroundings(args) == before) == (name == "forgetting")
    assert (train.code_digest("forgetting") == remedies) == (name != "forgetting")


# -- Several seeds

def test_several_seeds_make_a_run_each(two_seeds):
    out, results = two_seeds
    found = [(r["args"]["seed"], r["args"]["out"]) for r in results]
    assert found == [(0, f"{out}-seed0"), (1, f"{out}-seed1")]
    assert results[0]["history"][0]["loss"] != results[1]["history"][0]["loss"]


def test_a_finished_seed_is_left_alone_and_the_table_names_both(few, two_seeds, capsys):
    out, results = two_seeds
    shutil.rmtree(f"{out}-seed1")
    capsys.readouterr()
    again = train.main([*small_flags(few, out, "none"), "--seed", "0", "1", "0"])
    text = capsys.readouterr().out
    assert "two-seed0 is finished already" in text
    assert "two-seed1 is finished already" not in text
    assert [r["matrix"] for r in again] == [r["matrix"] for r in results]
    passed = sum(r["verdict"]["all"] for r in results)
    assert f" | {passed} of 2 | " in text


# -- Comparing runs

def write_run(folder, results, **args):
    """A made-up finished run: that of `results` with other arguments."""
    metrics.write_json(folder / "results.json", results | {"args": results["args"] | args})
    return folder


def rows_of(table, alone=False):
    """The cells of a Markdown table below its header: the rows of the baselines, or all others."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return [row for row in rows if row[0].startswith("each task alone") == alone]


def test_the_comparison_starts_with_the_baselines(two_seeds, tmp_path):
    out, results = two_seeds
    small = write_run(tmp_path / "small", results[0], batch_size=3)
    rows = rows_of(metrics.compare([small, f"{out}-seed0", f"{out}-seed1"]), alone=True)
    names = [row[0].partition(" --batch-size ")[2][:1] for row in rows]
    assert (names, [row[1] for row in rows]) == (["3", str(results[0]["args"]["batch_size"])],
                                                ["seeds: 1", "seeds: 2"])
    values = [r["baseline"]["cls"] for r in results]
    assert rows[1][4] == f"{np.mean(values):.3f}±{np.std(values, ddof=1):.3f}"


def test_a_row_of_the_comparison_has_mean_and_spread_of_its_seeds(finished, two_seeds):
    out, results = two_seeds
    rows = rows_of(metrics.compare([finished[0], f"{out}-seed0", f"{out}-seed1"]))
    assert [row[0].split()[0] for row in rows] == ["replay", "none"]
    assert [row[1][-4:] for row in rows] == ["of 1", "of 2"]
    values = [r["final"]["seg"] for r in results]
    assert rows[1][2] == f"{np.mean(values):.3f}±{np.std(values, ddof=1):.3f}"


def test_rows_go_from_what_keeps_least_to_what_keeps_most(finished, tmp_path):
    usual = write_run(tmp_path / "usual", finished[1])
    nothing_left = finished[1] | {"final": dict.fromkeys(TASKS, 0)}
    worse = write_run(tmp_path / "worse", nothing_left, replay_images=3)
    first, second = rows_of(metrics.compare([usual, worse]))
    assert "--replay-images 3" in first[0] and "--replay-images 3" not in second[0]


def test_a_row_is_named_by_what_differs_from_the_defaults_stored_with_the_run(finished, tmp_path):
    results = finished[1] | {"args": finished[1]["defaults"] | {"seed": 0}}
    usual = write_run(tmp_path / "usual", results)
    fewer = write_run(tmp_path / "fewer", results, replay_images=3, device="cuda", seed=5)
    later = results | {"defaults": results["defaults"] | {"replay_images": 3}}
    later = write_run(tmp_path / "later", later, replay_images=3, lr=[0.5] * 3)
    rows = rows_of(metrics.compare([usual, fewer, later]))
    assert [row[0] for row in rows] == ["replay", "replay --lr [0.5, 0.5, 0.5]",
                                        "replay --replay-images 3"]  # on another device


def test_of_runs_alike_the_last_counts_and_unfinished_ones_are_named(finished, tmp_path, capsys):
    last = write_run(tmp_path / "last", finished[1] | {"final": dict.fromkeys(TASKS, 0.75)})
    other = write_run(tmp_path / "other", finished[1] | {"data": {"sha256": {"seg": "abc"}}})
    rows = rows_of(metrics.compare([finished[0], last, other, tmp_path / "nothing"]))
    assert len(rows) == 2  # other data have a row of their own
    assert rows[0][2:5] == ["0.750"] * 3
    assert "nothing: holds no results.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="No finished run"):
        metrics.compare([tmp_path / "nothing"])


def test_a_console_that_lacks_a_sign_gets_another(two_seeds, tmp_path, monkeypatch):
    runs = [f"{two_seeds[0]}-seed{seed}" for seed in (0, 1)]
    picture = str(tmp_path / "comparison.png")
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["metrics.py", *runs, "--out", picture])
    data.command(metrics.main)
    assert b"?" in console.buffer.getvalue()  # for ±


# -- Measuring a saved model

def test_eval_reproduces_the_final_scores(shapes, finished):
    out, results = finished
    flags = ["--eval", str(out / "model.pt"), "--data", str(shapes), "--device", "cpu"]
    measured = train.main(flags)
    assert {task: measured[task] for task in TASKS} == results["final"]
    assert measured["map_50_95"] == results["map_50_95"]
    assert measured["n"] == {"seg": 10, "det": 10, "cls": 10}
    assert json.loads((out / "eval.json").read_text()) == measured


@pytest.fixture
def val_alone(shapes_copy):
    """Mini-sets without train splits, segmentation and one class, and with one class more."""
    for folder in data.FOLDERS.values():
        shutil.rmtree(shapes_copy / folder / "train")
    shutil.rmtree(shapes_copy / "mini_voc_seg")
    shutil.rmtree(shapes_copy / "imagenette_160/val" / sorted(data.SHAPES)[0])

    def renumber(coco):
        for category in coco["categories"]:
            category["id"] += 7
        coco["categories"].append({"id": 1, "name": "unheard-of"})
        coco["categories"].reverse()
        for a in coco["annotations"]:
            a["category_id"] += 7
        coco["annotations"].append({**coco["annotations"][0], "id": 999, "category_id": 1})
    edit_json(shapes_copy / VAL_BOXES, renumber)
    return shapes_copy


def test_eval_maps_by_name_on_a_folder_with_val_alone(val_alone, finished, tmp_path, capsys):
    out, results = finished
    file = tmp_path / "measured.json"
    flags = ["--eval", str(out / "model.pt"), "--data", str(val_alone), "--out", str(file)]
    measured = train.main([*flags, "--device", "cpu"])
    assert measured["seg"] is None
    assert measured["det"] == results["final"]["det"]
    assert measured["n"] == {"det": 10, "cls": 9}
    text = capsys.readouterr().out
    assert "mIoU is not measured" in text
    assert "leaves out the det classes unheard-of" in text
    assert json.loads(file.read_text()) == measured


@torch.no_grad()
def test_top_1_agrees_with_single_photos(shapes, after_stage_1, tiny_run):
    net, val = deepcopy(after_stage_1).eval(), tiny_run.val["cls"]
    hits, unsure = 0, 0
    for photo in (shapes / "imagenette_160/val").glob("*/*"):
        image = Image.open(photo).convert("RGB").resize((64, 64), Image.BILINEAR)
        logits = net(normalise(pil_to_tensor(image)[None]))["cls"][0]
        first, second = logits.topk(2).values
        unsure += (first - second < 1e-5).item()  # rounding decides
        hits += val.classes[logits.argmax()] == photo.parent.name
    measured = metrics.evaluate(net, {"cls": val}, "cpu")["cls"]
    assert abs(10 * measured - hits) <= unsure + 1e-6


def test_eval_of_a_missing_task_is_an_error(val_alone, finished):
    flags = ["--eval", str(finished[0] / "model.pt"), "--data", str(val_alone), "--tasks", "seg"]
    with pytest.raises(UserError, match="mini_voc_seg"):
        train.main([*flags, "--device", "cpu"])


# -- Pictures

def has_colour(image, x, y, colour):
    """Whether a pixel within two of (x, y) is about of that colour."""
    near = np.asarray(image.crop((x - 2, y - 2, x + 3, y + 3)), int).reshape(-1, 3)
    return np.abs(near - np.array(colour)).sum(1).min() < 40


def test_a_curve_goes_through_its_scores(finished, tmp_path):
    results = deepcopy(finished[1])
    results["baseline"] = dict.fromkeys(TASKS, 0)
    for row in results["history"]:
        row |= {"seg": 0.75, "det": 0.5, "cls": 0.25}
    metrics.draw_curves(results, tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png")
    assert image.width == 1200
    for y, colour in ((0.75, (0, 114, 178)), (0.5, (213, 94, 0)), (0.25, (0, 158, 115))):
        assert has_colour(image, 800, round(480 - 405 * y), colour)  # the frame: from 75 to 480


def test_the_comparison_draws_every_setting(finished, two_seeds, tmp_path):
    out, _ = two_seeds
    sizes = []
    for folders in ([finished[0]], [finished[0], f"{out}-seed0", f"{out}-seed1"]):
        metrics.compare(folders, tmp_path / "comparison.png")
        sizes.append(Image.open(tmp_path / "comparison.png").size)
    assert sizes[0][0] == sizes[1][0] == 1200
    assert sizes[1][1] - sizes[0][1] == 65  # one row more


@pytest.fixture
def photos(tmp_path):
    """An oblong photo, the same turned by its EXIF entry, a grey one and a broken one."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    image = Image.fromarray(rng.integers(0, 256, (40, 100, 3), np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    (folder / "more").mkdir(parents=True)
    image.save(folder / "a.png")
    image.transpose(Image.ROTATE_90).save(folder / "more/a.png", exif=exif)
    image.convert("L").save(folder / "grey.png")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


def test_predict_finds_things_in_the_photos_own_upright_pixels(photos, finished, tmp_path,
                                                               monkeypatch, capsys):
    row = torch.tensor([[0.0, 0, 64, 32, 20, 20, *[0] * 9]])  # the upper half of 64×64 pixels
    seg = F.one_hot(torch.tensor([[0, 3]]), 21).permute(2, 0, 1)[None].float()
    out = {"seg": seg, "det": row[None], "cls": torch.eye(10)[:1]}
    monkeypatch.setattr(OneHead, "forward", lambda model, images: out)
    flags = ["--predict", str(finished[0] / "model.pt"), str(photos), "--device", "cpu"]
    found = train.main([*flags, "--out", str(tmp_path / "out")])
    assert [(p["copy"], p["width"], p["height"]) for p in found] == [
        ("001-a.png", 100, 40), ("002-grey.png", 100, 40), ("003-a.png", 100, 40)]
    for p in found:
        assert p["boxes"][0]["xyxy"] == pytest.approx([0, 0, 100, 20])
        mask = data.read_mask(tmp_path / "out/masks" / p["copy"])
        assert mask.shape == (40, 100) and (mask[:, 60:] == 3).all() and (mask[:, :40] == 0).all()
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == found
    text = capsys.readouterr().out
    assert "broken.jpg: not a readable image" in text and "3 of 4 photos" in text
    with pytest.raises(UserError, match="name another folder"):
        train.main([*flags, "--out", str(photos)])


def test_predict_without_a_readable_photo_is_an_error(finished, tmp_path, empty_cwd):
    file = tmp_path / "text/a.txt"
    file.parent.mkdir()
    file.write_text("no photo")
    (tmp_path / "empty").mkdir()
    for photos, text in (([], "no photo"), ([str(tmp_path / "empty")], "no photo"),
                         ([str(file.parent)], "none of the photos is readable")):
        with pytest.raises(UserError, match=text):
            train.main(["--predict", str(finished[0] / "model.pt"), *photos])
    assert not (tmp_path / "predictions").exists()


# -- Measuring the machine

@pytest.mark.parametrize("report", range(5))
def test_every_published_system_runs_and_is_measured_again(report, few, tmp_path):
    flags = tiny_flags(few, tmp_path / "run", "--report", str(report), "--image-size", "32",
                       "--batch-size", "2")
    results = train.main(flags)
    assert results["args"]["strategy"] == train.REPORTS[report]["strategy"]
    again = train.main(["--eval", str(tmp_path / "run/model.pt"), "--data", str(few),
                        "--device", "cpu"])
    assert {t: again[t] for t in TASKS} == pytest.approx(results["final"])
    assert results["history"][1]["penalty"] > 0  # a remedy acts in Stage 2


def test_a_flag_counts_more_than_the_report(shapes):
    args = tiny_args(shapes, "--report", "2", "--strategy", "none", "--width", "64")
    assert (args.strategy, args.width, args.box_loss, args.taps) == ("none", 64, "mse", [3, 6, 12])
    assert metrics.row_name(vars(args), train.defaults_for(args)).startswith("none --report 2")


def test_confidence_learns_by_bce_before_the_focal_loss(tiny_run, monkeypatch):
    args = deepcopy(tiny_run.args)
    args.conf_loss, args.conf_warmup, args.epochs = "focal", 1, [1, 3, 1]
    seen = []

    def step(*stuff):
        seen.append(stuff[-1])
        return 0.0, 0.0
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "evaluate", lambda *stuff: {})
    run = train.Run(args)
    train.train_stage(OneHead(), "det", run)
    assert list(dict.fromkeys(seen)) == [("giou", "bce"), ("giou", "focal")]
    assert seen.count(("giou", "bce")) == len(seen) // 3


@pytest.mark.parametrize("strategy, width", [("replay", 128), ("replay+lwf+isolation", 256)])
def test_benchmark_measures_and_writes(strategy, width, few, tmp_path, monkeypatch):
    penalised, real = [], train.train_step

    def recorded(*given):
        losses_of_step = real(*given)
        penalised.append((given[1], losses_of_step[1] > 0))
        return losses_of_step
    monkeypatch.setattr(train, "train_step", recorded)
    file = tmp_path / "benchmark.json"
    result = train.main(tiny_flags(few, file, "--benchmark", "--strategy", strategy,
                                   "--replay-weight", "1"))
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    model = OneHead(width=width, hidden=width)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p95"]
    assert set(result["images_per_s"]) == set(TASKS)
    assert set(penalised) == {("seg", False), ("det", True), ("cls", True)}
