"""Tests in three layers: oracles (hand-computed, or an independent implementation), invariants, and small whole runs.

    pytest test_all.py        needs no network and no photos
"""
import json
import os
import random
import shutil
import zipfile
from copy import deepcopy
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import pil_to_tensor

import data
import forgetting
import losses
import metrics
import train
from data import IGNORE, TASKS, MiniSet, UserError
from model import (CLS, DET, SEG, OneHead, augment, decode, detections, encode, load_model, load_weights, normalise,
                   save_model, take)

COUNTS = {"train": 20, "val": 10}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Tiny mini-sets of drawn shapes: 20 train and 10 val images of 64 px per task."""
    root = tmp_path_factory.mktemp("shapes") / "tiny"
    data.draw_shapes(root, COUNTS, size=64, seed=3)
    return root


@pytest.fixture
def copy(shapes, tmp_path):
    """A copy of the shapes that a test may damage."""
    return Path(shutil.copytree(shapes, tmp_path / "copy"))


def flags(shapes, out, *more):
    return ["--data", str(shapes), "--out", str(out), "--weights", "none", "--image-size", "64", "--epochs", "1",
            "--trunk-lr", "1", "--batch-size", "4", "--device", "cpu", *more]


@pytest.fixture(scope="session")
def finished(shapes, tmp_path_factory):
    """One finished run with replay: (its folder, what main returned)."""
    out = tmp_path_factory.mktemp("runs") / "replay-seed0"
    return out, train.main(flags(shapes, out))


# ----------------------------------------------------------------------------------------------- oracles: metrics

def slow_iou(predicted, truth, classes):
    """mIoU from sets of pixels, class by class."""
    ious = []
    for c in range(classes):
        p = {i for i, (a, b) in enumerate(zip(predicted, truth)) if a == c and b != IGNORE}
        t = {i for i, b in enumerate(truth) if b == c}
        if p | t:
            ious.append(len(p & t) / len(p | t))
    return sum(ious) / len(ious)


def test_miou_agrees_with_pixel_sets():
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth = rng.choice([0, 1, 2, 3, 7, IGNORE], 500)
        predicted = np.where(rng.random(500) < 0.5, truth % 21, rng.integers(0, 9, 500))
        counts = metrics.confusion(predicted[:200], truth[:200]) + metrics.confusion(predicted[200:], truth[200:])
        assert metrics.mean_iou(counts) == pytest.approx(slow_iou(predicted, truth, 21), abs=1e-9)


def test_miou_of_oracle_background_and_nothing():
    truth = np.array([0] * 90 + [1] * 5 + [2] * 5 + [IGNORE] * 20)
    oracle = np.where(truth == IGNORE, 4, truth)  # what is said about ignored pixels does not count
    assert metrics.mean_iou(metrics.confusion(oracle, truth)) == 1
    assert metrics.mean_iou(metrics.confusion(0 * truth, truth)) == pytest.approx((0.9 + 0 + 0) / 3)
    assert metrics.mean_iou(metrics.confusion(np.where(truth == 1, 3, oracle), truth)) == pytest.approx(2 / 4)
    assert metrics.mean_iou(np.zeros((21, 21), int)) == 0


def slow_ap(predictions, truth, iou, classes=10):
    """COCO's AP at one IoU threshold: greedy matching by score, precision made monotone, read off at 101 recalls."""
    aps = []
    for c in range(classes):
        gts = [torch.tensor([a["bbox"] for a in t["annotations"] if a["category_id"] == c]).reshape(-1, 4) for t in truth]
        total = sum(map(len, gts))
        if not total:
            continue
        free = [[True] * len(g) for g in gts]
        rows = [(s.item(), i, b) for i, p in enumerate(predictions) for b, s, k in zip(*p) if k == c]
        hits = []
        for _, i, box in sorted(rows, key=lambda r: -r[0]):
            best, best_iou = None, iou
            for j, g in enumerate(gts[i]):
                overlap = box_iou(box[None].double(), box_convert(g[None].double(), "xywh", "xyxy")).item()
                if free[i][j] and overlap >= best_iou:
                    best, best_iou = j, overlap
            if best is not None:
                free[i][best] = False
            hits.append(best is not None)
        tp = np.cumsum(hits)
        recall, precision = tp / total, tp / np.arange(1, len(hits) + 1)
        aps.append(np.mean([precision[recall >= r - 1e-12].max() if (recall >= r - 1e-12).any() else 0
                            for r in np.linspace(0, 1, 101)]) if len(hits) else 0)
    return float(np.mean(aps))


def random_scene(rng, images=6):
    truth, predictions = [], []
    for _ in range(images):
        boxes = [[*rng.uniform(0, 60, 2), *rng.uniform(8, 40, 2)] for _ in range(rng.integers(0, 6))]
        truth.append({"width": 100, "height": 100, "annotations": [
            {"bbox": b, "category_id": int(rng.integers(0, 4)), "iscrowd": 0, "area": b[2] * b[3]} for b in boxes]})
        near = [(np.array(a["bbox"]) + rng.normal(0, 3, 4), a["category_id"]) for a in truth[-1]["annotations"]]
        far = [(np.array([*rng.uniform(0, 60, 2), 20, 20]), int(rng.integers(0, 6))) for _ in range(4)]
        boxes = torch.tensor(np.array([b for b, _ in near + far]))
        predictions.append((box_convert(boxes, "xywh", "xyxy"), torch.tensor(rng.random(len(boxes))),
                            torch.tensor([c for _, c in near + far])))
    return predictions, truth


def test_map_agrees_with_independent_computation():
    rng = np.random.default_rng(1)
    for _ in range(4):
        predictions, truth = random_scene(rng)
        ap50, ap = metrics.mean_ap(predictions, truth)
        assert 0 < ap < ap50 < 1
        assert ap50 == pytest.approx(slow_ap(predictions, truth, 0.5), abs=1e-6)
        thresholds = np.linspace(0.5, 0.95, 10)
        assert ap == pytest.approx(np.mean([slow_ap(predictions, truth, t) for t in thresholds]), abs=1e-6)


def test_map_of_oracle_nothing_and_crowds():
    _, truth = random_scene(np.random.default_rng(2))
    oracle = [(box_convert(torch.tensor([a["bbox"] for a in t["annotations"]]).reshape(-1, 4), "xywh", "xyxy"),
               torch.ones(len(t["annotations"])), torch.tensor([a["category_id"] for a in t["annotations"]], dtype=int))
              for t in truth]
    assert metrics.mean_ap(oracle, truth) == (1, 1)
    nothing = [(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=int))] * len(truth)
    assert metrics.mean_ap(nothing, truth) == (0, 0)
    for t in truth:  # a crowd that nobody found is no miss
        t["annotations"].append({"bbox": [0, 0, 90, 90], "category_id": 0, "iscrowd": 1, "area": 8100})
    assert metrics.mean_ap(oracle, truth) == (1, 1)
    with pytest.raises(UserError, match="no boxes"):
        metrics.mean_ap(nothing, [{**t, "annotations": []} for t in truth])


class Oracle(torch.nn.Module):
    """Answers with the truth of the images it is shown, in the order of the split."""

    def __init__(self, split):
        super().__init__()
        self.split, self.at = split, 0

    def forward(self, images, tasks, upsample):
        truth = self.split.truth[self.at:self.at + len(images)]
        _, target = take(self.split.batch, slice(self.at, self.at + len(images)))
        self.at += len(images)
        if tasks == ("cls",):
            return {"cls": F.one_hot(target["labels"][:, 0], 10).float()}
        if tasks == ("seg",):
            return {"seg": torch.stack([F.one_hot(torch.from_numpy(m % 255).long(), 21).permute(2, 0, 1) for m in truth]) * 9.0}
        det = torch.full((len(images), 40, 15), -20.0)
        for row, boxes, labels in zip(det, target["boxes"], target["labels"]):
            m = (labels >= 0).sum()
            row[:m, :4] = box_convert(boxes[:m], "xyxy", "cxcywh")
            row[:m, 4] = 20
            row[range(m), 5 + labels[:m]] = 20
        return {"det": det}


def stretch(root, size=(96, 64)):
    """Makes every photo, mask and annotation of the val splits `size` instead of 64×64."""
    for file in [*root.glob("*/val/*.jpg"), *root.glob("*/val/*.png"), *root.glob("*/val/*/*.JPEG")]:
        Image.open(file).resize(size, Image.NEAREST).save(file)
    file = root / "mini_coco_det/annotations/mini_instances_val2017.json"
    coco = json.loads(file.read_text())
    for image in coco["images"]:
        image["width"], image["height"] = size
    for a in coco["annotations"]:
        a["bbox"] = [v * n / 64 for v, n in zip(a["bbox"], 2 * size)]
    file.write_text(json.dumps(coco))


def test_oracle_scores_one_in_every_metric_on_oblong_images(copy):
    stretch(copy)
    split = MiniSet(copy, "seg", "val", 32)
    assert split.truth[0].shape == (64, 96) and split.batch[1]["mask"].shape == (10, 32, 32)
    assert metrics.evaluate(Oracle(split), {"seg": split}, "cpu", batch_size=3)["seg"] == 1
    split = MiniSet(copy, "det", "val", 32)
    found = split.truth[0]["annotations"][0]["bbox"]
    torch.testing.assert_close(box_convert(split.batch[1]["boxes"][0, 0], "xyxy", "xywh"),
                               torch.tensor(found) * torch.tensor([32 / 96, 32 / 64, 32 / 96, 32 / 64]))
    assert metrics.evaluate(Oracle(split), {"det": split}, "cpu", batch_size=3)["map_50_95"] == pytest.approx(1)
    split = MiniSet(copy, "cls", "val", 32)
    assert metrics.evaluate(Oracle(split), {"cls": split}, "cpu", batch_size=3)["cls"] == 1


