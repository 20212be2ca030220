"""The arguments of the command line and the texts of its help, which come without Keras."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any

from tfdiffusion import _defaults

# The defaults were chosen so that the digits take about a minute on two cores, and images of
# 28x28 or 32x32 an hour.
DIGITS_STEPS, OTHER_STEPS = 1000, 6000

_DESCRIPTION = """\
Train diffusion models, draw images from them, export them.

A diffusion model learns to remove noise from images. Drawing one starts from pure noise and
removes it step by step.
"""

_EXAMPLES = """\
begin with:
  tfdiffusion train                                  a minute or two, on 1,797 handwritten digits
  tfdiffusion sample runs/digits --label 3 --out threes.png
  tfdiffusion COMMAND --help                         what the options mean, with examples
"""

_TRAIN = """\
Train a model and leave a folder with everything one wants of it:

  model.keras     the model, for `tfdiffusion sample` and tfdiffusion.models.load
  samples.png     images that it draws, a column for each class
  sampling.gif    the way from noise to these images
  loss.png        loss on the training images and on images held out, with the numbers
                  in history.json
  saved_model/    the whole sampler for TensorFlow Serving and tf.saved_model.load
  run.json        the arguments and versions

Ctrl-C stops the training and keeps the model as it is then; `--resume` goes on from there, or from
the last of the checkpoints that are saved every minute, as if it had never stopped.
"""

_TRAIN_EXAMPLES = """\
examples:
  tfdiffusion train
  tfdiffusion train --data mnist --steps 6000
  tfdiffusion train --data photos/ --image-size 64 --unconditional --flip --out runs/photos
  tfdiffusion train --resume --out runs/photos
  tfdiffusion train --data cifar10 --size base --epochs 300 --mixed-precision   (on a GPU)
"""

_SAMPLE_EXAMPLES = """\
MODEL is a .keras file, a folder that `tfdiffusion train` wrote, or a model that ships with the
package: {names}. Image i has the seed SEED + i and does not depend on the others.

examples:
  tfdiffusion sample runs/digits
  tfdiffusion sample runs/digits --label 3 --guidance 2 --num 16 --out threes.png --gif threes.gif
"""

_EXPORT_EXAMPLES = """\
The folder takes seeds (and labels and a guidance) and gives images, in any program that runs
TensorFlow: neither Keras nor this package is needed there.

example:
  tfdiffusion export runs/digits served/digits/1 --steps 25
"""


_EVALUATE = """\
Tell what a model says about images it has not seen, in bits a dimension (lower is better): by the
variational bound and by the probability-flow ODE, each with its standard error. Beside it stand
what a Gaussian, a mixture of ten, PNG and xz need for the same images, and what papers report.
"""

_EVALUATE_EXAMPLES = """\
MODEL is a .keras file, a folder that `tfdiffusion train` wrote, or a model that ships with the
package: {names}. Data without splits (the digits, folders) are divided as `train` does with the
same --seed, and the tenth that it holds out is what is measured.

examples:
  tfdiffusion evaluate mnist --data mnist --split test --num 200
  tfdiffusion evaluate runs/digits --data digits --levels 17 --plot bits.png
"""


_CONVERT = """\
Make a Keras model that gives the same numbers as a PyTorch checkpoint: a pipeline or UNet2DModel of
diffusers, from a folder or the Hugging Face Hub, or an NCSN++ or DDPM++ of score_sde. PyTorch is
not needed, and nothing in the files is executed.
"""

_CONVERT_EXAMPLES = """\
examples:
  tfdiffusion convert google/ddpm-cifar10-32 cifar10.keras     (pip install 'tfdiffusion[convert]')
  tfdiffusion convert a/folder mine.keras && tfdiffusion export mine.keras served/mine/1
  tfdiffusion convert checkpoint_8.pth sde.keras --config vp/cifar10_ddpmpp_continuous
