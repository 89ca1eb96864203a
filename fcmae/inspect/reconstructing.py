"""`fcmae reconstruct`: what a pretrained model makes of pictures of which it sees a part."""

from __future__ import annotations

import logging

from PIL import Image

from fcmae.atomic import check_out_file, out_file
from fcmae.config.tools import ReconstructConfig
from fcmae.console import show_logs
from fcmae.data.evaluation import tell_left_out
from fcmae.data.files import find_images, refuse_to_replace
from fcmae.data.loader import HoldoutSet, normalise
from fcmae.inspect import reconstructions as pictures
from fcmae.train.processes import resolve_device
from fcmae.weights.restore import build_model, load_run_checkpoint
from sparse.errors import InputError

_log = logging.getLogger(__name__)


def reconstruct(config: ReconstructConfig) -> float:
    """Write original · masked · reconstruction · pasted of some pictures as one PNG.

    Pictures are cropped at their centre to the size of pretraining. Pixels of hidden patches are
    given their patch's own mean and deviation where the run predicts normalised patches.

    Returns:
        The mean loss over the pictures drawn; 1.0 means that each patch's mean is predicted.

    Raises:
        InputError: no pretraining run, no readable picture, or `out` is no PNG file.
        RunError: `out` could not be written.
    """
    show_logs()
    out = check_out_file(config.out, ".png")
    checkpoint = load_run_checkpoint(config.run)
    device = resolve_device(config.device)
    model, settings = build_model(checkpoint, device)
    files = find_images(config.images, setting="images")
    refuse_to_replace(out, files)
    shown = HoldoutSet(
        files.select(range(min(config.count, len(files)))),
        (settings["img_size"][0], settings["img_size"][1]),
        settings["in_chans"], settings["mask_ratio"], config.seed,
    )  # fmt: skip
    batch = next(shown.batches(config.count), None)
    tell_left_out(shown.bad)
    if batch is None:
        raise InputError(f"images {config.images!r}: none of the first {config.count} can be read")
    images = normalise(batch.images, settings["mean"], settings["std"], device)
    columns, loss = pictures.reconstruct_batch(
        model, images, batch.masks, settings["mean"], settings["std"]
    )
    with out_file(out) as path:
        Image.fromarray(pictures.grid(columns)).save(path, format="PNG")
    _log.info(
        "%s: %d pictures after %d steps, loss %.4f (1.0: only each patch's mean is predicted)",
        out, len(images), checkpoint.state["step"], loss,
    )  # fmt: skip
    return loss
