"""What an audit will need, put together: the arithmetic, the compiler's memory, and a device's data sheet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spinal_jax.audit.pipeline import model_name
from spinal_jax.config import ModelConfig
from spinal_jax.config.plan import PlanConfig
from spinal_jax.metrics import contraction
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.translate import parameter_shapes
from spinal_jax.parallel.data_sheets import DEVICES, Device
from spinal_jax.plan import estimate
from spinal_jax.plan.compiled import Compiled, compiled
from spinal_jax.plan.work import pool, split_of, widest

SCHEMA = "spinal-plan/1"
FILE = "plan.json"
USABLE = 0.9  # of a device's memory; the rest is the runtime's, and lost between arrays
# Bytes of Python, the libraries and what they compile, in an audit of next to nothing (benchmarks/plan.py), and of
# PyTorch, which transformers imports with a tokenizer where it is installed.
PROCESS, TORCH = 585 * 2**20, 188 * 2**20
NODE = 8  # GPUs of one machine
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes, by what lies there. On a CPU: of the process, all its devices together."""

    parameters: int
    table: int  # the lens's copy of the unembedding, split otherwise; 0 on one device
    grams: int
    batch: int  # with the residuals at its measured positions, and the sums by group
    temporaries: int  # of the step that needs more of them
    process: int  # 0 but on a CPU
    loading: int  # the most while weights are read
    spectra: int  # the most while the host takes them; 0 but on a CPU, which has them in the same memory

    @property
    def step(self) -> int:
        """While batches are computed."""
        return self.parameters + self.table + self.grams + self.batch + self.temporaries + self.process

    @property
    def peak(self) -> int:
        """At any time."""
        return max(self.step, self.loading, self.spectra)


