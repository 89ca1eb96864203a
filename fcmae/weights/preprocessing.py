"""How images were prepared for given weights."""

from pathlib import Path

from fcmae.data.statistics import Preprocessing
from fcmae.train.checkpoint import STATE
from fcmae.weights.read import CONFIG_FILE, read_json


def read_preprocessing(weights_file: Path) -> Preprocessing | None:
    """Return how images were prepared, from the state.json of a checkpoint or the config.json of a
    timm folder beside the weights; None where neither says.

    Raises:
        InputError: the file is there and damaged.
    """
    settings = read_json(weights_file.with_name(STATE)).get("settings")
    if settings is not None:
        augment = settings.get("augment", {})
        size = settings.get("img_size")
        size = [size, size] if isinstance(size, int) else size
        mean = settings.get("mean", augment.get("mean"))
        std = settings.get("std", augment.get("std"))
    else:
        config = read_json(weights_file.with_name(CONFIG_FILE))
        config = config.get("pretrained_cfg", config)  # timm's older, flat form
        size = config.get("input_size", [])[1:]
        mean, std = config.get("mean"), config.get("std")
    if not all(isinstance(values, list) and values for values in (size, mean, std)):
        return None
    return Preprocessing((size[0], size[1]), tuple(mean), tuple(std))
