"""The command line: `train | sample | evaluate | export | info | convert`, thin over the library.

What a person can get wrong is told in one line on stderr, before any work starts where it can be
known by then. Exit codes: 0 done, 1 it could not be done, 2 an argument is wrong, 130 stopped with
Ctrl-C, 143 with SIGTERM. Help needs no Keras and comes at once; everything heavy is imported
inside the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfdiffusion import _arguments
from tfdiffusion._arguments import Failure, UsageError

_CHUNK = 64  # images drawn between two movements of the progress bar; a GIF shows the first

# Predictions that suit a process; v suits all others.
_PREDICTIONS = {"flow": "flow", "edm": "edm", "ve": "edm"}

# What the library's messages call its arguments, and what they are called here.
_FLAGS = {
    r"\bimage_size\b": "--image-size",
    r"\bdata_dir=": "--data-dir ",
    r"(?<!-)\bdata_dir\b": "--data-dir",  # not the option of `tfds build`
    r"\blabels=False\b": "--unconditional",
    r"\bstrict=False skips them\b": "leave --strict out to skip them",
    r"\bprediction=": "--prediction ",
    r"\bsteps=": "--steps ",
    r"\boverwrite=True\b": "--overwrite",
    r"\ba smaller learning rate, or clip gradients: .*=1\.0\)": "a smaller --learning-rate.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0 done, 1 it could not be done, 2 an argument is wrong, 130 or 143 stopped.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    command = " ".join(["tfdiffusion", *(argv[:1] if argv[:1] and argv[0] in _COMMANDS else [])])
    try:
        args = _arguments.parse(argv)
        with _own_warnings(debug):
            _COMMANDS[args.command](args)
    except Failure as failure:
        if debug:
            traceback.print_exc()
        print(f"{command}: error: {failure}", file=sys.stderr)
        return failure.code
    except (KeyboardInterrupt, Stopped) as error:
        print(f"{command}: stopped", file=sys.stderr)
        return getattr(error, "code", 130)
    return 0


# ------------------------------------------------------------------------------ quiet, and errors


@contextlib.contextmanager
def _own_warnings(debug: bool) -> Iterator[None]:
    """Shows our warnings as plain text, and none of the libraries below us."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"warning: {_in_flags(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"tfdiffusion\b")
            warnings.showwarning = show
        yield


def _start(debug: bool) -> None:
    """Imports Keras and its backend, whose start-up messages are held back."""
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry of a download
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of downloads
    with _quietly(debug):
        try:
            import absl.logging
            import keras
        except ImportError as error:
            raise Failure(f"A package is missing or broken: {_one_line(error)}") from error
        except ValueError as error:  # KERAS_BACKEND names no backend
            raise UsageError(_one_line(error)) from error
    absl.logging.set_verbosity("error")
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax"):
        raise UsageError(f"KERAS_BACKEND is {backend!r}; set it to tensorflow or jax.")


@contextlib.contextmanager
def _quietly(debug: bool) -> Iterator[None]:
    """Keeps what is written to file descriptor 2, and shows it if the block fails.

    TensorFlow's first messages come from C++ before its log level is read.
    """
    if debug:
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except (ImportError, SystemExit, KeyboardInterrupt, Failure):
            raise
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _told(kind: type[Failure]) -> Iterator[None]:
    """Turns the library's errors into one line; nothing that it refuses is a bug."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise kind(_one_line(error)) from error


@contextlib.contextmanager
def _work() -> Iterator[None]:
    """Turns what can happen to anybody during the work into one line; the rest are bugs."""
    try:
        yield
    except Failure:
        raise
    except OSError as error:  # disk full, no permission
        raise Failure(_one_line(error)) from error
    except MemoryError as error:
        raise Failure(_OUT_OF_MEMORY) from error
    except Exception as error:
        if type(error).__name__ == "ResourceExhaustedError" or "RESOURCE_EXHAUSTED" in str(error):
            raise Failure(_OUT_OF_MEMORY) from error
        raise


_OUT_OF_MEMORY = "Out of memory. Use a smaller --batch-size, --image-size, --size or --num."


def _one_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return " ".join(_in_flags(text).split())


def _in_flags(text: str) -> str:
    for pattern, flag in _FLAGS.items():
        text = re.sub(pattern, flag, text)
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------- commands


# Options of `train` that say where and how to work, not what to train.
_ANY_TIME = (
    "out",
    "data_dir",
    "export",
    "resume",
    "overwrite",
    "checkpoint_every",
    "debug",
    "help",
)


def _train(args: argparse.Namespace) -> None:
    folder = Path(args.out or Path("runs", _run_name(args.data))).expanduser()
    begun = _begun(folder) if args.resume else None
    if begun is None:
        _check_run_folder(folder, args.overwrite)
    else:
        _take_over(args, begun, folder)
    _start(args.debug)
    import keras

    from tfdiffusion import runs

    args.prediction = args.prediction or _PREDICTIONS.get(args.process, "v")
    _check_names(args)
    if args.method != "diffusion":
        _check_score_method(args)
    with _quietly(args.debug):  # on JAX, this is where Keras imports TensorFlow
        keras.utils.set_random_seed(args.seed)
    examples = _read(args)
    train, held_out = runs.hold_out(examples, args.seed)
    if begun is not None:
        with _told(UsageError):
            run = runs.Run.resume(folder, train, held_out)
        run.checkpoint_seconds = args.checkpoint_every
    else:
        with _told(UsageError):
            model = _model(args, examples)
        run = runs.Run(
            folder,
            model,
            train,
            held_out,
            steps=_steps(args, train.num_examples),
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            flip=args.flip,
            seed=args.seed,
            checkpoint_seconds=args.checkpoint_every,
            arguments={k: v for k, v in vars(args).items() if k not in _NOT_NOTED},
        )
    if args.overwrite:
        runs.clear(folder)
    with _work():
        _fit(run)
        _finish(run, args.export)


_NOT_NOTED = ("command", "debug", "given", "resume", "overwrite")


def _begun(folder: Path) -> dict | None:
    """The arguments of the run in a folder, or None if there is none."""
    from tfdiffusion import checkpoints

    file = folder / "model.keras"
    with _told(Failure):
        notes = checkpoints.notes(file)
    if notes is None and file.exists():
        raise UsageError(f"--resume: {str(file)!r} was not left by a training that can go on.")
    if notes is None:
        _say(f"Nothing to resume in {folder}: a new run.")
        return None
    return notes["arguments"]


def _take_over(args: argparse.Namespace, begun: dict, folder: Path) -> None:
    """Sets the arguments to those of the run that is resumed, unless one contradicts them."""
    for name, option in args.given.items():
        if name not in _ANY_TIME and getattr(args, name) != begun.get(name):
            raise UsageError(
                f"{option} {getattr(args, name)}: the run in {folder} was begun with "
                f"{begun.get(name)}. Leave {option} out to go on with it, or name another --out."
            )
    for name, value in begun.items():
        if name not in _ANY_TIME or (name in ("data_dir", "export") and name not in args.given):
            setattr(args, name, value)


def _fit(run: Any) -> None:
    from tfdiffusion.callbacks import clock
    from tfdiffusion.fitting import NotFiniteError

    held_out = "" if run.held_out is None else f", {run.held_out.num_examples} held out"
    size = "x".join(map(str, run.examples.shape))
    classes = run.model.num_classes
    begun = f", {run.done} of them done" if run.done else ""
    _say(
        f"{run.examples.num_examples} images of {size} to train on{held_out}; "
        f"{'no classes' if classes is None else f'{classes} classes'}; network of "
        f"{run.model.network.count_params():,} weights; {run.steps} steps of {run.batch_size}"
        f"{begun}."
    )
    try:
        with _stopping(run.stop) as stopped:
            run.fit()
    except (NotFiniteError, ValueError, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):
            run.folder.rmdir()  # unless there is a checkpoint in it
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(_one_line(error)) from error
    if run.done < run.steps:
        run.write_records()
        _say(f"Stopped after {run.done} of {run.steps} steps. The model as it is now:")
        print(run.folder / "model.keras", flush=True)
        _say(f"Go on with: tfdiffusion train --resume --out {shlex.quote(str(run.folder))}")
        raise Stopped(*stopped)
    run.save()
    losses = [f"loss {run.history['loss'][-1]:.4f}"]
    if run.history.get("val_loss"):
        losses.append(f"on images held out {run.history['val_loss'][-1]:.4f}")
    _say(f"Trained in {clock(run.seconds)}: {', '.join(losses)}. Drawing ...")


class Stopped(Exception):
    """A signal ended the work in good order."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.code = 128 + number


@contextlib.contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Makes the first Ctrl-C or SIGTERM call `stop`, and the next one stop at once."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number, frame):
        stopped.append(number)
        restore()
        _say("\nStopping after this step. Once more stops at once, and keeps the last checkpoint.")
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield stopped
    finally:
        restore()


def _finish(run: Any, export: bool) -> None:
    """Pictures, the SavedModel, and where everything is."""
    run.draw()
    import keras

    if export and keras.backend.backend() != "tensorflow":
        _say("No saved_model: it is made with TensorFlow only (KERAS_BACKEND=tensorflow).")
    elif export:
        _say("Exporting ...")
        run.export()
    told = {
        "model.keras": "the model",
        "samples.png": "images that it drew" + ", a column for each class" * _in_columns(run.model),
        "sampling.gif": "from noise to these images",
        "loss.png": "the loss, from history.json",
        "saved_model": "for TensorFlow Serving and tf.saved_model.load",
    }
    for name, what in told.items():
        if (run.folder / name).exists():
            print(f"{(run.folder / name)!s:<{len(str(run.folder)) + 14}} {what}")
    folder = shlex.quote(str(run.folder))
    label = " --label 3 --guidance 2" if (run.model.num_classes or 0) > 3 else ""
    print(
        f"\nTry next:\n  tfdiffusion sample {folder}{label} --num 16 --out more.png\n"
        f"  tfdiffusion info {folder}\n  tfdiffusion train --data mnist"
    )


def _in_columns(model: Any) -> bool:
    from tfdiffusion import runs

    return runs.columns(model.num_classes) is not None


def _run_name(data: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(data).name or Path(data).resolve().name) or "run"


def _check_run_folder(folder: Path, overwrite: bool) -> None:
    _check_parent(folder, "--out")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {str(folder)!r} is a file. Name a folder.")
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--out {str(folder)!r} can't be written to.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(
            f"--out {str(folder)!r} is not empty. Name another folder, pass --resume to go on with "
            "the run that is in it, or --overwrite to delete it."
        )


