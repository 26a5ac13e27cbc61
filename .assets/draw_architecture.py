"""Draws architecture.png, the picture of the network in the README.

    python .assets/draw_architecture.py
"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SEG, DET, CLS, SHARED, INK = "#0072B2", "#D55E00", "#009E73", "#E8E8E8", "#222222"
SCALE = 2  # drawn twice as large as shown, for screens with many pixels


def main():
    image = Image.new("RGB", (1000 * SCALE, 400 * SCALE), "white")
    draw = ImageDraw.Draw(image)

    def text(x, y, words, size=15, fill=INK, anchor="mm"):
        font = ImageFont.load_default(size * SCALE)
        draw.multiline_text((x * SCALE, y * SCALE), words, fill, font, anchor, align="center")

    def box(left, top, right, bottom, fill, words="", ink=INK):
        corners = [side * SCALE for side in (left, top, right, bottom)]
        draw.rounded_rectangle(corners, 6 * SCALE, fill, INK, SCALE)
        text((left + right) / 2, (top + bottom) / 2, words, fill=ink)

    def arrow(x1, y1, x2, y2):
        """Its tip points right or, where the line is vertical, up or down."""
        draw.line([x1 * SCALE, y1 * SCALE, x2 * SCALE, y2 * SCALE], INK, 2 * SCALE)
        tip = [(x2, y2), (x2 - 9, y2 - 5), (x2 - 9, y2 + 5)]
        if x1 == x2:
            back = y2 - 9 if y2 > y1 else y2 + 9
            tip = [(x2, y2), (x2 - 5, back), (x2 + 5, back)]
        draw.polygon([(x * SCALE, y * SCALE) for x, y in tip], INK)

    # Backbone: three tapped maps, each half as large as the one before
    box(15, 150, 95, 230, SHARED, "image\nH x W")
    arrow(95, 190, 130, 190)
    box(130, 55, 310, 330, "white")
    text(220, 35, "backbone: MobileNetV3-Small", 16)
    levels = (("24 channels\nH/8", 90), ("48 channels\nH/16", 190), ("576 channels\nH/32", 290))
    for words, y in levels:
        box(150, y - 28, 290, y + 28, SHARED, words)
    arrow(220, 118, 220, 162)
    arrow(220, 218, 220, 262)

    # Neck: one level of 128 channels for each map; coarse ones are added to finer ones
    box(360, 55, 500, 330, "white")
    text(430, 35, "neck: FPN", 16)
    for _, y in levels:
        arrow(290, y, 380, y)
        box(380, y - 28, 480, y + 28, SHARED, "128")
    for y in (118, 218):
        arrow(430, y + 44, 430, y)
        text(443, y + 22, "+")

    # Head: the same two layers for every level
    for _, y in levels:
        arrow(480, y, 560, 190)
    box(560, 55, 740, 330, "white")
    text(650, 35, "the one head, for all levels", 16)
    box(580, 95, 720, 150, SHARED, "Conv 3x3, ReLU\n128")
    box(580, 170, 720, 225, SHARED, "Conv 1x1\n46")
    arrow(650, 150, 650, 170)

    # Its 46 channels, in proportion
    top = 60
    tasks = (("0-20\nsegmentation: 21 classes\nall levels, and the mean of\n"
              "the coarsest, are summed", 21, SEG),
             ("21-35\ndetection: a cell's box,\nconfidence, 10 classes", 15, DET),
             ("36-45  classification: 10\nmean of the coarsest level", 10, CLS))
    for words, channels, colour in tasks:
        bottom = top + channels * 6
        box(790, top, 985, bottom, colour, words, "white")
        top = bottom
    arrow(720, 198, 788, 198)
    text(500, 365, "Stage 1: segmentation     Stage 2: detection     Stage 3: classification"
         "     after each, all three are measured", 15)
    image.quantize(32).save(Path(__file__).with_name("architecture.png"), optimize=True)


if __name__ == "__main__":
    main()
