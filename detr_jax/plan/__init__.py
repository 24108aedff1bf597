"""Plans: objects, files, checks, migrations."""

from detr_jax.plan.file import load_plan, push_plan, save_plan
from detr_jax.plan.plan import Plan

__all__ = ["Plan", "load_plan", "push_plan", "save_plan"]
