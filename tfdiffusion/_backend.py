"""The only file that asks which Keras backend runs.

Everything else is written once, in `keras.ops`. What Keras leaves to the backend is here: the
training step, compilation of a function that reads variables, a derivative, the replica's number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence

import keras
from keras import ops

BACKEND = keras.backend.backend()

# Times on a grid lie close together near t = 0 and their coefficients are differences. TensorFlow
# computes them in float64; JAX does so only where the user has enabled x64.
TIME_DTYPE = "float64" if BACKEND == "tensorflow" else "float32"


def rows(coefficient, x):
    """Shapes a coefficient, () or (B,), to multiply x, (B, ...), in x's dtype."""
    coefficient = ops.cast(coefficient, x.dtype)
    if len(coefficient.shape) == 0:
        return coefficient
    return ops.reshape(coefficient, (-1,) + (1,) * (len(x.shape) - 1))


def substituted(pairs: Sequence[tuple]) -> keras.StatelessScope:
    """Context in which each variable of (variable, value) pairs reads as its value.

    Nothing is assigned, so an exception inside cannot leave a model with the wrong weights, and
    whatever layers assign inside is dropped.
    """
    return keras.StatelessScope(state_mapping=list(pairs))


def _updated(scope: keras.StatelessScope, variables: Sequence) -> list:
    """The values that variables have at the end of a scope."""
    values = (scope.get_current_value(v) for v in variables)
    return [v.value if new is None else new for v, new in zip(variables, values)]


def _gatherable(logs: dict) -> dict:
    """Logs in the shape that Keras needs to average them over several hosts: (1,), not ()."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or not context.strategy.extended._in_multi_worker_mode():
        return logs
    return {name: ops.reshape(value, (1,)) for name, value in logs.items()}


class _TensorFlowStep:
    """`train_step` and `test_step` for TensorFlow's trainer."""

    def train_step(self, data):
        """One optimizer step on a batch: draw t and noise, regress, descend."""
        import tensorflow as tf

        self._ensure_built(data)
        fault = self.fault_of(data)
        updates_before = ops.add(self.optimizer.iterations, 0)
        with tf.GradientTape() as tape:
            loss = self.mean_loss(data, training=True)
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, self.trainable_weights)
        # A table looked up twice has a gradient in two slices. Keras squares each of them where
        # Adam wants the square of their sum.
        gradients = [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        fault = self.fault_of_update(fault, loss, gradients)

        def descend():
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights))

        if tf.distribute.has_strategy():  # replicas meet in there, which they can't in a branch
            descend()
        else:
            tf.cond(tf.equal(fault, 0), descend, lambda: None)
        self.after_update(moved=self.optimizer.iterations > updates_before)
        self.loss_tracker.update_state(loss, fault)
        return _gatherable({"loss": self.loss_tracker.result()})

    def test_step(self, data):
        """The loss of a batch at fixed noise, with the averaged weights."""
        self._ensure_built(data)
        return _gatherable(self.evaluate_batch(data))

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # With a strategy, Keras looks at a batch to build the model, and stumbles over one that is
        # spread over several hosts. `fit` has built it where the data tell their shape.
        if not (self.built and self.optimizer.built):
            super()._maybe_symbolic_build(iterator, data_batch)

    def _ensure_built(self, data) -> None:
        # Unlike JAX's, TensorFlow's trainer leaves building to the first traced step.
        if not self.built:
            import tensorflow as tf

            with tf.init_scope():
                self.build(keras.utils.unpack_x_y_sample_weight(data)[0].shape)


class _JAXStep:
    """The same two steps for JAX's trainer, which hands the state in and takes it back."""

    def train_step(self, state, data):
        """One optimizer step on a batch: draw t and noise, regress, descend."""
        import jax

        trainable, non_trainable, optimizer_state, metrics_state = state
        fixed = [
            *zip(self.non_trainable_variables, non_trainable),
            *zip(self.optimizer.variables, optimizer_state),
            *zip(self.metrics_variables, metrics_state),
        ]

        def scaled_loss(trainable):
            pairs = [*fixed, *zip(self.trainable_variables, trainable)]
            with keras.StatelessScope(state_mapping=pairs, collect_losses=True) as scope:
                loss = self.mean_loss(data, training=True)
                scaled = self.optimizer.scale_loss(loss)
            return scaled, (loss, _updated(scope, self.non_trainable_variables))

        (_, (loss, non_trainable)), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(
            trainable
        )
        with substituted(fixed):
            fault = self.fault_of_update(self.fault_of(data), loss, gradients)
            updates_before = ops.add(self.optimizer.iterations, 0)
        before = trainable, optimizer_state
        after = self.optimizer.stateless_apply(optimizer_state, gradients, trainable)
        trainable, optimizer_state = jax.tree.map(
            lambda new, old: jax.numpy.where(fault == 0, new, old), tuple(map(list, after)), before
        )
        pairs = [
            *zip(self.trainable_variables, trainable),
            *zip(self.non_trainable_variables, non_trainable),
            *zip(self.optimizer.variables, optimizer_state),
            *zip(self.metrics_variables, metrics_state),
        ]
        with substituted(pairs) as scope:
            self.after_update(moved=self.optimizer.iterations > updates_before)
            self.loss_tracker.update_state(loss, fault)
            logs = {"loss": self.loss_tracker.result()}
        return logs, (
            trainable,
            _updated(scope, self.non_trainable_variables),
            optimizer_state,
            _updated(scope, self.metrics_variables),
        )

    def test_step(self, state, data):
        """The loss of a batch at fixed noise, with the averaged weights."""
        trainable, non_trainable, metrics_state = state
        pairs = [
            *zip(self.trainable_variables, trainable),
            *zip(self.non_trainable_variables, non_trainable),
            *zip(self.metrics_variables, metrics_state),
        ]
        with substituted(pairs) as scope:
            logs = self.evaluate_batch(data)
        metrics_state = _updated(scope, self.metrics_variables)
        return logs, (trainable, non_trainable, metrics_state)