@dataclass(frozen=True)
class AuditPlan:
    """The plan; `str` of it is a text of tables, `save` writes plan.json."""

    name: str
    decoder: DecoderConfig
    model: ModelConfig
    parameters: int
    device: str | None
    split: estimate.Split
    prompts: int
    tokens: int
    batches: int
    shape: tuple[int, int, int]  # rows, tokens in each, measured positions of the largest batch
    waste: float
    rows: int  # N of contraction
    gram_dtype: str
    stages: tuple[estimate.Stage, ...]  # of one device
    host: estimate.Spectra
    memory: Memory | None  # None: nothing was compiled
    compiled: Compiled | None
    received: float | None  # bytes that each device has from others over the whole audit; None: nothing was compiled
    warnings: tuple[str, ...]

    def fits(self, name: str) -> bool | None:
        """Whether a device of this name has room; None: not known."""
        return None if self.memory is None else self.memory.peak <= USABLE * memory_of(DEVICES[name])

    def seconds(self, name: str) -> float:
        """On devices of this name at best, without the host's share: what they exchange is hidden behind what they
        compute, or the other way round."""
        return max(sum(stage.seconds(DEVICES[name]) for stage in self.stages), self.exchange(name))

    def exchange(self, name: str) -> float:
        """Seconds for what devices of this name receive from each other."""
        link = DEVICES[name].link
        return self.received / link if self.received and link else 0.0

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._memory(), *self._work(), *self._host(), *self._devices(), *self._end()])

    def _head(self) -> Iterator[str]:
        d, s = self.decoder, self.split
        what = "accelerator" if self.device is None else DEVICES[self.device].title
        yield (
            f"{self.name}: {d.family}, {d.depth} blocks of {d.width:,}, vocabulary {d.vocab_size:,}, "
            f"{self.parameters / 1e9:,.2f}B parameters, {self.model.dtype} | {s.devices} x {what}, mesh "
            f"{s.data} x {s.fsdp} x {s.tensor}"
        )
        yield (
            f"{self.prompts:,} prompts, {self.tokens:,} tokens in {self.batches:,} batches of {self.shape[0]} x "
            f"{self.shape[1]}, {self.waste:.0%} padding | N = {self.rows:,} rows, 4 d = {4 * d.width:,}, Gram sums in "
            f"{self.gram_dtype}"
        )

    def _memory(self) -> Iterator[str]:
        yield ""
        if self.memory is None or self.compiled is None:
            yield "memory: not compiled (compile=false)"
            return
        m, c = self.memory, self.compiled
        larger, other = ("forward", "lens") if c.forward.temporaries >= c.lens.temporaries else ("lens", "forward")
        less = min(c.forward.temporaries, c.lens.temporaries)
        yield f"{'memory of the process' if self.device == 'cpu' else 'memory of a device':<42}{'GiB':>9}"
        yield f"  {'parameters':<40}{m.parameters / GIB:9.3f}"
        if m.table:
            yield f"  {'unembedding, split for the lens':<40}{m.table / GIB:9.3f}"
        yield f"  {'Gram sums of all groups':<40}{m.grams / GIB:9.3f}"
        yield f"  {'batch, measured residuals, sums by group':<40}{m.batch / GIB:9.3f}"
        yield (
            f"  {'activations and logits, temporary':<40}{m.temporaries / GIB:9.3f}  ({larger}; {other} has "
            f"{less / GIB:.3f})"
        )
        if self.device == "cpu":
            yield f"  {'Python and libraries':<40}{m.process / GIB:9.3f}"
            yield f"  {'together, while batches are computed':<40}{m.step / GIB:9.3f}"
            yield f"  {'while weights are read':<40}{m.loading / GIB:9.3f}"
            yield f"  {'while spectra are taken':<40}{m.spectra / GIB:9.3f}"
        yield f"  {'at most':<40}{m.peak / GIB:9.3f}{self._verdict()}"

    def _verdict(self) -> str:
        if self.device is None or self.memory is None:
            return ""
        room = memory_of(DEVICES[self.device])
        whose = "this machine has" if self.device == "cpu" else "there are"
        does = "fits" if self.fits(self.device) else "DOES NOT FIT"
        return f"  of {room / GIB:.1f}: {does} ({self.memory.peak / room:.0%} of what {whose})"

    def _work(self) -> Iterator[str]:
        device = None if self.device is None else DEVICES[self.device]
        yield ""
        of = f"{'work of a device':<26}{'TFLOP':>12}{'GB moved':>12}"
        yield of + (f"{'seconds':>12}  bound by" if device else "")
        titles = {"forward": "forward", "gram": "Gram sums", "lens": "lens"}
        for stage in self.stages:
            line = f"  {f'{titles[stage.name]}, {stage.dtype}':<24}{stage.flops / 1e12:12.3f}{stage.bytes / 1e9:12.3f}"
            if device is not None:
                line += f"{stage.seconds(device):12.3f}  {_bound(stage, device)}"
            yield line
        if self.received and device is not None and self.device is not None and device.link:
            yield f"  {'from other devices':<24}{'':12}{self.received / 1e9:12.3f}{self.exchange(self.device):12.3f}"
        elif self.received:
            yield f"  {'from other devices':<24}{'':12}{self.received / 1e9:12.3f}"
        if device is not None and self.device is not None:
            seconds = self.seconds(self.device)
            yield f"  {'together, at best':<48}{seconds:12.3f}  {self.tokens / seconds:,.0f} tokens/s"

    def _host(self) -> Iterator[str]:
        host, cpu = self.host, DEVICES["cpu"]
        yield ""
        yield f"on the host ({cpu.title})"
        yield (
            f"  {host.matrices:,} spectra of {self.decoder.width:,} features, float64: {host.stage.flops / 1e12:,.3f} "
            f"TFLOP, {host.stage.seconds(cpu):,.2f} s, {host.memory / GIB:.2f} GiB of memory"
        )

    def _devices(self) -> Iterator[str]:
        if self.device is not None:
            return
        yield ""
        yield f"on {self.split.devices} of{'':<18}{'GiB':>9}{'seconds':>12}"
        for name, device in DEVICES.items():
            if name == "cpu":
                continue
            fits = {True: "fits", False: "does not fit", None: "not compiled"}[self.fits(name)]
            yield f"  {device.title:<24}{memory_of(device) / GIB:9.1f}{self.seconds(name):12.3f}  {fits}"

    def _end(self) -> Iterator[str]:
        yield ""
        yield from self.warnings
        if self.compiled is not None:
            yield (
                f"compiled in {self.compiled.seconds:.1f} s with {self.compiled.memory / GIB:.2f} GiB; times are lower "
                "bounds from data sheets"
            )

    def about(self) -> dict[str, Any]:
        """What a manifest says of the plan: versions."""
        return {"environment": {name: version(name) for name in ("spinal-jax", "jax", "jaxlib", "flax")}}

    def save(self, folder: Path) -> None:
        """Writes plan.json."""
        text = json.dumps(self.record(), indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """As plan.json holds it."""
        d = self.decoder
        named = [name for name in DEVICES if self.device in (None, name) and (name != "cpu" or self.device == "cpu")]
        return {
            "schema": SCHEMA,
            "model": {
                "name": self.name,
                "family": d.family,
                "parameters": self.parameters,
                "layers": d.depth,
                "width": d.width,
                "vocabulary": d.vocab_size,
                "dtype": self.model.dtype,
            },
            "mesh": asdict(self.split),
            "work": {
                "prompts": self.prompts,
                "tokens": self.tokens,
                "batches": self.batches,
                "batch": dict(zip(("rows", "tokens", "measured"), self.shape, strict=True)),
                "waste": self.waste,
                "rows": self.rows,
                "gram_dtype": self.gram_dtype,
            },
            "memory": None if self.memory is None else {**asdict(self.memory), "peak": self.memory.peak},
            "stages": [asdict(stage) for stage in self.stages],
            "host": asdict(self.host),
            "devices": {
                name: {
                    **asdict(DEVICES[name]),
                    "seconds": {stage.name: stage.seconds(DEVICES[name]) for stage in self.stages},
                    "exchange": self.exchange(name),
                    "fits": self.fits(name),
                }
                for name in named
            },
            "received": self.received,
            "compiled": None if self.compiled is None else asdict(self.compiled),
            "warnings": list(self.warnings),
        }


def _bound(stage: estimate.Stage, device: Device) -> str:
    return "arithmetic" if stage.flops / device.rate(stage.dtype) >= stage.bytes / device.bandwidth else "memory"


def memory_of(device: Device) -> float:
    """Bytes; of a CPU those of this machine."""
    return device.memory or float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def make_plan(config: PlanConfig) -> AuditPlan:
    """Plans an audit. Nothing is read but a config.json. Errors: UserError."""
    from spinal_jax.plan.shapes import decoder_of

    decoder = decoder_of(config.model)
    split = split_of(config)
    work = pool(config, decoder, split.data * split.fsdp)
    shapes, dtype = parameter_shapes(decoder), config.model.dtype
    found = compiled(config) if config.compile else None
    cores = os.cpu_count() or 1
    host = estimate.spectra(decoder, work, config.metrics, cores)
    gram = contraction.gram_dtype()
    packed = widest(work)
    return AuditPlan(
        name=config.model.name or model_name(config.model.source),
        decoder=decoder,
        model=config.model,
        parameters=estimate.parameter_count(shapes),
        device=config.device,
        split=split,
        prompts=config.prompt_count,
        tokens=work.tokens,
        batches=len(work.batches),
        shape=(packed.height, packed.length, packed.measured),
        waste=work.waste,
        rows=work.rows,
        gram_dtype=gram.name,
        stages=estimate.stages(decoder, shapes, work, config.metrics, dtype, split),
        host=host,
        memory=None if found is None else _memory(config, found, host, shapes),
        compiled=found,
        received=None if found is None else len(work.batches) * (found.forward.received + found.lens.received),
        warnings=tuple(_warnings(config, work.rows, decoder, gram.name)),
    )


def _memory(config: PlanConfig, found: Compiled, host: estimate.Spectra, shapes: Any) -> Memory:
    on_cpu = config.device == "cpu"
    count = config.devices if on_cpu else 1  # what one memory holds
    temporaries = max(found.forward.temporaries, found.lens.temporaries)
    stack = max(estimate.parameter_bytes({path: shape}, config.model.dtype) for path, shape in shapes.items())
    process = (PROCESS + (TORCH if find_spec("torch") else 0)) if on_cpu else 0
    parameters = count * found.parameters
    return Memory(
        parameters=parameters,
        table=count * found.table,
        grams=count * found.grams,
        batch=count * (found.peak - found.parameters - found.table - found.grams - temporaries),
        temporaries=count * temporaries,
        process=process,
        loading=parameters + (stack if on_cpu else 0) + process,
        spectra=int(parameters + count * found.grams + host.memory + process) if on_cpu else 0,
    )


def _warnings(config: PlanConfig, rows: int, decoder: DecoderConfig, gram: str) -> Iterator[str]:
    if rows < 4 * decoder.width:
        yield (
            f"N = {rows:,} rows are fewer than 4 d = {4 * decoder.width:,}: contraction reads high, so give "
            "more prompts."
        )
    device = DEVICES.get(config.device or "")
    if gram == "float64" and device is not None and device.float64 is None:
        yield f"Gram sums are float64, which {device.title} emulates in many passes."
    if config.devices > NODE and config.device in ("a100", "h100", "h200"):
        title = DEVICES[config.device].title
        yield f"Only {NODE} {title} share NVLink: what crosses to other machines takes longer."