class Left(torch.nn.Module):
    """Answers class 1 on the left half of a 2×2 map and class 0 on the right half."""

    def forward(self, images, tasks, upsample):
        logits = torch.zeros(len(images), 21, 2, 2)
        logits[:, 0, :, 1] = logits[:, 1, :, 0] = 1
        return {"seg": logits}


def test_miou_is_measured_at_the_original_resolution(copy):
    for file in (copy / "mini_voc_seg/val").glob("*.png"):
        mask = Image.fromarray(np.repeat(np.repeat([[1, 1, 1, 0]], 24, 1), 64, 0).astype(np.uint8))  # 72 of 96 columns
        mask.save(file)
        Image.new("RGB", (96, 64)).save(file.with_suffix(".jpg"))
    split = MiniSet(copy, "seg", "val", 32)
    assert metrics.evaluate(Left(), {"seg": split}, "cpu")["seg"] == pytest.approx((48 / 72 + 24 / 48) / 2)


def test_drop_and_verdict_follow_the_rules():
    results = {"baseline": {"seg": 0.5, "det": 0.2, "cls": 0.9}, "params": 10, "latency_ms": 10, "seconds": {"stages": 1},
               "matrix": [{"seg": 0.5, "det": 0, "cls": 0.1}, {"seg": 0.4, "det": 0.25, "cls": 0.1}, None],
               "final": {"seg": 0.475, "det": 0.2, "cls": 0.9}}
    results["matrix"][2] = results["final"]
    metrics.judge(results)
    assert results["drop"] == pytest.approx({"seg": 0.05, "det": 0, "cls": 0})
    assert results["drop_own"] == pytest.approx({"seg": 0.05, "det": 0.2, "cls": 0})
    assert results["verdict"] == {"seg": True, "det": False, "cls": True, "params": True, "latency": True, "time": True,
                                  "all": False}
    results["baseline"]["cls"] = 0.19  # chance cannot be forgotten, and does not pass
    metrics.judge(results)
    assert results["drop"]["cls"] is None and not results["verdict"]["cls"]


# ------------------------------------------------------------------------------------------------ oracles: losses

def test_parameters_of_the_reference_configuration():
    assert sum(p.numel() for p in OneHead((3, 6, 12), levels=1).parameters()) == 1_605_582
    assert sum(p.numel() for p in OneHead().parameters()) < 8_000_000


def test_outputs_and_channel_map():
    model, images = OneHead().eval(), torch.randn(2, 3, 64, 96)
    out = model(images)
    assert out["seg"].shape == (2, 21, 64, 96) and out["cls"].shape == (2, 10)
    assert out["det"].shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 15) == (2, len(model.locations(images)), 15)
    for task in TASKS:  # asking for one task changes nothing but the work
        torch.testing.assert_close(model(images, (task,))[task], out[task])
    with torch.no_grad():
        model.head[2].weight[DET] += 1
        changed = model(images)
    assert torch.equal(changed["seg"], out["seg"]) and torch.equal(changed["cls"], out["cls"])
    assert not torch.equal(changed["det"], out["det"])
    assert [SEG.stop - SEG.start, DET.stop - DET.start, CLS.stop - CLS.start] == [21, 15, 10]


def test_decode_inverts_encode():
    locations = OneHead().locations(torch.zeros(1, 3, 128, 64))
    boxes = torch.rand(len(locations), 4) * 100 + 5
    torch.testing.assert_close(decode(encode(boxes, locations), locations), boxes)
    t = torch.randn(len(locations), 4)
    torch.testing.assert_close(encode(decode(t, locations), locations), t, atol=1e-4, rtol=1e-4)


def test_worked_example_of_the_losses():
    locations = OneHead().locations(torch.zeros(1, 3, 256, 256))
    box = torch.tensor([[[40.0, 60, 104, 124]]])
    cells = (losses.assign(box, torch.tensor([[5]]), locations)[0] >= 0).nonzero()[:, 0] - 32 * 32
    assert cells.tolist() == [16 * row + column for row in (4, 5, 6) for column in (3, 4, 5)]  # 84 and its neighbours
    cell = locations[32 * 32 + 84]
    assert cell.tolist() == [72, 88, 16]
    assert encode(box_convert(box[0, 0], "xyxy", "cxcywh"), cell).tolist() == [0, 0.25, 0, 0]


def slow_assign(boxes, labels, locations, radius=1.5):
    """The rule of `assign` as loops over cells and boxes."""
    strides = locations[:, 2].unique().tolist()
    index = []
    for x, y, s in locations.tolist():
        best = (float("inf"), -1)
        for j, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            longer, cx, cy = max(x2 - x1, y2 - y1), (x1 + x2) / 2, (y1 + y2) / 2
            level = next((t for t in strides if longer < 8 * t), strides[-1])
            home = cx // s == x // s and cy // s == y // s
            near = x1 < x < x2 and y1 < y < y2 and abs(x - cx) < radius * s and abs(y - cy) < radius * s
            if labels[j] >= 0 and level == s and (home or near):
                best = min(best, ((x2 - x1) * (y2 - y1), j))
        index.append(best[1])
    return index


def test_assignment_agrees_with_loops():
    torch.manual_seed(0)
    locations = OneHead().locations(torch.zeros(1, 3, 192, 192))
    for _ in range(3):
        corner = torch.rand(12, 2) * 150
        boxes = torch.cat([corner, (corner + torch.rand(12, 1) ** 2 * 180 + 3).clamp(max=191)], 1)
        labels = torch.arange(12) % 6 - 1
        assert losses.assign(boxes[None], labels[None], locations)[0].tolist() == slow_assign(boxes, labels, locations)


def test_the_smaller_box_wins_a_contested_cell_and_rows_are_y():
    locations = OneHead(levels=1).locations(torch.zeros(1, 3, 64, 64))
    boxes = torch.tensor([[[0.0, 0, 60, 64], [24, 40, 36, 52]], [[24, 40, 36, 52], [0, 0, 60, 64]]])
    index = losses.assign(boxes, torch.tensor([[1, 2], [2, 1]]), locations)
    assert index[0].view(8, 8)[5, 3] == 1 and index[1].view(8, 8)[5, 3] == 0  # y = 46 -> row 5, x = 30 -> column 3
    corner = losses.assign(torch.tensor([[[60.0, 60, 68, 68]]]), torch.tensor([[0]]), locations)
    assert corner[0].view(8, 8)[7, 7] == 0  # a centre on the far border stays on the map


def test_detection_loss_by_hand():
    locations = OneHead(levels=1).locations(torch.zeros(1, 3, 32, 32))  # 16 cells
    det = torch.zeros(1, 16, 15)
    det[..., :4] = torch.tensor([16.0, 16, 8, 8])
    target = {"boxes": torch.tensor([[[17.0, 9, 23, 15]]]), "labels": torch.tensor([[4]])}  # in one cell: row 1, column 2
    ln2, ln10 = np.log(2), np.log(10)
    giou = generalized_box_iou_loss(torch.tensor([[12.0, 12, 20, 20]]), target["boxes"][0])
    assert losses.det_loss(det, target, locations).item() == pytest.approx(2 * giou.item() + ln10 + 16 * ln2, rel=1e-5)
    empty = {"boxes": torch.zeros(1, 1, 4), "labels": torch.tensor([[-1]])}
    det.requires_grad_()
    loss = losses.det_loss(det, empty, locations)
    loss.backward()
    assert loss.item() == pytest.approx(16 * ln2, rel=1e-5)
    assert det.grad[..., 4].abs().min() > 0 and det.grad.isfinite().all()  # confidence covers every cell


def test_giou_agrees_with_torchvision():
    torch.manual_seed(0)
    a, b = (torch.cat([xy, xy + torch.rand(50, 2) * 20], 1) for xy in torch.rand(2, 50, 2) * 30)
    torch.testing.assert_close(losses.giou_loss(a, b), generalized_box_iou_loss(a, b))


def test_detection_loss_agrees_with_loops_over_boxes():
    torch.manual_seed(0)
    locations = OneHead().locations(torch.zeros(1, 3, 64, 64))
    corner = torch.rand(3, 4, 2) * 40
    target = {"boxes": torch.cat([corner, corner + 4 + torch.rand(3, 4, 2) * 20], 2),
              "labels": torch.tensor([[3, 1, 9, -1], [-1, 2, 2, 0], [-1, -1, -1, -1]])}
    det = torch.randn(3, len(locations), 15)
    det[..., :4] = decode(det[..., :4], locations)
    total, positives = 0.0, 0
    for rows, boxes, labels in zip(det, target["boxes"], target["labels"]):
        for row, j in zip(rows, slow_assign(boxes, labels, locations)):
            if j >= 0:
                box = box_convert(row[None, :4], "cxcywh", "xyxy")
                total += 2 * generalized_box_iou_loss(box, boxes[j][None])[0] + F.cross_entropy(row[5:], labels[j])
            total += F.binary_cross_entropy(row[4].sigmoid(), torch.tensor(float(j >= 0)))
            positives += j >= 0
    torch.testing.assert_close(losses.det_loss(det, target, locations), total / positives)


