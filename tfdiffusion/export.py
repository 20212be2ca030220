"""The whole sampler as one SavedModel: from seeds to pixels, where neither Keras nor we exist.

The graph holds the averaged weights, the noise, the guidance and the loop, so whoever serves it
needs TensorFlow's runtime and nothing else. With B requests, H×W×C images and T noise levels:

| signature         | inputs                                               | output               |
|-------------------|------------------------------------------------------|----------------------|
| `serving_default` | `seed` int64 (B,); and if the model knows classes    | `images` uint8       |
|                   | `label` int32 (B,), `guidance` float32 (B,)          | (B, H, W, C)         |
| `sample_float`    | the same                                             | `images` float32     |
| `sample_png`      | the same                                             | `image_bytes` string |
| `sample_steps`    | the same, and `num_steps` int32 ()                   | `images` uint8       |
| `denoise`         | `x_t` float32 (B, H, W, C), `t` float32 (B,);        | `x_0` float32        |
|                   | `label` int32 (B,) if the model knows classes        |                      |

An image depends on its own row alone: the same bytes by itself or in any batch, in any order, after
any reload (on one kind of machine and version of TensorFlow). Seeds alone do not give that.
TensorFlow's kernels compute the last few elements of a tensor by another routine than the rest, so
where a row lies in a batch moves it by a rounding error; each row is therefore a batch of its own.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, random, samplers, times
from tfdiffusion.denoiser import Denoiser, Threshold
from tfdiffusion.samplers.loop import ending, integrate, prior, resolve_grid, start_time
from tfdiffusion.score_matching import ScoreModel, langevin
from tfdiffusion.training import DiffusionModel

# How many rows may be under way at once: memory grows with it, and a few keep all cores busy.
_ROWS_AT_ONCE = 8
# Weights of up to so many bytes are constants of the graph. Kernels on a CPU keep a constant in the
# order that suits them; a variable they order anew for every image, a quarter of an image's time.
# Past this they are variables: a graph cannot hold 2 GiB, and each signature in use copies it.
_MOST_CONSTANT_BYTES = 2**28
# Where TensorFlow Serving looks for requests to run before it opens a model to traffic.
_WARM_UP_FILE = Path("assets.extra", "tf_serving_warmup_requests")
_PNG_CHANNELS = (1, 3, 4)


def saved_model(
    model: DiffusionModel | ScoreModel,
    directory: str | os.PathLike,
    *,
    steps: int | None = None,
    sampler: str | samplers.Sampler | None = None,
    grid: str | times.Grid | Sequence[float] | None = None,
    threshold: str | Threshold | None = "auto",
    steps_per_level: int = 5,
    batch_invariant: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes the sampler with the averaged weights; see the module for its signatures.

    Example:

    >>> path = tfd.export.saved_model(model, "run/saved_model", steps=25)
    >>> sample = tf.saved_model.load(path).signatures["serving_default"]  # in any process
    >>> sample(seed=[0, 1], label=[3, 7], guidance=[1.0, 2.0])["images"]  # (2, 28, 28, 1) uint8

    The label `num_classes` means "no label". `guidance` 1 is the plain conditional model and 0 the
    unconditional one, and always costs two evaluations of the network a step. Requests with a
    label, a `num_steps` or lengths that cannot be are refused with a message. Models of points
    instead of images give `samples`, float32 (B, D), as `serving_default`, `sample_float` and
    `sample_steps`; there is a `sample_png` for 1, 3 and 4 channels, a `sample_steps` for named
    grids.

    `directory` is what `tf.saved_model.load` takes. TensorFlow Serving wants it as a version, a
    folder with a number for its name: mount it at /models/NAME/1, or write to ".../NAME/1". It
    finds a request for each signature in `assets.extra` to warm up with.

    Args:
        model: trained, or built and loaded.
        directory: to write; its parents are made. It appears complete or not at all.
        steps: evaluations of the network a sample, except in `sample_steps`; None, here and in the
            next two, is what `model.sampling` says.
        sampler: a `Sampler` or its name.
        grid: see `tfdiffusion.times.grid`.
        threshold: see `DiffusionModel.guided`.
        steps_per_level: of a `ScoreModel`, which has its own sampler, annealed Langevin dynamics,
            and no use for the four arguments above; it gives no `sample_steps`.
        batch_invariant: False computes a batch at once, which takes a fifth off the time of 16
            images on a CPU (benchmarks/README.md) and is a must for large batches on a GPU; an
            image then depends on its neighbours by a rounding error, which can move a pixel by 1.
        overwrite: replace a SavedModel that is there. Anything else is never touched.

    Returns:
        The directory.

    Raises:
        RuntimeError: If Keras does not run on TensorFlow.
        TypeError: If the model is neither a `DiffusionModel` nor a `ScoreModel`.
        ValueError: If the model is not built, a name is unknown, or a number out of range.
        FileExistsError: If something is there that may not be replaced.
    """
    _check_backend()
    _check_model(model)
    if isinstance(model, ScoreModel):
        request = model.langevin_request(steps_per_level)
        make = functools.partial(_ScoreGraph, model, request, batch_invariant)
    else:
        own = model.sampling
        sampler = samplers.get(own.sampler if sampler is None else sampler)
        grid, steps = (own.grid if grid is None else grid), (own.steps if steps is None else steps)
        resolve_grid(model.raw, grid, steps, sampler)
        model.guided(threshold=threshold)
        make = functools.partial(_Graph, model, sampler, grid, steps, threshold, batch_invariant)
    directory = _check_directory(_checks.path("directory", directory), overwrite)
    import tensorflow as tf

    graph = make()
    module = tf.Module()
    module.weights = graph.variables
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=directory.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        # Gradients of ours are of no use to a server and would double the graph.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, str(new), signatures=graph.signatures, options=options)
        _write_warm_up(new / _WARM_UP_FILE, graph.examples())
        if directory.exists():
            directory.replace(old)
        new.replace(directory)
    return directory


