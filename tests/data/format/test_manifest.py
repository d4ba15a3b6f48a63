"""The manifest: what is written is what is read, and every damaged field gives one line that names it."""

import http.server
import json
import subprocess
import sys
import threading

import pytest

from maskalign.data.format.manifest import Manifest, Shard, teacher_member
from maskalign.errors import RunError, UsageError


def small_manifest(**changes):
    values = {
        "num_samples": 5,
        "resolution": 32,
        "class_names": ["cat", "dog"],
        "shards": [Shard("shard-000000.tar", 3, 10240, "0" * 64), Shard("shard-000001.tar", 2, 10240, "a" * 64)],
        "latent": {"scale": 0.18215, "bias": 0.0, "shape": [8, 4, 4], "dtype": "float16", "name": "vae"},
        "teachers": {
            "efficientnet-lite0:16": {
                "tokens": 256, "dim": 112, "grid": [16, 16], "dtype": "int8", "normalize": "none"
            }
        },
        "hflip": True,
        "license": "CC BY-SA 4.0, é",
        "source": "a test",
    }  # fmt: skip
    return Manifest(**(values | changes))


def test_what_is_saved_is_loaded(tmp_path):
    manifest = small_manifest(extra={"of_a_later_minor_version": [1, 2]})
    path = manifest.save(tmp_path)
    again = Manifest.load(tmp_path)
    assert again.root == str(tmp_path)
    assert again == small_manifest(extra={"of_a_later_minor_version": [1, 2]}, root=str(tmp_path))
    assert Manifest.load(path) == again
    assert Manifest.load(f"{tmp_path}/") == again
    assert again.shard_path(1) == again.shard_path(again.shards[1]) == str(tmp_path / "shard-000001.tar")
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]  # no temporary left behind


def test_equal_data_sets_have_equal_bytes_and_the_digest_follows_the_samples():
    assert small_manifest().to_json() == small_manifest().to_json()

    def with_counts(first, second, checksum):
        names = ("shard-000000.tar", "shard-000001.tar")
        counts = (first, second)
        return small_manifest(shards=[Shard(n, c, 1, checksum * 64) for n, c in zip(names, counts, strict=True)])

    encoded, other = with_counts(3, 2, "1"), with_counts(2, 3, "0")
    assert small_manifest().digest() == encoded.digest() != other.digest()


@pytest.mark.parametrize(
    "change, names",
    [
        ({"version": 2}, "version.*update"),
        ({"version": None}, "version"),
        ({"num_samples": 6}, "add up to 5"),
        ({"num_samples": -1}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": "32"}, "resolution"),
        ({"channels": 1}, "channels"),
        ({"class_names": []}, "class_names"),
        ({"class_names": ["a", "a"]}, "class_names"),
        ({"class_names": "ab"}, "class_names"),
        ({"image_format": "gif"}, "image_format"),
        ({"hflip": 1}, "hflip"),
        ({"license": 3}, "license"),
        ({"source": None}, "source"),
        ({"shards": {}}, "shards"),
        ({"shards": [3]}, "shard"),
        ({"shards": [{"name": "x.tar"}]}, "num_samples"),
        ({"latent": []}, "latent"),
        ({"latent": {"shape": [8, 4], "scale": 1, "bias": 0, "dtype": "float16"}}, "latent.shape"),
        ({"latent": {"shape": [8, 4, 4], "scale": "1", "bias": 0, "dtype": "float16"}}, "latent.scale"),
        ({"latent": {"shape": [8, 4, 4], "scale": 1, "bias": 0, "dtype": "object"}}, "latent.dtype"),
        ({"teachers": []}, "teachers"),
        ({"teachers": {"t": {"tokens": 4, "dim": 3, "grid": [2, 3], "dtype": "int8"}}}, "grid"),
        ({"teachers": {"t": {"tokens": 4, "dim": 0, "grid": [2, 2], "dtype": "int8"}}}, "dim"),
        ({"teachers": {"t": {"tokens": 4, "dim": 3, "grid": [2, 2], "dtype": "object"}}}, "dtype"),
        ({"teachers": {"moments": {"tokens": 4, "dim": 3, "grid": [2, 2], "dtype": "int8"}}}, "share"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_in_one_line(tmp_path, change, names):
    data = json.loads(small_manifest().to_json()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=names) as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", "", ".hidden", "pipe:ls", "a b.tar", 3])
def test_a_shard_name_cannot_leave_the_folder(tmp_path, name):
    data = json.loads(small_manifest().to_json())
    data["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="plain file name"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"version": 1}'])
def test_not_a_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(UsageError, match="manifest.json"):
        Manifest.load(tmp_path)


def test_no_data_set_there(tmp_path):
    with pytest.raises(UsageError, match="does not exist.*data build"):
        Manifest.load(tmp_path / "missing")
    with pytest.raises(UsageError, match="no manifest.json.*data build"):
        Manifest.load(tmp_path)
    with pytest.raises(UsageError, match="pipe:"):
        Manifest.load("pipe:cat manifest.json")
    with pytest.raises(UsageError, match="nosuchscheme"):
        Manifest.load("nosuchscheme://bucket/prefix")


def test_an_invalid_manifest_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="add up"):
        small_manifest(num_samples=7).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_member_names_hold_no_dots_and_two_teachers_never_share_one():
    assert teacher_member("timm:vit_small_patch14_dinov2.lvd142m") == "timm-vit_small_patch14_dinov2-lvd142m"
    entry = {"tokens": 4, "dim": 3, "grid": [2, 2], "dtype": "int8", "normalize": "none"}
    with pytest.raises(UsageError, match="share"):
        small_manifest(teachers={"a.b": entry, "a:b": entry}).validate()


@pytest.fixture
def flaky_server():
    """Serves a manifest after as many 500s as `server.failures` says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            if self.server.failures > 0:
                self.server.failures -= 1
                self.send_error(500)
            elif self.path != "/set/manifest.json":
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(small_manifest().to_json().encode())

        def log_message(self, *arguments):
            self.server.lines = arguments

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.failures, server.asked = 0, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_over_http_with_retries(flaky_server):
    server, address = flaky_server
    server.failures = 2
    manifest = Manifest.load(f"{address}/set")
    assert manifest.shard_path(0) == f"{address}/set/shard-000000.tar"
    assert len(server.asked) == 3
    with pytest.raises(UsageError, match="404"):
        Manifest.load(f"{address}/other")
    assert len(server.asked) == 4  # not asked again: it will not come
    server.failures = 100
    with pytest.raises(RunError, match="no answer after"):
        Manifest.load(f"{address}/set")


def test_over_fsspec():
    import fsspec

    with fsspec.open("memory://sets/one/manifest.json", "wb") as file:
        file.write(small_manifest().to_json().encode())
    manifest = Manifest.load("memory://sets/one/")
    assert manifest.shard_path(1) == "memory://sets/one/shard-000001.tar"
    with pytest.raises(UsageError, match="not found"):
        Manifest.load("memory://sets/two")


def test_reading_a_manifest_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from maskalign.data import Manifest; Manifest; "
        "print(sorted({'torch', 'numpy', 'fsspec', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_what_a_killed_process_left_of_a_manifest_goes(tmp_path):
    (tmp_path / ".manifest.4711.tmp.json").write_text("{")
    (tmp_path / ".other.4711.tmp.json").write_text("{")
    manifest = Manifest(num_samples=1, resolution=8, class_names=["a"], shards=[Shard("s.tar", 1, 1, "0" * 64)])
    manifest.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", ".other.4711.tmp.json"}
