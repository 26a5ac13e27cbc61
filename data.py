"""The three mini-sets: loading them, augmenting batches, sampling photos, drawing shapes.

Conventions, from here to the end of the project:
  image   uint8 (3, H, W), RGB; float32, normalised by ImageNet's mean and deviation, where it
          enters the network
  mask    class index (H, W), uint8 in memory, int64 in a loss; 255 = ignore (outlines, padding)
  boxes   float32 (M, 4), absolute xyxy (left, top, right, bottom) in pixels of the *resized*
          image; COCO's xywh exists only in its files and at pycocotools
  labels  int64 class indices from 0, assigned by class *name*; -1 pads images with fewer boxes
  target  what a loss learns from: {"mask"}, {"boxes", "labels"} or {"labels"}
  truth   what a metric compares with, in pixels of the original photo
Images are resized to a square without keeping their aspect: pixels map back by two factors.
"""
import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from math import log
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torchvision.datasets.utils import download_url
from torchvision.transforms.functional import pil_to_tensor

TASKS = ("seg", "det", "cls")  # in the order of the stages
FOLDERS = {"seg": "mini_voc_seg", "det": "mini_coco_det", "cls": "imagenette_160"}
COUNTS = {"train": 240, "val": 60}  # images of each task
IGNORE, JPEG = 255, (".jpg", ".jpeg")
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()
VOC_PALETTE = [tuple(sum((i >> 3 * j + c & 1) << 7 - j for j in range(3)) for c in range(3))
               for i in range(256)]  # VOC's own: an index's bits go to red, green, blue in turn
VOC_COLOURS = {VOC_PALETTE[i]: i for i in (*range(1, 21), IGNORE)}
MASKS = "SegmentationClass"  # VOC's folder of them
COCO_CLASSES = "person bicycle car motorcycle bus truck cat dog chair tv".split()  # the ten sampled
ARCHIVES = {  # address: MD5
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar":
        "6cd6e144f989b92b3379bac3b3de84fd",
    "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz":
        "e793b78cc4c9e9a4ccc0c1155377a412",
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip":
        "f4bbac642086de4f52a3fdda2de5fa2c"}


class UserError(SystemExit):
    """A mistake of the user or in the data: one sentence on stderr, never a stack trace."""


def command(main):
    """Runs a program; what its user or the machine can mend ends in one sentence and status 2."""
    sys.stdout.reconfigure(errors="replace")  # not every console knows ± and ×
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows here at the latest
    except (UserError, OSError, KeyboardInterrupt) as e:
        print(str(e) or "\nInterrupted; a run goes on with the same command.", file=sys.stderr)
        if isinstance(e, OSError):  # perhaps of stdout itself, which Python would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


def write_whole(path, content):
    """Writes bytes; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # no other process writes that
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def try_folder(path):
    """Makes a folder and a file in it: what cannot be written shall fail before long work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise UserError(f"{path}: nothing can be written there ({e}); name another --out.")


# -- Reading files
def open_image(path):
    """A decoded PIL image, turned upright as its EXIF says. Raises UserError if the file is
    missing, truncated, no image, or of 16 bits, of which convert("RGB") would clip most."""
    try:
        image = Image.open(path)
        image.load()
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits a channel")
        return ImageOps.exif_transpose(image)
    except Exception as e:  # Pillow raises a dozen kinds for a damaged file
        raise UserError(f"{path}: not a readable image ({e}); replace it, or run data.py again.")


def read_mask(path):
    """The class indices 0-20 and 255 of a palette PNG -> (H, W) uint8. Raises UserError for other
    values or modes: convert("L") would turn the indices into the luminance of their colours."""
    mask = open_image(path)
    used = set(np.unique(mask).tolist())
    binary = IGNORE in used and used <= {0, IGNORE}  # everything would be ignored
    if mask.mode not in ("P", "L") or not used <= {*range(21), IGNORE} or binary:
        raise UserError(f"{path}: make it a palette PNG of 0-20 and 255, not of 0 and 255 alone.")
    palette = mask.getpalette() or []  # VOC's colours tell if an editor renumbered the classes
    if any(VOC_COLOURS.get(tuple(palette[3 * i:3 * i + 3]), i) != i for i in used):
        raise UserError(f"{path}: VOC's colours, but not its indices; save it with VOC's palette.")
    return np.array(mask)  # (H, W)


