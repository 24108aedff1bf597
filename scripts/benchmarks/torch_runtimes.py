"""The same dense detector in what else people would run: torch, torch.compile, onnxruntime and OpenVINO."""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from detr_jax.models import ConditionalDetrConfig, DeformableDetrConfig, DetrConfig

Forward = Callable[[], Any]
NAMES = ("torch", "torch.compile", "onnxruntime", "OpenVINO")


def torch_model(config: DetrConfig) -> Any:
    """transformers' detector of a configuration, with random weights; an ImportError or ValueError says what lacks."""
    import transformers

    if isinstance(config, ConditionalDetrConfig) or config.backbone.dilate_last:
        raise ValueError("a Conditional DETR, or one with a dilated stage, has no twin here")
    stages = len(config.backbone.depths)
    deformable = isinstance(config, DeformableDetrConfig)
    used = config.backbone_levels if deformable else 1
    resnet = transformers.ResNetConfig(
        embedding_size=config.backbone.stem_width,
        hidden_sizes=[config.backbone.expansion * width for width in config.backbone.widths],
        depths=list(config.backbone.depths),
        layer_type=config.backbone.block,
        out_features=[f"stage{stage}" for stage in range(stages - used + 1, stages + 1)],
    )
    names = ["d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"]
    options = {name: getattr(config, name) for name in names}
    if deformable:
        kind, model = transformers.DeformableDetrConfig, transformers.DeformableDetrForObjectDetection
        options |= {
            "num_feature_levels": config.levels,
            "encoder_n_points": config.encoder_points,
            "decoder_n_points": config.decoder_points,
            "with_box_refine": config.refine,
            "two_stage": config.two_stage,
            "two_stage_num_proposals": config.queries,
            "disable_custom_kernels": True,
        }
    elif config.pre_norm:
        kind, model = transformers.TableTransformerConfig, transformers.TableTransformerForObjectDetection
    else:
        kind, model = transformers.DetrConfig, transformers.DetrForObjectDetection
    return model(
        kind(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone_config=resnet,
            num_labels=config.classes,
            num_queries=config.queries,
            encoder_attention_heads=config.encoder_heads,
            decoder_attention_heads=config.decoder_heads,
            **options,
        )
    ).eval()


def runtime_forwards(
    config: DetrConfig, shape: tuple[int, int, int], dtype: str
) -> tuple[dict[str, Forward], dict[str, str]]:
    """Forward passes by runtime, and why the others are left out; of torch also that of the backbone alone.

    Args:
        shape: images, height and width of the inputs.
        dtype: "float32" or "bfloat16", the latter for torch only.
    """
    if jax.default_backend() != "cpu":
        return {}, dict.fromkeys(NAMES, f"it would run on the CPU and JAX on {jax.default_backend()}")
    try:
        import torch

        model = torch_model(config).to(getattr(torch, dtype))
    except (ImportError, ValueError) as reason:
        return {}, dict.fromkeys(NAMES, str(reason))
    images = torch.randn(shape[0], 3, *shape[1:], dtype=getattr(torch, dtype))
    mask = torch.ones(shape, dtype=torch.bool)

    class Bare(torch.nn.Module):
        """Positional arguments and a tuple of tensors, as exporters want them."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any, mask: Any) -> Any:
            outputs = self.model(pixel_values=images, pixel_mask=mask)
            return outputs.logits, outputs.pred_boxes

    bare = Bare().eval()

    def without_gradients(call: Callable[..., Any]) -> Forward:
        return torch.inference_mode()(lambda: call(images, mask))

    def compiled() -> Forward:
        call = without_gradients(torch.compile(bare))
        call()  # compiles, which may fail
        return call

    found = {"torch": without_gradients(bare), "torch, backbone": without_gradients(model.model.backbone)}
    left_out = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about constants
        path, inputs = Path(folder) / "detector.onnx", {"images": images.float().numpy(), "mask": mask.numpy()}

        def exported() -> Path:
            if dtype != "float32":
                raise ValueError("it is measured in float32 only")
            if not path.exists():
                torch.onnx.export(bare, (images, mask), str(path), input_names=list(inputs), dynamo=True, verbose=False)
            return path

        makers: dict[str, Callable[[], Forward]] = {
            "torch.compile": compiled,
            "onnxruntime": lambda: _onnxruntime(exported(), inputs),
            "OpenVINO": lambda: _openvino(exported(), inputs),
        }
        for name, make in makers.items():
            try:
                found[name] = make()
            except Exception as reason:  # compilers and exporters fail in ways of their own
                left_out[name] = f"{type(reason).__name__}: {str(reason).strip().partition(chr(10))[0]}"
    return found, left_out


def runtime_versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    installed = {}
    for package in ("torch", "transformers", "onnxruntime", "openvino"):
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def _onnxruntime(path: Path, inputs: dict[str, Any]) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def _openvino(path: Path, inputs: dict[str, Any]) -> Forward:
    import openvino

    # Elsewhere than on Intel's newest CPUs it may choose half precision by itself.
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda: model(inputs)
