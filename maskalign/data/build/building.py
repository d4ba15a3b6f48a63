"""`maskalign data build`: write a source of images as shards and a manifest. It can be stopped and resumed at any time.

The source is listed and shuffled, and the shuffled list is cut into shards. This is the plan, whose fingerprint is
stored in OUT/.build/plan.json. A shard depends only on its part of the plan. It is renamed into place when it is
complete, and then recorded in OUT/.build. The bytes written are therefore the same for any number of processes and
machines that share the folder, however often they are killed and restarted. The manifest is written last.
"""

import csv
import hashlib
import io
import json
import os
import random
import shutil
import time
from collections import Counter
from contextlib import ExitStack, closing

from maskalign.data.build.labels import check_names
from maskalign.data.build.listing import tell_passed
from maskalign.data.build.processes import LinePrinter, available_cores, in_processes, wait_for
from maskalign.data.format.manifest import FILE_NAME, IMAGE_FORMATS, Manifest, Shard
from maskalign.data.format.members import KEY as MEMBER_CHECKSUMS
from maskalign.data.format.members import KIND as MEMBER_CHECKSUM_KIND
from maskalign.data.format.tar_shards import shard_name
from maskalign.errors import RunError, UsageError
from maskalign.runtime.files import write_atomically
from maskalign.runtime.home import expand_home
from maskalign.runtime.lock import locked
from maskalign.runtime.outputs import is_run

WORK = ".build"
BAD_LIST = "bad.csv"
DEFAULT_SIZE = 32
FEW = 4000  # With fewer images, starting worker processes takes longer than they save.


