"""Generated scenes: coloured shapes on textured backgrounds, an unlimited detection data set without files.

Every scene is a function of (split, index, side) alone. Shapes have varied size, rotation, colour and pattern, and hide
parts of each other; the boxes are those of what remains visible, as in COCO. Larger scenes have more of them, and
larger ones besides the smallest.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from detr_jax.data.dataset import Example, Json
from detr_jax.errors import InputError
from detr_jax.models.labels import SCENES_LABELS

SIDE = 128
SIDES = (128, 256)
IMAGES = {"train": 2**31, "val": 600, "test": 2000}
"""Scenes of each split. Choices are made on those of "val"; "test" is for what is reported of the choice."""
MIN_DIAMETER = 26.0  # of a shape's circumscribed circle in pixels, drawn log-uniformly
MAX_DIAMETER = 0.625  # in sides of the scene
MIN_VISIBLE = 0.6  # fraction of a shape, and of every shape below it, that stays visible
MIN_CONTRAST = 90.0  # least distance of a shape's colour from the mean colour of the background, in 8-bit RGB
SUPERSAMPLING = 4
PLACEMENTS = 8  # positions tried for a shape before it is left out
_SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: (side, side, 3) uint8.
        visible: (objects, side, side) bool, the visible pixels of each object.
        labels: (objects,) int32 class indices.
        boxes: (objects, 4) float32, (x0, y0, x1, y1) around the visible pixels.
    """

    image: np.ndarray
    visible: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def max_objects(side: int) -> int:
    """Objects in a scene of so many pixels a side, at most."""
    return side // 32


class ScenesDataset:
    """The scenes of one split as a data set.

    Args:
        split: "val" (600 fixed scenes), "test" (2000 others) or "train" (any number).
        images: use the first so many scenes only; needed for "train".
        side: height and width of the scenes in pixels, one of `SIDES`.

    Raises:
        InputError: if the split or the side does not exist, the split has fewer images, or a number of training scenes
            is not given.
    """

    has_annotations = True

    def __init__(self, split: str, images: int | None = None, side: int = SIDE):
        if side not in SIDES:
            raise InputError(f"scenes have sides of {' or '.join(map(str, SIDES))} pixels, not {side}")
        if split not in _SPLITS:
            raise InputError(f"scenes have the splits {', '.join(_SPLITS)}, not {split!r}")
        if split == "train" and images is None:
            raise InputError("there is no end of training scenes: say how many to use")
        available = IMAGES[split]
        images = available if images is None else images
        if not 0 < images <= available:
            raise InputError(f"the {split} split of scenes has {available} images, asked for {images}")
        self.split, self.side, self._images = split, side, images
        self.name = f"scenes-{split}" if side == SIDE else f"scenes-{side}-{split}"
        self.fingerprint = f"{self.name}[:{images}]"

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._images:
            raise IndexError(f"{self.name} has {self._images} images, no index {index}")
        scene = render_scene(self.split, index, self.side)
        return Example(index, scene.image, scene.boxes, scene.labels)

    def image_sizes(self) -> np.ndarray:
        return np.full((self._images, 2), self.side)

    def image_ids(self) -> list[int]:
        return list(range(self._images))

    def image_name(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def categories(self) -> list[Json]:
        return [{"id": i, "name": name} for i, name in enumerate(SCENES_LABELS) if name]

    def ground_truth(self) -> Json:
        annotations: list[Json] = []
        for image_id in self.image_ids():
            scene = render_scene(self.split, image_id, self.side)
            for label, box, visible in zip(scene.labels, scene.boxes, scene.visible, strict=True):
                x0, y0, x1, y1 = box.tolist()
                # pycocotools takes a match with id 0 for no match
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label), "iscrowd": 0}
                annotations.append(entry | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(visible.sum())})
        images = [{"id": i, "width": self.side, "height": self.side} for i in self.image_ids()]
        return {"images": images, "annotations": annotations, "categories": self.categories()}


