"""From a folder of pictures to batches: files, decoding, crops, and the loader."""
