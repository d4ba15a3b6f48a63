"""Sources that are no folder of pictures: shards behind URLs with a token, and what the package `datasets` reads."""

import http.server
import threading

import pytest

from maskalign.data.build import build as build_data

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)
TOKEN = "MASKALIGN_DATA_TOKEN"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to who knows the token; /moved/NAME is at the other server, which must not see the token."""

    def do_GET(self):  # noqa: N802
        self.server.seen.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.send_error(401)
        elif self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved", self.server.elsewhere))
            self.end_headers()
        elif self.path in self.server.cut:
            self.server.cut.remove(self.path)
            with open(self.translate_path(self.path), "rb") as file:
                data = file.read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *arguments):
        return


@pytest.fixture
def serve(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(TOKEN, raising=False)
    servers = []

    def start(token="", elsewhere=""):
        def handler(*arguments):
            return Handler(*arguments, directory=str(tmp_path / "shards"))

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.token, server.elsewhere, server.seen, server.cut = token, elsewhere, [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def shards(on_disk):
    on_disk.folder("shards", {"README.txt": b"three shards of one sample"})
    for number, colour in enumerate((RED, GREEN, BLUE)):
        files = {f"{number}.png": on_disk.png(colour), f"{number}.cls": str(2 - number).encode()}
        on_disk.tar(f"shards/a-{number}.tar", files)
    return {RED: 2, GREEN: 1, BLUE: 0}


def test_shards_behind_urls_with_a_token(serve, shards, build, on_disk, tmp_path, monkeypatch):
    server = serve(token="secret")
    source = f"{server.url}/a-{{0..2}}.tar"
    status, _, _, error = build(source)
    assert status == 1 and "status 401; give a bearer token in MASKALIGN_DATA_TOKEN" in error and "secret" not in error
    monkeypatch.setenv(TOKEN, "secret")
    status, manifest, said, error = build(source)
    assert status == 0, error
    assert on_disk.labels(tmp_path / "out") == shards and "3 classes from the samples' labels" in said
    assert not (tmp_path / "out" / ".build").exists()
    assert "secret" not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_token_stays_with_its_host(serve, shards, build, on_disk, tmp_path, monkeypatch):
    there = serve()
    here = serve(token="secret", elsewhere=there.url)
    monkeypatch.setenv(TOKEN, "secret")
    assert build(f"{here.url}/moved/a-{{0..2}}.tar")[0] == 0
    assert on_disk.labels(tmp_path / "out") == shards
    assert len(there.seen) == 3 and {token for _, token, _ in there.seen} == {None}


def test_what_breaks_off_is_fetched_again_and_what_is_there_is_not(serve, shards, tmp_path, monkeypatch):
    server = serve()
    server.cut = ["/a-1.tar"]
    monkeypatch.setattr("maskalign.data.build.prepare.make_shard", None)  # stop before the first shard
    options = dict(size=8, workers=0, quiet=True)
    with pytest.raises(TypeError):
        build_data(f"{server.url}/a-{{0..2}}.tar", tmp_path / "out", **options)
    assert sorted(path for path, _, _ in server.seen) == ["/a-0.tar", "/a-1.tar", "/a-1.tar", "/a-2.tar"]
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    server.seen.clear()
    assert build_data(f"{server.url}/a-{{0..2}}.tar", tmp_path / "out", **options).num_samples == 3
    assert server.seen == []


def test_urls_that_cannot_be_had_are_one_line(serve, shards, build, monkeypatch):
    server = serve()
    status, _, _, error = build(f"{server.url}/a-{{2..3}}.tar", out="a")
    assert status == 1 and "a-3.tar: missing on the server" in error
    status, _, _, error = build(f"{server.url}/pictures.zip", out="b")
    assert status == 2 and "only .tar files can be read from URLs" in error


def test_a_data_set_behind_a_url_with_a_token(serve, shards, build, tmp_path, monkeypatch):
    from maskalign.data import ShardStream
    from maskalign.errors import UsageError

    assert build(tmp_path / "shards", out="shards/set")[0] == 0
    server = serve(token="secret")
    with pytest.raises(UsageError, match="give a bearer token in MASKALIGN_DATA_TOKEN"):
        ShardStream(f"{server.url}/set", 3)
    monkeypatch.setenv(TOKEN, "secret")
    assert sorted(next(iter(ShardStream(f"{server.url}/set", 3)))["label"].tolist()) == [0, 1, 2]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The package `datasets`, without a network and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return datasets


def rows(hub, on_disk, labels, kind, **more):
    pictures = [{"bytes": on_disk.png(colour), "path": None} for colour in (RED, GREEN, BLUE)]
    features = hub.Features({"image": hub.Image(), "label": kind, **{name: hub.Value("string") for name in more}})
    return hub.Dataset.from_dict({"image": pictures, "label": labels, **more}, features=features)


@pytest.mark.parametrize("how", ["{}", "hf:{}"])
def test_a_folder_of_parquet_files(hub, on_disk, build, tmp_path, how):
    kind = hub.ClassLabel(names=["ant", "bee", "cow"])
    folder = on_disk.folder("set", {"README.md": b"x"})
    rows(hub, on_disk, [2, 0, 2], kind, caption=["a", "b", "c"]).to_parquet(str(folder / "train-0.parquet"))
    status, manifest, said, error = build(how.format(folder))
    assert status == 0, error
    assert manifest.class_names == ["ant", "bee", "cow"] and on_disk.labels(tmp_path / "out") == {
        RED: 2,
        GREEN: 0,
        BLUE: 2,
    }
    assert "1 of 3 classes have no image" in said and "3 classes from the column label" in said


def test_plain_numbers_and_rows_without_a_label(hub, on_disk, build, tmp_path):
    folder = on_disk.folder("set", {})
    folder.mkdir(exist_ok=True)
    rows(hub, on_disk, [1, None, 0], hub.Value("int64")).to_parquet(str(folder / "train-0.parquet"))
    status, manifest, _, error = build(f"hf:{folder}", "--max_bad_fraction", 0.5)
    assert status == 0, error
    assert manifest.class_names == ["0", "1"] and on_disk.labels(tmp_path / "out") == {RED: 1, BLUE: 0}
    assert list(on_disk.bad(tmp_path / "out").values()) == ["has no label"]


def test_an_imagefolder_by_hand(hub, on_disk, build, tmp_path):
    files = {f"train/{name}/1.png": on_disk.png(colour) for name, colour in (("ant", RED), ("bee", GREEN))}
    status, manifest, _, error = build(f"hf:{on_disk.folder('set', files)}")
    assert status == 0, error
    assert manifest.class_names == ["ant", "bee"] and on_disk.labels(tmp_path / "out") == {RED: 0, GREEN: 1}


def test_what_datasets_cannot_read_is_one_line(hub, on_disk, build, tmp_path):
    folder = on_disk.folder("set", {})
    folder.mkdir(exist_ok=True)
    rows(hub, on_disk, [1, 0, 0], hub.Value("int64")).remove_columns("image").to_parquet(str(folder / "0.parquet"))
    status, _, _, error = build(f"hf:{folder}", out="a")
    assert status == 2 and "expected one column of pictures" in error and "columns are label" in error
    status, _, _, error = build("hf:nobody/nothing", out="b")
    assert status == 2 and "source hf:nobody/nothing: cannot be loaded" in error
    status, _, _, error = build("hf:./nowhere", out="c")
    assert status == 2 and "no such folder, and not a name on the hub" in error
