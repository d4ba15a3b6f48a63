"""Webdataset shards at URLs as a source: they are copied to this machine once, and then read like local ones."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

from maskalign.data.build.webdataset_source import expand_braces, open_tars
from maskalign.data.stream.open_shard import BadShard
from maskalign.data.stream.opening import Opener
from maskalign.errors import RunError, UsageError
from maskalign.runtime.files import sync_folder

AT_ONCE = 4


def open_urls(source, scratch, **settings):
    """List the shards that a URL names.

    Args:
        source: URL of a .tar, or a pattern of several ("https://host/a-{000..009}.tar").
        scratch: folder for the copies. Shards that exist there are not copied again.
        settings: as for `open_tars`.

    Raises:
        UsageError: a URL is not that of a .tar.
        RunError: a shard cannot be copied, after several attempts.
    """
    urls = expand_braces(source)
    names = [os.path.basename(unquote(urlsplit(url).path)) for url in urls]
    wrong = [url for url, name in zip(urls, names, strict=True) if not name.lower().endswith(".tar")]
    if wrong:
        raise UsageError(f"source {wrong[0]}: only .tar files can be read from URLs; copy the source to this machine")
    if len(set(names)) < len(names):
        raise UsageError(f"source {source}: several shards have the same file name; build them one after the other")
    mark = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = os.path.join(scratch or ".", f"source-{mark}")
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in names]
    missing = [(url, path) for url, path in zip(urls, paths, strict=True) if not os.path.exists(path)]
    if missing:
        print(f"copying {len(missing):,} of {len(urls):,} shards of {source} ...", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(_fetch, *zip(*missing, strict=True)))
        sync_folder(folder)
    return open_tars(source, paths, **settings)


def _fetch(url, path):
    """Copy a file to `path` by way of `path`.part, which is renamed when complete. An interrupted copy is resumed."""
    prefix, _, name = url.rpartition("/")
    part = f"{path}.part"
    try:
        with open(part, "ab+") as file:
            Opener(prefix).copy(name, file)
    except BadShard as error:
        raise RunError(f"source {url}: {error}") from None
    os.replace(part, path)
