"""The index at the end of a shard, with which a shard is opened by at most three small reads instead of one per member.

A tar has no index, only a header before each member. Finding the members of a shard of 2,048 samples takes thousands of
scattered reads: seconds on a cold disk, minutes on a network file system, for every shard of every stream before the
first step. The writer therefore ends each shard with a member `__index__`. webdataset skips names of this form as
metadata, and tar programs list it like any other file. A shard without an index is read header by header.

The member contains the names of all members before it (each followed by a zero byte), a row of type ROW for each,
zeros, and FOOTER at the end of its last block, where a reader finds it before the zeros that end a tar. The index is
used only if its CRC-32 is right, it is at the offset that it states, and the last member's header has the name, size
and checksum in the index. Another program that rewrote the shard may have copied an index that is no longer valid.
"""

import os
import struct
import zlib

import numpy as np

from maskalign.data.format.members import name_in_header, parse_crc

BLOCK = 512
NAME = "__index__"
ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc", "<u4")])
FOOTER = struct.Struct("<8sQIII")  # MAGIC, offset of the member's data, bytes of names, rows, CRC-32 of what precedes
MAGIC = b"mask-ix1"
TAIL = 64 * 1024  # bytes of the first read: the whole index of a small shard, and the footer of any


def pack_index(members, offset):
    """The content of the index member.

    Args:
        members: [(name, offset of the data, size, CRC-32 as in the header)] of all members before it.
        offset: the offset in the tar at which this content will start.

    Returns:
        bytes, a multiple of 512.
    """
    names = b"".join(name.encode() + b"\0" for name, *_ in members)
    rows = np.array([tuple(place) for _, *place in members], ROW)
    content = names + rows.tobytes()
    content += bytes(-(len(content) + FOOTER.size) % BLOCK)
    content += FOOTER.pack(MAGIC, offset, len(names), len(rows), 0)[:-4]
    return content + zlib.crc32(content).to_bytes(4, "little")


def read_index(fd, size):
    """Read the index of a shard.

    Args:
        fd: file descriptor of the tar.
        size: bytes of the file.

    Returns:
        [(name as bytes, offset, size, crc)] of the shard's members, or None if it has no valid index.
    """
    start = max(size - TAIL, 0) // BLOCK * BLOCK
    tail = os.pread(fd, size - start, start)
    end = -(-len(tail.rstrip(b"\0")) // BLOCK) * BLOCK
    if end < FOOTER.size or end > len(tail):
        return None
    magic, offset, name_bytes, count, crc = FOOTER.unpack_from(tail, end - FOOTER.size)
    length = name_bytes + count * ROW.itemsize + FOOTER.size
    length += -length % BLOCK
    if magic != MAGIC or offset != start + end - length:
        return None
    content = tail[end - length : end] if length <= end else os.pread(fd, length, offset)
    if len(content) != length or zlib.crc32(content[:-4]) != crc:
        return None
    names = content[:name_bytes].split(b"\0")[:-1]
    rows = np.frombuffer(content, ROW, count, name_bytes)
    inside = (rows["offset"] >= BLOCK) & (rows["size"] >= 0) & (rows["offset"] <= offset - rows["size"])
    if len(names) != count or not inside.all():
        return None
    members = list(zip(names, *(rows[field].tolist() for field in ROW.names), strict=True))
    return members if not members or _is_there(fd, *members[-1]) else None


def _is_there(fd, name, offset, size, crc):
    """Whether the header before a member has the name, size and checksum in the index."""
    header = os.pread(fd, BLOCK, offset - BLOCK)
    return name_in_header(header) == name and header[124:135] == b"%011o" % size and parse_crc(header) == crc
