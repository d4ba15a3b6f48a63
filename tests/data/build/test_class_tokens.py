"""Class tokens in a data set: against timm's own networks and numpy's statistics, and added to rows that stay."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch

from maskalign.data import ShardStream
from maskalign.data.build import check, encode
from maskalign.data.build.class_tokens import channel_statistics, principal_components
from maskalign.data.format.manifest import Manifest
from maskalign.data.format.tar_shards import read_shard, write_shard
from maskalign.errors import RunError, UsageError
from maskalign.teachers import load_teacher_like
from tests.data.build.test_encoding import array, digests, picture, quiet, read_all
from tests.random_shards import RESNET, VIT, make_data_set

CLASS, ROWS = "timm-test_vit.class.npy", "timm-test_vit.npy"


@pytest.fixture
def data(tmp_path):
    make_data_set(tmp_path / "data", counts=(5, 4, 3))
    return tmp_path / "data"


def network(name):
    """timm's network as the teachers of tests draw it, without our code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, num_classes=0).eval()


def timm_input(model, members):
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    x = torch.nn.functional.interpolate(
        picture(members).float(), size=(size, size), mode=config["interpolation"], antialias=True
    ).clamp(0, 255)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (x / 255 - mean) / std


def tokens(folder, ending=CLASS):
    return np.stack([array(members, ending) for members in read_all(folder).values()])


def test_a_vits_class_token_is_its_prefix_token_after_the_last_norm(data):
    manifest = quiet(data, hflip=True)
    entry = manifest.teachers[VIT]["class_token"]
    assert (entry["dim"], entry["dtype"], entry["kind"]) == (64, "float16", "prefix")
    model = network("test_vit")
    normed = []
    model.norm.register_forward_hook(lambda module, given, out: normed.append(out))
    for members in read_all(data).values():
        x = timm_input(model, members)
        for ending, image in ((CLASS, x), (f"flip.{CLASS}", x.flip(-1))):
            with torch.no_grad():
                want = model.forward_features(image)[0, 0].numpy()
            np.testing.assert_array_equal(want, normed[-1][0, 0].numpy())
            got = array(members, ending)
            assert got.shape == (64,) and got.dtype == np.float16
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "stem"), [(RESNET, "timm-test_resnet"), ("efficientnet-lite0", "efficientnet-lite0")])
def test_a_cnns_class_token_is_the_average_of_its_rows_standardized(data, name, stem):
    weights = None if name == "efficientnet-lite0" else "random"
    manifest = quiet(data, teacher=name, weights=weights, dtype="float16", grid=3, normalize="spatial")
    entry = manifest.teachers[name]["class_token"]
    assert entry["kind"] == "mean"
    if name == RESNET:
        model, averages = network("test_resnet"), []
        for members in read_all(data).values():
            with torch.no_grad():
                averages.append(model.forward_features(timm_input(model, members))[0].mean(dim=(1, 2)).numpy())
        averages = np.stack(averages).astype(np.float64)
    else:  # its rows against timm's network are tested with the teachers
        from maskalign.teachers import load_teacher

        teacher = load_teacher(name)
        averages = np.stack([teacher(picture(m))[0].numpy().mean(axis=0) for m in read_all(data).values()])
    np.testing.assert_allclose(entry["mean"], averages.mean(axis=0), rtol=1e-4, atol=1e-5)
    std = averages.std(axis=0)
    alive = std > 0  # a ReLU at the end leaves some channels at zero
    assert alive.mean() > 0.9
    np.testing.assert_allclose(np.array(entry["std"]), np.where(alive, std, 1), rtol=1e-3)
    got = tokens(data, f"{stem}.class.npy").astype(np.float64)
    want = (averages - averages.mean(axis=0)) / np.where(alive, std, 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=6e-3)
    np.testing.assert_allclose(got.mean(axis=0), 0, atol=5e-3)
    np.testing.assert_allclose(got[:, alive].std(axis=0), 1, atol=5e-3)


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_live_class_tokens_are_the_cached_ones(data, name):
    manifest = quiet(data, teacher=name, normalize="mean", grid=4)
    teacher = load_teacher_like(name, manifest.teachers[name], weights="random", image_size=manifest.resolution)
    for members in read_all(data).values():
        rows, live = teacher.tokens_and_class(picture(members))
        assert rows.shape == (1, 16, teacher.dim) and live.dtype == torch.float32
        assert torch.equal(rows, teacher(picture(members)))
        assert torch.equal(live, teacher.class_token(picture(members)))
        cached = array(members, f"{name.replace(':', '-')}.class.npy").astype(np.float32)
        np.testing.assert_allclose(cached, live[0].numpy(), rtol=2e-3, atol=2e-3)


