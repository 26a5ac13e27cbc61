"""The three mini-sets: sampling them from the originals, drawing them as shapes, and loading them.

Conventions, from here to the end of the project:
  image   uint8 (3, H, W), RGB; float32 and normalised by ImageNet's mean and deviation where it enters the network
  mask    class index (H, W), uint8 in memory and int64 in a loss; 255 = ignore (void outlines, padding)
  boxes   float32 (M, 4), absolute xyxy in pixels of the *resized* image; COCO's xywh exists only in the files
  labels  int64 class indices from 0, assigned by class *name*; in a batch, -1 pads images with fewer boxes
Images are resized to a square without keeping their aspect, so pixels map back by two plain factors.
"""
import argparse
import json
import random
import shutil
import zipfile
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.utils.rnn import pad_sequence
from torchvision.datasets import Imagenette, VOCSegmentation
from torchvision.datasets.utils import download_url
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

TASKS = ("seg", "det", "cls")  # in the order of the stages
FOLDERS = {"seg": "mini_voc_seg", "det": "mini_coco_det", "cls": "imagenette_160"}
COUNTS = {"train": 240, "val": 60}  # images of each task
IGNORE = 255
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()  # an index of a mask is a position here
SAMPLED_CLASSES = "person bicycle car motorcycle bus truck cat dog chair tv".split()  # used by the sampling alone
COCO_ANNOTATIONS = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"


class UserError(SystemExit):
    """A mistake of the user or in the data: one sentence on stderr and exit status 1, never a stack trace."""


def read_image(path, mask=False):
    """A decoded PIL image: a photo in RGB, or a palette mask with the *indices* 0-20 and 255, which convert("L") would
    turn into luminance. Raises UserError if the file is missing, truncated, no image, or a mask of anything else."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: not a readable image ({e}); replace it, or prepare the data again.")
    if not mask:
        return image.convert("RGB")
    if image.mode not in ("P", "L") or not set(np.unique(image)) <= {*range(21), IGNORE}:
        raise UserError(f"{path}: a mask must be a palette PNG with the values 0-20 and 255 only.")
    return image


def list_split(root, task, split):
    """One split on disk -> (class names, [(image path, target)]), sorted. The target is the mask's path (seg), the
    image's record (det, see `list_coco`) or the class name (cls). Raises UserError if there is none."""
    folder, names = Path(root) / FOLDERS[task] / split, VOC_CLASSES
    if task == "seg":
        samples = [(p, p.with_suffix(".png")) for p in sorted(folder.glob("*.jpg"))]
    elif task == "det":
        names, samples = list_coco(folder.parent / "annotations" / f"mini_instances_{split}2017.json", folder)
    else:
        samples = [(p, p.parent.name) for p in sorted(folder.glob("[!.]*/[!.]*"))]
        names = list(dict.fromkeys(name for _, name in samples))
    if not samples:
        raise UserError(f"{folder}: no images; prepare them with `python data.py`, or name another --data folder.")
    return names, samples