class Waits(TorchDispatchMode):
    """Collects the operations that would make the host wait for a GPU, or copy from the host to it."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.__name__, args[1] if len(args) > 1 else ()
        booleans = name.startswith("index") and isinstance(indices, (list, tuple)) and any(
            i is not None and i.dtype == torch.bool for i in indices)
        if booleans or name.startswith(("nonzero", "_local_scalar_dense", "masked_select", "lift_fresh", "_unique")):
            self.found.add(name)
        return function(*args, **kwargs or {})


def loss_of(model, task, images, target):
    return losses.task_loss(task, model(images, (task,), upsample=False), target, model.locations(images))


@pytest.mark.parametrize("task", TASKS)
def test_a_step_does_not_wait_for_a_gpu_and_works_in_half_precision(shapes, task):
    batch, model = MiniSet(shapes, task, "train", 64).batch, OneHead()
    augment(*take(batch, slice(4)))  # sends the constants
    with Waits() as waits:
        images, target = augment(*take(batch, torch.arange(4)))
        loss = loss_of(model, task, images, target)
        loss.backward()
    assert waits.found == set()
    with Waits() as waits:
        images[images > 0].sum().item()
    assert len(waits.found) == 2  # it does notice
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(model, task, images, target)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(loss.item(), rel=0.05)


def test_segmentation_loss_agrees_with_upsampled_cross_entropy():
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 21, 4, 6), torch.randint(0, 21, (3, 32, 48))
    mask[torch.rand(mask.shape) < 0.3] = IGNORE
    full = F.interpolate(logits, mask.shape[1:], mode="bilinear")
    torch.testing.assert_close(losses.seg_loss(logits, mask), F.cross_entropy(full, mask, ignore_index=IGNORE))
    assert losses.seg_loss(logits, torch.full_like(mask, IGNORE)) == 0


def test_outputs_come_from_their_levels():
    torch.manual_seed(0)
    model, images = OneHead().eval(), torch.randn(2, 3, 64, 96)
    out = model(images)
    maps = [model.head(level) for level in model.fpn(dict(enumerate(model.taps(images)))).values()]
    sizes = [tuple(m.shape[2:]) for m in maps]
    assert sizes == [(8, 12), (4, 6), (2, 3)]
    torch.testing.assert_close(out["seg"], F.interpolate(maps[0][:, SEG], (64, 96), mode="bilinear"))
    torch.testing.assert_close(out["det"][:, 96 + 7, 4], maps[1][:, DET][:, 4, 1, 1])  # row 1, column 1 of the second level
    torch.testing.assert_close(out["cls"], maps[2][:, CLS].mean((2, 3)))
    for task in TASKS:  # asked for alone, from as few levels as it needs
        torch.testing.assert_close(model(images, (task,))[task], out[task])


def test_untrained_confidence_is_the_prior():
    det = OneHead().eval()(torch.zeros(1, 3, 64, 64))["det"]
    assert det[..., 4].sigmoid().mean().item() == pytest.approx(0.01, rel=0.3)


def test_detections_are_per_class_and_sorted():
    det = torch.full((4, 15), -9.0)
    det[:, :4] = torch.tensor([[10.0, 10, 8, 8], [10.5, 10, 8, 8], [10, 10, 8, 8], [40, 40, 8, 8]])
    det[:, 4] = torch.tensor([2.0, 1.0, 0.0, -9.0])
    det[range(3), [5, 5, 7]] = 9.0
    boxes, scores, labels = detections(det)
    assert labels.tolist() == [0, 2] and scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert boxes[0].tolist() == [6, 6, 14, 14]
    assert detections(det, candidates=1)[1].tolist() == scores[:1].tolist()
    crowd = torch.rand(5000, 15) * 200
    crowd[:, 4:] = torch.rand(5000, 11)
    assert len(detections(crowd)[0]) == 100 and len(detections(crowd, candidates=50)[0]) <= 50


# ------------------------------------------------------------------------------------------------ invariants: model

def settings(**more):
    return SimpleNamespace(**{**dict(seed=0, weights="none", device="cpu", image_size=64, epochs=[1, 1, 1], lr=[1e-3] * 3,
                                     trunk_lr=[1.0] * 3, batch_size=4, weight_decay=0.1, eval_every=0, replay_images=10,
                                     replay_batch=2, replay_weight=1.0, replay_tasks=list(TASKS), strategy="none",
                                     lwf_weight=[1.0] * 3, lwf_temperature=2.0, ewc_lambda=[1.0, 1.0, 1.0], ewc_ramp=False,
                                     freeze="trunk", bn="fixed"), **more})


def one_stage(model, task, shapes, remedies=()):
    return train.train_stage(model, task, MiniSet(shapes, task, "train", 64), remedies, settings(), metrics.Clock(1), task)


def buffers(model):
    return {k: v.clone() for k, v in model.named_buffers()}


def test_fixed_batchnorm_is_bit_identical_after_an_epoch_and_live_is_not(shapes):
    model = train.new_model(settings())
    before = buffers(model)
    one_stage(model, "seg", shapes)  # new layers learn in the first stage
    assert any(not torch.equal(before[k], v) for k, v in model.named_buffers())
    model.fix_batchnorm()
    before = buffers(model)
    one_stage(model, "det", shapes)
    assert before and all(torch.equal(before[k], v) for k, v in model.named_buffers())
    assert model.training and not any(m.training for m in model.batchnorms().values())
    model.free_batchnorm()
    one_stage(model, "det", shapes)
    assert any(not torch.equal(before[k], v) for k, v in model.named_buffers())


@pytest.mark.parametrize("held, new", [((), "det"), (("seg",), "det"), (("seg", "det"), "cls")])
def test_output_rows_of_other_tasks_are_bit_identical_after_a_stage(shapes, held, new):
    model, ewc = train.new_model(settings()), forgetting.EWC(settings())
    for task in held:  # its spring holds these rows where they are: they start at their rest position
        ewc.remember(task, model, MiniSet(shapes, task, "train", 64))
    before = {k: v.clone() for k, v in model.head[2].named_parameters()}
    one_stage(model, new, shapes, [ewc])
    for name, value in model.head[2].named_parameters():
        assert all(torch.equal(value[rows], before[name][rows]) == (task != new)
                   for task, rows in zip(TASKS, (SEG, DET, CLS)))


def test_pretrained_trunk_is_loaded_and_its_batchnorm_fixed(tmp_path):
    trunk = {f"features.{k}": v + 1 if v.is_floating_point() else v for k, v in OneHead().features.state_dict().items()}
    torch.save({**trunk, "classifier.0.weight": torch.zeros(1)}, tmp_path / "trunk.pth")
    model = OneHead()
    load_weights(model, str(tmp_path / "trunk.pth"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in trunk.items())
    assert not any(m.training for m in model.train().batchnorms().values())
    assert all(m.training for m in OneHead().train().batchnorms().values())
    assert {m.momentum for m in OneHead().batchnorms().values()} == {0.1}


def test_saved_model_comes_back_whole(tmp_path):
    model = OneHead((3, 6, 12), levels=1).eval()
    save_model(tmp_path / "model.pt", model, 96, {"cls": ["a", "b"]})
    again, size, classes = load_model(tmp_path / "model.pt")
    image = torch.randn(1, 3, 64, 64)
    assert (size, classes, again.strides) == (96, {"cls": ["a", "b"]}, [8])
    assert torch.equal(again(image)["det"], model(image)["det"])
    other = OneHead()
    with pytest.raises(UserError, match="not this architecture"):
        load_weights(other, str(tmp_path / "model.pt"))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_bad_checkpoints_end_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    Path("cut.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save({"arch": {"taps": [3, 8, 12]}, "model": {}, "image_size": 1, "classes": {}}, "other.pt")
    for name in ("evil.pt", "cut.pt", "missing.pt", "other.pt"):
        with pytest.raises(UserError, match=name):
            load_model(name)
        with pytest.raises(UserError, match=name):
            load_weights(OneHead(), name)
    assert not Path("evil").exists()

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models.MobileNet_V3_Small_Weights.get_state_dict", offline)
    with pytest.raises(UserError, match="--weights PATH, or .* --weights none"):
        load_weights(OneHead(), "imagenet")


# ------------------------------------------------------------------------------------------------- invariants: data

def test_draw_covers_rare_classes():
    labels = {f"{i:03}": {"common"} for i in range(100)} | {"007": {"rare", "common"}, "050": {"second"}}
    for seed in range(5):
        assert {"007", "050"} <= set(islice(data.draw(labels, random.Random(seed)), 4))
    assert sorted(data.draw(labels, random.Random(0))) == sorted(labels)
    empty = {f"empty{i}": set() for i in range(40)}
    assert "007" in list(islice(data.draw(labels | empty, random.Random(0)), 4))


def test_augmentation_moves_image_and_target_together():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[10:30, 20:50] = 7
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    images = ((mask > 0) * red).repeat(40, 1, 1, 1)  # a red patch on black; outside of the image it is grey
    boxes = torch.tensor([20.0, 10, 50, 30]).repeat(40, 1, 1)
    torch.manual_seed(1)
    x, target = augment(images, {"mask": mask.repeat(40, 1, 1)}, (0.6, 1.4), mask_stride=1)
    seen, shown = x[:, 0] - x[:, 1] > 1.5, target["mask"] == 7
    assert (seen != shown).float().mean((1, 2)).max() < 0.06  # bilinear against nearest borders
    assert not any(torch.equal(m, shown[0]) for m in shown[1:])  # a window for every image
    outside = x[(target["mask"] == IGNORE)[:, None].expand(x.shape)]
    assert len(outside) and (outside.abs() < 0.6).float().mean() > 0.9  # grey, but for a blend at the border
    torch.manual_seed(1)  # the same windows
    y, target = augment(images, {"boxes": boxes, "labels": torch.full((40, 1), 3)}, (0.6, 1.4))
    assert torch.equal(x, y)
    for i, (box, label) in enumerate(zip(target["boxes"][:, 0], target["labels"][:, 0])):
        rows, columns = seen[i].nonzero().unbind(1)
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert label == 3 and (found - box).abs().max() < 3
    torch.manual_seed(1)
    _, coarse = augment(images, {"mask": mask.repeat(40, 1, 1)}, (0.6, 1.4))
    near = F.avg_pool2d(shown[:, None].float(), 4)[:, 0]  # share of the class in each 4×4 block
    sure = (near == 0) | (near == 1)
    assert coarse["mask"].shape == (40, 16, 16) and torch.equal((coarse["mask"] == 7)[sure], near[sure] == 1)


def test_augmentation_changes_contrast_brightness_and_saturation_alone():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    x, _ = augment(images, {}, zoom=(1, 1), aspect=1)
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in ((58.395, 57.12, 57.375), (123.675, 116.28, 103.53)))
    slopes = []
    for before, after in zip(images - mean, x * std):
        before = min(before, before.flip(2), key=lambda b: (b.mean(0) - after.mean(0)).std().item())  # mirrored or not
        grey, tint = before.mean(0), before - before.mean(0)
        contrast = ((after.mean(0) * grey).mean() - after.mean() * grey.mean()) / grey.var(correction=0)
        saturation = (after - after.mean(0))[0, 0, 0] / tint[0, 0, 0] / contrast
        brightness = after.mean() - contrast * grey.mean()
        torch.testing.assert_close(after, contrast * (grey + saturation * tint) + brightness, rtol=1e-3, atol=0.02)
        slopes.append([contrast, saturation, 1 + brightness / 100])
    slopes = torch.tensor(slopes)
    assert ((slopes > 0.69) & (slopes < 1.31)).all() and slopes.std(0).min() > 0.05


def test_boxes_cropped_away_are_no_targets():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 21, 21]])  # in a corner, and tiny
    _, target = augment(torch.zeros(300, 3, 64, 64, dtype=torch.uint8),
                        {"boxes": boxes.expand(300, 2, 4), "labels": torch.tensor([3, 4]).expand(300, 2)}, aspect=1)
    (corner, tiny), (labels, small) = target["boxes"].unbind(1), target["labels"].unbind(1)
    w, h = (corner[:, 2:] - corner[:, :2]).unbind(1)
    assert set(labels.tolist()) == {3, -1} and set(small.tolist()) == {-1}  # 1.7 px at most
    whole = 10 / 1.4, 10 / 0.6  # the side of the box in the largest and in the smallest window
    assert (w * h)[labels == -1].max() <= whole[1] ** 2 / 5 and (w * h)[labels == 3].min() > whole[0] ** 2 / 5


def test_half_of_the_images_are_flipped_and_colours_vary():
    torch.manual_seed(0)
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(400, 3, 64, 64)
    x, target = augment(ramp, {"labels": torch.arange(400)[:, None]}, zoom=(1, 1), aspect=1)
    rising = (x[:, 0, 32, 63] > x[:, 0, 32, 0]).float().mean()
    assert 0.4 < rising < 0.6 and target["labels"].flatten().tolist() == list(range(400))
    assert x.mean((1, 2, 3)).std() > 0.2 and x.std((1, 2, 3)).std() > 0.1


def test_images_are_normalised_and_boxes_padded(shapes):
    split = MiniSet(shapes, "det", "train", 64)
    raw, target = take(split.batch, slice(6))
    images = normalise(raw)
    expected = (raw / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    counts = [len(t["annotations"]) for t in split.truth[:6]]
    assert (target["labels"] >= 0).sum(1).tolist() == counts
    assert all((row[:n] >= 0).all() and (row[n:] == -1).all() for row, n in zip(target["labels"], counts))


def test_boxes_are_scaled_clipped_and_skipped(copy, capsys):
    file = copy / "mini_coco_det/annotations/mini_instances_val2017.json"
    coco = json.loads(file.read_text())
    first = coco["images"][0]["id"]
    coco["annotations"] = [dict(id=i, image_id=first, category_id=2, bbox=b, area=1, iscrowd=crowd) for i, (b, crowd) in
                           enumerate([([-10, 8, 30, 16], 0), ([5, 5, 0, 9], 0), ([70, 5, 9, 9], 0), ([0, 0, 64, 64], 1)])]
    file.write_text(json.dumps(coco))
    split = MiniSet(copy, "det", "val", 32)
    target = split.batch[1]
    assert target["boxes"][0, 0].tolist() == [0, 4, 10, 12]  # half size, clipped; the crowd is no target
    assert target["labels"][0].tolist() == [1, -1] and (target["labels"][1:] == -1).all()
    assert len(split.truth[0]["annotations"]) == 2 and "skipped 2 boxes" in capsys.readouterr().out


def test_classes_are_mapped_by_name(copy):
    before = MiniSet(copy, "det", "val", 64)
    file = copy / "mini_coco_det/annotations/mini_instances_val2017.json"
    coco = json.loads(file.read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    coco["categories"] = [{"id": 90 - i, "name": n} for i, n in reversed(names.items())]
    for a in coco["annotations"]:
        a["category_id"] = 90 - a["category_id"]
    file.write_text(json.dumps(coco))
    after = MiniSet(copy, "det", "val", 64, before.classes)
    assert torch.equal(before.batch[1]["labels"], after.batch[1]["labels"])
    shutil.rmtree(copy / "imagenette_160/val" / sorted(data.SHAPES)[0])
    split = MiniSet(copy, "cls", "val", 64, sorted(data.SHAPES))
    assert split.batch[1]["labels"][:, 0].tolist() == list(range(1, 10))
    with pytest.raises(UserError, match="unknown cls classes"):
        MiniSet(copy, "cls", "val", 64, data.SHAPES[:5])
    some = MiniSet(copy, "cls", "val", 64, data.SHAPES[:5], skip_unknown=True)
    assert {some.classes[i] for i in some.batch[1]["labels"][:, 0]} == {*data.SHAPES[:5]} - {sorted(data.SHAPES)[0]}


def test_palette_indices_survive_and_bad_masks_are_named(copy):
    file = copy / "mini_voc_seg/val/0003.png"
    values = np.full((64, 64), 5, np.uint8)
    values[:8] = IGNORE

    def write(values, mode="P"):
        mask = Image.fromarray(values)
        if mode == "P":
            mask.putpalette([random.randrange(256) for _ in range(768)])  # whatever the colours
        mask.convert(mode).save(file)
    write(values)
    split = MiniSet(copy, "seg", "val", 32)
    assert np.array_equal(split.truth[3], values) and set(split.batch[1]["mask"][3].unique().tolist()) == {5, IGNORE}
    for bad, mode in ((values + 30, "P"), (values, "RGB"), (values[:9], "P")):
        write(bad, mode)
        with pytest.raises(UserError, match="0003.png"):
            MiniSet(copy, "seg", "val", 32)


def test_bad_data_ends_in_one_sentence(copy):
    photo = copy / "imagenette_160/val" / data.SHAPES[0] / "0000.JPEG"
    photo.write_bytes(photo.read_bytes()[:300])
    with pytest.raises(UserError, match="0000.JPEG"):
        MiniSet(copy, "cls", "val", 64)
    (copy / "mini_coco_det/annotations/mini_instances_val2017.json").write_text('{"images": [')
    with pytest.raises(UserError, match="mini_instances_val2017.json"):
        MiniSet(copy, "det", "val", 64)
    shutil.rmtree(copy / "mini_voc_seg/val")
    with pytest.raises(UserError, match="no images"):
        MiniSet(copy, "seg", "val", 64)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The three originals in their official layouts, in small, with every defect that sampling must survive."""
    root, rng = tmp_path_factory.mktemp("originals"), np.random.default_rng(0)

    def photo(path, size=(48, 40)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(size, Image.BICUBIC).save(path)
        return path
    voc, coco = root / "VOCdevkit/VOC2012", root / "coco"
    for split in ("train", "val"):
        for i in range(8):
            photo(voc / f"JPEGImages/{split}{i}.jpg")
            mask = Image.fromarray(np.full((40, 48), i + 1, np.uint8))
            mask.putpalette(list(range(256)) * 3)
            (voc / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(voc / f"SegmentationClass/{split}{i}.png")
            for c in range(2):
                photo(root / f"imagenette2-160/{split}/n{c}/{split}_{i}.JPEG")
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(f"{split}{i}" for i in range(8)))
        images = [dict(id=i, file_name=f"{split}{i:012}.jpg", width=48, height=40) for i in range(10)]
        for image in images:
            photo(coco / f"{split}2017" / image["file_name"])
        categories = [dict(id=1, name="person"), dict(id=18, name="dog"), dict(id=99, name="banana")]
        annotations = [dict(id=i, image_id=i, category_id=(1, 18)[i % 2], bbox=[4, 4, 20, 20], area=400, iscrowd=0)
                       for i in range(9)] + [dict(id=50, image_id=9, category_id=99, bbox=[1, 1, 9, 9], area=81, iscrowd=0)]
        (coco / "annotations").mkdir(exist_ok=True)
        (coco / f"annotations/instances_{split}2017.json").write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    folder = coco / "train2017"
    shutil.copy(voc / "JPEGImages/train0.jpg", folder / "train000000000000.jpg")  # a VOC photo under another name
    (folder / "train000000000001.jpg").write_bytes(b"truncated")
    photo(folder / "train000000000002.jpg", (30, 30))  # not of the annotated size
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_prepare_is_reproducible_exclusive_and_survives_defects(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "COUNTS", {"train": 6, "val": 4})
    first, second, third = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for out in (first, second, first):  # the third time over an earlier preparation
        data.main(["--originals", str(originals), "--out", str(out)])
    assert contents(first) == contents(second)
    text = capsys.readouterr().out
    for defect in ("looks like an image", "not a readable image", "not of the annotated size"):
        assert defect in text
    data.main(["--originals", str(originals), "--out", str(third), "--sample", str(first / "sample.json"), "--seed", "9"])
    assert contents(third) == contents(first)
    sample = json.loads((first / "sample.json").read_text())
    assert [len(sample[f][s]) for f in data.FOLDERS.values() for s in ("train", "val")] == [6, 4] * 3
    assert not {f"train{i:012}.jpg" for i in (0, 1, 2, 9)} & set(sample["mini_coco_det"]["train"])
    for split in ("train", "val"):
        coco = json.loads((first / f"mini_coco_det/annotations/mini_instances_{split}2017.json").read_text())
        assert [c["name"] for c in coco["categories"]] == data.SAMPLED_CLASSES
    photos = [v for k, v in contents(first).items() if k.lower().endswith(("jpg", "jpeg"))]
    assert len(set(photos)) == len(photos) == 30


def test_prepare_refuses_what_it_cannot_do(originals, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="move that away"):
        data.main(["--originals", str(originals), "--out", str(tmp_path / "mine")])
    with pytest.raises(UserError, match="of 240 images"):
        data.main(["--originals", str(originals), "--out", str(tmp_path / "few")])
    with pytest.raises(UserError, match="0 of 240 images"):
        data.main(["--originals", str(tmp_path / "nowhere"), "--out", str(tmp_path / "few")])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json"):
        data.main(["--originals", str(originals), "--out", str(tmp_path / "few"), "--sample", str(tmp_path / "bad.json")])
    assert (tmp_path / "mine/thesis.txt").exists() and not (tmp_path / "few").exists()


def test_download_checks_what_arrives_and_keeps_what_is_there(originals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "COUNTS", {"train": 6, "val": 4})

    def archive(name):
        return lambda root, *args, **kwargs: shutil.copytree(originals / name, root / name)

    def download(url, root, filename=None, md5=None):
        Path(root).mkdir(parents=True, exist_ok=True)
        if md5:
            with zipfile.ZipFile(Path(root) / "annotations_trainval2017.zip", "w") as z:
                for split in data.COUNTS:
                    coco = json.loads((originals / f"coco/annotations/instances_{split}2017.json").read_text())
                    for i in coco["images"]:
                        i["coco_url"] = str(originals / f"coco/{split}2017" / i["file_name"])
                    z.writestr(f"annotations/instances_{split}2017.json", json.dumps(coco))
        elif url.endswith("train000000000001.jpg"):
            (Path(root) / filename).write_bytes(b"cut off")
        else:
            shutil.copy(url, Path(root) / filename)
    monkeypatch.setattr(data, "VOCSegmentation", archive("VOCdevkit"))
    monkeypatch.setattr(data, "Imagenette", archive("imagenette2-160"))
    monkeypatch.setattr(data, "download_url", download)
    with pytest.raises(UserError, match="run the command again"):  # one photo arrives damaged, and is not kept
        for seed in range(20):
            data.main(["--seed", str(seed)])
    assert not Path("originals/coco/train2017/train000000000001.jpg").exists()
    Path("originals/VOCdevkit/.extracted").unlink()  # as if the extraction had been interrupted
    with pytest.raises(UserError, match="may be incomplete"):
        data.main([])
    assert Path("originals/VOCdevkit/VOC2012").exists()


def test_shapes_are_reproducible_and_exclusive(shapes, tmp_path):
    data.draw_shapes(tmp_path / "again", COUNTS, size=64, seed=3)
    assert contents(tmp_path / "again") == contents(shapes)
    photos = [v for k, v in contents(shapes).items() if k.lower().endswith(("jpg", "jpeg"))]
    assert len(set(photos)) == len(photos) == 90


# --------------------------------------------------------------------------------------------- invariants: forgetting

def test_replay_buffer_size_cover_and_constancy(shapes):
    samples, model = MiniSet(shapes, "det", "train", 64), OneHead()
    for count in (3, 10):
        replay = forgetting.Replay(settings(replay_images=count))
        replay.remember("det", model, samples)
        images, target = replay.buffer["det"]
        assert len(images) == images.unique(dim=0).shape[0] == len(target["labels"]) == count
    everything = samples.batch[1]["labels"].unique().tolist()
    assert target["labels"].unique().tolist() == everything and everything[1:] == list(range(10))
    before = images.clone()
    replay.remember("cls", model, MiniSet(shapes, "cls", "train", 64))
    for _ in range(3):
        assert [(t, len(images), weight) for t, images, _, weight in replay.batches()] == [("det", 2, 1.0), ("cls", 2, 1.0)]
    assert replay.buffer["det"][0] is images and torch.equal(before, images)
    assert all((samples.batch[0] == image).flatten(1).all(1).any() for image in images)  # un-augmented
    only = forgetting.Replay(settings(replay_tasks=["seg"]))
    only.remember("det", model, samples)
    assert only.buffer == {} and only.batches() == []


def step_batches(shapes, task, n=4):
    return augment(*take(MiniSet(shapes, task, "train", 64).batch, slice(n)))


def trained(shapes, task="seg"):
    """A model after a stage, whose BatchNorm layers are fixed, as a remedy meets it."""
    model = train.new_model(settings())
    one_stage(model, task, shapes)
    model.fix_batchnorm()
    return model


def test_fisher_is_that_of_a_loop_over_single_images_and_the_penalty_that_of_a_known_displacement(shapes):
    model, samples = trained(shapes), MiniSet(shapes, "det", "train", 64)
    ewc, moved = forgetting.EWC(settings(ewc_lambda=[3.0, 5.0, 7.0])), list(dict(model.named_parameters())).index("head.0.bias")

    def pulled(progress=1.0):  # the penalty, and the gradient it adds to one that is there already
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.fpn.get_parameter("layer_blocks.0.0.bias").grad = None  # as of a stage that does not reach this layer
        penalty = torch.as_tensor(ewc.pull(model, progress)).item()
        assert penalty == 0 or all(p.grad is not None for p in model.parameters())
        return penalty, model.head[0].bias.grad - 1

    assert ewc.pull(model, 1) == 0
    ewc.remember("seg", model, MiniSet(shapes, "seg", "train", 64))
    assert pulled()[0] == 0  # at the anchor
    with torch.no_grad():
        model.head[0].bias += 0.1
    first, seg = ewc.terms["seg"], ewc.terms["seg"][0][moved] ** 2
    assert torch.cat([root.flatten() for root in first[0]]).square().mean().item() == pytest.approx(1, rel=1e-3)
    for ramp, share in ((False, 1), (True, 0.25)):
        ewc.args.ewc_ramp = ramp
        penalty, gradient = pulled(0.25)
        assert penalty == pytest.approx(share * 3 * seg.sum().item() * 0.1 ** 2 / 2, rel=1e-3) != 0
        torch.testing.assert_close(gradient, share * 3 * seg * 0.1, rtol=1e-3, atol=1e-6)
    ewc.args.ewc_ramp = False

    statistics_before = buffers(model)
    model.free_batchnorm()
    model.train()
    torch.manual_seed(5)
    ewc.remember("det", model, samples)  # in eval mode
    assert all(torch.equal(statistics_before[k], v) for k, v in model.named_buffers())
    torch.manual_seed(5)
    expected, model = [torch.zeros_like(p) for p in model.parameters()], model.eval()
    for i in range(len(samples)):
        images, target = augment(*take(samples.batch, slice(i, i + 1)))
        model.zero_grad()
        losses.det_loss(model(images)["det"], target, model.locations(images)).backward()
        expected = [e + (0 if p.grad is None else p.grad ** 2) / len(samples) for e, p in zip(expected, model.parameters())]
    mean = sum(e.sum() for e in expected) / sum(e.numel() for e in expected)
    expected = [e / mean for e in expected]  # so that a λ means as much for a task of large gradients as of small ones
    torch.testing.assert_close([root ** 2 for root in ewc.terms["det"][0]], expected, rtol=1e-3, atol=1e-6)
    det = expected[moved]
    assert sum(e.count_nonzero() for e in expected) > 100_000 and det.sum() > 0
    assert ewc.terms["seg"] is first and pulled()[0] == pytest.approx(5 * seg.sum().item() * 0.1 ** 2 / 2, rel=1e-3)
    with torch.no_grad():
        model.head[0].bias += 0.1  # 0.2 from the first anchor, 0.1 from the second
    penalty, gradient = pulled()
    assert penalty == pytest.approx((5 * seg * 0.2 ** 2 + 7 * det * 0.1 ** 2).sum().item() / 2, rel=1e-3)
    torch.testing.assert_close(gradient, 5 * seg * 0.2 + 7 * det * 0.1, rtol=1e-3, atol=1e-6)
    rows = ewc.terms["det"][0][list(dict(model.named_parameters())).index("head.2.weight")]
    assert rows[DET].any() and not rows[CLS].any() and not rows[SEG].any()
    frozen = [model.head[0].bias, model.features[0][0].weight]
    for p in frozen:
        p.requires_grad_(False)  # as `freeze` leaves it
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    learning = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_hand = sum(weight / 2 * (term[0][i] ** 2 * (p - term[1][i]) ** 2).sum() for i, p in zip(learning, parameters)
                  for weight, term in ((5, ewc.terms["seg"]), (7, ewc.terms["det"])))
    gradients = torch.autograd.grad(by_hand, parameters)
    assert sum((g.abs() > 1e-3).sum() for g in gradients) > 1000
    assert pulled()[0] == pytest.approx(by_hand.item(), rel=1e-4) and by_hand > 0
    unreached = model.fpn.get_parameter("layer_blocks.0.0.bias")  # its gradient began as None
    torch.testing.assert_close([p.grad - float(p is not unreached) for p in parameters], [*gradients], rtol=1e-3, atol=1e-6)
    assert all((p.grad == 1).all() for p in frozen)

    blind, empty = forgetting.EWC(settings()), MiniSet(shapes, "det", "train", 64)
    empty.batch[1]["labels"][:] = -1
    blind.remember("det", model, empty)
    assert not any(f.any() for f in blind.terms["det"][0])  # an image whose objects left the window tells nothing
    for p in frozen:
        p.requires_grad_(True)
    for lambdas, in_stage_2, in_stage_3, kept in (([0.0, 5.0, 7.0], False, True, {"seg", "det"}),
                                                 ([3.0, 0.0, 7.0], True, False, {"seg", "det"}),
                                                 ([0.0, 0.0, 7.0], False, False, {"det"})):  # never used: not computed
        ewc = forgetting.EWC(settings(ewc_lambda=lambdas))
        ewc.remember("seg", model, MiniSet(shapes, "seg", "train", 64))
        with torch.no_grad():
            model.head[0].bias += 0.1
        assert (pulled()[0] > 0) == in_stage_2
        ewc.remember("det", model, samples)
        assert (pulled()[0] > 0) == in_stage_3 and ewc.terms.keys() == kept


def test_distillation_is_zero_for_an_equal_student_and_reaches_neither_teacher_nor_new_rows(shapes):
    model = trained(shapes)
    lwf = forgetting.LwF(settings())
    images, _ = step_batches(shapes, "cls")
    assert lwf.output_loss(model, images, model(images)) == 0
    lwf.remember("seg", model, None)
    with torch.no_grad():
        model.head[0].weight.mul_(1.1)
    assert (lwf.outputs, lwf.tiled) == (("seg",), False)
    changed = {"seg": model(images, ("seg",), upsample=False)["seg"] + torch.randn(21, 1, 1)}
    once = lwf.output_loss(model, images, changed)
    lwf.args.lwf_weight = [5.0, 7.0, 11.0]  # Stage 2, Stage 3 twice
    torch.testing.assert_close(lwf.output_loss(model, images, changed), 5 * once)
    lwf.remember("det", model, None)  # the later model teaches both
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in lwf.teacher.state_dict().items())
    out = model(images, upsample=False)
    live = forgetting.LwF(settings(bn="live"))
    live.remember("det", model, None)
    assert (lwf.outputs, lwf.tiled, live.tiled) == (("seg", "det"), True, False)
    assert abs(lwf.output_loss(model, images, out).item()) < 1e-4
    before = {k: v.clone() for k, v in lwf.teacher.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    loss = lwf.output_loss(model, images, model(images, upsample=False))
    out, taught = model(images, upsample=False), lwf.teacher(images, upsample=False)
    by_hand = sum(w * lwf.distance(t, out[t], taught[t]) for w, t in ((7, "seg"), (11, "det")))
    torch.testing.assert_close(lwf.output_loss(model, images, out), by_hand)
    seen = forgetting.mosaics(images)
    of_mosaics = 2 * lwf.output_loss(model, seen, model(seen, upsample=False))
    assert lwf.steps == 0  # it counts the steps whose new images were only classified
    tiled = [lwf.output_loss(model, images, {"cls": out["cls"]}) for _ in range(3)]
    torch.testing.assert_close(tiled[0], of_mosaics)
    assert tiled[1] == 0 and tiled[2] == tiled[0] == of_mosaics
    tiled[0].backward()
    assert model.head[0].weight.grad.abs().max() > 0
    model.zero_grad()
    loss.backward()
    assert loss > 0.01 and model.head[0].weight.grad.abs().max() > 0
    rows = model.head[2].weight.grad
    assert rows[CLS].count_nonzero() == 0 and rows[SEG].count_nonzero() and rows[DET].count_nonzero()
    assert not lwf.teacher.training and all(p.grad is None for p in lwf.teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in lwf.teacher.state_dict().items())


@pytest.mark.parametrize("n", [8, 5, 1])
def test_mosaics_show_four_images_each_at_half_size(n):
    images = torch.rand(n, 3, 64, 96)
    tiled = forgetting.mosaics(images)
    assert tiled.shape == (-(-n // 4), 3, 64, 96)
    for k, (m, y, x) in enumerate(product(range(len(tiled)), (0, 32), (0, 48))):
        by_hand = images[k % n].reshape(3, 32, 2, 48, 2).mean((2, 4))
        torch.testing.assert_close(tiled[m, :, y:y + 32, x:x + 48], by_hand)


def test_divergences_by_hand():
    lwf = forgetting.LwF(settings(lwf_temperature=1.0))
    taught, now = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.5, 0.5]]).log()
    kl = 0.2 * np.log(0.2 / 0.5) + 0.8 * np.log(0.8 / 0.5)
    assert lwf.distance("seg", now[..., None, None], taught[..., None, None]).item() == pytest.approx(kl, rel=1e-5)
    # two cells, background with 0.2 and with 0.9, where the student doubts both: weights 1 + 4 · 0.8 and 1 + 4 · 0.1
    other = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    cells = torch.tensor([[[[0.2, 0.9]], [[0.8, 0.1]]]]).log()  # (1, 2, 1, 2)
    assert lwf.distance("seg", torch.zeros(1, 2, 1, 2), cells).item() == pytest.approx((4.2 * kl + 1.4 * other) / 5.6, rel=1e-5)
    lwf.args.lwf_temperature = 2.0
    soft = taught.div(2).softmax(1)[0]
    softened = lwf.distance("seg", now[..., None, None], taught[..., None, None]).item()
    assert softened == pytest.approx(4 * (soft * (2 * soft).log()).sum().item(), rel=1e-5)
    torch.manual_seed(0)
    now, taught = torch.randn(2, 2, 6, 15)  # of detection, cell by cell
    now[..., 2:4], taught[..., 2:4], total, confidences = 4, 4, 0, 0
    for a, b in zip(now.flatten(0, 1), taught.flatten(0, 1)):
        q, p = a[4].sigmoid(), b[4].sigmoid()
        kept = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        boxes = generalized_box_iou_loss(*(torch.cat([v[:2] - v[2:4] / 2, v[:2] + v[2:4] / 2]) for v in (a, b)))
        classes = 4 * F.kl_div((a[5:] / 2).log_softmax(0), (b[5:] / 2).softmax(0), reduction="sum")
        total, confidences = total + kept + p * (2 * boxes + classes), confidences + p
    assert confidences > 2
    torch.testing.assert_close(lwf.distance("det", now, taught), total / confidences, rtol=1e-4, atol=1e-5)
    cell = torch.tensor([8.0, 8, 4, 4, 20, *[0] * 10])  # confidence 1
    other = cell.clone()
    other[:2] = 10
    giou = generalized_box_iou_loss(torch.tensor([6.0, 6, 10, 10]), torch.tensor([8.0, 8, 12, 12]))
    assert lwf.distance("det", other.view(1, 1, 15), cell.view(1, 1, 15)).item() == pytest.approx(2 * giou.item(), rel=1e-4)
    doubt = cell.clone()
    doubt[4] = 0
    assert lwf.distance("det", doubt.view(1, 1, 15), cell.view(1, 1, 15)).item() == pytest.approx(np.log(2), rel=1e-4)


