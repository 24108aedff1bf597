"""Facts about the pixels that a detector was trained on: part of it, as its parameters are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How images become a detector's inputs: resized, rescaled, normalised, padded."""

    shortest_side: int = 800
    """Of resized images, in pixels ..."""
    longest_side: int = 1333
    """... unless the longer side would exceed this."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Taken out of each colour channel, red first, after rescaling, as `std` is: those of ImageNet."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    rescale: float = 1 / 255
    """Factor of the 8-bit values."""
    stride: int = 32
    """The sides of padded shapes are multiples of this."""
