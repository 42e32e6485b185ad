"""The plan as a record, and plan.json."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from spinal_jax.config import ModelConfig
from spinal_jax.config.data_sheets import DEVICES, Device
from spinal_jax.jsontypes import Json
from spinal_jax.models.config import DecoderConfig
from spinal_jax.plan import estimate
from spinal_jax.plan.compiled import Compiled
from spinal_jax.plan.layout import USABLE, DeviceLayout

SCHEMA = "spinal-plan/2"
FILE = "plan.json"


@dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes, by content. On a CPU that of the process."""

    parameters: int
    table: int  # the lens's copy of the unembedding, split otherwise; 0 on one device
    grams: int
    batch: int  # with the residuals at its measured positions, and the sums by group
    temporaries: int  # of the step that needs more of them
    process: int  # 0 but on a CPU
    loading: int  # the most while weights are read
    spectra: int  # the most while spectra are taken; on a TPU, whose host takes them, what stays beside them

    @property
    def step(self) -> int:
        """Peak while batches are computed."""
        return self.parameters + self.table + self.grams + self.batch + self.temporaries + self.process

    @property
    def peak(self) -> int:
        """Peak of the audit."""
        return max(self.step, self.loading, self.spectra)


@dataclass(frozen=True)
class AuditPlan:
    """The plan of an audit. `save` writes plan.json; `spinal_jax.plan.text` formats it."""

    name: str
    decoder: DecoderConfig
    model: ModelConfig
    parameters: int
    device: str | None
    devices: int
    layout: DeviceLayout
    sums: str  # storage of the Gram sums, with the reason
    prompts: int
    tokens: int
    batches: int
    shape: tuple[int, int, int]  # rows, tokens in each, measured positions of the largest batch
    waste: float
    rows: int  # N of contraction
    gram_dtype: str
    stages: tuple[estimate.Stage, ...]  # of one device
    spectra: estimate.SpectraCost
    memory: Memory | None  # None: nothing was compiled
    compiled: Compiled | None
    received: float | None  # bytes that each device has from others over the whole audit; None: nothing was compiled
    would_fit: str | None  # settings that would, where the device has no room
    warnings: tuple[str, ...]

    def stages_on(self, name: str) -> tuple[estimate.Stage, ...]:
        """The stages on this device."""
        products = estimate.gram_products(self.model.dtype, DEVICES[name].kind)
        return tuple(replace(stage, dtype=products) if stage.name == "gram" else stage for stage in self.stages)

    def fits(self, name: str) -> bool | None:
        """Whether this device has enough memory; None if unknown."""
        return None if self.memory is None else self.memory.peak <= USABLE * memory_of(DEVICES[name])

    def seconds(self, name: str) -> float:
        """Of all batches on devices of this name at best, without the spectra: what they exchange is hidden behind
        what they compute, or the other way round."""
        return max(sum(stage.seconds(DEVICES[name]) for stage in self.stages_on(name)), self.exchange(name))

    def exchange(self, name: str) -> float:
        """Seconds of communication on these devices."""
        link = DEVICES[name].link
        return self.received / link if self.received and link else 0.0

    def spectra_seconds(self, name: str) -> float:
        """Seconds of all spectra, on these devices or on their hosts."""
        return self.spectra.seconds(DEVICES[name], DEVICES["cpu"], self.layout)

    def about(self) -> Json:
        """Manifest entries of the plan: versions."""
        return {"environment": {name: version(name) for name in ("spinal-jax", "jax", "jaxlib", "flax")}}

    def save(self, folder: Path) -> None:
        """Writes plan.json."""
        text = json.dumps(self.record(), indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    def record(self) -> Json:
        """Content of plan.json."""
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
            "mesh": {**asdict(self.layout), "chosen": str(self.layout)},
            "sums": self.sums,
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
            "spectra": asdict(self.spectra),
            "devices": {
                name: {
                    **asdict(DEVICES[name]),
                    "seconds": {stage.name: stage.seconds(DEVICES[name]) for stage in self.stages_on(name)},
                    "exchange": self.exchange(name),
                    "spectra": self.spectra_seconds(name),
                    "fits": self.fits(name),
                }
                for name in named
            },
            "received": self.received,
            "compiled": None if self.compiled is None else asdict(self.compiled),
            "would_fit": self.would_fit,
            "warnings": list(self.warnings),
        }


def memory_of(device: Device) -> float:
    """Memory of a device in bytes; for a CPU that of this machine."""
    return device.memory or float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
