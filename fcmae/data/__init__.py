"""From sources of images to batches: finding, reading, cropping and ordering images."""
