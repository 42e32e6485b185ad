"""Every jitted step compiles for slices of TPUs and for GPUs, of which none needs to be there: libtpu and JAX's CUDA
plugin compile ahead of time.

`make test-tpu` and `make test-gpu` run a set in which every step meets every kind of device, every size and both kinds
of block; with `GRID=1` they run all combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from spinal_jax.audit.abstract import abstract_arguments, lower_steps
from spinal_jax.audit.device_base import jit_lens_step
from spinal_jax.audit.device_mesh import _dealt_out
from spinal_jax.audit.device_replicas import _dealt_out_by_replicas
from spinal_jax.audit.forward_step import gram_shardings
from spinal_jax.audit.lens_step import zero_lens_sums
from spinal_jax.audit.spectra import BoundarySums, eigenvalues
from spinal_jax.comparison import preference_gradient
from spinal_jax.config import MetricsConfig, ParallelConfig
from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.config.positions import Positions
from spinal_jax.config.training import LoRAConfig, ObjectiveConfig, OptimizerConfig
from spinal_jax.data.packing import TokenSequence, plan_batches
from spinal_jax.metrics import contraction
from spinal_jax.models.config import Experts
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.fused_attention import attend_cudnn, attend_splash, kernel_of
from spinal_jax.objectives.responses import Shape
from spinal_jax.parallel.mesh import ROWS, make_mesh
from spinal_jax.parallel.placement import Replicas, Shards
from spinal_jax.plan import estimate
from spinal_jax.plan.collectives import received_bytes
from spinal_jax.plan.layout import DeviceLayout
from spinal_jax.plan.targets import target_devices, why_not_compiled
from spinal_jax.train.abstract import AbstractTraining, abstract_training
from spinal_jax.train.abstract import lower_steps as lower_training
from spinal_jax.train.optimizer import optimizer

KINDS = {"tpu": ("v5e", "v5p", "v6e"), "gpu": ("a100", "h100", "h200")}
SIZES = {  # devices: data x fsdp x tensor
    "tpu": {1: (1, 1, 1), 4: (1, 2, 2), 256: (1, 32, 8)},
    "gpu": {1: (1, 1, 1), 4: (1, 2, 2), 16: (2, 2, 4)},
}
STEPS = "audit", "comparison", "preference gradient", "DPO", "DPO with LoRA", "attention", "spectra"
KERNELS = {"tpu": "tpu_custom_call", "gpu": "__cudnn$fmha"}  # of attention, in a program


def cases() -> list[Any]:
    """All combinations; those of the smaller set are marked `tpu` or `gpu`, the others `tpu_grid` or `gpu_grid`."""
    return [case for backend in KINDS for number, step in enumerate(STEPS) for case in cases_of(backend, number, step)]


def cases_of(backend: str, number: int, step: str) -> Iterator[Any]:
    if step == "spectra" and backend == "tpu":  # for which hosts compute them
        return
    sizes = (1,) if step in ("preference gradient", "spectra") else tuple(SIZES[backend])
    for (place, kind), count, sparse in itertools.product(enumerate(KINDS[backend]), sizes, (False, True)):
        if sparse and step in ("attention", "spectra"):
            continue
        # A Latin square: each kind with another size, and both kinds of block over the steps.
        small = len(sizes) == 1 or (place + number) % 3 == list(sizes).index(count)
        small = small and (step in ("attention", "spectra") or sparse == ((place + number) % 2 == 0))
        name = f"{step}, {count} x {kind}, {'sparse' if sparse else 'dense'}"
        mark = getattr(pytest.mark, backend if small else f"{backend}_grid")
        yield pytest.param(step, kind, count, sparse, marks=mark, id=name)


@pytest.fixture(autouse=True, scope="module")
def _compiles_anew() -> Iterator[None]:
    """A program for a GPU that is not there cannot be read from JAX's cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@cache
