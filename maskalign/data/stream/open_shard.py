"""One open shard: an index of its members, and reads of single members directly into a batch.

webdataset's reader reads a tar from its start and returns each member as a new bytes object. This stream permutes a few
shards together, and resumes in the middle of them. So it reads members by their offset, from the shard's index
(format/index.py) or from a scan of its headers. No samples of a group are kept in memory, a resumed run reads no sample
twice, and bytes are copied once, from the page cache into the batch (benchmarks/loader.py compares the two). Keys and
grouping are those of webdataset; tests compare every sample with webdataset's. Members are read with `pread` instead of
mmap, because truncating a mapped file would kill the process.
"""

import hashlib
import os
import tarfile
import zlib

import numpy as np

from maskalign.data.format.index import BLOCK, read_index
from maskalign.data.format.members import name_crc, name_in_header, parse_crc, parse_field, split_name
from maskalign.data.stream.decode import MAX_IMAGE_BYTES, MAX_NPY_HEADER, BadSample, array_of_header


class BadShard(BadSample):
    """Raised if no sample of a shard can be used, with the reason."""


class MemberTable:
    """The members with one extension, as int64 arrays with one entry per sample.

    Attributes:
        offset: first byte of the data, -1 if there is no such member.
        size: bytes of the data.
        crc: CRC-32 of name and data, -1 if there is none, -2 if it is damaged.
        seed: CRC-32 of the name.
    """

    def __init__(self, n):
        self.offset, self.size, self.crc, self.seed = (np.full(n, -1, np.int64) for _ in range(4))


