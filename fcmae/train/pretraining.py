"""Pretraining as a task for the training script: from unlabeled images to an encoder."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fcmae import rng
from fcmae.config.pretraining import PretrainConfig
from fcmae.config.values import height_width
from fcmae.data.file_list import FileList, find_images
from fcmae.data.find import find_source
from fcmae.data.labelled import LabelledData, Split, find_labelled
from fcmae.data.loader import PretrainDataset
from fcmae.data.sample import Batch, normalise
from fcmae.data.sources import FEWEST_TO_HOLD_OUT, Source, split_holdout
from fcmae.data.windows import (
    Held,
    Windows,
    hold_out_windows,
    random_windows,
    split_windows,
    taken_places,
)
from fcmae.inspect.watch import make_watchers
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import check_mask_ratio, grid_of, keep_count
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.plan import AutoEpochs
from fcmae.train.resume import stored_source
from fcmae.train.run_folder import RunFolder
from fcmae.train.script import train
from fcmae.train.task import Images, Task
from fcmae.weights.export import export_folder
from fcmae.weights.hub import known_license
from fcmae.weights.load import init_encoder
from sparse import SparseConvNeXtV2
from sparse.encoder import init_fan_in
from sparse.engines import get_engine
from sparse.engines.base import Layout
from sparse.errors import InputError
from sparse.layouts import infer_architecture
from sparse.sizes import resolve_size

ALL_IMAGES = "all"
"""The list of all images of a run, including those held out; see `RunPaths.images`."""

FEW_IMAGES = 10_000
FEW_PATCHES = 16
"""With fewer in an image, smaller ones are advised."""

PATCH_SIZES = (8, 16, 32)

_log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> int:
    """Pretrain, or resume the run in `config.out`; see `fcmae.train.script.train`."""
    return train(Pretraining(config))


class Pretraining(Task):
    """FCMAE on unlabeled images."""

    command = "pretrain"
    auto_epochs = AutoEpochs(crops=1_200_000, fewest=100, most=800, multiple=10)
    """More crops of a small data set improve little; see docs/recipes.md."""

    config: PretrainConfig
    model: FCMAE

    def check(self, device: torch.device) -> tuple[int, int]:
        config = self.config
        img_size = height_width(config.img_size)
        if config.patch_size not in PATCH_SIZES:
            raise InputError(f"patch_size {config.patch_size} must be one of 32, 16 and 8")
        grid = grid_of(img_size, config.patch_size)
        check_mask_ratio(config.mask_ratio, grid, config.patch_size)
        resolve_size(config.model, config.depths, config.dims)
        self._engine = get_engine(config.engine, device.type, compiled=config.compile)
        return img_size

    def find_images(self, start: SavedCheckpoint | None) -> Images:
        config, probe, began = self.config, self.config.probe, time.perf_counter()
        if start is None:
            files = find_source(config.data, exclude=config.out)
        else:
            files = stored_source(start, ALL_IMAGES)
            if isinstance(files, FileList):
                added = len(find_images(config.data, exclude=config.out)) - len(files)
                if added > 0:
                    _log.info("%d files added since the run began are ignored", added)
        if config.window is None:
            train_places, held_places = split_holdout(files, config.holdout)
            self._held: Source = files.select(held_places)
            self._windows = list[Held]()
        else:
            saved = None if start is None else start.state.get("windows")
            self._windows = hold_out_windows(files, config) if saved is None else saved
            train_places, self._held = split_windows(files, self._windows, config.window)
        if config.window is None and config.holdout >= len(files) >= FEWEST_TO_HOLD_OUT:
            raise InputError(
                f"holdout {config.holdout} leaves none of {len(files)} images to train on: use 32"
            )
        seconds, parts = time.perf_counter() - began, "windows" if config.window else "of them"
        held = f"{len(self._held)} {parts} are held out"
        _log.info(f"found {len(files)} images in {seconds:.1f} s, {held}")
        train_places = np.repeat(train_places, config.crops_per_image)
        self._labelled: LabelledData | None = None
        probed: list[Source] = []
        if probe.data is not None:
            self._labelled = find_labelled(probe.data, probe.val_fraction, exclude=config.out)
            probed = [self._labelled.train.source, self._labelled.val.source]
        train, side = files.select(train_places), config.window
        windows = None if side is None else random_windows(train, config.seed, side)
        return Images(train, {ALL_IMAGES: files}, probed, windows)

    def build_model(self) -> FCMAE:
        # A resumed run no longer needs its initial weights.
        config = replace(self.config, init_from=None) if self.resolved.start else self.config
        world = self.resolved.world
        model = build_model(config).to(world.device)
        # DDP keeps nodes of autograd on the default stream, which a recording must not wait for.
        fits = world.size == 1 and not config.compile and not config.drop_path
        model.cuda_graph = config.cuda_graph and fits
        return model

    def begin(self) -> None:
        self._watchers = make_watchers(
            self.config, self.resolved, self._held, self._labelled, self.folder
        )

    def announcement(self) -> list[str]:
        config, encoder = self.config, self.model.encoder
        named = config.depths is None and config.dims is None
        name = config.model if named else f"of depths {encoder.depths} and dims {encoder.dims}"
        h, w = grid_of(self.resolved.images.img_size, config.patch_size)
        millions = sum(p.numel() for p in encoder.parameters()) / 1e6
        why = f" ({self._engine.why})" if self._engine.why else ""
        lines = [
            f"encoder {name}: {millions:.3g} M weights, engine {self._engine.name}{why}",
            f"{keep_count(h * w, config.mask_ratio)} of {h * w} patches are visible",
        ]
        if h * w < FEW_PATCHES and config.patch_size > PATCH_SIZES[0]:
            half = config.patch_size // 2
            lines.append(
                f"{h * w} patches are few: --patch_size {half} gives {4 * h * w}, at four times "
                "the work"
            )
        few = len(self.images.train) < FEW_IMAGES and self.resolved.start is None
        if few and named and config.init_from is None and config.in_chans == 3:
            lines.append(
                f"with under {FEW_IMAGES:,} images, try --init_from FILE with an official release "
                "(CC-BY-NC 4.0: no commercial use), see docs/recipes.md"
            )
        if config.norm_pix_loss:
            lines.append("a loss of 1.0 means that the prediction is each patch's mean")
        if not len(self._held):
            lines.append("no images held out (holdout 0, or under 500 in all): no loss or figures")
        return lines

    def settings(self) -> dict[str, Any]:
        encoder = self.model.encoder
        own = {"depths": [*encoder.depths], "dims": [*encoder.dims], "engine": self._engine.name}
        return super().settings() | own

    def dataset(self) -> PretrainDataset:
        taken = taken_places(self._held) if isinstance(self._held, Windows) else {}
        split = Split(self.images.train)
        return PretrainDataset(split, self.resolved.images, self.config, taken)

    def extra_state(self) -> dict[str, Any]:
        return {"windows": self._windows} if self._windows else {}

    def lay_out(self) -> Callable[[Tensor], Layout] | None:
        return self._engine.lay_out

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        how, device = self.resolved.images, self.resolved.world.device
        images = normalise(batch.images, how.mean, how.std, device)
        return forward(images, batch.masks, layout=batch.sites, valid=batch.valid).loss

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for watcher in self._watchers:
            last = epoch == self.resolved.plan.epochs
            if watcher.epochs and (epoch % watcher.epochs == 0 or last):
                metrics |= watcher(self.model, step, stop)
        return metrics

    def export(self, folder: RunFolder) -> None:
        out, state = folder.paths.exported, self.model.encoder.state_dict()
        licence = known_license(self.config.init_from)
        export_folder(state, infer_architecture(state), out, self.resolved.images, licence)
        _log.info("the model for timm is in %s", out)


def build_model(config: PretrainConfig) -> FCMAE:
    """The model with its initial weights: a function of the seed, the same on every process."""
    torch.manual_seed(rng.seed_for(config.seed, rng.MODEL, 0, 0))
    encoder = SparseConvNeXtV2.from_size(
        config.model, config.depths, config.dims, in_chans=config.in_chans, engine=config.engine,
        drop_path=config.drop_path, use_grn=config.use_grn, layer_scale=config.layer_scale,
        recompute=config.recompute, patch_size=config.patch_size,
    )  # fmt: skip
    if config.init == "fan_in":
        init_fan_in(encoder)
    if config.init_from is not None:
        init_encoder(encoder, config.init_from)
    if config.compile:
        encoder.compile_encode()
    decoder = config.decoder
    return FCMAE(encoder, decoder.dim, decoder.depth, config.mask_ratio, config.norm_pix_loss)