def model_of(make: Callable[..., Decoder], sparse: bool, depth: int = 2) -> Decoder:
    """Blocks with windows and heads of 128 features, of a width that 256 devices divide."""
    experts = Experts(count=8, per_token=2, width=512) if sparse else None
    return make(
        vocab_size=16384,
        width=1024,
        depth=depth,
        heads=8,
        kv_heads=8,
        windows=(0, 96) * (depth // 2),
        experts=experts,
    )


@pytest.mark.parametrize(("step", "kind", "count", "sparse"), cases())
def test_a_step_compiles(
    step: str,
    kind: str,
    count: int,
    sparse: bool,
    make_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert why_not_compiled(kind, count) is None
    backend = DEVICES[kind].kind
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # by which steps of training choose their attention
    mesh = make_mesh(ParallelConfig(*SIZES[backend][count]), target_devices(kind, count))
    model = model_of(make_decoder, sparse)
    compiled = {
        "audit": audit,
        "comparison": partial(audit, pair=True),
        "preference gradient": gradient,
        "DPO": train,
        "DPO with LoRA": partial(train, rank=8),
        "attention": attention,
        "spectra": spectra,
    }[step](model, mesh, backend)
    memory = DEVICES[kind].memory
    assert memory is not None
    for program in compiled:
        found = program.memory_analysis()
        assert 0 < found.argument_size_in_bytes + found.temp_size_in_bytes < memory
    if step in ("audit", "DPO", "DPO with LoRA", "attention"):
        assert KERNELS[backend] in (compiled[0].as_text() or "")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_gpus_copy_neither_sums_nor_weights(sizes: tuple[int, int, int], make_decoder: Callable[..., Decoder]) -> None:
    """Temporary memory grows neither with the sums nor with the number of blocks."""
    mesh = make_mesh(ParallelConfig(*sizes), target_devices("h100", int(np.prod(sizes))))
    model, deeper = (model_of(make_decoder, False, depth) for depth in (2, 10))
    few, many, deep = (
        audit(one, mesh, "gpu", slots=slots)[0].memory_analysis()
        for one, slots in ((model, 4), (model, 68), (deeper, 4))
    )
    assert many.alias_size_in_bytes > 10 * few.alias_size_in_bytes
    assert many.temp_size_in_bytes < few.temp_size_in_bytes + 0.02 * many.alias_size_in_bytes
    kept = deep.output_size_in_bytes - deep.alias_size_in_bytes  # hidden states of all boundaries, in two copies
    weights = deep.argument_size_in_bytes - deep.alias_size_in_bytes
    assert deep.temp_size_in_bytes < few.temp_size_in_bytes + 2 * kept + 0.02 * weights


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mesh", "replicas"])
def test_sums_reach_their_gpus_in_the_memory_of_a_plan(
    kind: Literal["mesh", "replicas"], make_decoder: Callable[..., Decoder]
) -> None:
    """Each GPU gets the sums of all groups at one boundary."""
    config, groups, devices = model_of(make_decoder, False, 10).config, 16, target_devices("h100", 8)
    boundaries, layout = jax.ShapeDtypeStruct((8,), jnp.int32), DeviceLayout(kind, 1, 2, 4)
    if kind == "replicas":
        layout = DeviceLayout(kind, 8, 1, 1)
    sequences = [TokenSequence(np.zeros(8, np.int32), number % groups) for number in range(2 * groups)]
    work = plan_batches(sequences, Positions.parse("last:4"), 1, 64, groups=groups)
    with jax.enable_x64(True):
        sums = jax.eval_shape(lambda: contraction.init(groups, config.depth + 1, config.width, np.dtype(np.float64)))
        if kind == "mesh":
            shards = Shards.of(make_mesh(ParallelConfig(1, 2, 4), devices), 0)
            deal, places = _dealt_out(shards.each), gram_shardings(config.width, shards)
        else:
            each = Replicas(Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))).each
            sums = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), sums)
            deal, places = _dealt_out_by_replicas(each), jax.tree.map(lambda _: each, sums)
        sums = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), sums, places)
        found = deal.lower(sums, boundaries).compile().memory_analysis()
    planned = estimate.spectra(config, work, MetricsConfig(groups=groups), 1, layout).device_memory
    taken = found.output_size_in_bytes + found.temp_size_in_bytes
    assert taken < 1.02 * planned
    assert kind == "mesh" or taken > 0.98 * planned