def build(
    source,
    out,
    *,
    size=None,
    crop="adm",
    image_format="png",
    shard_size=None,
    workers=None,
    seed=0,
    max_bad_fraction=0.01,
    subset=None,
    class_names=None,
    class_folders=None,
    holes=None,
    exif="apply",
    license=None,
    root=None,
    rank=None,
    world_size=None,
    wait_seconds=1800.0,
    quiet=False,
):
    """Build a data set, or resume an interrupted build.

    Args:
        source: "openmoji", "torchvision:NAME", a folder, a .zip or .tar(.gz) with one folder per class, or webdataset
            shards (see `sources.open_source`).
        out: folder for the shards and manifest.json; created if it does not exist.
        size: side of the stored square RGB images in pixels. The default is 32, or the size of the pictures in a folder
            that REPA's or REG's scripts have prepared with latents.
        crop: "adm" (ADM's center crop) or "resize" (the whole image, without its aspect ratio).
        image_format: "png" or "webp" (both lossless), or "jpg".
        shard_size: samples per shard. The default is a 64th of the data set, between 64 and 2,048.
        workers: processes that prepare images; with 0 or 1, only this process. The default is one per CPU core, and
            only this process for fewer than 4,000 images.
        seed: seed of the order of the samples, which mixes the classes within a shard.
        max_bad_fraction: share of the images that may be unusable; they are skipped and listed in bad.csv.
        subset: part of the source to use, such as "train", where it has several.
        class_names: list of names for the integer labels of webdataset shards or a dataset.json.
        class_folders: which folders are the classes: "top", "leaf", "path" or "none", see `folders.group_by_class`.
            None uses the labels in dataset.json if there is one, else "top", if the folders are unambiguous.
        holes: "keep" or "close" the holes between class numbers, see `labels.number_classes`. With None, holes raise
            an error.
        exif: "apply" rotates photos according to their EXIF orientation; "ignore" uses the pixels as stored, as ADM and
            REPA do.
        license: license of the images, for the manifest.
        root: folder where torchvision finds or downloads its files.
        rank, world_size: the share of the shards that this process writes. The default is RANK and WORLD_SIZE, as
            torchrun sets them. Rank 0 waits for the others and writes the manifest.
        wait_seconds: how long to wait for other ranks while none of their shards appears.
        quiet: print nothing.

    Returns:
        The data set's `Manifest`.

    Raises:
        UsageError: a setting is invalid, the source is unusable, or `out` holds something else.
        RunError: too many bad images, a full disk or a killed worker.
    """
    _check_settings(size, crop, image_format, shard_size, workers, max_bad_fraction, exif)
    source, out = expand_home(os.fspath(source)), os.path.abspath(expand_home(os.fspath(out)))
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    say, job = LinePrinter(quiet or rank > 0), None
    if os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"{out} is a file; give a folder as --out")
    if os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(out):
        raise UsageError(f"source and output folder are the same: {out}; choose another --out")
    if is_run(out):
        raise UsageError(f"--out: {out} is the folder of a run; choose another one for the data set")
    lock = ExitStack()
    try:
        if rank == 0:
            lock.enter_context(locked(out, "maskalign data build"))
        os.makedirs(os.path.join(out, WORK), exist_ok=True)
        job = _plan(
            source, out, rank, wait_seconds,
            size=size, crop=crop, image_format=image_format, shard_size=shard_size, seed=seed, subset=subset,
            class_names=class_names, class_folders=class_folders, holes=holes, exif=exif, license=license, root=root,
        )  # fmt: skip
        if job.finished is not None:
            shutil.rmtree(job.work, ignore_errors=True)
            say(f"{out} is complete already: {_summary(job.finished)}")
            return job.finished
        _describe(job.found, say)
        started = time.monotonic()
        made = _make_shards(job, rank, world_size, workers, max_bad_fraction, say)
        if rank > 0:
            return wait_for(lambda: _finished(out, job.fingerprint), wait_seconds, "rank 0 to write the manifest")
        rate = f"{made / max(time.monotonic() - started, 1e-9):,.0f} images/s" if made else "nothing left to prepare"
        manifest, bad = _finish(job, max_bad_fraction, wait_seconds)
    except UsageError as error:
        rejected = [list(entry) for entry in getattr(error, "rejected", ())]
        if rejected and not any(name.endswith(".tar") or name == FILE_NAME for name in os.listdir(out)):
            _write_bad(out, rejected)
        _remove_empty(os.path.join(out, WORK), out)
        raise
    except OSError as error:
        _write_bad_so_far(job)
        raise RunError(f"cannot build {out}: {error.strerror or error} ({error.filename or out})") from error
    except (RunError, KeyboardInterrupt):
        _write_bad_so_far(job)
        raise
    finally:
        lock.close()
    say(f"{out}: {_summary(manifest)}, {rate}")
    if bad:
        say(f"skipped {len(bad):,} bad images, listed in {os.path.join(out, BAD_LIST)}; first: {': '.join(bad[0])}")
        unusable = {name for name, _ in bad}
        lost = {item.label for item in job.found.items}
        lost -= {item.label for item in job.found.items if item.name not in unusable}
        if lost:
            names = [job.found.class_names[label] for label in sorted(lost)]
            say(f"note: these classes have no usable image and cannot be learned: {_first(names)}")
    if manifest.license:
        say(f"license: {manifest.license}")
    return manifest


def _describe(found, say):
    """Print what was found in the source before the images are prepared: classes, skipped files, and notes."""
    counts = Counter(item.label for item in found.items)
    classes = [f"{name} ({counts[label]:,})" for label, name in enumerate(found.class_names)]
    noun = "class" if len(classes) == 1 else "classes"
    say(f"{len(classes):,} {noun} from {found.how or 'the source'}: {_first(classes, 10)}")
    for note in found.notes:
        say(f"note: {note}")
    if found.passed:
        say(f"skipped files that are not readable pictures: {tell_passed(found.passed)}")
    if found.rejected:
        say(f"{len(found.rejected):,} images cannot be used; first: {': '.join(found.rejected[0])}")
    if found.empty:
        say(f"{len(found.empty):,} folders contain no image and are not classes: {_first(found.empty)}")


