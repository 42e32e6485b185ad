"""Every jitted step compiles for slices of TPUs, of which none needs to be there: libtpu compiles ahead of time.

`make test-tpu` runs a set in which every step meets every kind of device, every size and both kinds of block;
`make test-tpu GRID=1` runs all combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from spinal_jax.audit.abstract import abstract_arguments, lower_steps
from spinal_jax.audit.device_base import jit_lens_step
from spinal_jax.audit.lens_step import zero_lens_sums
from spinal_jax.comparison import preference_gradient
from spinal_jax.config import MetricsConfig, ParallelConfig
from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.config.training import LoRAConfig, ObjectiveConfig, OptimizerConfig
from spinal_jax.metrics import contraction
from spinal_jax.models.config import Experts
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.fused_attention import attend_splash, kernel_of
from spinal_jax.objectives.responses import Shape
from spinal_jax.parallel.mesh import ROWS, make_mesh
from spinal_jax.parallel.placement import Shards
from spinal_jax.plan.collectives import received_bytes
from spinal_jax.plan.slices import slice_devices
from spinal_jax.train.abstract import AbstractTraining, abstract_training
from spinal_jax.train.abstract import lower_steps as lower_training
from spinal_jax.train.optimizer import optimizer

pytest.importorskip("libtpu", reason="pip install 'spinal-jax[tpu-plan]'")

SIZES = {1: (1, 1, 1), 4: (1, 2, 2), 256: (1, 32, 8)}  # chips: data x fsdp x tensor
KINDS = "v5e", "v5p", "v6e"
STEPS = "audit", "comparison", "preference gradient", "DPO", "DPO with LoRA", "attention"
Case = tuple[str, str, int, bool]  # step, kind of device, chips, mixture of experts


def cases() -> list[Any]:
    """All combinations; those of the smaller set are marked `tpu`, the others `tpu_grid`."""
    found = []
    for number, step in enumerate(STEPS):
        sizes = (1,) if step == "preference gradient" else tuple(SIZES)
        for (place, kind), chips, sparse in itertools.product(enumerate(KINDS), sizes, (False, True)):
            if step == "attention" and sparse:
                continue
            # A Latin square: each kind with another size, and both kinds of block over the steps.
            small = len(sizes) == 1 or (place + number) % 3 == list(SIZES).index(chips)
            small = small and (step == "attention" or sparse == ((place + number) % 2 == 0))
            name = f"{step}, {chips} x {kind}, {'sparse' if sparse else 'dense'}"
            mark = pytest.mark.tpu if small else pytest.mark.tpu_grid
            found.append(pytest.param(step, kind, chips, sparse, marks=mark, id=name))
    return found


@pytest.fixture(autouse=True)
def _for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of training ask JAX which device they are for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@cache
def model_of(make: Callable[..., Decoder], sparse: bool) -> Decoder:
    """Two blocks with windows and heads of 128 features, of a width that 256 devices divide."""
    experts = Experts(count=8, per_token=2, width=512) if sparse else None
    return make(
        vocab_size=16384,
        width=1024,
        depth=2,
        heads=8,
        kv_heads=8,
        windows=(0, 96),
        experts=experts,
    )


@pytest.mark.parametrize(("step", "kind", "chips", "sparse"), cases())
def test_a_step_compiles(step: str, kind: str, chips: int, sparse: bool, make_decoder: Callable[..., Decoder]) -> None:
    devices = slice_devices(kind, chips)
    mesh = make_mesh(ParallelConfig(*SIZES[chips]), devices)
    model = model_of(make_decoder, sparse)
    compiled = {
        "audit": audit,
        "comparison": partial(audit, pair=True),
        "preference gradient": gradient,
        "DPO": train,
        "DPO with LoRA": partial(train, rank=8),
        "attention": attention,
    }[step](model, mesh)
    memory = DEVICES[kind].memory
    assert memory is not None
    for program in compiled:
        found = program.memory_analysis()
        assert 0 < found.argument_size_in_bytes + found.temp_size_in_bytes < memory
    if not step.startswith("DPO"):
        return
    assert "tpu_custom_call" in (compiled[0].as_text() or "")  # the splash kernel


def audit(model: Decoder, mesh: Mesh, pair: bool = False) -> list[Any]:
    settings, config = MetricsConfig(), model.config
    shards = None if mesh.size == 1 else Shards.of(mesh, 0)
    rows = 1 if shards is None else shards.rows
    alone = mesh.devices.flat[0] if shards is None else None
    with jax.enable_x64(True):
        some = abstract_arguments(
            config,
            jnp.dtype(jnp.bfloat16),
            settings,
            (4 * rows, 256, 16 * rows),
            contraction.gram_dtype(),
            shards=shards,
            device=alone,
            slots=4,
        )
        if not pair:
            forward, lens = (step.compile() for step in lower_steps(some, settings, 4, shards, "tpu"))
            assert "tpu_custom_call" in (forward.as_text() or "")
            return [forward, lens]
        sums = jax.eval_shape(lambda: zero_lens_sums(config.depth + 1, settings, 2, True))
        place = SingleDeviceSharding(alone) if shards is None else shards.whole
        return [
            jit_lens_step.lower(
                (some.lens, some.lens),
                jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), sums),
                (some.x, some.x),
                some.batch,
                top_k=None,
                groups=settings.groups,
                lasts=settings.lasts,
                terminal=settings.terminal,
                shards=shards,
                backend="tpu",
            ).compile()
        ]


def training(model: Decoder, mesh: Mesh, rank: int = 0) -> AbstractTraining:
    rows = 8 * mesh.shape["data"] * mesh.shape["fsdp"]
    return abstract_training(
        model.config,
        Shape(rows=rows, length=256, sequences=2 * rows),
        mesh,
        dtype="bfloat16",
        method=optimizer(OptimizerConfig(), 10),
        objective=ObjectiveConfig("dpo"),
        adapters=LoRAConfig(rank=rank, alpha=2.0 * rank or 1.0),
        remat="blocks",
    )


def train(model: Decoder, mesh: Mesh, rank: int = 0) -> list[Any]:
    return [step.compile() for step in lower_training(training(model, mesh, rank))]


def gradient(model: Decoder, mesh: Mesh) -> list[Any]:
    some, layers = training(model, mesh), model.config.layers_of_stacks
    parameters = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
        for name, x in some.state.parameters.items()
    }
    steps: Any = some.steps
    first = steps.first.lower(parameters, {}, some.batch, some.normaliser).compile()
    of_blocks = (preference_gradient._norms, preference_gradient._sketch)
    return [first, *(function.lower(parameters, layers).compile() for function in of_blocks)]


def attention(model: Decoder, mesh: Mesh) -> list[Any]:
    """Forward and backward, with a window, a soft-cap, fewer key heads and a row that no block divides."""
    config = model.config
    assert kernel_of(config, jnp.dtype(jnp.bfloat16), "tpu", mesh).kernel == "splash"
    by = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor"))
    rows = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    q = jax.ShapeDtypeStruct((rows, 200, 16, 128), jnp.bfloat16, sharding=by)
    k = jax.ShapeDtypeStruct((rows, 200, 8, 128), jnp.bfloat16, sharding=by)
    segments = jax.ShapeDtypeStruct((rows, 200), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(ROWS)))

    def loss(q: Any, k: Any, v: Any, segments: Any, window: Any) -> Any:
        out = attend_splash(q, k, v, segments, windows=(0, 96), window=window, scale=0.1, softcap=30.0, mesh=mesh)
        return jnp.sum(out.astype(jnp.float32))

    window = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return [jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, k, segments, window).compile()]


@pytest.mark.tpu
def test_what_devices_receive_is_read_from_programs_for_tpus() -> None:
    """Hand-made programs whose exchange is known."""
    devices = np.array(slice_devices("v5e", 8))
    mesh = Mesh(devices, ("all",), axis_types=(AxisType.Auto,))
    size = 1024 * 1024 * 4

    def received(function: Any, before: PartitionSpec, after: PartitionSpec) -> float:
        x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, before))
        out = NamedSharding(mesh, after)
        return received_bytes(jax.jit(function, out_shardings=out).lower(x).compile().as_text() or "")

    every, whole = PartitionSpec("all"), PartitionSpec()
    assert received(lambda x: 2 * x, every, every) == 0
    assert received(lambda x: 2 * x, every, whole) == 7 / 8 * size
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=every, out_specs=whole)
    assert received(summed, every, whole) == 2 * 7 / 8 * size / 8

    def around(x: Any) -> Any:
        onward = [(device, (device + 1) % 8) for device in range(8)]
        return jax.lax.fori_loop(0, 5, lambda _, x: 2 * jax.lax.ppermute(x, "all", onward), x)

    moved = jax.shard_map(around, mesh=mesh, in_specs=every, out_specs=every)
    assert received(moved, every, every) == 5 * size / 8
    with jax.enable_x64(True):  # loops then count in pairs of 32 bits
        assert received(moved, every, every) == 5 * size / 8

    # The compiler exchanges a matrix in 16 pieces beside the product, two in a turn of its loop.
    wide = Mesh(np.array(slice_devices("v5e", 16)), ("all",), axis_types=(AxisType.Auto,))

    def some(shape: tuple[int, ...], *by: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(wide, PartitionSpec(*by)))

    layers, weights = 5, (some((5, 4096, 14336), None, "all"), some((5, 14336, 4096), None, None, "all"))
    forward = lambda x, up, down: jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, (up, down))[0]  # noqa: E731
    text = jax.jit(forward).lower(some((16, 512, 4096), "all"), *weights).compile().as_text() or ""
    assert 15 / 16 <= received_bytes(text) / (layers * 2 * 4096 * 14336 * 2) <= 18 / 16
