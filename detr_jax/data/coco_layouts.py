"""Where a folder keeps the splits of a data set: COCO's layout, and the exports of Roboflow, CVAT and Label Studio."""

import re
from dataclasses import dataclass
from pathlib import Path

from detr_jax.errors import InputError, MissingFileError

WHOLE = "all"
"""Name of the split of a folder that has no splits."""
_EXPORTS = {
    "_annotations.coco.json": (".",),  # Roboflow
    "result.json": (".", "images"),  # Label Studio
    "annotations/instances_default.json": ("images/default", "images", "."),  # CVAT
}
"""Annotation file of an export that is not divided, and where its images are."""
_SAME_USE = {"training": "train", "valid": "val", "validation": "val", "testing": "test", "default": WHOLE}


@dataclass(frozen=True)
class SplitFiles:
    """Files of one split.

    Attributes:
        name: of the split, in full.
        annotations: the annotation file.
        folders: where images are looked for, in this order.
        foreign: the annotation file gives paths of another machine, of which the last part may be all that is right.
    """

    name: str
    annotations: Path
    folders: tuple[Path, ...]
    foreign: bool = False

    def image(self, file_name: str) -> Path | None:
        """The image that the annotation file calls `file_name`; None if it is not there."""
        for name in (file_name, re.split(r"[/\\]", file_name)[-1]) if self.foreign else (file_name,):
            for folder in self.folders:
                if (path := folder / name).is_file():
                    return path
        return None


def find_split(root: Path, split: str) -> SplitFiles:
    """The split of a folder that has a name, or else the only one of the same use.

    `train`, `val` and `test` are also found as `training`, `valid`, `validation`, `testing`, in any case and with a
    year behind, such as `val2017`. `all`, or `default`, is all of an export that is not divided; several of these in
    sub-folders are splits, named like the folders.

    Raises:
        MissingFileError: if there is no such folder, no annotations in it or no such split; names those that there are.
        InputError: if the folder has several splits of the same use and none of just this name.
    """
    if not root.is_dir():
        raise MissingFileError(f"there is no folder {root}")
    found = _splits(root)
    if split in found:
        return found[split]
    if not found:
        raise MissingFileError(
            f"there are no annotations in {root}: neither annotations/instances_<split>.json (COCO, CVAT) nor, in it "
            f"or in <split>/, {', '.join(_EXPORTS)} (Roboflow, Label Studio, CVAT)"
        )
    same = [name for name in found if _use(re.sub(r"\W?_?\d{4}$", "", name)) == _use(split)]
    if len(same) > 1:
        raise InputError(f"{root} has several splits that could be {split!r}: {', '.join(same)}; name one in full")
    if same:
        return found[same[0]]
    if list(found) == [WHOLE]:
        raise MissingFileError(
            f"{root} has no split {split!r}: it is not divided, and all of it is the split {WHOLE!r}. To train and to "
            f"validate, export two parts, into {root / 'train'} and {root / 'val'}"
        )
    raise MissingFileError(
        f"{root} has no split {split!r}; it has {', '.join(found)}. An export of its own in {root / split} would be one"
    )


def _use(name: str) -> str:
    return _SAME_USE.get(name.casefold(), name.casefold())


def _splits(root: Path) -> dict[str, SplitFiles]:
    """All splits of a folder by name."""
    found = {}
    for path in sorted(root.glob("annotations/instances_*.json")):
        if (name := path.stem.removeprefix("instances_")) != "default":
            found[name] = SplitFiles(name, path, (root / name, root / "images" / name, root / "images", root))
    for file, folders in _EXPORTS.items():
        for path in (root / file, *sorted(root.glob(f"*/{file}"))):
            folder = path.parents[file.count("/")]
            name = WHOLE if folder == root else folder.name
            if path.is_file() and name not in found:
                found[name] = SplitFiles(name, path, tuple(folder / f for f in folders), foreign=file == "result.json")
    return found
