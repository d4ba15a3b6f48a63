"""What a member's tar header says, and the checksum in it: one flipped byte costs one sample and not a shard.

Tar protects its headers but not its data, and a flipped bit in a label is often a valid label. The shard's
SHA-256 in the manifest tells that something is wrong, not where. So the writer puts CRC-32 of name and data
into the header's group-name field, where every tar program and webdataset pass over it. The stream checks it
for every member it reads (about 3 GB/s per core, where SHA-256 reaches 1.5 GB/s). Standard library only.
"""

import re
import zlib

KEY = "member_checksums"  # key of the manifest that says the shards carry them
KIND = "crc32"


def name_crc(name):
    """CRC-32 (an int) of a member's name and a zero byte; that of the data continues it."""
    return zlib.crc32((name if isinstance(name, bytes) else name.encode()) + b"\0")


def member_crc(name, data):
    """CRC-32 (an int) of a member: of its name, a zero byte and its data."""
    return zlib.crc32(data, name_crc(name))


def checksum_field(crc):
    """Content of the group-name field for a member with this CRC-32: "crc32=" and 8 hex digits."""
    return f"{KIND}={crc:08x}"


def parse_field(field):
    """The CRC-32 in a group-name field (bytes or str): None where there is none, -1 where it is mangled."""
    field = field.decode("ascii", "replace") if isinstance(field, bytes) else field
    if re.fullmatch(r"crc32=[0-9a-f]{8}", field):
        return int(field[6:], 16)
    return -1 if "crc" in field or "=" in field else None


def split_name(name):
    """A member's name as (key, ending), split at the first dot of its last part, as webdataset does.

    Args:
        name: str or bytes; so are the results. (None, None) where webdataset finds no key: the last part has no dot,
            or begins with one.
    """
    slash, dot = ("/", ".") if isinstance(name, str) else (b"/", b".")
    folder, between, last = name.rpartition(slash)
    stem, found, ending = last.partition(dot)
    return (folder + between + stem, ending) if stem and found else (None, None)


def name_in_header(header):
    """Name in a ustar header, as bytes."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def parse_crc(header):
    """CRC-32 in a ustar header: -1 where there is none, -2 (which no data has) where it is mangled."""
    field = header[297:329].split(b"\0", 1)[0]
    if len(field) == 14 and field[:6] == b"crc32=" and field[6:].isalnum():  # the usual case, in a hurry
        try:
            return int(field[6:], 16)
        except ValueError:
            return -2
    crc = parse_field(field)
    return -1 if crc is None else -2 if crc < 0 else crc
