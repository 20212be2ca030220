"""The command line: what it makes, and what it says when something is wrong."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import tfdiffusion as tfd
from tfdiffusion import _arguments, _names, callbacks, cli, fitting, models, networks, runs

ROOT = Path(__file__).parent.parent
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The real entry point, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_CPP")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "tfdiffusion", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )


def tiny_unet(shape, num_classes=None, size="small", dtype=None):
    """Stands for `models.unet`, with a network that is made in a moment."""
    _names.look_up("size", size, models._SIZES)
    return networks.UNet(
        out_channels=shape[2],
        widths=(8,),
        blocks_per_level=1,
        groups=4,
        mid_attention=False,
        num_classes=num_classes,
        dtype=dtype,
    )


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs in a folder of its own, with tiny networks."""
    monkeypatch.setattr(models, "unet", tiny_unet)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the real entry point with nothing but the number of steps, and what it printed."""
    folder = tmp_path_factory.mktemp("work")
    result = command("train", "--steps", "2", "--no-export", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "digits", result


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """The file of a model with three classes."""
    return _saved(tmp_path_factory.mktemp("conditional") / "model.keras", 3)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """The file of a model without classes."""
    return _saved(tmp_path_factory.mktemp("unconditional") / "model.keras", None)


def _saved(file: Path, num_classes: int | None) -> str:
    model = tfd.DiffusionModel(tiny_unet((4, 4, 1), num_classes), "cosine", "v")
    model.build((None, 4, 4, 1))
    for i, weight in enumerate(model.network.trainable_weights):
        weight.assign(keras.random.normal(weight.shape, stddev=0.3, seed=i))
    model.ema.reset()
    model.save(file)
    return str(file)


def refused(capsys, *arguments: str, code: int = 2) -> str:
    """Runs a command that must fail with one line on stderr, and returns the line."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("Reading ")]
    assert len(lines) == 1 and not out, err
    assert lines[0].startswith("tfdiffusion") and ": error: " in lines[0]
    assert "Traceback" not in err
    return lines[0]


# ------------------------------------------------------------------------------------------ help


