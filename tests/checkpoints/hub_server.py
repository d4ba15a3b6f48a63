"""A model hub on this machine: the part of the Hub's protocol that downloads and uploads of files need."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory, and faults to order.

    Attributes:
        files: {repository: {revision: {path: bytes}}}; `main` and commits are revisions.
        cut: of a large file, send only so many bytes and break the connection; None for none.
        corrupt: change a byte of large files on their way.
        gated: repositories that ask for access. posts: (path, body) of what was posted. url: of the server.
    """

    def __init__(self):
        self.files, self.cut, self.corrupt, self.gated, self.posts, self.lfs = {}, None, False, set(), [], {}
        self.requests = []

    def add(self, repository, files, revision="main"):
        self.files.setdefault(repository, {})[revision] = dict(files)

    def commit(self, repository, revision):
        """The commit of a revision: 40 hexadecimal digits that follow from its files."""
        digest = hashlib.sha1(repr(sorted(self.files[repository][revision].items())).encode())
        return digest.hexdigest()

    def revision(self, repository, revision):
        """The name of a revision by its name or its commit; None where there is none."""
        there = self.files[repository]
        if revision in there:
            return revision
        return next((name for name in there if self.commit(repository, name) == revision), None)


LARGE = (".safetensors", ".pt", ".png")


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status=200, body=b"", headers=None, head=False):
            body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def fail(self, status, code, head=False):
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, head)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self):
            self.get(head=True)

        def do_GET(self):
            self.get()

        def get(self, head=False):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(("HEAD" if head else "GET", path))
            if path == "/":
                return self.answer(200, head=head)
            if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
                return self.send_large(hub.lfs[found.group(1)], head)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                return self.tree(*found.groups())
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                return self.info(found.group(1), found.group(2) or "main")
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.resolve(*found.groups(), head)
            return self.fail(404, "NotFound", head)

        def files(self, repository, revision, head=False):
            if repository in hub.gated:
                return self.fail(403, "GatedRepo", head)
            if repository not in hub.files:
                return self.fail(401, "RepoNotFound", head)
            name = hub.revision(repository, revision)
            if name is None:
                return self.fail(404, "RevisionNotFound", head)
            return name

        def tree(self, repository, revision):
            name = self.files(repository, revision)
            if name is None:
                return
            rows = []
            for path, data in hub.files[repository][name].items():
                row = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                if path.endswith(LARGE):
                    row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
                rows.append(row)
            self.answer(200, rows, {"Content-Type": "application/json", "X-Repo-Commit": hub.commit(repository, name)})

        def info(self, repository, revision):
            name = self.files(repository, revision)
            if name is not None:
                siblings = [{"rfilename": path} for path in hub.files[repository][name]]
                about = {"id": repository, "modelId": repository, "sha": hub.commit(repository, name)}
                about |= {"siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self.answer(200, about, {"Content-Type": "application/json"})

        def resolve(self, repository, revision, path, head):
            name = self.files(repository, revision, head)
            if name is None:
                return
            commit = {"X-Repo-Commit": hub.commit(repository, name)}
            data = hub.files[repository][name].get(path)
            if data is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", **commit}, head)
            if not path.endswith(LARGE):
                etag = hashlib.sha1(data).hexdigest()
                return self.answer(200, data, {"ETag": f'"{etag}"', **commit}, head)
            digest = hashlib.sha256(data).hexdigest()
            hub.lfs[digest] = data
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            self.answer(302, b"", {"Location": f"{hub.cdn}/cdn/{digest}", **linked, **commit}, head)

        def send_large(self, data, head):
            size, start = len(data), 0
            if hub.corrupt:
                data = data[:-1] + bytes([data[-1] ^ 1])
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            headers = {}
            if found:
                start = int(found.group(1))
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            if hub.cut is None or head:
                return self.answer(206 if found else 200, data[start:], headers, head)
            self.send_response(206 if found else 200)
            for name, value in {"Content-Length": str(size - start), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[start : start + hub.cut])
            self.close_connection = True

        def do_PUT(self):
            digest = urlsplit(self.path).path.rsplit("/", 1)[-1]
            data = self.body()
            if hashlib.sha256(data).hexdigest() != digest:
                return self.answer(400)
            hub.lfs[digest] = data
            self.answer(200, b"", {"ETag": f'"{digest}"'})

        def do_POST(self):
            path, body = unquote(urlsplit(self.path).path), self.body()
            hub.posts.append((path, body))
            if not self.headers.get("Authorization"):
                return self.fail(401, "Unauthorized")
            json_type = {"Content-Type": "application/json"}
            if path == "/api/repos/create":
                about = json.loads(body)
                name = f"{about.get('organization') or 'user'}/{about['name']}"
                if name in hub.files:
                    return self.answer(409, {"error": "exists", "url": f"{hub.url}/{name}"}, json_type)
                hub.add(name, {})
                return self.answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": name}, json_type)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                rows = [
                    {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": [row | {"shouldIgnore": False} for row in rows]}, json_type)
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{hub.url}/upload/{entry['oid']}"}}}
                    for entry in json.loads(body)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects}, json_type)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                return self.take_commit(*found.groups(), body)
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []}, json_type)
            return self.fail(404, "NotFound")

        def take_commit(self, repository, revision, body):
            there = hub.files[repository][revision]
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    there[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                if row["key"] == "lfsFile":
                    there[row["value"]["path"]] = hub.lfs[row["value"]["oid"]]
            commit = hub.commit(repository, revision)
            url = f"{hub.url}/{repository}/commit/{commit}"
            self.answer(200, {"commitUrl": url, "commitOid": commit}, {"Content-Type": "application/json"})

    return Handler


@contextmanager
def serve():
    """A `Hub` that answers while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")  # large files come from another host
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