def _check_parent(path: Path, option: str) -> None:
    """Refuses a path that can't be made: below a file, or where one may not write."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{option} {str(path)!r} lies below {str(parent)!r}, which is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {str(path)!r}: {str(parent)!r} can't be written to.")


def _check_names(args: argparse.Namespace) -> None:
    """Looks names up before data are read, which may take a download."""
    from tfdiffusion import models, predictions, processes

    with _told(UsageError):
        processes.get(args.process)
        predictions.get(args.prediction)
        models.unet((8, 8, 1), size=args.size)


def _check_score_method(args: argparse.Namespace) -> None:
    if args.process != "cosine" or args.prediction != "v":
        raise UsageError(
            f"--process and --prediction belong to --method diffusion; {args.method} learns the "
            "score on a ladder of noise levels that comes from the data."
        )
    if args.conditional:
        raise UsageError(f"--conditional: --method {args.method} does not learn classes.")
    args.conditional = False


def _read(args: argparse.Namespace) -> Any:
    from tfdiffusion import data

    _say(f"Reading {args.data} ...")
    try:
        with _told(UsageError):
            examples = data.read(
                args.data,
                image_size=args.image_size,
                labels=args.conditional,
                data_dir=args.data_dir,
                strict=args.strict,
            )
    except UsageError as error:
        # A download that failed, a file that vanished: not for want of a better argument.
        kind = Failure if isinstance(error.__cause__, RuntimeError | OSError) else UsageError
        raise kind(str(error)) from error.__cause__
    if len(examples.shape) != 3:
        raise UsageError(
            f"--data {args.data} has points, not images. Train on them in Python: "
            "tfdiffusion.DiffusionModel(tfdiffusion.networks.MLP(...)).fit(...)."
        )
    return examples


def _model(args: argparse.Namespace, examples: Any) -> Any:
    from tfdiffusion import models, training

    dtype = args.mixed_precision and f"mixed_{args.mixed_precision}"
    if args.method != "diffusion":
        return _score_model(args, examples, dtype)
    edm = args.prediction == "edm"
    model = training.DiffusionModel(
        models.unet(examples.shape, examples.num_classes, args.size, dtype=dtype),
        args.process,
        args.prediction,
        times="log_normal_sigma" if edm else "stratified",
        sigma_data=0.5 if edm else 1.0,
        seed=args.seed,
        dtype=dtype,
    )
    model.build((None, *examples.shape))
    return model


def _score_model(args: argparse.Namespace, examples: Any, dtype: str | None) -> Any:
    from tfdiffusion import models, score_matching

    images, _ = examples.arrays(10_000)
    # Half of what the paper has for images in [0, 1] would be 0.01 of the range [-1, 1].
    sigmas = score_matching.from_data(images, sigma_min=0.02)
    network = models.refinenet(examples.shape, sigmas, args.method, args.size, dtype=dtype)
    model = score_matching.ScoreModel(network, sigmas, seed=args.seed)
    model.build((None, *examples.shape))
    return model


def _steps(args: argparse.Namespace, num_examples: int) -> int:
    if args.epochs is not None:
        return args.epochs * max(num_examples // args.batch_size, 1)
    return args.steps or (
        _arguments.DIGITS_STEPS if args.data == "digits" else _arguments.OTHER_STEPS
    )


def _sample(args: argparse.Namespace) -> None:
    out = _picture(args.out, "--out", (".png", ".npz"))
    gif = _picture(args.gif, "--gif", (".gif",)) if args.gif else None
    model = _load(args)
    _check_sampling(model, args)
    labels = _labels(model, args)
    import numpy as np

    from tfdiffusion import data, plotting, runs

    seeds = np.arange(args.num, dtype=np.int64) + args.seed
    in_row = runs.columns(model.num_classes) if args.label in (None, "all") else None
    with _work():
        images, path = _draw(model, args, seeds, labels, with_path=gif is not None)
        if out.suffix.lower() == ".npz":
            out.parent.mkdir(parents=True, exist_ok=True)
            arrays = {} if labels is None else {"labels": labels}
            aside = out.with_name(f".{out.stem}.{os.getpid()}.npz")
            np.savez_compressed(aside, images=data.to_uint8(images), seeds=seeds, **arrays)
            os.replace(aside, out)
        else:
            plotting.save_grid(images, out, columns=in_row)
        if gif is not None:
            plotting.save_path_gif(path, gif, columns=in_row)
    last = args.seed + args.num - 1
    seeds = f"seed {args.seed}" if args.num == 1 else f"seeds {args.seed} to {last}"
    print(f"{out}  {args.num} images of {'x'.join(map(str, model.sample_shape))}, {seeds}")
    if gif is not None:
        print(f"{gif}  from noise to {'them' if args.num <= _CHUNK else 'the first of them'}")


def _draw(model: Any, args: argparse.Namespace, seeds: Any, labels: Any, with_path: bool) -> tuple:
    """Images and, of the first of them, the way there; a chunk at a time, to show progress."""
    import numpy as np

    request = _sampling(model, args)
    if not _is_score_model(model):
        request["guidance"] = args.guidance
    images, path = [], None
    with _drawing_bar(len(seeds)) as advance:
        for first in range(0, len(seeds), _CHUNK):
            rows = np.arange(first, min(first + _CHUNK, len(seeds)))
            # The last chunk is filled up: one shape, one compilation.
            filled = rows if len(seeds) <= _CHUNK else np.resize(rows, _CHUNK)
            if labels is not None:
                request["label"] = labels[filled]
            drawn = model.sample(len(filled), seeds=seeds[filled], return_path=with_path, **request)
            if with_path:
                drawn, states = drawn
                path = states if path is None else path
            images.append(drawn[: len(rows)])
            advance(len(rows))
    return np.concatenate(images), path


@contextlib.contextmanager
def _drawing_bar(num: int) -> Iterator[Any]:
    """A progress bar with the time left, if there is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TimeRemainingColumn,
    )

    columns = (SpinnerColumn(), "drawing", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=num)
        yield lambda done: bar.advance(task, done)


