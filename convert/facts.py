"""Facts beside the weights: Hugging Face's `config.json` and `preprocessor_config.json`, the official `args`.

Every key that changes what a detector computes is applied, compared with the weights, or refused by its name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detr_jax.errors import InputError
from detr_jax.models import Preprocessing
from detr_jax.models.preprocessing import Filter

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"

# Keys that change the function, and the values that they may have, the usual one first. Missing or null means that.
_DETR = {
    "model_type": ("detr", "table-transformer", "conditional_detr", "deformable_detr"),
    "activation_function": ("relu",),
    "position_embedding_type": ("sine",),
    "num_channels": (3,),
    "scale_embedding": (False,),
}
_OFFICIAL = {"activation": ("relu",), "position_embedding": ("sine", "v2")}
_RESNET = {
    "hidden_act": ("relu",),
    "layer_type": ("bottleneck", "basic"),
    "num_channels": (3,),
    **dict.fromkeys(("downsample_in_first_stage", "downsample_in_bottleneck"), (False,)),
}
_TIMM = {"num_channels": (3,), "in_chans": (3,), "features_only": (True,)}
_PREPROCESSING = {
    **{"do_center_crop": (False,), "do_convert_rgb": (True,)},
    **dict.fromkeys(("size_divisor", "crop_size"), (None,)),
}
_APPLIED = {
    *("do_resize", "size", "max_size", "resample"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
}
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "format", "device"),
    *("do_pad", "pad_and_return_pixel_mask", "pad_size"),  # padding is masked: a detector does not see it
    *("do_convert_annotations", "return_segmentation_masks", "masks_path", "return_tensors", "default_to_square"),
    *("data_format", "input_data_format", "disable_grouping", "_valid_processor_keys", "image_seq_length"),
}
_SAME_NAMES = ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")
_SIZES = {key: key for key in (*_SAME_NAMES, "pre_norm")} | {"num_queries": "queries", "normalize_before": "pre_norm"}
"""Keys that the weights tell too -> fields of our configuration."""
_DEFORMABLE_SIZES = {
    "num_feature_levels": "levels",
    "encoder_n_points": "encoder_points",
    "decoder_n_points": "decoder_points",
    "with_box_refine": "refine",
    "two_stage": "two_stage",
}
"""The same of Deformable DETR's."""
_OFFICIAL_SIZES = {
    "pre_norm": "pre_norm",
    "num_feature_levels": "levels",
    "enc_n_points": "encoder_points",
    "dec_n_points": "decoder_points",
    "with_box_refine": "refine",
    "two_stage": "two_stage",
}
"""Those of the training arguments."""
_RESNETS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
"""Kind and number of the blocks of each."""
_FILTERS: tuple[Filter, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Of Pillow, by their numbers."""
_SIZE_FORMS = {
    ("shortest_edge", "longest_edge"): "transformers",
    ("max_height", "max_width"): "fit",
    ("height", "width"): "stretch",
}
"""Keys of `size`, and how images are resized then."""


@dataclass(frozen=True)
class Facts:
    """Facts about a detector that the entries of its checkpoint cannot tell; None where nothing else told it either.

    Attributes:
        model_type: that of Hugging Face's configuration.
        dilation: whether the last stage is dilated (DC5).
        labels: class names.
        sizes: fields of the configuration and their values, which the entries must agree with, by the key of the file.
    """

    model_type: str | None = None
    dilation: bool | None = None
    labels: tuple[str, ...] | None = None
    encoder_heads: int | None = None
    decoder_heads: int | None = None
    preprocessing: Preprocessing | None = None
    sizes: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


def read_facts(folder: Path) -> Facts:
    """Facts from Hugging Face's files in a folder; none where there are no such files.

    Raises:
        InputError: if a file is no JSON object or describes a function that is not supported.
    """
    facts = _config_facts(folder / CONFIG) if (folder / CONFIG).is_file() else Facts()
    if (folder / PREPROCESSOR).is_file():
        facts = replace(facts, preprocessing=_preprocessing(folder / PREPROCESSOR, facts.model_type))
    return facts


def official_facts(path: Path, arguments: Mapping[str, Any], beside: Facts) -> Facts:
    """Facts from the training arguments of an official file, and from the files beside it.

    Raises:
        InputError: if the arguments describe an unsupported function or contradict the files beside it.
    """
    _require(f"{path}: args", arguments, _OFFICIAL)
    keys = {"dilation": "dilation", "encoder_heads": "nheads", "decoder_heads": "nheads"}
    told = {name: arguments[key] for name, key in keys.items() if arguments.get(key) is not None}
    for name, value in told.items():
        if (other := getattr(beside, name)) not in (None, value):
            raise InputError(f"{path} says that {name} is {value}, but {path.parent / CONFIG} says {other}")
    names = dict(_OFFICIAL_SIZES)
    if arguments.get("two_stage"):  # its entries have no queries to count
        names["num_queries"] = "queries"
    stated = {f"args.{key}": (name, arguments[key]) for key, name in names.items() if arguments.get(key) is not None}
    return replace(beside, **told, sizes={**beside.sizes, **stated})


def _config_facts(path: Path) -> Facts:
    values = _read(path)
    _require(path, values, _DETR)
    try:
        names = {int(index): str(name) for index, name in (values.get("id2label") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: id2label must map numbers to names: {error}") from error
    if sorted(names) != list(range(len(names))):
        raise InputError(f"{path}: id2label must name the classes 0 to {len(names) - 1}, but has {sorted(names)}")
    labels = tuple("" if names[index] == "N/A" else names[index] for index in range(len(names)))
    dilation, sizes = _backbone_facts(path, values)
    fields = _SIZES
    if values.get("model_type") == "deformable_detr":
        fields = fields | _DEFORMABLE_SIZES
        if values.get("two_stage"):  # its entries have no queries to count
            fields = {key: name for key, name in fields.items() if key != "num_queries"}
            fields |= {"two_stage_num_proposals": "queries"}
    sizes |= {key: (name, values[key]) for key, name in fields.items() if values.get(key) is not None}
    encoder, decoder = (values.get(f"{part}_attention_heads") or 8 for part in ("encoder", "decoder"))
    return Facts(values.get("model_type"), dilation, labels or None, encoder, decoder, sizes=sizes)


def _backbone_facts(path: Path, values: Mapping[str, Any]) -> tuple[bool, dict[str, tuple[str, Any]]]:
    """Dilation of the last stage, and the sizes that the weights must have."""
    where, dilation = f"{path}: backbone_config", bool(values.get("dilation"))
    backbone = values.get("backbone_config") or {}
    _require(where, backbone, {"model_type": ("timm_backbone", "resnet")})
    if backbone.get("model_type") == "resnet":
        _require(where, backbone, _RESNET, "a ResNet here")
        widths, depths = backbone.get("hidden_sizes"), backbone.get("depths")
        stages, expansion = len(depths or (3, 4, 6, 3)), 1 if backbone.get("layer_type") == "basic" else 4
        _require_last(where, backbone, "out_features", f"stage{stages}")
        _require_last(where, backbone, "out_indices", stages)
        if dilation:
            raise InputError(f"{path}: dilation is true, which only backbones of timm have")
        told = {
            "depths": ("depths", depths and tuple(depths)),
            "embedding_size": ("stem_width", backbone.get("embedding_size")),
            "hidden_sizes": ("widths", widths and tuple(width // expansion for width in widths)),
            "layer_type": ("block", backbone.get("layer_type")),
        }
        return False, {f"backbone_config.{key}": told[key] for key in told if told[key][1] is not None}
    options = {**(values.get("backbone_kwargs") or {}), **backbone}
    _require(where, options, _TIMM, "a ResNet here")
    _require_last(where, options, "out_indices", 4)
    if (stride := options.get("output_stride") or (16 if dilation else 32)) not in (16, 32):
        raise InputError(f"{where}: output_stride is {stride!r}, but a DETR here has 32, or 16 where dilated")
    name = backbone.get("backbone") or values.get("backbone")
    if name is None:
        return stride == 16, {}
    known = str(name).partition(".")[0].rpartition("/")[2].replace("-", "")
    if known not in _RESNETS:
        raise InputError(f"{path}: backbone is {name!r}, but a DETR here has {', '.join(_RESNETS)}")
    block, blocks = _RESNETS[known]
    return stride == 16, {"backbone": ("depths", blocks), "the block of the backbone": ("block", block)}


def _preprocessing(path: Path, model_type: str | None) -> Preprocessing:
    values = {key: value for key, value in _read(path).items() if value is not None}
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "DetrImageProcessor")
    if not kind.startswith(("Detr", "ConditionalDetr", "DeformableDetr")):
        raise InputError(f"{path}: {kind} is not the preprocessing of a DETR")
    _require(path, values, _PREPROCESSING, "the preprocessing here")
    if model_type == "deformable_detr":
        _require(path, values, {"pad_size": ()}, "a Deformable DETR here, which sees padding,")
    if unknown := values.keys() - _PREPROCESSING.keys() - _APPLIED - _WITHOUT_EFFECT:
        key = min(unknown)
        raise InputError(f"{path}: {key} is {values[key]!r}, which the preprocessing here does not know")
    defaults = Preprocessing()
    rescale, mean, std = 1.0, (0.0,) * 3, (1.0,) * 3
    if values.get("do_rescale", True):
        rescale = values.get("rescale_factor", defaults.rescale)
        if type(rescale) not in (int, float):
            raise InputError(f"{path}: rescale_factor is {rescale!r}, not a number")
    if values.get("do_normalize", True):
        mean, std = (values.get(f"image_{name}", getattr(defaults, name)) for name in ("mean", "std"))
        for key, numbers in (("image_mean", mean), ("image_std", std)):
            if not isinstance(numbers, list | tuple) or [type(n) in (int, float) for n in numbers] != [True] * 3:
                raise InputError(f"{path}: {key} is {numbers!r}, not 3 numbers")
    if rescale <= 0 or min(std) <= 0:
        raise InputError(f"{path}: rescale_factor and image_std must be above 0, not {rescale} and {list(std)}")
    resample = values.get("resample", 2)
    if resample not in range(len(_FILTERS)):
        raise InputError(f"{path}: resample is {resample!r}, but the filters of Pillow are 0 to {len(_FILTERS) - 1}")
    pixels = Preprocessing(mean=tuple(map(float, mean)), std=tuple(map(float, std)), rescale=float(rescale))
    return replace(pixels, resample=_FILTERS[resample], **_resizing(path, values))


def _resizing(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing` that say to which size images are resized."""
    if not values.get("do_resize", True):
        return {"resize": "none"}
    size = values.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    if type(size) is int:
        size = {"shortest_edge": size, "longest_edge": values.get("max_size", 1333)}
    keys = set(size) if isinstance(size, dict) else set()
    if keys == {"longest_edge"}:  # as Table Transformer's code means it; newer versions of transformers refuse it
        keys, size = {"shortest_edge", "longest_edge"}, dict.fromkeys(("shortest_edge", "longest_edge"), *size.values())
    form = next((form for form in _SIZE_FORMS if set(form) == keys), None)
    if form is None:
        forms = "; ".join(" and ".join(form) for form in _SIZE_FORMS)
        raise InputError(f"{path}: size is {size!r}; it must be a number or have {forms}; or longest_edge alone")
    first, second = (size[key] for key in form)
    if not all(type(side) is int and side > 0 for side in (first, second)):
        raise InputError(f"{path}: size is {size!r}; its sides must be whole numbers above 0")
    kind = _SIZE_FORMS[form]
    if kind == "transformers":
        return {"resize": kind, "shortest_side": first, "longest_side": second}
    return {"resize": kind, "box": (first, second)}


def _require(
    where: Path | str, values: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]], owner: str = "a DETR here"
) -> None:
    for key, right in allowed.items():
        if (found := values.get(key)) is not None and found not in right:
            raise InputError(f"{where}: {key} is {found!r}, but {owner} has {' or '.join(map(repr, right))}")


def _require_last(where: str, values: Mapping[str, Any], key: str, last: Any) -> None:
    if (found := (values.get(key) or [last])[-1]) not in (last, -1):
        raise InputError(f"{where}: {key} ends with {found!r}, but a DETR here takes {last!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, not an object")
    return values
