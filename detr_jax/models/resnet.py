"""ResNet with frozen batch norm, as DETR uses it: stride 32, or with a dilated last stage (DC5).

He et al. 2016, in the form of torchvision (the stride sits on the 3x3 convolution).
"""

import itertools
import operator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.errors import InputError

BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class BackboneConfig:
    """Stage s has `depths[s]` blocks of inner width `widths[s]`; outside a bottleneck block is 4 times as wide."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem_width: int = 64
    dilate_last: bool = False
    """DC5: the last stage keeps its input's resolution; its blocks after the first are dilated by 2."""
    block: Literal["bottleneck", "basic"] = "bottleneck"
    """Three convolutions, as in ResNet-50 and larger ones, or two, as in ResNet-18 and 34."""

    def __post_init__(self) -> None:
        if self.dilate_last and self.block == "basic":
            raise InputError("a ResNet of basic blocks has no dilated last stage (DC5)")

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1

    @property
    def features(self) -> int:
        return self.expansion * self.widths[-1]

    def projects(self, stage: int) -> bool:
        """True if the shortcut of the stage's first block is a convolution, because shapes change."""
        before = self.expansion * self.widths[stage - 1] if stage else self.stem_width
        return self.strides[stage] != 1 or before != self.expansion * self.widths[stage]

    @property
    def stage_features(self) -> tuple[int, ...]:
        return tuple(self.expansion * width for width in self.widths)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring features of each stage; the stem contributes 4."""
        strides = (*self.strides[:-1], 1) if self.dilate_last else self.strides
        return tuple(4 * stride for stride in itertools.accumulate(strides, operator.mul))

    @property
    def stride(self) -> int:
        """Pixels between neighbouring features."""
        return self.stage_strides[-1]


class FrozenBatchNorm(nnx.Module):
    """Batch norm whose statistics never change: an affine map per channel.

    A detector that is trained from scratch takes its statistics from one batch, by a call while `fit` is set.
    """

    def __init__(self, features: int, *, initial_scale: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.full((features,), initial_scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.mean = nnx.BatchStat(jnp.zeros((features,)))
        self.var = nnx.BatchStat(jnp.ones((features,)))
        self.dtype = dtype
        self.fit = False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.fit:
            self.mean[...] = x.mean((0, 1, 2))
            self.var[...] = x.var((0, 1, 2))
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + BATCH_NORM_EPSILON)
        shift = self.bias[...] - self.mean[...] * scale
        return x * scale.astype(self.dtype) + shift.astype(self.dtype)


class ConvNorm(nnx.Module):
    """A convolution without bias, padded by half its (dilated) kernel as torch does, and its batch norm."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        stride: int = 1,
        dilation: int = 1,
        initial_scale: float = 1.0,
    ):
        padding = ((dilation * (size // 2),) * 2,) * 2  # a list could not be hashed
        steps: dict[str, Any] = {"strides": stride, "padding": padding, "kernel_dilation": dilation}
        options: dict[str, Any] = {"kernel_init": nnx.initializers.he_normal(), "dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(features_in, features_out, (size, size), use_bias=False, **steps, **options)
        self.norm = FrozenBatchNorm(features_out, initial_scale=initial_scale, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(_pointwise(self.conv, x) if self.conv.kernel_size == (1, 1) else self.conv(x))


def _pointwise(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """A 1x1 convolution as the matrix product that it is: on CPUs XLA computes products faster than convolutions."""
    x, kernel = conv.promote_dtype((x, conv.kernel[...]), dtype=conv.dtype)
    return x[:, :: conv.strides, :: conv.strides] @ kernel[0, 0]


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; four times `width` features outside."""

    def __init__(
        self, features_in: int, width: int, *, stride: int, dilation: int, project: bool, dtype: Any, rngs: nnx.Rngs
    ):
        conv, features_out = partial(ConvNorm, dtype=dtype, rngs=rngs), 4 * width
        self.conv1 = conv(features_in, width, 1)
        self.conv2 = conv(width, width, 3, stride=stride, dilation=dilation)
        # Small branches at the start train faster from scratch, most of all where batch norm is frozen.
        self.conv3 = conv(width, features_out, 1, initial_scale=0.2)
        self.downsample = conv(features_in, features_out, 1, stride=stride) if project else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv3(jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return jax.nn.relu(y + shortcut)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions around a shortcut; `width` features inside and outside."""

    def __init__(
        self, features_in: int, width: int, *, stride: int, dilation: int, project: bool, dtype: Any, rngs: nnx.Rngs
    ):
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.conv1 = conv(features_in, width, 3, stride=stride, dilation=dilation)
        self.conv2 = conv(width, width, 3, initial_scale=0.2)
        self.downsample = conv(features_in, width, 1, stride=stride) if project else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv2(jax.nn.relu(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return jax.nn.relu(y + shortcut)


_BLOCKS: dict[str, Any] = {"bottleneck": Bottleneck, "basic": BasicBlock}


class ResNet(nnx.Module):
    """The convolutional backbone: (batch, height, width, 3) -> (batch, height / stride, width / stride, features)."""

    remat = False
    """Compute every block again for its gradient, which saves the memory of what is inside."""

    def __init__(self, config: BackboneConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, config.stem_width, 7, stride=2, dtype=dtype, rngs=rngs)
        features = config.stem_width
        stages = []
        for index, (depth, width, stride) in enumerate(zip(config.depths, config.widths, config.strides, strict=True)):
            block = partial(_BLOCKS[config.block], width=width, dtype=dtype, rngs=rngs)
            dilated = config.dilate_last and index == len(config.depths) - 1
            first = block(features, stride=1 if dilated else stride, dilation=1, project=config.projects(index))
            features = config.expansion * width
            dilation = 2 if dilated else 1
            others = [block(features, stride=1, dilation=dilation, project=False) for _ in range(depth - 1)]
            stages.append(nnx.List([first, *others]))
        self.stages = nnx.List(stages)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        return self.pyramid(pixel_values)[-1]

    def pyramid(self, pixel_values: jax.Array) -> list[jax.Array]:
        """Features after each stage."""
        x = jax.nn.relu(self.stem(pixel_values))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        features = []
        for stage in self.stages:
            for block in stage:
                x = jax.checkpoint(block.__call__)(x) if self.remat else block(x)
            features.append(x)
        return features
