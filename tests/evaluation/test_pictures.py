"""Pictures from folders, archives and data sets: the same pixels, and one clear line where they cannot be read."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign.errors import UsageError
from maskalign.evaluation.pictures import PictureArchive, PictureDataSet, PictureFolder
from tests.on_disk import random_pictures, write_pictures


def joined(source, size):
    batches = list(source.batches(size))
    assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def test_the_same_pictures_from_a_folder_and_from_an_archive(tmp_path):
    arrays = random_pictures(7)
    folder = PictureFolder(write_pictures(tmp_path / "a" / "b", arrays).parent)
    np.savez(tmp_path / "stored.npz", arrays)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=arrays, arr_1=np.arange(7))
    for source in (folder, PictureArchive(tmp_path / "stored.npz"), PictureArchive(tmp_path / "packed.npz")):
        assert source.count == 7 and source.size == (16, 16)
        assert np.array_equal(joined(source, 3), arrays) and np.array_equal(joined(source, 64), arrays)


def test_a_data_set_gives_the_same_pictures_in_any_batches(data):
    whole, part = PictureDataSet(data), PictureDataSet(data, 20)
    everything = joined(whole, 48)
    assert everything.shape == (48, 16, 16, 3) and len(whole.labels) == 48
    assert np.array_equal(joined(part, 7), everything[:20]) and torch.equal(part.labels, whole.labels[:20])


def test_chosen_classes_are_counted_alone(data):
    whole, bees, pair = PictureDataSet(data), PictureDataSet(data, 10, [1]), PictureDataSet(data, 0, [2, 0])
    everything = joined(whole, 48)
    found = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in bees.batches(7)])
    assert np.array_equal(found, everything[(whole.labels == 1).numpy()][:10])
    assert bees.count == 10 and set(bees.labels.tolist()) == {1}
    found = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in pair.batches(7)])
    assert np.array_equal(found, everything[(whole.labels != 1).numpy()]) and pair.count == 32


def archive(path, write):
    with zipfile.ZipFile(path, "w") as file:
        write(file)
    return path


def broken(kind, path):
    arrays = random_pictures(3)
    if kind == "text":
        path.write_text("not an archive")
    elif kind == "cut":
        np.savez(path, arrays)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "header":
        archive(path, lambda file: file.writestr("arr_0.npy", b"\x93NUMPY\x01\x00nonsense"))
    elif kind == "short":
        np.save(path.with_suffix(".npy"), arrays)
        data = path.with_suffix(".npy").read_bytes()[:-100]
        archive(path, lambda file: file.writestr("arr_0.npy", data))
    elif kind == "flipped":  # a stored member whose checksum is wrong
        np.savez(path, arrays)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    elif kind == "objects":
        np.savez(path, np.array([{"a": 1}], dtype=object))
    elif kind == "name":
        np.savez(path, pictures=arrays)
    elif kind == "nan":
        values = arrays.astype(np.float32)
        values[1, 2, 3] = np.nan
        np.savez(path, values)
    elif kind == "gray":
        np.savez(path, arrays[..., 0])
    elif kind == "empty":
        np.savez(path, arrays[:0])
    return path


@pytest.mark.parametrize(
    "kind, match",
    [
        ("text", "not a readable .npz"), ("cut", "not a readable .npz"), ("header", "not a readable .npz"),
        ("short", "ends before its 3 pictures"), ("flipped", "not a readable .npz"), ("objects", "never unpickled"),
        ("name", "holds pictures and no arr_0"), ("nan", "3 numbers that are NaN"), ("gray", "uint8 \\(3, 16, 16\\)"),
        ("empty", "\\(0, 16, 16, 3\\)"),
    ],
)  # fmt: skip
def test_archives_that_cannot_be_used(kind, match, tmp_path):
    path = broken(kind, tmp_path / "samples.npz")
    with pytest.raises(UsageError, match=match) as error:
        joined(PictureArchive(path), 2)
    assert "samples.npz" in str(error.value) and "\n" not in str(error.value)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UsageError, match="holds no pictures and is not a run"):
        PictureFolder(tmp_path)
    folder = write_pictures(tmp_path / "a", random_pictures(3))
    (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:100])
    with pytest.raises(UsageError, match="0001.png: not a usable picture"):
        joined(PictureFolder(folder), 2)
    Image.new("RGB", (20, 16)).save(folder / "0001.png")
    with pytest.raises(UsageError, match="0001.png is 20x16, 0000.png is 16x16"):
        joined(PictureFolder(folder), 2)
    floating = tmp_path / "b"
    floating.mkdir()
    Image.fromarray(np.full((16, 16), np.nan, dtype=np.float32)).save(floating / "a.tiff")
    with pytest.raises(UsageError, match="a.tiff: .*floating-point"):
        joined(PictureFolder(floating), 2)
