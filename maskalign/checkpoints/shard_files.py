"""Write tensors of torch.distributed.checkpoint (DCP) to safetensors files directly from memory, with checksums."""

import hashlib
import json
import struct
from pathlib import Path

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from maskalign.checkpoints.layout import PIECE
from maskalign.runtime.files import sync_file

# The header that torch's HuggingFaceStorageReader looks for; the tests read our files with it.
CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"
HEADER = {"DCP_VERSION": "1.0", "format": "pt"}
# safetensors' names of dtypes.
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class ShardWriter(HuggingFaceStorageWriter):
    """DCP's safetensors storage with one file per rank, without the second copy of the tensors in DCP's own writer.

    DCP's writer joins a rank's tensors into one `bytes` object while it holds the interpreter lock, which blocks the
    training. This writer streams the tensors. It computes the checksums from memory, so that they detect errors of the
    disk.

    Args:
        path: folder to write into.

    Attributes:
        digests: after a save, {name: {"size": bytes, "sha256": hex}} for the files of this rank.
    """

    def __init__(self, path):
        super().__init__(str(path), save_distributed=True)
        self.digests = {}

    def write_data(self, plan, planner):
        results = []
        if plan.items:
            name = f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            tensors = {item.index.fqn: planner.resolve_data(item).detach().contiguous() for item in plan.items}
            offsets = {item.index.fqn: list(item.tensor_data.chunk.offsets) for item in plan.items}
            path = Path(self.path, name)
            self.digests[name] = write_file(path, tensors, offsets)
            results = [
                WriteResult(index=item.index, size_in_bytes=tensors[item.index.fqn].nbytes, storage_data=None)
                for item in plan.items
            ]
        done = Future()
        done.set_result(results)
        return done


def write_file(path, tensors, offsets):
    """Write and sync one safetensors file that DCP's HuggingFaceStorageReader can read.

    Args:
        path: the file.
        tensors: dict from name to contiguous CPU tensor with any number of dimensions.
        offsets: dict from name to the index of its first element in the whole tensor, a list of integers.

    Returns:
        dict with the file's size in bytes and its sha256 as hexadecimal digits.
    """
    # safetensors needs tensors that are aligned to their own element size, so those with the widest elements come
    # first.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    sharding = json.dumps({name: {SAVED_OFFSETS_KEY: offsets[name]} for name in names})
    header = {"__metadata__": {CUSTOM_METADATA_KEY: sharding, **HEADER}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for block in [struct.pack("<Q", len(text)) + text, *(_bytes(tensors[name]) for name in names)]:
            block = memoryview(block)
            for first in range(0, len(block), PIECE):
                piece = block[first : first + PIECE]
                digest.update(piece)
                size += len(piece)
                while piece:
                    piece = piece[file.write(piece) :]
        sync_file(file)
    return {"size": size, "sha256": digest.hexdigest()}


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy()
