"""Find out whether a source is a model or existing images."""

from pathlib import Path

from maskalign.checkpoints.sources import ENDINGS, check_source, is_remote
from maskalign.errors import UsageError
from maskalign.evaluation.pictures import PictureArchive, PictureDataSet, PictureFolder


def is_model(path):
    """True if a source is a run, a checkpoint or a file of weights.

    Raises:
        UsageError: the path does not exist, or the name is not known.
    """
    check_source(path, what="a run, a checkpoint, a folder of pictures or an .npz")
    if is_remote(path):
        return True
    path = Path(path)
    if path.is_dir():
        return any((path / name).exists() for name in ("checkpoints", "COMPLETE", "state.json"))
    return path.suffix in ENDINGS


def open_pictures(path):
    """(kind, pictures) for a folder, a data set or an .npz; kind is text, pictures an object with `batches`.

    Raises:
        UsageError: the path is none of these, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return "data set", PictureDataSet(str(path))
        return "folder", PictureFolder(path)
    if path.suffix != ".npz":
        raise UsageError(f"{path}: cannot tell what this is; give a run, a checkpoint, a folder of pictures or an .npz")
    return "npz", PictureArchive(path)