def _picture(name: str, option: str, suffixes: tuple[str, ...]) -> Path:
    path = Path(name).expanduser()
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {name!r} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UsageError(f"{option} {name!r} is a folder. Name a file.")
    _check_parent(path, option)
    return path


def _labels(model: Any, args: argparse.Namespace) -> Any:
    """The label of each image, or None."""
    import numpy as np

    from tfdiffusion import runs

    classes = model.num_classes
    if classes is None:
        if args.label is not None:
            raise UsageError("--label: this model is unconditional, it knows no classes.")
        if args.guidance != 1.0:
            raise UsageError("--guidance: this model is unconditional, it has nothing to guide to.")
        return None
    if args.label in (None, "all"):
        return runs.labels_in_turn(args.num, classes)
    if args.label >= classes:
        raise UsageError(f"--label {args.label}: the classes of this model are 0 to {classes - 1}.")
    return np.full(args.num, args.label)


def _evaluate(args: argparse.Namespace) -> None:
    plot = _picture(args.plot, "--plot", (".png",)) if args.plot else None
    model = _load(args)
    train, held_out, name = _divided(args, model)
    images, labels = held_out.arrays(args.num)
    from tfdiffusion import likelihood, plotting

    given = "" if labels is None else ", given their labels"
    shape = "x".join(map(str, images.shape[1:]))
    print(f"{len(images)} images of {name}, {shape}{given}; bits a dimension", flush=True)
    pixels = likelihood.Pixels(args.levels)
    common = {"pixels": pixels, "seed": args.seed}
    with _work(), _told(Failure):
        bound = likelihood.estimate(model, images, labels, evaluations=args.evaluations, **common)
    prior, steps, last = (part.mean() for part in (bound.prior, bound.steps.sum(1), bound.decoder))
    chain = model.process.num_timesteps
    print(
        f"bound  {bound.mean:.3f} ± {bound.standard_error:.3f}   prior {prior:.4f}, steps "
        f"{steps:.3f}, decoder {last:.3f}; {args.evaluations} noise levels an image "
        f"of {f'{chain - 1}' if chain else 'infinitely many'}",
        flush=True,
    )
    if args.draws:
        options = {"draws": args.draws, "tolerance": args.tolerance, **common}
        with _work(), _told(Failure):
            flow = likelihood.log_likelihood(model, images, labels, **options)
        drawn = "" if args.draws == 1 else f", ± {flow.draw_error:.3f} from the draws alone"
        print(
            f"ODE    {flow.mean:.3f} ± {flow.standard_error:.3f}   {args.draws} "
            f"draw{'s' * (args.draws > 1)}{drawn}; {flow.evaluations:.0f} evaluations"
        )
    if plot is not None:
        plotting.bits_by_time({Path(args.model).name: bound.by_time()}, plot)
        print(f"{plot}  the bits of the bound at each noise level")
    if args.baselines:
        _print_baselines(train, args.baselines, images, pixels, args.seed)


