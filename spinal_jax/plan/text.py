"""Text tables of a plan."""

from __future__ import annotations

from collections.abc import Iterator

from spinal_jax.audit.gram_store import GIB
from spinal_jax.config.data_sheets import DEVICES, Device
from spinal_jax.plan import estimate
from spinal_jax.plan.record import AuditPlan, memory_of


def plan_text(plan: AuditPlan) -> str:
    """The plan as text."""
    parts = (_head, _memory, _work, _spectra, _devices, _end)
    return "\n".join(line for part in parts for line in part(plan))


def _head(plan: AuditPlan) -> Iterator[str]:
    d, layout = plan.decoder, plan.layout
    what = "accelerator" if plan.device is None else DEVICES[plan.device].title
    yield (
        f"{plan.name}: {d.family}, {d.depth} blocks of {d.width:,}, vocabulary {d.vocab_size:,}, "
        f"{plan.parameters / 1e9:,.2f}B parameters, {plan.model.dtype} | {plan.devices} x {what}, "
        f"{layout} | {plan.sums}"
    )
    yield (
        f"{plan.prompts:,} prompts, {plan.tokens:,} tokens in {plan.batches:,} batches of {plan.shape[0]} x "
        f"{plan.shape[1]}, {plan.waste:.0%} padding | N = {plan.rows:,} rows, 4 d = {4 * d.width:,}, Gram sums in "
        f"{plan.gram_dtype}"
    )


def _memory(plan: AuditPlan) -> Iterator[str]:
    yield ""
    if plan.memory is None or plan.compiled is None:
        yield "memory: not compiled (compile=false)"
        return
    m, c = plan.memory, plan.compiled
    larger, other = ("forward", "lens") if c.forward.temporaries >= c.lens.temporaries else ("lens", "forward")
    less = min(c.forward.temporaries, c.lens.temporaries)
    yield f"{'memory of the process' if plan.device == 'cpu' else 'memory of a device':<42}{'GiB':>9}"
    yield f"  {'parameters':<40}{m.parameters / GIB:9.3f}"
    if m.table:
        yield f"  {'unembedding, split for the lens':<40}{m.table / GIB:9.3f}"
    yield f"  {'Gram sums on the device':<40}{m.grams / GIB:9.3f}"
    yield f"  {'batch, measured residuals, sums by group':<40}{m.batch / GIB:9.3f}"
    yield (
        f"  {'activations and logits, temporary':<40}{m.temporaries / GIB:9.3f}  ({larger}; {other} has "
        f"{less / GIB:.3f})"
    )
    if plan.device == "cpu":
        yield f"  {'Python and libraries':<40}{m.process / GIB:9.3f}"
        yield f"  {'together, while batches are computed':<40}{m.step / GIB:9.3f}"
        yield f"  {'while weights are read':<40}{m.loading / GIB:9.3f}"
        yield f"  {'while spectra are taken':<40}{m.spectra / GIB:9.3f}"
    yield f"  {'at most':<40}{m.peak / GIB:9.3f}{_verdict(plan)}"


def _verdict(plan: AuditPlan) -> str:
    if plan.device is None or plan.memory is None:
        return ""
    room = memory_of(DEVICES[plan.device])
    whose = "this machine has" if plan.device == "cpu" else "there are"
    does = "fits" if plan.fits(plan.device) else "DOES NOT FIT"
    if plan.would_fit is not None:
        does += f", {plan.would_fit} would"
    return f"  of {room / GIB:.1f}: {does} ({plan.memory.peak / room:.0%} of what {whose})"


def _work(plan: AuditPlan) -> Iterator[str]:
    device = None if plan.device is None else DEVICES[plan.device]
    yield ""
    of = f"{'work of a device':<26}{'TFLOP':>12}{'GB moved':>12}"
    yield of + (f"{'seconds':>12}  bound by" if device else "")
    titles = {"forward": "forward", "gram": "Gram sums", "lens": "lens"}
    for stage in plan.stages:
        line = f"  {f'{titles[stage.name]}, {stage.dtype}':<24}{stage.flops / 1e12:12.3f}{stage.bytes / 1e9:12.3f}"
        if device is not None:
            line += f"{stage.seconds(device):12.3f}  {_bound(stage, device)}"
        yield line
    if plan.received and device is not None and plan.device is not None and device.link:
        yield (
            f"  {'from other devices':<24}{'':12}{plan.received / 1e9:12.3f}{plan.exchange(plan.device):12.3f}"
            f"  {plan.received / plan.batches / 1e9:.3f} GB a batch"
        )
    elif plan.received:
        yield f"  {'from other devices':<24}{'':12}{plan.received / 1e9:12.3f}"
    if device is not None and plan.device is not None:
        seconds = plan.seconds(plan.device)
        yield f"  {'together, at best':<48}{seconds:12.3f}  {plan.tokens / seconds:,.0f} tokens/s"


def _spectra(plan: AuditPlan) -> Iterator[str]:
    if plan.device is None:
        return
    device, cpu, spectra = DEVICES[plan.device], DEVICES["cpu"], plan.spectra
    yield ""
    count = f"{spectra.matrices:,} spectra of {plan.decoder.width:,} features, float64"
    if device.eigenvalues(plan.decoder.width) is not None:
        measured = "as measured on an H200" if plan.device == "h200" else "from those of an H200"
        yield f"on the devices: {count}"
        yield (
            f"  {plan.spectra_seconds(plan.device):,.1f} s {measured}, {spectra.device_memory / GIB:.2f} GiB of "
            "memory beside the sums"
        )
        return
    machines = estimate.hosts(device, plan.layout)
    of = "the host" if machines == 1 else f"{machines} hosts"
    yield f"on {of} ({cpu.title}): {count}"
    yield (
        f"  {spectra.stage.flops / 1e12:,.3f} TFLOP, {plan.spectra_seconds(plan.device):,.2f} s, "
        f"{spectra.host_memory / GIB:.2f} GiB of memory"
    )


def _devices(plan: AuditPlan) -> Iterator[str]:
    if plan.device is not None:
        return
    yield ""
    yield f"on {plan.devices} of{'':<18}{'GiB':>9}{'seconds':>12}{'spectra':>12}"
    for name, device in DEVICES.items():
        if name == "cpu":
            continue
        fits = {True: "fits", False: "does not fit", None: "not compiled"}[plan.fits(name)]
        seconds = f"{plan.seconds(name):12.3f}{plan.spectra_seconds(name):12.1f}"
        yield f"  {device.title:<24}{memory_of(device) / GIB:9.1f}{seconds}  {fits}"


def _end(plan: AuditPlan) -> Iterator[str]:
    yield ""
    yield from plan.warnings
    if plan.compiled is not None:
        took = f"{plan.compiled.seconds:.1f} s with {plan.compiled.memory / GIB:.2f} GiB"
        yield f"compiled by {plan.compiled.compiler} in {took}; times are lower bounds from data sheets"


def _bound(stage: estimate.Stage, device: Device) -> str:
    return "arithmetic" if stage.flops / device.rate(stage.dtype) >= stage.bytes / device.bandwidth else "memory"
