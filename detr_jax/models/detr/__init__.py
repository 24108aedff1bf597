"""DETR (Carion et al. 2020): architecture, presets, post-processing."""