class _Graph:
    """The functions that go into the SavedModel, and what they share."""

    def __init__(self, model, sampler, grid, steps, threshold, batch_invariant):
        import tensorflow as tf

        self.model, self.sampler, self.threshold = model, sampler, threshold
        self.grid, self.steps, self.batch_invariant = grid, steps, batch_invariant
        self.shape = model.sample_shape
        self.is_image = len(self.shape) == 3
        model.denoiser()  # weights loaded since `build` enter the average
        pairs = [] if model.ema is None else model.ema.pairs()
        averages = {id(variable): value for variable, value in pairs}
        # Copies: SavedModels keep whatever they refer to, and would keep the raw weights as well.
        values = [
            (v, ops.convert_to_numpy(averages.get(id(v), v))) for v in model.network.variables
        ]
        self.variables = []
        if sum(value.nbytes for _, value in values) > _MOST_CONSTANT_BYTES:
            values = [(v, tf.Variable(value, False, name=v.path)) for v, value in values]
            self.variables = [variable for _, variable in values]
        self.raw = copy.copy(model.raw)
        self.raw.network = _Stored(model, values)
        self.rows = {"seed": tf.TensorSpec([None], tf.int64, "seed")}
        if model.num_classes is not None:
            self.rows["label"] = tf.TensorSpec([None], tf.int32, "label")
            self.rows["guidance"] = tf.TensorSpec([None], tf.float32, "guidance")
        visited = tf.TensorSpec([None], _backend.TIME_DTYPE)
        # One function behind all signatures.
        self.sample = tf.function(
            self._sample, input_signature=[visited, *self.rows.values()], autograph=False
        )
        self.guided = tf.function(self._guided, autograph=False)
        self.signatures = self._signatures()

    def _signatures(self) -> dict:
        """Name → concrete function."""
        import tensorflow as tf

        def traced(function, inputs):
            return tf.function(function, autograph=False).get_concrete_function(**inputs)

        name = "images" if self.is_image else "samples"
        pixels = _pixels if self.is_image else tf.identity

        def draw(**inputs):
            return {name: pixels(self._draw(inputs))}

        functions = {
            "serving_default": traced(draw, self.rows),
            "sample_float": traced(lambda **inputs: {name: self._draw(inputs)}, self.rows),
            "denoise": traced(lambda **inputs: {"x_0": self._denoise(inputs)}, self._noisy_rows()),
        }
        if isinstance(self.grid, str | times.Grid):
            num_steps = tf.TensorSpec([], tf.int32, "num_steps")
            functions["sample_steps"] = traced(draw, {**self.rows, "num_steps": num_steps})
        if self.is_image and self.shape[-1] in _PNG_CHANNELS:
            functions["sample_png"] = traced(
                lambda **inputs: {"image_bytes": _png(pixels(self._draw(inputs)))}, self.rows
            )
        return functions

    def examples(self) -> dict[str, dict[str, np.ndarray]]:
        """A request of one sample for each signature."""
        zeros = {
            name: np.zeros([size or 1 for size in spec.shape], spec.dtype.as_numpy_dtype)
            for name, spec in {**self.rows, **self._noisy_rows()}.items()
        }
        values = {**zeros, "num_steps": np.int32(1)}
        values["guidance"] = np.ones([1], np.float32)
        values["t"] = np.full([1], self.model.raw.latest, np.float32)
        return {
            name: {key: values[key] for key in function.structured_input_signature[1]}
            for name, function in self.signatures.items()
        }

    def _noisy_rows(self) -> dict:
        import tensorflow as tf

        rows = {"x_t": tf.TensorSpec([None, *self.shape], tf.float32, "x_t")}
        rows["t"] = tf.TensorSpec([None], tf.float32, "t")
        if "label" in self.rows:
            rows["label"] = self.rows["label"]
        return rows

    def _draw(self, inputs: dict):
        """Samples for the inputs of a signature, once they are in order."""
        rows = self._checked([inputs[name] for name in self.rows], list(self.rows))
        if "num_steps" in inputs:
            return self.sample(self._visited(inputs["num_steps"]), *rows)
        return self.sample(self._default_times(), *rows)

    def _default_times(self):
        return resolve_grid(self.model.raw, self.grid, self.steps, self.sampler)

    def _visited(self, num_steps):
        import tensorflow as tf

        process = self.model.process
        most = process.num_timesteps or max(self.steps, 1000)
        message = f"num_steps must lie between 1 and {most}."
        with tf.control_dependencies(
            [
                tf.debugging.assert_positive(num_steps, message),
                tf.debugging.assert_less_equal(num_steps, most, message),
            ]
        ):
            num_steps = tf.identity(num_steps)
        latest = start_time(self.model.raw, self.sampler)
        return times.grid(self.grid, num_steps, process, latest, _backend.TIME_DTYPE)

    def _sample(self, visited, *rows):
        """The loop: times (N,), seeds and conditions (B,) → (B, *shape)."""

        def run(seed, *conditions):
            keys, denoiser = random.keys(seed), _Traced(self.guided, self.model, conditions)
            x = prior(denoiser, keys, self.shape, visited[0])
            return integrate(denoiser, self.sampler, visited, keys, x, **ending(self.grid))

        return self._each(run, rows)

    def _guided(self, x_t, t, *conditions):
        denoiser = self.model.guide(self.raw, *conditions, threshold=self.threshold)
        return denoiser(x_t, t)

    def _denoise(self, inputs: dict):
        """x̂_0 as `model.denoiser()` says it: neither guided nor clipped."""
        names = list(self._noisy_rows())
        rows = self._checked([inputs[name] for name in names], names)
        return self._each(self.raw, rows)

    def _each(self, function, rows):
        """A function of batches, on each row by itself or on all of them."""
        import tensorflow as tf

        if not self.batch_invariant:
            return function(*rows)
        return tf.map_fn(
            lambda row: function(*(value[None] for value in row))[0],
            tuple(rows),
            fn_output_signature=tf.TensorSpec(self.shape, tf.float32),
            parallel_iterations=_ROWS_AT_ONCE,
        )

    def _checked(self, rows: list, names: list[str]) -> list:
        """The rows, behind the checks of what only a request can tell."""
        import tensorflow as tf

        lengths = [tf.shape(row)[0] for row in rows]
        message = f"{', '.join(names)} must have one entry a sample, all the same number."
        checks = [tf.debugging.assert_equal(length, lengths[0], message) for length in lengths[1:]]
        if "label" in names:
            label, most = rows[names.index("label")], self.model.num_classes
            message = f"label must lie between 0 and {most - 1}, or be {most} for no label."
            checks.append(tf.debugging.assert_non_negative(label, message))
            checks.append(tf.debugging.assert_less_equal(label, most, message))
        # Without this order the lookup of a bad label may fail first, with a message of its own.
        with tf.control_dependencies(checks):
            return [tf.identity(row) for row in rows]


