"""`fcmae reconstruct`: what a pretrained model makes of images of which it sees a part."""

from __future__ import annotations

import logging

from PIL import Image

from fcmae.atomic import check_out_file, out_file
from fcmae.commands.reconstruct import ReconstructConfig
from fcmae.console import show_logs
from fcmae.data.evaluation import report_skipped
from fcmae.data.file_list import find_images, refuse_to_replace
from fcmae.data.holdout import HoldoutSet
from fcmae.data.sample import normalise
from fcmae.inspect.reconstructions import grid, reconstruct_batch
from fcmae.train.processes import resolve_device
from fcmae.weights.load import load_pretrained
from sparse.errors import InputError

_log = logging.getLogger(__name__)


def reconstruct(config: ReconstructConfig) -> float:
    """Write original · masked · reconstruction · pasted of some images as one PNG.

    Images are cropped at their centre to the size of pretraining. Pixels of hidden patches are
    given their patch's own mean and deviation where the run predicts normalised patches.

    Returns:
        The mean loss over the images drawn; 1.0 means that each patch's mean is predicted.

    Raises:
        InputError: no pretraining run, no readable image, or `out` is no PNG file.
        RunError: `out` could not be written.
    """
    show_logs()
    out = check_out_file(config.out, ".png")
    device = resolve_device(config.device)
    model, preprocessing, settings, step = load_pretrained(config.run, device)
    files = find_images(config.images, setting="images")
    refuse_to_replace(out, files)
    shown = HoldoutSet(
        files.select(range(min(config.count, len(files)))), preprocessing.img_size,
        settings["in_chans"], settings["mask_ratio"], config.seed,
    )  # fmt: skip
    batch = next(shown.batches(config.count), None)
    report_skipped(shown.bad)
    if batch is None:
        raise InputError(f"images {config.images!r}: none of the first {config.count} can be read")
    images = normalise(batch.images, preprocessing.mean, preprocessing.std, device)
    assert batch.masks is not None
    columns, loss = reconstruct_batch(model, images, batch.masks, preprocessing)
    with out_file(out) as path:
        Image.fromarray(grid(columns)).save(path, format="PNG")
    _log.info(
        "%s: %d images after %d steps, loss %.4f (1.0: only each patch's mean is predicted)",
        out, len(images), step, loss,
    )  # fmt: skip
    return loss