def audit(model: Decoder, mesh: Mesh, backend: str, pair: bool = False, slots: int = 4) -> list[Any]:
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
            slots=slots,
        )
        if not pair:
            forward, lens = (step.compile() for step in lower_steps(some, settings, 4, shards, backend))
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
                backend=backend,
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


def train(model: Decoder, mesh: Mesh, backend: str, rank: int = 0) -> list[Any]:
    return [step.compile() for step in lower_training(training(model, mesh, rank))]


def gradient(model: Decoder, mesh: Mesh, backend: str) -> list[Any]:
    some, layers = training(model, mesh), model.config.layers_of_stacks
    parameters = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
        for name, x in some.state.parameters.items()
    }
    steps: Any = some.steps
    first = steps.first.lower(parameters, {}, some.batch, some.normaliser).compile()
    of_blocks = (preference_gradient._norms, preference_gradient._sketch)
    return [first, *(function.lower(parameters, layers).compile() for function in of_blocks)]


def attention(model: Decoder, mesh: Mesh, backend: str) -> list[Any]:
    """Forward and backward, with fewer key heads and a row that no block divides; on a TPU with a window and a
    soft-cap, on a GPU with several sequences in a row or one."""
    assert kernel_of(model.config, jnp.dtype(jnp.bfloat16), backend, mesh).kernel in ("splash", "cudnn")
    by = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor"))
    rows = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    q = jax.ShapeDtypeStruct((rows, 200, 16, 128), jnp.bfloat16, sharding=by)
    k = jax.ShapeDtypeStruct((rows, 200, 8, 128), jnp.bfloat16, sharding=by)
    segments = jax.ShapeDtypeStruct((rows, 200), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(ROWS)))

    def loss(q: Any, k: Any, v: Any, segments: Any, window: Any) -> Any:
        if backend == "tpu":
            out = attend_splash(q, k, v, segments, windows=(0, 96), window=window, scale=0.1, softcap=30.0, mesh=mesh)
        else:
            out = attend_cudnn(q, k, v, segments, scale=0.1, mask=None, mesh=mesh)
        return jnp.sum(out.astype(jnp.float32))

    window = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return [jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, k, segments, window).compile()]


def spectra(model: Decoder, mesh: Mesh, backend: str) -> list[Any]:
    """Float64 eigenvalues on the device."""
    width, place = model.config.width, SingleDeviceSharding(mesh.devices.flat[0])
    with jax.enable_x64(True):
        sums = jax.eval_shape(lambda: contraction.init(4, 1, width, np.dtype(np.float64)))
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype, sharding=place), BoundarySums(*sums)
        )
        scalar = jax.ShapeDtypeStruct((), jnp.float64, sharding=place)
        weights = jax.ShapeDtypeStruct((4,), jnp.float64, sharding=place)
        return [eigenvalues.lower(one, weights, scalar, center=True).compile()]


@pytest.mark.parametrize(
    "kind", [pytest.param("v5e", marks=pytest.mark.tpu), pytest.param("h100", marks=pytest.mark.gpu)]
)
def test_what_devices_receive_is_read_from_their_programs(kind: str) -> None:
    """Hand-made programs whose exchange is known."""
    mesh = Mesh(np.array(target_devices(kind, 8)), ("all",), axis_types=(AxisType.Auto,))
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


@pytest.mark.tpu
def test_what_tpus_receive_beside_a_product() -> None:
    """Their compiler exchanges a matrix in 16 pieces, two in a turn of its loop."""
    wide = Mesh(np.array(target_devices("v5e", 16)), ("all",), axis_types=(AxisType.Auto,))

    def some(shape: tuple[int, ...], *by: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(wide, PartitionSpec(*by)))

    layers, weights = 5, (some((5, 4096, 14336), None, "all"), some((5, 14336, 4096), None, None, "all"))
    forward = lambda x, up, down: jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, (up, down))[0]  # noqa: E731
    text = jax.jit(forward).lower(some((16, 512, 4096), "all"), *weights).compile().as_text() or ""
    assert 15 / 16 <= received_bytes(text) / (layers * 2 * 4096 * 14336 * 2) <= 18 / 16
