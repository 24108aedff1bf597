"""Bad inputs, each with the error it gives. The page docs/errors.md lists them all and is checked here.

`python tests/test_bad_inputs.py` writes the page anew.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from safetensors import safe_open
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.data.augment import AugmentedBatches
from detr_jax.data.classes import match_classes
from detr_jax.data.coco import CocoDataset
from detr_jax.kernels import Execution
from detr_jax.methods import InputMagnitude, LinearGate, Random, Thresholded, TopK, executed
from detr_jax.models.labels import COCO_LABELS
from detr_jax.training.detector.finetune import FineTuning, check_parts

PAGE = Path(__file__).parent.parent / "docs/errors.md"
HEAD = """# What goes wrong, and what is said

Every bad input that was tried, with the error it gives. Commands print the same text and exit with status 2.
`…` stands for what other libraries say, or for a path. The page is written and checked by `tests/test_bad_inputs.py`.
"""


@cache
def dense() -> detr_jax.DETR:
    return tiny_detector()


@cache
def plan() -> detr_jax.Plan:
    rng = np.random.default_rng(0)
    selectors = {
        name: Thresholded(LinearGate(np.float32(rng.standard_normal((16, 4))), np.zeros(4, np.float32)), jnp.float32(0))
        for name in TINY_CONFIG.ffn_names
    }
    return detr_jax.Plan(
        "mgs", detr_jax.fingerprint(dense()), selectors, {"encoder.0": np.arange(32)[::-1]}, {}, {}, {}
    )


@cache
def sparse() -> detr_jax.SparseDETR:
    return detr_jax.load_sparse(dense(), plan())


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def image_file(path: Path, array: np.ndarray, keep: int | None = None) -> Path:
    """An image file, or the first so many bytes of one."""
    Image.fromarray(array).save(path)
    return written(path, path.read_bytes()[:keep])


def rewritten(path: Path, header: dict | None = None, arrays: dict | None = None) -> Path:
    """A safetensors file with some of its header and arrays replaced; None takes one out."""
    with safe_open(path, framework="numpy") as file:
        headers, entries = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    headers, entries = headers | (header or {}), entries | (arrays or {})
    entries = {name: array for name, array in entries.items() if array is not None}
    safetensors.numpy.save_file(entries, path, metadata={name: text for name, text in headers.items() if text})
    return path


def detector_file(folder: Path, **changes: dict) -> Path:
    path = folder / "model.safetensors"
    detr_jax.save(dense(), path)
    return rewritten(path, **changes)


def plan_file(folder: Path, description: dict | None = None, header: dict | None = None, **changes: dict) -> Path:
    path = folder / "plan.safetensors"
    detr_jax.save_plan(plan(), path)
    if description is not None:
        with safe_open(path, framework="numpy") as file:
            described = json.loads(file.metadata()["description"])
        described["selectors"] = described["selectors"] | description
        header = {"description": json.dumps(described)}
    return rewritten(path, header, **changes)


def coco(folder: Path, **sections: object) -> CocoDataset:
    """A data set of two images and one object, with some sections of its annotation file replaced."""
    write_coco(folder, [(20, 30), (30, 20)], [annotation(1, 1, (1, 2, 10, 12))])
    path = folder / "annotations/instances_val2017.json"
    content = json.loads(path.read_text()) | sections
    written(path, json.dumps(content))
    return CocoDataset(folder, "val2017")


def objects(**changes: object) -> dict:
    """The object of `coco`, changed."""
    return {"annotations": [annotation(1, 1, (1, 2, 10, 12)) | changes]}


def match(*names: str, **table: str) -> None:
    """Categories with these names, for a detector of COCO's classes."""
    match_classes(COCO_LABELS, [{"id": id, "name": name} for id, name in enumerate(names)], table)


def many(count: int) -> dict:
    """So many objects in one image."""
    return {"annotations": [annotation(i, 1, (1, 2, 10, 12)) for i in range(1, count + 1)]}