def test_help_comes_without_keras():
    code = """
import sys
sys.argv = ["tfdiffusion", "train", "--help"]
from tfdiffusion.cli import main
try:
    main()
finally:
    heavy = {"keras", "numpy", "tensorflow", "jax", "rich", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout and "--mixed-precision" in result.stdout


@pytest.mark.parametrize("name", ["train", "sample", "export", "info", "convert"])
def test_every_command_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([name, "--help"])
    assert exit_info.value.code == 0
    assert "usage: tfdiffusion " + name in capsys.readouterr().out
    parser = _arguments.parsers()[1][name]
    assert all(action.help for action in parser._actions)


def test_the_help_names_what_there_is(capsys):
    def text(name: str) -> str:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        return capsys.readouterr().out

    train, sample = text("train"), text("sample")
    names = [*tfd.processes.names(), *tfd.predictions.names()]
    assert not [name for name in names if name not in train]
    names = [*models.names(), "ddim", "ddpm"]
    assert not [name for name in names if name not in sample]
    assert {"ddim", "ddpm"} <= set(tfd.samplers.names())


def test_no_command_shows_the_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([])
    assert exit_info.value.code == 2
    assert "begin with:" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- train


def test_training_leaves_a_run_folder(run_folder):
    folder, _ = run_folder
    assert {path.name for path in folder.iterdir()} == set(runs.FILES)
    model = models.load(folder)
    assert model.num_classes == 10 and model.sample_shape == (8, 8, 1)
    grid = Image.open(folder / "samples.png")
    assert grid.size[0] > 400 and grid.size[0] == grid.size[1]  # 10 classes, 10 of each
    gif = Image.open(folder / "sampling.gif")
    assert gif.n_frames > 20
    gif.seek(gif.n_frames - 1)
    assert Image.open(folder / "loss.png").size[0] > 400
    history = json.loads((folder / "history.json").read_text())
    assert history["steps"] == [1, 2] == history["val_steps"]
    assert all(len(losses) == 2 for losses in history.values())
    assert np.isfinite(history["loss"] + history["val_loss"]).all()
    record = json.loads((folder / "run.json").read_text())
    assert record["steps"] == 2 and record["arguments"]["prediction"] == "v"
    assert record["data"]["examples"] + record["data"]["held_out"] == 1797
    assert record["versions"]["keras"] == keras.__version__


def test_training_tells_what_it_does_and_nothing_else(run_folder):
    result = run_folder[1]
    for name in set(runs.FILES) - {"run.json", "history.json"}:
        assert f"runs/digits/{name}" in result.stdout
    assert "Try next:" in result.stdout and "tfdiffusion sample runs/digits" in result.stdout
    lines = result.stderr.splitlines()
    beginnings = ("Reading", "1618 images", "step 1/2, loss", "step 2/2, loss", "Trained in")
    assert len(lines) == len(beginnings), result.stderr
    assert all(line.startswith(start) for line, start in zip(lines, beginnings))


def test_a_seed_repeats_a_training(tiny, monkeypatch, capsys):
    """The same losses, whatever ran before."""
    monkeypatch.setattr(runs.Run, "draw", lambda run: None)
    monkeypatch.setattr(runs, "hold_out", lambda examples, seed: (examples, None))
    common = ["train", "--steps", "2", "--no-export", "--unconditional", "--batch-size", "8"]
    for out in ("a", "b"):
        assert cli.main([*common, "--seed", "1", "--out", out]) == 0
    a, b = (json.loads(Path(out, "history.json").read_text())["loss"] for out in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert models.load("a").num_classes is None


def test_training_without_tensorflow_leaves_the_export_out(tiny, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_fit", lambda run: None)
    monkeypatch.setattr(runs.Run, "draw", lambda run: None)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert cli.main(["train"]) == 0
    assert "KERAS_BACKEND=tensorflow" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes, and a file that is no image."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "dog" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_ctrl_c_keeps_the_model(tiny, photos, monkeypatch, capsys):
    """On a folder of images; the file that can't be read is named, and skipped."""
    step = callbacks.Progress.on_train_batch_end

    def interrupted(self, batch, logs=None):
        step(self, batch, logs)
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(callbacks.Progress, "on_train_batch_end", interrupted)
    arguments = ["train", "--data", "photos", "--steps", "50", "--batch-size", "4", "--flip"]
    assert cli.main(arguments) == 130
    out, err = capsys.readouterr()
    assert out.strip() == "runs/photos/model.keras"
    assert "warning: " in err and "broken.png" in err and "Traceback" not in err
    assert models.load("runs/photos").num_classes == 2
    record = json.loads(Path("runs/photos/run.json").read_text())
    assert 2 <= record["steps"] <= 3 and record["steps_asked_for"] == 50
    assert record["data"]["class_names"] == ["cat", "dog"]
    assert cli.main(["info", "runs/photos"]) == 0
    out = capsys.readouterr().out
    assert "0 cat, 1 dog" in out and "stopped early" in out and "cosine" in out


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
    for name in ("model.keras", "samples.png", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "saved_model" / "variables").mkdir(parents=True)
    runs.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean train?"),
        (["train", "--batchsize", "3"], "Did you mean --batch-size?"),
        (["train", "digits"], "unexpected argument 'digits'"),
        (["train", "--batch-size", "0"], "argument --batch-size: must be a whole number of at le"),
        (["train", "--steps", "0"], "argument --steps: must be a whole number of at least 1"),
        (["train", "--steps", "many"], "got 'many'"),
        (["train", "--steps", "1", "--epochs", "1"], "not allowed with argument"),
        (["train", "--conditional", "--unconditional"], "not allowed with argument"),
        (["train", "--image-size", "-8"], "argument --image-size"),
        (["train", "--learning-rate", "0"], "must be a number above 0, got '0'"),
        (["train", "--learning-rate", "nan"], "must be a number, got 'nan'"),
        (["train", "--seed", "99999999999"], "at most 2147483647"),
        (["train", "--mixed-precision", "int8"], "argument --mixed-precision"),
        (["train", "--process", "cosin"], "Unknown process 'cosin'. Did you mean 'cosine'?"),
        (["train", "--prediction", "nois"], "Did you mean 'noise'?"),
        (["train", "--size", "bass"], "Did you mean 'base'?"),
        (["train", "--data", "./nowhere"], "Folder 'nowhere' does not exist"),
        (["train", "--data", "digit"], "Did you mean 'digits'"),
        (["train", "--data", "swiss_roll"], "points, not images"),
        (
            ["train", "--out", "full"],
            "pass --resume to go on with the run that is in it, or --overwr",
        ),
        (["train", "--resume", "--overwrite"], "not allowed with argument"),
        (["train", "--out", "file"], "is a file"),
        (["train", "--out", "file/run"], "lies below"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_of_train(tiny, capsys, arguments, message):
    Path("full").mkdir()
    Path("full", "something").write_text("")
    Path("file").write_text("")
    assert message in refused(capsys, *arguments)
    assert {path.name for path in Path().iterdir()} == {"full", "file"}  # nothing was begun


def test_folders_that_cannot_be_trained_on(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    line = refused(capsys, "train", "--data", "photos", "--strict")
    assert "broken.png" in line and "leave --strict out to skip them" in line
    (photos / "dog" / "broken.png").unlink()
    assert "no labels" in refused(capsys, "train", "--data", "photos/dog", "--conditional")
    pixels = np.zeros((27, 27, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "cat" / "large.png")
    for file in [*photos.glob("*/*.png")][:12]:
        Image.fromarray(pixels).save(file)
    assert "Pass --image-size" in refused(capsys, "train", "--data", "photos")
    line = refused(capsys, "train", "--data", "photos", "--image-size", "27")
    assert "27x27" in line and "--image-size that can, such as 2" in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MemoryError(), "Use a smaller --batch-size"),
        (fitting.NotFiniteError(fitting._FAULTS[4]), "infinite. Use a smaller --learning-rate."),
    ],
    ids=["disk", "memory", "nan"],
)
def test_misfortunes_of_a_training(tiny, monkeypatch, capsys, error, message):
    def fit(run):
        raise error

    monkeypatch.setattr(runs.Run, "fit", fit)
    assert cli.main(["train"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("tfdiffusion train: error: ") and message in line


def test_bugs_keep_their_traceback(tiny, monkeypatch):
    def fit(run):
        raise ZeroDivisionError

    monkeypatch.setattr(runs.Run, "fit", fit)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


# ---------------------------------------------------------------------------------------- sample


@pytest.fixture
def loaded_once(monkeypatch):
    """Spares loading and compiling the same model again and again."""
    monkeypatch.setattr(models, "load", _load_once)


_load_once = functools.cache(models.load)


def drawn(model: str, *arguments: str) -> dict[str, np.ndarray]:
    """What `sample` puts into an .npz file."""
    assert cli.main(["sample", model, "--steps", "2", "--out", "x.npz", *arguments]) == 0
    return dict(np.load("x.npz"))


def test_samples_follow_seed_label_and_guidance(
    conditional, loaded_once, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_CHUNK", 4)
    many = drawn(conditional, "--num", "7")
    assert many["images"].shape == (7, 4, 4, 1) and many["images"].dtype == np.uint8
    np.testing.assert_array_equal(many["labels"], np.arange(7) % 3)
    np.testing.assert_array_equal(many["seeds"], np.arange(7))
    assert len(np.unique(many["images"], axis=0)) == 7
    one = drawn(conditional, "--num", "1", "--label", "2", "--seed", "5")
    near = np.abs(one["images"][0].astype(int) - many["images"][5])  # label 5 % 3 = 2
    assert near.max() <= 1
    guided = drawn(conditional, "--num", "1", "--label", "2", "--seed", "5", "--guidance", "4")
    assert np.abs(guided["images"].astype(int) - one["images"]).max() > 1
    model = models.load(conditional)
    expected = model.sample(1, label=2, guidance=4.0, steps=2, seed=5)
    assert np.abs(tfd.data.to_uint8(expected).astype(int) - guided["images"]).max() <= 1


def test_pictures_of_samples(unconditional, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--num", "4", "--steps", "3", "--out", "a/b.png", "--gif", "a/c.gif"]
    assert cli.main(["sample", unconditional, "--sampler", "ddpm", *arguments]) == 0
    out = capsys.readouterr().out
    assert "a/b.png" in out and "seeds 0 to 3" in out and "a/c.gif" in out
    assert np.ptp(np.asarray(Image.open("a/b.png"))) > 0
    assert Image.open("a/c.gif").n_frames == 4  # three steps
    assert sorted(path.name for path in Path("a").iterdir()) == ["b.png", "c.gif"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "3"], "the classes of this model are 0 to 2"),
        (["--label", "cat"], "argument --label: must be the number of a class, or all"),
        (["--num", "0"], "argument --num"),
        (["--guidance", "much"], "argument --guidance"),
        (["--steps", "0"], "argument --steps"),
        (["--steps", "1001"], "1000 noise levels"),
        (["--sampler", "dimd"], "Unknown sampler 'dimd'. Did you mean 'ddim'?"),
        (["--grid", "uniforn"], "Did you mean 'uniform'?"),
        (["--out", "x.jpg"], "must end in .png or .npz"),
        (["--gif", "x.png"], "must end in .gif"),
        (["--out", "folder.png"], "is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_of_sample(conditional, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    assert message in refused(capsys, "sample", conditional, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_an_unconditional_model_has_no_classes(unconditional, capsys):
    assert "unconditional" in refused(capsys, "sample", unconditional, "--label", "1")
    assert "unconditional" in refused(capsys, "sample", unconditional, "--guidance", "2")


def test_models_that_cannot_be_used(conditional, tmp_path, capsys):
    assert "no model 'nowhere'" in refused(capsys, "sample", "nowhere")
    assert "no model.keras" in refused(capsys, "info", str(tmp_path))
    damaged = tmp_path / "x.keras"
    damaged.write_bytes(Path(conditional).read_bytes()[:2000])
    assert "It is incomplete or was changed" in refused(capsys, "sample", str(damaged), code=1)
    text = tmp_path / "x.txt"
    text.write_text("")
    assert "not a .keras file" in refused(capsys, "info", str(text))


def test_only_two_backends_will_do(conditional, monkeypatch, capsys):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    assert "KERAS_BACKEND is 'torch'" in refused(capsys, "info", conditional)


# -------------------------------------------------------------------------------- export and info


def test_export_writes_a_saved_model(unconditional, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    assert "is not empty" in refused(capsys, "export", unconditional, "full")
    if not ON_TENSORFLOW:
        assert "KERAS_BACKEND=tensorflow" in refused(capsys, "export", unconditional, "x")
        return
    assert "--overwrite" not in refused(capsys, "export", unconditional, "full", "--overwrite")
    line = refused(capsys, "export", unconditional, "x", "--sampler", "dimd")
    assert "Did you mean 'ddim'?" in line
    solver = ["--sampler", "dpmpp_2m", "--steps", "15"]
    assert cli.main(["export", unconditional, "served/1", *solver]) == 0
    assert "served/1" in capsys.readouterr().out
    import tensorflow as tf

    signature = tf.saved_model.load("served/1").signatures["serving_default"]
    images = signature(seed=tf.constant([5, 6], tf.int64))["images"].numpy()
    expected = drawn(unconditional, "--num", "2", "--seed", "5", *solver)["images"]
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_info_of_a_run(run_folder, capsys):
    assert cli.main(["info", str(run_folder[0])]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    model = models.load(run_folder[0])
    assert lines["process"] == "cosine, 1000 noise levels" and lines["prediction"] == "v"
    assert lines["parameters"] == f"{model.network.count_params():,}"
    assert lines["makes"] == "8x8x1" and lines["classes"] == "10"
    assert lines["data"].startswith("digits, 1618 examples")
    assert "(step 2)" in lines["loss"]


def test_info_of_a_bare_file(unconditional, capsys):
    assert cli.main(["info", unconditional]) == 0
    out = capsys.readouterr().out
    assert "4x4x1" in out and "none" in out and "training" not in out


# -------------------------------------------------------------------------------------- evaluate


def test_evaluate_prints_bound_and_likelihood_with_errors(capsys, conditional, tmp_path):
    """On what `train` holds out of a folder, whose images are resized to the model's."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for i in range(45):
        (folder / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"c{i % 3}" / f"{i}.png")
    plot = tmp_path / "bits.png"
    arguments = ("--num", "4", "--evaluations", "3", "--tolerance", "0.05", "--plot", str(plot))
    code = cli.main(["evaluate", conditional, "--data", str(folder), *arguments])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "4 images of" in out and "given their labels" in out
    number = r"-?\d+\.\d{3} ± \d+\.\d{3}"
    assert re.search(rf"bound  {number}   prior .* of 999", out)
    assert re.search(rf"ODE    {number}   1 draw; \d+ evaluations", out)
    assert Image.open(plot).size[0] > 400
    for name in ("Gaussian", "mixture of 10", "PNG"):
        assert re.search(rf"{name} +{number}  ", out), name
    for name in ("PNG, one", "xz"):
        assert re.search(rf"{name} +\d+\.\d{{3}} +all images", out), name
    assert "fitted to 41 training images" in out
    assert re.search(r"VDM, bound +2\.65  .*arXiv:2107\.00630", out)


def test_evaluate_says_what_cannot_stand_beside_it(capsys, unconditional, tmp_path):
    """Files hold 256 values at most; and nothing stands there if one wants nothing."""
    for i in range(20):
        image = np.full((4, 4), 10 * i, np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    arguments = ["evaluate", unconditional, "--data", str(tmp_path), "--draws", "0", "--num", "2"]
    assert cli.main([*arguments, "--levels", "511"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"PNG  +left out: Files hold Pixels of at most 256 values", out)
    assert re.search(r"Gaussian +\S+ ± ", out) and "fitted to 18" in out
    assert cli.main([*arguments, "--baselines", "0"]) == 0
    out = capsys.readouterr().out
    assert "bound" in out and "Gaussian" not in out and "published" not in out


def test_evaluate_refuses(capsys, unconditional, tmp_path):
    assert "has no splits" in refused(
        capsys, "evaluate", unconditional, "--data", "digits", "--split", "test"
    )
    line = refused(capsys, "evaluate", unconditional, "--data", "digits")
    assert "The model makes 4x4x1, and the images of digits are 8x8x1" in line
    assert "--data" in refused(capsys, "evaluate", unconditional)
