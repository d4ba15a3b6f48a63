"""Memory for batches: written once, by the process that reads a sample, and passed to torch without a copy.

A batch is one block of memory that holds its columns one after the other. A block is reused after the last tensor
that views it is freed, which avoids the page faults of fresh memory; consumers that keep batches keep their blocks.
"""

import mmap
import os
import tempfile
import weakref
from collections import deque

import numpy as np

ALIGN = 4096


class Layout:
    """Where the columns of a batch of `rows` samples lie in a block.

    Args:
        columns: the `samples.Column`s; a "label" column of int64 is put before them.
        rows: samples of this rank.
    """

    def __init__(self, columns, rows):
        specs = [("label", (), "int64")] + [(column.name, column.shape, column.dtype) for column in columns]
        self.places, end = {}, 0
        for name, shape, dtype in specs:
            shape = (rows, *shape)
            self.places[name] = (end, shape, np.dtype(dtype))
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            end += -(-size // ALIGN) * ALIGN
        self.bytes = max(end, ALIGN)

    def arrays(self, block):
        """dict of name -> array over a block (anything with the buffer protocol)."""
        base = np.frombuffer(block, np.uint8)
        return {
            name: base[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (start, shape, dtype) in self.places.items()
        }, base


class BlockPool:
    """Blocks of memory for one layout.

    Args:
        layout: the `Layout`.
        shared: blocks are files without a name, whose descriptors worker processes can map.
    """

    def __init__(self, layout, shared):
        self.layout, self.shared = layout, shared
        self.blocks, self.descriptors, self.free = [], [], deque()

    def lease(self):
        """(number of the block, its arrays); the block is free again when everything that views it is freed."""
        number = self.free.popleft() if self.free else self._grow()
        arrays, base = self.layout.arrays(self.blocks[number])
        # Every array, and every tensor made of one, keeps `base` alive.
        weakref.finalize(base, self.free.append, number).atexit = False
        return number, arrays

    def _grow(self):
        if self.shared:
            descriptor = _nameless_file(self.layout.bytes)
            block = mmap.mmap(descriptor, self.layout.bytes)
        else:
            descriptor, block = None, mmap.mmap(-1, self.layout.bytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
        self.blocks.append(block)
        self.descriptors.append(descriptor)
        return len(self.blocks) - 1

    def close(self):
        """Close the descriptors; memory that is still viewed stays until it is freed."""
        for descriptor in self.descriptors:
            if descriptor is not None:
                os.close(descriptor)
        self.descriptors.clear()
        self.blocks.clear()
        self.free.clear()


def _nameless_file(size):
    """Descriptor of `size` bytes of shared memory that are freed with their last user, also after kill -9.

    memfd is not bound by the size of /dev/shm, which containers keep at 64 MiB.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("maskalign-batch", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
