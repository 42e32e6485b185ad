"""Saved state of an audit, so that an interrupted one can be resumed: bit for bit on the same devices, or on others.

Batches depend on the number of devices, so an audit that resumes on other devices starts a new leg: the saved sums are
its initial state, and the remaining prompts are packed again. Processes that share an audit share its folder, and each
writes its part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import jax
from jax import Array
from orbax.checkpoint import v1 as ocp

from spinal_jax.audit.device_base import AllGrams
from spinal_jax.audit.devices import Devices
from spinal_jax.audit.gram_store import FileStore
from spinal_jax.audit.grouped_prompts import batches_sha256
from spinal_jax.audit.lens_step import LensSums
from spinal_jax.data.packing import Plan
from spinal_jax.errors import UserError
from spinal_jax.files import first_difference, load_json_file, malformed, write_whole
from spinal_jax.jsontypes import ReadJson
from spinal_jax.parallel.agreement import StopRequests, check_shared, of_each

# Orbax logs every save, and the traceback of errors that it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)

T = TypeVar("T")
Pack = Callable[[int, int, int | None, Sequence[int] | None], Plan]  # (batch_tokens, rows, slots, among)
SavedState = tuple[AllGrams, Array, LensSums]  # Gram sums, largest lens error, sums of the lens step
FOLDER, SETTINGS, SAVED = (
    "progress",
    "settings.json",
    "saved",
)  # in the run folder, FOLDER, each leg


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of an audit, on one set of devices."""

    devices: str  # as in the start line
    processes: int
    replicas: int | None  # number of jax.pmap replicas
    batch_tokens: int
    rows: int  # devices that split the rows of a batch
    slots: int | None  # of `data.packing.plan_batches`
    batches: int = 0  # completed before the next leg
    inherited: tuple[int, ...] = ()  # groups of the first records in its files of Gram sums
    opened: tuple[tuple[int, int], ...] = ()  # (slot, group) of the last of these, from the devices of the leg before
    packed: str | None = None  # digest of its batches; None until they are packed

    def on(self, other: Leg) -> bool:
        """Whether both legs have the same devices and batches."""
        names = ("devices", "processes", "replicas", "batch_tokens", "rows")
        return all(getattr(self, name) == getattr(other, name) for name in names)