class _ScoreGraph(_Graph):
    """The same for a score model: annealed Langevin dynamics inside.

    Args:
        model: a `ScoreModel`.
        request: what `langevin.annealed` takes.
        batch_invariant: see `saved_model`.
    """

    def __init__(self, model, request, batch_invariant):
        import tensorflow as tf

        self.request = request
        self.score = tf.function(self._score, autograph=False)
        levels = model.num_levels
        every_level = [1.0 - level / levels for level in range(levels)]
        super().__init__(model, None, every_level, levels, None, batch_invariant)

    def _score(self, x, level):
        return self.raw.predict(x, self.model.time_of(level))

    def _sample(self, visited, seed):
        """The loop over levels and steps: seeds (B,) → (B, *shape)."""
        del visited  # the ladder is the model's

        def run(seed):
            noise = langevin.noise_of(random.keys(seed), self.shape)
            return langevin.annealed(self.score, self.model.sigmas, noise, **self.request)

        return self._each(run, (seed,))


class _Stored:
    """A network whose graph and weights exist once, however often they are called.

    Args:
        model: whose network it is.
        values: (variable, value) pairs for all of its variables; arrays become constants.
    """

    def __init__(self, model, values):
        import tensorflow as tf

        self.network, self.values = model.network, values
        self.num_classes = model.raw.num_classes
        inputs = {"x": tf.TensorSpec([None, *model.sample_shape], tf.float32)}
        inputs["time"] = tf.TensorSpec([None], tf.float32)
        if self.num_classes is not None:
            inputs["label"] = tf.TensorSpec([None], tf.int32)
        traced = tf.function(self._evaluate, input_signature=[inputs], autograph=False)
        self.traced = traced.get_concrete_function()
        self.definition = _with_sums_apart(self.traced.graph)
        self.function = tf.function(self._run, input_signature=[inputs], autograph=False)

    def _evaluate(self, inputs):
        import tensorflow as tf

        values = [(variable, tf.convert_to_tensor(value)) for variable, value in self.values]
        with _backend.substituted(values):
            return self.network(inputs)

    def _run(self, inputs):
        import tensorflow as tf

        capture = tf.compat.v1.get_default_graph().capture  # of variables, if there are any
        values = [*tf.nest.flatten(inputs), *map(capture, self.traced.captured_inputs)]
        return tf.graph_util.import_graph_def(
            self.definition,
            {tensor.name: value for tensor, value in zip(self.traced.inputs, values)},
            [output.name for output in self.traced.outputs],
            name="",
        )[0]

    def __call__(self, inputs, training=False):
        """What the network gives."""
        del training  # never, in a sampler
        return self.function(inputs)


