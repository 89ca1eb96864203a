"""`fcmae reconstruct`: what a pretrained model makes of images of which it sees a part."""

from __future__ import annotations

import logging
from dataclasses import replace

from PIL import Image

from fcmae.atomic import check_out_file, out_file
from fcmae.commands.reconstruct import ReconstructConfig
from fcmae.console import show_logs
from fcmae.data.evaluation import each_batch, held_out_masks, report_skipped
from fcmae.data.file_list import find_images, refuse_to_replace
from fcmae.data.labelled import Split
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
    shown = files.select(range(min(config.count, len(files))))
    whole = replace(preprocessing, crop_pct=1.0)
    ((batch, images),) = each_batch(Split(shown), whole, device, len(shown), workers=0)
    report_skipped(batch.bad)
    if not len(batch):
        raise InputError(f"images {config.images!r}: none of the first {config.count} can be read")
    size, ratio = preprocessing.img_size, settings["mask_ratio"]
    masks = held_out_masks(shown, batch.indices, size, ratio, config.seed)
    columns, loss = reconstruct_batch(model, images, masks, preprocessing)
    with out_file(out) as path:
        Image.fromarray(grid(columns)).save(path, format="PNG")
    _log.info(
        "%s: %d images after %d steps, loss %.4f (1.0: only each patch's mean is predicted)",
        out, len(images), step, loss,
    )  # fmt: skip
    return loss