class Stub(forgetting.Remedy):
    """Adds known terms: classification images with weight 3, outputs and weights times constants."""

    outputs = ("seg",)

    def __init__(self, batch):
        super().__init__(None)
        self.batch = batch

    def batches(self):
        return [("cls", *self.batch, 3.0)]

    def output_loss(self, model, images, out):
        return out["seg"].square().mean() if "seg" in out else 0.0

    def pull(self, model, progress):
        weight = model.head[0].weight
        weight.grad += 2 * progress * weight.detach()
        return progress * weight.detach().square().sum()


@pytest.mark.parametrize("tiled", [False, True])
def test_a_step_follows_the_gradient_of_loss_and_all_penalties(shapes, tiled, monkeypatch):
    monkeypatch.setattr(Stub, "tiled", tiled)
    model, (images, target), (old, labels) = trained(shapes), step_batches(shapes, "det", 4), step_batches(shapes, "cls", 2)
    out, replayed = model(images, upsample=False), model(old, upsample=False)
    loss = losses.det_loss(out["det"], target, model.locations(images))
    penalty = 3 * F.cross_entropy(replayed["cls"], labels["labels"][:, 0]) + 0.25 * model.head[0].weight.square().sum()
    penalty = penalty + 2 / 6 * replayed["seg"].square().mean()
    if not tiled:  # else the new images' old outputs are not even computed
        penalty = penalty + 4 / 6 * out["seg"].square().mean()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss + penalty, parameters)
    before = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    found = train.train_step(model, "det", images, target, [Stub((old, labels))], torch.optim.SGD(parameters, 0.1), scaler, 0.25)
    torch.testing.assert_close(torch.stack(found), torch.stack([loss, penalty]).detach())
    for p, start, gradient in zip(parameters, before, gradients):
        torch.testing.assert_close(p.detach(), start - 0.1 * gradient, rtol=1e-4, atol=1e-5)


