"""Conditional DETR (Meng et al. 2021): DETR with another decoder, and without "no object"."""
