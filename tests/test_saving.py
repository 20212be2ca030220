"""What is saved comes back: in another process, on the other backend, in the middle of training."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from oracles import numpy

from tfdiffusion import (
    DiffusionModel,
    models,
    networks,
    predictions,
    processes,
    samplers,
    score_matching,
    times,
    weights,
)
from tfdiffusion.denoiser import Threshold

BACKEND = keras.backend.backend()
OTHER = "jax" if BACKEND == "tensorflow" else "tensorflow"
CLASSES = 3
REQUEST = {"num": 5, "label": [0, 1, 2, 0, 1], "guidance": 2.0, "steps": 4, "threshold": None}


def data():
    rng = np.random.default_rng(0)
    return rng.normal(0.3, 0.5, size=(64, 2)).astype("float32"), rng.integers(0, CLASSES, size=64)


def made(seed=0):
    keras.utils.set_random_seed(seed)
    network = networks.MLP(width=16, depth=1, num_classes=CLASSES)
    model = DiffusionModel(
        network,
        "cosine",
        "v",
        weight=weights.MinSNR(gamma=3.0),
        times=times.LogitNormal(mean=0.3, std=0.9),
        ema_decay=0.9,
        sigma_data=0.6,
        seed=11,
    )
    model.compile(keras.optimizers.Adam(0.01))
    return model


def train(model):
    model.fit(*data(), batch_size=16, verbose=0, shuffle=False)


def measure(model):
    """What a model says, and how training goes on: everything that a file has to carry."""
    results = {"samples": model.sample(**REQUEST), "raw": model.sample(**REQUEST, ema=False)}
    evaluated = model.evaluate(*data(), batch_size=16, verbose=0, return_dict=True)
    results["evaluated"] = np.array([evaluated[name] for name in sorted(evaluated)])
    train(model)
    results |= {f"weight {i}": numpy(v) for i, v in enumerate(model.network.weights)}
    results |= {f"average {i}": numpy(v) for i, v in enumerate(model.ema.averages)}
    results["counts"] = np.array([int(model.step_count.value), int(model.ema.updates.value)])
    return results


# A process that imports nothing but Keras and tfdiffusion: it defines, registers, knows no more.
ELSEWHERE = """
import sys
import keras, numpy
import tfdiffusion
folder, arrays = sys.argv[1], numpy.load(sys.argv[1] + "/data.npz")
x, y = arrays["x"], arrays["y"]
model = keras.models.load_model(folder + "/model.keras")
request = dict(num=5, label=[0, 1, 2, 0, 1], guidance=2.0, steps=4, threshold=None)
results = {"samples": model.sample(**request), "raw": model.sample(**request, ema=False)}
evaluated = model.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
results["evaluated"] = numpy.array([evaluated[name] for name in sorted(evaluated)])
model.fit(x, y, batch_size=16, verbose=0, shuffle=False)
to_numpy = keras.ops.convert_to_numpy
results |= {f"weight {i}": to_numpy(v) for i, v in enumerate(model.network.weights)}
results |= {f"average {i}": to_numpy(v) for i, v in enumerate(model.ema.averages)}
results["counts"] = numpy.array([int(model.step_count.value), int(model.ema.updates.value)])
model.save(folder + "/later.keras")
results["later"] = model.sample(**request)
numpy.savez(folder + "/results.npz", **results)
"""


def elsewhere(folder, backend):
    """Results of the script above on a backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "results.npz") as results:
        return dict(results)


