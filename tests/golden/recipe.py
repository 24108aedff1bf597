"""Deterministic checkpoint values for parity tests: numpy only, one stream per entry name.

The golden arrays beside this file were produced by the official PyTorch DETR
(facebookresearch/detr, commit 29901c5, torch 2.13, float32, CPU) after every
floating-point entry of its state dict was set to `fill(name, shape)` cast to
float32. Any implementation that loads a checkpoint made with this recipe must
reproduce them. `*_keys.json` lists the names and shapes to fill, in the
official order; integer entries do not exist in these models.
"""

import zlib

import numpy as np


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value (float64) of the official checkpoint entry `key` with `shape`."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        return rng.uniform(0.8, 1.2, shape)
    if key.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if ".bn" in key or ".downsample.1." in key or "norm" in key:
        noise = 0.1 * rng.standard_normal(shape)
        return 1 + noise if key.endswith("weight") else noise
    if key.endswith("bias"):
        return 0.05 * rng.standard_normal(shape)
    if key == "query_embed.weight":
        return 4.0 * rng.standard_normal(shape)
    fan_in = int(np.prod(shape[1:]))
    gain = np.sqrt(2.0) if "backbone" in key else 1.0
    if key == "input_proj.weight":
        gain = 4.0
    if "conv3" in key:
        gain *= 0.3
    w = gain / np.sqrt(fan_in) * rng.standard_normal(shape)
    if key.endswith("in_proj_weight"):  # rows: query, key, value
        d = shape[0] // 3
        w[: 2 * d] *= 2.0
        w[2 * d :] *= 0.5
    if key.endswith("out_proj.weight"):
        w *= 0.5
    if len(shape) == 4:  # zero-sum filters keep the spatial contrast alive
        w = w - w.mean(axis=(1, 2, 3), keepdims=True)
    return w