def read_coco(file, folder):
    """A COCO annotation file -> (category names, [(image path, record)]), sorted by image id.

    A record has the file's id, file_name, width and height, and "boxes": a list of {"name",
    "xyxy", "area", "iscrowd"}. Boxes are clipped to their image; those of which less than a pixel
    is left are skipped and named. Raises UserError, naming the entry that is wrong.
    """
    skipped, at = [], ""  # at: the annotation that is looked at
    try:
        coco = json.loads(file.read_text(encoding="utf-8-sig"))
        for kind, key in (("images", "id"), ("images", "file_name"), ("categories", "id"),
                          ("categories", "name"), ("annotations", "id")):
            count = Counter(entry[key] for entry in coco[kind])
            if len(count) < len(coco[kind]):
                raise ValueError(f"two {kind} have the {key} {count.most_common(1)[0][0]}")
        names = {category["id"]: str(category["name"]) for category in coco["categories"]}
        records = {record["id"]: {**record, "boxes": []} for record in coco["images"]}
        if not all(r["width"] > 0 and r["height"] > 0 for r in coco["images"]):
            raise ValueError("an image has no width or height")
        for a in coco["annotations"]:
            at = f"annotation {a['id']}: "
            if a["image_id"] not in records or a["category_id"] not in names:
                raise ValueError("its image or category is not listed")
            (x, y, w, h), area, crowd = a["bbox"], a.get("area", 0), a.get("iscrowd", 0)
            finite = [isinstance(v, (int, float)) and abs(v) < 1e10 for v in (x, y, w, h, area)]
            if not all(finite) or area < 0 or crowd not in (0, 1):  # NaN is not finite either
                raise ValueError("bbox and area must be numbers, and iscrowd 0 or 1")
            record = records[a["image_id"]]
            x1, x2 = max(x, 0), min(x + w, record["width"])
            y1, y2 = max(y, 0), min(y + h, record["height"])
            if min(x2 - x1, y2 - y1) > 0.99:  # a pixel, as rounded in files
                box = {"name": names[a["category_id"]], "xyxy": [x1, y1, x2, y2]}
                box |= {"area": float(a.get("area", w * h)), "iscrowd": int(crowd)}
                record["boxes"].append(box)
            else:
                skipped.append(a["id"])
        samples = [(folder / record["file_name"], record) for _, record in sorted(records.items())]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: no readable COCO annotations: {at}{type(e).__name__}: {e}; "
                        "correct it, or prepare it again.")
    if skipped:
        print(f"{file}: skipped {len(skipped)} boxes without a pixel inside, annotations {skipped}")
    return list(names.values()), samples


def write_coco(folder, split, records, names):
    """The annotation file of one split; `names` become its categories, with ids from 1."""
    annotations = []
    for record, box in ((r, box) for r in records for box in r["boxes"]):
        x1, y1, x2, y2 = box["xyxy"]
        xywh = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
        annotations.append({"id": len(annotations) + 1, "image_id": record["id"],
                            "category_id": 1 + names.index(box["name"]), "bbox": xywh,
                            "area": box["area"], "iscrowd": box["iscrowd"]})
    images = [{key: r[key] for key in ("id", "file_name", "width", "height")} for r in records]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    file = folder / "annotations" / f"mini_instances_{split}2017.json"
    write_whole(file, json.dumps(coco, separators=(",", ":")).encode())


