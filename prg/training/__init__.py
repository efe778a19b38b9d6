"""Data, augmentation and the loops that train."""