def list_coco(file, folder):
    """A COCO annotation file -> (category names, [(image path, its record with "boxes" [(name, annotation)])]). Boxes
    are clipped to their image; what has no width or height then is skipped and counted."""
    try:
        coco, skipped = json.loads(file.read_text()), 0
        names = {c["id"]: c["name"] for c in coco["categories"]}
        images = {i["id"]: {**i, "boxes": []} for i in sorted(coco["images"], key=lambda i: i["id"])}
        for a in coco["annotations"]:
            image, (x, y, w, h) = images[a["image_id"]], a["bbox"]
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, image["width"]), min(y + h, image["height"])
            if not (x2 > x1 and y2 > y1):
                skipped += 1
                continue
            box = {"bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)], "area": a.get("area", w * h)}
            image["boxes"].append((names[a["category_id"]], {**box, "iscrowd": a.get("iscrowd", 0)}))
        samples = [(folder / i["file_name"], i) for i in images.values() if i["width"] and i["height"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not a readable COCO annotation file ({type(e).__name__}: {e}); prepare it again.")
    if skipped:
        print(f"{file}: skipped {skipped} boxes without width or height inside their image")
    return list(names.values()), samples


class MiniSet:
    """One split of one task, decoded once and held in memory. `batch` = (images (N, 3, size, size) uint8, target), and
    the target is {"mask": (N, size, size) uint8} for seg, {"boxes": (N, M, 4), "labels": (N, M)} for det, padded with
    labels of -1, or {"labels": (N, 1)} for cls.

    Memory: 3·size² bytes an image, 0.7 GB for all 900 at 512 px. `classes`: the names whose position is the index, at
    most 10 (default: the split's own); others raise UserError, or are left out and named if skip_unknown. `truth` is
    what the metrics compare with at the original resolution: masks (seg), image records with annotations (det)."""
    def __init__(self, root, task, split, size, classes=None, skip_unknown=False):
        names, samples = list_split(root, task, split)
        self.classes, self.truth = list(classes or names), []
        if task != "seg" and len(self.classes) > 10:
            raise UserError(f"{root}: {len(self.classes)} {task} classes, but the head has 10; keep at most 10.")
        if unknown := ", ".join(name for name in names if name not in self.classes):
            if not skip_unknown:
                raise UserError(f"{root}: unknown {task} classes {unknown}; known are {', '.join(self.classes)}.")
            print(f"{root}: leaves out the {task} classes {unknown}, which this model does not know")
            if not (samples := [(path, t) for path, t in samples if task == "det" or t in self.classes]):
                raise UserError(f"{root}: no {task} image of a known class; known are {', '.join(self.classes)}.")
        self.paths, images, targets = [path for path, _ in samples], [], []
        for path, target in samples:
            image = read_image(path)
            if task == "seg":
                mask = read_image(target, mask=True)
                if mask.size != image.size:
                    raise UserError(f"{target}: {mask.size} pixels, but its photo {image.size}; replace one of them.")
                self.truth.append(np.array(mask))  # (original H, W)
                targets.append({"mask": torch.tensor(np.array(mask.resize((size, size), Image.NEAREST)))})
            elif task == "det":
                if (target["width"], target["height"]) != image.size:
                    raise UserError(f"{path}: {image.size} pixels, not as annotated; prepare it again.")
                annotations = [{"category_id": self.classes.index(name), **a} for name, a in target["boxes"]
                               if name in self.classes]
                self.truth.append({**target, "annotations": annotations})
                # a crowd's box encloses many objects: a truth for COCOeval to ignore, not one to learn
                known = [a for a in annotations if not a["iscrowd"]]
                boxes = torch.tensor([*(a["bbox"] for a in known), [0] * 4]) * size / torch.tensor(2 * image.size)
                targets.append({"boxes": box_convert(boxes, "xywh", "xyxy"),  # one row of padding: M is never 0
                                "labels": torch.tensor([*(a["category_id"] for a in known), -1])})
            else:
                targets.append({"labels": torch.tensor([self.classes.index(target)])})
            images.append(pil_to_tensor(image.resize((size, size), Image.BILINEAR)))  # (3, size, size)
        columns = {key: [t[key] for t in targets] for key in targets[0]}
        self.batch = torch.stack(images), {key: pad_sequence(column, True, -1) if task == "det" else torch.stack(column)
                                           for key, column in columns.items()}

    def __len__(self):
        return len(self.paths)

    def labels(self, i):
        """The class of every pixel, every box or the whole of image i, as a flat array."""
        found = next(reversed(self.batch[1].values()))[i].numpy()  # mask or labels
        return found[(found >= 0) & (found != IGNORE)]


def draw(labels, rng):
    """Yields the names of labels {name: set of its classes} in an order in which each next one adds to the class that
    came least so far: the first n are a sample that covers rare classes as well as n allows."""
    left, count = sorted(labels), Counter()
    rng.shuffle(left)
    while left:
        name = min(left, key=lambda name: min((count[c] for c in labels[name]), default=np.inf))  # ties: at random
        left.remove(name)
        count.update(labels[name])
        yield name


def pool(originals, task, split):
    """The official split's candidates: {name: (set of classes, image path, mask path or COCO record)}."""
    if task == "cls":
        files = sorted((originals / "imagenette2-160" / split).glob("*/*.JPEG"))
        return {f"{p.parent.name}/{p.name}": ({p.parent.name}, p, None) for p in files}
    if task == "det":
        coco, found = originals / "coco", {}
        for path, record in list_coco(coco / "annotations" / f"instances_{split}2017.json", coco / f"{split}2017")[1]:
            record["boxes"] = [(n, a) for n, a in record["boxes"] if n in SAMPLED_CLASSES]
            if classes := {n for n, a in record["boxes"] if not a["iscrowd"]}:
                found[path.name] = classes, path, record
        return found
    voc, found = originals / "VOCdevkit" / "VOC2012", {}
    file = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    for name in file.read_text().split() if file.is_file() else []:
        mask = voc / "SegmentationClass" / f"{name}.png"
        classes = set(np.unique(read_image(mask, mask=True)).tolist()) - {0, IGNORE}
        found[name] = classes, voc / "JPEGImages" / f"{name}.jpg", mask
    return found


def prepare(out, originals, seed=0, sample=None, fetch=False):
    """Writes the three mini-sets and sample.json to `out`, drawn from `originals` or exactly those of `sample`. An
    image that is missing, damaged, not of its annotated size, or like one already taken by any task or split is skipped
    and named. fetch: download COCO's images as they are drawn. Raises UserError if too few are left."""
    out, originals, known = Path(out).resolve(), Path(originals), {*FOLDERS.values(), "sample.json"}
    if out.exists() and not (out / "sample.json").is_file() or {p.name for p in out.glob("*")} - known:
        raise UserError(f"{out}: holds what data.py did not write; move that away or choose another --out.")
    shutil.rmtree(part := out.with_name(out.name + ".part"), ignore_errors=True)
    rng, taken, chosen = random.Random(seed), [], {FOLDERS[task]: {} for task in TASKS}
    for task, split in product(TASKS, COUNTS):
        found, folder, names = pool(originals, task, split), part / FOLDERS[task], []
        order = sample[task, split] if sample else draw({name: c[0] for name, c in found.items()}, rng)
        wanted = len(order) if sample else COUNTS[split]
        for name in order:
            if len(names) == wanted:
                break
            _, path, extra = found.get(name, (None, originals / name, None))
            if fetch and task == "det" and extra and not path.is_file():
                fetch_image(extra["coco_url"], path)
            try:
                image = read_image(path)
                if task == "det" and image.size != (extra["width"], extra["height"]):
                    raise UserError(f"{path}: not of the annotated size.")
                # A content hash that survives renaming, rescaling and JPEG: the mean colours of an 8×8 grid. Of 1,191
                # photos no two differ by less than 12.6 grey levels; half-size copies of every fifth by 2.1 at most.
                mark = np.asarray(image.resize((8, 8), Image.BOX), np.int16)
                if any(np.abs(mark - other).mean() < 5 for other in taken):
                    raise UserError(f"{path}: looks like an image that is taken already.")
            except UserError as e:
                print(f"skipped: {e}")
                continue
            target = folder / split / (name if task == "cls" else path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if task == "seg":
                shutil.copyfile(extra, target.with_suffix(".png"))
            names.append(name)
            taken.append(mark)
            if len(names) % 60 == 0:
                print(f"{FOLDERS[task]} {split}: {len(names)} of {wanted} images", flush=True)
        if len(names) < wanted or not names:
            raise UserError(f"{originals}: {len(names)} of {wanted} images for {folder.name} {split}; complete it.")
        chosen[FOLDERS[task]][split] = sorted(names)
        if task == "det":
            write_coco(folder, split, [found[name][2] for name in sorted(names)], SAMPLED_CLASSES)
    (part / "sample.json").write_text(json.dumps(chosen, indent=1))
    report(part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def write_coco(folder, split, records, names):
    """The annotation file of one split, with the same categories (ids from 1, in the order of `names`) in each."""
    boxes = [{"image_id": r["id"], "category_id": 1 + names.index(n), **a} for r in records for n, a in r["boxes"]]
    coco = {"images": [{key: r[key] for key in ("id", "file_name", "width", "height")} for r in records],
            "annotations": [{"id": i, **box} for i, box in enumerate(boxes, 1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)]}
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"mini_instances_{split}2017.json").write_text(json.dumps(coco, separators=(",", ":")))


def report(root):
    """Loads everything once, which checks it, and prints images, and boxes or pixels per class. Raises UserError."""
    for task, unit in zip(TASKS, ("% of pixels", "boxes", "images")):
        train = MiniSet(root, task, "train", 64)
        sets = train, MiniSet(root, task, "val", 64, train.classes)
        print(f"\n{FOLDERS[task]}: {len(train)} train, {len(sets[1])} val images; {unit} per class:")
        found = [np.concatenate([s.labels(i) for i in range(len(s))]) for s in sets]
        for c, name in enumerate(train.classes):
            print(f"  {name:16}", *(f"{100 * (f == c).mean() if task == 'seg' else sum(f == c):8.4g}" for f in found))
    print(f"{sum(p.stat().st_size for p in Path(root).rglob('*')) / 1e6:.0f} MB of the 120 MB allowed")


def download_originals(root):
    """Fetches VOC 2012 and Imagenette (torchvision's archives, MD5-checked) and COCO's annotations to `root`."""
    try:
        for name, get in (("VOCdevkit", lambda: VOCSegmentation(root, "2012", "trainval", download=True)),
                          ("imagenette2-160", lambda: Imagenette(root, "train", "160px", download=True))):
            if not (root / name / ".extracted").exists():  # the marker of an extraction that was not interrupted
                if (root / name).exists():
                    raise UserError(f"{root / name} may be incomplete: delete it, or try --originals {root}.")
                get()
                (root / name / ".extracted").touch()
        download_url(COCO_ANNOTATIONS, str(root / "coco"), md5="f4bbac642086de4f52a3fdda2de5fa2c")
        with zipfile.ZipFile(root / "coco" / COCO_ANNOTATIONS.rsplit("/", 1)[1]) as archive:
            if broken := archive.testzip():
                raise RuntimeError(f"{broken} in {archive.filename} is damaged, delete that file")
            archive.extractall(root / "coco", [f"annotations/instances_{split}2017.json" for split in COUNTS])
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"Downloading the originals failed ({e}); run the command again: whole archives are kept.")


def fetch_image(url, path):
    """Downloads one image of COCO; the file appears only once it is whole. Raises UserError."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        download_url(url, str(part.parent), part.name)
        read_image(part)
        part.rename(path)
    except (UserError, OSError) as e:
        raise UserError(f"{url}: the download failed ({e}); run the command again: the images fetched so far are kept.")


CORNERS = {"disc": 24, "triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
COLOURS = "red orange yellow lime green cyan azure blue violet pink".split()
SHAPES = [f"{colour}-{outline}" for colour, outline in zip(COLOURS, 2 * [*CORNERS])]


def draw_shapes(root, counts=COUNTS, size=96, seed=0):
    """Writes three mini-sets of drawn shapes in the layout of the photos. A class has its hue and outline; size, turn,
    brightness and overlap vary. `root` appears whole or not at all."""
    shutil.rmtree(part := Path(f"{root}.part"), ignore_errors=True)
    rng = np.random.default_rng(seed)
    for task, (split, n) in product(TASKS, counts.items()):
        folder, records = part / FOLDERS[task] / split, []
        for i in range(n):
            main = i % 10  # every class is the main one equally often
            others, radii = ([], (0.25, 0.45)) if task == "cls" else (rng.integers(0, 10, i % 4), (0.13, 0.28))
            image, mask, boxes = paint_shapes(rng, [main, *others], size, radii)
            file = folder / SHAPES[main] / f"{i:04}.JPEG" if task == "cls" else folder / f"{i:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, quality=95)
            if task == "seg":
                mask.save(file.with_suffix(".png"))
            records.append({"id": i + 1, "file_name": file.name, "width": size, "height": size, "boxes": boxes})
        if task == "det":
            write_coco(folder.parent, split, records, SHAPES)
    part.rename(root)


def paint_shapes(rng, classes, size, radii):
    """One picture -> (RGB image, palette mask of class + 1, [(name, COCO annotation)] of what is visible)."""
    noise = np.asarray(Image.fromarray(rng.integers(60, 190, (7, 7, 3), np.uint8)).resize((size, size)), float)
    canvas = 0.3 * noise + 0.7 * noise.mean(2, keepdims=True)  # muted colours
    owner = np.zeros((size, size), np.uint8)  # the shape on top of each pixel, counted from 1; 0 is background
    for k, c in enumerate(classes, 1):
        radius, hue = rng.uniform(*radii) * size, int(25.6 * c + rng.uniform(-6, 6)) % 256
        colour = Image.new("HSV", (1, 1), (hue, int(rng.uniform(130, 220)), int(rng.uniform(140, 240)))).convert("RGB")
        stencil = Image.new("L", (size, size))
        ImageDraw.Draw(stencil).regular_polygon((*rng.uniform(radius, size - radius, 2), radius),
                                                [*CORNERS.values()][c % 5], rng.uniform(0, 360), fill=255)
        canvas[np.asarray(stencil) > 0], owner[np.asarray(stencil) > 0] = colour.getpixel((0, 0)), k
    canvas += rng.normal(0, 12, (size, size, 1))  # grain
    boxes = []
    for k, c in enumerate(classes, 1):
        y, x = (owner == k).nonzero()
        if len(x) > 40:  # a shape that is all but hidden has no box
            box = [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]
            boxes.append((SHAPES[c], {"bbox": box, "area": len(x), "iscrowd": 0}))
    mask = Image.fromarray(np.array([0, *(c + 1 for c in classes)], np.uint8)[owner])
    mask.putpalette([25 * index % 256 for index in range(256) for _ in "RGB"])
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), mask, boxes


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepares the three mini-sets: 240 train and 60 val photos per task.")
    parser.add_argument("--originals", help="sample from extracted originals in this folder, without any network")
    parser.add_argument("--out", default="data", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the draw (default: %(default)s)")
    parser.add_argument("--sample", help="a sample.json: take exactly the files named there instead of drawing")
    args = parser.parse_args(argv)
    try:
        sample = args.sample and {(task, split): json.loads(Path(args.sample).read_text())[FOLDERS[task]][split]
                                  for task, split in product(TASKS, COUNTS)}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--sample {args.sample}: not a readable sample.json ({type(e).__name__}: {e}).")
    originals = Path(args.originals or "originals")
    if not args.originals:
        download_originals(originals)
    prepare(args.out, originals, args.seed, sample, fetch=not args.originals)
    print(f"Wrote {args.out}. The originals lie in {originals} and are no longer needed: you may delete them.")


if __name__ == "__main__":
    main()
