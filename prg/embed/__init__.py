"""Many images to vectors: where the images come from, what computes them, and the partitions they are written to."""
