"""`ScoreModel`: it learns known scores, samples, comes back from files, meets the samplers."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from oracles import MixtureData, numpy

import tfdiffusion as tfd
from tfdiffusion import fitting
from tfdiffusion.score_matching import NCSN, NCSNv2, ScoreMLP, ScoreModel, geometric

TENSORFLOW = keras.backend.backend() == "tensorflow"
SIGMAS = geometric(2.0, 0.25, 4)
DATA = MixtureData([[-1.0, 0.0], [1.0, 0.5]], [0.05, 0.1], [1, 3])


def points(num=512, seed=0):
    rng = np.random.default_rng(seed)
    component = rng.choice(2, size=num, p=DATA.weights)
    spread = np.sqrt(DATA.variances[component])[:, None]
    return (DATA.means[component] + spread * rng.normal(size=(num, 2))).astype("float32")


def made(objective="denoising", energy=False, width=16, **arguments):
    network = ScoreMLP(SIGMAS, width=width, depth=1, energy=energy)
    model = ScoreModel(network, SIGMAS, objective=objective, **{"ema_decay": 0.9, **arguments})
    model.build((None, 2))
    return model


def random_weights(model, scale=0.3):
    rng = np.random.default_rng(0)
    for variable in model.network.trainable_variables:
        variable.assign(scale * rng.normal(size=variable.shape))
    model.ema.reset()
    return model


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model = made(width=64, ema_decay=0.97)
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, 240)))
    model.fit(points(4096), epochs=30, batch_size=512, verbose=0)
    return model


# Learning.


def relative_error(model, level, ema=True):
    """‖s − ∇log q_σ‖/‖∇log q_σ‖ over points of q_σ."""
    sigma = SIGMAS[level]
    x = points(400, seed=5) + sigma * np.random.default_rng(6).normal(size=(400, 2))
    x = x.astype("float32")
    true = DATA.score(x.astype("float64"), 1.0, sigma)
    learned = numpy(model.score(x, level, ema))
    return np.sqrt(((learned - true) ** 2).sum() / (true**2).sum())


def test_it_learns_the_smoothed_score_at_every_level(trained):
    for level in range(len(SIGMAS)):
        assert relative_error(trained, level) < 0.15


def test_the_loss_comes_down_to_its_floor(trained):
    """½E‖σs + z‖² at the best score is ½(D − σ² E‖∇log q_σ‖²), level by level."""
    floors = []
    for sigma in SIGMAS:
        x = points(4000, seed=7) + sigma * np.random.default_rng(8).normal(size=(4000, 2))
        floors.append(1.0 - 0.5 * sigma**2 * (DATA.score(x, 1.0, sigma) ** 2).sum(-1).mean())
    losses = trained.evaluate(points(4096, seed=9), batch_size=512, verbose=0, return_dict=True)
    assert np.mean(floors) - 0.03 < losses["loss"] < np.mean(floors) + 0.03
    # Quarters of the times are the levels, least noise first.
    quarters = [losses[f"loss_q{i}"] for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(quarters, floors[::-1], atol=0.05)


def test_noise_does_not_know_its_level():
    """One stream for both would make the noise large where σ is small."""
    seen = {}

    class Spy(ScoreMLP):
        def call(self, inputs, training=False):
            seen.update(inputs)
            return super().call(inputs, training)

    model = ScoreModel(Spy(SIGMAS, width=8, depth=1), SIGMAS, ema_decay=None)
    model.build((None, 2))
    model.mean_loss((np.zeros((4000, 2), "float32"), None, None))
    levels = np.rint(numpy(seen["time"])).astype(int)
    for level, sigma in enumerate(SIGMAS):
        z = numpy(seen["x"])[levels == level] / sigma
        assert len(z) == pytest.approx(1000, abs=150)
        assert z.var() == pytest.approx(1.0, abs=5 * np.sqrt(2 / z.size))


@pytest.mark.parametrize("objective", ["sliced", "finite_difference_sliced", "implicit"])
def test_second_order_objectives_have_the_same_optimum(objective):
    """σ²(ISM − ESM) is a constant: on two fixed networks, the losses differ as denoising's do."""
    x, keys = points(4096), tfd.random.keys(np.arange(4096))
    t = np.tile(np.arange(1, 5) / 4, 1024).astype("float32")
    gaps = []
    for name in (objective, "denoising"):
        first = made(name)
        losses = [numpy(first.losses_at(x, None, t, keys))]
        losses.append(numpy(random_weights(first, 0.15).losses_at(x, None, t, keys)))
        gaps.append(losses[1].astype("float64") - losses[0])
    difference = gaps[0] - gaps[1]
    assert abs(difference.mean()) < 5 * difference.std() / 64 + 0.01
    assert np.abs(gaps[1]).mean() > 0.05


