"""Which part of an FFN is computed: selectors, the statistics and thresholds behind them, and plans."""

from detr_jax.plan.plan import Plan, load_plan, push_plan, save_plan

__all__ = ["Plan", "load_plan", "push_plan", "save_plan"]