def test_the_pull_on_the_weights_is_not_scaled_with_the_gradients_of_half_precision(shapes):
    class Puller(forgetting.Remedy):
        pull = Stub.pull

    start, (images, target), moved = trained(shapes), step_batches(shapes, "det", 2), []
    for remedies in ([], [Puller(None)]):
        model = deepcopy(start)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        train.train_step(model, "det", images, target, remedies, torch.optim.SGD(model.parameters(), 0.1), scaler)
        moved.append(model.head[0].weight.detach())
    expected = -0.1 * 2 * start.head[0].weight.detach()
    torch.testing.assert_close(moved[1] - moved[0], expected, rtol=1e-4, atol=1e-6)


def test_a_step_with_every_remedy_does_not_wait_for_a_gpu(shapes):
    model, (images, target) = trained(shapes), step_batches(shapes, "cls")
    remedies = [forgetting.REMEDIES[name](settings()) for name in ("replay", "lwf", "ewc")]
    for remedy, task in product(remedies, ("seg", "det")):
        remedy.remember(task, model, MiniSet(shapes, task, "train", 64))
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    with Waits() as waits:
        train.train_step(model, "cls", images, target, remedies, torch.optim.SGD(model.parameters(), 0.01), scaler)
    assert waits.found == set()


@pytest.mark.parametrize("extent", ["trunk", "neck"])
def test_freeze_leaves_trunk_and_its_batchnorm_bit_identical(shapes, extent):
    model = train.new_model(settings())
    one_stage(model, "seg", shapes)  # its BatchNorm layers are live still
    forgetting.Freeze(settings(freeze=extent)).remember("seg", model, None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one_stage(model, "det", shapes)
    same = {k for k, v in model.state_dict().items() if torch.equal(before[k], v)}
    trunk, neck = ({k for k in before if k.startswith(part)} for part in ("features.", "fpn."))
    assert trunk <= same and any("running_mean" in k for k in trunk)
    assert (neck <= same) == (extent == "neck") and "head.0.weight" not in same


def test_joint_training_shows_every_task_as_often_as_its_stage(shapes):
    joint = forgetting.Joint(settings(batch_size=8, epochs=[40, 20, 15]))
    for task in ("det", "cls"):
        joint.remember(task, None, MiniSet(shapes, task, "train", 64))
    assert [(task, len(images), weight) for task, images, _, weight in joint.batches()] == [("det", 4, 1.0), ("cls", 3, 1.0)]
    assert all(len(images) == 20 for images, _ in joint.buffer.values())
    model = trained(shapes)
    before = model.head[2].weight.clone()
    one_stage(model, "seg", shapes, [joint])
    assert all(not torch.equal(before[rows], model.head[2].weight[rows]) for rows in (SEG, DET, CLS))


def test_slower_shared_layers_leave_the_output_layer_at_full_speed():
    model = OneHead()
    groups = train.make_optimizer(model, "det", settings(trunk_lr=[1.0, 0.2, 1.0]), 0.1)[0].param_groups
    rates = {id(p): g["share"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(1 if name.startswith("head.2") else 0.02 if name.startswith("feat") else 0.1)


# ------------------------------------------------------------------------------------------------------- whole runs

def test_a_run_writes_everything_and_eval_reproduces_it(shapes, finished, tmp_path, capsys):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"args", "data", "params", "latency_ms", "seconds", "device", "tasks", "metrics", "baseline", "matrix", "final",
            "map_50_95", "drop", "drop_own", "verdict", "history"} <= set(results)
    assert len(results["matrix"]) == 3 and set(results["seconds"]) == {"baselines", "stages", "total"}
    assert results["baseline"]["seg"] == results["matrix"][0]["seg"] and results["final"] == results["matrix"][2]
    assert [(h["stage"], h["task"]) for h in results["history"]] == [(1, "seg"), (2, "det"), (3, "cls")]
    measured = train.main(["--eval", str(out / "model.pt"), "--data", str(shapes), "--tasks", "all", "--device", "cpu"])
    assert {t: measured[t] for t in TASKS} == results["final"] and measured["map_50_95"] == results["map_50_95"]
    assert measured["n"] == {"seg": 10, "det": 10, "cls": 10} and json.loads((out / "eval.json").read_text()) == measured


def test_eval_maps_by_name_on_a_folder_with_val_alone(copy, finished, tmp_path, capsys):
    out, results = finished
    for folder in data.FOLDERS.values():
        shutil.rmtree(copy / folder / "train")
    shutil.rmtree(copy / "mini_voc_seg")
    gone = sorted(data.SHAPES)[0]  # without it every later folder has another position
    shutil.rmtree(copy / "imagenette_160/val" / gone)
    file = copy / "mini_coco_det/annotations/mini_instances_val2017.json"
    coco = json.loads(file.read_text())
    coco["categories"] = [{"id": c["id"] + 7, "name": c["name"]} for c in coco["categories"]][::-1] + [{"id": 1, "name": "x"}]
    for a in coco["annotations"]:
        a["category_id"] += 7
    coco["annotations"].append({**coco["annotations"][0], "id": 999, "category_id": 1})  # a class the model lacks
    file.write_text(json.dumps(coco))
    model = str(out / "model.pt")
    measured = train.main(["--eval", model, "--data", str(copy), "--out", str(tmp_path / "e.json"), "--device", "cpu"])
    assert measured["seg"] is None and measured["det"] == results["final"]["det"] and measured["n"] == {"det": 10, "cls": 9}
    assert "leaves out the det classes x" in capsys.readouterr().out
    net, size, classes = load_model(model)
    hits = 0
    for photo in (copy / "imagenette_160/val").glob("*/*"):
        x = normalise(pil_to_tensor(Image.open(photo).convert("RGB").resize((size, size), Image.BILINEAR))[None])
        hits += classes["cls"][net(x)["cls"].argmax()] == photo.parent.name
    assert measured["cls"] == hits / 9
    with pytest.raises(UserError, match="mini_voc_seg"):
        train.main(["--eval", model, "--data", str(copy), "--tasks", "seg"])


def test_benchmark_measures_and_writes(shapes, tmp_path, capsys, monkeypatch):
    def timed(calls, runs, device):
        [call() for call in calls.values()]
        return {name: [n, n, 4 * n] for n, name in enumerate(calls, 2)}  # whole 2, bare 3; OneHead 2, the others 3, 4, 5
    monkeypatch.setattr(metrics, "interleaved", timed)
    steps, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *given: steps.append(len(given[4])) or real(*given))
    out = tmp_path / "benchmark.json"
    result = train.main(flags(shapes, out, "--benchmark"))
    assert steps == [0, 0, 1, 1] * 3  # whole, bare, and two with the remedy
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert result["parameters"] == 1_606_606 and result["rivals_over_ours"] == [(3 + 4 + 5) / 2, (6 + 7 + 8) / 2]
    assert result["latency_ms"]["OneHead"] == {"p50": 2, "p95": pytest.approx(7.4)}
    assert result["training"]["det"].pop("remember_s") > 0
    assert result["training"]["det"] == {"images_per_s": 2000, "bare_images_per_s": pytest.approx(4000 / 3),
                                         "whole_over_bare": pytest.approx(2 / 3), "strategy_over_whole": 1}
    with pytest.raises(SystemExit):
        train.main(["--benchmark", "--eval", "x"])


def test_timing_takes_turns():
    order = []
    times = metrics.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert "".join(order) == "ab" * 5 and {k: len(v) for k, v in times.items()} == {"a": 2, "b": 2}


def test_stage_one_is_its_own_baseline(shapes, finished):
    args = settings(**{k: v for k, v in finished[1]["args"].items() if k != "out"})
    model, samples = train.new_model(args), MiniSet(shapes, "seg", "train", 64)
    train.train_stage(model, "seg", samples, [], args, metrics.Clock(1), "again")
    val = MiniSet(shapes, "seg", "val", 64)
    assert metrics.evaluate(model, {"seg": val}, "cpu")["seg"] == finished[1]["baseline"]["seg"]


def test_defaults_follow_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_shapes", lambda root: Path(root).mkdir(parents=True))
    args = vars(train.parse(["--device", "cpu"]))
    assert "SHAPES" in capsys.readouterr().out and args["data"] == train.SHAPES_DIR
    assert {k: args[k] for k in train.DEFAULTS["shapes"]} == train.DEFAULTS["shapes"]
    assert args["out"] == "runs/replay-seed0"
    for folder in data.FOLDERS.values():
        (tmp_path / "data" / folder).mkdir(parents=True)
    args = vars(train.parse(["--device", "cpu", "--lr", "0.5"]))
    assert args["data"] == "data" and args["lr"] == [0.5] * 3
    assert {k: args[k] for k in ("weights", "image_size", "batch_size", "trunk_lr")} == dict(
        weights="imagenet", image_size=320, batch_size=8, trunk_lr=[0.2, 0.2, 0.05])
    assert vars(train.parse(["--device", "cpu", "--data", "shapes"]))["data"] == train.SHAPES_DIR
    alone, together = ([5, 1, 1], [5, 5, 10], [1, 1, 1]), ([1, 0.3, 2], [0.5, 5, 10], [1, 2, 1])
    for strategy, expected in (("none", alone), ("lwf", alone), ("ewc", alone), ("lwf+replay+ewc", together)):
        args = train.parse(["--device", "cpu", "--strategy", strategy])
        assert (args.lwf_weight, args.ewc_lambda, args.shared_lr) == expected
    for scratch in (["--data", "shapes"], ["--weights", "none"]):  # from scratch the doubled rate diverges
        assert train.parse(["--device", "cpu", "--strategy", "ewc+lwf", *scratch]).shared_lr == [1, 1, 1]
    remedies = forgetting.build(train.parse("--device cpu --strategy freeze+ewc".split()))
    assert [type(remedy) for remedy in remedies] == [forgetting.EWC, forgetting.Freeze]  # whatever the order of the names
    args = train.parse("--device cpu --strategy ewc+lwf --lwf-weight 0 --ewc-lambda 0 --shared-lr 0".split())
    assert (args.lwf_weight, args.ewc_lambda, args.shared_lr) == ([0] * 3, [0] * 3, [1, 0, 0])  # Stage 1 is the baseline


def test_the_shared_layers_have_their_own_rate_in_each_later_stage(shapes, finished, monkeypatch):
    used, make = [], train.make_optimizer

    def record(model, task, args, shared_lr=1.0):
        used.append((task, shared_lr))
        optimizer, scaler = make(model, task, args, shared_lr)
        assert {g["share"] for g in optimizer.param_groups} == {1.0, shared_lr}
        return optimizer, scaler

    monkeypatch.setattr(train, "make_optimizer", record)
    train.main(flags(shapes, finished[0].parent / "rates", "--strategy", "none", "--shared-lr", "9", "2", "3"))
    assert used[-2:] == [("det", 2.0), ("cls", 3.0)] and {rate for _, rate in used[:-2]} == {1.0}


def test_same_seed_same_numbers_and_another_seed_others(shapes, finished, tmp_path):
    _, results = finished
    again = train.main(flags(shapes, tmp_path / "again"))
    for key in ("baseline", "matrix", "final", "map_50_95", "drop"):
        assert again[key] == results[key]
    assert train.main(flags(shapes, tmp_path / "other", "--seed", "1"))["history"][0]["loss"] != again["history"][0]["loss"]


@pytest.mark.parametrize("strategy, bn", [("none", "fixed"), ("none", "live"), ("replay", "live"), ("ewc", "fixed"),
                                          ("lwf", "fixed"), ("lwf", "live"), ("freeze", "live"), ("ewc+lwf", "fixed"),
                                          ("ewc+freeze+replay", "fixed"), ("joint", "fixed")])
def test_every_strategy_runs_and_shares_the_baselines(shapes, finished, strategy, bn, capsys):
    out = finished[0].parent / f"{strategy}-{bn}"
    results = train.main(flags(shapes, out, "--strategy", strategy, "--bn", bn))
    assert results["baseline"] == finished[1]["baseline"] and "baseline det epoch" not in capsys.readouterr().out
    penalties = [h["penalty"] for h in results["history"]]
    assert len(penalties) == len(results["matrix"]) == (1 if strategy == "joint" else 3)
    assert (penalties[0] > 0) == (strategy == "joint")
    assert all((p > 0) == (strategy not in ("none", "freeze")) for p in penalties[1:])
    assert results["verdict"] and all((results["continual"][k] is None) == (strategy == "joint") for k in ("BWT", "forgetting"))


def test_compare_prints_a_row_per_strategy(shapes, finished, tmp_path):
    second = tmp_path / "replay-seed1"
    train.main(flags(shapes, second, "--seed", "1"))
    lines = metrics.compare([finished[0], second, tmp_path / "nothing"]).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| replay | 2 |") and "±" in lines[2]
    third = tmp_path / "fewer"
    train.main(flags(shapes, third, "--replay-images", "3"))
    old = json.loads((second / "results.json").read_text())  # of a version that knew neither this flag nor that measure
    del old["args"]["shared_lr"], old["continual"]
    (second / "results.json").write_text(json.dumps(old | {"args": old["args"] | {"seed": 0}}))
    rows = [line.split(" |")[0] for line in metrics.compare([second, third]).splitlines()[2:]]
    assert rows == ["| replay, replay_images 10", "| replay, replay_images 3"]
    results, folders = finished[1], [tmp_path / str(i) for i in range(6)]
    chosen = (("none", 1.0), ("none", 2.0), ("none", 1.0), ("lwf", 2.0), ("replay+lwf", 1.0), ("joint", 1.0))
    for seed, (folder, (strategy, weight)) in enumerate(zip(folders, chosen)):
        final = results["baseline"] if seed else dict.fromkeys(results["final"], 0.0)
        metrics.write_json(folder / "results.json", results | {"final": final, "matrix": [final] * 3, "args": {
            **results["args"], **forgetting.preset(strategy, "none"), "strategy": strategy, "seed": seed,
            "lwf_weight": [weight] * 3}})
    rows = [[cell.strip() for cell in line.split("|")] for line in metrics.compare(folders).splitlines()[2:]]
    assert [row[1:3] for row in rows] == [["none", "3"], ["lwf, lwf_weight [2.0, 2.0, 2.0]", "1"],
                                         ["replay+lwf, lwf_weight [1.0, 1.0, 1.0]", "1"], ["joint", "1"]]
    metrics.write_json(tmp_path / "default" / "results.json", results | {"args": {
        **results["args"], "strategy": "lwf", **forgetting.preset("lwf", "none")}})
    lines = metrics.compare([*folders, tmp_path / "default"]).splitlines()
    assert sorted(line.split(" |")[0] for line in lines if line.startswith("| lwf")) == [
        "| lwf", "| lwf, lwf_weight [2.0, 2.0, 2.0]"]  # what is the strategy's default goes without saying
    learned = [results["baseline"][task] >= metrics.LEARNED[task] for task in data.TASKS]
    assert [row[7:18:5] for row in rows] == [[f"{2 * ok}/3" for ok in learned], *[[f"{int(ok)}/1" for ok in learned]] * 2, ["–"] * 3]
    assert rows[3][-2] == "–"
    metrics.write_json(tmp_path / "sampled/results.json", results | {"data": {"sha256": {"seg": "abcdefgh"}}})
    assert "replay, data ['abcdef']" in metrics.compare([finished[0], tmp_path / "sampled"])
    (second / "results.json").write_text(json.dumps(json.loads((finished[0] / "results.json").read_text()) | {"args": {
        **finished[1]["args"], "seed": 1}}))
    lines = metrics.compare([finished[0], second, third]).splitlines()
    assert [line.split(" |")[:2] for line in lines[2:]] == [["| replay, replay_images 10", " 2"],
                                                            ["| replay, replay_images 3", " 1"]]


def test_continual_measures_by_hand():
    results = {"baseline": {"seg": 0.5, "det": 0.2, "cls": 0.9}, "params": 10, "latency_ms": 10, "seconds": {"stages": 1},
               "matrix": [{"seg": 0.5, "det": 0.0, "cls": 0.1}, {"seg": 0.6, "det": 0.3, "cls": 0.1},
                          {"seg": 0.4, "det": 0.2, "cls": 0.9}]}
    results["final"] = results["matrix"][2]
    metrics.judge(results)
    assert results["continual"] == pytest.approx({"ACC": 0.5, "BWT": (-0.1 - 0.1) / 2, "forgetting": (0.2 + 0.1) / 2})
    results["matrix"] = results["matrix"][2:]
    metrics.judge(results)
    assert results["continual"] == {"ACC": pytest.approx(0.5), "BWT": None, "forgetting": None}
    assert results["own"] == results["final"]


def test_several_seeds_in_one_command(shapes, tmp_path, capsys):
    out = tmp_path / "some"
    results = train.main(flags(shapes, out, "--strategy", "none", "--seeds", "0", "1"))
    assert [(r["args"]["seed"], r["args"]["out"]) for r in results] == [(0, f"{out}-seed0"), (1, f"{out}-seed1")]
    assert results[0]["history"] != results[1]["history"]
    assert "| none | 2 |" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "some-seed1")
    assert train.main(flags(shapes, out, "--strategy", "none", "--seeds", "0", "1"))[1]["matrix"] == results[1]["matrix"]
    assert "seed 0" not in capsys.readouterr().out  # the finished one was left alone
    with pytest.raises(UserError, match="some-seed0: holds a run with another strategy, ewc_lambda, ewc_ramp;"):
        train.main(flags(shapes, out, "--strategy", "ewc", "--seeds", "2", "0"))
    shutil.copytree(shapes, tmp_path / "other")
    next((tmp_path / "other" / data.FOLDERS["seg"] / "val").glob("*.jpg")).write_bytes(b"changed")
    with pytest.raises(UserError, match="some-seed1: holds a run with another data;"):
        train.main(flags(tmp_path / "other", out, "--strategy", "none", "--seeds", "2", "1"))
    assert not (tmp_path / "some-seed2").exists()  # said before anything is trained
    assert len(train.main(flags(shapes, out, "--strategy", "none", "--seeds", "1", "1", "--lwf-weight", "7"))) == 1  # idle
    (tmp_path / "some-seed0/results.json").write_text('{"args"')
    with pytest.raises(UserError, match="some-seed0: holds no results.json of a finished run"):
        train.main(flags(shapes, out, "--strategy", "none", "--seeds", "0"))


