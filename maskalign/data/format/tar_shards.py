"""Tar shards: written atomically, with the same bytes for the same samples, and read without trusting their content."""

import hashlib
import io
import os
import tarfile

from maskalign.data.format.index import BLOCK, NAME, pack_index
from maskalign.data.format.manifest import Shard
from maskalign.data.format.members import checksum_field, member_crc, split_name
from maskalign.runtime.files import sync_file, sync_folder

MAX_MEMBER_BYTES = 2**30


def shard_name(number):
    """The file name of shard `number`. Names sort in the order of the numbers."""
    return f"shard-{number:06d}.tar"


class _HashingFile:
    """A writable file that counts and hashes the bytes written to another file."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data):
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class HashingReader:
    """A readable file that counts and hashes the bytes read from another file."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def read(self, size=-1):
        data = self.file.read(size)
        self.sha256.update(data)
        self.bytes += len(data)
        return data


def write_shard(path, samples, scratch=None):
    """Write one shard under a temporary name, sync it to disk, and rename it.

    Headers contain no times, users or machine details, so equal samples give equal bytes. The last member is an index
    of all others (see format/index.py).

    Args:
        path: path of the shard.
        samples: iterable of (key, members), where members is a dict from extension ("cls", "moments.npy") to bytes.
        scratch: folder on the same file system for the temporary file; the default is the shard's folder.

    Returns:
        The `Shard` for the manifest.
    """
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(scratch or folder, f"{name}.{os.uname().nodename}.{os.getpid()}.tmp")
    count, written = 0, []
    try:
        with open(temporary, "wb") as raw:
            file = _HashingFile(raw)
            with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for key, members in samples:
                    for ending, data in members.items():
                        written.append(add_member(tar, f"{key}.{ending}", data))
                    count += 1
                add_member(tar, NAME, pack_index(written, tar.offset + BLOCK))
            sync_file(raw)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_folder(folder)
    return Shard(name, count, file.bytes, file.sha256.hexdigest())


def add_member(tar, name, data):
    """Append bytes to an open tarfile as a regular file of mode 0644, owned by user 0 and dated 1970.

    Returns:
        (name, offset of the data in the tar, size, CRC-32 of name and data).
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    crc = member_crc(name, data)
    info.gname = checksum_field(crc)  # see format/members.py
    place = tar.offset + BLOCK
    tar.addfile(info, io.BytesIO(data))
    return name, place, len(data), crc


def read_shard(file, max_member_bytes=MAX_MEMBER_BYTES):
    """Yield (key, {extension: bytes}) for each sample of an open tar, in one forward pass, without writing to disk.

    Directories, links, devices and the index are skipped. A tar that is truncated between two members, or has a damaged
    header in the middle, ends there without an error: compare the number of samples with the manifest.

    Raises:
        ValueError: a member is larger than `max_member_bytes`.
        tarfile.TarError: the tar is damaged.
    """
    with tarfile.open(fileobj=file, mode="r|") as tar:
        current, members = None, {}
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep every header
            if not info.isreg() or info.name == NAME:
                continue
            if info.size > max_member_bytes:
                raise ValueError(f"member {info.name!r} has {info.size:,} bytes")
            key, ending = split_name(info.name)
            key, ending = (info.name, "") if key is None else (key, ending)
            if key != current:
                if members:
                    yield current, members
                current, members = key, {}
            members[ending] = tar.extractfile(info).read()
        if members:
            yield current, members
