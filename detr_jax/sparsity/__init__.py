"""Which hidden neurons are computed: gates, their statistics and thresholds, and plans."""

from detr_jax.sparsity.gates import LinearGate
from detr_jax.sparsity.plan import Plan, load_plan, save_plan

__all__ = ["LinearGate", "Plan", "load_plan", "save_plan"]