# A model mixes this in and gives `mean_loss(data, training)`, `evaluate_batch(data)`,
# `after_update(moved)`, `loss_tracker`, and why a batch must be refused: `fault_of(data)` and
# `fault_of_update(fault, loss, gradients)`. The optimizer's step is then the backend's.
TrainStep = _JAXStep if BACKEND == "jax" else _TensorFlowStep


def compiled(function: Callable, variables: Sequence) -> Callable:
    """Compiles a function of tensors that reads Keras variables.

    Args:
        function: takes and returns (nested) tensors.
        variables: every variable that it may read. TensorFlow reads them where they are; on JAX
            they become arguments, so that training between two calls is seen.

    Returns:
        A callable with the signature of `function`.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # AutoGraph finds nothing to convert where JAX can trace, and doubles the time to trace.
        graph = tf.function(function, reduce_retracing=True, autograph=False)
        # TensorFlow tells functions apart by their address, which a later one may get again when
        # this one is gone, and would warn that one function is traced too often.
        graph._omit_frequent_tracing_warning = True
        return graph
    import jax

    @jax.jit
    def pure(values, *args):
        with substituted(zip(variables, values)):
            return function(*args)

    return lambda *args: pure([v.value for v in variables], *args)


def traced_once(function: Callable) -> Callable:
    """Makes an elementwise function of uint32 tensors one node in the graphs that call it.

    Tracing costs time for each operation. What is used in many places, such as the random number
    generator, is traced once for all shapes here; compilers inline it, so running costs the same.

    Args:
        function: elementwise; takes any number of uint32 tensors and returns a tuple of them.

    Returns:
        A callable with the signature of `function`.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        count = len(inspect.signature(function).parameters)
        any_shape = [tf.TensorSpec(None, "uint32")] * count
        graph = tf.function(function, input_signature=any_shape, autograph=False)

        @functools.wraps(function)
        def call(*tensors):
            tensors = [tf.convert_to_tensor(t, "uint32") for t in tensors]
            shape = functools.reduce(tf.broadcast_static_shape, (t.shape for t in tensors))
            return tuple(tf.ensure_shape(output, shape) for output in graph(*tensors))

        return call
    import jax

    return jax.jit(function)


def derivative(function: Callable, t):
    """dfunction/dt, elementwise, at t of any shape."""
    t = ops.convert_to_tensor(t)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(t)
            value = function(t)
        return tape.gradient(value, t, unconnected_gradients="zero")
    import jax

    return jax.jvp(function, (t,), (ops.ones_like(t),))[1]


def is_traced(tensor) -> bool:
    """Whether a tensor is a symbol in a graph, which has no value yet."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.is_symbolic_tensor(tf.convert_to_tensor(tensor))  # a variable is read first
    import jax

    return isinstance(tensor, jax.core.Tracer)


def scope(model):
    """Context in which variables of a model are made where its distribution strategy wants them."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def synchronize(model) -> None:
    """Brings the variables of a model in `fit` up to date: JAX's trainer holds their values."""
    if BACKEND == "jax":
        model.jax_state_sync()


def replica_id():
    """Number of the replica that runs this step, 0 without a distribution strategy."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        return 0 if context is None else context.replica_id_in_sync_group
    return 0  # JAX traces one program over the global batch: every row already has its own number.


def vjp(function: Callable, x, v=None):
    """Value of a function of x and the product of v with its Jacobian, differentiable once more.

    Args:
        function: rows of x to rows of anything: f(x) depends on x row by row.
        x: (B, ...).
        v: of the shape of f(x); ones by default, which of a scalar function is the gradient.

    Returns:
        f(x), and vᵀ ∂f/∂x of the shape of x.
    """
    x = ops.convert_to_tensor(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x, v, unconnected_gradients="zero")
    import jax

    value, pull = jax.vjp(function, x)
    return value, pull(ops.ones_like(value) if v is None else v)[0]


def jacobian_trace(function: Callable, x):
    """f(x) and the exact trace of its Jacobian, row by row: D products with the Jacobian.

    Args:
        function: (B, D) → (B, D), row by row.
        x: (B, D), D known.

    Returns:
        f(x), (B, D), and tr ∂f/∂x, (B,).
    """
    x = ops.convert_to_tensor(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # Vectorized in a graph; outside of one that would trace anew at every call, with a warning.
        in_graph = not tf.executing_eagerly()
        with tf.GradientTape(persistent=not in_graph) as tape:
            tape.watch(x)
            value = function(x)
        jacobian = tape.batch_jacobian(value, x, experimental_use_pfor=in_graph)
        return value, tf.linalg.trace(jacobian)
    import jax

    value, pull = jax.vjp(function, x)

    def diagonal(unit):
        return ops.sum(pull(ops.broadcast_to(unit, x.shape))[0] * unit, axis=-1)

    return value, ops.sum(jax.vmap(diagonal)(ops.eye(x.shape[-1], dtype=x.dtype)), axis=0)