def test_wrong_use_ends_in_one_sentence(shapes, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong, sentence in ((["--data", "nowhere"], "nowhere"), (["--strategy", "prayer"], "prayer"),
                            (["--strategy", "joint+ewc"], "joint"), (["--strategy", "ewc+ewc"], "repeated"),
                            (["--ewc-lambda", "1", "2"], "one value, or three, of at least 0"),
                            (["--lwf-weight", "1", "-2", "1"], "one value, or three, of at least 0"),
                            (["--lwf-temperature", "0"], "above 0"), (["--replay-weight", "-1"], "not be negative"),
                            (["--replay-images", "11"], "at most 10"), (["--epochs", "0"], "of at least 1"),
                            (["--shared-lr", "-1"], "--shared-lr"),
                            (["--image-size", "100"], "multiple of 32"), (["--batch-size", "0"], "at least 1"),
                            (["--out", str(finished[0])], "finished run"),
                            (["--weights", "none.pth"], "none.pth"), (["--device", "abacus"], "abacus"),
                            (["--out", __file__], "must be a folder"), (["--benchmark", "--out", __file__], "must be a .json"),
                            (["--benchmark", "--out", str(finished[0])], "must be a .json"), (["--lr", "1e9"], r"images .*jpg.*lower --lr")):
        with pytest.raises(UserError, match=sentence):
            train.main(flags(shapes, tmp_path / "out") + wrong)


def test_interrupt_keeps_what_is_finished(shapes, tmp_path, monkeypatch):
    real = train.train_stage

    def interrupted(model, task, samples, remedies, args, clock, title, *rest):
        if title.startswith("stage 3"):
            raise KeyboardInterrupt
        return real(model, task, samples, remedies, args, clock, title, *rest)
    monkeypatch.setattr(train, "train_stage", interrupted)
    with pytest.raises(UserError, match="model.pt"):
        train.main(flags(shapes, tmp_path / "run"))
    assert load_model(tmp_path / "run/model.pt") and len(list((tmp_path / ".baselines").glob("*.pt"))) == 3
    with pytest.raises(UserError, match="run-seed0/model.pt holds"):
        train.main(flags(shapes, tmp_path / "run", "--seeds", "0"))
    monkeypatch.undo()
    assert train.main(flags(shapes, tmp_path / "run"))["verdict"] is not None  # an unfinished folder may be taken again
