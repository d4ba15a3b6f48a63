"""The folder of a checkpoint: its files, and whether it is complete. loading.py reads it, training/saving.py writes it.

    RUN/checkpoints/step_00000100/
        shard-*.safetensors   tensors named `kind/parameter`: model, ema, exp_avg, exp_avg_sq, step; one file per rank
        state.json            step, seconds, stream position, and the `ModelSpec` (facts)
        config.yaml           the full settings
        COMPLETE              written last: size and sha256 of every file

Tensors are saved with torch.distributed.checkpoint in safetensors files, and everything else as JSON, so that nothing
is ever unpickled. A folder without a matching COMPLETE is never read. After a crash while saving, the previous
checkpoint is therefore the newest one.
"""

import hashlib
import json
import logging
from pathlib import Path

from maskalign.errors import UsageError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MARKER = "COMPLETE"
PARTIAL = ".partial_"  # prefix of a save in progress or an interrupted save
ASIDE = "aside_"  # prefix of damaged checkpoints, and of later steps than the one that a run resumed from
PIECE = 16 * 2**20  # bytes that are hashed or written at once; both release the interpreter lock


def complete_checkpoints(run_dir):
    """Paths of a run's complete checkpoints, oldest first. Only the sizes of files are checked, see `is_complete`."""
    return sorted(path for path in Path(run_dir, FOLDER).glob("step_*") if is_complete(path))


def is_complete(path):
    """True if the marker exists and every file in it has the right size; `find_damage` also checks the contents."""
    return _find_size_damage(path) is None


def marked_files(checkpoint):
    """dict from file name to {"size", "sha256"} in the marker; old checkpoints have no sha256.

    Raises:
        OSError, ValueError: the marker does not exist or cannot be read.
    """
    marked = json.loads(Path(checkpoint, MARKER).read_text())
    if not isinstance(marked, dict):
        raise ValueError("no table of files")
    for name, entry in marked.items():
        # The keys are checked strictly, because a flipped bit in "sha256" would otherwise disable the checksum.
        if isinstance(entry, dict) and not (entry.keys() == {"size", "sha256"} and isinstance(entry["size"], int)):
            raise ValueError(f"{name} without its size and checksum")
        if not isinstance(entry, (dict, int)):
            raise ValueError(f"{name} without its size")
    return {name: entry if isinstance(entry, dict) else {"size": entry} for name, entry in marked.items()}


def _find_size_damage(checkpoint):
    try:
        files = marked_files(checkpoint)
    except FileNotFoundError:
        return f"{MARKER} is missing"
    except (OSError, ValueError) as error:
        return f"{MARKER} cannot be read ({error})"
    for name, entry in files.items():
        try:
            size = Path(checkpoint, name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
    return None


def find_damage(checkpoint, part=0, parts=1):
    """Read every file of a checkpoint and compare its checksum; returns None, or the damage in a few words.

    Args:
        checkpoint: folder of the checkpoint.
        part, parts: read only this part of the files, so that ranks can divide the work.
    """
    found = _find_size_damage(checkpoint)
    if found:
        return found
    for number, (name, entry) in enumerate(sorted(marked_files(checkpoint).items())):
        if number % parts == part and "sha256" in entry:
            try:
                if file_digest(Path(checkpoint, name))["sha256"] != entry["sha256"]:
                    return f"{name} has another checksum than when it was written"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
    return None


def newest_sound(run_dir, share=None):
    """The newest undamaged checkpoint of a run; all files are read.

    Args:
        run_dir: the run's folder.
        share: (rank, world size, function that gathers the values of all ranks as a list), to divide the work over
            several ranks, which all get the same result.

    Returns:
        (path or None, line or None): the line names the skipped checkpoints, and the one that is used instead.
    """
    rank, world_size, gather = share or (0, 1, lambda value: [value])
    passed = []
    # On a network file system the ranks may see different lists of files, so the list of rank 0 is used.
    candidates = gather(sorted(path.name for path in Path(run_dir, FOLDER).glob("step_*")))[0]
    chosen = None
    for name in reversed(candidates):
        path = Path(run_dir, FOLDER, name)
        problems = [problem for problem in gather(find_damage(path, rank, world_size)) if problem]
        if not problems:
            chosen = path
            break
        passed.append(f"{name} is damaged ({problems[0]})")
    partial = gather(sorted(path.name for path in Path(run_dir, FOLDER).glob(f"{PARTIAL}*")))[0]
    passed = [f"the save of {name.removeprefix(PARTIAL)} was cut off" for name in partial] + passed
    if not passed:
        return chosen, None
    instead = f"resuming from {chosen.name}, the newest complete one" if chosen else "there is no complete one before"
    return chosen, f"{Path(run_dir, FOLDER)}: {'; '.join(passed)}; {instead}"


def find(run_or_checkpoint):
    """The path itself if it is a checkpoint, or the newest undamaged checkpoint of a run.

    Damaged checkpoints that are skipped are named in a warning.

    Raises:
        UsageError: there is no complete checkpoint, or the given checkpoint is damaged.
    """
    path = Path(run_or_checkpoint)
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such run or checkpoint folder")
    if (path / MARKER).exists() or (path / "state.json").exists():
        problem = find_damage(path)
        if problem:
            raise UsageError(f"{path}: this checkpoint is damaged ({problem}); choose another one of its run")
        return path
    found, passed_over = newest_sound(path)
    if not found:
        raise UsageError(
            f"{passed_over or path}: holds no complete checkpoint; give a run folder of maskalign train, "
            "or a step_* folder"
        )
    if passed_over:
        log.warning("%s", passed_over)
    return found


def read_state(checkpoint):
    """The JSON part of a checkpoint.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return json.loads(Path(checkpoint, "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{checkpoint}: state.json cannot be read ({error}); choose another checkpoint") from None


def file_digest(path):
    """dict with a file's size in bytes and its sha256 as hexadecimal digits."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return {"size": size, "sha256": digest.hexdigest()}
