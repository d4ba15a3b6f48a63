"""What a run says of its data: several sets by weight, bad samples counted once, the wait for data."""

import hashlib
import json
import time

import pytest

from maskalign.checkpoints.layout import complete_checkpoints
from maskalign.errors import RunError, UsageError
from maskalign.training import trainer
from maskalign.training.logs import read_metrics


@pytest.fixture
def keys_seen(monkeypatch):
    """One list of keys per batch that training took."""
    seen = []

    class Watched(trainer.ShardStream):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch["key"])
                yield batch

    monkeypatch.setattr(trainer, "ShardStream", Watched)
    return seen


def test_data_sets_mixed_by_weight_and_resumed_on_other_workers(run, data_set_of, tmp_path, keys_seen):
    data_set_of("small", samples=12, seed=1)
    data_set_of("large", samples=60, seed=2)
    mixed = f'{{"{tmp_path / "small"}": 1, "{tmp_path / "large"}": 3}}'
    own = dict(data__path=mixed, training__max_steps=10, training__checkpoint_every=4)
    run("whole", **own)
    whole = keys_seen.copy()
    assert len(whole) == 10 and all(len(keys) == 8 for keys in whole)
    # Both sets number their samples from 0: keys from 12 on are the large one's for certain. Of the 80 draws, 60 are.
    surely_large = sum(int(key) >= 12 for keys in whole for key in keys)
    assert 60 * 48 // 60 - 10 <= surely_large <= 60
    run("parts", **own)
    for later in complete_checkpoints(tmp_path / "parts")[1:]:
        (later / "COMPLETE").unlink()
    keys_seen.clear()
    run("parts", **own, data__num_workers=2)
    assert keys_seen == whole[4:]
    first, second = (read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    assert [row["epoch"] for row in first] == [step * 8 // 72 for step in range(1, 11)]


def test_data_sets_that_do_not_fit_each_other_are_one_line(run, data_set_of, tmp_path):
    data_set_of("one", samples=12)
    data_set_of("two", samples=12, seed=1)
    for name, changes, words in (
        ("tokens", dict(dim=7), "other tensors"),
        ("latents", dict(latent=True), "other tensors"),
        ("grid", dict(grid=(2, 8)), "other token grids"),
    ):
        data_set_of(name, samples=12, **changes)
        with pytest.raises(UsageError, match=f"cannot be mixed: {words}") as caught:
            run(data__path=f'{{"{tmp_path / "one"}": 1, "{tmp_path / name}": 1}}')
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="weight of .* is 0"):
        run(data__path=f'{{"{tmp_path / "one"}": 0}}')
    with pytest.raises(UsageError, match="larger than the 24 samples"):
        run(data__path=f'{{"{tmp_path / "one"}": 1, "{tmp_path / "two"}": 1}}', training__batch_size=32)


def damage(folder, shard, count):
    """Make the first `count` images of a shard unreadable, but not its tar."""
    path = folder / f"shard-{shard:06d}.tar"
    data, start = bytearray(path.read_bytes()), 0
    for _ in range(count):
        start = data.index(b"\x89PNG", start)
        data[start : start + 4] = b"none"
    path.write_bytes(data)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][shard]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_named_once_and_counted_in_every_row(run, data_set, tmp_path, caplog, keys_seen, workers):
    damage(data_set, 1, 2)
    run(training__max_steps=15, training__checkpoint_every=8, data__num_workers=workers, data__max_bad_fraction=0.1)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[-1]["bad_samples"] == 2, "15 steps of 8 are more than two passes over 48 samples, each counted once"
    assert [row["bad_samples"] for row in rows] == sorted(row["bad_samples"] for row in rows)
    named = [r.getMessage() for r in caplog.records if "bad sample skipped" in r.getMessage()]
    assert sorted(line.split(":")[1].strip() for line in named) == [
        "shard-000001.tar, sample 00000012",
        "shard-000001.tar, sample 00000013",
    ]
    assert not {"00000012", "00000013"} & {key for keys in keys_seen for key in keys}


def test_too_many_bad_samples_stop_the_run_and_name_the_shards(run, data_set):
    damage(data_set, 2, 6)
    with pytest.raises(RunError, match=r"data\.max_bad_fraction.*shard-000002\.tar \(\d\)") as caught:
        run(training__max_steps=40, data__max_bad_fraction=0.05)
    assert "\n" not in str(caught.value)


def test_the_wait_for_data_is_a_column(run, tmp_path, monkeypatch):
    from maskalign.data.stream.samples import SampleReader

    plain = SampleReader.fill
    monkeypatch.setattr(SampleReader, "fill", lambda self, *args: (time.sleep(0.25), plain(self, *args))[1])
    run(training__max_steps=4)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(row["data_wait"] >= 0.25 for row in rows)


def test_a_pipe_is_a_data_set_only_where_it_is_allowed(run, data_set):
    with pytest.raises(UsageError, match=r"data\.allow_pipe"):
        run(data__path=f"pipe:cat {data_set}/{{}}")
    assert run(data__path=f"pipe:cat {data_set}/{{}}", data__allow_pipe="true", training__max_steps=1)["finished"]
