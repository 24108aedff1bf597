"""Outputs of small detectors of transformers, which the tests compare with where neither it nor torch is installed.

    PYTHONPATH=tests python tests/golden/make_small.py

writes `small_<model>.npz`: configuration, names and shapes of the entries, which the recipe fills, and the outputs.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from coco_images import padded, small_images
from published import telling_entry
from torch_detectors import deformable_detr, small_config

from detr_jax import preset_config

HERE = Path(__file__).parent
MODELS = {
    "table_transformer": lambda: transformers.TableTransformerForObjectDetection(
        small_config(transformers.TableTransformerConfig, "basic")
    ),
    "conditional_detr": lambda: transformers.ConditionalDetrForObjectDetection(
        small_config(transformers.ConditionalDetrConfig)
    ),
    "deformable_detr_single_scale": lambda: deformable_detr(num_feature_levels=1),
    "deformable_detr": deformable_detr,
    "deformable_detr_with_box_refine": lambda: deformable_detr(with_box_refine=True),
    "deformable_detr_with_box_refine_two_stage": lambda: deformable_detr(with_box_refine=True, two_stage=True),
}


def main() -> None:
    pixels, mask = padded(small_images(preset_config("detr-r50")))
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make()
            model.save_pretrained(folder)
            file = Path(folder) / "model.safetensors"
            shapes = {key: array.shape for key, array in safetensors.numpy.load_file(file).items()}
            entries = {key: telling_entry(key, shape) for key, shape in shapes.items()}
            safetensors.numpy.save_file(entries, file, metadata={"format": "pt"})
            model = type(model).from_pretrained(folder).eval()
            for heads in ("bbox_embed", "class_embed"):  # of Deformable DETR, which the file holds under the decoder
                if (shared := getattr(model.model.decoder, heads, None)) is not None:
                    setattr(model, heads, shared)
            config = json.loads((Path(folder) / "config.json").read_text())
        with torch.no_grad():
            outputs = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(mask).long())
        arrays = {"logits": outputs.logits.numpy(), "boxes": outputs.pred_boxes.numpy()}
        texts = {"config": json.dumps(config), "shapes": json.dumps(shapes), "transformers": transformers.__version__}
        np.savez_compressed(HERE / f"small_{name}.npz", **arrays, **texts)
        print(f"small_{name}.npz: {len(shapes)} entries", file=sys.stderr)


if __name__ == "__main__":
    main()
