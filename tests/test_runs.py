"""A run that is stopped, killed or out of disk loses nothing that was saved, and goes on alike."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from oracles import numpy

from tfdiffusion import DiffusionModel, checkpoints, cli, data, models, networks, runs

STEPS = 23  # entries of 1 step are too simple: 46 examples in batches of 4 make 11 an epoch


def examples(num=46):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(num, 4, 4, 1)).astype("float32")
    return data.read((x, np.arange(num) % 3))


def made(num=46, **arguments):
    keras.utils.set_random_seed(0)
    network = networks.UNet(
        out_channels=1,
        widths=(8,),
        blocks_per_level=1,
        groups=4,
        mid_attention=False,
        num_classes=3,
        dropout=0.2,  # whose random numbers must go on too
    )
    return DiffusionModel(network, prediction="v", times="stratified", **arguments)


@pytest.fixture
def long_entries(monkeypatch):
    """Entries of the history of 5 steps."""
    monkeypatch.setattr(runs, "_MIN_HISTORY", 4)


def run_of(folder, **arguments):
    train, held_out = runs.hold_out(examples())
    arguments = {"steps": STEPS, "batch_size": 4, "flip": True, **arguments}
    return runs.Run(folder, made(), train, held_out, **arguments)


class StopAt(keras.callbacks.Callback):
    """Asks a run to stop in the middle of a step."""

    def __init__(self, run, steps):
        super().__init__()
        self.run, self.steps = run, steps

    def on_train_batch_end(self, batch, logs=None):
        if self.run.done in self.steps:
            self.run.stop()


def state(run):
    """All that training changes."""
    model = run.model
    named = {f"optimizer {i}": v for i, v in enumerate(model.optimizer.variables)}
    named |= {f"model {i}": v for i, v in enumerate(model.variables)}
    return {name: numpy(v) for name, v in named.items()}


def assert_same_state(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, long_entries):
    """Bit by bit: stopped at the end of an entry, and within one, before the last step."""
    whole = run_of(tmp_path / "whole")
    whole.fit(progress=False)
    assert whole.entry_steps == 5 and whole.done == STEPS
    assert whole.history["steps"] == [5, 10, 15, 20, 23]

    parts = run_of(tmp_path / "parts")
    stops = (10, 22)
    parts.fit(progress=False, extra=[StopAt(parts, stops)])
    for i, stop in enumerate(stops):
        assert parts.done == stop < STEPS
        keras.utils.set_random_seed(99 + i)  # another process knows nothing of the global seed
        parts = runs.Run.resume(tmp_path / "parts", *runs.hold_out(examples()))
        assert parts.done == stop
        parts.fit(progress=False, extra=[StopAt(parts, stops[i + 1 :])])
    assert parts.done == STEPS
    assert parts.history == whole.history
    assert_same_state(state(parts), state(whole))
    assert parts.seconds > 0


def test_a_run_that_is_finished_is_not_trained_on(tmp_path):
    run = run_of(tmp_path / "run", steps=2)
    run.fit(progress=False)
    run.save()
    again = runs.Run.resume(tmp_path / "run", *runs.hold_out(examples()))
    before = state(again)
    again.fit(progress=False)
    assert again.done == 2
    assert_same_state(state(again), before)


def test_other_data_are_refused(tmp_path):
    run = run_of(tmp_path / "run", steps=2)
    run.fit(progress=False)
    run.save()
    with pytest.raises(ValueError, match=r"data have changed .* examples were 42, now 27"):
        runs.Run.resume(tmp_path / "run", *runs.hold_out(examples(30)))


def test_a_disk_that_fills_leaves_the_last_checkpoint(tmp_path):
    """The system refuses to write: the error says so, and what was saved before is whole."""
    run = run_of(tmp_path / "run", steps=2)
    run.fit(progress=False)
    run.save()
    before = (tmp_path / "run" / "model.keras").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Saving failed: .*model.keras' is still the one saved"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "model.keras").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))  # nor is anything left lying about


def test_damaged_checkpoints_are_refused(tmp_path):
    run = run_of(tmp_path / "run", steps=1)
    run.fit(progress=False)
    run.save()
    file = tmp_path / "run" / "model.keras"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is damaged"):
        runs.Run.resume(tmp_path / "run", *runs.hold_out(examples()))
    run.model.save(file)  # by Keras, without notes
    with pytest.raises(ValueError, match="holds no run that can be resumed"):
        runs.Run.resume(tmp_path / "run", *runs.hold_out(examples()))


def test_checkpoints_are_ordinary_model_files(tmp_path):
    model = made()
    model.build((None, 4, 4, 1))
    checkpoints.save(model, tmp_path / "model.keras", {"α": [1, 2.5]})
    assert checkpoints.notes(tmp_path / "model.keras") == {"α": [1, 2.5]}
    assert models.load(tmp_path / "model.keras").sample_shape == (4, 4, 1)
    assert checkpoints.notes(tmp_path / "none.keras") is None
    assert zipfile.ZipFile(tmp_path / "model.keras").testzip() is None


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of small images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02}.png")
    return folder


def train(*arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_CPP")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "tfdiffusion", "train", *arguments],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


COMMAND = ("--data", "photos", "--steps", "40", "--batch-size", "4", "--no-export")


@pytest.mark.slow_on_jax
def test_a_killed_training_goes_on(photos):
    """The real command line, killed without warning while it saves after every step."""
    folder = photos / "runs" / "photos"
    process = train(*COMMAND, "--resume", "--checkpoint-every", "0.001", cwd=photos)
    while not (checkpoints.notes(folder / "model.keras") or {}).get("done"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    notes = checkpoints.notes(folder / "model.keras")
    assert 0 < notes["done"] < 40
    process = train("--resume", "--out", "runs/photos", cwd=photos)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{notes['done']} of them done" in err
    assert {f.name for f in folder.iterdir()} == set(runs.FILES)
    record = json.loads((folder / "run.json").read_text())
    assert record["steps"] == 40 and record["arguments"]["batch_size"] == 4


def test_what_resuming_refuses(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    if not Path("runs/photos/model.keras").exists():
        pytest.skip("needs the run of the test before")
    assert cli.main(["train", "--resume", "--data", "photos", "--steps", "50"]) == 2
    assert "--steps 50: the run in runs/photos was begun with 40." in capsys.readouterr().err
    Path("foreign").mkdir()
    made().save("foreign/model.keras")
    assert cli.main(["train", "--resume", "--out", "foreign"]) == 2
    assert "was not left by a training that can go on" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_kills_at_random_moments(photos, tmp_path):
    """kill -9 at any moment, saves included: what is there can always be resumed, and is right."""
    steps = ("--data", str(photos / "photos"), "--steps", "150", "--batch-size", "4", "--no-export")
    process = train(*steps, "--out", "whole", cwd=tmp_path)
    assert process.wait() == 0, process.stderr.read()
    rng = np.random.default_rng(0)
    kills, done = 0, []
    while kills < 20:
        options = ("--resume", "--out", "killed", "--checkpoint-every", "0.05")
        process = train(*steps, *options, cwd=tmp_path)
        try:
            process.wait(timeout=rng.uniform(1.0, 25.0))
            assert process.returncode == 0, process.stderr.read()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        notes = checkpoints.notes(tmp_path / "killed" / "model.keras")
        done.append(0 if notes is None else notes["done"])
        assert done == sorted(done)
    print("kills", kills, "steps done at each", done)
    process = train(*steps, "--resume", "--out", "killed", cwd=tmp_path)
    assert process.wait() == 0, process.stderr.read()
    whole, killed = (models.load(tmp_path / name) for name in ("whole", "killed"))
    for mine, theirs in zip(killed.variables, whole.variables):
        np.testing.assert_allclose(numpy(mine), numpy(theirs), atol=1e-5)
    histories = [
        json.loads((tmp_path / n / "history.json").read_text()) for n in ("whole", "killed")
    ]
    assert histories[0]["steps"] == histories[1]["steps"]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-4)
