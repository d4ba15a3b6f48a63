"""The other loaders are measured on the same samples as ours: each one once per pass, with the same content."""

import itertools

import numpy as np
import pytest

from benchmarks import loader, loader_peers


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "repa_members", lambda: [{}])
    loader.build("latents", str(tmp_path), 24, per_shard=10)
    return tmp_path


@pytest.mark.parametrize(
    "name, package, workers", [("grain", "grain", 0), ("grain", "grain", 1), ("streaming", "streaming", 0)]
)
def test_a_peer_gives_the_same_samples(root, name, package, workers):
    try:
        __import__(package)
    except ImportError as error:
        pytest.skip(str(error))
    truth = {(moments.tobytes(), tokens.tobytes(), label) for moments, tokens, label in
             loader_peers.samples_of(str(root / "shards"))}  # fmt: skip
    assert len(truth) == 24 and {label for *_, label in truth} == set(range(24))
    _, write, read = loader_peers.PEERS[name]
    write(str(root / "shards"), str(root / name))
    batches = read(str(root / name), 6, workers)
    seen = [
        (np.asarray(moment).tobytes(), np.asarray(token).tobytes(), int(label))
        for moments, tokens, labels in itertools.islice(batches, 4)
        for moment, token, label in zip(moments, tokens, labels, strict=True)
    ]
    batches.close()
    assert len(seen) == 24 and set(seen) == truth


def test_the_table_of_promises_is_that_of_the_docs(capsys):
    assert loader.main(["--promises"]) == 0
    table = capsys.readouterr().out.strip()
    path = __file__.rpartition("/tests/")[0] + "/docs/data.md"
    with open(path, encoding="utf-8") as file:
        assert table in file.read()


def test_a_peer_that_is_not_there_is_one_line(root, tmp_path):
    with pytest.raises(SystemExit, match="MosaicML Streaming .* cannot write: "):
        loader.Peer("streaming", "/bin/false").write(str(root))