def _print_baselines(train: Any, num: int, images: Any, pixels: Any, seed: int) -> None:
    """What others need for the same images, as far as they can be had for them, and in papers."""
    from tfdiffusion.likelihood import baselines

    if train is not None:
        _, train = train.split(num, seed) if num < train.num_examples else (None, train)
        train, _ = train.arrays()

    def gaussians(count: int) -> Any:
        if train is None:
            raise ValueError("there is no split 'train' to fit it to.")
        with _work():
            return baselines.gaussian_mixture(train, images, count, pixels=pixels, seed=seed)

    fitted = "" if train is None else f"uniform noise, fitted to {len(train):,} training images"
    rows = (
        ("Gaussian", lambda: gaussians(1), f"full covariance, {fitted}"),
        ("mixture of 10", lambda: gaussians(10), f"full covariances, {fitted}"),
        ("PNG", lambda: baselines.png(images, pixels), "a file an image"),
        ("PNG, one", lambda: baselines.png_of_all(images, pixels), "all images below each other"),
        ("xz", lambda: baselines.xz(images, pixels), "all images in one stream"),
    )
    print("\nbeside it, for the same images")
    for name, measure, note in rows:
        try:
            print(f"{name:<13}  {_with_error(measure()):<15}  {note}", flush=True)
        except ValueError as error:
            print(f"{name:<13}  left out: {_one_line(error)}")
    print("\npublished, of CIFAR-10")
    for model, bits, source in baselines.PUBLISHED:
        print(f"{model:<28}  {bits:.2f}  {source}")


