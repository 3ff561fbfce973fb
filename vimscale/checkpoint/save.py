"""Write checkpoints while training continues: the loop waits for a copy of its tensors, a thread does the rest.

Each rank's thread writes its state file into the hidden folder .step_00002000.TOKEN.partial and leaves the manifest's
entry for it there. Rank 0's thread waits for all entries, adds trainer.json and manifest.json, and renames the folder.
Threads communicate through files only: collectives belong to the loop. A rank that cannot write reports it through
`distributed.Agreement`, and `Saver.wait` then raises the same error on all ranks.
"""

import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from vimscale.checkpoint import retention
from vimscale.checkpoint.load import TrainState
from vimscale.checkpoint.mirror import CheckpointStore, Copier, has, open_mirror
from vimscale.errors import CheckpointError, RunFailed
from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime import distributed, manifest, run_folder
from vimscale.runtime.heartbeat import heartbeat
from vimscale.storage import files

log = logging.getLogger(__name__)

_POLL_S = 0.01
"""How often rank 0 looks for the other ranks' entries."""


class Saver:
    """Saves one checkpoint at a time. All ranks call every method, in the same order."""

    def __init__(
        self,
        folder: Path,
        rules: Checkpoint,
        run: str,
        emit: Callable[[dict[str, Any]], None],
        needed: Callable[[list[str]], set[str]] = lambda names: set(),
    ):
        """`emit` is called on rank 0, from a thread, with an event for each finished checkpoint. `needed`: which of
        some checkpoints must stay, whatever `rules` say.
        """
        self._folder, self._rules, self._emit, self._needed = folder, rules, emit, needed
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._mirror = open_mirror(rules.mirror, run)
        self._copier = Copier(self._mirror, rules) if self._mirror is not None and self._rank == 0 else None
        if self._rank == 0:
            _clear(folder)
        # processes of an earlier group may still be writing, under another token
        self._token = self._gather(uuid.uuid4().hex[:8])[0]
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not write. Tell the other ranks, so that all `wait` together."""
        return self._thread is not None and self._problem is not None

    def save(self, tensors: dict[str, Tensor], train_state: TrainState) -> None:
        """Start a save; returns when `tensors` may change. Waits for an earlier save first.

        Raises:
            RunFailed: as `wait`, for an earlier save.
        """
        self.wait()
        copied = self._copy(tensors)
        self._train_state = train_state
        self._name = run_folder.checkpoint_name(train_state.step)
        self._partial = self._folder / f".{self._name}.{self._token}.partial"
        self._problem: str | None = None
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(copied,), daemon=True, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current save, if any, has become a checkpoint.

        Raises:
            RunFailed: on all ranks, if one of them could not write; earlier checkpoints are untouched.
        """
        if self._thread is None:
            return
        distributed.together(self._written.wait, self._group)
        if not any(self._gather(self._problem)):  # else rank 0 would wait for entries that never come
            distributed.together(self._thread.join, self._group)
        self._abandoned.set()
        self._thread.join()
        self._thread = None
        problem = next(filter(None, self._gather(self._problem)), None)
        if problem is not None:
            self._fail(problem)

    def close(self) -> None:
        """`wait`, and wait for the copies to the mirror too."""
        self.wait()
        distributed.together(self._copier.wait if self._copier is not None else None, self._group)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _copy(self, tensors: dict[str, Tensor]) -> Callable[[], None]:
        """Copy to host buffers, which all saves share; returns a function that waits until the copy is done.

        On a GPU the copy is asynchronous: work that is enqueued later waits for it on the device, the host does not.
        """
        if self._host.keys() != tensors.keys():
            self._host = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()
            }
        if not any(t.is_cuda for t in tensors.values()):
            for name, tensor in tensors.items():
                self._host[name].copy_(tensor.detach())
            return lambda: None
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for name, tensor in tensors.items():
                self._host[name].copy_(tensor.detach(), non_blocking=True)
        current.wait_stream(side)
        return side.synchronize

    # ---- in the thread

    def _run(self, copied: Callable[[], None]) -> None:
        try:
            copied()
            self._write()
            self._written.set()
            if self._rank == 0:
                self._finish()
        except Exception as error:  # otherwise lost with the thread, while the other ranks wait for it
            self._problem = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        finally:
            self._written.set()

    def _write(self) -> None:
        self._partial.mkdir(parents=True, exist_ok=True)
        path = self._partial / self._state_file()
        write_state(path, self._host)
        entry = self._partial / f"entry-{self._rank:05d}.json"
        unfinished = entry.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(manifest.seal(path)))
        unfinished.rename(entry)

    def _state_file(self) -> str:
        return f"state-{self._rank:05d}-of-{self._world:05d}.safetensors"

    def _finish(self) -> None:
        entries = []
        for rank in range(self._world):
            path = self._partial / f"entry-{rank:05d}.json"
            while not path.exists():
                if self._abandoned.is_set():
                    return
                time.sleep(_POLL_S)
            entries.append(json.loads(path.read_text()))
            path.unlink()
        trainer_file = self._partial / "trainer.json"
        trainer_file.write_bytes(self._train_state.to_json())
        manifest.write(self._partial, [*entries, manifest.seal(trainer_file)])
        target = self._folder / self._name
        if target.exists() and self._is_saved(target):
            shutil.rmtree(self._partial)
        else:
            if target.exists():
                retention.remove(target)
            self._partial.rename(target)
            files.sync(self._folder)
        self._emit({"kind": "checkpoint", "step": self._train_state.step, "path": str(target)})
        try:
            self._prune(target)
        except OSError as error:  # the checkpoint itself is written
            log.warning("older checkpoints under %s could not be removed: %s", self._folder, error)

    def _is_saved(self, target: Path) -> bool:
        """Whether `target` is already an intact checkpoint of this very state. Then it stays, and the run is never
        without it.
        """
        if (fault := run_folder.damage(target)) is not None:
            log.warning("checkpoint %s is damaged and set aside: %s", target, fault)
            run_folder.set_aside(target)
            return False
        return (target / "trainer.json").read_bytes() == self._train_state.to_json()

    def _prune(self, target: Path) -> None:
        needed = set()
        if self._copier is not None:
            self._copier.offer(target)
            needed = self._copier.needed()
        names = [path.name for path in run_folder.checkpoints(self._folder)]
        needed |= self._needed(names)
        for name in retention.surplus(names, self._rules):
            if name not in needed:
                retention.remove(self._folder / name)

    # ---- when a checkpoint cannot be written

    def _fail(self, problem: str) -> None:
        """Raises:
        RunFailed: always; says where the checkpoint is, if the mirror has taken it.
        """
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        message = f"checkpoint {self._folder / self._name} could not be written: {problem}"
        if self._mirror is None:
            raise RunFailed(
                f"{message}; earlier checkpoints are untouched. Free space or choose another --runs; with"
                " checkpoint.mirror set, the checkpoint would go to the mirror instead"
            )
        mirror_problem = self._save_to(self._mirror)
        if mirror_problem is not None:
            raise RunFailed(
                f"{message}; earlier checkpoints are untouched; nor could it be written to"
                f" {self._mirror.where(self._name)}: {mirror_problem}"
            )
        raise RunFailed(
            f"{message}; it is at {self._mirror.where(self._name)} instead. Once {self._folder} can be written,"
            " the same command resumes from there"
        )

    def _save_to(self, mirror: CheckpointStore) -> str | None:
        """Write the same checkpoint to the mirror, all ranks together; returns the first problem, or None."""
        entries: list[dict[str, Any]] = []

        def begin() -> bool:
            assert self._copier is not None
            self._copier.wait()
            if has(mirror, self._name, self._train_state.to_json()):
                return True
            mirror.begin(self._name)
            return False

        def write() -> None:
            content = safetensors.torch.save(self._host)
            mirror.put(self._name, self._state_file(), content)
            entries.append(manifest.seal_bytes(self._state_file(), content))

        def finish() -> None:
            text = self._train_state.to_json()
            mirror.put(self._name, "trainer.json", text)
            entries_of_all = [*(entry for part in parts for entry in part), manifest.seal_bytes("trainer.json", text)]
            mirror.finish(self._name, manifest.text(entries_of_all))

        try:
            exists = distributed.together(begin if self._rank == 0 else None, self._group)[0]
            if not exists:
                distributed.together(write, self._group)
                parts = self._gather(entries)
                distributed.together(finish if self._rank == 0 else None, self._group)
        except CheckpointError as error:
            return str(error)
        return None


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write host tensors to a safetensors file straight from their memory; the library would copy each first.

    The format: the header's length in 8 bytes, the header as JSON padded to a multiple of 8 bytes, the tensors' bytes.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            assert tensor.dtype == torch.float32
            file.write(tensor.numpy().data)
            heartbeat.moved += tensor.nbytes


def _clear(folder: Path) -> None:
    """Remove what earlier processes left unfinished."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