def test_every_image_is_encoded_once(data, monkeypatch):
    from maskalign.teachers.encoders import TimmEncoder

    seen, real = [], TimmEncoder._features

    def counted(self, x, teacher=""):
        seen.append(len(x))
        return real(self, x, teacher)

    monkeypatch.setattr(TimmEncoder, "_features", counted)
    quiet(data)
    assert sum(seen) == 12 + 1  # a black picture tells a timm model's grid
    seen.clear()
    quiet(data, teacher=RESNET, normalize="mean")  # the mean token and the statistics come from the same pass
    assert sum(seen) == 2 * 12 + 1


def whitened(values, components):
    mean, basis, scale = (np.array(components[key]) for key in ("mean", "basis", "scale"))
    return ((values.astype(np.float64) - mean) @ basis.T) / scale


def test_components_are_numpys_whitened_principal_components(tmp_path):
    make_data_set(tmp_path / "data", counts=(40, 20, 30))
    manifest = quiet(tmp_path / "data", class_components=20)
    components = manifest.teachers[VIT]["class_token"]["components"]
    values = tokens(tmp_path / "data").astype(np.float64)
    assert len(components["basis"]) == 20 and components["images"] == 90
    np.testing.assert_allclose(components["mean"], values.mean(axis=0), rtol=1e-5, atol=1e-6)
    _, singular, axes = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(components["scale"], singular[:20] / 90**0.5, rtol=1e-5)
    overlap = np.array(components["basis"]) @ axes[:20].T
    np.testing.assert_allclose(np.abs(overlap), np.eye(20), atol=2e-3)
    assert all(row[np.abs(row).argmax()] > 0 for row in map(np.array, components["basis"]))
    white = whitened(values, components)
    np.testing.assert_allclose(white.T @ white / 90, np.eye(20), atol=2e-3)
    # Statistics of prefix tokens are told too; nothing is standardized with them.
    np.testing.assert_allclose(manifest.teachers[VIT]["class_token"]["std"], values.std(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "rank", "most", "want"),
    [
        ((50, 6), 6, 64, 6),
        ((50, 6), 3, 64, 3),
        ((4, 9), 9, 64, 3),
        ((50, 7), 7, 2, 2),
        ((3, 5), 0, 4, 0),
        ((1, 5), 1, 4, 0),
    ],
)
def test_there_are_as_many_components_as_the_values_span(shape, rank, most, want, seed):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(shape[0], rank)) @ draw.normal(size=(rank, shape[1])) + 5
    found = principal_components(values, most)
    assert want == (0 if found is None else len(found["basis"]))
    if want:
        white = whitened(values, found)
        np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(white.T @ white / shape[0], np.eye(want), atol=1e-4)


def test_a_channel_that_does_not_vary_can_be_divided_by():
    values = np.random.default_rng(0).normal(size=(30, 4)) * [1, 1e-3, 0, 0] + [0, 3, 7, 0]
    mean, std = channel_statistics(values.sum(axis=0), (values**2).sum(axis=0), 30)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(std, [values[:, 0].std(), values[:, 1].std(), 1, 1], rtol=1e-5)


