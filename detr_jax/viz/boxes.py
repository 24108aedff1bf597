"""Pictures of detections."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detr_jax.models.detections import ImageDetections

MIN_SIDE = 640
"""Smaller images are enlarged to this longer side, so that labels are legible beside their objects."""

Rectangle = tuple[float, float, float, float]


def colour(label: int) -> tuple[int, int, int]:
    """A colour of its own for each class: hues a golden ratio apart, in two shades."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.95, (1.0, 0.75)[label % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: np.ndarray, found: ImageDetections) -> Image.Image:
    """Boxes with class names and scores on an image (height, width, 3) uint8, the best on top."""
    picture = Image.fromarray(image)
    enlarged = max(1.0, MIN_SIDE / max(picture.size))
    picture = picture.resize((round(picture.width * enlarged), round(picture.height * enlarged)))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, max(picture.size) / 50))
    line = max(2, max(picture.size) // 320)
    boxes = found.boxes * enlarged
    worst_first = np.argsort(found.scores)
    for i in worst_first:
        x0, y0, x1, y1 = boxes[i].tolist()
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour(int(found.labels[i])), width=line)

    labels: list[tuple[Rectangle, str, tuple[float, float], int]] = []
    for i in reversed(worst_first):
        label = int(found.labels[i])
        text = f"{found.names[i] or label} {found.scores[i]:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        size = (right - left + 3 * line, bottom - top + 3 * line)
        spot = _free_spot(boxes[i].tolist(), size, picture.size, [taken for taken, *_ in labels])
        labels.append((spot, text, (spot[0] + 1.5 * line - left, spot[1] + 1.5 * line - top), label))
    for spot, text, corner, label in reversed(labels):
        fill = colour(label)
        dark = np.dot(fill, (0.299, 0.587, 0.114)) < 128
        draw.rectangle(spot, fill=fill)
        draw.text(corner, text, fill="white" if dark else "black", font=font)
    return picture


def _free_spot(
    box: Rectangle, size: tuple[float, float], picture: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    """Where a label of (width, height) goes: above its box, inside it at the top or bottom, or below, if free."""
    x0, y0, _, y1 = box
    width, height = size
    x = max(0, min(x0, picture[0] - width))
    spots = []
    for y in (y0 - height, y0, y1 - height, y1):
        y = max(0, min(y, picture[1] - height))
        spots.append((x, y, x + width, y + height))
    free = (s for s in spots if not any(_overlap(s, other) for other in taken))
    return next(free, spots[0])


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
