"""Laws of a plan: its arithmetic against models that exist, against XLA's own count, and against what an audit does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from spinal_jax.audit import measure as measuring
from spinal_jax.audit.pipeline import choose_devices
from spinal_jax.config import AuditParallelConfig, MetricsConfig, ModelConfig, ParallelConfig, build, to_mapping
from spinal_jax.config.data_sheets import DEVICES, EIGENVALUES_H200
from spinal_jax.config.plan import PlanConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import TokenSequence, plan_batches
from spinal_jax.errors import UserError
from spinal_jax.metrics import contraction
from spinal_jax.metrics.lens import Lens
from spinal_jax.metrics.transport import Pair, lens_stats
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.fused_attention import kernel_of
from spinal_jax.models.translate import parameter_shapes
from spinal_jax.parallel import mesh, placement
from spinal_jax.parallel.mesh import AXES
from spinal_jax.parallel.placement import Shards
from spinal_jax.plan import compiled as compile_module
from spinal_jax.plan import estimate
from spinal_jax.plan.collectives import received_bytes
from spinal_jax.plan.compiled import Compiled
from spinal_jax.plan.compiled import compiled as compiled_as
from spinal_jax.plan.layout import USABLE, DeviceLayout, layout_of, planned_gram_home, would_fit
from spinal_jax.plan.shapes import decoder_of
from spinal_jax.plan.targets import GPUS, SLICES, why_not_compiled
from spinal_jax.plan.work import sample_prompts

# What the publishers say, in millions: the 671B of DeepSeek-V3 leave out its block that guesses ahead.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030.261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553.706_496,
    "deepseek-ai/DeepSeek-V3": 671_026.419_200,
    "HuggingFaceTB/SmolLM2-135M": 134.515_008,
}


def planned(**settings: Any) -> PlanConfig:
    return build(PlanConfig, {"model": {"source": "random:0.3m"}, "prompt_count": 48, "prompt_tokens": 32} | settings)


def compiled(config: PlanConfig) -> Compiled:
    return compiled_as(config, layout_of(config, decoder_of(config.model)))


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """XLA's count, in which a loop's body counts once."""
    found = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert found is not None
    return found["flops"]


@pytest.mark.parametrize("source", PUBLISHED)
def test_shapes_that_come_with_the_package_have_the_published_number_of_parameters(source: str) -> None:
    shapes = parameter_shapes(decoder_of(ModelConfig(source)))
    assert estimate.parameter_count(shapes) == round(PUBLISHED[source] * 1e6)


def test_parameters_of_a_plan_are_those_of_the_model(make_decoder: Callable[..., Decoder]) -> None:
    model = make_decoder(depth=2)
    leaves = [leaf for leaf in jax.tree.leaves(model) if hasattr(leaf, "nbytes")]
    shapes = parameter_shapes(model.config)
    assert estimate.parameter_count(shapes) == sum(leaf.size for leaf in leaves)
    assert estimate.parameter_bytes(shapes, "float32") == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(64, 4, 2), (256, 8, 8)])
def test_flops_of_the_forward_are_xlas(
    make_decoder: Callable[..., Decoder], length: int, heads: int, kv_heads: int
) -> None:
    model = make_decoder(depth=1, width=256, heads=heads, kv_heads=kv_heads)  # one block: a loop's body counts once
    tokens = jnp.zeros((2, length), jnp.int32)
    counted = flops_of(lambda tokens: model.forward(tokens)[0], tokens)
    ours = estimate.forward_flops(model.config, parameter_shapes(model.config), 2, length)
    # What is not a product of matrices is left out: about a softmax over a row for each head, and ten passes over
    # [T, d], which at d = 256 are below 8 % of the whole.
    assert ours <= counted <= 1.08 * ours


@pytest.mark.parametrize(("dtype", "backend", "share"), [("float32", "cpu", 5 / 8), ("bfloat16", "gpu", 3 / 4)])
def test_flops_of_gram_sums_are_xlas(dtype: str, backend: str, share: float) -> None:
    rows, width = 512, 512  # one product: the body of a loop counts once
    with jax.enable_x64(True):
        sums = contraction.init(2, 1, width, np.dtype(np.float64))
        arguments = jnp.ones((1, rows, width), dtype), jnp.ones((1, rows)), jnp.zeros(1, jnp.int32)
        add = lambda sums, *rows: contraction.update(sums, *rows, jnp.int32(0), backend)  # noqa: E731
        counted = flops_of(add, sums, *arguments)
    computed = contraction.product_size(width, jnp.dtype(dtype), backend)
    assert computed == share * width**2
    ours = 2 * rows * computed
    assert ours <= counted <= 1.05 * ours  # beside it some passes over [T, d] and [d, d], 2 d and 2 T FLOPs a number


def test_flops_of_the_lens_are_xlas() -> None:
    width = 256
    boundaries, positions, vocabulary = 3, 8, 512  # one tile, one chunk
    lens = Lens(jnp.ones((vocabulary, width)), None, None, 1.0)
    pairs = (Pair(0, boundaries - 1, 1),)
    counted = flops_of(lambda x: lens_stats((lens,), (x,), pairs).entropy, jnp.ones((boundaries, positions, width)))
    ours = 2 * boundaries * positions * vocabulary * width
    assert ours <= counted <= 1.08 * ours  # some twenty operations a logit, against 2 d = 512


def test_a_chosen_expert_counts_and_the_others_do_not() -> None:
    decoder = decoder_of(ModelConfig("deepseek-v3"))
    shapes = parameter_shapes(decoder)
    # "37B activated", of which the tables of tokens are 2 x 0.93B; here only the matrices of blocks.
    active = estimate.active_weights(decoder, shapes) / 1e9
    assert active == pytest.approx(37.5 - 2 * decoder.vocab_size * decoder.width / 1e9, abs=0.3)
    assert estimate.active_weights(dataclasses.replace(decoder, experts=None), shapes) > 600e9


def test_the_hosts_share_is_what_an_audit_leaves_it(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = make_decoder(depth=2), MetricsConfig(groups=4)
    sequences = [TokenSequence(np.arange(24, dtype=np.int32) + n, n % 3) for n in range(18)]  # of 4 groups one is empty
    work = plan_batches(sequences, Positions.parse("last:4"), 1, 96)
    taken, values = [], contraction.singular_values
    monkeypatch.setattr(contraction, "singular_values", lambda *a: (taken.append(1), values(*a))[1])
    measuring.measure(model, work, settings)
    host = estimate.spectra(model.config, work, settings, cores=2)
    assert host.matrices == len(taken)
    assert host.device_memory < host.host_memory
    assert host.stage.flops == pytest.approx(len(taken) * 4 / 3 * model.config.width**3)


@given(st.integers(1, 64), st.sampled_from([-1, 1, 2, 3, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 8]))
def test_axes_multiply_to_the_devices_or_are_refused(devices: int, data: int, fsdp: int, tensor: int) -> None:
    config = planned(devices=devices, parallel={"data": data, "fsdp": fsdp, "tensor": tensor})
    decoder = decoder_of(config.model)
    if (data, fsdp, tensor) == (-1, 1, 1):
        assert layout_of(config, decoder).devices == devices
        return
    known = fsdp * tensor * max(data, 1)
    if devices % known == 0 if data == -1 else devices == known:
        found = layout_of(config, decoder)
        assert (found.devices, found.fsdp, found.tensor) == (devices, fsdp, tensor)
    else:
        with pytest.raises(UserError, match=f"does not multiply to devices={devices}"):
            layout_of(config, decoder)


def test_the_layout_is_the_meshs() -> None:
    parallel = {"data": -1, "fsdp": 2, "tensor": 2}
    config = planned(devices=jax.device_count(), parallel=parallel)
    found, made = layout_of(config, decoder_of(config.model)), mesh.make_mesh(ParallelConfig(**parallel))
    assert (found.data, found.fsdp, found.tensor) == made.devices.shape
    for width in (96, 512, 4096):
        assert found.gram_share(width) == Shards(made).gram_share(width // contraction.stripe_count(width))


@given(st.sampled_from(["gpu", "tpu"]), st.sampled_from([2, 4, 8]), st.floats(1, 400))
def test_a_plan_chooses_the_devices_as_an_audit_does(kind: str, count: int, gib: float) -> None:
    name = {"gpu": "h100", "tpu": "v5e"}[kind]
    config, memory = planned(model={"source": "llama-3-8b"}, devices=count, device=name), gib * 2**30
    decoder = decoder_of(config.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEVICES, name, dataclasses.replace(DEVICES[name], memory=memory / USABLE))
        patch.setattr(placement, "device_memory", lambda: memory)
        patch.setattr(jax, "default_backend", lambda: kind)
        patch.setattr(jax, "device_count", lambda: count)
        patch.setattr(placement, "make_mesh", lambda asked: AbstractMesh((asked.data, asked.fsdp, asked.tensor), AXES))
        chosen = choose_devices(AuditParallelConfig(), decoder, config.model.dtype, config.metrics)
        found = layout_of(config, decoder)
    assert found.why == chosen.why
    assert found.kind == ("replicas" if chosen.shards is None else "mesh")
    if chosen.shards is not None:
        assert (found.data, found.fsdp, found.tensor) == tuple(chosen.shards.mesh.shape.values())


def test_the_large_model_that_one_node_holds_is_split_and_fits() -> None:
    config = planned(model={"source": "llama-3-70b", "dtype": "bfloat16"}, devices=8, device="h100")
    decoder = decoder_of(config.model)
    found = layout_of(config, decoder)
    assert (found.kind, found.fsdp, found.tensor) == ("mesh", 1, 8)
    asked = dataclasses.replace(config, parallel=ParallelConfig(8, 1, 1))
    assert would_fit(asked, decoder, layout_of(asked, decoder), 80e9) == "devices=8 parallel.fsdp=1 parallel.tensor=8"
    small = dataclasses.replace(config, devices=1)
    assert would_fit(small, decoder, layout_of(small, decoder), 80e9) == "devices=4 parallel.fsdp=1 parallel.tensor=4"


def test_sums_without_room_on_the_devices_are_kept_by_the_host() -> None:
    config = planned(model={"source": "llama-3-8b", "dtype": "bfloat16"}, device="v5e")
    decoder = decoder_of(config.model)
    layout = layout_of(config, decoder)
    assert planned_gram_home(config, decoder, layout).where == "host"
    assert sample_prompts(config, decoder, layout).slots == 2
    roomy = dataclasses.replace(config, device="h200")
    assert planned_gram_home(roomy, decoder, layout).where == "devices"
    assert sample_prompts(roomy, decoder, layout).slots == 16


def test_times_of_eigenvalues_are_those_measured_and_between_them_a_power_law() -> None:
    h200, h100 = DEVICES["h200"], DEVICES["h100"]
    seconds = [h200.eigenvalues(width) for width in (2048, 4096, 8192)]
    assert seconds == [pytest.approx(measured) for measured in EIGENVALUES_H200.values()]
    between = h200.eigenvalues(2896)
    assert between is not None
    assert EIGENVALUES_H200[2048] < between < EIGENVALUES_H200[4096]
    assert h100.eigenvalues(4096) == pytest.approx(0.109 * h200.bandwidth / h100.bandwidth)
    assert DEVICES["v5e"].eigenvalues(4096) is None
    assert DEVICES["cpu"].eigenvalues(4096) is None
    config = planned(model={"source": "llama-3-8b", "dtype": "bfloat16"}, device="h200", prompt_count=512)
    decoder = decoder_of(config.model)
    layout = layout_of(config, decoder)
    found = estimate.spectra(decoder, sample_prompts(config, decoder, layout), config.metrics, cores=1)
    assert found.matrices == 33 * (1 + 16 + 2 + 1)  # whole, without each group, halves, centred
    assert found.seconds(h200, DEVICES["cpu"], layout) == pytest.approx(found.matrices * 0.109)


def test_the_compiler_for_a_device_is_asked_where_it_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(device: str | None, count: int = 1) -> str:
        return why_not_compiled(device, count) or ""

    there, releases = importlib.util.find_spec, {"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2"}

    def version(name: str) -> str:
        if name not in releases:
            raise importlib.metadata.PackageNotFoundError(name)
        return releases[name]

    monkeypatch.setattr("spinal_jax.plan.targets.find_spec", lambda name: there("json"))
    monkeypatch.setattr("spinal_jax.plan.targets.version", version)
    for device, count in (("v5e", 1), ("v6e", 256), ("v5p", 64), ("a100", 1), ("h100", 8), ("h200", 64)):
        assert why_not_compiled(device, count) is None
    assert "no compiler for v4" in why("v4", 4)
    assert "no compiler for cpu" in why("cpu")
    assert "no compiler for an unnamed device" in why(None)
    assert "and not 6" in why("v5e", 6)
    assert "12 h100 are not whole machines of 8" in why("h100", 12)
    releases["jaxlib"] = "0.11.0"
    assert "jax-cuda12-plugin 0.10.2 is not of jaxlib 0.11.0" in why("h100")
    del releases["jax-cuda12-plugin"]
    assert "spinal-jax[gpu-plan]" in why("h100")
    monkeypatch.setattr("spinal_jax.plan.targets.find_spec", lambda name: None)
    assert "spinal-jax[tpu-plan]" in why("v5e")
    for sides in SLICES.values():
        assert all(math.prod(shape) == chips for chips, shape in sides.items())
    assert {name for name, device in DEVICES.items() if device.kind == "gpu"} == set(GPUS)


def test_work_is_shared_evenly_and_grows_with_the_prompts() -> None:
    decoder, settings = decoder_of(ModelConfig("random:1m")), MetricsConfig()
    shapes = parameter_shapes(decoder)

    def total(count: int, layout: DeviceLayout) -> dict[str, float]:
        work = sample_prompts(planned(prompt_count=count, device="v5e", batch_tokens=4096), decoder, layout)
        found = estimate.audit_stages(decoder, shapes, work, settings, "float32", layout, "tpu")
        return {stage.name: stage.flops * layout.devices for stage in found}

    one = total(512, DeviceLayout("one", 1, 1, 1))
    more = total(1024, DeviceLayout("one", 1, 1, 1))
    assert more == {name: pytest.approx(2 * value) for name, value in one.items()}
    shared = total(512, DeviceLayout("mesh", 2, 2, 1))
    assert shared == {name: pytest.approx(value) for name, value in one.items()}


def test_every_device_states_its_source_and_no_rate_beyond_its_own_lower_precision() -> None:
    for device in DEVICES.values():
        assert device.source.startswith("https://")
        assert device.bfloat16 >= device.float32 >= device.float64 > 0
        assert device.bandwidth > 0


def test_the_compilers_memory_of_one_device_and_of_four() -> None:
    parallel = {"data": 1, "fsdp": 2, "tensor": 2}
    model = {"source": "random:1m"}
    one, four = compiled(planned(model=model)), compiled(planned(model=model, devices=4, parallel=parallel))
    shapes = parameter_shapes(decoder_of(ModelConfig("random:1m")))
    assert one.parameters == estimate.parameter_bytes(shapes, "float32")
    assert one.table == 0
    # All but the norms is split over four, the Gram sums altogether.
    norms = sum(4 * math.prod(s.shape) for path, s in shapes.items() if "norm" in path)
    assert four.parameters == (one.parameters - norms) / 4 + norms
    sums = 8 * 16 * 10 * 96  # [groups, D + 1, d] beside them are whole; float64
    assert four.grams - sums == (one.grams - sums) / 4
    for found in (one, four):
        given_to = found.parameters + found.grams + found.batch + 4  # and one number, the error of the lens
        assert given_to - found.batch < found.forward.arguments <= given_to  # without what of a batch no step reads
        assert found.forward.aliased >= found.grams
        assert found.forward.temporaries > 0
        assert found.peak > given_to


def test_a_plan_for_a_gpu_compiles_where_no_cudnn_is_installed() -> None:
    config = planned(model={"source": "llama-3-8b", "dtype": "bfloat16"}, device="h100")
    decoder = decoder_of(config.model)
    assert "where cuDNN is installed" in kernel_of(decoder, jnp.dtype(jnp.bfloat16), "gpu").why
    found = compiled(config)
    assert found.parameters == estimate.parameter_bytes(parameter_shapes(decoder), "bfloat16")
    assert found.forward.temporaries > 0


def test_shipped_shapes_are_read_strictly_and_name_who_published_them() -> None:
    for file in (Path(estimate.__file__).parent / "shapes").glob("*.json"):
        record = json.loads(file.read_text())
        assert decoder_of(ModelConfig(file.stem)) == decoder_of(ModelConfig(record["source"]))
        for source in record["same"]:
            assert decoder_of(ModelConfig(source)) == decoder_of(ModelConfig(record["source"]))


def test_what_devices_receive_is_read_from_the_compiled_program() -> None:
    one = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
    two = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    size, whole = 32 * 16 * 4, PartitionSpec()

    def received(function: Any, on: Mesh, before: PartitionSpec, after: PartitionSpec | None = None) -> float:
        x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(on, before))
        placed = {} if after is None else {"out_shardings": NamedSharding(on, after)}
        return received_bytes(jax.jit(function, **placed).lower(x).compile().as_text())

    @partial(jax.shard_map, mesh=one, in_specs=PartitionSpec("all"), out_specs=whole)
    def summed_five_times(x: Any) -> Any:
        add = lambda carry, _: (carry + jax.lax.psum(x * carry[0, 0], "all"), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros((4, 16)), None, length=5)[0]

    @partial(jax.shard_map, mesh=one, in_specs=whole, out_specs=PartitionSpec("all"), check_vma=False)
    def scattered(x: Any) -> Any:
        return jax.lax.psum_scatter(x, "all", tiled=True)

    @partial(jax.shard_map, mesh=one, in_specs=PartitionSpec("all"), out_specs=PartitionSpec("all"))
    def exchanged(x: Any) -> Any:
        return jax.lax.all_to_all(x, "all", 1, 1, tiled=True)

    assert received(exchanged, one, PartitionSpec("all")) == 7 / 8 * size / 8
    assert received(summed_five_times, one, PartitionSpec("all")) == 5 * 2 * 7 / 8 * size / 8
    assert received(scattered, one, whole) == 7 / 8 * size
    assert received(lambda x: 2 * x, one, PartitionSpec("all"), whole) == 7 / 8 * size
    assert received(lambda x: 2 * x, two, PartitionSpec("a", "b"), PartitionSpec("a")) == 3 / 4 * size / 2
    assert received(lambda x: 2 * x, one, PartitionSpec("all")) == 0

    @partial(jax.shard_map, mesh=one, in_specs=PartitionSpec("all"), out_specs=whole, check_vma=False)
    def summed_if(x: Any) -> Any:
        return jax.lax.cond(jnp.sum(x) > 0, lambda: jax.lax.psum(x, "all"), lambda: jnp.zeros((4, 16)))

    assert received(summed_if, one, PartitionSpec("all")) == 2 * 7 / 8 * size / 8


TPU_PROGRAM = """
%begins (p: bf16[4,16]) -> (bf16[4,16], bf16[64,16]) {
  %p = bf16[4,16]{1,0} parameter(0)
  %all-gather.1 = bf16[64,16]{1,0} all-gather(%p), replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[4,16], bf16[64,16]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%ends (q: (bf16[4,16], bf16[64,16])) -> bf16[64,16] {
  %q = (bf16[4,16]{1,0}, bf16[64,16]{1,0}) parameter(0)
  %all-gather.2 = bf16[64,16]{1,0} all-gather(%q), replica_groups=[1,16]<=[16], frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[64,16]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (r: (bf16[4,16], u32[])) -> (bf16[4,16], u32[]) {
  %r = (bf16[4,16]{1,0}, u32[]) parameter(0)
  %constant.1 = u32[]{:T(128)} constant(2)
  %get-tuple-element.1 = bf16[4,16]{1,0} get-tuple-element(%r), index=0
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%r), index=1
  %add.1 = u32[]{:T(128)} add(%get-tuple-element.2, %constant.1)
  %add.2 = u32[]{:T(128)} add(%get-tuple-element.2, %constant.3)
  %collective-permute.1 = bf16[4,16]{1,0} collective-permute(%get-tuple-element.1), channel_id=2
  %collective-permute.2 = bf16[4,16]{1,0} collective-permute(%collective-permute.1), channel_id=3
  ROOT %tuple.1 = (bf16[4,16]{1,0}, u32[]{:T(128)}) tuple(%collective-permute.2, /*index=1*/%add.1)
}

%condition (s: (bf16[4,16], u32[])) -> pred[] {
  %s = (bf16[4,16]{1,0}, u32[]) parameter(0)
  %constant.2 = u32[]{:T(128)} constant(7)
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.3, %constant.2), direction=LT
}