def test_class_tokens_alone_are_added_and_the_rows_stay(data, tmp_path):
    shutil.copytree(data, tmp_path / "fresh")
    fresh = quiet(tmp_path / "fresh", hflip=True, normalize="spatial", dtype="float16")
    quiet(data, hflip=True, normalize="spatial", dtype="float16", class_token="none")
    assert "class_token" not in Manifest.load(data).teachers[VIT]
    assert all(not ending.endswith(CLASS) for members in read_all(data).values() for ending in members)
    scramble_rows(data)
    before, rows = read_all(data), Manifest.load(data).teachers[VIT]
    manifest = quiet(data, class_token="only")  # mirrored as the rows are, whatever the other settings say
    assert manifest.teachers[VIT] == rows | {"class_token": fresh.teachers[VIT]["class_token"]}
    reference = read_all(tmp_path / "fresh")
    for key, members in read_all(data).items():
        assert {ending: members[ending] for ending in before[key]} == before[key]
        assert sorted(set(members) - set(before[key])) == [f"flip.{CLASS}", CLASS]
        assert members[CLASS] == reference[key][CLASS] and members[f"flip.{CLASS}"] == reference[key][f"flip.{CLASS}"]
    assert check(data) == []


def scramble_rows(folder):
    """Other rows, so that rows that were encoded anew would show; the manifest's checksums are made to fit."""
    manifest = Manifest.load(folder)
    for place, shard in enumerate(manifest.shards):
        with open(os.path.join(folder, shard.name), "rb") as file:
            samples = list(read_shard(file))
        for _, members in samples:
            for ending in members:
                if ending.endswith(ROWS):
                    members[ending] = members[ending][:-1] + b"\x07"
        manifest.shards[place] = write_shard(os.path.join(folder, shard.name), samples)
    manifest.save(folder)


def test_encoding_as_before_adds_what_an_old_data_set_lacks(data, tmp_path, capsys):
    quiet(data, class_token="none")
    scramble_rows(data)
    before = read_all(data)
    shutil.copytree(data, tmp_path / "only")
    quiet(data, quiet=False)  # the same command that once made the rows
    assert "class token 64 float16" in capsys.readouterr().out
    quiet(tmp_path / "only", class_token="only")
    assert digests(data) == digests(tmp_path / "only")
    assert all(members[ROWS] == before[key][ROWS] for key, members in read_all(data).items())
    quiet(data, class_token="only", quiet=False)
    assert "nothing to do" in capsys.readouterr().out


def test_several_teachers_each_get_what_they_lack(data, tmp_path):
    shutil.copytree(data, tmp_path / "fresh")
    both = {"teacher": f"{VIT},{RESNET}", "weights": "random,random"}
    fresh = quiet(tmp_path / "fresh", **both)
    quiet(data, class_token="none")
    manifest = quiet(data, **both)
    assert read_all(data) == read_all(tmp_path / "fresh") and manifest.teachers == fresh.teachers
    quiet(data, teacher=RESNET, dtype="float16", class_token="none")  # rows anew, and no class token any more
    manifest = Manifest.load(data)
    assert "class_token" in manifest.teachers[VIT] and "class_token" not in manifest.teachers[RESNET]
    for members in read_all(data).values():
        assert CLASS in members and "timm-test_resnet.class.npy" not in members


def test_more_components_take_no_encoding(data, capsys, monkeypatch):
    quiet(data, class_components=3)
    before = digests(data)
    first = Manifest.load(data).teachers[VIT]["class_token"]["components"]
    assert len(first["basis"]) == 3
    quiet(data, class_components=2, quiet=False)
    assert "nothing to do" in capsys.readouterr().out
    monkeypatch.setattr("maskalign.data.build.encoding._run", None)  # nothing is run
    quiet(data, class_components=6, dry_run=True)
    assert digests(data) == before
    manifest = quiet(data, class_components=6)
    more = manifest.teachers[VIT]["class_token"]["components"]
    assert more["basis"][:3] == first["basis"] and len(more["basis"]) == 6
    after = digests(data)
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}
    quiet(data, class_components=0, quiet=False)
    assert "nothing to do" in capsys.readouterr().out


def test_too_few_images_give_fewer_components_and_say_so(data, capsys):
    manifest = quiet(data, quiet=False)
    assert len(manifest.teachers[VIT]["class_token"]["components"]["basis"]) == 11  # 12 images
    assert "12 class tokens of 64 numbers have 11 principal components, not 64" in capsys.readouterr().out
    quiet(data, quiet=False)
    assert "nothing to do" in capsys.readouterr().out


