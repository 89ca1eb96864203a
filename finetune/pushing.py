"""`fcmae push`: a model and its card, on the Hugging Face Hub."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fcmae import __version__
from fcmae.atomic import atomic_write
from fcmae.commands.push import PushConfig
from fcmae.config.fields import runtime_keys
from fcmae.config.files import read_yaml
from fcmae.config.pretraining import PretrainConfig
from fcmae.config.values import flatten
from fcmae.data.find import load_source
from fcmae.data.statistics import default_preprocessing
from fcmae.train.run_folder import read_lines
from fcmae.train.run_paths import WHOLE_MODEL
from fcmae.weights.export import export_folder
from fcmae.weights.hub import HUB, OFFICIAL_LICENSE, license_of, run_of, start_of, state_of
from fcmae.weights.load import find_weights, load_weights, read_preprocessing
from fcmae.weights.read import CONFIG_FILE, WEIGHTS_FILE, first_line, read_json
from finetune.config import FinetuneConfig
from finetune.train import NO_SCORES
from sparse.convert import encoder_part
from sparse.errors import InputError, RunError

MOST_SHOWN = 50
"""Names of outputs, and scores, in a card."""

KINDS = {
    "classify": "image-classification",
    "multilabel": "image-classification",
    "segment": "image-segmentation",
    "detect": "object-detection",
    "instances": "image-segmentation",
}
"""What the Hub calls a task, where it has a name for it."""

PLACES = ("data", "out", "labels", "weights", "init_from")
"""Settings that name files of a machine."""


def push(config: PushConfig) -> str:
    """Upload a timm folder with a card and return its address.

    Raises:
        InputError: wrong weights, name or licence; not logged in; or the repository exists.
        RunError: the Hub did not take it.
    """
    from huggingface_hub import HfApi, ModelCard, get_token
    from huggingface_hub import utils as hub_utils
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    check_name: Any = hub_utils.validate_repo_id  # type: ignore[attr-defined]
    try:
        check_name(config.repo)
        named = config.repo.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise InputError(f"repo {config.repo!r} is no name on the Hub: use USER/NAME")
    file = find_weights(config.source)
    came_with = license_of(file)
    if came_with not in (None, config.license):
        where = "an official release" if came_with == OFFICIAL_LICENSE else "others"
        raise InputError(
            f"license {config.license!r}: the weights started from those of {where}, which are "
            f"{came_with}: use --license {came_with}"
        )
    if get_token() is None:
        raise InputError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = gather(file, folder, config.license)
        text = card(config, file, described, official=came_with == OFFICIAL_LICENSE)
        with atomic_write(folder / "README.md") as path:
            path.write_text(text, encoding="utf-8")
        api = HfApi()
        try:
            ModelCard(text).validate()
            private = not config.public
            place = api.create_repo(config.repo, private=private, exist_ok=config.update)
            api.upload_folder(
                repo_id=config.repo, folder_path=folder, commit_message="fcmae push",
                delete_patterns="*",
            )  # fmt: skip
        except HfHubHTTPError as error:
            if error.response.status_code == 409:
                raise InputError(
                    f"repo {config.repo!r} exists: give another name, or --update true"
                ) from error
            raise RunError(f"the Hub refused {config.repo!r}: {first_line(error)}") from error
        except ValueError as error:  # of the card
            raise InputError(f"the Hub refused the card: {' '.join(str(error).split())}") from error
        except Exception as error:  # of the client's HTTP library, which versions differ in
            raise RunError(f"the Hub could not be reached: {first_line(error)}") from error
    print(f"{place}: written; load it with --weights hf:{config.repo}")
    return str(place)


def gather(file: Path, folder: Path, licence: str) -> dict[str, Any]:
    """Write a timm folder of weights to a folder, and return its config.json."""
    own = read_json(file.with_name(CONFIG_FILE))
    if own.get("architecture"):
        for part in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(file.with_name(part), folder / part)
        _state_license(folder / CONFIG_FILE, licence)
        if (file.parent / WHOLE_MODEL).is_dir():
            shutil.copytree(file.parent / WHOLE_MODEL, folder / WHOLE_MODEL)
            own = read_json(folder / WHOLE_MODEL / CONFIG_FILE)
        return own
    weights = load_weights(file)
    kind = weights.architecture
    images = read_preprocessing(file) or default_preprocessing(kind.in_chans)
    export_folder(encoder_part(weights.state), kind, folder, images, licence)
    return read_json(folder / CONFIG_FILE)


def _state_license(file: Path, licence: str) -> None:
    """Write the licence into a timm folder's config.json, where `license_of` finds it."""
    values = read_json(file)
    values["pretrained_cfg"] = {**values.get("pretrained_cfg", {}), "license": licence}
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def card(config: PushConfig, file: Path, described: Mapping[str, Any], official: bool) -> str:
    """The text of a model card.

    Args:
        config: of the command.
        file: the weights.
        described: config.json of the whole model.
        official: whether the licence is that of an official release.
    """
    from huggingface_hub import ModelCardData

    names, task = described.get("label_names", []), described.get("task", "classify")
    classifies, about = bool(names) and task == "classify", described["pretrained_cfg"]
    kind = KINDS.get(task) if names else "image-feature-extraction"
    front = ModelCardData(
        license=config.license, library_name="timm", pipeline_tag=kind, tags=["fcmae", "convnextv2"]
    )
    channels, height, width = about["input_size"]
    fields = {
        "front": front.to_yaml(), "name": config.repo.partition("/")[2], "repo": config.repo,
        "architecture": described["architecture"], "version": __version__, "names": names,
        "task": task, "classifies": classifies, "most": MOST_SHOWN, "channels": channels,
        "height": height, "width": width, "mean": about["mean"], "std": about["std"],
        "license": config.license, "official": official,
        "data_source": config.data_source, **_of_run(file),
    }  # fmt: skip
    loader = PackageLoader("finetune")
    template = Environment(loader=loader, undefined=StrictUndefined).get_template("card.md")
    return template.render(fields) + "\n"


def _of_run(file: Path) -> dict[str, Any]:
    """What the run that weights are in says of them; little, if they are in none."""
    found: dict[str, Any] = {"start": "not recorded", "images": 0, "scores": [], "recipe": []}
    paths = run_of(file)
    if paths is None:
        return found
    settings = flatten(read_yaml(paths.config))
    start = start_of(paths)
    trained = next(filter(Path.is_file, map(paths.images, ("train", "all"))), None)
    last = {key: value for line in read_lines(paths.metrics) for key, value in line.items()}
    scores = state_of(paths).get("best") or {
        key: value for key, value in last.items() if re.search("loss|probe", key)
    }
    kind = FinetuneConfig if "weights" in settings else PretrainConfig
    dull = {*PLACES, *runtime_keys(kind)}
    return {
        "start": _named(start),
        "images": len(load_source(trained, check=False)) if trained else 0,
        "scores": [
            (key, value)
            for key, value in scores.items()
            if isinstance(value, int | float) and key not in NO_SCORES
        ][:MOST_SHOWN],
        "recipe": [
            (key, value)
            for key, value in settings.items()
            if key.partition(".")[0] not in dull and value not in (None, "", [], "auto", "none")
        ],
    }


def _named(start: str | None) -> str:
    """What a run started from, without folders of a machine."""
    if start is None:
        return "random weights"
    return start if start.startswith(HUB) else Path(start).name