@pytest.mark.parametrize(("objective", "energy"), [("sliced", True), ("implicit", False)])
def test_training_steps_descend(objective, energy):
    model = made(objective, energy)
    model.compile(keras.optimizers.Adam(3e-2))
    before = model.evaluate(points(), verbose=0, return_dict=True)["loss"]
    model.fit(points(), epochs=20, batch_size=64, verbose=0)
    after = model.evaluate(points(), verbose=0, return_dict=True)["loss"]
    assert after < before - 0.02


@pytest.mark.slow_on_jax
def test_images_and_labels_that_are_not_looked_at():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(8, 8, 8, 1)).astype("float32")
    sigmas = geometric(3.0, 0.3, 3)
    model = ScoreModel(NCSNv2(sigmas, width=4), sigmas)
    model.compile("adam")
    history = model.fit(x, np.arange(8), batch_size=8, epochs=2, verbose=0)
    assert history.history["loss"][0] == pytest.approx(32, rel=0.3)  # D/2 before it learns
    assert model.num_classes is None
    assert model.sample(2, steps_per_level=1).shape == (2, 8, 8, 1)


# Sampling.


def test_samples_follow_the_data(trained):
    x = trained.sample(2000, steps_per_level=40, step_size=0.15 * SIGMAS[-1] ** 2)
    right = x[:, 0] > 0
    # σ_1 = 2 is not far from the modes' distance, and the score is learned.
    assert right.mean() == pytest.approx(0.75, abs=0.08)
    np.testing.assert_allclose(x[right].mean(0), DATA.means[1], atol=0.1)
    np.testing.assert_allclose(x[~right].mean(0), DATA.means[0], atol=0.1)


def test_a_sample_is_a_function_of_its_seed(trained):
    x = trained.sample(5, steps_per_level=2, seed=3)
    y = trained.sample(5, steps_per_level=2, seeds=[7, 6, 5, 4, 3], batch_size=2)
    np.testing.assert_allclose(x, y[::-1], rtol=1e-4, atol=1e-4)
    assert np.abs(x - trained.sample(5, steps_per_level=2, seed=4)).max() > 0.1


def test_the_average_is_what_is_sampled(trained):
    raw = trained.sample(4, steps_per_level=2, ema=False)
    assert np.abs(raw - trained.sample(4, steps_per_level=2)).max() > 1e-4
    shipped = trained.averaged()
    assert shipped.ema is None
    again = shipped.sample(4, steps_per_level=2)
    np.testing.assert_allclose(again, trained.sample(4, steps_per_level=2), rtol=1e-4, atol=1e-4)


def test_path_and_denoising(trained):
    x, path = trained.sample(3, steps_per_level=2, return_path=True)
    assert path.shape == (len(SIGMAS) + 2, 3, 2)
    np.testing.assert_array_equal(path[-1], x)
    noisy = trained.sample(3, steps_per_level=2, denoise=False)
    np.testing.assert_allclose(noisy, path[-2], rtol=1e-4, atol=1e-4)
    level = len(SIGMAS) - 1
    tweedie = noisy + SIGMAS[-1] ** 2 * numpy(trained.score(noisy, level))
    np.testing.assert_allclose(x, tweedie, rtol=1e-3, atol=1e-3)


def test_inpainting_keeps_what_is_known(trained):
    known = points(6)
    mask = np.array([True, False])
    hidden = np.where(mask, known, np.nan)
    x = trained.inpaint(hidden, mask, steps_per_level=2)
    np.testing.assert_array_equal(x[:, 0], known[:, 0])
    assert np.isfinite(x).all() and np.abs(x[:, 1] - known[:, 1]).max() > 1e-3
    every = trained.inpaint(known, np.ones((6, 2)), steps_per_level=2, batch_size=4)
    np.testing.assert_array_equal(every, known)


