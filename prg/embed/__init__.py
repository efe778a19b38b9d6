"""Many images to vectors: which images, what computes them, and where the vectors go."""
