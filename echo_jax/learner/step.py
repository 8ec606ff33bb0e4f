"""One update of the learner as one jitted function, docs/design.md#the-step.

The batches of a run have one static shape, so nothing compiles twice. The step walks its
micro-batches in a loop that ends with the last one that holds a token, so a short batch costs only
what it holds. The loss is in losses.py; sharding.py says how arrays lie on the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from echo_jax.learner import sharding
from echo_jax.learner.losses import Metric, Metrics, cross_entropy, echo_loss, total
from echo_jax.learner.optimizer import make_optimizer
from echo_jax.learner.updates import scores_before
from echo_jax.model import huggingface, partition
from echo_jax.model import params as model_params
from echo_jax.model.family import ModelConfig
from echo_jax.model.logprobs import score_tokens
from echo_jax.types import Batch, TokenScores


class TrainState(NamedTuple):
    params: nnx.State  # float32, the tree of the model's parameters
    opt_state: optax.OptState
    step: jax.Array  # int32 scalar, updates done


def init_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def token_scores(graphdef, params, batch: Batch, temperature: float) -> TokenScores:
    """Scores [R, T] of every token given those before it in its segment; column 0 is 0.

    The first token of a later segment in a row gets the score that the segment before it gives.
    That means nothing, and no weight is ever on such a token.
    """
    model = nnx.merge(graphdef, params)
    hidden_RTD = model(batch.tokens, batch.positions, batch.segment_ids)
    # Each place predicts the token after it; rolled back, a score stands at its own token. They are
    # not cut to T - 1 places, because these would not divide over the mesh.
    targets_RT = jnp.roll(batch.tokens, -1, axis=1)
    scores = score_tokens(hidden_RTD, model.unembedding, targets_RT, temperature)
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1).at[:, 0].set(0.0), scores)


def micro_batches(batch: Batch, micro_rows: int) -> tuple[Batch, jax.Array]:
    """The batch as arrays [micro-batches, micro_rows, T], and how many of these are to be walked.

    The second is an int32 scalar: one more than the index of the last that holds a token.
    """
    rows, T = batch.tokens.shape
    if rows % micro_rows:
        raise ValueError(
            f'batch of {rows} rows does not divide into micro-batches of {micro_rows}; '
            'change config.batch.micro_rows'
        )
    micro = jax.tree.map(
        lambda x: partition.constrain(x.reshape(-1, micro_rows, T), None, 'rows', 'tokens'), batch
    )
    filled = (micro.segment_ids > 0).any(axis=(1, 2))
    return micro, jnp.max(jnp.where(filled, jnp.arange(filled.size) + 1, 0))


def _over_micro_batches(
    f: Callable[[Batch], tuple[Any, Any]], batch: Batch, micro_rows: int
) -> tuple[Any, Any]:
    """(sums, values) of f(micro-batch) = (values to add up, arrays [micro_rows, T] to keep), trees,
    over the micro-batches that hold tokens. What is kept is [R, T], and 0 for the others.
    """
    micro, count = micro_batches(batch, micro_rows)

    def value_at(i):
        return f(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), micro))

    def add(i, so_far):
        sums, kept = so_far
        values, arrays = value_at(i)
        kept = jax.tree.map(lambda all, one: all.at[i].set(one), kept, arrays)
        return jax.tree.map(jnp.add, sums, values), kept

    if len(micro.tokens) == 1:
        return value_at(0)
    shapes, kept_shapes = jax.eval_shape(value_at, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    kept = jax.tree.map(lambda x: jnp.zeros(micro.tokens.shape, x.dtype), kept_shapes)
    kept = jax.tree.map(lambda x: partition.constrain(x, None, 'rows', 'tokens'), kept)
    # `count` is known only when the step runs. `lax.scan`, whose length is fixed, would spend a
    # forward and a backward pass on each micro-batch of padding, and packing leaves many of them.
    sums, kept = jax.lax.fori_loop(0, count, add, (zeros, kept))
    return sums, jax.tree.map(lambda x: x.reshape(batch.tokens.shape), kept)


def _sum_over_micro_batches(f: Callable[[Batch], Any], batch: Batch, micro_rows: int) -> Any:
    """The sum of f(micro-batch), a tree of arrays, over the micro-batches that hold tokens."""
    return _over_micro_batches(lambda micro: (f(micro), ()), batch, micro_rows)[0]


def make_loss(graphdef, config: ml_collections.ConfigDict) -> Callable[..., tuple]:
    """`loss(params, batch, env_coef, reference) -> (scalar, (metrics, scores))`, the objective.

    The scores are TokenScores [R, T].
    """
    temperature = config.policy.temperature

    def loss(params, batch, env_coef, reference):
        scores = token_scores(graphdef, params, batch, temperature)
        extra = {'entropy': scores.entropy, 'logprobs_t1': scores.logprobs_t1}
        if config.loss.old_logprobs == 'recomputed':
            # Before a batch's only update, the policy is the one of this forward pass.
            current = jax.lax.stop_gradient(scores.logprobs)
            extra['old_logprobs'] = batch.old_logprobs if scores_before(config) else current
        if config.loss.kl_coef:
            frozen = token_scores(graphdef, reference, batch, temperature)
            extra['reference_logprobs'] = frozen.logprobs
        value, metrics = echo_loss(scores.logprobs, batch, config, env_coef, **extra)
        return value, (metrics, scores)

    return loss


def make_cross_entropy(graphdef, temperature: float) -> Callable[..., tuple]:
    """`loss(params, batch) -> (scalar, metrics)`, the environment term alone: `cross_entropy`."""

    def loss(params, batch):
        scores = token_scores(graphdef, params, batch, temperature)
        return cross_entropy(scores.logprobs, batch, scores.entropy)

    return loss


def make_step(
    graphdef,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    keeps_scores: bool = False,
) -> Callable[..., tuple]:
    """`step(state, batch, env_coef, reference=None) -> (state, metrics)`, to be jitted.

    `env_coef` may be a Python number (0 leaves the term out of the computation) or traced.
    `reference` holds the frozen parameters that `loss.kl_coef` pulls towards. `finish_metrics`
    makes numbers of the metrics. If it `keeps_scores`, the step returns a third value: TokenScores
    of float16 [R, T], of the forward pass that it learned from.
    """
    loss = make_loss(graphdef, config)

    def step(state: TrainState, batch: Batch, env_coef, reference=None):
        def gradients(micro):
            grads, (metrics, scores) = jax.grad(loss, has_aux=True)(
                state.params, micro, env_coef, reference
            )
            kept = jax.tree.map(lambda x: x.astype(jnp.float16), scores) if keeps_scores else ()
            return (grads, metrics), kept  # the loss is among the metrics too

        (grads, metrics), scores = _over_micro_batches(gradients, batch, config.batch.micro_rows)
        metrics['grad_norm'] = total(optax.tree.norm(grads))
        state = _updated(state, grads, optimizer)
        return (state, metrics, scores) if keeps_scores else (state, metrics)

    return step


def make_supervised_step(
    graphdef, optimizer: optax.GradientTransformation, config: ml_collections.ConfigDict
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`: an update on a batch of `make_supervised_batch`.

    The loss is cross-entropy at the sampling temperature. The recipe's `loss` is not read: its
    options are those of reinforcement learning.
    """
    loss = make_cross_entropy(graphdef, config.policy.temperature)

    def step(state: TrainState, batch: Batch):
        def gradients(micro):
            return jax.grad(loss, has_aux=True)(state.params, micro)

        grads, metrics = _sum_over_micro_batches(gradients, batch, config.batch.micro_rows)
        return _updated(state, grads, optimizer), metrics

    return step


