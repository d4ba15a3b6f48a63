"""Open shards: local paths, http(s)://, any URL that fsspec supports, and pipe: commands if they are allowed.

Remote shards are copied to local disk first, because the stream reads a group of shards in a permuted order: into
`cache_dir`, which keeps them, or into an unnamed file, which is removed with the process. Threads copy shards before
they are needed. A request that fails is repeated with increasing pauses; a server that sends nothing for `timeout`
seconds counts as failed.

Reasons for not using a library: urllib3's Retry covers only the headers of a response, so a body that breaks off is
neither repeated nor resumed by a range request, and tenacity would only replace one loop of eight lines. The caching
file systems of fsspec (2026.9, `simplecache` and `filecache`) write a copy under its final name and use any existing
file without checking its size and without a lock: ranks of one machine would copy a shard several times, or read an
incomplete one.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import random
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request

from maskalign.data.format.http import open_http, refusal
from maskalign.data.format.manifest import FILE_NAME, Manifest, is_url
from maskalign.data.stream.open_shard import BadShard
from maskalign.errors import RunError, UsageError

CHUNK = 2**20
LAST_PAUSE = 30.0


class Opener:
    """Opens files of one data set.

    Args:
        root: folder, URL prefix, or "pipe:COMMAND", in which {} is replaced by the file's name.
        timeout: seconds without data after which an attempt over the network has failed.
        retries: number of attempts after the first.
        cache_dir: folder in which remote shards are kept, shared between processes and runs.
        allow_pipe: run pipe: commands. These are shell commands, so their origin must be trusted.
        pause: seconds before the first retry, doubled each time.

    Raises:
        UsageError: a pipe: command that is not allowed, or has no {}.
    """

    def __init__(self, root, timeout=30.0, retries=5, cache_dir=None, allow_pipe=False, pause=0.5):
        root = os.fspath(root)
        if root.startswith("file://"):
            root = urllib.request.url2pathname(urllib.parse.urlparse(root).path)
        self.timeout, self.retries, self.cache_dir, self.pause = timeout, retries, cache_dir, pause
        self.stopped = threading.Event()  # set when no reader waits for downloads any more
        self.pipe = root.startswith("pipe:")
        if self.pipe and not allow_pipe:
            raise UsageError(f"data set {root!r} runs a shell command; set data.allow_pipe to true if you mean it")
        if self.pipe and "{}" not in root:
            raise UsageError(f"data set {root!r}: put {{}} in the command in place of the file's name")
        self.root = root
        self.remote = self.pipe or is_url(root)

    def manifest(self):
        """The data set's `Manifest`."""
        if not self.pipe:
            manifest = Manifest.load(self.root, timeout=self.timeout)
            self.root = manifest.root
            return manifest
        with tempfile.TemporaryFile() as file:
            try:
                self._download(FILE_NAME, file)
            except BadShard as error:
                raise UsageError(f"{self.root}: {FILE_NAME} cannot be read: {error}") from None
            file.seek(0)
            return Manifest.from_json(file.read(), self.root)

    def open(self, shard):
        """Open a shard (an entry of the manifest) and return its file descriptor; raises BadShard if this fails."""
        try:
            if not self.remote:
                return os.open(os.path.join(self.root, shard.name), os.O_RDONLY | os.O_CLOEXEC)
            if self.cache_dir is not None:
                return self._open_cached(shard)
            with tempfile.TemporaryFile() as file:
                self._download(shard.name, file)
                file.flush()
                return os.dup(file.fileno())
        except FileNotFoundError:
            raise BadShard("missing") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOSPC):
                raise RunError(
                    f"{shard.name}: {error.strerror}; raise `ulimit -n`, free disk space or use fewer streams"
                ) from None
            raise BadShard(f"cannot be read: {error.strerror or error}") from None

    def copy(self, name, file):
        """Append the missing bytes of a remote file to an open local one; raises BadShard if this fails."""
        self._download(name, file)

    def _open_cached(self, shard):
        folder = os.path.join(self.cache_dir, hashlib.sha256(self.root.encode()).hexdigest()[:16])
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, shard.name)
        if (fd := _open_whole(path, shard)) is not None:
            return fd
        # One process of the machine copies a shard, and the others wait for it.
        with open(path + ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (fd := _open_whole(path, shard)) is not None:
                return fd
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".part") as file:
                self._download(shard.name, file)
                file.flush()
                if file.tell() == shard.bytes:
                    os.link(file.name, path + ".new")
                    os.replace(path + ".new", path)
                return os.dup(file.fileno())

    def _download(self, name, file):
        """Copy the remote file to `file`; raises BadShard when all attempts have failed."""
        url = self.root.replace("{}", name)[5:] if self.pipe else f"{self.root}/{name}"
        copy = self._copy_http if url.startswith("http") else self._copy_fsspec
        copy = self._copy_pipe if self.pipe else copy
        for attempt in range(self.retries + 1):
            try:
                return copy(url, file)
            except FileNotFoundError:
                raise BadShard("missing on the server") from None
            except PermissionError as error:
                raise BadShard(f"the server refuses it ({error})") from None
            except (OSError, http.client.HTTPException, EOFError, RuntimeError, ValueError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                if attempt == self.retries or self.stopped.is_set():
                    reason = str(error) or type(error).__name__
                    raise BadShard(f"cannot be fetched after {attempt + 1} attempts: {reason}") from None
            self.stopped.wait(min(self.pause * 2**attempt, LAST_PAUSE) * random.uniform(0.75, 1.25))

    def _copy_http(self, url, file):
        """Copy over http(s); if the server supports ranges, continue where the last attempt stopped."""
        have = file.seek(0, os.SEEK_END)
        try:
            with open_http(url, self.timeout, have) as answer:
                if have and answer.status != 206:
                    have = 0
                    file.seek(0)
                    file.truncate()
                length = answer.headers.get("Content-Length")
                for data in iter(lambda: answer.read(CHUNK), b""):
                    file.write(data)
                if length is not None and file.tell() != have + int(length):
                    raise EOFError(f"the answer ended after {file.tell():,} bytes")
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(url) from None
            if error.code in (401, 403):
                raise PermissionError(refusal(error.code)) from None
            if error.code == 416:  # the file is shorter on the server now; start again
                file.seek(0)
                file.truncate()
            raise
        except TimeoutError:
            raise OSError(f"no answer within {self.timeout:g} s") from None

    def _copy_fsspec(self, url, file):
        import fsspec

        _copy_watched(lambda: fsspec.open(url, "rb").open(), file, self.timeout)

    def _copy_pipe(self, command, file):
        from webdataset.gopen import gopen

        _copy_watched(lambda: gopen(f"pipe:{command}"), file, self.timeout)


def _open_whole(path, shard):
    """File descriptor of a cached shard if it exists and has the right size, else None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(fd).st_size == shard.bytes:
        return fd
    os.close(fd)
    return None


def _copy_watched(open_source, file, timeout):
    """Copy a stream with a timeout: a thread reads it, and is abandoned when no data arrives for `timeout` seconds."""
    progress, stop, result = threading.Event(), threading.Event(), []
    file.seek(0)
    file.truncate()
    target = os.dup(file.fileno())

    def work():
        try:
            with os.fdopen(target, "wb", buffering=0) as out, open_source() as source:
                while data := source.read(CHUNK):
                    if stop.is_set():
                        return
                    out.write(data)
                    progress.set()
            result.append(None)
        except BaseException as error:
            result.append(error)
        finally:
            progress.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and not result:
        if not progress.wait(timeout):
            stop.set()
            raise OSError(f"no byte within {timeout:g} s")
        progress.clear()
    if result[0] is not None:
        raise result[0]
    file.seek(0, os.SEEK_END)