class Saved:
    """The saved state in a run folder.

    Attributes:
        there: whether the folder has an interrupted audit.
    """

    def __init__(self, folder: Path):
        self.run, self.folder = folder, folder.absolute() / FOLDER
        self._settings = self.folder / SETTINGS
        self.there = self._settings.exists()
        said = load_json_file(self._settings) if self.there else {}
        self._about: Any = said.get("about", {})
        with malformed(self._settings):
            self._legs = tuple(_leg(each) for each in said.get("legs", ()))
        self._wanted: tuple[Leg, ...] = ()

    def check(self, about: ReadJson, overwrite: bool = False) -> None:
        """Raises UserError if the interrupted audit does not match `about`; with `overwrite` it is discarded.

        `about` is everything on which the sums depend, except the devices.
        """
        if not self.there or not (differs := first_difference(self._about, json.loads(json.dumps(about)))):
            return
        if not overwrite:
            name, saved, own = differs
            raise UserError(
                f"{self.run} holds an unfinished audit with {name} = {saved!r}, but this one has {own!r}: make them "
                "equal to go on, set overwrite=true, or choose another hydra.run.dir"
            )
        self.there, self._legs = False, ()

    def plan(self, here: Leg, pack: Pack, overwrite: bool = False) -> Plan:
        """The batches of this leg.

        Raises UserError if the saved sums cannot be continued here; with `overwrite` they are discarded.
        """
        try:
            legs, work = self._continued(here, pack)
        except UserError:
            if not overwrite:
                raise
            self.there, self._legs = False, ()
            legs, work = self._continued(here, pack)
        self._wanted = (*legs[:-1], replace(legs[-1], packed=batches_sha256(work)))
        return work

    def _continued(self, here: Leg, pack: Pack) -> tuple[tuple[Leg, ...], Plan]:
        """The legs up to this one, and its batches."""
        legs = self._legs
        step = _latest(self._of(len(legs) - 1)) if legs else None
        if not legs or step is None:
            legs = (here,)
        elif not legs[-1].on(here):
            before, work = replace(legs[-1], batches=step), self._replayed(legs, pack)
            self._require_room(before, here)
            opened = [(run.slot, run.group) for run in work.open_after(step)] if work.leaves else []
            complete = [run.group for number in range(step if work.leaves else 0) for run in work.complete(number)]
            inherited = (*before.inherited, *complete, *(group for _, group in opened))
            here = replace(here, slots=before.slots, inherited=inherited, opened=tuple(opened))
            legs = (*legs[:-1], before, here)
        return legs, self._replayed(legs, pack)

    def _replayed(self, legs: Sequence[Leg], pack: Pack) -> Plan:
        """The batches of the last leg, with the prompts that are not in earlier legs."""
        left: list[int] | None = None
        for leg in legs[:-1]:
            work = self._packed(leg, pack, left)
            done = work.done(leg.batches)
            left = [number for number in (range(len(work.sequences)) if left is None else left) if number not in done]
        return self._packed(legs[-1], pack, left)

    def _packed(self, leg: Leg, pack: Pack, left: Sequence[int] | None) -> Plan:
        work = pack(leg.batch_tokens, leg.rows, leg.slots, left)
        if leg.packed not in (None, batches_sha256(work)):
            raise UserError(
                f"{self.run} holds an unfinished audit of another version of spinal_jax, whose batches differ: set "
                "overwrite=true, or choose another hydra.run.dir"
            )
        return work

    def _require_room(self, before: Leg, here: Leg) -> None:
        if before.replicas != here.replicas:
            how = "without jax.pmap" if before.replicas is None else f"by jax.pmap on {before.replicas} devices"
            raise UserError(
                f"{self.run} holds an unfinished audit that ran {how}, whose sums cannot go on on {here.devices}: use "
                "such devices again, set overwrite=true, or choose another hydra.run.dir"
            )
        if before.slots is None and here.slots is not None:
            raise UserError(
                f"{self.run} holds an unfinished audit whose Gram sums were on its devices, {before.devices}; "
                f"{here.devices} has no room for them: use more devices, set overwrite=true, or choose another "
                "hydra.run.dir"
            )

    def begin(self, about: ReadJson, every: int) -> Progress:
        """Opens the folder for the planned leg. A collective operation of all processes.

        Args:
            about: as in `check`.
            every: number of batches between saves.

        Raises:
            UserError: the processes do not share the folder.
        """
        check_shared(self.run)
        number, moves = len(self._wanted) - 1, len(self._wanted) > len(self._legs) > 0
        if jax.process_index() == 0:
            if not moves and self._wanted != self._legs and self.folder.exists():
                shutil.rmtree(self.folder)
            elif moves and self._of(number).exists():  # left by a process that was killed in `restore`
                shutil.rmtree(self._of(number))
            self._of(number).mkdir(parents=True, exist_ok=True)
            if not self._settings.exists():
                self._write(about)
        of_each(0)  # waits until the folder exists

        def moved() -> None:
            if jax.process_index() == 0:
                self._write(about)
                shutil.rmtree(self._of(number - 1))

        before = self._of(number - 1) if moves else None
        return Progress(self._of(number), every, self._wanted[-1], before, moved)

    def _of(self, number: int) -> Path:
        return self.folder / f"{number}"

    def _write(self, about: ReadJson) -> None:
        said = {"about": about, "legs": [dataclasses.asdict(leg) for leg in self._wanted]}
        write_whole(self._settings, (json.dumps(said, indent=1) + "\n").encode())


def _leg(said: ReadJson) -> Leg:
    made = {"inherited": tuple(said["inherited"]), "opened": tuple(map(tuple, said["opened"]))}
    return Leg(**{"packed": "", **said, **made})


def _latest(leg: Path) -> int | None:
    """Number of batches in the last complete save of a leg, or None. Orbax renames a save when it is complete."""
    return max((int(path.name) for path in (leg / SAVED).glob("*") if path.name.isdigit()), default=None)


