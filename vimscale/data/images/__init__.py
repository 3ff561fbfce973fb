"""Pixels: decoding, augmentation, its policies, and mixing of images."""
