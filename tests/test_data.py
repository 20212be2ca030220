"""Data sets: ranges, labels, orders, folders of odd files, and what is said about bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tfdiffusion import data

ROOT = Path(__file__).parents[1]


def numbered(num, size=4):
    """Images whose every pixel is their index, so that an order can be read off a batch."""
    return np.broadcast_to(np.arange(num, dtype=np.uint8)[:, None, None], (num, size, size))


def order(dataset):
    """The indices in a dataset of numbered images."""
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in dataset]
    return [int(i) for x in batches for i in data.to_uint8(x.numpy())[:, 0, 0, 0]]


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def only_image(folder, **options):
    """The one image in a folder, as uint8."""
    images, _ = data.read(folder, **options).arrays()
    return data.to_uint8(images[0])


# Values.


def test_uint8_and_float_are_inverse():
    levels = np.arange(256, dtype=np.uint8)
    x = data.to_float(levels)
    assert x.dtype == np.float32 and x[0] == -1 and x[-1] == 1
    np.testing.assert_array_equal(data.to_uint8(x), levels)
    np.testing.assert_allclose(np.diff(x), 2 / 255, rtol=1e-4)


def test_to_uint8_takes_the_nearest_level_and_clips():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 500).astype(np.float32)
    levels = np.linspace(-1, 1, 256)
    nearest = np.abs(x[:, None] - levels).argmin(axis=1)
    np.testing.assert_array_equal(data.to_uint8(x), nearest)


def test_to_uint8_names_values_that_are_not_finite():
    x = np.zeros((3, 2, 2, 1), np.float32)
    x[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 of 3 images, the first at index 1"):
        data.to_uint8(x)


# Batches.


def test_digits():
    from sklearn.datasets import load_digits

    examples = data.read("digits")
    assert (examples.num_examples, examples.shape, examples.num_classes) == (1797, (8, 8, 1), 10)
    images, labels = examples.arrays()
    np.testing.assert_allclose(images[..., 0], load_digits().images / 8 - 1, atol=0.004)
    np.testing.assert_array_equal(labels, load_digits().target)
    x, label = next(iter(data.load("digits", batch_size=32, image_size=16)))
    assert x.shape == (32, 16, 16, 1) and x.dtype == tf.float32
    assert label.shape == (32,) and label.dtype == tf.int32
    assert -1 <= x.numpy().min() < -0.9 and 0.9 < x.numpy().max() <= 1


def test_fit_takes_what_load_gives():
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs)))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(data.load("digits", batch_size=64), epochs=2, shuffle=False, verbose=0)
    assert history.history["loss"][1] < history.history["loss"][0]
    endless = data.read("digits").batches(64, from_step=40)
    model.fit(endless, steps_per_epoch=3, epochs=2, shuffle=False, verbose=0)


@pytest.mark.parametrize("batch_size", [7, 10, 64])
def test_an_epoch_has_every_example_once(batch_size):
    dataset = data.read(numbered(50)).batches(batch_size, drop_remainder=False)
    assert len(dataset) == -(-50 // batch_size)
    assert sorted(order(dataset)) == list(range(50))


def test_orders_are_new_each_epoch_and_decided_by_the_seed():
    examples = data.read(numbered(50))
    dataset = examples.batches(10, seed=1)
    epochs = [order(dataset) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    tf.random.set_seed(5)  # the order is no matter of the global seed
    again = examples.batches(10, seed=1)
    assert [order(again) for _ in range(3)] == epochs
    assert order(examples.batches(10, seed=2)) != epochs[0]
    assert order(examples.batches(10, shuffle=False)) == list(range(50))


def test_shuffles_are_uniform():
    epochs = data.read(numbered(4)).batches(4, from_step=0).take(480)
    orders = [tuple(order([batch])) for batch in epochs]
    counts = np.array([orders.count(o) for o in set(orders)])
    assert len(counts) == 24
    assert ((counts - 20) ** 2 / 20).sum() < 50  # chi-squared, 23 degrees of freedom: p = 0.001


@pytest.mark.parametrize("drop", [True, False])
def test_a_resumed_run_sees_what_an_uninterrupted_one_would(drop):
    examples = data.read((noise(26, 4, 4), np.arange(26)))
    options = dict(seed=3, flip=True, drop_remainder=drop)
    epochs = examples.batches(6, **options)
    run = [batch for _ in range(7) for batch in epochs]
    for step in (0, 5, 8, 23):
        resumed = examples.batches(6, from_step=step, **options)
        assert resumed.cardinality() == tf.data.INFINITE_CARDINALITY
        for expected, got in zip(run[step : step + 5], resumed, strict=False):
            np.testing.assert_array_equal(expected[0], got[0])
            np.testing.assert_array_equal(expected[1], got[1])


def test_flips_mirror_half_of_the_images():
    images = noise(200, 3, 5, 1)
    dataset = data.read((images, np.arange(200))).batches(20, flip=True, shuffle=False)
    flipped = []
    for _ in range(2):
        x = data.to_uint8(np.concatenate([x for x, _ in dataset]))
        kept = (x == images).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(x[~kept], images[~kept][:, :, ::-1])
        assert 70 < (~kept).sum() < 130
        flipped.append(~kept)
    assert (flipped[0] != flipped[1]).any()
    assert len({tuple(chunk) for chunk in flipped[0].reshape(10, 20)}) > 5  # batches differ


def test_remainders():
    examples = data.read(numbered(10))
    sizes = lambda **options: [len(x) for x in examples.batches(4, **options)]  # noqa: E731
    assert sizes() == [4, 4]
    assert sizes(shuffle=False) == [4, 4, 2]
    assert sizes(drop_remainder=False) == [4, 4, 2]
    assert [len(x) for x in examples.batches(64)] == [10]
    assert examples.batches(4).element_spec.shape == (4, 4, 4, 1)
    with pytest.raises(ValueError, match=r"batch_size=64.* 10 examples"):
        examples.batches(64, drop_remainder=True)


def test_labels_can_be_left_out_or_required():
    source = numbered(8), np.arange(8) % 3
    assert data.read(source).num_classes == 3
    assert not isinstance(data.load(source, labels=False, batch_size=2).element_spec, tuple)
    assert data.read(source, labels=False).arrays()[1] is None
    for x, label in data.load(source, batch_size=2):
        np.testing.assert_array_equal(label, data.to_uint8(x.numpy())[:, 0, 0, 0] % 3)
    with pytest.raises(ValueError, match="no labels"):
        data.read(numbered(8), labels=True)


# Arrays.


def test_float_images_and_points_are_kept_as_they_are():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (6, 5, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(data.read(images).arrays()[0], images)
    points = 10 * rng.standard_normal((20, 2))
    (x,) = data.load(points, shuffle=False)
    np.testing.assert_array_equal(x, points.astype(np.float32))


def test_channels():
    grey, colour = noise(3, 4, 4), noise(3, 4, 4, 3)
    x, _ = data.read(grey, channels=3).arrays()
    np.testing.assert_array_equal(data.to_uint8(x), np.repeat(grey[..., None], 3, axis=-1))
    x, _ = data.read(colour, channels=1).arrays()
    luma = np.asarray(Image.fromarray(colour[0]).convert("L"))
    np.testing.assert_allclose(data.to_uint8(x)[0, ..., 0], luma, atol=1)


def test_sizes_crop_the_centre_and_do_not_alias():
    wide = np.zeros((2, 8, 20, 1), np.uint8)
    wide[:, :, 6:14] = 200
    x, _ = data.read(wide, image_size=4).arrays()
    np.testing.assert_array_equal(data.to_uint8(x), np.full((2, 4, 4, 1), 200))
    fine = np.indices((64, 64)).sum(axis=0)[None] % 2 * 2.0 - 1
    x, _ = data.read(fine, image_size=8).arrays()
    np.testing.assert_allclose(x, 0, atol=0.02)


BAD_ARRAYS = [
    (np.full((2, 4, 4), 255.0), r"found \[255, 255\].*uint8.*127.5"),
    (np.full((2, 4, 4), 3), "int64.*astype"),
    (np.full((4,), 0.5), r"shape \(4,\)"),
    (np.zeros((0, 4, 4), np.uint8), r"shape \(0, 4, 4\)"),
    (np.array([[0.0, 0.0], [0.0, np.inf]]), "1 of 2 examples, the first at index 1"),
    ((numbered(4), np.arange(3)), r"one label per example.*\(4,\).*\(3,\)"),
    ((numbered(4), np.arange(4) / 2), "integers, got float64"),
    ((numbered(4), np.array([0, 1, -1, 2])), "got -1 at index 2"),
]


@pytest.mark.parametrize(("source", "message"), BAD_ARRAYS)
def test_bad_arrays_are_explained(source, message):
    with pytest.raises(ValueError, match=message):
        data.read(source)


def test_images_scaled_to_the_unit_interval_are_noticed():
    with pytest.warns(UserWarning, match=r"2 \* images - 1"):
        data.read(np.random.default_rng(0).uniform(0, 1, (2, 4, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load("digits", batch_size=0), "batch_size must be an integer >= 1.*=0"),
        (lambda: data.load("digits", image_size=0), "image_size must be an integer >= 1.*=0"),
        (lambda: data.load("digits", image_size=8.0), "image_size must be an integer"),
        (lambda: data.read("digits", channels=2), "channels must be 1 .* got 2"),
        (lambda: data.read("digits", split="test"), "no split 'test'.*only 'train'"),
        (lambda: data.read("moons", image_size=8), "'moons' has points"),
        (lambda: data.load("moons", flip=True), "flip needs images"),
        (lambda: data.read("digits").batches(from_step=-1), "from_step must be an integer from 0"),
        (lambda: data.read("digit"), r"neither a folder nor a known name.*'digits'.*checkerboard"),
        (lambda: data.read("cifar-10"), "Did you mean 'cifar10'"),
        (lambda: data.read("/no/such/folder"), "'/no/such/folder' does not exist"),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Folders.


def test_class_folders_and_flat_folders(tmp_path):
    images = noise(6, 5, 5, 3)
    for i, name in enumerate(["b/1.png", "b/deep/2.PNG", "a/3.png", "a/4.png", "c/5.png"]):
        save(tmp_path / name, images[i])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._3.png").write_text("what macOS leaves behind")
    (tmp_path / "empty").mkdir()
    examples = data.read(tmp_path)
    assert examples.class_names == ("a", "b", "c") and examples.shape == (5, 5, 3)
    x, labels = examples.arrays()
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(data.to_uint8(x), images[[2, 3, 0, 1, 4]])
    assert data.read(tmp_path / "a").num_classes is None
    save(tmp_path / "loose.png", images[5])
    with pytest.raises(ValueError, match=r"1 beside them, such as 'loose\.png'"):
        data.read(tmp_path)
    assert data.read(tmp_path, labels=False).num_examples == 6


def test_linked_folders_are_followed_once(tmp_path):
    save(tmp_path / "store" / "1.png", noise(4, 4))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "set")
    examples = data.read(tmp_path / "set")
    assert examples.num_examples == 1 and examples.class_names == ("cat",)


@pytest.fixture
def broken(tmp_path):
    """Twelve good images and five that cannot be used."""
    for i in range(12):
        save(tmp_path / "good" / f"{i:02}.jpg", noise(32, 32, 3, seed=i))
    bad = tmp_path / "bad"
    jpeg = save(bad / "truncated.jpg", noise(32, 32, 3)).read_bytes()
    (bad / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = bytearray(save(bad / "garbled.png", noise(32, 32, 3)).read_bytes())
    png[60:] = bytes(len(png) - 60)
    (bad / "garbled.png").write_bytes(png)
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.webp").write_text("<html>404</html>")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(bad / "float.tiff")
    (bad / "float.tiff").rename(bad / "float.bmp")
    return tmp_path


@pytest.mark.parametrize("cache", [True, False])
def test_bad_images_are_named_counted_and_skipped(broken, cache):
    with pytest.warns(UserWarning, match="5 of 17 images") as record:
        examples = data.read(broken, image_size=16, cache=cache)
    names = ["bad/" + name for name in ("empty.png", "float.bmp", "garbled.png")]
    names += ["bad/text.webp", "bad/truncated.jpg"]
    assert [name for name, _ in examples.skipped] == names
    for name, reason in examples.skipped:
        assert f"{name}: {reason}" in str(record[0].message) and reason
    assert examples.num_examples == 12
    x, labels = examples.arrays()
    assert x.shape == (12, 16, 16, 3) and (labels == examples.class_names.index("good")).all()


def test_bad_images_stop_a_strict_run(broken):
    with pytest.raises(ValueError, match=r"(?s)5 of 17 images.*bad/empty.png.*bad/truncated.jpg"):
        data.load(broken, strict=True)
    with pytest.raises(ValueError, match="5 of 5 images"):
        data.read(broken / "bad")
    for i in range(8):
        (broken / "bad" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"13 of 25 .*\n(.*\n){10}  and 3 more"):
        data.load(broken, strict=True)


def test_folders_decoded_on_demand_give_the_same_batches(tmp_path):
    for i in range(10):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", noise(9, 12, seed=i))
    kept = data.read(tmp_path, image_size=6)
    lazy = data.read(tmp_path, image_size=6, cache=False)
    assert kept.batches(4).element_spec == lazy.batches(4).element_spec
    for (x, label), (other, other_label) in zip(kept.batches(4), lazy.batches(4), strict=True):
        np.testing.assert_array_equal(x, other)
        np.testing.assert_array_equal(label, other_label)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    with pytest.raises(Exception, match=r"0\.png"):
        list(lazy.batches(10))


def test_sizes_in_a_folder(tmp_path):
    for i in range(19):
        save(tmp_path / f"{i:02}.png", noise(8, 10))
    save(tmp_path / "odd.png", noise(9, 10))
    with pytest.warns(UserWarning, match="odd.png: is .10, 9. pixels, the others are .10, 8."):
        examples = data.read(tmp_path)
    assert (examples.num_examples, examples.shape) == (19, (8, 10, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.read(tmp_path, image_size=8).num_examples == 20
    for i in range(4):
        save(tmp_path / f"other{i}.png", noise(20, 20))
    with pytest.raises(ValueError, match=r"3 sizes .*Pass image_size"):
        data.read(tmp_path)


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        data.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        data.read(tmp_path / "file")


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.T),
        (6, lambda stored: stored[::-1].T),
        (7, lambda stored: stored[::-1, ::-1].T),
        (8, lambda stored: stored.T[::-1]),
    ],
)
def test_exif_orientation(tmp_path, orientation, shown):
    stored = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "photo.png", stored, exif=exif)
    np.testing.assert_array_equal(only_image(tmp_path)[..., 0], shown(stored))


def test_sixteen_bit_images(tmp_path):
    levels = noise(7, 7)
    save(tmp_path / "16.png", levels.astype(np.uint16) * 257)
    np.testing.assert_array_equal(only_image(tmp_path)[..., 0], levels)


def test_transparent_pixels_are_white(tmp_path):
    rgba = noise(6, 6, 4)
    save(tmp_path / "alpha.png", rgba)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(only_image(tmp_path), expected, atol=1)


def test_grey_with_alpha_is_grey(tmp_path):
    save(tmp_path / "la.png", Image.merge("LA", [Image.new("L", (4, 4), v) for v in (100, 0)]))
    np.testing.assert_array_equal(only_image(tmp_path), np.full((4, 4, 1), 255))


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_palettes(tmp_path, suffix):
    colours = noise(6, 6, 3) // 128 * 255
    save(tmp_path / f"palette.{suffix}", Image.fromarray(colours).quantize(8))
    np.testing.assert_array_equal(only_image(tmp_path), colours)


def test_modes_that_are_not_rgb(tmp_path):
    save(tmp_path / "ink" / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    np.testing.assert_allclose(only_image(tmp_path / "ink"), [[[255, 0, 0]] * 8] * 8, atol=3)
    bits = noise(8, 8) > 127
    save(tmp_path / "bit" / "1.png", bits)
    np.testing.assert_array_equal(only_image(tmp_path / "bit")[..., 0], bits * 255)


@pytest.mark.parametrize(("name", "kind"), [("film.gif", "GIF"), ("stereo.jpg", "MPO")])
def test_the_first_of_several_frames(tmp_path, name, kind):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    save(tmp_path / name, frames[0], format=kind, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(only_image(tmp_path, channels=1), np.full((8, 8, 1), 10))


def test_a_folder_is_grey_if_all_its_images_are(tmp_path):
    save(tmp_path / "1.png", noise(4, 4))
    save(tmp_path / "2.png", noise(4, 4))
    assert data.read(tmp_path).shape == (4, 4, 1)
    assert data.read(tmp_path, channels=3).shape == (4, 4, 3)
    save(tmp_path / "3.png", noise(4, 4, 3))
    assert data.read(tmp_path).shape == (4, 4, 3)


def test_names_of_sets_and_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mine"):
        save(tmp_path / name / "1.png", noise(4, 4))
    assert data.read("digits").num_examples == 1797
    assert data.read("./digits").num_examples == 1
    assert data.read("mine").num_examples == 1


# TensorFlow Datasets.


def prepared_sets():
    given = os.environ.get("TFDIFFUSION_TEST_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    return folder / "tfds"


needs_mnist = pytest.mark.skipif(
    not (prepared_sets() / "mnist").is_dir(), reason="no prepared MNIST (TFDIFFUSION_TEST_DATA)"
)


@needs_mnist
def test_mnist():
    examples = data.read("mnist", split="test", data_dir=prepared_sets())
    assert (examples.num_examples, examples.shape) == (10_000, (28, 28, 1))
    assert examples.class_names == tuple("0123456789")
    x, labels = examples.arrays()
    assert x.min() == -1 and x.max() == 1
    # Published: the count of each digit in the test set.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(labels).tolist() == counts
    assert 0.11 < (x + 1).mean() / 2 < 0.15


def test_batches_can_follow_the_steps_of_a_model():
    """Whoever is asked when an epoch begins decides which one it is."""
    done = {"steps": 0}
    examples = data.read((np.zeros((10, 2), "float32") + np.arange(10)[:, None], np.arange(10)))
    following = examples.batches(3, seed=1, from_step=lambda: done["steps"])
    endless = [label.numpy() for _, label in examples.batches(3, seed=1, from_step=0).take(9)]
    assert following.cardinality() == 3
    for epoch in (0, 2, 1):
        done["steps"] = 3 * epoch
        labels = [label.numpy() for _, label in following]
        np.testing.assert_array_equal(labels, endless[3 * epoch : 3 * epoch + 3])


@needs_mnist
def test_streamed_sets_have_the_same_examples():
    options = dict(split="test[:300]", image_size=16, channels=3, data_dir=prepared_sets())
    kept, streamed = data.read("mnist", **options), data.read("mnist", cache=False, **options)
    for x, other in zip(kept.arrays(), streamed.arrays(), strict=True):
        np.testing.assert_array_equal(x, other)
    dataset = streamed.batches(50)
    assert dataset.element_spec == kept.batches(50).element_spec
    epochs = [list(dataset) for _ in range(2)]
    labels = [np.concatenate([label for _, label in epoch]) for epoch in epochs]
    assert (labels[0] != labels[1]).any()
    np.testing.assert_array_equal(np.sort(labels[0]), np.sort(kept.arrays()[1]))
    for expected, got in zip(epochs[1], streamed.batches(50, from_step=6), strict=False):
        np.testing.assert_array_equal(expected[0], got[0])
    np.testing.assert_array_equal(streamed.arrays(7)[0], kept.arrays(7)[0])
    unlabelled = data.read("mnist", cache=False, labels=False, **options)
    assert unlabelled.batches(50).element_spec == dataset.element_spec[0]


@needs_mnist
def test_splits_that_do_not_exist_are_explained():
    with pytest.raises(ValueError, match=r"no split 'valid'.*'train', 'test'"):
        data.read("mnist", split="valid", data_dir=prepared_sets())


def test_sets_that_cannot_be_prepared_are_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"could not prepare 'mnist'.*tfds build mnist"):
        data.read("mnist", data_dir=tmp_path / "file" / "below")


def test_sets_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'ag_news_subset' is not an image set"):
        data.read("ag_news_subset", data_dir=tmp_path)


# Toys.


@pytest.mark.parametrize(
    "name", ["swiss_roll", "moons", "circles", "gaussian_mixture", "checkerboard"]
)
def test_toys_are_standardised(name):
    x = data.toy(name, 20_000)
    assert x.shape == (20_000, 2) and x.dtype == np.float32
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.04)
    np.testing.assert_allclose(x.var(axis=0).mean(), 1, atol=0.03)
    np.testing.assert_array_equal(data.toy(name, 50, seed=4), data.toy(name, 50, seed=4))
    assert (data.toy(name, 50, seed=4) != data.toy(name, 50, seed=5)).all()
    (batch, *_) = data.load(name, labels=False, batch_size=10)
    assert batch.shape == (10, 2)


def test_toys_have_their_shapes():
    x, label = data.toy("circles", 4000, return_labels=True)
    radius = np.linalg.norm(x, axis=1)
    assert radius[label == 0].mean() == pytest.approx(2 * radius[label == 1].mean(), rel=0.02)
    x, label = data.toy("gaussian_mixture", 8000, return_labels=True)
    angle = np.angle((x[:, 0] + 1j * x[:, 1]) * np.exp(-1j * np.pi / 4 * label))
    assert np.abs(angle).max() < np.pi / 8 and sorted(set(label)) == list(range(8))
    x = data.toy("checkerboard", 4000) / np.sqrt(3 / 4)
    assert np.abs(x).max() <= 2 and (np.floor(x).sum(axis=1) % 2 == 0).all()
    x, label = data.toy("moons", 4000, return_labels=True)
    # The half turn about the origin swaps the moons.
    np.testing.assert_allclose(-x[label == 1].mean(axis=0), x[label == 0].mean(axis=0), atol=0.06)
    x = data.toy("swiss_roll", 4000) * 6.789 + [2, 2 / (3 * np.pi)]
    turns = (np.linalg.norm(x, axis=1) - np.arctan2(x[:, 1], x[:, 0])) / (2 * np.pi)
    assert np.abs(turns - np.round(turns)).max() < 0.4
    assert set(np.round(turns)) == {1, 2}


def test_toys_explain_bad_arguments():
    with pytest.raises(ValueError, match=r"Unknown toy 'spiral'. Known: checkerboard"):
        data.toy("spiral", 10)
    with pytest.raises(ValueError, match=r"integer >= 1\. Received num=0"):
        data.toy("moons", 0)
    with pytest.raises(ValueError, match="no labels"):
        data.toy("checkerboard", 10, return_labels=True)


def test_arrays_need_no_tensorflow():
    code = """
import sys
sys.modules["tensorflow"] = None
from tfdiffusion import data
examples = data.read("digits", image_size=16)
assert examples.arrays()[0].shape == (1797, 16, 16, 1)
for call in (examples.batches, lambda: data.read("mnist")):
    try:
        call()
    except ImportError as error:
        assert "pip install tensorflow" in str(error), error
    else:
        raise AssertionError("no ImportError")
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
