"""The functions of a training run on abstract shapes: without weights or devices they compile, and their memory is
known."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from spinal_jax.config.training import LoRAConfig, ObjectiveConfig
from spinal_jax.models import lora
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder, Remat
from spinal_jax.models.parts import Parts, cast
from spinal_jax.objectives.responses import ResponseBatch, Shape
from spinal_jax.objectives.step import Arrays, Steps, TrainState, make_steps
from spinal_jax.parallel.mesh import on_all, parameter_shardings, row_sharding


class AbstractTraining(NamedTuple):
    """The functions of a run, and what they take, as `jax.ShapeDtypeStruct`s that know their shardings."""

    steps: Steps
    state: TrainState
    fixed: Arrays  # in the dtype of the model
    batch: ResponseBatch
    normaliser: Any


def abstract_training(
    config: DecoderConfig,
    shape: Shape,
    mesh: Mesh,
    *,
    dtype: str,
    method: optax.GradientTransformation,
    objective: ObjectiveConfig,
    adapters: LoRAConfig,
    remat: Remat,
) -> AbstractTraining:
    """Everything on the devices during an optimiser step.

    Args:
        config: the model's shape.
        shape: of the micro-batches.
        mesh: the devices.
        dtype: of the model's weights, and of forward and backward.
        method: the optimiser.
        objective: what is minimised.
        adapters: that are trained in place of all weights, where their rank is not 0.
        remat: what the backward pass computes again.
    """

    def make() -> Decoder:
        model = Decoder(config, rngs=nnx.Rngs(0))
        if adapters.rank:
            lora.attach(model, adapters.rank, adapters.alpha, adapters.targets)
        return model

    model = nnx.eval_shape(make)
    parts = Parts(model)
    arrays = {name: leaf.get_value() for name, (_, leaf) in parts.leaves.items()}
    trained = parts.paths(nnx.LoRAParam if adapters.rank else nnx.Param)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, parameter_shardings(tree, mesh)
        )

    def some(names: set[str], dtype: Any) -> Arrays:
        return placed(jax.eval_shape(lambda x: cast(x, dtype), {name: arrays[name] for name in sorted(names)}))

    parameters, fixed = some(trained, jnp.float32), some(set(arrays) - trained, jnp.dtype(dtype))
    with jax.numpy_dtype_promotion("standard"):  # as in `make_steps`
        moments = placed(jax.eval_shape(method.init, parameters))
    rows, whole = row_sharding(mesh), on_all(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim > 1 else whole),
        ResponseBatch.empty(shape),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return AbstractTraining(
        steps=make_steps(parts, config, objective, method, dtype=dtype, remat=remat, mesh=mesh),
        state=TrainState(parameters=parameters, moments=moments, step=step),
        fixed=fixed,
        batch=batch,
        normaliser=jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    )


def lower_steps(some: AbstractTraining) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """(`more`, `update`) of a run, to be compiled: a micro-batch whose gradients are added to those of others, and the
    update."""
    steps: Any = some.steps
    arguments = some.state.parameters, some.fixed, some.batch, some.normaliser
    _, sums = jax.eval_shape(steps.first, *arguments)
    whole = some.normaliser.sharding
    sums = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), sums)
    gradients = some.state.parameters  # of the same shapes, and in the same places
    return steps.more.lower(*arguments, gradients, sums), steps.update.lower(some.state, gradients, sums)
