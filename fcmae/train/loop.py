"""The training loop of every kind of training: a run that can stop and resume anywhere.

All processes compute a step; after it they agree on whatever one of them may decide alone (time to
save, a signal), so that all save and stop together.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fcmae import rng
from fcmae.config.fields import asked_settings
from fcmae.data.loader import lost_workers
from fcmae.train import checkpoint, machine
from fcmae.train.clock import Clock
from fcmae.train.optimizer import gradient_norm
from fcmae.train.processes import OnHost, replicate
from fcmae.train.signals import Signals
from fcmae.train.task import Interrupted, Task
from sparse.errors import RunError

MOST_SAVE_FAILURES = 3

_log = logging.getLogger(__name__)


class Loop:
    """Trains a task from its current step to the end of its plan.

    Args:
        task: with all attributes that the script sets.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.config, self.folder = task, task.config, task.folder
        self.plan, self.world = task.resolved.plan, task.resolved.world
        self.step = self.skipped = 0
        self.epoch_end_due = False
        self._save_failures, self._bad_seen = 0, set[str]()
        # The newest update, which may not have been applied: the host does not know yet. Its step,
        # whether it was not finite with loss and gradient norm, and the images read here for it.
        self._unchecked: tuple[int, OnHost, list[Tensor]] | None = None
        lists = task.images.lists.items()
        self._fingerprints = {part: files.fingerprint() for part, files in lists}
        # Batch norm takes in a batch before its loss is known to be finite.
        self._statistics: list[Tensor] = []
        if self.config.nonfinite == "skip":
            self._statistics = [b for b in task.model.buffers() if b.is_floating_point()]
        self.forward: Any = task.model
        if self.world.size > 1:
            self.forward = replicate(task.model)

    def restore(self, saved: checkpoint.SavedCheckpoint) -> None:
        """Resume from a checkpoint.

        Raises:
            InputError: it is of another model.
        """
        model, optimizer, state = self.task.model, self.task.optimizer, saved.state
        checkpoint.load_model_tensors(model, saved.tensors("model"))
        checkpoint.load_optimizer_tensors(optimizer, model, saved.tensors("optimizer"))
        self.task.restore(saved)
        self.step, self.epoch_end_due = state["step"], state["epoch_end_due"]
        self.skipped = state.get("skipped", 0)
        before, now = state["threads"], torch.get_num_threads()
        if before != now and self.world.device.type == "cpu":
            _log.warning(f"resuming with {now} threads, not {before}: the last bits will differ")

    def run(
        self,
        batches: Iterator[Any],
        signals: Signals,
        progress: Callable[..., None] = lambda *_: None,
    ) -> int:
        """Train to the end, or until a signal.

        Args:
            batches: parts of batches on this process, `accumulate` of them a step, from the
                current step on.
            signals: ask the run to stop.
            progress: called after each step with its number, and for a logged one also with what
                was logged and the seconds left.

        Returns:
            0 when done, 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1; the state is saved then.

        Raises:
            RunError: the loss is not finite, too many images are unreadable, a remote one can't be
                read now, a worker died, or saving failed three times.
        """
        plan, config = self.plan, self.config
        # Only here: before there is anything to save, Ctrl-C may end the process.
        with signals.catch(signal.SIGINT), lost_workers("; it resumes from the last checkpoint"):
            clock = Clock()
            while self.step < plan.total_steps or self.epoch_end_due:
                bad: list[tuple[str, str]] = []
                if not self.epoch_end_due:
                    bad = self._train_step(batches, progress, clock)
                    self.epoch_end_due = self.step % plan.steps_per_epoch == 0
                if self.epoch_end_due and not self._stop_wanted(signals):
                    self._end_epoch(signals)
                    clock.skip()
                due = clock.save_due(config.checkpoint_minutes)
                stop, save, found = self.world.agree([signals.received, int(due), len(bad)])
                if found:
                    self._bad_seen |= self.task.record_bad(bad)
                by_step = config.checkpoint_steps and self.step % config.checkpoint_steps == 0
                finished = self.step == plan.total_steps and not self.epoch_end_due
                if save or by_step or stop or finished:
                    began = time.perf_counter()
                    self.save(must=bool(stop) or finished)
                    clock.saved(began, config.checkpoint_steps if by_step else None)
                if stop and not finished:
                    _log.info("stopped after step %d; the same command resumes there", self.step)
                    return 130 if stop == signal.SIGINT else 143
        return 0

    def _train_step(
        self, batches: Iterator[Any], progress: Callable[..., None], clock: Clock
    ) -> list[tuple[str, str]]:
        """One update: accumulate, reduce, gate, apply. Return the newly found unreadable images."""
        config, optimizer = self.config, self.task.optimizer
        rate = self.plan.learning_rate(self.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        torch.manual_seed(rng.seed_for(config.seed, rng.DROP_PATH, self.step, self.world.rank))

        statistics = [buffer.clone() for buffer in self._statistics]
        total = torch.zeros((), device=self.world.device)
        bad: list[tuple[str, str]] = []
        read: list[Tensor] = []
        for part in range(config.accumulate):
            with clock.waiting():
                batch = next(batches)
            if batch.missing:
                self._give_up(batch.missing, bad + batch.bad)
            # Processes exchange gradients only with the last part of a batch.
            last = self.world.size == 1 or part == config.accumulate - 1
            with nullcontext() if last else self.forward.no_sync():
                with self.task.resolved.autocast():
                    loss = self.task.loss(self.forward, batch) / config.accumulate
                loss.backward()
            total += loss.detach()
            read.append(batch.indices)
            bad += batch.bad

        norm = gradient_norm(self.task.model, config.optim.clip_grad)
        total = self.world.sum(torch.stack([total, (~torch.isfinite(total + norm)).float()]))
        # The fused AdamW takes exactly 1 for "skip": a sum over the processes would not stop it.
        loss, broken = total[0] / self.world.size, (total[1] > 0).float()
        self._check_finite()  # of the previous step, while a GPU is busy with this one
        optimizer.found_inf = broken  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for now, before in zip(self._statistics, statistics, strict=True):
            now.copy_(torch.where(broken > 0, before, now))
        self.step += 1
        self._unchecked = self.step, OnHost(torch.stack([broken, loss, norm])), read
        self.task.after_step(self.step)

        clock.count()
        progress(self.step)
        due = self.step % config.log_steps == 0 or self.step in (1, self.plan.total_steps)
        if due and self._check_finite():
            seconds = clock.seconds_a_step()
            speed = config.batch_size / seconds
            epoch = (self.step - 1) // self.plan.steps_per_epoch + 1
            shown = {"epoch": epoch, "loss": float(loss), "lr": rate, "images_per_s": speed}
            progress(self.step, shown, seconds * (self.plan.total_steps - self.step))
            if self.folder is not None:
                self.folder.log(self.step, {**shown, "grad_norm": float(norm)})
        return [entry for entry in bad if entry[0] not in self._bad_seen]

    def _check_finite(self) -> bool:
        """Check the newest unchecked update: were its loss and gradient finite?

        Raises:
            RunError: they were not, and the run must stop or has skipped `max_nonfinite` already.
        """
        if self._unchecked is None:
            return True
        step, values, read = self._unchecked
        self._unchecked = None
        broken, loss, norm = values.read()
        if not broken:
            return True
        config, self.skipped = self.config, self.skipped + 1
        names = [self.task.images.train.name(index) for part in read for index in part.tolist()]
        everywhere = [name for names in self.world.gather(names) for name in names]
        if self.folder is not None:
            self.folder.record_nonfinite(step, loss, norm, everywhere)
        what = f"not finite at step {step} (loss {loss:g}, gradient norm {norm:g}), update skipped"
        if config.nonfinite == "skip" and self.skipped <= config.max_nonfinite:
            _log.warning("%s: %d of at most %d", what, self.skipped, config.max_nonfinite)
            return False
        fix = "resume with --nonfinite skip"
        if config.nonfinite == "skip":
            fix = f"--max_nonfinite {config.max_nonfinite} were skipped already, raise it"
        raise RunError(
            f"{what}; nonfinite.jsonl lists its images: {fix}, or use a new --out with a lower "
            "--optim.base_lr, --optim.clip_grad 1.0 or --precision fp32"
        )

    def _end_epoch(self, signals: Signals) -> None:
        self._check_finite()
        epoch = self.step // self.plan.steps_per_epoch
        try:
            metrics = self.task.end_epoch(epoch, self.step, lambda: self._stop_wanted(signals))
        except Interrupted:
            return
        self.epoch_end_due = False
        if metrics and self.folder is not None:
            self.folder.log(self.step, {"epoch": epoch, **metrics})
            shown = (f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
            _log.info("epoch %d: %s", epoch, ", ".join(shown))

    def _stop_wanted(self, signals: Signals) -> bool:
        return self.world.agree([signals.received])[0] != 0

    def _give_up(self, tried: list[tuple[str, str]], bad: list[tuple[str, str]]) -> None:
        """Record the unreadable images, and stop.

        Args:
            tried: (name, reason) of an image and of its replacements.
            bad: (name, reason) of all unreadable images of this step.

        Raises:
            RunError: always.
        """
        if self.folder is not None:
            self.folder.record_bad(bad)
        name, reason = tried[0]
        others = len({other for other, _ in tried}) - 1
        more = f", nor can {others} others tried in its place" if others else ""
        raise RunError(f"image {name!r} can't be read ({reason}){more}: check the images in --data")

    def save(self, must: bool = False) -> None:
        """Save a checkpoint from the main process, which tells the others whether it succeeded.

        Raises:
            RunError: saving failed for the third time, or failed although it `must` not.
        """
        self._check_finite()
        if self.folder is not None:
            try:
                self.folder.sync()
                target, keep = self.folder.paths.checkpoints, self.config.keep_checkpoints
                checkpoint.save_checkpoint(target, self.step, self._tensors(), self._state(), keep)
                self.folder.trackers.covered()
                self._save_failures = 0
            except OSError as error:
                self._save_failures += 1
                _log.warning("could not save at step %d: %s", self.step, error)
        failed = self.world.agree([self._save_failures])[0]
        if failed >= MOST_SAVE_FAILURES or (failed and must):
            raise RunError(
                f"could not save step {self.step}: free space for {self.config.out!r} and rerun it"
            )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": self.task.model.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.task.optimizer, self.task.model),
            **self.task.extra_tensors(),
        }

    def _state(self) -> dict[str, Any]:
        return {
            "command": self.task.command,
            "epoch": self.step // self.plan.steps_per_epoch,
            "epoch_end_due": self.epoch_end_due,
            "skipped": self.skipped,
            "asked": asked_settings(self.config),
            "settings": self.task.settings(),
            "images": self._fingerprints,
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "versions": machine.versions(),
            **self.task.extra_state(),
        }