def _with_sums_apart(graph):
    """The GraphDef of a graph, with no sum next to the convolution or product that it adds to.

    TensorFlow makes the two one on CPUs, and its kernel for that (seen in 2.21) is not safe to run
    twice at once: it keeps the addresses of a copy in members of its own. Rows that are computed
    side by side, or requests that a server answers so, would crash now and then, or swap sums.
    """
    sums = ("Add", "AddV2", "AddN")
    definition = graph.as_graph_def()
    operations = {node.name: node.op for node in definition.node}
    for node in list(definition.node):
        if "_gradient_op_type" in node.attr:  # of no use to a sampler
            del node.attr["_gradient_op_type"]
        if node.op not in sums:
            continue
        for i, name in enumerate(node.input):
            if operations.get(name) in ("BiasAdd", *sums):
                between = definition.node.add(name=f"{node.name}/apart_{i}", op="EnsureShape")
                between.input.append(name)
                between.attr["T"].CopyFrom(node.attr["T"])
                shape = graph.get_tensor_by_name(f"{name}:0").shape
                between.attr["shape"].shape.CopyFrom(shape.as_proto())
                node.input[i] = between.name
    return definition


class _Traced(Denoiser):
    """A denoiser whose graph exists once, however often a sampler calls it.

    Args:
        function: (x_t, t, *conditions) → x̂_0.
        model: whose process it is.
        conditions: label and guidance, or nothing.
    """

    def __init__(self, function, model, conditions):
        self.function, self.conditions = function, conditions
        self.process, self.latest = model.process, model.raw.latest

    def __call__(self, x_t, t):
        """x̂_0."""
        return self.function(x_t, t, *self.conditions)