ENTRY %main (t: bf16[4,16]) -> bf16[64,16] {
  %t = bf16[4,16]{1,0} parameter(0)
  %tuple.2 = (bf16[4,16]{1,0}, u32[]{:T(128)}) tuple(%t, %constant.4)
  %while.1 = (bf16[4,16]{1,0}, u32[]{:T(128)}) while(%tuple.2), condition=%condition, body=%body
  %fusion.1 = (bf16[4,16]{1,0}, bf16[64,16]{1,0}) fusion(%t), kind=kCustom, calls=%begins
  ROOT %fusion.2 = bf16[64,16]{1,0} fusion(%fusion.1), kind=kCustom, calls=%ends
}
"""


def test_what_programs_for_tpus_exchange_in_steps_is_counted_once() -> None:
    """A gather that starts in one fusion and ends in another, and four turns of a loop whose counter grows by 2."""
    assert received_bytes(TPU_PROGRAM) == 15 / 16 * 64 * 16 * 2 + 4 * 2 * (4 * 16 * 2)


def test_a_program_without_room_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler for TPUs raises where others report the memory. Other errors stay errors."""
    config = json.dumps([to_mapping(planned()), dataclasses.asdict(layout_of(planned(), decoder_of(planned().model)))])

    def said(text: str) -> str:
        def no_room(*_: object) -> NoReturn:
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(compile_module, "_compile", no_room)
        monkeypatch.setattr(sys, "stdin", io.StringIO(config))
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
        compile_module._main()
        return json.loads(out.getvalue())["mistake"]

    needs = "the total memory required for HLO temporaries (70.67G) exceeds available HBM (15.75G)"
    assert said(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {needs}.") == (
        f"the audit does not fit: Ran out of memory on HBM, {needs}; give more devices, a larger parallel.tensor or a "
        "smaller batch_tokens"
    )
    for other in ("INTERNAL: something else", "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=other):
            said(other)
