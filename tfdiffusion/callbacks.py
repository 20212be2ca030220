"""Keras callbacks for `fit`: progress with the time left, grids of samples, saving as it goes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import keras

from tfdiffusion import _checks, checkpoints


class _Periodic(keras.callbacks.Callback):
    """Does something every few minutes of training, by the clock."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = _checks.number("seconds", seconds, "[0, inf]")

    def on_train_begin(self, logs=None):
        """Starts the clock."""
        self.last = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Acts if it is time."""
        if time.monotonic() - self.last >= self.seconds:
            self.act()
            self.last = time.monotonic()


class Stopped(Exception):
    """`Checkpoint.stop` was called, and the checkpoint is saved."""


class Checkpoint(keras.callbacks.Callback):
    """Saves the model every few minutes of training, and whenever it is asked to stop.

    It saves between two steps. To go on: load the file with `keras.models.load_model`, which brings
    the optimizer and the averages back too, and call `fit` with data that begin where this stopped:

        model = keras.models.load_model("model.keras")
        batches = data.batches(64, seed=1, from_step=model.steps_done)
        model.fit(batches, epochs=10, steps_per_epoch=500, initial_epoch=model.steps_done // 500)

    Args:
        path: of a `.keras` file, replaced each time; see `tfdiffusion.checkpoints`.
        seconds: between two savings.
        notes: called for what to note beside the model.

    Raises:
        OSError: From `fit`, if the file cannot be written; the one before is still there.
        Stopped: From `fit`, after `stop`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        seconds: float = 300.0,
        notes: Callable[[], dict] | None = None,
    ):
        super().__init__()
        if notes is not None and not callable(notes):
            raise TypeError(f"notes must be a function, or None. Received {_checks.shown(notes)}.")
        self.path, self.notes = _checks.path("path", path), notes
        self.seconds = _checks.number("seconds", seconds, "[0, inf]")
        self.saved_at, self.stopping = time.monotonic(), False

    def on_train_batch_begin(self, batch, logs=None):
        """Saves if it is time: here the step before, and all that belonged to it, is done."""
        if self.stopping or time.monotonic() - self.saved_at >= self.seconds:
            self.save()
        if self.stopping:
            raise Stopped

    def save(self) -> None:
        """Saves."""
        checkpoints.save(self.model, self.path, None if self.notes is None else self.notes())
        self.saved_at = time.monotonic()

    def stop(self) -> None:
        """Lets the step that runs be the last; for signal handlers and other threads."""
        self.stopping = True


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
        self.path, self.columns = _checks.path("path", path), columns
        _checks.integer("num", num)
        _checks.seed(seed)
        for name, value in (("steps", steps), ("columns", columns)):
            if value is not None:
                _checks.integer(name, value)
        request = {"num": num, "label": label, "steps": steps, "seed": seed}
        self.request = {k: value for k, value in request.items() if value is not None}

    def act(self):
        """Draws."""
        from tfdiffusion import plotting

        plotting.save_grid(self.model.sample(**self.request), self.path, columns=self.columns)


class BitsPerDimension(keras.callbacks.Callback):
    """Measures the variational bound of held-out images, as `val_bits_per_dim` in logs and history.

    The noise is the same every time, so the numbers of two epochs can be compared.

    Args:
        images: float (N, ...); some hundred will do.
        label: int (N,), for models with classes.
        every: epochs from one measurement to the next.
        evaluations: noise levels an image; see `tfdiffusion.likelihood.estimate`.
        pixels: the scale of the data, by default 256 values in [−1, 1]; None for points.
        batch_size: images at a time.
    """

    def __init__(
        self,
        images,
        label=None,
        *,
        every: int = 1,
        evaluations: int = 20,
        pixels="8 bits",
        batch_size: int = 128,
    ):
        super().__init__()
        from tfdiffusion import likelihood

        self.images, self.label = images, label
        self.every = _checks.integer("every", every)
        _checks.integer("evaluations", evaluations)
        _checks.integer("batch_size", batch_size)
        pixels = likelihood.Pixels() if isinstance(pixels, str) and pixels == "8 bits" else pixels
        likelihood.pixels.check_pixels(pixels)
        likelihood.pixels.as_float(images, "(N, ...)")
        self.options = {"evaluations": evaluations, "pixels": pixels, "batch_size": batch_size}

    def on_epoch_end(self, epoch, logs=None):
        """Measures, and writes it into the logs."""
        from tfdiffusion import likelihood

        if (epoch + 1) % self.every == 0 and logs is not None:
            bound = likelihood.estimate(self.model, self.images, self.label, **self.options)
            logs["val_bits_per_dim"] = bound.mean


class StopAtStep(keras.callbacks.Callback):
    """Ends the training after a number of steps, also in the middle of an epoch.

    Args:
        steps: batches to train on, at least 1.
        done: how many of them are done.
    """

    def __init__(self, steps: int, done: int = 0):
        super().__init__()
        self.steps, self.done = _checks.integer("steps", steps), _checks.integer("done", done, 0)

    def on_train_batch_end(self, batch, logs=None):
        """Counts, and stops at the last."""
        self.done += 1
        if self.done >= self.steps:
            self.model.stop_training = True


class Progress(keras.callbacks.Callback):
    """Shows step, loss and time left: a bar in a terminal, a line every few seconds elsewhere.

    Args:
        steps: batches that will be trained on.
        seconds: between two lines where there is no terminal.
        done: how many were trained on before.
    """

    def __init__(self, steps: int, seconds: float = 10.0, done: int = 0):
        super().__init__()
        self.steps, self.done = _checks.integer("steps", steps), _checks.integer("done", done, 0)
        self.seconds, self.first = _checks.number("seconds", seconds, "[0, inf]"), done + 1
        self.shown_at, self.spent = time.monotonic(), 0.0
        self.bar = _bar(steps) if sys.stderr.isatty() else None

    def on_train_begin(self, logs=None):
        """Shows that the first step has begun, which takes far longer than the others."""
        if self.bar is not None:
            self.bar.start()

    def on_train_batch_begin(self, batch, logs=None):
        """Starts the clock of a step, so that validation doesn't count."""
        self.begun_at = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar, or writes a line if it is time."""
        self.done += 1
        now, loss = time.monotonic(), float(logs["loss"])
        left = "?"
        if self.done > self.first:  # the first step compiles, so it says nothing about the pace
            self.spent += now - self.begun_at
            left = clock(self.spent / (self.done - self.first) * (self.steps - self.done))
        if self.bar is not None:
            (task,) = self.bar.task_ids
            shown = {"loss": f"{loss:.4f}", "left": left}
            self.bar.update(task, description="training", completed=self.done, **shown)
        elif now - self.shown_at >= self.seconds or self.done in (self.first, self.steps):
            line = f"step {self.done}/{self.steps}, loss {loss:.4f}, {left} left"
            print(line, file=sys.stderr, flush=True)
            self.shown_at = now

    def on_train_end(self, logs=None):
        """Leaves the full bar, or waits for the next `fit` of the same training."""
        if self.done >= self.steps or self.model.stop_training:
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
