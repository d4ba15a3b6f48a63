"""Memory for batches, which the process that reads a sample writes, and which torch uses without a copy.

A batch is one block of memory with its columns one after the other. A block is reused after the last tensor that views
it has been freed, which avoids the page faults of new memory. A block is not reused while a consumer keeps its batch.
"""

import mmap
import os
import tempfile
import weakref
from collections import deque

import numpy as np

ALIGN = 4096


class Layout:
    """The positions of the columns of a batch in a block.

    Args:
        columns: the `samples.Column`s. A "label" column of int64 is added before them.
        rows: number of samples of this rank.

    Attributes:
        places: {name: (first byte, shape, dtype)}.
        bytes: size of a block.
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
        """({name: array}, the uint8 array that they all view) of a block, an object with the buffer protocol."""
        base = np.frombuffer(block, np.uint8)
        return {
            name: base[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (start, shape, dtype) in self.places.items()
        }, base


class BlockPool:
    """Blocks of memory for one layout.

    Args:
        layout: the `Layout`.
        shared: make blocks from unnamed files, whose descriptors worker processes can map.
    """

    def __init__(self, layout, shared):
        self.layout, self.shared = layout, shared
        self.blocks, self.descriptors, self.free = [], [], deque()

    def lease(self):
        """(number of a free block, its arrays). The block is free again when all objects that view it are freed."""
        number = self.free.popleft() if self.free else self._grow()
        arrays, base = self.layout.arrays(self.blocks[number])
        # Every array, and every tensor made from one, holds a reference to `base`.
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
        """Close the descriptors. Memory with remaining views is freed with the last of them."""
        for descriptor in self.descriptors:
            if descriptor is not None:
                os.close(descriptor)
        self.descriptors.clear()
        self.blocks.clear()
        self.free.clear()


def _nameless_file(size):
    """File descriptor of `size` bytes of shared memory, which are freed with the last process that uses them.

    memfd is not limited by the size of /dev/shm, which is only 64 MiB in many containers.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("maskalign-batch", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
