"""From sources of images to batches: where images are, how they are read, crops, and order."""
