"""Semantic segmentation: labels of every pixel, a U-Net decoder, answers that can be scored again, and scores."""
