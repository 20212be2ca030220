"""Data that one cannot train on are refused in one sentence, and cost nothing that was learned."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import numpy

from tfdiffusion import DiffusionModel, networks
from tfdiffusion.fitting import NotFiniteError

BATCH = 4


@keras.saving.register_keras_serializable(package="tests")
class Images(networks.MLP):
    """The smallest network that takes images of (2, 2, 1)."""

    def build(self, input_shape):
        super().build({**input_shape, "x": (None, 4)})

    def call(self, inputs, training=False):
        x = keras.ops.reshape(inputs["x"], (-1, 4))
        return keras.ops.reshape(super().call({**inputs, "x": x}, training), (-1, 2, 2, 1))


def made(num_classes=None, rate=0.01, eagerly=False, **arguments):
    model = DiffusionModel(
        Images(width=8, depth=1, num_classes=num_classes), prediction="v", **arguments
    )
    model.compile(keras.optimizers.Adam(rate), run_eagerly=eagerly)
    return model


def images(num=16):
    return np.random.default_rng(0).uniform(-1, 1, size=(num, 2, 2, 1)).astype("float32")


def labels(num=16):
    return np.arange(num) % 3


def batches(x, y=None):
    """The same data from a generator, which nobody can look through before training."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(x) // BATCH

        def __getitem__(self, i):
            rows = slice(i * BATCH, (i + 1) * BATCH)
            return (x[rows],) if y is None else (x[rows], y[rows])

    return Batches()


def spoiled(value, row):
    x = images()
    x[row, 0, 0, 0] = value
    return x


def weights(model):
    return [numpy(v) for v in (*model.network.weights, *model.ema.averages)]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (spoiled(np.nan, 5), r"1 of 16 examples hold NaN or infinite values, the first.*x\[5\]"),
        (spoiled(-np.inf, 0), r"NaN or infinite"),
        ((images() + 1) * 127.5, r"must lie in \[-1, 1\].*from 0\.\d+ to 2\d\d.*x / 127.5 - 1"),
        (images().astype("int32"), r"must be float in \[-1, 1\]. Received dtype int32"),
        (images()[:0], r"no data to train on. Received x of shape \(0, 2, 2, 1\)"),
        (images()[:, 0, 0, 0], r"Expected images .* Received shape \(16,\)"),
    ],
    ids=["nan", "infinite", "bytes", "integers", "empty", "rank"],
)
def test_arrays_are_looked_through_before_training(x, message):
    model = made()
    with pytest.raises(ValueError, match=message):
        model.fit(x, verbose=0)
    assert not model.built  # no work was begun


def test_labels_of_arrays_are_looked_through():
    with pytest.raises(
        ValueError, match=r"from 0 to 2, the classes of the network. Received 0 to 3"
    ):
        made(num_classes=3).fit(images(), np.arange(16) % 4, verbose=0)
    with pytest.raises(ValueError, match=r"Labels must be integers. Received dtype float32"):
        made(num_classes=3).fit(images(), labels().astype("float32"), verbose=0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            spoiled(np.nan, 9),
            None,
            r"stopped at step 3 .*NaN or infinite.* those of step 2, before",
        ),
        (
            spoiled(np.inf, 1),
            None,
            r"stopped at step 1 .*NaN or infinite.* those of step 0, before",
        ),
        (spoiled(255.0, 15), None, r"stopped at step 4 .*leave \[-1, 1\].*127.5.* those of step 3"),
        (images(), np.where(np.arange(16) == 6, 3, labels()), r"step 2 .*labels outside 0 to 2"),
        (images(), np.where(np.arange(16) == 6, -1, labels()), r"step 2 .*labels outside 0 to 2"),
    ],
    ids=["nan", "infinite", "bytes", "label", "negative label"],
)
def test_a_bad_batch_stops_training_and_changes_no_weight(x, y, message):
    """Weights and averages are bit-equal to those of a training that ends one batch before."""
    num_classes = None if y is None else 3
    eagerly = "step 3" not in message  # one case in a graph, the rest without waiting for it
    keras.utils.set_random_seed(1)
    model = made(num_classes, eagerly=eagerly)
    with pytest.raises(ValueError, match=message):
        model.fit(batches(x, y), epochs=3, shuffle=False, verbose=0)
    good = model.steps_done - 1
    keras.utils.set_random_seed(1)
    shorter = made(num_classes, eagerly=eagerly)
    if good:
        stop = good * BATCH
        y = None if y is None else y[:stop]
        shorter.fit(batches(x[:stop], y), shuffle=False, verbose=0)
    else:
        shorter.build((None, 2, 2, 1))
    for mine, theirs in zip(weights(model), weights(shorter), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # And it can go on.
    model.fit(images(4), None if y is None else labels(4), verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))