def test_without_components_there_are_none(data):
    entry = quiet(data, class_components=0).teachers[VIT]["class_token"]
    assert "components" not in entry and CLASS in next(iter(read_all(data).values()))


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_stopped_and_started_again_the_bytes_are_the_same(data, tmp_path, name, monkeypatch):
    """Class tokens alone; with the rows tests/data/build/test_encoding.py kills the process at every change."""
    import maskalign.data.build.encoding as module

    quiet(data, teacher=name, class_token="none")
    shutil.copytree(data, tmp_path / "want")
    quiet(tmp_path / "want", teacher=name, class_token="only")
    real, left = module._encode_shard, [2]

    def stopping(job, maker, number, advance):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(job, maker, number, advance)

    monkeypatch.setattr(module, "_encode_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        quiet(data, teacher=name, class_token="only")
    assert "class_token" not in Manifest.load(data).teachers[name]
    left[0] = 100
    quiet(data, teacher=name, class_token="only")
    assert left[0] == 99 and digests(data) == digests(tmp_path / "want")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_token": "maybe"}, "class_token is 'maybe'; give both, only or none"),
        ({"class_token": "only", "teacher": None, "latents": "vae"}, "class_token only: .*--teacher"),
        ({"class_token": "only", "teacher": RESNET}, f"no rows of '{RESNET}' yet"),
        ({"class_token": "only", "weights": None}, "encoded with the weights random, these are default; give the same"),
        ({"class_token": "only", "hflip": True}, f"hflip: {VIT} of .* without the mirrored images"),
        ({"class_components": -1}, "class_components is -1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(data, settings, words):
    quiet(data, class_token="none")
    before = digests(data)
    with pytest.raises(UsageError, match=words) as caught:
        encode(data, **{"teacher": VIT, "weights": "random", "device": "cpu", "quiet": True} | settings)
    assert "\n" not in str(caught.value) and digests(data) == before


def test_plain_webdataset_reads_class_tokens(data):
    import webdataset

    quiet(data)
    shards = [str(path) for path in sorted(data.glob("*.tar"))]
    plain = {s["__key__"]: s for s in webdataset.WebDataset(shards, shardshuffle=False).decode()}
    seen = 0
    for batch in ShardStream(str(data), 5, epochs=1, fields=[f"{VIT}.class"]):
        for key, token in zip(batch["key"], batch[f"{VIT}.class"], strict=True):
            want = plain[key][CLASS]
            assert want.dtype == np.float16 and token.dtype == torch.float16
            np.testing.assert_array_equal(token.numpy(), want)
            seen += 1
    assert seen == 12


# The stream and the checks, on shards that webdataset's own writer made.

LITE = {"tokens": 4, "dim": 6, "grid": [2, 2], "dtype": "int8", "normalize": "none"}
STATISTICS = {"mean": [0.5] * 6, "std": [2.0] * 6}


def entry(**changes):
    return {"lite:2": LITE | {"class_token": {"dim": 6, "dtype": "float16", "kind": "prefix"} | changes}}


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def class_of(key, flip=False):
    return (np.random.default_rng(int(key)).normal(size=6) + 9 * flip).astype(np.float16)


def with_class_tokens(spoilt=None, flip=False):
    spoilt = spoilt or {}

    def change(key, members):
        members["lite-2.class.npy"] = spoilt.get(key, npy(class_of(key)))
        if flip:
            members["flip.lite-2.class.npy"] = npy(class_of(key, True))
        return {ending: data for ending, data in members.items() if data is not None}

    return change


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_reads_class_tokens_where_they_are_named(make_shards, workers):
    path, truth = make_shards([5, 4], change=with_class_tokens(), teachers=entry())
    for fields in (["lite:2.class"], ["lite:2.class", "lite:2", "image"]):
        seen = {}
        for batch in ShardStream(path, 3, epochs=1, fields=fields, num_workers=workers):
            assert set(fields) | {"key", "label", "epoch", "slot", "bad"} == set(batch)
            tokens = batch["lite:2.class"]
            assert tokens.dtype == torch.float16 and tokens.shape == (len(batch["key"]), 6)
            seen |= dict(zip(batch["key"], tokens.numpy().copy(), strict=True))
        assert set(seen) == set(truth)
        assert all(np.array_equal(token, class_of(key)) for key, token in seen.items())
    batch = next(iter(ShardStream(path, 3)))
    assert "lite:2.class" not in batch and "lite:2" in batch


def test_mirrored_images_come_with_their_own_class_token(make_shards):
    path, truth = make_shards([8, 8], hflip=True, change=with_class_tokens(flip=True), teachers=entry())
    kinds = set()
    for batch in ShardStream(path, 4, epochs=2, fields=["image", "lite:2", "lite:2.class"]):
        for i, key in enumerate(batch["key"]):
            flip = not np.array_equal(batch["image"][i].numpy().transpose(1, 2, 0), truth[key]["image"])
            rows = truth[key]["flip lite:2" if flip else "lite:2"]
            assert np.array_equal(batch["lite:2"][i], rows)
            assert np.array_equal(batch["lite:2.class"][i], class_of(key, flip))
            kinds.add(flip)
    assert kinds == {False, True}


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (npy(np.zeros(7, np.float16)), r"class.npy is \(7,\) of float16, the manifest says \(6,\)"),
        (npy(np.zeros(6, np.float32)), "class.npy is .* of float32"),
        (npy(np.array([0, 1, np.nan, 3, 4, 5], np.float16)), "class.npy holds numbers that are not finite"),
        (npy(np.array([0, 1, 2, 3, 4, -np.inf], np.float16)), "class.npy holds numbers that are not finite"),
        (b"noise" * 20, "no valid .npy header"),
        (None, "no .lite-2.class.npy"),
    ],
)
def test_a_class_token_that_cannot_be_is_a_bad_sample(make_shards, spoilt, words):
    change = with_class_tokens({"00000003": spoilt})
    path, truth = make_shards([6, 6], checksums=True, change=change, teachers=entry())
    stream = ShardStream(path, 4, epochs=1, fields=["lite:2.class"], max_bad_fraction=0.5)
    keys = [key for batch in stream for key in batch["key"]]
    assert sorted(keys) == sorted(set(truth) - {"00000003"})
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("; ".join(stream.bad_samples))
    (problem,) = check(path)
    assert problem.key == "00000003" and "lite-2.class.npy" in problem.reason
    # Nobody who does not read it minds.
    assert sum(len(batch["key"]) for batch in ShardStream(path, 4, epochs=1, fields=["lite:2"])) == 12