"""


class Failure(Exception):
    """It could not be done; the message is one line for the person at the terminal."""

    code = 1


class UsageError(Failure):
    """An argument is wrong."""

    code = 2


class _Parser(argparse.ArgumentParser):
    """Raises its errors, one line each."""

    def __init__(self, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UsageError(f"{message.strip()}  (see `{self.prog} --help`)")


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the arguments of a command; UsageError if one is unknown or of the wrong kind."""
    parser, commands = parsers()
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise UsageError(_unknown("command", argv[0], commands))
    args, extra = parser.parse_known_args(argv)
    if args.command is None:
        parser.error("a command is missing: train, sample, evaluate, export, info or convert")
    if extra:
        if not extra[0].startswith("-"):
            commands[args.command].error(f"unexpected argument {extra[0]!r}")
        known = commands[args.command]._option_string_actions
        raise UsageError(_unknown("option", extra[0].split("=")[0], known))
    words = {word.split("=")[0] for word in argv}
    options = commands[args.command]._option_string_actions
    # Which options were given, by their names in the namespace: {"steps": "--steps"}.
    args.given = {action.dest: name for name, action in options.items() if name in words}
    return args


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line, and that of each command."""
    from tfdiffusion import __version__

    parser = _Parser(prog="tfdiffusion", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"tfdiffusion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    by_name = {
        "train": _train_parser(commands),
        "sample": _sample_parser(commands),
        "evaluate": _evaluate_parser(commands),
        "export": _export_parser(commands),
        "info": _info_parser(commands),
        "convert": _convert_parser(commands),
    }
    for command in by_name.values():
        command.add_argument(
            "--debug", action="store_true", help="show tracebacks and TensorFlow's messages"
        )
    return parser, by_name


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    shown = sorted(k for k in known if not k.startswith("-") or k.startswith("--"))
    return f"Unknown {kind} {name}.{hint} Known: {', '.join(shown)}."


def _train_parser(commands: Any) -> _Parser:
    parser = commands.add_parser(
        "train", help="train a model on images", description=_TRAIN, epilog=_TRAIN_EXAMPLES
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="digits",
        metavar="NAME|FOLDER",
        help="digits (default: 1,797 handwritten digits of 8x8 pixels, no download), mnist, "
        "fashion_mnist, cifar10 or any other image set of TensorFlow Datasets (downloaded if "
        "needed), or a folder of images, whose sub-folders are classes",
    )
    data.add_argument(
        "--image-size",
        type=_whole(1),
        metavar="PIXELS",
        help="crop to a square and resize to this side (default: as they are)",
    )
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where TensorFlow Datasets keeps its sets (~/tensorflow_datasets)",
    )
    data.add_argument(
        "--flip", action="store_true", help="mirror every other image: for photos, not for digits"
    )
    data.add_argument(
        "--strict", action="store_true", help="stop at an image that can't be read, don't skip it"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--method",
        choices=("diffusion", "ncsn", "ncsnv2"),
        default="diffusion",
        help="diffusion (default), or score matching on a ladder of noise levels that comes from "
        "the data, sampled by annealed Langevin dynamics: ncsn (2019), ncsnv2 (2020)",
    )
    model.add_argument(
        "--process",
        default="cosine",
        metavar="NAME",
        help="how images become noise: cosine (default), linear, scaled_linear, sigmoid, vp, "
        "sub_vp, ve, flow (straight lines: flow matching), edm, continuous_cosine",
    )
    model.add_argument(
        "--prediction",
        metavar="NAME",
        help="what the network learns to tell: v (a mix of image and noise; the default), noise, "
        "clean, score, flow (the default with --process flow), edm (with edm and ve)",
    )
    labels = model.add_mutually_exclusive_group()
    labels.add_argument(
        "--conditional",
        action="store_true",
        default=None,
        help="learn the classes, to draw what one asks for (default if the data have labels)",
    )
    labels.add_argument(
        "--unconditional", dest="conditional", action="store_false", help="ignore the classes"
    )
    model.add_argument(
        "--size",
        default="small",
        metavar="NAME",
        help="of the network: small (default, for a few processor cores) or base (for a GPU)",
    )
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=_whole(1), metavar="N", help="how often to see every image"
    )
    length.add_argument(
        "--steps",
        type=_whole(1),
        metavar="N",
        help=f"how many batches to train on (default: {DIGITS_STEPS} for digits, "
        f"{OTHER_STEPS} otherwise)",
    )
    training.add_argument(
        "--batch-size",
        type=_whole(1),
        default=64,
        metavar="N",
        help="images in a step (default: 64)",
    )
    training.add_argument(
        "--learning-rate",
        type=_positive,
        metavar="RATE",
        default=1e-3,
        help="its highest value: it rises quickly and then falls along a cosine (default: 0.001)",
    )
    training.add_argument(
        "--mixed-precision",
        nargs="?",
        const="bfloat16",
        choices=("bfloat16", "float16"),
        help="compute in 16 bits, faster on hardware that can (bfloat16, or float16 if named)",
    )
    training.add_argument(
        "--seed",
        type=_whole(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="of weights, order and noise (default: 0)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="run folder (default: runs/ and the data)")
    kept = output.add_mutually_exclusive_group()
    kept.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the folder, with the options it was begun with (a new run if "
        "there is none)",
    )
    kept.add_argument(
        "--overwrite", action="store_true", help="delete the run that is in the folder first"
    )
    output.add_argument(
        "--checkpoint-every",
        type=_positive,
        default=60.0,
        metavar="SECONDS",
        help="save the model this often (default: 60)",
    )
    output.add_argument(
        "--no-export", dest="export", action="store_false", help="leave the SavedModel out"
    )
    return parser


def _sampling_arguments(parser: Any) -> None:
    parser.add_argument(
        "--steps",
        type=_whole(1),
        metavar="N",
        help="steps from noise to image: more take longer and come closer to the exact solution "
        f"(default: {_defaults.STEPS}; imported models bring their own, as of the next two)",
    )
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help=f"{_defaults.SAMPLER} (default: few steps, no noise on the way), ddim (the simplest "
        "of that kind), ddpm (fresh noise at every step, needs a hundred or more), or another: "
        "unipc_2, plms, deis, heun, ...",
    )
    parser.add_argument(
        "--grid",
        metavar="NAME",
        help=f"which noise levels to visit: {_defaults.GRID} (default), uniform, quadratic, "
        "log_snr, optimized, linspace, leading",
    )
    parser.add_argument(
        "--steps-per-level",
        type=_whole(1),
        metavar="N",
        help="of models trained with --method ncsn or ncsnv2, instead of the three above: steps of "
        "Langevin dynamics at each noise level (default: 5)",
    )


def _sample_parser(commands: Any) -> _Parser:
    from tfdiffusion import models

    parser = commands.add_parser(
        "sample",
        help="draw images from a model",
        description="Draw images from a trained model.",
        epilog=_SAMPLE_EXAMPLES.format(names=", ".join(models.names()) or "none so far"),
    )
    parser.add_argument("model", metavar="MODEL", help="file, run folder or name")
    parser.add_argument(
        "--num", type=_whole(1), default=64, metavar="N", help="how many (default: 64)"
    )
    _sampling_arguments(parser)
    parser.add_argument(
        "--label",
        type=_label,
        metavar="N|all",
        help="the class to draw; all draws a column for each class (default if there are any)",
    )
    parser.add_argument(
        "--guidance",
        type=_number,
        metavar="SCALE",
        default=1.0,
        help="how much to exaggerate the class: 1 (default) as learned, 2 to 4 clearer and less "
        "varied, 0 ignores it",
    )
    parser.add_argument(
        "--seed",
        type=_whole(0, 2**62),
        default=0,
        metavar="N",
        help="of the first image (default: 0)",
    )
    parser.add_argument(
        "--out",
        default="samples.png",
        metavar="FILE",
        help="a .png for a grid, or an .npz for the arrays images (uint8), seeds and labels "
        "(default: samples.png)",
    )
    parser.add_argument("--gif", metavar="FILE", help="also the way from noise to the images")
    return parser


def _evaluate_parser(commands: Any) -> _Parser:
    from tfdiffusion import models

    parser = commands.add_parser(
        "evaluate",
        help="measure bits a dimension on held-out images",
        description=_EVALUATE,
        epilog=_EVALUATE_EXAMPLES.format(names=", ".join(models.names()) or "none so far"),
    )
    parser.add_argument("model", metavar="MODEL", help="file, run folder or name")
    parser.add_argument(
        "--data", required=True, metavar="NAME|FOLDER", help="as in `tfdiffusion train`"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of a TensorFlow Datasets set (default: test)"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where TensorFlow Datasets keeps its sets (~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--num", type=_whole(2), default=128, metavar="N", help="how many images (default: 128)"
    )
    parser.add_argument(
        "--levels",
        type=_whole(2),
        default=256,
        metavar="N",
        help="values that a pixel can have (default: 256; the digits have 17)",
    )
    parser.add_argument(
        "--evaluations",
        type=_whole(1),
        default=50,
        metavar="N",
        help="noise levels an image for the bound: more take longer and err less (default: 50)",
    )
    parser.add_argument(
        "--draws",
        type=_whole(0),
        default=1,
        metavar="N",
        help="draws of noise for the ODE; 0 leaves it out (default: 1)",
    )
    parser.add_argument(
        "--tolerance",
        type=_positive,
        default=1e-3,
        metavar="NUMBER",
        help="of the ODE's solver (default: 0.001)",
    )
    parser.add_argument(
        "--seed", type=_whole(0, 2**31 - 1), default=0, metavar="N", help="of noise (default: 0)"
    )
    parser.add_argument(
        "--baselines",
        type=_whole(0),
        default=10_000,
        metavar="N",
        help="training images that the Gaussians are fitted to; 0 leaves out all that stands "
        "beside the model (default: 10000)",
    )
    parser.add_argument("--plot", metavar="FILE", help="a .png of the bits at each noise level")
    return parser


def _export_parser(commands: Any) -> _Parser:
    parser = commands.add_parser(
        "export",
        help="write a SavedModel for servers",
        description="Write the model with its whole sampler as one SavedModel.",
        epilog=_EXPORT_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="file, run folder or name")
    parser.add_argument("directory", metavar="DIR", help="to write")
    _sampling_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a SavedModel in DIR")
    return parser


def _info_parser(commands: Any) -> _Parser:
    parser = commands.add_parser(
        "info",
        help="tell what a model is",
        description="Tell what a model is, and how it was trained if it lies in its run folder.",
    )
    parser.add_argument("model", metavar="MODEL", help="file, run folder or name")
    return parser


def _convert_parser(commands: Any) -> _Parser:
    parser = commands.add_parser(
        "convert",
        help="make a model of a checkpoint of diffusers or score_sde",
        description=_CONVERT,
        epilog=_CONVERT_EXAMPLES,
    )
    parser.add_argument(
        "path", metavar="PATH", help="folder, name on the Hugging Face Hub, or .pth file"
    )
    parser.add_argument("out", metavar="OUT", help="a .keras file to write")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="of a .pth file: its configuration in score_sde, such as vp/cifar10_ddpmpp_continuous",
    )
    parser.add_argument(
        "--image-size",
        type=_whole(1),
        metavar="PIXELS",
        help="side of the images (default: the checkpoint's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser


def _whole(least: int, most: int | None = None):
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}"
                f"{'' if most is None else f' and at most {most}'}, got {text!r}"
            )
        return value

    return convert


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _label(text: str) -> int | str:
    if text == "all" or text.isdecimal():
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"must be the number of a class, or all; got {text!r}")