class OpenShard:
    """An open shard.

    Args:
        fd: file descriptor of the tar, which this object closes.
        shard: the manifest's entry (name, num_samples, bytes, sha256).
        endings: the extensions of members that may be read ("cls", "png", ...); others are never read.
        checked: whether the members of the data set have checksums (see format/members.py).
        verify: compare checksums.

    Raises:
        BadShard: no sample can be used.
    """

    def __init__(self, fd, shard, endings, checked=False, verify=True):
        self.fd, self.shard, self.verify = fd, shard, verify
        self.keys, self.columns = [], {}
        status = os.fstat(fd)
        self.bytes, self.identity = status.st_size, (status.st_ino, status.st_size, status.st_mtime_ns)
        self.proven = bytearray(shard.num_samples)  # bit mask of the variants whose checksums have been verified
        try:
            members, intact = read_index(fd, self.bytes), True
            if members is None:
                members, intact = self._scan()
            if not intact and (checked or any(crc != -1 for *_, crc in members)):
                # Each member has a checksum, so members after the damage can be used too.
                members = self._salvage()
            if not members and shard.num_samples:
                raise BadShard("has no readable member")
            self._build(members, {ending.encode() for ending in endings}, merge=not intact)
            if verify and not checked and self._unchecked():
                self._compare_sha256()
        except BaseException:
            self.close()
            raise

    def close(self):
        """Close the descriptor."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __len__(self):
        return len(self.keys)

    # -- the index

    def _scan(self):
        """[(name, offset, size, crc)] of all regular files, and whether the tar is complete."""
        headers, offsets, sizes, position, intact = [], [], [], 0, True
        while True:
            header = os.pread(self.fd, BLOCK, position)
            if len(header) < BLOCK or header[:1] == b"\0":
                # Writers end a tar with two zero blocks; without them it is truncated.
                intact = len(header) == BLOCK and not header.strip(b"\0")
                break
            if header[156:157] not in b"0\0":
                return self._scan_by_tarfile()  # long names, PAX records, folders, links
            try:
                size = int(header[124:136].strip(b" \0") or b"0", 8)
            except ValueError:
                intact = False
                break
            headers.append(header)
            offsets.append(position + BLOCK)
            sizes.append(size)
            position += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        valid = checksums_hold(b"".join(headers))
        if not valid.all():
            first = int(np.argmin(valid))
            headers, intact = headers[:first], False
        names = [(name_in_header(header), parse_crc(header)) for header in headers]
        members = [(name, offsets[i], sizes[i], crc) for i, (name, crc) in enumerate(names)]
        return members, intact and position <= self.bytes

    def _scan_by_tarfile(self):
        """The result of `_scan`, computed by the standard library, which supports every dialect of tar."""
        members = []
        try:
            with os.fdopen(os.dup(self.fd), "rb") as file:
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for info in tar:
                        if info.isreg() and not info.issparse():
                            crc = parse_field(info.gname)
                            name = info.name.encode("utf-8", "surrogateescape")
                            crc = {None: -1, -1: -2}.get(crc, crc)
                            members.append((name, info.offset_data, info.size, crc))
                    tail = os.pread(self.fd, BLOCK, tar.offset)
            return members, len(tail) == 0 or not tail.strip(b"\0")
        except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError):
            return members, False

    def _salvage(self):
        """All members with a valid header and a checksum, anywhere in the file."""
        members, step = [], 4 * 2**20
        for start in range(0, self.bytes, step):
            data = os.pread(self.fd, step, start)
            blocks = np.frombuffer(data[: len(data) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
            magic = np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1))
            for number in magic[checksums_hold(blocks[magic].tobytes())].tolist():
                header = blocks[number].tobytes()
                crc = parse_crc(header)
                try:
                    size = int(header[124:136].strip(b" \0") or b"0", 8)
                except ValueError:
                    continue
                if crc >= 0 and header[156:157] in b"0\0":
                    members.append((name_in_header(header), start + (number + 1) * BLOCK, size, crc))
        return members

    def _build(self, members, endings, merge):
        """Group members by key into columns: adjacent members, as webdataset does, or with `merge` all of a key."""
        rows, current, places = {ending: [] for ending in endings}, None, {}
        for name, offset, size, crc in members:
            key, ending = split_name(name)
            if key is None or name.startswith(b"__"):  # webdataset's metadata
                continue
            ending = ending.lower()
            if merge and key in places:
                current = key
            elif key != current:
                places[key], current = len(self.keys), key
                self.keys.append(key)
            if ending in rows:
                rows[ending].append((places[key], offset, size, crc, name_crc(name)))
        for ending, found in rows.items():
            column = self.columns[ending.decode()] = MemberTable(len(self.keys))
            found.reverse()  # of two members with the same name, the first one is used
            place, *values = np.array(found, np.int64).reshape(-1, 5).T
            column.offset[place], column.size[place], column.crc[place], column.seed[place] = values
        starts = [np.where(column.offset < 0, self.bytes, column.offset) for column in self.columns.values()]
        self.starts = np.min(starts, axis=0)
        self.stops = np.max([column.offset + column.size for column in self.columns.values()], axis=0)

    def _unchecked(self):
        """Whether a member has no checksum."""
        return any((column.crc[column.offset >= 0] < 0).any() for column in self.columns.values())

    def _compare_sha256(self):
        """Verify the SHA-256 of the shard: without checksums per member, damaged labels would not be detected."""
        digest, position = hashlib.sha256(), 0
        while data := os.pread(self.fd, 2**20, position):
            digest.update(data)
            position += len(data)
        if digest.hexdigest() != self.shard.sha256:
            raise BadShard("its SHA-256 differs from the manifest, and its samples have no checksums")

    # -- reads

    def has(self, i, ending):
        """Whether sample i has a member with this extension."""
        return self.columns[ending].offset[i] >= 0

    def _find(self, i, ending):
        column = self.columns[ending]
        offset = int(column.offset[i])
        if offset < 0:
            raise BadSample(f"no .{ending}")
        return offset, int(column.size[i]), int(column.crc[i]), int(column.seed[i])

    def read_ahead(self, i):
        """Ask the system to read sample i from the disk while other samples are being read."""
        if i < len(self.keys) and hasattr(os, "posix_fadvise"):  # not on macOS
            start = int(self.starts[i])
            length = max(int(self.stops[i]) - start, 1)
            os.posix_fadvise(self.fd, start, length, os.POSIX_FADV_WILLNEED)

    def _check(self, crc, seed, ending, *parts):
        if not self.verify or crc == -1:
            return
        for part in parts:
            seed = zlib.crc32(part, seed)
        if seed != crc:
            raise BadSample(f"the checksum of .{ending} is wrong: damaged bytes")

    def read(self, i, ending, limit=MAX_IMAGE_BYTES):
        """The bytes of a member of sample i; raises BadSample if there are more than `limit`."""
        offset, size, crc, seed = self._find(i, ending)
        if size > limit:
            raise BadSample(f".{ending} has {size:,} bytes")
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise BadSample(f".{ending} is cut off: the shard ends inside it")
        self._check(crc, seed, ending, data)
        return data

    def read_array(self, i, ending, out, proven=False):
        """Copy the data of a .npy member of sample i into an array.

        Args:
            i: number of the sample.
            ending: extension of the member.
            out: C-contiguous array of the expected shape and dtype.
            proven: do not verify the checksum again.

        Raises:
            BadSample: the member is missing, damaged, or has another shape or dtype.
        """
        offset, size, crc, seed = self._find(i, ending)
        header = bytearray(size - out.nbytes) if 10 < size - out.nbytes <= MAX_NPY_HEADER else None
        if header is None:
            self._explain(i, ending, out)
        view = memoryview(out).cast("B")
        if os.preadv(self.fd, (header, view), offset) != size:
            raise BadSample(f".{ending} is cut off: the shard ends inside it")
        if not proven:
            self._check(crc, seed, ending, header, view)
        try:
            expected = array_of_header(bytes(header)) == (out.dtype.str, out.shape)
        except BadSample:
            expected = False
        if not expected:
            self._explain(i, ending, out)

    def _explain(self, i, ending, out):
        """Raise BadSample with the shape and dtype of an array and those of the manifest."""
        offset, size, _, _ = self._find(i, ending)
        head = os.pread(self.fd, min(size, MAX_NPY_HEADER), offset)
        length = 10 + int.from_bytes(head[8:10], "little")
        dtype, shape = array_of_header(head[:length])
        raise BadSample(f".{ending} is {shape} of {np.dtype(dtype)}, the manifest says {out.shape} of {out.dtype}")


def checksums_hold(headers):
    """Whether tar's header checksum is right for each of the concatenated 512-byte headers: bool array."""
    blocks = np.frombuffer(headers, np.uint8).reshape(-1, BLOCK)
    sums = blocks.sum(axis=1, dtype=np.int64) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    stored = np.full(len(blocks), -1, np.int64)
    for number, block in enumerate(blocks[:, 148:156]):
        try:
            stored[number] = int(block.tobytes().strip(b" \0"), 8)
        except ValueError:
            continue
    return sums == stored