def test_too_many_bad_class_tokens_stop_the_run(make_shards):
    spoilt = {f"{i:08d}": npy(np.full(6, np.nan, np.float16)) for i in range(6)}
    path, _ = make_shards([6, 6], change=with_class_tokens(spoilt), teachers=entry())
    with pytest.raises(RunError, match="not finite"):
        list(ShardStream(path, 4, epochs=1, fields=["lite:2.class"], max_bad_fraction=0.1))


def test_a_data_set_from_before_says_how_to_add_them(make_shards):
    path, _ = make_shards([5, 4])
    with pytest.raises(UsageError) as caught:
        ShardStream(path, 3, fields=["lite:2.class"])
    line = str(caught.value)
    assert f"maskalign data encode --data {path} --teacher lite:2 --class-token only" in line and "\n" not in line
    assert sum(len(batch["key"]) for batch in ShardStream(path, 3, epochs=1)) == 9
    with pytest.raises(UsageError, match="there is no 'other.class'; it has image, lite:2"):
        ShardStream(path, 3, fields=["other.class"])


def test_data_sets_are_mixed_where_their_class_tokens_agree(make_shards):
    mean = {"kind": "mean"} | STATISTICS
    components = {"components": {"mean": [0.0] * 6, "basis": [[1.0, 0, 0, 0, 0, 0]], "scale": [1.0]}}
    sets = {
        name: make_shards([4], name=name, first=10 * i, change=with_class_tokens(), teachers=teachers)[0]
        for i, (name, teachers) in enumerate(
            {
                "one": entry(**mean, **components),
                "same": entry(**mean),
                "other": entry(**mean | {"std": [3.0] * 6}),
                "prefix": entry(),
                "old": {"lite:2": LITE},
            }.items()
        )
    }
    fields = ["lite:2.class"]
    keys = {key for b in ShardStream([sets["one"], sets["same"]], 4, epochs=1, fields=fields) for key in b["key"]}
    assert len(keys) == 8
    for name, words in (("other", r"cannot be mixed: other class tokens of 'lite:2' \(std\)"), ("prefix", "kind")):
        with pytest.raises(UsageError, match=words):
            ShardStream([sets["one"], sets[name]], 4, fields=fields)
    with pytest.raises(UsageError, match=f"{sets['old']}: it has rows .*--class-token only"):
        ShardStream([sets["one"], sets["old"]], 4, fields=fields)
    for name in ("other", "old", "prefix"):  # where they are not read, they may be what they like
        next(iter(ShardStream([sets["one"], sets[name]], 4)))