def _first(names, most=5):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def read_names(path):
    """The lines of a text file of class names; line i is the name of label i. Raises UsageError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
            return check_names(names, f"class_names {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"class_names {path}: cannot be read ({error})") from None


def _check_settings(size, crop, image_format, shard_size, workers, max_bad_fraction, exif):
    if exif not in ("apply", "ignore"):
        raise UsageError(f"exif is {exif!r}; give apply or ignore")
    if size is not None and not 1 <= size <= 8192:
        raise UsageError(f"size is {size}; give a side between 1 and 8192 pixels")
    if crop not in ("adm", "resize"):
        raise UsageError(f"crop is {crop!r}; give adm or resize")
    if image_format not in IMAGE_FORMATS:
        raise UsageError(f"image_format is {image_format!r}; give one of {', '.join(IMAGE_FORMATS)}")
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"shard_size is {shard_size}; give at least 1 sample per shard")
    if workers is not None and workers < 0:
        raise UsageError(f"workers is {workers}; give 0 or more processes")
    if not 0 <= max_bad_fraction <= 1:
        raise UsageError(f"max_bad_fraction is {max_bad_fraction}; give a share between 0 and 1")


def _remove_empty(*folders):
    for folder in folders:
        if os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)


def _summary(manifest):
    return (
        f"{manifest.num_samples:,} images, {manifest.num_classes:,} classes, {len(manifest.shards):,} shards, "
        f"{manifest.bytes:,} bytes"
    )


# The plan


class _Job:
    """The plan of one data set: the shuffled items, cut into shards, and the paths of its files."""

    def __init__(self, found, out, settings, fingerprint, shard_size, seed):
        self.found, self.out, self.settings, self.fingerprint = found, out, settings, fingerprint
        self.work = os.path.join(out, WORK)
        order = list(range(len(found.items)))
        random.Random(seed).shuffle(order)
        self.order, self.shard_size = order, shard_size
        self.num_shards = -(-len(order) // shard_size)
        self.finished = None

    def part(self, shard):
        """[(key, item)] of one shard. Keys are numbers that are unique in the whole data set."""
        first = shard * self.shard_size
        width = max(8, len(str(len(self.order))))
        part = self.order[first : first + self.shard_size]
        return [(f"{first + i:0{width}d}", self.found.items[index]) for i, index in enumerate(part)]

    def task(self, shard):
        """The arguments of `make_shard`."""
        settings = {key: self.settings[key] for key in ("size", "crop", "image_format")}
        settings["exif"] = self.settings.get("exif", "ignore")
        path = os.path.join(self.out, shard_name(shard))
        return self.found.reader, self.part(shard), path, self.record_path(shard), settings

    def repaired(self, shard, record):
        """Whether an image that was bad when the shard was written can be read now."""
        from maskalign.data.build.prepare import load

        bad = {name for name, _ in record["bad"]}
        for _, item in self.part(shard) if bad else ():
            if item.name in bad:
                try:
                    load(self.found.reader, item, self.settings.get("exif", "ignore"))
                    return True
                except Exception:  # still bad
                    continue
        return False

    def record_path(self, shard):
        return os.path.join(self.work, f"{shard_name(shard)}.json")

    def record(self, shard):
        """The record of a finished shard. None if it is not finished, or its file has another size than recorded."""
        try:
            with open(self.record_path(shard), encoding="utf-8") as file:
                record = json.load(file)
            if os.path.getsize(os.path.join(self.out, shard_name(shard))) == record["shard"]["bytes"]:
                return record
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return None


def _plan(source, out, rank, wait_seconds, *, size, seed, shard_size, license, exif, crop, image_format, **listed):
    """List the source, and compare the plan with that in `out`, which must be empty or hold the same plan."""
    from maskalign.data.build.sources import open_source

    work = os.path.join(out, WORK)
    plan_path = os.path.join(work, "plan.json")
    if rank > 0:  # rank 0 downloads and unpacks
        ready = (plan_path, os.path.join(out, FILE_NAME))
        wait_for(lambda: any(map(os.path.exists, ready)), wait_seconds, "rank 0 to list the source")
    found = open_source(source, size=size, scratch=work, **listed)
    size = size or found.size or DEFAULT_SIZE
    if license is not None:
        found.license = license
    shard_size = shard_size or min(max(-(-len(found.items) // 64), 64), 2048)
    settings = {"source": found.name, "size": size, "shard_size": shard_size, "seed": seed}
    settings |= {"crop": crop, "image_format": image_format}
    listing = hashlib.sha256(found.identity.encode())
    for item in found.items:
        listing.update(f"{item.name}\0{item.label}\n".encode("utf-8", "surrogateescape"))
    for entry in (found.class_names, found.rejected, found.license):
        listing.update(json.dumps(entry).encode())
    settings["images"] = f"{len(found.items):,} ({listing.hexdigest()[:16]})"
    if found.photos and exif == "apply":  # older data sets have no such entry, which is the same as "ignore"
        settings["exif"] = exif
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if found.photos:
        settings["exif"] = exif
    job = _Job(found, out, settings, fingerprint, shard_size, seed)
    plan = {"fingerprint": fingerprint, "settings": settings}
    job.finished = _finished(out, fingerprint)
    previous = _read_plan(out, plan_path)
    if previous is not None and previous.get("fingerprint") != fingerprint and not _begun(out):
        # The other build was stopped before its first shard, so it can be replaced.
        if rank == 0:
            previous = None
        else:
            previous = wait_for(lambda: _replaced(out, plan_path, previous), wait_seconds, "rank 0 to list the source")
    if previous is None:
        strange = [name for name in sorted(os.listdir(out)) if name.endswith(".tar") or name == FILE_NAME]
        if strange:
            raise UsageError(f"{out} holds {strange[0]} of another data set; choose another --out, or delete it first")
        if rank == 0:
            write_atomically(plan_path, json.dumps(plan, indent=1).encode())
    elif previous.get("fingerprint") != fingerprint:
        old = previous.get("settings", {})
        old = {"exif": "ignore"} | old  # the value where the setting does not apply or did not exist yet
        changed = [key for key, value in settings.items() if old.get(key) != value]
        changes = ", ".join(f"{key} {old.get(key)!r} (now {settings[key]!r})" for key in changed)
        raise UsageError(
            f"{out} holds a data set built with other settings: {changes or 'another version'}; "
            "choose another --out, or delete it first"
        )
    return job


def _read_plan(out, path):
    """The plan in `out`, of an unfinished build or of the finished data set, or None."""
    if os.path.exists(os.path.join(out, FILE_NAME)):
        return Manifest.load(out).extra.get("build")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


def _begun(out):
    """Whether a folder holds shards or a manifest."""
    return any(name.endswith(".tar") or name == FILE_NAME for name in os.listdir(out))


def _replaced(out, path, old):
    """The plan in `out` if it differs from `old`, else None."""
    plan = _read_plan(out, path)
    return plan if plan != old else None


def _finished(out, fingerprint):
    """The manifest in `out` if it is that of this plan, else None. Raises RunError if one of its shards is missing."""
    if not os.path.exists(os.path.join(out, FILE_NAME)):
        return None
    manifest = Manifest.load(out)
    if manifest.extra.get("build", {}).get("fingerprint") != fingerprint:
        return None
    for shard in manifest.shards:
        path = manifest.shard_path(shard)
        if not os.path.exists(path) or os.path.getsize(path) != shard.bytes:
            raise RunError(
                f"{path} is missing or damaged in a finished data set; copy it back, or delete {out} and rerun"
            )
    return manifest


# The shards


def _make_shards(job, rank, world_size, workers, max_bad_fraction, say):
    """Write those of this rank's shards that do not exist yet; returns the number of images prepared."""
    from tqdm import tqdm

    from maskalign.data.build.prepare import make_shard

    mine = range(rank, job.num_shards, world_size)
    todo = [shard for shard in mine if (record := job.record(shard)) is None or job.repaired(shard, record)]
    total = sum(len(job.part(shard)) for shard in todo)
    if len(todo) < len(mine):
        say(f"resuming: {len(mine) - len(todo):,} of {len(mine):,} shards exist already")
    if workers is None:
        workers = 1 if total < FEW else available_cores()
    workers = min(workers, len(todo))
    bad = len(job.found.rejected)
    _limit_bad(job, bad, [], max_bad_fraction)
    # The bar is shown only on a terminal: in a log file, every update would be a separate line.
    with tqdm(total=total, unit="img", desc="build", disable=True if say.quiet else None) as bar:
        if workers <= 1:
            records = (make_shard(*job.task(shard), advance=bar.update) for shard in todo)
        else:
            records = in_processes(make_shard, map(job.task, todo), workers)
        with closing(records):
            for record in records:
                if workers > 1:
                    bar.update(record["shard"]["num_samples"] + len(record["bad"]))
                bad += len(record["bad"])
                _limit_bad(job, bad, record["bad"], max_bad_fraction)
    return total


