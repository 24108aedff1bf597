"""Configuration of a Deformable DETR."""

from dataclasses import dataclass, replace

from detr_jax.errors import InputError
from detr_jax.models.detr.config import DetrConfig


@dataclass(frozen=True)
class DeformableDetrConfig(DetrConfig):
    """As of a DETR; there are `len(labels)` logits, none of them of "no object".

    The stride of its preprocessing is 1: group norms see padding, so outputs depend on it.
    """

    encoder_ffn_dim: int = 1024
    decoder_ffn_dim: int = 1024
    queries: int = 300
    levels: int = 4
    """Feature maps ..."""
    backbone_levels: int = 3
    """... of which so many are of the backbone's last stages; each of the others halves the one before."""
    encoder_points: int = 4
    """Locations that a query of a layer samples, for each head in each level."""
    decoder_points: int = 4
    refine: bool = False
    """Every decoder layer samples around the boxes of the one before it (iterative box refinement)."""
    two_stage: bool = False
    """Object queries are the best boxes that a head predicts for image tokens, not learned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocessing", replace(self.preprocessing, stride=1))
        if self.pre_norm:
            raise InputError("layers of a Deformable DETR here are post-norm")
        if not 1 <= self.backbone_levels <= min(self.levels, len(self.backbone.depths)):
            stages = len(self.backbone.depths)
            raise InputError(f"{self.levels} levels cannot have {self.backbone_levels} of {stages} backbone stages")
        if self.two_stage and not self.refine:
            raise InputError("a two-stage Deformable DETR has box refinement")

    @property
    def logits(self) -> int:
        return self.classes

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens of each level."""
        backbone = self.backbone.stage_strides[-self.backbone_levels :]
        return *backbone, *(backbone[-1] * 2 ** (1 + i) for i in range(self.levels - self.backbone_levels))

    @property
    def heads(self) -> int:
        """Pairs of a class head and a box head: one a decoder layer, and one for the boxes of image tokens."""
        return self.decoder_layers + self.two_stage
