"""Folders with annotated images as Roboflow, CVAT and Label Studio export them, with the keys and ids that they write.

Images are PNG files, so that they are those of the data set to the pixel.
"""

import hashlib
import json
from pathlib import Path

from PIL import Image

from detr_jax.data.dataset import Dataset, Json


def roboflow(root: Path, group: str = "shapes", **splits: Dataset) -> Path:
    """COCO JSON of Roboflow: a folder for each split, ids from 0, and the project's group of classes as category 0."""
    for split, dataset in splits.items():
        truth = dataset.ground_truth()
        names = sorted(category["name"] for category in truth["categories"])
        categories = [{"id": 0, "name": group, "supercategory": "none"}]
        categories += [{"id": id, "name": name, "supercategory": group} for id, name in enumerate(names, 1)]
        images = [
            {
                "id": index,
                "license": 1,
                "file_name": _saved(dataset, index, root / split, f"scene-{index}_png.rf.{_hash(index)}.png"),
                "height": image["height"],
                "width": image["width"],
                "date_captured": "2024-03-01T09:30:00+00:00",
                "extra": {"name": f"scene-{index}.png"},
            }
            for index, image in enumerate(truth["images"])
        ]
        annotations = [
            {
                "id": id,
                "image_id": index,
                "category_id": 1 + names.index(name),
                "bbox": a["bbox"],
                "area": a["area"],
                "segmentation": [],
                "iscrowd": 0,
            }
            for id, (a, index, name) in enumerate(_objects(truth))
        ]
        info = {
            "year": "2024",
            "version": "3",
            "description": "Exported from roboflow.com",
            "contributor": "",
            "url": "https://public.roboflow.com/object-detection/undefined",
            "date_created": "2024-03-01T09:30:00+00:00",
        }
        licenses = [{"id": 1, "url": "https://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}]
        content = {"info": info, "licenses": licenses, "categories": categories, "images": images}
        _write(root / split / "_annotations.coco.json", content | {"annotations": annotations})
    (root / "README.roboflow.txt").write_text("shapes - v3\n")
    return root


def cvat(root: Path, images_in: str = "images/{}", **splits: Dataset) -> Path:
    """COCO 1.0 of CVAT: `annotations/instances_<subset>.json`, images in sub-folders, gaps in ids, boxes as floats.

    `images_in` is the folder of a subset's images; earlier versions write all into `images`.
    """
    for split, dataset in splits.items():
        truth = dataset.ground_truth()
        names = [category["name"] for category in reversed(truth["categories"])]
        folder = root / images_in.format(split)
        images = [
            {
                "id": 1 + 3 * index,
                "width": image["width"],
                "height": image["height"],
                "file_name": _saved(dataset, index, folder, f"{split}-clip/frame_{index:06}.png"),
                "license": 0,
                "flickr_url": "",
                "coco_url": "",
                "date_captured": 0,
            }
            for index, image in enumerate(truth["images"])
        ]
        annotations = [
            {
                "id": id,
                "image_id": 1 + 3 * index,
                "category_id": 1 + names.index(name),
                "segmentation": [],
                "area": a["area"],
                "bbox": [float(side) for side in a["bbox"]],
                "iscrowd": 0,
                "attributes": {"occluded": False, "rotation": 0.0},
            }
            for id, (a, index, name) in enumerate(_objects(truth), 1)
        ]
        info = dict.fromkeys(("contributor", "date_created", "description", "url", "version", "year"), "")
        content = {
            "licenses": [{"name": "", "id": 0, "url": ""}],
            "info": info,
            "categories": [{"id": id, "name": name, "supercategory": ""} for id, name in enumerate(names, 1)],
        }
        content |= {"images": images, "annotations": annotations}
        _write(root / "annotations" / f"instances_{split}.json", content)
    return root


def label_studio(root: Path, dataset: Dataset, path: str = "images/{}") -> Path:
    """COCO of Label Studio: `result.json` beside `images/`, no splits, ids from 0.

    `path` is how it names an image: versions differ, and some name the place where the server keeps it.
    """
    truth = dataset.ground_truth()
    names = sorted(category["name"] for category in truth["categories"])
    images = [
        {
            "width": image["width"],
            "height": image["height"],
            "id": index,
            "file_name": path.format(_saved(dataset, index, root / "images", f"{_hash(index)[:8]}-scene-{index}.png")),
        }
        for index, image in enumerate(truth["images"])
    ]
    annotations = [
        {
            "id": id,
            "image_id": index,
            "category_id": names.index(name),
            "segmentation": [],
            "bbox": a["bbox"],
            "ignore": 0,
            "iscrowd": 0,
            "area": a["area"],
        }
        for id, (a, index, name) in enumerate(_objects(truth))
    ]
    info = {
        "year": 2024,
        "version": "1.0",
        "description": "",
        "contributor": "Label Studio",
        "url": "",
        "date_created": "2024-03-01 09:30:00.000000",
    }
    categories = [{"id": id, "name": name} for id, name in enumerate(names)]
    _write(root / "result.json", {"images": images, "categories": categories, "annotations": annotations, "info": info})
    return root


def edit(path: Path, change) -> None:
    """Changes the content of an annotation file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _objects(truth: Json) -> list[tuple[Json, int, str]]:
    """Annotations, each with the position of its image and the name of its category."""
    position = {image["id"]: index for index, image in enumerate(truth["images"])}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return [(a, position[a["image_id"]], names[a["category_id"]]) for a in truth["annotations"]]


def _saved(dataset: Dataset, index: int, folder: Path, name: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(dataset[index].image).save(folder / name)
    return name


def _hash(index: int) -> str:
    return hashlib.md5(str(index).encode()).hexdigest()


def _write(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