@pytest.fixture(scope="module", autouse=True)
def optimized_graphs():
    """As in a fresh process: bits are compared with one."""
    if BACKEND == "tensorflow":
        options = importlib.import_module("tensorflow").config.optimizer
        before = options.get_experimental_options()
        options.set_experimental_options({"disable_meta_optimizer": False})
        yield
        options.set_experimental_options(before)
    else:
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a saved model that was trained for an epoch, and what `measure` said of it."""
    folder = tmp_path_factory.mktemp("saved")
    x, y = data()
    np.savez(folder / "data.npz", x=x, y=y)
    model = made()
    train(model)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return folder, measure(model)


def test_a_fresh_process_gives_the_same_bits(trained):
    folder, here = trained
    there = elsewhere(folder, BACKEND)
    np.testing.assert_array_equal(there["samples"], here["samples"])
    np.testing.assert_array_equal(there["raw"], here["raw"])
    assert np.abs(here["samples"] - here["raw"]).max() > 1e-4
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_other_backend_gives_the_same_samples_and_trains_on(trained):
    """There and back: loaded there, trained there, saved there, and loaded here again."""
    if importlib.util.find_spec(OTHER) is None:
        pytest.skip(f"{OTHER} is not installed")
    folder, here = trained
    there = elsewhere(folder, OTHER)
    for name in ("samples", "raw", "evaluated", "counts"):
        np.testing.assert_allclose(there[name], here[name], rtol=1e-4, atol=1e-4, err_msg=name)
    # Adam divides by the size of the gradient: where that is nothing but rounding, it decides.
    for name in here.keys() - {"samples", "raw", "evaluated", "counts"}:
        error = np.abs(there[name] - here[name])
        assert np.median(error) < 1e-5 and error.max() < 0.05, name
    back = keras.models.load_model(folder / "later.keras")
    np.testing.assert_allclose(back.sample(**REQUEST), there["later"], rtol=1e-4, atol=1e-4)


def test_training_goes_on_after_loading(trained):
    """With the optimizer's state, the averages, and the noise of the step that comes next."""
    folder, here = trained
    model = keras.models.load_model(folder / "model.keras")
    assert isinstance(model.optimizer, keras.optimizers.Adam) and model.optimizer.built
    assert int(model.optimizer.iterations.value) == 4
    for name, value in measure(model).items():
        np.testing.assert_allclose(value, here[name], rtol=1e-5, atol=1e-6, err_msg=name)
    forgetful = keras.models.load_model(folder / "model.keras")
    forgetful.compile(keras.optimizers.Adam(0.01))
    train(forgetful)
    weight = numpy(forgetful.network.weights[0])
    assert np.abs(weight - here["weight 0"]).max() > 1e-4  # the state does matter


def test_a_weights_file_brings_the_averages_too(trained):
    folder, here = trained
    model = made(seed=5)
    model.build((None, 2))
    assert np.abs(model.sample(**REQUEST) - here["samples"]).max() > 1e-3
    model.load_weights(folder / "model.weights.h5")
    np.testing.assert_allclose(model.sample(**REQUEST), here["samples"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.sample(**REQUEST, ema=False), here["raw"], rtol=1e-6)


def test_sampling_does_not_change_what_is_saved(trained, tmp_path):
    """A compiled sampler is no part of a model."""
    model = keras.models.load_model(trained[0] / "model.keras")
    model.sample(2, label=1, steps=2)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for mine, theirs in zip(model.variables, again.variables):
        np.testing.assert_array_equal(numpy(mine), numpy(theirs))


@keras.saving.register_keras_serializable(package="tests")
class Quadratic(processes.Process):
    """A process of one's own."""

    def __init__(self, end=0.99):
        self.end = end

    def alpha(self, t):
        return 1.0 - self.end * keras.ops.convert_to_tensor(t) ** 2

    def sigma(self, t):
        return (1.0 - self.alpha(t) ** 2) ** 0.5

    def get_config(self):
        return {"end": self.end}


CONFIGURATIONS = [
    *({"process": p, "prediction": "v"} for p in processes.names()),
    *({"prediction": p, "process": "vp"} for p in predictions.names()),
    *({"weight": w} for w in weights.names()),
    *(
        {"times": t}
        for t in ("uniform", "discrete_uniform", "stratified", "logit_normal", "log_normal_sigma")
    ),
    {"process": processes.VarianceExploding(sigma_max=7.0), "time_input": "log_sigma"},
    {"process": processes.LinearBeta(num_timesteps=50)},
    {"process": Quadratic(end=0.9), "weight": weights.Sigmoid(bias=-1.0)},
    {"process": processes.Interpolated(processes.LinearBeta(50), "level")},
    {
        "scale_input": False,
        "sampling": samplers.Sampling(
            samplers.PLMS(4, "trapezoid"),
            times.Timesteps("leading", offset=1, until_first=True),
            steps=7,
            threshold=Threshold(1.5, 0.9),
        ),
    },
    {"sampling": samplers.Sampling("heun", "uniform", 3, None)},
    {"label_dropout": 0.25, "ema_decay": None, "sigma_data": 0.5, "seed": 9, "name": "mine"},
]


def described(arguments):
    """A name for a test, the same in every process."""
    values = (
        v if isinstance(v, (str, float, int)) else type(v).__name__ for v in arguments.values()
    )
    return " ".join(map(str, values))


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=described)
def test_configurations_survive(arguments):
    model = DiffusionModel(networks.MLP(width=4, depth=1), **arguments)
    config = keras.saving.serialize_keras_object(model)
    again = keras.saving.deserialize_keras_object(config)
    assert isinstance(again, DiffusionModel)
    assert keras.saving.serialize_keras_object(again) == config
    assert type(again.process) is type(model.process)
    t = np.linspace(0.1, 1.0, 5).astype("float32")
    for moment in ("alpha", "sigma"):
        mine, theirs = (numpy(getattr(m.process, moment)(t)) for m in (model, again))
        np.testing.assert_array_equal(mine, theirs)
    assert again.raw.scale_input == model.raw.scale_input
    for name in ("weight", "times", "prediction", "label_dropout", "seed", "name", "sampling"):
        assert getattr(again, name) == getattr(model, name), name


