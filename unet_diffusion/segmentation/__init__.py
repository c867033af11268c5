"""Segmentation beside the network: targets, tiles, border weights, deformations, scores, and a start from denoisers."""
