"""A training run: data, a model and a number of steps in, a folder of results out.

`tfdiffusion train` is this with the arguments of a command line. Every file of the folder is
written aside and renamed, so whoever looks into it finds complete files. The model's file is also
the checkpoint: `Run.resume` goes on from it as if the run had never stopped.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from tfdiffusion import _defaults, callbacks, checkpoints, models
from tfdiffusion.data import Examples
from tfdiffusion.fitting import NoiseConditionalModel
from tfdiffusion.training import DiffusionModel

#: What a run may leave in its folder.
FILES = ("model.keras", "samples.png", "sampling.gif", "loss.png", "history.json", "run.json")
SAVED_MODEL = "saved_model"
MODEL = "model.keras"

_MIN_HISTORY = 20  # entries, so that a run of few epochs has a curve too
_VALIDATIONS = 8
_MAX_HELD_OUT = 1000
_WARM_UP_SHARE = 0.05  # of the steps
_FRAMES = 40  # of the film from noise to images
_SAMPLE_PIXELS = 2**20  # that the pictures of a run hold together, in all their channels
# Attributes of a run that its checkpoint holds by their names.
_NOTED = (
    *("steps", "batch_size", "learning_rate", "flip", "seed", "checkpoint_seconds"),
    *("arguments", "done", "history", "seconds"),
)


def hold_out(examples: Examples, seed: int = 0) -> tuple[Examples, Examples | None]:
    """Sets a tenth of the examples aside, at most 1,000, to measure the loss on.

    Args:
        examples: what `tfdiffusion.data.read` gave.
        seed: decides which, except of a stream, of which they are the first.

    Returns:
        (examples to train on, examples held out); None for the second if there are fewer than 20.
    """
    total = examples.num_examples
    if total < 20:
        return examples, None
    return examples.split(min(total // 10, _MAX_HELD_OUT), seed)


def labels_in_turn(num: int, num_classes: int | None) -> np.ndarray | None:
    """Labels 0, 1, … num_classes − 1, 0, 1, … for `num` images; None without classes."""
    return None if num_classes is None else np.arange(num) % num_classes


def columns(num_classes: int | None) -> int | None:
    """Images in a row of a grid of `labels_in_turn`: a column a class, if they aren't too many."""
    return num_classes if num_classes is not None and 1 < num_classes <= 20 else None