def _with_error(bits: Any) -> str:
    """Their mean, with its standard error if there are several."""
    import numpy as np

    if np.ndim(bits) == 0:
        return f"{bits:.3f}"
    return f"{bits.mean():.3f} ± {bits.std(ddof=1) / len(bits) ** 0.5:.3f}"


def _divided(args: argparse.Namespace, model: Any) -> tuple:
    """Examples to train on, those held out, and what to call these."""
    from tfdiffusion import data, runs

    has_splits = data.has_splits(args.data)
    if args.split and not has_splits:
        raise UsageError(
            f"--split {args.split}: {args.data} has no splits; what `train` held out is measured."
        )
    split = args.split or "test"
    folder = not has_splits and args.data != "digits"

    def read(**options: Any) -> Any:
        with _told(UsageError):
            return data.read(
                args.data,
                image_size=model.sample_shape[0] if folder else None,
                labels=model.num_classes is not None,
                data_dir=args.data_dir,
                **options,
            )

    if has_splits:
        examples, name = read(split=split), f"{args.data}, {split}"
        try:
            train = read(split="train") if args.baselines else None
        except UsageError:  # a set may have no such split
            train = None
    else:
        train, examples = runs.hold_out(read(), args.seed)
        name = f"{args.data}, held out"
    if examples is None:
        raise UsageError(f"--data {args.data} has too few images: nothing was held out.")
    if tuple(examples.shape) != model.sample_shape:
        raise UsageError(
            f"The model makes {'x'.join(map(str, model.sample_shape))}, and the images of "
            f"{args.data} are {'x'.join(map(str, examples.shape))}."
        )
    return train, examples, name