def offline(call: Callable[[], object]) -> None:
    """Without a network, and without anything in the hub's cache."""
    with mock.patch("huggingface_hub.hf_hub_download", side_effect=ConnectionError("no route")):
        call()


def with_selector(selector: object) -> detr_jax.SparseDETR:
    return sparse().with_plan(dataclasses.replace(plan(), selectors={"encoder.0": selector}))


def detect(images: object, **options: object) -> None:
    detr_jax.detect(dense(), images, **options)


def export(folder: Path, name: str = "a.stablehlo", size: tuple = (32, 32), model: object = None, **options) -> None:
    detr_jax.export(model or dense(), folder / name, size=size, **options)


def by_kernels(implementation: str | None) -> detr_jax.SparseDETR:
    """A plan that nobody could load on this device."""
    selectors = executed(plan().selectors, Execution(implementation=implementation))
    return detr_jax.SparseDETR(dense(), dataclasses.replace(plan(), selectors=selectors))


def load_plan(path: Path) -> None:
    detr_jax.load_plan(path, dense())


GATE = "encoder.0.selector.score"
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
DEEP = np.full((4, 4), 300, np.uint16)
IMAGE = {"id": 1, "file_name": "000000000001.png", "height": 20, "width": 30}
REVERSED = {"encoder.0": np.arange(32)[::-1]}
CHANNELS = Thresholded(InputMagnitude(weighted=False), jnp.float32(0.1))
UNKNOWN = {
    "class": "Thresholded",
    "score": {"class": "OtherGate"},
    "threshold": {"array": "encoder.0.selector.threshold"},
}


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        what: it is, for the page.
        use: it in an empty folder.
        cut: behind this text comes what others say, which changes with their versions.
    """

    what: str
    use: Callable[[Path], object]
    cut: str | None = None


AS_IMAGE = "as an image: "
OTHER = "was made for the detector "
UNFIT = "does not fit its FFN: "
TABLE = {
    "Images": [
        Bad("a file that does not exist", lambda t: detect(t / "cat.jpg")),
        Bad("a text file", lambda t: detect(written(t / "cat.jpg", "hello")), AS_IMAGE),
        Bad("an empty file", lambda t: detect(written(t / "cat.png", "")), AS_IMAGE),
        Bad("a folder", lambda t: detect(t), AS_IMAGE),
        Bad(
            "a truncated file",
            lambda t: detr_jax.preprocess_images(image_file(t / "cat.jpg", PIXELS, 1000), TINY_CONFIG.preprocessing),
            AS_IMAGE,
        ),
        Bad(
            "grey values of 16 bits",
            lambda t: detr_jax.preprocess_images(image_file(t / "deep.png", DEEP), TINY_CONFIG.preprocessing),
            "the grey values",
        ),
        Bad("a PIL image of 32 bits", lambda t: detect_pixels(Image.new("F", (8, 8)))),
        Bad("a line of pixels", lambda t: detect(np.zeros((1, 3000, 3), np.uint8))),
        Bad("an array of floats", lambda t: detect(np.zeros((8, 8, 3), np.float32))),
        Bad("an array with its channels first", lambda t: detect(np.zeros((3, 8, 8), np.uint8))),
        Bad("an array without channels", lambda t: detect(np.zeros((8, 8), np.uint8))),
        Bad("an array without pixels", lambda t: detect(np.zeros((0, 8, 3), np.uint8))),
        Bad("nothing", lambda t: detect(None)),
        Bad("a list of numbers", lambda t: detect([1, 2])),
        Bad("an empty list, to be preprocessed", lambda t: detr_jax.preprocess_images([], TINY_CONFIG.preprocessing)),
    ],
    "Arrays for a detector": [
        Bad("one image without a batch", lambda t: sparse()(np.zeros((32, 40, 3), np.float32))),
        Bad("channels first", lambda t: sparse()(np.zeros((1, 3, 32, 40), np.float32))),
        Bad("integers", lambda t: sparse()(np.zeros((1, 32, 40, 3), np.uint8))),
        Bad(
            "a mask of another shape",
            lambda t: sparse()(np.zeros((1, 32, 40, 3), np.float32), np.ones((1, 40, 32), bool)),
        ),
        Bad(
            "a selector for an FFN that does not exist",
            lambda t: dense()(np.zeros((1, 32, 40, 3), np.float32), selectors={"encoder.9": CHANNELS}),
        ),
    ],
    "Annotations": [
        Bad("no folder", lambda t: CocoDataset(t / "coco", "val2017")),
        Bad("no annotation file", lambda t: CocoDataset(written(t / "val2017/a.png", "").parent.parent, "val2017")),
        Bad(
            "no JSON",
            lambda t: [coco(t), written(t / "annotations/instances_val2017.json", "{"), CocoDataset(t, "val2017")],
            "not valid JSON: ",
        ),
        Bad(
            "a list",
            lambda t: [coco(t), written(t / "annotations/instances_val2017.json", "[]"), CocoDataset(t, "val2017")],
        ),
        Bad("no categories", lambda t: coco(t, categories=None)),
        Bad("a text as the id of a category", lambda t: coco(t, categories=[{"id": "1", "name": "cat"}])),
        Bad("two categories of one id", lambda t: coco(t, categories=[{"id": 1, "name": n} for n in ("cat", "dog")])),
        Bad("a category without a name", lambda t: coco(t, categories=[{"id": 1}])),
        Bad("no images", lambda t: coco(t, images=[], annotations=[])),
        Bad("an object that is a number", lambda t: coco(t, annotations=[7])),
        Bad("an object without a box", lambda t: coco(t, annotations=[{"id": 1, "image_id": 1, "category_id": 1}])),
        Bad("an image without a size", lambda t: coco(t, images=[IMAGE | {"height": None}])),
        Bad("an image of a negative size", lambda t: coco(t, images=[IMAGE | {"width": -30}])),
        Bad("a file name that is none", lambda t: coco(t, images=[IMAGE | {"file_name": 1}])),
        Bad("two images of one id", lambda t: coco(t, images=[IMAGE, IMAGE])),
        Bad("an object of no image", lambda t: coco(t, **objects(image_id=9))),
        Bad("an object of no category", lambda t: coco(t, **objects(category_id=9))),
        Bad("an object of a category that is a list", lambda t: coco(t, **objects(category_id=[1]))),
        Bad("a box of three numbers", lambda t: coco(t, **objects(bbox=[1, 2, 3]))),
        Bad("a box with NaN", lambda t: coco(t, **objects(bbox=[1, 2, 3, float("nan")]))),
        Bad("an area that is a text", lambda t: coco(t, **objects(area="large"))),
        Bad("a crowd of two", lambda t: coco(t, **objects(iscrowd=2))),
        Bad("an image that is not there", lambda t: coco(t, images=[IMAGE | {"file_name": "cat.png"}])),
        Bad("an image of another size", lambda t: coco(t, images=[IMAGE | {"width": 31}])[0]),
        Bad("more images than there are", lambda t: [coco(t), CocoDataset(t, "val2017", images=3)]),
        Bad("a split that is not there", lambda t: [coco(t), CocoDataset(t, "train2017")]),
        Bad(
            "an export that is not divided",
            lambda t: CocoDataset(written(t / "export/result.json", "{}").parent, "val"),
        ),
        Bad(
            "two splits for one use",
            lambda t: [
                *(written(t / f"annotations/instances_val{year}.json", "{}") for year in (2014, 2017)),
                CocoDataset(t, "val"),
            ],
        ),
        Bad("categories that the detector does not know", lambda t: match("helmet", "vest")),
        Bad("a table with a category that is not there", lambda t: match("helmet", casque="person")),
        Bad("a table with a class that is not there", lambda t: match("helmet", helmet="persn")),
    ],
    "Data sets": [
        Bad("a kind that does not exist", lambda t: detr_jax.open_dataset("voc:photos", "val")),
        Bad("a folder without its kind", lambda t: detr_jax.open_dataset(str(t), "val"), "for the folder "),
        Bad("COCO without a path", lambda t: detr_jax.open_dataset("coco", "val")),
        Bad("a folder of images that does not exist", lambda t: detr_jax.open_dataset(f"images:{t}/photos", "val")),
        Bad(
            "a folder without images",
            lambda t: detr_jax.open_dataset(f"images:{written(t / 'photos/a.txt', 'hello').parent}", "val"),
        ),
        Bad("a split that a folder of images has not", lambda t: detr_jax.open_dataset(f"images:{t}", "test")),
        Bad("a split that scenes have not", lambda t: detr_jax.open_dataset("scenes", "dev")),
    ],
    "Detectors": [
        Bad("a name that nothing has", lambda t: detr_jax.load("detr-r52")),
        Bad("a file that does not exist", lambda t: detr_jax.load(t / "model.pth")),
        Bad("a file of another kind", lambda t: detr_jax.load(written(t / "model.h5", "weights"))),
        Bad(
            "a truncated file",
            lambda t: detr_jax.load(written(t / "short.safetensors", detector_file(t).read_bytes()[:-9])),
            "no safetensors file: ",
        ),
        Bad("a folder without a checkpoint", lambda t: detr_jax.load(written(t / "a/readme.md", "").parent)),
        Bad("arrays of something else", lambda t: detr_jax.load(detector_file(t, header={"format": "other"}))),
        Bad("a newer version", lambda t: detr_jax.load(detector_file(t, header={"format_version": "3"}))),
        Bad("a header without a description", lambda t: detr_jax.load(detector_file(t, header={"config": None}))),
        Bad("a missing array", lambda t: detr_jax.load(detector_file(t, arrays={"class_head.bias": None}))),
        Bad("an array too much", lambda t: detr_jax.load(detector_file(t, arrays={"extra": np.zeros(2)}))),
        Bad(
            "an array of another shape",
            lambda t: detr_jax.load(detector_file(t, arrays={"class_head.bias": np.zeros(9)})),
        ),
        Bad("NaN", lambda t: detr_jax.load(detector_file(t, arrays={"class_head.bias": np.full(4, np.nan)}))),
        Bad("a folder that is not there", lambda t: detr_jax.load(t / "runs/detr")),
        Bad("a preset that it is not", lambda t: detr_jax.load(detector_file(t), preset="detr-tiny")),
        Bad("a preset that does not exist", lambda t: detr_jax.load(detector_file(t), preset="detr-r18")),
    ],
    "Fine-tuning": [
        Bad("no class", lambda t: detr_jax.load(detector_file(t), labels=[])),
        Bad("one class as a text", lambda t: detr_jax.load(detector_file(t), labels="cat")),
        Bad("a class twice", lambda t: detr_jax.load(detector_file(t), labels=["fox", "Fox"])),
        Bad("fewer images than a batch", lambda t: AugmentedBatches(dense(), coco(t), 3, 0)),
        Bad("an image of more objects than queries", lambda t: AugmentedBatches(dense(), coco(t, **many(6)), 1, 0)),
        Bad("a batch that cannot be divided", lambda t: check_parts(FineTuning(batch_size=8, accumulation=3), None)),
        Bad("no epochs", lambda t: FineTuning(epochs=0)),
    ],
    "Plans": [
        Bad("a file that does not exist", lambda t: load_plan(t / "plan.safetensors")),
        Bad(
            "a truncated file",
            lambda t: load_plan(written(t / "short.safetensors", plan_file(t).read_bytes()[:-9])),
            "no safetensors file: ",
        ),
        Bad("a text file", lambda t: load_plan(written(t / "plan.safetensors", "hello")), "no safetensors file: "),
        Bad("the file of a detector", lambda t: load_plan(detector_file(t))),
        Bad("a newer version", lambda t: load_plan(plan_file(t, header={"format_version": "5"}))),
        Bad("a version that is no number", lambda t: load_plan(plan_file(t, header={"format_version": "new"}))),
        Bad("a version that it is not of", lambda t: load_plan(plan_file(t, header={"format_version": "1"}))),
        Bad("a header without a description", lambda t: load_plan(plan_file(t, header={"description": None}))),
        Bad("a description that lacks something", lambda t: load_plan(plan_file(t, header={"description": "{}"}))),
        Bad("of another detector", lambda t: detr_jax.load_plan(plan_file(t), tiny_detector(seed=1)), OTHER),
        Bad("NaN in a gate", lambda t: load_plan(plan_file(t, arrays={f"{GATE}.bias": np.full(4, np.nan)}))),
        Bad(
            "NaN as a threshold",
            lambda t: load_plan(plan_file(t, arrays={"encoder.0.selector.threshold": np.array(np.nan, np.float32)})),
        ),
        Bad(
            "a gate of another shape",
            lambda t: load_plan(plan_file(t, arrays={f"{GATE}.kernel": np.zeros((15, 4))})),
            UNFIT,
        ),
        Bad("a missing array", lambda t: load_plan(plan_file(t, arrays={f"{GATE}.bias": None}))),
        Bad("an array too much", lambda t: load_plan(plan_file(t, arrays={"encoder.0.extra": np.zeros(1)}))),
        Bad(
            "a permutation that is none",
            lambda t: load_plan(plan_file(t, arrays={"encoder.0.permutation": np.zeros(32)})),
        ),
        Bad(
            "a selector for no FFN",
            lambda t: load_plan(plan_file(t, {"encoder.9": {"class": "Oracle", "group_size": 8}})),
        ),
        Bad("a selector that is not known", lambda t: load_plan(plan_file(t, {"encoder.0": UNKNOWN}))),
        Bad(
            "in code, of another detector",
            lambda t: detr_jax.load_sparse(dense(), dataclasses.replace(plan(), fingerprint="0" * 64)),
            OTHER,
        ),
        Bad(
            "in code, NaN", lambda t: with_selector(Thresholded(LinearGate(np.zeros((16, 4)), np.full(4, np.nan)), 0.0))
        ),
        Bad(
            "in code, a permutation that is none",
            lambda t: sparse().with_plan(dataclasses.replace(plan(), permutations={"encoder.0": np.arange(9)})),
        ),
        Bad(
            "on the hub, which cannot be reached",
            lambda t: offline(lambda: load_plan("someone/plans")),
            "the hub's cache (",
        ),
        Bad("pushed to no repository", lambda t: detr_jax.push_plan(plan(), "plans")),
    ],
    "Exports": [
        Bad("a file that exists", lambda t: export(written(t / "a.stablehlo", "").parent)),
        Bad("a description that exists", lambda t: export(written(t / "a.stablehlo.json", "").parent)),
        Bad("a suffix that says no format", lambda t: export(t, "a.pb")),
        Bad("a format that does not exist", lambda t: export(t, format="tflite")),
        Bad("a platform that does not exist", lambda t: export(t, platforms=("cpu", "gpu"))),
        Bad("platforms for ONNX", lambda t: export(t, "a.onnx", platforms=("cpu",))),
        Bad("bfloat16 for ONNX", lambda t: export(t, "a.onnx", model=tiny_detector(dtype=jnp.bfloat16))),
        Bad("a size without pixels", lambda t: export(t, size=(32, 0))),
        Bad("a size of one number", lambda t: export(t, size=(32,))),
        Bad("a batch without images", lambda t: export(t, batch=0)),
        Bad("a kernel for one platform", lambda t: export(t, model=by_kernels("mosaic_gpu"))),
        Bad("groups left out in ONNX", lambda t: export(t, "a.onnx", model=by_kernels(None))),
    ],
    "Arguments": [
        Bad("a dtype for a detector", lambda t: detr_jax.load_sparse(dense(), plan(), dtype=jnp.bfloat16)),
        Bad("no plan for a detector", lambda t: detr_jax.load_sparse(dense())),
        Bad("no plan for a file", lambda t: detr_jax.load_sparse(detector_file(t)), "scripts/train_gates.py --model "),
        Bad("an implementation that does not exist", lambda t: sparse().with_implementation("fast")),
        Bad(
            "an implementation for another device",
            lambda t: sparse().with_implementation("mosaic_gpu"),
            "cannot compute this: ",
        ),
        Bad("blocks that do not divide the neurons", lambda t: sparse().with_implementation(Execution(block_size=5))),
        Bad("blocks of channels", lambda t: with_selector(CHANNELS).with_implementation("auto")),
        Bad("a threshold for a dense FFN", lambda t: with_selector(CHANNELS).with_threshold({"decoder.0": 0.0})),
        Bad(
            "thresholds of a score that is no probability",
            lambda t: with_selector(Thresholded(Random(8), jnp.float32(0))).with_threshold(0.5),
        ),
        Bad(
            "selectors of a plan for the dense detector",
            lambda t: dense()(
                np.float32(PIXELS)[None], selectors=dataclasses.replace(plan(), permutations=REVERSED).selectors
            ),
        ),
        Bad("a threshold of NaN", lambda t: sparse().with_threshold(float("nan"))),
        Bad(
            "a threshold for a number of groups",
            lambda t: with_selector(TopK(plan().selectors["encoder.0"].score, jnp.int32(2))).with_threshold(0.0),
        ),
        Bad("a probability above 1", lambda t: detr_jax.log_odds(1.5)),
        Bad("a score above 1", lambda t: detect(PIXELS, threshold=1.5)),
        Bad("a batch without images", lambda t: detect(PIXELS, batch_size=0)),
        Bad("a preset that does not exist", lambda t: detr_jax.preset_config("detr-r18")),
        Bad("a preset as another one", lambda t: detr_jax.load("detr-tiny", preset="detr-r50")),
    ],
}
CASES = [(section, bad) for section, table in TABLE.items() for bad in table]


def detect_pixels(image: Image.Image) -> None:
    detr_jax.preprocess_images(image, TINY_CONFIG.preprocessing)


def said(bad: Bad, folder: Path) -> str:
    """The class and the text of the error that a bad input gives, as the page has it."""
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        bad.use(folder)
    text = str(error.value).replace(f"{folder}/", "").replace(str(folder), "…")
    if bad.cut is not None:
        assert bad.cut in text, text
        text = text.partition(bad.cut)[0] + bad.cut + "…"
    built_in = next(kind for kind in error.type.__mro__ if kind.__module__ == "builtins")
    return f"`{built_in.__name__}`: {text}"


def row(what: str, text: str) -> str:
    escaped = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| {what} | {escaped} |"


@pytest.mark.parametrize(("section", "bad"), CASES, ids=[f"{section}: {bad.what}" for section, bad in CASES])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_bad_input_gives_the_error_on_the_page(section, bad, tmp_path):
    on_page = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    assert row(bad.what, said(bad, tmp_path)) in on_page


def test_the_page_lists_nothing_else():
    rows = [
        line
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and not line.startswith(("| what", "| ---"))
    ]
    assert len(rows) == len(CASES) >= 40
    assert len({(section, bad.what) for section, bad in CASES}) == len(CASES)


def page() -> str:
    parts = [HEAD]
    for section, table in TABLE.items():
        parts.append(f"\n## {section}\n\n| what | error |\n| --- | --- |\n")
        for bad in table:
            with tempfile.TemporaryDirectory() as folder:
                parts.append(row(bad.what, said(bad, Path(folder))) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
