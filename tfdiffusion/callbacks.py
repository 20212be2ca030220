"""Keras callbacks for `fit`: progress with the time left, grids of samples, saving as it goes."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import keras


def save_atomically(model: keras.Model, path: str | os.PathLike) -> None:
    """Saves a model aside and renames it: a reader finds the old file or the new one, complete.

    Args:
        model: any Keras model.
        path: of a `.keras` file, in a folder that exists.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.keras")
    try:
        model.save(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class _Periodic(keras.callbacks.Callback):
    """Does something every few minutes of training, by the clock."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        """Starts the clock."""
        self.last = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Acts if it is time."""
        if time.monotonic() - self.last >= self.seconds:
            self.act()
            self.last = time.monotonic()


class Checkpoint(_Periodic):
    """Saves the model every few minutes of training.

    Args:
        path: of a `.keras` file, replaced each time.
        seconds: between two savings.
    """

    def __init__(self, path: str | os.PathLike, seconds: float = 300.0):
        super().__init__(seconds)
        self.path = Path(path)

    def act(self):
        """Saves."""
        save_atomically(self.model, self.path)


class SampleGrid(_Periodic):
    """Draws a grid of images every few minutes, with the same seeds and so comparable.

    Args:
        path: of a PNG file, replaced each time.
        seconds: between two grids.
        num: how many images.
        label: classes; see `DiffusionModel.sample`.
        steps: evaluations of the network an image; None for the model's default.
        seed: of the first image.
        columns: images in a row; about the square root of `num` when None.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        seconds: float = 600.0,
        *,
        num: int = 16,
        label=None,
        steps: int | None = None,
        seed: int = 0,
        columns: int | None = None,
    ):
        super().__init__(seconds)
        self.path, self.columns = Path(path), columns
        request = {"num": num, "label": label, "steps": steps, "seed": seed}
        self.request = {k: value for k, value in request.items() if value is not None}

    def act(self):
        """Draws."""
        from tfdiffusion import plotting

        plotting.save_grid(self.model.sample(**self.request), self.path, columns=self.columns)


class StopAtStep(keras.callbacks.Callback):
    """Ends the training after a number of steps, also in the middle of an epoch.

    Args:
        steps: batches to train on, at least 1.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.done = steps, 0

    def on_train_batch_end(self, batch, logs=None):
        """Counts, and stops at the last."""
        self.done += 1
        if self.done >= self.steps:
            self.model.stop_training = True

    def stop(self) -> None:
        """Lets the step that runs be the last."""
        self.steps = 0


class NotFiniteError(ArithmeticError):
    """The loss became NaN or infinite."""


class Progress(keras.callbacks.Callback):
    """Shows step, loss and time left: a bar in a terminal, a line every few seconds elsewhere.

    Args:
        steps: batches that will be trained on.
        seconds: between two lines where there is no terminal.

    Raises:
        NotFiniteError: From `fit`, when the loss is NaN or infinite.
    """

    def __init__(self, steps: int, seconds: float = 10.0):
        super().__init__()
        self.steps, self.seconds, self.done = steps, seconds, 0
        self.bar = _bar(steps) if sys.stderr.isatty() else None

    def on_train_begin(self, logs=None):
        """Shows that the first step has begun, which takes far longer than the others."""
        self.shown_at, self.spent = time.monotonic(), 0.0
        if self.bar is not None:
            self.bar.start()

    def on_train_batch_begin(self, batch, logs=None):
        """Starts the clock of a step, so that validation doesn't count."""
        self.begun_at = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar, or writes a line if it is time."""
        self.done += 1
        now, loss = time.monotonic(), float(logs["loss"])
        if not math.isfinite(loss):
            raise NotFiniteError(f"The loss became {loss} at step {self.done}.")
        left = "?"
        if self.done > 1:  # the first step compiles, so it says nothing about the pace
            self.spent += now - self.begun_at
            left = clock(self.spent / (self.done - 1) * (self.steps - self.done))
        if self.bar is not None:
            (task,) = self.bar.task_ids
            shown = {"loss": f"{loss:.4f}", "left": left}
            self.bar.update(task, description="training", completed=self.done, **shown)
        elif now - self.shown_at >= self.seconds or self.done in (1, self.steps):
            line = f"step {self.done}/{self.steps}, loss {loss:.4f}, {left} left"
            print(line, file=sys.stderr, flush=True)
            self.shown_at = now

    def on_train_end(self, logs=None):
        """Leaves the full bar."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back; also after an exception in `fit`, which skips `on_train_end`."""
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours: "0:42", "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _bar(steps: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[left]} left"),
        console=Console(stderr=True),
    )
    bar.add_task("compiling the first step", total=steps, loss="?", left="?")
    return bar