def _export(args: argparse.Namespace) -> None:
    folder = Path(args.directory).expanduser()
    _check_parent(folder, "DIR")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"DIR {args.directory!r} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise UsageError(
            f"DIR {args.directory!r} is not empty. Name another folder, or pass --overwrite to "
            "replace a SavedModel."
        )
    _start(args.debug)
    import keras

    if keras.backend.backend() != "tensorflow":
        raise UsageError(
            "A SavedModel is made with TensorFlow only: run this with KERAS_BACKEND=tensorflow "
            "(a model trained on another backend will do)."
        )
    model = _load(args)
    _check_sampling(model, args)
    from tfdiffusion import export

    with _work():
        try:
            export.saved_model(model, folder, overwrite=args.overwrite, **_sampling(model, args))
        except FileExistsError as error:
            raise UsageError(_one_line(error)) from error
    print(f"{folder}  a SavedModel: tf.saved_model.load({str(folder)!r}).signatures")


def _info(args: argparse.Namespace) -> None:
    model = _load(args)
    from tfdiffusion import models, processes

    file = models.path(args.model)
    network = model.network
    config = network.get_config()
    levels = config.get("num_timesteps") or model.process.num_timesteps
    run, history = (_json(file.with_name(name)) for name in ("run.json", "history.json"))
    data, classes = run.get("data", {}), model.num_classes
    names = data.get("class_names")
    rows = {
        "file": f"{file} ({file.stat().st_size / 1e6:.1f} MB)",
        "process": processes.name(model.process) + (f", {levels} noise levels" if levels else ""),
        "prediction": model.prediction.name,
        "network": f"{type(network).__name__} "
        + ", ".join(f"{k}={config[k]}" for k in ("width", "widths", "patch_size") if k in config),
        "parameters": f"{network.count_params():,}",
        "precision": network.dtype_policy.name,
        "makes": "x".join(map(str, model.sample_shape)),
        "classes": "none" if classes is None else f"{classes}" + _named(names),
    }
    if not _is_score_model(model):
        own = model.sampling
        rows["samples with"] = f"{own.sampler}, {own.grid}, {own.steps} steps"
    if data:
        rows["data"] = f"{data['name']}, {data['examples']} examples, {data['held_out']} held out"
    if run:
        steps, asked = run["steps"], run["steps_asked_for"]
        stopped = f" of {asked}, stopped early" if steps < asked else ""
        rows["training"] = f"{steps} steps{stopped}, {run['seconds']:.0f} s"
        rows["made with"] = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    for kind, name in (("loss", "loss"), ("held out", "val_loss")):
        losses = history.get(name) or []
        if losses:
            steps = history["val_steps" if name == "val_loss" else "steps"]
            shown = sorted({round(i * (len(losses) - 1) / 3) for i in range(4)})
            rows[kind] = ", ".join(f"{losses[i]:.4f} (step {steps[i]})" for i in shown)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _convert(args: argparse.Namespace) -> None:
    out = Path(args.out).expanduser()
    if out.suffix != ".keras":
        raise UsageError(f"OUT {args.out!r} must end in .keras.")
    if out.is_dir():
        raise UsageError(f"OUT {args.out!r} is a folder. Name a file.")
    if out.exists() and not args.overwrite:
        raise UsageError(f"OUT {args.out!r} is there already. Pass --overwrite to replace it.")
    _check_parent(out, "OUT")
    scored = Path(args.path).suffix in (".pth", ".pt")
    if scored != (args.config is not None):
        raise UsageError(
            "--config goes with a .pth file of score_sde, and names its configuration, such as "
            "ve/cifar10_ncsnpp_continuous."
        )
    _start(args.debug)
    from tfdiffusion import checkpoints, convert

    with _told(Failure):
        if scored:
            model = convert.from_score_sde(Path(args.path).expanduser(), args.config)
        else:
            model = convert.from_diffusers(args.path, image_size=args.image_size)
    with _work():
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save(model, out)
    makes = "x".join(map(str, model.sample_shape))
    print(f"{out}  {makes}, {model.network.count_params():,} parameters")


