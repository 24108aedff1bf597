"""Detectors of transformers with parameters that matter, and the comparison of what is loaded from their files."""

import numpy as np
import torch
import transformers
from coco_images import padded, small_images
from flax import nnx
from published import telling_entry

SMALL = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 64}
LABELS = {0: "N/A", 1: "cat", 2: "dog"}


def small_config(cls=transformers.DetrConfig, layer_type="bottleneck", **changes):
    """A configuration that writes small files."""
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128] if layer_type == "basic" else [32, 64, 128, 256],
        depths=[2, 1, 1, 1],
        layer_type=layer_type,
        out_features=["stage4"],
    )
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    options = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone, "num_queries": 30}
    return cls(**SMALL | heads | options | {"id2label": LABELS} | changes)


def deformable_detr(**changes):
    """A small Deformable DETR whose heads differ from layer to layer, as in the published files with refinement."""
    options = {"disable_custom_kernels": True, "num_feature_levels": 4, "tie_word_embeddings": False} | changes
    config = small_config(transformers.DeformableDetrConfig, **options)
    used = ["stage2", "stage3", "stage4"] if config.num_feature_levels > 1 else ["stage4"]
    config.backbone_config.out_features = used
    config.two_stage_num_proposals = config.num_queries
    model = transformers.DeformableDetrForObjectDetection(config)
    if config.with_box_refine:
        model.model.decoder.bbox_embed = model.bbox_embed
    if config.two_stage:
        model.model.decoder.class_embed = model.class_embed
    return with_recipe(model)


def with_recipe(model):
    """The model with parameters and statistics that all matter, unlike fresh ones."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(telling_entry(name, tuple(tensor.shape))))
    return model.eval()


@nnx.jit
def forward(model, pixels, mask):
    outputs = model(pixels, mask)
    return outputs.logits, outputs.boxes


def assert_same_outputs(model, original, images=None):
    """Raises unless a loaded detector and its original agree on two photographs, or on given pixels and mask."""
    pixels, mask = padded(small_images(model.config)) if images is None else images
    with torch.no_grad():
        expected = original(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(mask).long())
    logits, boxes = forward(model, pixels, mask)
    assert np.std(boxes, axis=1).max() > 0.005, "the queries must differ for the comparison to mean something"
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=2e-4)
    np.testing.assert_allclose(boxes, expected.pred_boxes, rtol=0, atol=2e-5)
