"""Save checkpoints: tensors are copied to host memory, written in the background, and committed with a rename.

All ranks write their shards into a hidden folder. When all are done, rank 0 writes the marker with the checksums and
renames the folder. The ranks use a separate process group for this, so that saving does not interfere with training.
"""

import json
import os
import shutil
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from maskalign.checkpoints.layout import (
    ASIDE,
    FOLDER,
    MARKER,
    PARTIAL,
    complete_checkpoints,
    file_digest,
    is_complete,
)
from maskalign.checkpoints.loading import ignoring_warnings
from maskalign.checkpoints.shard_files import ShardWriter
from maskalign.errors import RunError
from maskalign.runtime.files import sync_folder, write_atomically

PATIENCE = timedelta(hours=2)  # time limit for the slowest disk of all ranks; the loss of a rank is noticed at once


class Saver:
    """Writes the checkpoints of a run. All ranks must create this object at the same time.

    Args:
        run_dir: the run's folder, on a file system that all ranks share.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints at multiples of this number of steps are never removed; 0 for none.
        background: copy the tensors and write them in a thread; otherwise `save` returns when everything is on disk.
    """

    def __init__(self, run_dir, keep=3, keep_every=0, background=True):
        self.run_dir, self.root = Path(run_dir), Path(run_dir, FOLDER)
        self.keep, self.keep_every, self.background = keep, keep_every, background
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self.buffers = {}
        self.thread = None
        self.error = None
        self.saved = None  # the last step that this process was asked to save

    def save(self, step, tensors, state, config_yaml, merge=None):
        """Save one checkpoint, in the background unless `background` is False. The previous save is completed first.

        Args:
            step: number of optimizer steps done.
            tensors: flat dict from name to tensor. Plain tensors are the same on every rank; DTensors are shards.
            state: state of this rank, a dict that can be written as JSON.
            config_yaml: the run's settings as text.
            merge: function from the list of all ranks' states to the state to write; by default that of rank 0.

        Raises:
            RunError: this save or the previous one could not be written; earlier checkpoints are unchanged.
        """
        self.wait()
        if step == self.saved:
            return
        self.saved = step
        owned = self._owned(tensors)
        own = {name: tensor for name, tensor in tensors.items() if name in owned}
        if not self.background:
            self._write(step, own, state, config_yaml, merge)
            self.raise_error()
            return
        staged = self._stage(own)
        # The thread is not a daemon, so that a process that exits normally finishes its checkpoint first.
        self.thread = threading.Thread(
            target=self._write, args=(step, staged, state, config_yaml, merge), name="checkpoint"
        )
        self.thread.start()

    def wait(self):
        """Wait until the current save is complete.

        Raises:
            RunError: the checkpoint could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.raise_error()

    def settle(self):
        """Wait until the current save has ended. An error is kept, and `wait` raises it."""
        if self.thread is not None:
            self.thread.join()

    def raise_error(self):
        error, self.error = self.error, None
        if error is not None:
            raise error

    def clear(self, step):
        """Prepare the folder of checkpoints for a run that resumes from `step`; rank 0 calls this before the first
        save.

        The files of interrupted saves are removed. Checkpoints of later steps are damaged, or belong to an attempt that
        this run does not continue. They are renamed, so that neither a later resume nor `keep` counts them.

        Returns:
            list of the new names.
        """
        for path in self.root.glob(f"{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)
        moved = []
        for path in sorted(self.root.glob("step_*")):
            number = path.name.removeprefix("step_")
            if number.isdigit() and int(number) > step:
                target = path.with_name(ASIDE + path.name)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(path, target)
                moved.append(target.name)
        return moved

    def _owned(self, tensors):
        """The names of the tensors that this rank writes.

        A tensor with copies on several ranks is written by one of them, chosen so that all write about the same number
        of bytes.
        """
        owned, load = set(), {}
        for name in sorted(tensors, key=lambda name: (-_local(tensors[name]).nbytes, name)):
            copies, own = _copies(tensors[name], self.rank, self.world_size)
            table = load.setdefault(copies, [0] * copies)
            chosen = table.index(min(table))
            table[chosen] += _local(tensors[name]).nbytes + 1
            if chosen == own:
                owned.add(name)
        return owned

    @torch.no_grad()
    def _stage(self, tensors):
        """Copy the tensors to host memory, into buffers that later saves reuse; DTensors stay DTensors."""
        staged = {}
        for name, tensor in tensors.items():
            local = _local(tensor)
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda)
                self.buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            # The constructor is called directly, because from_local would move the copy to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        if any(_local(tensor).is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return staged

    def _write(self, step, tensors, state, config_yaml, merge):
        final = self.root / f"step_{step:08d}"
        partial = self.root / f"{PARTIAL}{final.name}"
        try:
            self._all(lambda: self._open(partial))
            writer = ShardWriter(partial)
            with ignoring_warnings():
                dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            parts = self._gather((state, writer.digests))
            self._all(lambda: self._commit(partial, final, parts, config_yaml, merge))
        # Errors of the disk, of torch and of a lost rank are all reported in one line. CheckpointException is named
        # because it is a BaseException, but not an Exception.
        except (Exception, CheckpointException) as error:
            before = complete_checkpoints(self.run_dir)
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self.error = RunError(
                f"the checkpoint {final} cannot be written ({_reason(error)}); free space, or choose another run_dir; "
                + (f"{before[-1].name} is the newest complete one" if before else "there is no complete one yet")
            )

    def _open(self, partial):
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _commit(self, partial, final, parts, config_yaml, merge):
        if self.rank != 0:
            return
        files = {name: entry for _, digests in parts for name, entry in digests.items()}
        states = [state for state, _ in parts]
        texts = {"state.json": json.dumps(merge(states) if merge else states[0]), "config.yaml": config_yaml}
        for name, text in texts.items():
            write_atomically(partial / name, text.encode())
            files[name] = file_digest(partial / name)
        for name, entry in files.items():
            if (partial / name).stat().st_size != entry["size"]:
                raise OSError(f"{name} is not on the disk as it was written; do all ranks share this folder?")
        write_atomically(partial / MARKER, json.dumps(files, indent=1).encode())
        old = self.root / f"{PARTIAL}old_{final.name}"
        if final.exists():  # from before a resume at an earlier step
            os.rename(final, old)
        os.rename(partial, final)
        sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)
        for path in superfluous(complete_checkpoints(self.run_dir), self.keep, self.keep_every):
            # The marker is removed first, so that a crash during removal does not leave a folder that looks complete.
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)

    def _all(self, work):
        """Call `work` on every rank; an error on one rank is raised on all."""
        error = None
        try:
            work()
        except Exception as failure:
            error = failure
        if self.group is None:
            if error is not None:
                raise error
            return
        failures = [text for text in self._gather(None if error is None else _reason(error)) if text is not None]
        if failures:
            raise OSError(failures[0])

    def _gather(self, value):
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def save(run_dir, step, tensors, state, config_yaml, keep=3):
    """Write one checkpoint from one process, and remove the oldest ones beyond `keep`; returns its path.

    Returns when the checkpoint is on disk. For the arguments see `Saver.save`.

    Raises:
        RunError: the folder cannot be written to; earlier checkpoints are unchanged.
    """
    final = Path(run_dir, FOLDER, f"step_{step:08d}")
    if not is_complete(final):
        Saver(run_dir, keep=keep, background=False).save(step, tensors, state, config_yaml)
    return final


def superfluous(checkpoints, keep, keep_every=0):
    """The checkpoints to remove: neither among the newest `keep` nor at a multiple of `keep_every` steps.

    Args:
        checkpoints: list of step_* paths, oldest first.
    """
    return [path for path in checkpoints[:-keep] if not keep_every or int(path.name.removeprefix("step_")) % keep_every]


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor, rank, world_size):
    """(number of ranks that hold the same data, index of this rank among them)."""
    if not isinstance(tensor, DTensor):
        return world_size, rank
    copies, own = 1, 0
    for size, coordinate, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
    ):
        if placement.is_replicate():
            copies, own = copies * size, own * size + coordinate
    return copies, own


def _reason(error):
    """The first line of an error's message. CheckpointException holds one error per rank; the first is used."""
    if isinstance(error, CheckpointException):
        rank, wrapped = next(iter(sorted(error.failures.items())))
        several = "" if len(error.failures) == 1 and rank == 0 else f"rank {rank}: "
        return several + _reason(wrapped[0])
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