def _limit_bad(job, bad, latest, max_bad_fraction):
    total = len(job.found.items) + len(job.found.rejected)
    if bad > max_bad_fraction * total:
        name, reason = (latest or job.found.rejected)[-1]
        raise RunError(
            f"{bad:,} of {total:,} images are bad, over max_bad_fraction {max_bad_fraction}; the last: {name}: "
            f"{reason}; repair the source, or allow more with --max_bad_fraction; {os.path.join(job.out, BAD_LIST)} "
            "lists what was found so far"
        )


def _write_bad(out, bad):
    """Write bad.csv from [[name, reason]]."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([["image", "reason"], *sorted(bad)])
    write_atomically(os.path.join(out, BAD_LIST), lines.getvalue().encode("utf-8", "backslashreplace"))


def _write_bad_so_far(job):
    """Write bad.csv for a build that ends early, if the disk allows it."""
    if job is None:
        return
    bad = [list(entry) for entry in job.found.rejected]
    try:
        for shard in range(job.num_shards):
            bad += (job.record(shard) or {}).get("bad", [])
        if bad:
            _write_bad(job.out, bad)
    except OSError:  # the error that ended the build is the one to report
        return


# The end


def _finish(job, max_bad_fraction, wait_seconds):
    """Wait for all shards, then write bad.csv and the manifest; returns (manifest, list of bad images)."""
    records = [
        wait_for(lambda shard=shard: job.record(shard), wait_seconds, f"{shard_name(shard)} of another rank")
        for shard in range(job.num_shards)
    ]
    bad = [list(entry) for entry in job.found.rejected]
    bad = sorted(bad + [entry for record in records for entry in record["bad"]])
    if bad:
        _limit_bad(job, len(bad), bad, max_bad_fraction)
        _write_bad(job.out, bad)
    elif os.path.exists(os.path.join(job.out, BAD_LIST)):
        os.unlink(os.path.join(job.out, BAD_LIST))  # left by an earlier attempt; its images are repaired
    shards = [Shard(**record["shard"]) for record in records]
    if not any(shard.num_samples for shard in shards):
        raise RunError(f"none of the {len(bad):,} images is usable; the first: {': '.join(bad[0])}")
    manifest = Manifest(
        num_samples=sum(shard.num_samples for shard in shards),
        resolution=job.settings["size"],
        class_names=job.found.class_names,
        shards=shards,
        image_format=job.settings["image_format"],
        latent=job.found.latent,
        license=job.found.license,
        source=job.found.name,
        extra={
            MEMBER_CHECKSUMS: MEMBER_CHECKSUM_KIND,
            **({"exif": job.settings["exif"]} if job.found.photos else {}),
            "build": {"fingerprint": job.fingerprint, "settings": job.settings},
        },
        root=job.out,
    )
    manifest.save(job.out)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest, bad