@dataclasses.dataclass
class Run:
    """A model being trained, and the folder for it.

    Attributes:
        folder: where the results go; made when training starts.
        model: built by its first batch if it isn't yet.
        examples: to train on.
        held_out: to measure the loss on, or None.
        steps: batches to train on.
        batch_size: examples in a batch.
        learning_rate: the highest; it rises over a twentieth of the steps, then falls to 0 along a
            cosine.
        flip: whether images are mirrored at random.
        seed: of the order of the examples.
        checkpoint_seconds: between two savings of the model.
        arguments: what the run was asked for, for the record.
        done: steps trained so far.
        history: lists by name: "steps", how many had been done, and the losses since the entry
            before; "val_steps" and the losses on the examples held out.
        seconds: how long the training took.
    """

    folder: Path
    model: NoiseConditionalModel
    examples: Examples
    held_out: Examples | None
    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    flip: bool = False
    seed: int = 0
    checkpoint_seconds: float = 60.0
    arguments: dict = dataclasses.field(default_factory=dict)
    done: int = 0
    history: dict = dataclasses.field(default_factory=lambda: {"steps": [], "loss": []})
    seconds: float = 0.0
    _loss: Sequence[float] = (0.0, 0.0)  # its sum and count since the last entry, when resumed
    _checkpoint: callbacks.Checkpoint | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def resume(cls, folder: Path, examples: Examples, held_out: Examples | None) -> Run:
        """Goes on with the run in a folder, on the same data.

        Raises:
            ValueError: If there is no checkpoint, it is damaged, or the data are not those that the
                run began with.
        """
        notes = checkpoints.notes(folder / MODEL)
        if notes is None:
            raise ValueError(f"{str(folder)!r} holds no run that can be resumed.")
        run = cls(
            folder,
            models.load(folder / MODEL, compile=True),
            examples,
            held_out,
            **{name: notes[name] for name in _NOTED},
            _loss=notes["loss"],
        )
        changed = [
            f"{name} were {was}, now {now}"
            for name, was, now in (
                (name, was, run.record()["data"][name]) for name, was in notes["data"].items()
            )
            if was != (list(now) if isinstance(now, tuple) else now)
        ]
        if changed:
            raise ValueError(
                f"The data have changed since the run in {str(folder)!r} began: "
                f"{'; '.join(changed)}. Restore them, or begin a run in another folder."
            )
        return run

    @property
    def entry_steps(self) -> int:
        """Steps between two entries of the history: an epoch, or less where epochs are few."""
        epoch = max(self.examples.num_examples // self.batch_size, 1)
        return min(epoch, max(self.steps // _MIN_HISTORY, 1))

    def stop(self) -> None:
        """Ends `fit` after the step that runs; for signal handlers and other threads."""
        if self._checkpoint is not None:
            self._checkpoint.stop()

    def fit(self, progress: bool = True, extra: Sequence[keras.callbacks.Callback] = ()) -> None:
        """Trains for the steps that are left, or until `stop` is called.

        Args:
            progress: whether to show steps, loss and time left on stderr.
            extra: Keras callbacks.

        Raises:
            OSError: If a checkpoint cannot be written; the one before is still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            self.model.compile(keras.optimizers.Adam(self._learning_rate()))
        entries = -(-self.steps // self.entry_steps)
        every = -(-entries // _VALIDATIONS)
        steps = callbacks.StopAtStep(self.steps, self.done)
        shown = [callbacks.Progress(self.steps, done=self.done)] if progress else []
        self._checkpoint = callbacks.Checkpoint(
            self.folder / MODEL, self.checkpoint_seconds, self.notes
        )
        followed = [
            steps,
            _Entries(self, steps),
            *shown,
            self._checkpoint,
            callbacks.SampleGrid(self.folder / "samples.png", **self._pictures()),
            *extra,
        ]
        started, before = time.monotonic(), self.seconds
        try:
            for first, last, length in self._parts(entries):
                self.model.fit(
                    self.examples.batches(
                        self.batch_size, seed=self.seed, flip=self.flip, from_step=self.done
                    ),
                    initial_epoch=first,
                    epochs=last,
                    steps_per_epoch=length,
                    validation_data=self.held_out and self.held_out.batches(256, shuffle=False),
                    validation_freq=every,
                    shuffle=False,  # the batches are shuffled already
                    verbose=0,
                    callbacks=followed,
                )
        except callbacks.Stopped:
            pass
        finally:
            self.seconds = before + time.monotonic() - started
            for one in shown:
                one.close()

    def _learning_rate(self):
        warm_up = max(round(_WARM_UP_SHARE * self.steps), 1)
        return keras.optimizers.schedules.CosineDecay(
            0.0,
            max(self.steps - warm_up, 1),
            warmup_target=self.learning_rate,
            warmup_steps=warm_up,
        )

    def _parts(self, entries: int):
        """(first entry, last, steps of each) of `fit`: what is left of an entry, then the rest."""
        entry, inside = divmod(self.done, self.entry_steps)
        if inside and self.done < self.steps:
            yield entry, entry + 1, self.entry_steps - inside
            entry += 1
        if entry < entries and self.done < self.steps:
            yield entry, entries, self.entry_steps

    def notes(self) -> dict:
        """All that a checkpoint must hold beside the model."""
        loss = self.model.loss_tracker
        return {
            **{name: getattr(self, name) for name in _NOTED},
            "data": self.record()["data"],
            "loss": [float(loss.total.value), float(loss.count.value)],
        }

    def save(self) -> None:
        """Writes model, history and record."""
        checkpoints.save(self.model, self.folder / MODEL, self.notes())
        self.write_records()

    def write_records(self) -> None:
        """Writes what people read: history and record."""
        checkpoints.write_json(self.folder / "history.json", self.history)
        checkpoints.write_json(self.folder / "run.json", self.record())

    def record(self) -> dict:
        """What was trained on what, how, and with which versions."""
        import tfdiffusion

        return {
            "arguments": self.arguments,
            "data": {
                "name": self.examples.name,
                "examples": self.examples.num_examples,
                "held_out": self.held_out.num_examples if self.held_out is not None else 0,
                "shape": list(self.examples.shape),
                "class_names": self.examples.class_names,
                "skipped": [list(pair) for pair in self.examples.skipped],
            },
            "steps": self.done,
            "steps_asked_for": self.steps,
            "seconds": round(self.seconds, 1),
            "versions": {
                "tfdiffusion": tfdiffusion.__version__,
                "keras": keras.__version__,
                keras.backend.backend(): _backend_version(),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def draw(self) -> None:
        """Writes `samples.png`, `sampling.gif` and, if there is a history, `loss.png`."""
        from tfdiffusion import plotting

        pictures = self._pictures()
        in_row = pictures.pop("columns")
        if "steps" in pictures:  # many even ones, for the film
            most = self.model.process.num_timesteps or _FRAMES
            pictures |= {"steps": min(_FRAMES, most), "grid": "uniform"}
        images, path = self.model.sample(**pictures, return_path=True)
        plotting.save_grid(images, self.folder / "samples.png", columns=in_row)
        plotting.save_path_gif(path, self.folder / "sampling.gif", columns=in_row)
        losses = {k: v for k, v in self.history.items() if "loss" in k and v}
        if losses:
            figure = plotting.loss_curve(losses)
            for axes in figure.axes:
                axes.set_xlabel(f"steps / {self.entry_steps}")
            aside = self.folder / ".loss.part.png"
            figure.savefig(aside, facecolor="white")
            checkpoints.replace(aside, self.folder / "loss.png")

    def _pictures(self) -> dict:
        """What to draw: a hundred images, or fewer if they are large."""
        in_row = columns(self.model.num_classes)
        num = max(min(_SAMPLE_PIXELS // 50 // int(np.prod(self.examples.shape)), 100), 4)
        num = max(num // (in_row or 1), 1) * (in_row or 1)
        if not isinstance(self.model, DiffusionModel):  # a score model, which takes longer
            return {"num": min(num, 36), "columns": None}
        return {
            "num": num,
            "label": labels_in_turn(num, self.model.num_classes),
            "steps": min(_defaults.STEPS, self.model.process.num_timesteps or _defaults.STEPS),
            "columns": in_row,
        }

    def export(self) -> Path:
        """Writes the SavedModel; see `tfdiffusion.export`."""
        from tfdiffusion import export

        steps = self._pictures().get("steps", _defaults.STEPS)
        return export.saved_model(self.model, self.folder / SAVED_MODEL, steps=steps)


class _Entries(keras.callbacks.Callback):
    """Keeps a run's count of steps and its history."""

    def __init__(self, run: Run, counter: callbacks.StopAtStep):
        super().__init__()
        self.run, self.counter = run, counter
        self.loss = run._loss

    def on_epoch_begin(self, epoch, logs=None):
        """Puts back what an entry that was begun before had summed up."""
        tracker = self.model.loss_tracker
        tracker.total.assign(self.loss[0])
        tracker.count.assign(self.loss[1])
        self.loss = (0.0, 0.0)

    def on_train_batch_end(self, batch, logs=None):
        """Takes the count of steps over."""
        self.run.done = self.counter.done

    def on_epoch_end(self, epoch, logs=None):
        """Adds an entry."""
        entry = {"steps": self.run.done, **logs}
        if "val_loss" in logs:
            entry["val_steps"] = self.run.done
        for name, value in entry.items():
            value = value if isinstance(value, int) else float(value)
            self.run.history.setdefault(name, []).append(value)


def clear(folder: Path) -> None:
    """Deletes what an earlier run left in a folder, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SAVED_MODEL, ignore_errors=True)


def _backend_version() -> str:
    from importlib import metadata

    try:
        return metadata.version(keras.backend.backend())
    except metadata.PackageNotFoundError:  # tensorflow-cpu and the like
        return "unknown"
