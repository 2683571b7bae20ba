"""Data sets and the loader whose position is part of a checkpoint."""