def test_remote_data_sets_have_class_tokens_too(make_shards):
    import fsspec

    path, truth = make_shards([5, 4], change=with_class_tokens(), teachers=entry())
    memory = fsspec.filesystem("memory")
    memory.put(path, "/class-tokens", recursive=True)
    try:
        seen = {}
        for batch in ShardStream("memory://class-tokens", 3, epochs=1, fields=["lite:2.class"]):
            seen |= dict(zip(batch["key"], batch["lite:2.class"].numpy().copy(), strict=True))
    finally:
        memory.rm("/class-tokens", recursive=True)
    assert set(seen) == set(truth) and all(np.array_equal(seen[key], class_of(key)) for key in seen)


def components(**changes):
    return {"components": {"mean": [0.0] * 6, "basis": [[1.0] + [0.0] * 5] * 2, "scale": [1.0, 0.5]} | changes}


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ({"lite:2": LITE | {"class_token": [1]}}, "is not an object"),
        (entry(dim=7), "has dim 7, the rows have 6"),
        (entry(dim=True), "has dim True"),
        (entry(dtype="int8"), "has dtype 'int8', not float16"),
        (entry(kind="max"), "has kind 'max'"),
        (entry(kind="mean"), "has no usable mean of 6"),
        (entry(kind="mean", **STATISTICS | {"std": [1.0] * 5}), "no usable std of 6"),
        (entry(kind="mean", **STATISTICS | {"std": [0.0] * 6}), "no usable std"),
        (entry(mean=[float("nan")] * 6), "no usable mean"),
        (entry(mean=["x"] * 6), "no usable mean"),
        (entry(components=[]), "components that are not an object"),
        (entry(**components(mean=[0.0])), r"components that are not mean \[6\]"),
        (entry(**components(basis=[])), "components that are not"),
        (entry(**components(basis=[[1.0] * 5] * 2)), "components that are not"),
        (entry(**components(scale=[1.0])), "components that are not"),
        (entry(**components(scale=[1.0, 0.0])), "components that are not"),
        (entry(**components(scale=[1.0, float("inf")])), "components that are not"),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_refused(make_shards, teachers, words):
    path, _ = make_shards([3])
    with open(os.path.join(path, "manifest.json")) as file:
        text = json.load(file) | {"teachers": teachers}
    with open(os.path.join(path, "manifest.json"), "w") as file:
        json.dump(text, file)
    with pytest.raises(UsageError, match=f"teacher lite:2: class_token .*{words}") as caught:
        Manifest.load(path)
    assert "\n" not in str(caught.value)


def test_a_right_entry_is_read_and_written_unchanged(make_shards):
    teachers = entry(kind="mean", **STATISTICS, **components(), more="kept")
    path, _ = make_shards([3], teachers=teachers, change=with_class_tokens())
    manifest = Manifest.load(path)
    assert manifest.teachers == teachers
    manifest.save(path)
    assert Manifest.load(path).teachers == teachers