def _pixels(images):
    """[−1, 1] → 0 … 255."""
    import tensorflow as tf

    return tf.cast(tf.clip_by_value(tf.round((images + 1.0) * 127.5), 0.0, 255.0), tf.uint8)


def _png(pixels):
    """uint8 (B, H, W, C) → PNG files (B,)."""
    import tensorflow as tf

    return tf.map_fn(tf.io.encode_png, pixels, fn_output_signature=tf.string)


def _check_backend() -> None:
    if _backend.BACKEND != "tensorflow":
        raise RuntimeError(
            f"A SavedModel is TensorFlow's, and Keras runs on {_backend.BACKEND!r} here. Save the "
            "model with model.save('model.keras'), then load and export it in a process started "
            "with KERAS_BACKEND=tensorflow."
        )


def _check_model(model) -> None:
    if not isinstance(model, DiffusionModel | ScoreModel):
        raise TypeError(
            "Only a tfd.DiffusionModel or ScoreModel can be exported. "
            f"Received a {type(model).__name__}."
        )
    if model.sample_shape is None:
        raise ValueError("The model has no shape yet: call fit, or build((None, H, W, C)).")
    if None in model.sample_shape:
        raise ValueError(
            f"The size of a sample must be known to export it. Received {model.sample_shape}: "
            "build the model with height, width and channels."
        )


def _check_directory(directory: Path, overwrite: bool) -> Path:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return directory
    if not (directory / "saved_model.pb").is_file():
        raise FileExistsError(
            f"{directory} holds something that is not a SavedModel. Choose another directory."
        )
    if not overwrite:
        raise FileExistsError(
            f"{directory} holds a SavedModel already. Pass overwrite=True to replace it."
        )
    return directory


def _write_warm_up(path: Path, examples: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes requests for TensorFlow Serving to run while it loads the model.

    The file is a TFRecord of `PredictionLog` messages (tensorflow_serving/apis), encoded here field
    by field, as the package that defines them does not come with TensorFlow.
    """
    import tensorflow as tf

    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in examples.items():
            # ModelSpec: name = 1 (any; the model being loaded is meant), signature_name = 3.
            request = _field(1, _field(1, b"model") + _field(3, signature.encode()))
            for name, value in inputs.items():
                tensor = tf.make_tensor_proto(value).SerializeToString()
                # PredictRequest: model_spec = 1, inputs = 2, a map of key = 1 and value = 2.
                request += _field(2, _field(1, name.encode()) + _field(2, tensor))
            # PredictionLog: predict_log = 6; PredictLog: request = 1.
            writer.write(_field(6, _field(1, request)))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field in protobuf's wire format (wire type 2)."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, least significant first, the top bit set on all but the last."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