def _updated(
    state: TrainState, grads: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast(nnx.State, optax.apply_updates(state.params, updates))
    return TrainState(params, opt_state, state.step + 1)


def make_balance(graphdef, config: ml_collections.ConfigDict) -> Callable[..., Metrics]:
    """`balance(params, batch, reference=None)`: the gradients of the two terms beside each other.

    The metrics are the global norms `grad_norm_env`, of the environment term before its
    coefficient, and `grad_norm_policy`, of all the others, and `grad_cosine` between the two, which
    is a mean over nothing if a norm is 0. That costs two passes forward and back over the batch,
    one after the other. Beside the parameters, at most two gradients of whole batches are in
    memory, and that of a micro-batch, which a step has too: one gradient more than in a step.
    """
    loss = make_loss(graphdef, config)
    env_loss = make_cross_entropy(graphdef, config.policy.temperature)

    def balance(params, batch: Batch, reference=None):
        def of_env(micro):
            return jax.grad(env_loss, has_aux=True)(params, micro)[0]

        def of_others(micro):
            return jax.grad(loss, has_aux=True)(params, micro, 0, reference)[0]

        env, policy = (
            _sum_over_micro_batches(gradient, batch, config.batch.micro_rows)
            for gradient in (of_env, of_others)
        )
        norm_env, norm_policy = optax.tree.norm(env), optax.tree.norm(policy)
        # By array, and not of ravelled ones, which would not stay divided over the mesh.
        products = jax.tree.map(lambda x, y: jnp.sum(x * y), env, policy)
        return {
            'grad_norm_policy': total(norm_policy),
            'grad_norm_env': total(norm_env),
            'grad_cosine': Metric(jax.tree.reduce(jnp.add, products), norm_env * norm_policy),
        }

    return balance


def make_score(graphdef, micro_rows: int, temperature: float = 1.0):
    """`score(params, batch) -> float32 [R, T]` log-probabilities, one micro-batch at a time.

    Of several micro-batches, those without a token are not computed, and 0.
    """

    def score(params, batch: Batch):
        def logprobs(micro):
            return (), token_scores(graphdef, params, micro, temperature).logprobs

        return _over_micro_batches(logprobs, batch, micro_rows)[1]

    return score


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """The model of a recipe on a mesh, and the jitted functions that take its parameters."""

    config: ml_collections.ConfigDict
    model: ModelConfig
    graphdef: nnx.GraphDef
    abstract: nnx.State  # shapes, dtypes and logical axes of the parameters
    layout: partition.Layout

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None):
        """A recipe's model on `devices`, by default all. Raises ValueError if they do not fit."""
        model = huggingface.recipe_config(config.model)
        graphdef, abstract = model_params.abstract(model)
        layout = sharding.make_layout(config, sharding.make_mesh(config, devices))
        sharding.check_divides(config, model, layout)
        return cls(config, model, graphdef, abstract, layout)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.layout.mesh

    @property
    def placed(self) -> nnx.State:
        """The parameters' shardings."""
        return sharding.param_shardings(self.abstract, self.layout)

    def random_params(self) -> nnx.State:
        def draw() -> nnx.State:
            return nnx.state(self.model.build(nnx.Rngs(self.config.seed)))

        # Drawn in place: the whole model may not fit the memory of one device.
        return jax.jit(draw, out_shardings=self.placed)()

    def step(
        self,
        optimizer_config: ml_collections.ConfigDict,
        traced_env_coef: bool = False,
        keeps_scores: bool = False,
    ):
        """(jitted step, abstract state with shardings, function from parameters to first state).

        `traced_env_coef`: the step takes env_coef as an array, which a schedule changes, instead of
        a number that is compiled into it. `keeps_scores`: see `make_step`; every host gets all.
        """
        others = (None, None) if traced_env_coef else (None,)  # env_coef, reference
        # As a number, env_coef 0 leaves the environment term out of the computation.
        static = () if traced_env_coef else 2
        make = functools.partial(make_step, keeps_scores=keeps_scores)
        found = (None, sharding.everywhere(self.mesh)) if keeps_scores else (None,)
        return self._stepping(make, optimizer_config, others, static, found)

    def supervised_step(self, optimizer_config: ml_collections.ConfigDict):
        """The same for `make_supervised_step`, whose step takes the state and a batch alone."""
        return self._stepping(make_supervised_step, optimizer_config)

    def _stepping(
        self,
        make: Callable,
        optimizer_config: ml_collections.ConfigDict,
        others: tuple = (),
        static: int | tuple[int, ...] = (),
        found: tuple = (None,),
    ):
        """`others`: the shardings of what the step takes, traced, beside the state and a batch;
        `found`: of what it returns beside the state.
        """
        optimizer = make_optimizer(optimizer_config)
        init = functools.partial(init_state, optimizer=optimizer)
        shapes = jax.eval_shape(init, self.abstract)
        shardings = sharding.state_shardings(shapes, self.placed, self.mesh)
        abstract_state = jax.tree.map(lambda x, at: x.update(sharding=at), shapes, shardings)
        step = jax.jit(
            self._traced(make(self.graphdef, optimizer, self.config)),
            in_shardings=(shardings, sharding.batch_sharding(self.mesh), *others),
            out_shardings=(shardings, *found),
            donate_argnums=0,
            static_argnums=static,
        )
        # Placed at once, because for arrays that lie elsewhere the step would be compiled again.
        return step, abstract_state, lambda params: jax.device_put(init(params), shardings)

    def with_old_logprobs(self) -> Callable[[nnx.State, Batch], Batch]:
        """A function (parameters, batch on the mesh) -> the batch with its `old_logprobs`.

        The parameters are those before the batch's first update. If no old log-probabilities are
        asked for, the batch stays as it is.
        """
        config = self.config
        if not scores_before(config):
            return lambda params, batch: batch
        # With the micro-batches and the temperature of the step, so that in the first update the
        # ratio is 1 but for rounding.
        score = self.score_in_place(config.policy.temperature)
        return lambda params, batch: batch._replace(old_logprobs=score(params, batch))

    def score_in_place(self, temperature: float) -> jax.stages.Wrapped:
        """`make_score`, jitted, for a batch that is on the mesh; the result lies as the batch."""
        place = sharding.batch_sharding(self.mesh)
        return jax.jit(
            self._traced(make_score(self.graphdef, self.config.batch.micro_rows, temperature)),
            in_shardings=(self.placed, place),
            out_shardings=place,
        )

    def balance(self) -> Callable[..., Metrics]:
        """`make_balance`, jitted; the batch is one that lies on the mesh."""
        return jax.jit(
            self._traced(make_balance(self.graphdef, self.config)),
            in_shardings=(self.placed, sharding.batch_sharding(self.mesh), None),
        )

    def score(self, temperature: float = 1.0) -> Callable:
        """`make_score`, jitted. Every host passes the same batch and gets the whole result."""
        score = jax.jit(
            self._traced(make_score(self.graphdef, self.config.batch.micro_rows, temperature)),
            in_shardings=(self.placed, sharding.batch_sharding(self.mesh)),
            out_shardings=sharding.everywhere(self.mesh),
        )
        return lambda params, batch: score(params, sharding.put_batch(batch, self.mesh))

    def serving(self) -> Callable[[nnx.State], nnx.State]:
        """Casts parameters to the dtype that the model computes in, as a sampler has them.

        A copy in any case: it is still read while the next step overwrites the parameters.
        """

        def as_served(params):
            return jax.tree.map(lambda x: jnp.copy(x.astype(self.model.dtype)), params)

        return jax.jit(as_served, out_shardings=self.placed)

    def _traced(self, f: Callable) -> Callable:
        """`f`, to be traced with the layout that the model's sharding constraints refer to."""
        return partition.use(self.layout)(f)