def render_scene(split: str, index: int, side: int = SIDE) -> Scene:
    """Draws one scene."""
    rng = np.random.default_rng([_SPLITS[split], index, *([] if side == SIDE else [side])])
    canvas = _background(rng, side)
    background = canvas.mean((0, 1))
    owner = np.full((side, side), -1)
    most = max_objects(side)
    diameters = np.log([MIN_DIAMETER, MAX_DIAMETER * side])
    labels: list[int] = []
    full, left = np.zeros((2, most), int)  # pixels of each shape, whole and still visible
    for _ in range(rng.integers(1, most + 1)):
        label = int(rng.integers(1, len(SCENES_LABELS)))
        diameter = np.exp(rng.uniform(*diameters))
        alpha = _stamp(SCENES_LABELS[label], diameter, rng.uniform(0, 2 * np.pi))
        paint = _paint(rng, len(alpha), background)
        area = (alpha > 0.5).sum()
        overhang = len(alpha) // 6
        for _ in range(PLACEMENTS):
            y, x = rng.integers(-overhang, side - len(alpha) + overhang + 1, 2).tolist()
            # Those of the canvas under the stamp, and the part of the stamp inside the canvas.
            rows, columns = (slice(max(p, 0), min(p + len(alpha), side)) for p in (y, x))
            part = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
            solid = alpha[part] > 0.5
            below = owner[rows, columns]
            hidden = np.bincount(below[solid & (below >= 0)], minlength=most)
            if solid.sum() >= MIN_VISIBLE * area and np.all(left - hidden >= MIN_VISIBLE * full):
                blend = alpha[part][..., None]
                canvas[rows, columns] += blend * (paint[part] - canvas[rows, columns])
                below[solid] = len(labels)
                left -= hidden
                full[len(labels)], left[len(labels)] = area, solid.sum()
                labels.append(label)
                break
    noise = rng.standard_normal(canvas.shape, np.float32) * rng.uniform(2, 8)
    image = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    visible = owner == np.arange(len(labels))[:, None, None]
    boxes = np.array([Image.fromarray(pixels).getbbox() for pixels in visible], np.float32)
    return Scene(image, visible, np.array(labels, np.int32), boxes)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side, 3) float32: smooth blotches at two scales and a grating."""
    canvas = np.full((side, side, 3), rng.uniform(40, 215, 3), np.float32)
    for across, strength in ((3, 50), (16, 22)):
        cells = across * side // SIDE
        blotches = rng.uniform(-1, 1, (cells, cells, 3))
        field = np.uint8(127.5 * (1 + blotches))
        smooth = np.asarray(Image.fromarray(field).resize((side, side), Image.Resampling.BICUBIC), np.float32)
        canvas += (smooth / 127.5 - 1) * strength * rng.uniform()
    canvas += rng.uniform(0, 20) * _wave(rng, side)[..., None]
    return canvas


def _wave(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) float32 sine grating of random direction and period."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / rng.uniform(6, 40)
    steps = np.arange(side, dtype=np.float32) * np.float32(frequency)
    return np.sin(steps[:, None] * np.sin(angle) + steps[None] * np.cos(angle) + phase).astype(np.float32)


def _paint(rng: np.random.Generator, side: int, background: np.ndarray) -> np.ndarray:
    """(side, side, 3) float32: a plain, striped or shaded coat of colour that stands out from the background."""
    first, second = _colour(rng, background), _colour(rng, background)
    kind = rng.integers(3)
    if kind == 0:
        return np.broadcast_to(first, (side, side, 3))
    wave = _wave(rng, side)
    mix = (wave > 0).astype(np.float32) if kind == 1 else 0.5 + 0.5 * wave
    return first + 0.6 * mix[..., None] * (second - first)


def _colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(colour - background) >= MIN_CONTRAST:
            return colour


def _ring(points: int, radii: tuple[float, ...] = (1.0,), centre: float = 0.0) -> np.ndarray:
    """(points, 2) corners at equal angles, their distances from (centre, 0) cycling through `radii`."""
    angles = np.arange(points) * 2 * np.pi / points
    radius = np.resize(radii, points)
    return np.stack([centre + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _cross(width: float) -> np.ndarray:
    arm = np.array([[1, -width], [1, width], [width, width]])
    quarter = np.array([[0, -1], [1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter.T, k) for k in range(4)])


_ARROW = np.array([[1, 0], [0.1, 0.75], [0.1, 0.28], [-0.95, 0.28], [-0.95, -0.28], [0.1, -0.28], [0.1, -0.75]])

# Outlines in a unit circle; the first is filled, a second one is cut out of it.
_OUTLINES = {
    "circle": (_ring(48),),
    "square": (_ring(4),),
    "triangle": (_ring(3),),
    "star": (_ring(10, (1.0, 0.42)),),
    "cross": (_cross(0.3),),
    "ring": (_ring(48), _ring(48, (0.55,))),
    "crescent": (_ring(48), _ring(48, (0.85,), centre=0.45)),
    "arrow": (_ARROW,),
}


def _stamp(name: str, diameter: float, angle: float) -> np.ndarray:
    """(side, side) float32 coverage of a shape, antialiased."""
    side = int(np.ceil(diameter)) + 2
    mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for outline, fill in zip(_OUTLINES[name], (255, 0), strict=False):
        corners = (outline @ turn * diameter / 2 + side / 2) * SUPERSAMPLING
        draw.polygon(corners.ravel().tolist(), fill=fill)
    return np.asarray(mask.reduce(SUPERSAMPLING), np.float32) / 255