def list_split(folder, task):
    """One split on disk -> (class names, [(image path, COCO record or None)]), sorted. Files that
    are left out are counted and named."""
    if task == "det":
        file = folder.parent / "annotations" / f"mini_instances_{folder.name}2017.json"
        names, samples = read_coco(file, folder)
    elif task == "seg":
        files = sorted(folder.glob("[!.]*"))
        names, samples = VOC_CLASSES, [(p, None) for p in files if p.suffix.lower() in JPEG]
    else:
        samples = [(path, None) for path in sorted(folder.glob("[!.]*/[!.]*"))]
        names = sorted({path.parent.name for path, _ in samples})
    used = {path.with_suffix("") for path, _ in samples}  # a mask has the name of its photo
    unused = [p for p in folder.rglob("[!.]*") if p.is_file() and p.with_suffix("") not in used]
    if unused:
        print(f"{folder}: leaves out {len(unused)} files that are no sample, as {unused[0].name}")
    return names, samples


# -- Loading
def load_seg(path, size):
    """A photo and the mask beside it -> (PIL image, {"mask": (size, size)}, truth: the mask)."""
    image, truth = open_image(path), read_mask(path.with_suffix(".png"))
    if truth.shape != (image.height, image.width):
        raise UserError(f"{path}: {image.size} pixels, its mask {truth.shape[::-1]}; replace one.")
    mask = Image.fromarray(truth).resize((size, size), Image.NEAREST)
    return image, {"mask": torch.from_numpy(np.array(mask))}, truth


def load_det(path, size, record, classes):
    """A photo and its record -> (PIL image, {"boxes": (M, 4), "labels": (M,)}, truth: the record
    with only the boxes of known classes, each with its "label"). The target ends with one box of
    padding, so that M is never 0."""
    image, annotated = open_image(path), (record["width"], record["height"])
    if image.size != annotated:
        raise UserError(f"{path}: {image.size} pixels, annotated as {annotated}; prepare it again.")
    known = [{**box, "label": classes.index(box["name"])} for box in record["boxes"]
             if box["name"] in classes]
    # A crowd's box encloses many objects: the metric ignores it, and nothing is learned from it
    learned = [box for box in known if not box["iscrowd"]]
    boxes = torch.tensor([*(box["xyxy"] for box in learned), [0] * 4], dtype=torch.float32)
    boxes = boxes * size / torch.tensor(2 * image.size)  # (M, 4)
    labels = torch.tensor([*(box["label"] for box in learned), -1])  # (M,)
    return image, {"boxes": boxes, "labels": labels}, {**record, "boxes": known}


class MiniSet:
    """One split of one task, decoded once and held in memory: 3·size² bytes an image.

    batch    (images (N, 3, size, size) uint8, target), where the target is {"mask": (N, size,
             size)}, {"boxes": (N, M, 4), "labels": (N, M)} or {"labels": (N, 1)}
    truth    one a photo, see `load_seg`, `load_det`; the label in classification
    classes  the names whose position is the index (default: the split's own), at most 10 in
             detection and classification; boxes and images of others are left out and named,
             and these names are in `unknown`
    """

    def __init__(self, root, task, split, size, classes=None):
        folder = Path(root) / FOLDERS[task] / split
        names, samples = list_split(folder, task)
        self.classes = list(classes or names)
        if task != "seg" and len(self.classes) > 10:
            raise UserError(f"{root}: {len(self.classes)} {task} classes; the head has 10.")
        self.unknown = [name for name in names if name not in self.classes]
        if self.unknown:
            print(f"{root}: leaves out the {task} classes {', '.join(self.unknown)}, not among "
                  f"{', '.join(self.classes)}")
        if task == "cls":
            samples = [(path, r) for path, r in samples if path.parent.name in self.classes]
        if not samples:
            raise UserError(f"{folder}: no images (of known classes); run `python data.py`, or "
                            "name another --data.")
        self.paths, self.truth, images, targets = [path for path, _ in samples], [], [], []
        for path, record in samples:
            if task == "seg":
                photo, target, truth = load_seg(path, size)
            elif task == "det":
                photo, target, truth = load_det(path, size, record, self.classes)
            else:
                photo, truth = open_image(path), self.classes.index(path.parent.name)
                target = {"labels": torch.tensor([truth])}
            square = photo.convert("RGB").resize((size, size), Image.BILINEAR)
            images.append(pil_to_tensor(square))  # (3, size, size)
            targets.append(target)
            self.truth.append(truth)
        padding = -1 if task == "det" else 0  # only boxes differ in number and are padded
        columns = {key: pad_sequence([target[key] for target in targets], True, padding)
                   for key in targets[0]}
        if task == "det" and not (columns["labels"] >= 0).any():
            raise UserError(f"{folder}: no box of a known class but crowds; name another --data.")
        self.batch = torch.stack(images), columns

    def __len__(self):
        return len(self.paths)

    def labels(self, i):
        """The class of every pixel, every box or the whole of image i, as a flat array."""
        target = self.batch[1]
        found = target.get("mask", target.get("labels"))[i].numpy()
        return found[(found >= 0) & (found != IGNORE)]