class Progress:
    """Saves the sums of an audit between batches: device arrays with Orbax, and scratch files of sums that have
    left the devices. A save that Orbax completes is complete in every process.

    Inside the context, SIGTERM at any process is delayed until all processes have saved after a batch.
    """

    def __init__(self, folder: Path, every: int, leg: Leg, before: Path | None, moved: Callable[[], None]):
        """For `Saved.begin`.

        Args:
            folder: of the leg.
            every: batches between saves.
            leg: what it is.
            before: folder of the leg before, if its sums are continued.
            moved: called after these sums are saved in the new leg.
        """
        self.folder, self.every, self.leg = folder, every, leg
        self._from, self._moved = before, moved
        self._orbax = _checkpointer(folder)
        self._x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        self._pending: Any = None
        self._stops = StopRequests()

    def __enter__(self) -> Progress:
        self._stops.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or jax.process_count() == 1:  # a save without all processes never completes
            self._wait()
            self._orbax.close()
        self._stops.__exit__()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def file(self, number: int) -> IO[bytes]:
        """Opens scratch file `number` of this process."""
        path = self.folder / _sums(number, jax.process_index())
        path.touch()
        return path.open("r+b")

    @property
    def begun(self) -> int:
        """Number of batches of the leg in the last save; 0 without one."""
        return _latest(self.folder) or 0

    def restore(
        self, state: SavedState, stores: Sequence[FileStore], work: Plan, devices: Devices
    ) -> tuple[SavedState, int]:
        """Returns the last saved state, with arrays placed as in `state`, and its number of batches. Without a save,
        returns `state` and 0. The stores continue their files."""
        for store in stores[:1]:
            held = json.dumps(store.boundaries).encode()
            write_whole(self.folder / _held(jax.process_index()), held)
        if self._from is None:
            begun = self.begun
            complete = [run.group for number in range(begun) for run in work.complete(number)]
            for store in stores:
                store.go_on([*self.leg.inherited, *complete])
            return (self._load(self._orbax, state) if _latest(self.folder) is not None else state), begun
        with contextlib.closing(_checkpointer(self._from)) as before:
            grams, lens_error, lens_sums = self._load(before, state)
        for number, store in enumerate(stores):
            with contextlib.ExitStack() as stack:
                held = []
                for path in sorted(self._from.glob(_held("*"))):
                    process = path.stem.rpartition("-")[2]
                    file = stack.enter_context((self._from / _sums(number, process)).open("rb"))
                    held.append((file, json.loads(path.read_bytes())))
                store.inherit(held, self.leg.inherited[: len(self.leg.inherited) - len(self.leg.opened)])
            for slot, group in self.leg.opened:
                store.add(group, partial(devices.of_slot, grams[number], slot), _depth(grams))
        state = (state[0] if stores else grams, lens_error, lens_sums)
        self._save(0, state, [store.file for store in stores])
        self._wait()
        of_each(0)  # waits until all have saved
        self._moved()
        self._from = None
        return state, 0

    def _load(self, orbax: ocp.training.Checkpointer, state: T) -> T:
        leaves, shape = jax.tree.flatten(state)
        like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _named(leaves).items()}
        jax.config.update("jax_enable_x64", True)  # otherwise the threads of Orbax convert float64 to float32
        try:
            step = max(at.step for at in orbax.checkpoints)
            saved = orbax.load_checkpointables(step, {"state": like})["state"]
        finally:
            jax.config.update("jax_enable_x64", self._x64)
        return jax.tree.unflatten(shape, [saved.get(str(number), x) for number, x in enumerate(leaves)])

    def after(self, batches: int, total: int, state: SavedState, files: Sequence[IO[bytes]]) -> None:
        """Called when `batches` of `total` batches are in `state` and in the scratch files. Saves if a save is due or a
        process was asked to stop; in the latter case all processes then raise StoppedElsewhere."""
        stops = self._stops.asked()
        if batches % self.every == 0 or batches == total or stops:
            self._save(batches, state, files)
        if stops:
            self._wait()
            self._stops.check()  # after all have saved

    def _save(self, batches: int, state: SavedState, files: Sequence[IO[bytes]]) -> None:
        self._wait()  # Orbax drops a save while another one runs
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        named = {"state": _named(jax.tree.leaves(state))}
        self._pending = self._orbax.save_checkpointables_async(batches, named, force=True)


def _checkpointer(leg: Path) -> ocp.training.Checkpointer:
    latest: Any = ocp.training.preservation_policies.LatestN(n=2)  # not of the type that Orbax declares
    return ocp.training.Checkpointer(str(leg / SAVED), preservation_policy=latest, cleanup_tmp_directories=True)


def _sums(number: int, process: int | str) -> str:
    return f"sums-{number}-{process}"


def _held(process: int | str) -> str:
    """File with the boundaries of a process."""
    return f"held-{process}.json"


def _depth(grams: AllGrams) -> int:
    return grams[0].first.shape[-2] - 1


def _named(leaves: Sequence[Array]) -> dict[str, Array]:
    """Arrays by number, without empty ones, which Orbax does not save."""
    return {str(number): x for number, x in enumerate(leaves) if x.size}