def test_interpolation_begins_and_ends_at_the_seeds_samples(trained):
    way = trained.interpolate(3, 8, 5, steps_per_level=2)
    ends = trained.sample(2, seeds=[3, 8], steps_per_level=2)
    np.testing.assert_allclose(way[[0, -1]], ends, rtol=1e-3, atol=1e-3)
    assert way.shape == (5, 2)


# The meeting point.


def test_it_is_a_denoiser_on_the_exploding_chain(trained):
    """x̂_0 = x + σ² s at every level, and the time of level i is 1 − i/L."""
    x = points(16)
    denoiser = trained.denoiser()
    for level, sigma in enumerate(SIGMAS):
        t = np.float32(1 - level / len(SIGMAS))
        assert float(numpy(denoiser.process.sigma(t))) == pytest.approx(sigma, rel=1e-6)
        expected = x + sigma**2 * numpy(trained.score(x, level))
        np.testing.assert_allclose(numpy(denoiser(x, t)), expected, rtol=1e-3, atol=1e-4)
        levels = np.full(16, level, "int32")
        np.testing.assert_allclose(
            numpy(trained.score(x, levels)), numpy(trained.score(x, level)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_librarys_samplers_run_on_it(trained, sampler):
    x = numpy(
        tfd.sample(trained.denoiser(), np.arange(1000), (2,), sampler=sampler, steps=len(SIGMAS))
    )
    # Four coarse steps: the modes are found, their spread is not held to account.
    assert (x[:, 0] > 0).mean() == pytest.approx(0.75, abs=0.12)
    assert np.abs(x.mean(0) - points(4000).mean(0)).max() < 0.25


def test_the_energy():
    model = random_weights(made(energy=True))
    x = points(6)
    step = np.array([[1e-2, 0.0]], "float32")
    slope = (numpy(model.energy(x + step, 1)) - numpy(model.energy(x - step, 1))) / 2e-2
    np.testing.assert_allclose(numpy(model.score(x, 1))[:, 0], -slope, atol=1e-2)


# Files.


def test_what_is_saved_comes_back(tmp_path, trained):
    file = tmp_path / "model.keras"
    trained.save(file)
    loaded = keras.saving.load_model(file)
    request = {"num": 3, "steps_per_level": 2}
    np.testing.assert_allclose(
        loaded.sample(**request), trained.sample(**request), rtol=1e-4, atol=1e-4
    )
    assert loaded.get_config()["sigmas"] == trained.get_config()["sigmas"]
    assert isinstance(tfd.models.load(file), ScoreModel)
    # The optimizer and the counts too: training goes on as if nothing had happened.
    for model in (loaded, trained):
        model.fit(points(), batch_size=256, epochs=1, verbose=0, shuffle=False)
    for mine, theirs in zip(loaded.network.weights, trained.network.weights):
        np.testing.assert_allclose(numpy(mine), numpy(theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not TENSORFLOW, reason="a SavedModel is TensorFlow's")
def test_the_savedmodel_holds_the_sampler(tmp_path, trained):
    folder = tfd.export.saved_model(trained, tmp_path / "served", steps_per_level=2)
    np.save(tmp_path / "expected.npy", trained.sample(3, steps_per_level=2, seed=5))
    code = f"""
import sys
sys.modules["keras"] = None
import numpy as np, tensorflow as tf
signatures = tf.saved_model.load({str(folder)!r}).signatures
assert sorted(signatures) == ["denoise", "sample_float", "serving_default"], sorted(signatures)
seeds = tf.constant([5, 6, 7], tf.int64)
samples = signatures["serving_default"](seed=seeds)["samples"].numpy()
np.testing.assert_allclose(samples, np.load({str(tmp_path / "expected.npy")!r}), atol=1e-3)
alone = signatures["serving_default"](seed=seeds[1:2])["samples"].numpy()
assert (alone == samples[1:2]).all()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(not TENSORFLOW, reason="a SavedModel is TensorFlow's")
@pytest.mark.slow
def test_the_savedmodel_of_images_makes_pictures(tmp_path):
    import tensorflow as tf

    sigmas = geometric(3.0, 0.3, 2)
    model = ScoreModel(NCSNv2(sigmas, width=4), sigmas)
    model.build((None, 4, 4, 1))
    folder = tfd.export.saved_model(model, tmp_path / "served", steps_per_level=1)
    signatures = tf.saved_model.load(str(folder)).signatures
    assert "sample_png" in signatures and "sample_steps" not in signatures
    images = signatures["serving_default"](seed=tf.constant([1, 2], tf.int64))["images"].numpy()
    assert images.shape == (2, 4, 4, 1) and images.dtype == "uint8"
    expected = np.clip((model.sample(2, steps_per_level=1, seed=1) + 1) * 127.5, 0, 255)
    np.testing.assert_allclose(images, expected, atol=0.51)


# The command line.


@pytest.mark.slow_on_jax
def test_the_command_line_trains_samples_and_tells(tmp_path, capsys):
    from tfdiffusion import cli

    folder = str(tmp_path / "run")
    request = ["train", "--method", "ncsnv2", "--steps", "2", "--batch-size", "8", "--no-export"]
    size = ["--image-size", "4"]
    assert cli.main([*request, *size, "--out", folder]) == 0
    assert (tmp_path / "run" / "sampling.gif").exists()
    picture = str(tmp_path / "x.png")
    sample = ["sample", folder, "--num", "2", "--out", picture]
    assert cli.main([*sample, "--steps-per-level", "1"]) == 0
    assert (tmp_path / "x.png").exists()
    assert cli.main(["info", folder]) == 0
    assert "NCSNv2" in capsys.readouterr().out
    for wrong, message in (
        ([*sample, "--sampler", "ddim"], "use --steps-per-level"),
        ([*sample, "--label", "3"], "unconditional"),
        ([*request, "--out", folder + "2", "--process", "vp"], "belong to --method diffusion"),
        ([*request, "--out", folder + "2", "--conditional"], "does not learn classes"),
        (["sample", "mnist", "--num", "1", "--steps-per-level", "2"], "this is a diffusion model"),
    ):
        assert cli.main(wrong) == 2
        assert message in capsys.readouterr().err


# What cannot be.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ScoreModel(ScoreMLP(SIGMAS), SIGMAS[::-1]), "must fall strictly"),
        (lambda m: ScoreModel(ScoreMLP(SIGMAS), SIGMAS[:-1]), "Give both the same"),
        (lambda m: ScoreModel(NCSN(3, width=4), SIGMAS), "Make it with num_levels=4"),
        (lambda m: made("maximum_likelihood"), "objective"),
        (lambda m: m.score(points(2), 4), "from 0 .* to 3"),
        (lambda m: m.score(points(2), [0, -1]), "from 0 .* to 3"),
        (lambda m: m.energy(points(2), 0), "learns a score that need not be a gradient"),
        (lambda m: m.sample(0), "num must be"),
        (lambda m: m.sample(2, steps_per_level=0), "steps_per_level must be"),
        (lambda m: m.sample(2, step_size=0.13), "limit of stability .* 0.125"),
        (lambda m: m.sample(2, step_size=0.26, convention="ncsn"), "limit of stability .* 0.25"),
        (lambda m: m.sample(2, seeds=[1]), "seeds must be 2 integers"),
        (lambda m: m.sample(2, batch_size=0), "batch_size"),
        (lambda m: m.inpaint(np.zeros((2, 3)), True), r"known must have shape \(N, 2\)"),
        (lambda m: m.inpaint(np.zeros((2, 2)), np.ones(3)), "mask must have the shape"),
        (lambda m: m.interpolate(0, 1, 1), "num must be an integer >= 2"),
        (lambda m: ScoreModel(ScoreMLP(SIGMAS), SIGMAS).sample(2), "no shape yet"),
        (lambda m: m.fit(points().astype("int32"), verbose=0), "must be float"),
    ],
)
def test_errors(call, message):
    model = made()
    model.compile("adam")
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_plain_network_has_no_energy_and_a_relu_is_warned_about():
    class Plain(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2, activation="relu")

        def build(self, shapes):
            self.dense.build(shapes["x"])
            self.built = True

        def call(self, inputs, training=False):
            return self.dense(inputs["x"])

    model = ScoreModel(Plain(), SIGMAS)
    model.build((None, 2))
    with pytest.raises(ValueError, match="learns a score and no energy"):
        model.energy(points(2), 0)
    with pytest.warns(UserWarning, match="second derivative"):
        ScoreModel(Plain(), SIGMAS, objective="sliced")


def test_it_shares_its_training_with_the_diffusion_model():
    for cls in (ScoreModel, tfd.DiffusionModel):
        assert issubclass(cls, fitting.NoiseConditionalModel)
        assert "fit" not in vars(cls) and "train_step" not in vars(cls)
