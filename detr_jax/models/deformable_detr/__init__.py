"""Deformable DETR (Zhu et al. 2021): feature maps of several strides, of which attention samples a few points."""