def _named(names: Sequence[str] | None) -> str:
    if not names or list(names) == [str(i) for i in range(len(names))]:
        return ""
    shown = [f"{i} {name}" for i, name in enumerate(names[:20])]
    return f" ({', '.join(shown)}{', ...' if len(names) > 20 else ''})"


def _json(path: Path) -> dict:
    import json

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a model outside a run folder
        return {}


def _load(args: argparse.Namespace) -> Any:
    """Starts Keras and loads the model, after a look whether there is one."""
    from tfdiffusion import models

    with _told(UsageError):
        file = models.path(args.model)
    _start(args.debug)
    with _told(Failure):
        model = models.load(file)
    if model.sample_shape is None:
        raise Failure(f"{str(file)!r} holds a model that was never trained.")
    return model


def _check_sampling(model: Any, args: argparse.Namespace) -> None:
    from tfdiffusion import samplers
    from tfdiffusion.samplers.loop import resolve_grid

    request = _sampling(model, args)
    if not _is_score_model(model):
        with _told(UsageError):
            sampler = samplers.get(request["sampler"])
            resolve_grid(model.raw, request["grid"], request["steps"], sampler)


def _is_score_model(model: Any) -> bool:
    from tfdiffusion import score_matching

    return isinstance(model, score_matching.ScoreModel)


def _sampling(model: Any, args: argparse.Namespace) -> dict:
    """What the options say of the way from noise to image, with the defaults filled in."""
    if not _is_score_model(model):
        if args.steps_per_level is not None:
            raise UsageError("--steps-per-level: this is a diffusion model; use --steps.")
        return {
            "steps": args.steps or model.sampling.steps,
            "sampler": args.sampler or model.sampling.sampler,
            "grid": args.grid or model.sampling.grid,
        }
    given = [f"--{name}" for name in ("steps", "sampler", "grid") if getattr(args, name)]
    if given:
        raise UsageError(
            f"{' and '.join(given)}: this is a score model, sampled by annealed Langevin dynamics; "
            "use --steps-per-level. (In Python, tfdiffusion.sample(model.denoiser(), ...) runs the "
            "other samplers on it.)"
        )
    return {"steps_per_level": args.steps_per_level or 5}


_COMMANDS = {
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _export,
    "info": _info,
    "convert": _convert,
}