# -- Batches
def take(batch, index, device=None):
    """The samples at `index`, a slice or a tensor of positions, of (images, {name: column})."""
    images, target = batch
    return images[index].to(device), {key: c[index].to(device) for key, c in target.items()}


@cache
def imagenet(device):
    """ImageNet's mean and standard deviation for the values 0-255, each (3, 1, 1)."""
    mean, deviation = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, deviation)]


def normalise(images):
    """uint8 (B, 3, H, W) -> float32, normalised, in channels_last, which CPUs convolve fastest."""
    mean, deviation = imagenet(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(deviation)


def augment(images, target, zoom=(0.4, 1.2), aspect=1.3, colour=0.3, mask_stride=4):
    """Shows each image of a batch (B, 3, S, S) uint8 through a random window, mirrors about half of
    them, changes contrast, brightness and saturation -> (normalised images (B, 3, s, s), their
    target), where s is the mean of zoom times S.

    The window's side is zoom times S. Shown on s pixels, objects are on average as large as in a
    whole image, at two thirds of its cost. Masks are read at a quarter of the size: logits are
    coarser still, and the window moves in every epoch.
    """
    old_size, (mean, deviation) = images.shape[-1], imagenet(images.device)
    size = round(sum(zoom) / 2 * old_size)
    window = random_windows(len(images), zoom, aspect, images.device)
    x = look(images.to(torch.float32).sub_(mean), window, size, "bilinear")  # outside: mean colour
    x = change_colours(x, colour, deviation)
    if "mask" in target:
        mask = target["mask"][:, None].float() - IGNORE  # (B, 1, S, S), 0 = ignore, as outside
        mask = look(mask, window, size // mask_stride, "nearest")[:, 0] + IGNORE
        target = {"mask": mask.long()}  # (B, s/4, s/4)
    elif "boxes" in target:
        target = move_boxes(target, window, old_size, size)
    return x, target


def uniform(low, high, *shape, device):
    return torch.empty(*shape, device=device).uniform_(low, high)


def random_windows(n, zoom, aspect, device):
    """n windows -> (start, extent), each (n, 2) = x, y in units of the image: what lies at start +
    extent · t is shown at t in [0, 1]."""
    side = uniform(*zoom, n, 1, device=device)
    ratio = (uniform(-1, 1, n, 1, device=device) * log(aspect) / 2).exp()
    extent = torch.cat([side * ratio, side / ratio], 1)  # (n, 2)
    start = uniform(0, 1, n, 2, device=device) * (1 - extent)  # inside the image, or around it
    mirrored = uniform(0, 1, n, 1, device=device) < 0.5
    mirrored = F.pad(mirrored.float(), (0, 1))  # (n, 2): in x only
    return start + mirrored * extent, (1 - 2 * mirrored) * extent


def look(x, window, size, mode):
    """x (B, C, S, S) through its windows -> (B, C, size, size); 0 outside of the image."""
    start, extent = window
    t = (torch.arange(size, device=x.device) + 0.5) / size  # (size,) centres of the new pixels
    at = 2 * (start[..., None] + extent[..., None] * t) - 1  # (B, 2, size) in [-1, 1]
    columns = at[:, 0, None, :].expand(-1, size, -1)  # (B, size, size)
    rows = at[:, 1, :, None].expand(-1, -1, size)
    return F.grid_sample(x, torch.stack([columns, rows], 3), mode, align_corners=False)


def change_colours(x, strength, deviation):
    """Contrast, saturation and brightness of x (B, 3, S, S), which has mean 0, each by a random
    factor or shift of up to `strength`, and division by `deviation`: one matrix an image."""
    factors = uniform(1 - strength, 1 + strength, len(x), 2, 1, 1, device=x.device)
    contrast, saturation = factors.unbind(1)  # each (B, 1, 1)
    shift = uniform(-strength, strength, len(x), 1, 1, device=x.device)
    grey = torch.full((3, 3), 1 / 3, device=x.device)  # the matrix that removes all colour
    matrix = torch.lerp(grey, torch.eye(3, device=x.device), saturation)  # (B, 3, 3)
    matrix = contrast * matrix / deviation.view(3, 1)
    brightness = 100 * shift / deviation.view(3, 1)  # (B, 3, 1): at most 30 of 255
    x = torch.baddbmm(brightness, matrix, x.flatten(2)).view_as(x)
    return x.contiguous(memory_format=torch.channels_last)


def move_boxes(target, window, old_size, size):
    """Where windows show the boxes; label -1 if less than a fifth, or than 2 px a side, is seen."""
    start, extent = (v[:, None, None] for v in window)  # each (B, 1, 1, 2)
    corners = target["boxes"].unflatten(2, (2, 2)) / old_size  # (B, M, 2, 2)
    corners = (corners - start) / extent * size
    moved = torch.cat([corners.amin(2), corners.amax(2)], 2)  # (B, M, 4): mirrored, left is right
    boxes = moved.clamp(0, size)
    sides, whole = (b[..., 2:] - b[..., :2] for b in (boxes, moved))  # each (B, M, 2)
    seen = (sides.prod(2) > whole.prod(2) / 5) & (sides >= 2).all(2)  # (B, M)
    return {"boxes": boxes, "labels": torch.where(seen, target["labels"], -1)}


# -- Sampling photos
@contextmanager
def new_folder(path):
    """A temporary folder beside `path` that takes its place once the block is through. Nothing is
    replaced: raises UserError if by then, or before, more than an empty folder is there."""
    if os.path.ismount(path) or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path}: is there already; delete it, or name a new folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        try:
            if path.exists():
                path.rmdir()  # fails unless it is empty
            new.rename(path)
        except OSError as e:
            raise UserError(f"{path}: another process was faster ({e}).")


def cover(labels, rng):
    """Yields the names of {name: set of its classes} so that each next one adds to the class that
    came least so far: any first n cover rare classes as well as n allow. Of {a: {1}, b: {1}, c:
    {2}} c is among the first two."""
    left, count = sorted(labels), Counter()
    rng.shuffle(left)  # ties are broken at random
    while left:
        name = min(left, key=lambda name: min((count[c] for c in labels[name]), default=np.inf))
        left.remove(name)
        count.update(labels[name])
        yield name


def pool(originals, task, split):
    """The official split's candidates: {file name below the mini-set's split: (set of classes,
    image path, COCO record or None)}."""
    found = {}
    if task == "seg":
        voc = originals / "VOCdevkit" / "VOC2012"
        file = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        for name in file.read_text(encoding="utf-8-sig").split() if file.is_file() else []:
            try:
                classes = set(np.unique(read_mask(voc / MASKS / f"{name}.png")).tolist())
                path = voc / "JPEGImages" / f"{name}.jpg"
                found[path.name] = classes - {0, IGNORE}, path, None
            except UserError as e:
                print(f"skipped: {e}")
    elif task == "det":
        file = originals / "coco" / "annotations" / f"instances_{split}2017.json"
        for path, record in read_coco(file, originals / "coco" / f"{split}2017")[1]:
            record["file_name"] = path.name  # without folders, as it will be copied
            record["boxes"] = [box for box in record["boxes"] if box["name"] in COCO_CLASSES]
            classes = {box["name"] for box in record["boxes"] if not box["iscrowd"]}
            if classes:
                found[path.name] = classes, path, record
    else:
        for path in sorted((originals / "imagenette2-160" / split).glob("*/*.JPEG")):
            found[f"{path.parent.name}/{path.name}"] = {path.parent.name}, path, None
    return found


def fingerprint(path, record, taken):
    """The mean colours of an 8×8 grid: a content hash that survives renaming, scaling and JPEG.

    Raises UserError if the photo is unreadable, not of the size in its COCO record, or like one of
    the fingerprints `taken`. Of 1,191 photos no two differ by less than 12.6 grey levels; half-size
    copies of every fifth differ by 2.1 at most.
    """
    image = open_image(path).convert("RGB")
    if record and image.size != (record["width"], record["height"]):
        raise UserError(f"{path}: not of the annotated size.")
    grid = np.asarray(image.resize((8, 8), Image.BOX), np.int16)  # (8, 8, 3)
    if any(np.abs(grid - other).mean() < 5 for other in taken):
        raise UserError(f"{path}: looks like an image that is taken already.")
    return grid


def select(candidates, wanted, rng, taken, fetch):
    """Names of `wanted` candidates, sorted: sound photos unlike all `taken`, the classes covered.
    Others are skipped and named. fetch: download COCO's photos as they are needed."""
    names, labels = [], {name: classes for name, (classes, path, _) in candidates.items()
                         if fetch or path.is_file()}
    if len(labels) < len(candidates):
        print(f"skipped: {len(candidates) - len(labels)} photos that are not there")
    for name in cover(labels, rng):
        if len(names) == wanted:
            break
        _, path, record = candidates[name]
        if record and not path.is_file():
            fetch_image(record["coco_url"], path)
        try:
            taken.append(fingerprint(path, record, taken))
            names.append(name)
        except UserError as e:
            print(f"skipped: {e}")
    return sorted(names)


def prepare(root, originals, seed, fetch):
    """Writes the mini-sets to `root`, sampled from `originals`; UserError if too few are left."""
    rng, taken = random.Random(seed), []
    for task, (split, wanted) in product(TASKS, COUNTS.items()):
        candidates, folder = pool(originals, task, split), root / FOLDERS[task]
        names = select(candidates, wanted, rng, taken, fetch)
        if len(names) < wanted:
            raise UserError(f"{originals}: {len(names)} of {wanted} images for {folder.name} "
                            f"{split}; complete it.")
        for name in names:
            _, path, _ = candidates[name]
            target = folder / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if task == "seg":
                mask = path.parents[1] / MASKS / f"{path.stem}.png"
                shutil.copyfile(mask, target.with_suffix(".png"))
        if task == "det":
            write_coco(folder, split, [candidates[name][2] for name in names], COCO_CLASSES)
        MiniSet(root, task, split, 32)  # loads everything once, which checks it
        print(f"{folder.name} {split}: {wanted} images", flush=True)


def download_originals(root):
    """Fetches the archives of VOC 2012, Imagenette and COCO's annotations to `root`, checks and
    extracts them. Raises UserError; whole archives are kept for the next try."""
    try:
        for url, md5 in ARCHIVES.items():
            file = root / Path(url).name
            download_url(url, str(root), md5=md5)
            if file.suffix == ".zip":
                members = [f"annotations/instances_{split}2017.json" for split in COUNTS]
                zipfile.ZipFile(file).extractall(root / "coco", members)
            else:
                shutil.unpack_archive(file, root, filter="data")  # nothing outside of root
    except Exception as e:  # of the network, the disk, or one of a dozen kinds for bad archives
        raise UserError(f"The download failed ({e}); try again: whole archives are kept.")


def fetch_image(url, path):
    """Downloads one photo of COCO; the file appears only once it is whole. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            download_url(url, folder, path.name)
            open_image(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)
    except (UserError, Exception) as e:  # of the network or the disk
        raise UserError(f"{url}: the download failed ({e}); try again: whole photos are kept.")


# -- Drawing shapes
CORNERS = {"disc": 24, "triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
COLOURS = "red orange yellow lime green cyan azure blue violet pink".split()
SHAPES = [f"{colour}-{outline}" for colour, outline in zip(COLOURS, 2 * [*CORNERS])]


def write_shapes(root, counts=COUNTS, size=96, seed=0):
    """Writes three mini-sets of drawn shapes in the layout of the photos. A class has its hue and
    outline; size, turn, brightness and overlap vary. `root` appears whole or not at all; if it is
    there by then, another process drew the same."""
    rng = np.random.default_rng(seed)
    with suppress(UserError), new_folder(Path(root)) as new:
        for task, (split, n) in product(TASKS, counts.items()):
            folder, records = new / FOLDERS[task] / split, []
            for i in range(n):
                main, others, radii = i % 10, [], (0.25, 0.45)  # every class is main equally often
                if task != "cls":
                    others, radii = rng.integers(0, 10, i % 4), (0.13, 0.28)
                image, mask, boxes = paint_picture(rng, [main, *others], size, radii)
                name = f"{SHAPES[main]}/{i:04}.JPEG" if task == "cls" else f"{i:04}.jpg"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / name, quality=95)
                if task == "seg":
                    mask.save((folder / name).with_suffix(".png"))
                records.append({"id": i + 1, "file_name": name, "width": size, "height": size,
                                "boxes": boxes})
            if task == "det":
                write_coco(folder.parent, split, records, SHAPES)


def paint_picture(rng, classes, size, radii):
    """One picture -> (RGB image, palette mask of class + 1, boxes as in `read_coco`)."""
    noise = Image.fromarray(rng.integers(60, 190, (7, 7, 3), np.uint8)).resize((size, size))
    noise = np.asarray(noise, float)  # (size, size, 3)
    canvas = 0.3 * noise + 0.7 * noise.mean(2, keepdims=True)  # muted colours
    owner = np.zeros((size, size), np.uint8)  # the shape on top of each pixel, from 1; 0 = none
    for k, c in enumerate(classes, 1):
        radius = rng.uniform(*radii) * size
        hue = int(25.6 * c + rng.uniform(-6, 6)) % 256
        colour = hue, int(rng.uniform(130, 220)), int(rng.uniform(140, 240))
        colour = Image.new("HSV", (1, 1), colour).convert("RGB").getpixel((0, 0))
        stencil, centre = Image.new("L", (size, size)), rng.uniform(radius, size - radius, 2)
        corners = [*CORNERS.values()][c % 5]
        ImageDraw.Draw(stencil).regular_polygon((*centre, radius), corners, rng.uniform(0, 360),
                                                fill=255)
        inside = np.asarray(stencil) > 0
        canvas[inside], owner[inside] = colour, k
    canvas += rng.normal(0, 12, (size, size, 1))  # grain
    boxes = []
    for k, c in enumerate(classes, 1):
        y, x = (owner == k).nonzero()
        if len(x) > 40:  # a shape that is all but hidden has no box
            box = [int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
            boxes.append({"name": SHAPES[c], "xyxy": box, "area": len(x), "iscrowd": 0})
    mask = Image.fromarray(np.array([0, *(c + 1 for c in classes)], np.uint8)[owner])
    mask.putpalette([25 * index % 256 for index in range(256) for _ in "RGB"])
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), mask, boxes


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepares the mini-sets: 240 + 60 photos a task.")
    add = parser.add_argument
    add("--originals", help="sample from extracted originals in this folder, without any network")
    add("--out", default="data", help="folder to write (default: %(default)s)")
    add("--seed", type=int, default=0, help="fixes the draw (default: %(default)s)")
    args = parser.parse_args(argv)
    originals = Path(args.originals or "originals")
    with new_folder(Path(args.out).resolve()) as root:  # entered before anything is downloaded
        if not args.originals:
            download_originals(originals)
        prepare(root, originals, args.seed, fetch=not args.originals)
    print(f"Wrote {args.out}. The originals in {originals} are no longer needed.")


if __name__ == "__main__":
    command(main)
