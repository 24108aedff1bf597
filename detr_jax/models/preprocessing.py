"""Facts about the pixels that a detector was trained on: part of it, as its parameters are."""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How images become a detector's inputs: resized, rescaled, normalised, padded.

    Attributes:
        shortest_side: of resized images, in pixels ...
        longest_side: ... unless the longer side would exceed this.
        mean, std: taken out of each colour channel, red first, after rescaling.
        rescale: factor of the 8-bit values.
        stride: the sides of padded shapes are multiples of this.
    """

    shortest_side: int = 800
    longest_side: int = 1333
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    rescale: float = 1 / 255
    stride: int = 32