def test_misspelt_arguments_are_refused():
    with pytest.raises((TypeError, ValueError), match="schedule"):
        DiffusionModel(networks.MLP(width=4, depth=1), schedule="cosine")


@pytest.mark.parametrize("built", [True, False])
def test_models_are_saved_before_training_too(tmp_path, built):
    keras.utils.set_random_seed(0)
    model = DiffusionModel(networks.MLP(width=4, depth=1), prediction="v")
    if built:
        model.build((None, 2))
        for weight in model.network.weights:
            weight.assign(numpy(weight) + 0.1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.sample_shape == model.sample_shape
    if built:
        # Nothing has been averaged yet: the weights are those that were put there.
        request = {"num": 2, "steps": 2, "threshold": None}
        np.testing.assert_array_equal(again.sample(**request), model.sample(**request))
        assert np.abs(again.sample(**request)).max() > 0


SIGMAS = (2.0, 1.0, 0.5)
NETWORKS = {
    "unet2d": (
        lambda: networks.UNet2D(
            out_channels=1,
            encoder=[{"width": 8, "blocks": 1, "groups": 4}],
            middle={
                "width": 8,
                "blocks": 2,
                "groups": 4,
                "attention": "each",
                "attention_groups": 4,
            },
            decoder=[{"width": 8, "blocks": 2, "groups": 4}],
            out_groups=4,
        ),
        (4, 4, 1),
    ),
    "unet": (lambda: networks.UNet(out_channels=1, widths=(8, 8), groups=4), (4, 4, 1)),
    "mlp": (lambda: networks.MLP(width=4, depth=2), (2,)),
    "ncsn": (lambda: score_matching.NCSN(3, width=4), (4, 4, 1)),
    "ncsnv2": (lambda: score_matching.NCSNv2(SIGMAS, width=4), (4, 4, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_files_do_not_depend_on_the_version_of_keras(tmp_path, name):
    """Keras before 3.13 neither writes nor finds layers that lie in lists of lists."""
    make, shape = NETWORKS[name]
    network = make()
    network.build({"x": (None, *shape), "time": (None,)})
    network.save_weights(tmp_path / "x.weights.h5")
    places = []
    with h5py.File(tmp_path / "x.weights.h5") as file:
        file.visit(places.append)
    assert len([place for place in places if "vars/" in place]) >= len(network.weights)
    assert not [place for place in places if "container" in place]


@pytest.mark.filterwarnings("error:Skipping nested container")
def test_what_ships_was_written_so():
    for name in models.names():
        models.load(name)
        with zipfile.ZipFile(models.path(name)) as archive:
            with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
                places = []
                file.visit(places.append)
        assert places and not [place for place in places if "container" in place]
