"""A training run: data, a model and a number of steps in, a folder of results out.

`tfdiffusion train` is this with the arguments of a command line. Every file of the folder is
written aside and renamed, so whoever looks into it finds complete files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import time
from pathlib import Path

import keras
import numpy as np

from tfdiffusion import callbacks
from tfdiffusion.data import Examples
from tfdiffusion.fitting import NoiseConditionalModel
from tfdiffusion.training import DiffusionModel

#: What a run may leave in its folder.
FILES = ("model.keras", "samples.png", "sampling.gif", "loss.png", "history.json", "run.json")
SAVED_MODEL = "saved_model"

_MIN_HISTORY = 20  # entries, so that a run of few epochs has a curve too
_VALIDATIONS = 8
_MAX_HELD_OUT = 1000
_WARM_UP_SHARE = 0.05  # of the steps
_SAMPLE_PIXELS = 2**20  # that the pictures of a run hold together, in all their channels


def hold_out(examples: Examples, seed: int = 0) -> tuple[Examples, Examples | None]:
    """Sets a tenth of the examples aside, at most 1,000, to measure the loss on.

    Args:
        examples: what `tfdiffusion.data.read` gave.
        seed: decides which, except of a stream, of which they are the first.

    Returns:
        (examples to train on, examples held out); None for the second if there are fewer than 20.
    """
    total = examples.num_examples
    num = min(total // 10, _MAX_HELD_OUT)
    if total < 20:
        return examples, None
    if examples._stream is not None:
        kept = examples._stream.skip(num), examples._stream.take(num)
        parts = [{"_stream": stream} for stream in kept]
    else:
        order = np.random.default_rng(seed).permutation(total)
        chosen = np.sort(order[num:]), np.sort(order[:num])
        parts = [
            {
                "_images": _taken(examples._images, rows),
                "_labels": None if examples._labels is None else examples._labels[rows],
            }
            for rows in chosen
        ]
    rest, held = (
        dataclasses.replace(examples, num_examples=size, **part)
        for size, part in zip((total - num, num), parts)
    )
    return rest, held


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Some of the images of something that decodes them when indexed."""

    images: object
    rows: np.ndarray

    def __getitem__(self, indices):
        return self.images[self.rows[indices]]


def _taken(images, rows):
    return images[rows] if isinstance(images, np.ndarray) else _Taken(images, rows)


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
        arguments: what the run was asked for, for the record.
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
    arguments: dict = dataclasses.field(default_factory=dict)
    history: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    _last: callbacks.StopAtStep | None = dataclasses.field(default=None, repr=False)

    @property
    def entry_steps(self) -> int:
        """Steps between two entries of the history: an epoch, or less where epochs are few."""
        epoch = max(self.examples.num_examples // self.batch_size, 1)
        return min(epoch, max(self.steps // _MIN_HISTORY, 1))

    @property
    def done(self) -> int:
        """Steps trained so far."""
        return self._last.done if self._last is not None else 0

    def stop(self) -> None:
        """Ends `fit` after the step that runs; for signal handlers and other threads."""
        if self._last is not None:
            self._last.stop()

    def fit(self, progress: bool = True) -> None:
        """Trains for `steps`, or until `stop` is called.

        Args:
            progress: whether to show steps, loss and time left on stderr.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        warm_up = max(round(_WARM_UP_SHARE * self.steps), 1)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0,
            max(self.steps - warm_up, 1),
            warmup_target=self.learning_rate,
            warmup_steps=warm_up,
        )
        self.model.compile(keras.optimizers.Adam(rate))
        batches = self.examples.batches(
            self.batch_size, seed=self.seed, flip=self.flip, from_step=0
        )
        entries = -(-self.steps // self.entry_steps)
        every = -(-entries // _VALIDATIONS)
        held_out = self.held_out and self.held_out.batches(256, shuffle=False)
        recorded = keras.callbacks.History()
        self._last = callbacks.StopAtStep(self.steps)
        shown = [callbacks.Progress(self.steps)] if progress else []
        started = time.monotonic()
        try:
            self.model.fit(
                batches,
                epochs=entries,
                steps_per_epoch=self.entry_steps,
                validation_data=held_out,
                validation_freq=every,
                shuffle=False,  # the batches are shuffled already
                verbose=0,
                callbacks=[
                    self._last,
                    recorded,
                    *shown,
                    callbacks.Checkpoint(self.folder / "model.keras"),
                    callbacks.SampleGrid(self.folder / "samples.png", **self._pictures()),
                ],
            )
        finally:
            self.seconds = time.monotonic() - started
            for one in shown:
                one.close()
            self.history = self._in_steps(recorded, every)

    def _in_steps(self, recorded, every: int) -> dict:
        history = {name: [float(x) for x in xs] for name, xs in recorded.history.items()}
        steps = [min((i + 1) * self.entry_steps, self.done) for i in recorded.epoch]
        return {"steps": steps, "val_steps": steps[every - 1 :: every], **history}

    def save(self) -> None:
        """Writes model, history and record."""
        callbacks.save_atomically(self.model, self.folder / "model.keras")
        write_json(self.folder / "history.json", self.history)
        write_json(self.folder / "run.json", self.record())

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
        images, path = self.model.sample(**pictures, return_path=True)
        plotting.save_grid(images, self.folder / "samples.png", columns=in_row)
        plotting.save_path_gif(path, self.folder / "sampling.gif", columns=in_row)
        losses = {k: v for k, v in self.history.items() if "loss" in k and v}
        if losses:
            figure = plotting.loss_curve(losses)
            for axes in figure.axes:
                axes.set_xlabel(f"steps / {self.entry_steps}")
            aside = self.folder / f".loss.{os.getpid()}.png"
            figure.savefig(aside, facecolor="white")
            os.replace(aside, self.folder / "loss.png")

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
            "steps": min(50, self.model.process.num_timesteps or 50),
            "columns": in_row,
        }

    def export(self) -> Path:
        """Writes the SavedModel; see `tfdiffusion.export`."""
        from tfdiffusion import export

        steps = self._pictures().get("steps", 50)
        return export.saved_model(self.model, self.folder / SAVED_MODEL, steps=steps)


def clear(folder: Path) -> None:
    """Deletes what an earlier run left in a folder, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SAVED_MODEL, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Writes JSON aside and renames it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _backend_version() -> str:
    from importlib import metadata

    try:
        return metadata.version(keras.backend.backend())
    except metadata.PackageNotFoundError:  # tensorflow-cpu and the like
        return "unknown"