def test_a_loss_that_becomes_nan_stops_training():
    model = made(rate=1e30)
    with pytest.raises(NotFiniteError, match=r"NaN or infinite. Use a smaller learning rate"):
        model.fit(images(), batch_size=BATCH, epochs=20, verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))


def test_validation_data_are_looked_at_too():
    model = made()
    bad = spoiled(np.nan, 13)
    with pytest.raises(ValueError, match="Validation stopped at batch 4: its data hold NaN"):
        model.fit(images(), validation_data=batches(bad), batch_size=BATCH, verbose=0)
    with pytest.raises(ValueError, match="Validation stopped at batch 4: its data hold NaN"):
        model.evaluate(batches(bad), verbose=0)
    with pytest.raises(ValueError, match="1 of 16 examples"):
        model.evaluate(bad, verbose=0)


def test_data_without_a_range_are_welcome_when_one_says_so():
    wide = images() * 5
    with pytest.raises(ValueError, match="bounded=False"):
        made().fit(wide, verbose=0)
    model = made(bounded=False)
    model.fit(wide, batch_size=BATCH, epochs=2, verbose=0)
    assert not model.bounded
    again = DiffusionModel.from_config(model.get_config())
    again.build((None, 2, 2, 1))
    assert not again.bounded
    # Nor does sampling hold them in a range.
    request = {"num": 8, "steps": 3, "sampler": "ddpm", "grid": "uniform"}
    plain, clipped = (model.sample(**request, threshold=t) for t in ("auto", "clip"))
    assert np.abs(clipped).max() <= 1.0 < np.abs(plain).max()


def test_points_have_no_range():
    model = DiffusionModel(networks.MLP(width=4, depth=1))
    model.compile()
    model.fit(10 * images().reshape(-1, 4), verbose=0)
    assert not model.bounded


def test_every_callback_of_the_user_still_runs():
    seen = []
    mine = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    made().fit(images(), batch_size=BATCH, verbose=0, callbacks=mine)
    made().fit(images(), batch_size=BATCH, verbose=0, callbacks=[mine])
    assert seen == [0, 1, 2, 3] * 2


MODEL = made()
shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
dtypes = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool", "complex64"])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, scale=st.sampled_from([0.0, 0.5, 1.0, 3.0, np.nan, np.inf]))
def test_any_array_trains_or_is_refused_in_one_sentence(shape, dtype, scale):
    """Whatever comes, no traceback from the depths: a ValueError that says what was expected."""
    with np.errstate(invalid="ignore"):
        x = (np.ones(shape) * scale).astype(dtype)
    good = len(shape) == 4 and min(shape) > 0 and x.dtype.kind == "f"
    good = good and bool(np.isfinite(x).all() and np.abs(x).max() <= 1.0)
    try:
        MODEL._check_arrays(x, None)
    except ValueError as error:
        message = str(error)
        assert not good and "\n" not in message
        assert "eceived" in message or "x[0]" in message  # what came, or where it is
    else:
        assert good or len(shape) != 4
