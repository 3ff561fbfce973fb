"""One image or one batch of images: decoding, augmentation, its policies, erasing and mixing.

Imports recipe, storage and errors; data and prepare import it.
"""
