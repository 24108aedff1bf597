"""Facts about the pixels that a detector was trained on: part of it, as its parameters are."""

from dataclasses import dataclass, replace
from typing import Literal

from detr_jax.errors import InputError

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


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
    resize: Literal["official", "transformers", "fit", "stretch", "none"] = "official"
    """To the two sides, where the longer one is computed from the shorter one as the official code rounds it or, as
    transformers does, before it is rounded; or to the largest size that fits into `box`; or to the `box` itself."""
    box: tuple[int, int] = (0, 0)
    """Height and width, for "fit" and "stretch"."""
    resample: Filter = "bilinear"
    """Filter of Pillow."""

    @property
    def has_sides(self) -> bool:
        """Resizing to a shorter side under a cap on the longer one, not to a box or not at all."""
        return self.resize in ("official", "transformers")

    def to_stride(self, side: int) -> int:
        """The side of a padded shape that holds one of so many pixels."""
        return -(-side // self.stride) * self.stride

    def with_size(self, shortest: int, longest: int | None = None) -> "Preprocessing":
        """The same for other sides, in pixels; the cap is as many times the shorter side as before if it is None.

        Raises:
            InputError: if a side is not above 0, or the cap is below the shorter side.
        """
        longest = round(shortest * self.longest_side / self.shortest_side) if longest is None else longest
        if not 0 < shortest <= longest:
            raise InputError(f"a size is the shorter side and a cap on the longer one, not {shortest} and {longest}")
        resize = self.resize if self.has_sides else "official"
        return replace(self, shortest_side=shortest, longest_side=longest, resize=resize)

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of an image of `size` after resizing, in pixels.

        The official rounding of the shorter side (`get_size_with_aspect_ratio`) can exceed the cap on the longer one by
        a few pixels.

        Raises:
            InputError: if the image is so elongated that nothing of its shorter side is left.
        """
        height, width = int(size[0]), int(size[1])
        if self.resize == "none":
            return height, width
        if self.resize == "stretch":
            return self.box
        if self.resize == "fit":
            scale = min(self.box[0] / height, self.box[1] / width)
            resized = int(height * scale), int(width * scale)
        else:
            low, high = min(height, width), max(height, width)
            capped = high / low * self.shortest_side > self.longest_side
            exact = self.longest_side * low / high if capped else self.shortest_side
            shortest = round(exact)
            if low == shortest:
                return height, width
            longer = int((exact if self.resize == "transformers" else shortest) * high / low)
            resized = (longer, shortest) if width < height else (shortest, longer)
        if min(resized) == 0:
            limit = max(self.box) if self.resize == "fit" else self.longest_side
            raise InputError(f"an image of {width}x{height} pixels is too elongated for a longer side of {limit}")
        return resized
