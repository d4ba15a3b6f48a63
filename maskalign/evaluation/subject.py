"""What is evaluated: a model, or existing pictures."""

from pathlib import Path

from maskalign.checkpoints.weight_files import ENDINGS
from maskalign.errors import UsageError
from maskalign.evaluation.pictures import PictureArchive, PictureDataSet, PictureFolder


def is_model(path):
    """Whether a path is a run, a checkpoint or a file of weights.

    Raises:
        UsageError: nothing is there.
    """
    path = Path(path)
    if path.is_dir():
        return any((path / name).exists() for name in ("checkpoints", "COMPLETE", "state.json"))
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a run, a checkpoint, a folder of pictures or an .npz")
    return path.suffix in ENDINGS


def open_pictures(path):
    """(kind, pictures) of a folder, a data set or an .npz.

    Raises:
        UsageError: it is none of them, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "manifest.json").exists():
            return "data set", PictureDataSet(str(path))
        return "folder", PictureFolder(path)
    if path.suffix != ".npz":
        raise UsageError(f"{path}: cannot tell what this is; give a run, a checkpoint, a folder of pictures or an .npz")
    return "npz", PictureArchive(path)
