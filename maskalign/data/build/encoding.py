"""`maskalign data encode`: add teacher features and VAE moments to the images. It can be stopped and resumed any time.

New shards are written under the old names to a folder DATA/.encode-ID, where ID identifies the settings and the old
shards. The data set does not change until the last new shard is complete. Then the new manifest is written to that
folder; from this point on, the change is only completed, never undone. The new shards are renamed over the old ones,
and manifest.json is written. A shard depends only on the settings and the old shard. The bytes written are therefore
the same for any number of processes and machines that share the folder, however often they are killed and restarted.

A teacher's rows and its class token come from one pass of its network. An earlier pass over a few hundred images
estimates the statistics that must be known before: mean tokens, and the mean and standard deviation of class tokens
that are averages of tokens. The principal components of class tokens are computed at the end, from the stored tokens.

Disk space: ImageNet (1,281,167 images) with DINOv2-B, 256 tokens of 768 numbers, takes 252 GB as int8 and 504 GB as
float16; class tokens, always float16, add 3 GB. An encoding in place needs space for the old and the new shards.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace

from maskalign.config.teacher_names import check_normalization, parse_teachers
from maskalign.data.build.processes import LinePrinter, in_processes, wait_for
from maskalign.data.build.recipe import IMAGENET_IMAGES, Recipe, Wanted, check_vae, entry_bytes, weights_label
from maskalign.data.build.staging import Staging, finish_commits, read_json
from maskalign.data.format.manifest import FILE_NAME, Manifest, is_url
from maskalign.errors import RunError, UsageError
from maskalign.runtime.files import write_atomically
from maskalign.runtime.lock import locked
from maskalign.runtime.outputs import is_run
from maskalign.teachers.hub import check_weights

CLASS_TOKEN = ("both", "only", "none")


def encode(
    data,
    *,
    teacher=None,
    latents=None,
    out=None,
    dtype="int8",
    grid=None,
    normalize="none",
    batch_size=None,
    workers=None,
    hflip=False,
    class_token="both",
    class_components=64,
    weights=None,
    device="auto",
    dry_run=False,
    rank=None,
    world_size=None,
    wait_seconds=1800.0,
    quiet=False,
):
    """Add teacher features and VAE moments to a data set, or resume an interrupted encoding.

    Args:
        data: folder of the data set (or its URL, with `out`).
        teacher: names of teachers, a list or separated by commas; None for none.
        latents: name or local folder of a diffusers AutoencoderKL; None for none.
        out: another folder for the result. By default, the data set's shards are replaced at the end, all together.
        dtype: dtype of teacher features: "int8" (every token is scaled by its largest magnitude) or "float16". Moments
            are float16.
        grid: (gh, gw) or side of the token grid to which features are resampled, such as the student's. None keeps the
            teacher's grid.
        normalize: "none", "spatial" (iREPA, per image over the tokens), or "mean" (subtract the data set's mean token,
            which is estimated from a fixed sample and stored in the manifest).
        batch_size: images per batch; the default is 8 on CPUs and 64 on GPUs.
        workers: number of processes; the default is one per GPU, or a single one that uses all cores on CPUs.
        hflip: store the features of the mirrored images too; training draws one of the two.
        class_token: "both" stores the teachers' rows and class tokens, or only the class tokens where the data set has
            the rows in these settings already. "only" adds class tokens to a data set with rows, which are not changed.
            "none" stores no class tokens.
        class_components: number of leading principal components of the class tokens to store in the manifest, for
            `model.class_token_dim`; 0 for none. There are fewer if the class token has fewer dimensions, or if there
            are fewer images.
        weights: "hub", "random" or a file, one for all teachers or one for each, separated by commas. The default is
            the hub (efficientnet-lite0: the installed weights).
        device: "auto", "cpu", "cuda" or "cuda:N".
        dry_run: only print the size of the new features.
        rank, world_size: the share of the shards that this process encodes. The default is RANK and WORLD_SIZE, as
            torchrun sets them. Rank 0 waits for the others and puts the result in place.
        wait_seconds: how long to wait for other ranks while none of their shards appears.
        quiet: print nothing.

    Returns:
        The `Manifest` of the encoded data set (of the old one after a dry run).

    Raises:
        UsageError: a setting is invalid, or there is no such teacher or VAE.
        RunError: damaged shards, a full disk or a killed worker.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    say = LinePrinter(quiet or rank > 0)
    names = parse_teachers(teacher)
    grid = _check_settings(names, latents, dtype, grid, normalize, batch_size, workers, device)
    if class_token not in CLASS_TOKEN:
        raise UsageError(f"class_token is {class_token!r}; give {', '.join(CLASS_TOKEN[:-1])} or {CLASS_TOKEN[-1]}")
    if class_token == "only" and not names:
        raise UsageError("class_token only: no teacher is given; add --teacher NAME")
    if class_components < 0:
        raise UsageError(f"class_components is {class_components}; give a number of at least 0")
    files = _weights_of(names, weights)
    target = os.path.abspath(out) if out is not None else None
    if target is None and is_url(os.fspath(data)):
        raise UsageError(f"data set {data} is not a local folder; give a folder for the result with --out")
    target = target or os.path.abspath(data)
    if is_run(target):
        raise UsageError(f"--out: {target} is the folder of a run; choose another one for the data set")
    if out is None:
        Manifest.load(data)  # raises an error before a folder is created
    lock = ExitStack()
    try:
        if rank == 0:
            if not dry_run:
                lock.enter_context(locked(target, "maskalign data encode", "--out" if out else "--data"))
            finish_commits(target)
        recipe = Recipe(
            tuple(map(Wanted, names, files)),
            str(latents) if latents else None,
            dtype,
            grid,
            normalize,
            hflip,
            batch_size,
            class_components,
        )
        job = _plan(data, target, recipe, class_token, dry_run or rank > 0, say)
        if job is None:
            return Manifest.load(target)
        if rank == 0 and not dry_run:
            job.begin()
        try:
            return _run(job, rank, world_size, workers, device, wait_seconds, dry_run, say)
        except BaseException:
            if world_size == 1 and not dry_run and not job.can_resume():  # others may write there
                shutil.rmtree(job.work, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(f"cannot encode {target}: {error.strerror or error} ({error.filename or target})") from error
    finally:
        lock.close()


def _check_settings(names, latents, dtype, grid, normalize, batch_size, workers, device):
    """Check the settings, raising UsageError; returns the grid as (gh, gw) or None."""
    if not names and not latents:
        raise UsageError("nothing to encode: give --teacher NAME, --latents NAME, or both")
    if dtype not in ("int8", "float16"):
        raise UsageError(f"dtype is {dtype!r}; give int8 or float16")
    check_normalization(normalize)
    if grid is not None:
        sides = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= 1024 for side in sides):
            raise UsageError(f"grid is {grid!r}; give the rows and columns of a token grid, such as 16 or [16, 16]")
        grid = sides
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; give at least 1 image")
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}; give at least 1 process")
    if device != "auto" and device.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"device is {device!r}; give auto, cpu, cuda or cuda:N")
    return grid


def _weights_of(names, weights):
    """The weights of each teacher: a list as long as `names`, of str or None."""
    files = [None] if weights is None else weights.split(",") if isinstance(weights, str) else list(weights)
    if len(files) not in (1, len(names)) and names:
        raise UsageError(f"{len(names)} teachers but {len(files)} weights; give one for all or one for each")
    files = [str(file) if file else None for file in (files * len(names) if len(files) == 1 else files)]
    return files


# The plan


def _plan(data, target, recipe, class_token, only_look, say):
    """Compare the requested features with those that the data set has.

    Args:
        data: folder or URL of the data set.
        target: folder of the result.
        recipe: all requested features.
        class_token: "both", "only" or "none".
        only_look: do not change the manifest where nothing else has to change.
        say: prints a line.

    Returns:
        A `Staging` with a recipe for the missing features, or None if none is missing.
    """
    manifest = Manifest.load(data)
    in_place = not is_url(manifest.root) and os.path.realpath(manifest.root) == os.path.realpath(target)
    if manifest.image_format is None:
        raise UsageError(f"data set {data} holds no images to encode")
    present = Manifest.load(target) if in_place or os.path.exists(os.path.join(target, FILE_NAME)) else None
    if class_token == "only":
        _check_rows(present or manifest, recipe.teachers, data)
    kept = _kept(manifest, recipe, class_token == "only")
    if kept and manifest.hflip and not recipe.hflip:
        say("the data set has mirrored features already: the new ones are stored mirrored too")
        recipe = replace(recipe, hflip=True)
    latents, renew = recipe.latents, []
    if present is not None:
        wanted, renew = _missing(present, recipe, class_token)
        latent_done = latents and present.latent and present.latent.get("name") == latents
        latent_done = latent_done and present.hflip == recipe.hflip
        latents = None if latent_done else latents
        if not wanted and not latents and not renew:
            what = ", ".join([*[name for name, *_ in recipe.teachers], *([recipe.latents] if recipe.latents else [])])
            say(f"{target} already has {what} with these settings: nothing to do")
            return None
        if not in_place:
            raise UsageError(f"{target} holds another data set; encode that in place, or choose another --out")
        if not wanted and not latents:
            if only_look:
                say(f"{target}: only principal components of class tokens are missing, which need no encoding")
            else:
                _renew_components(present, target, renew, recipe.class_components, say)
            return None
        for teacher in wanted:
            if teacher.rows and teacher.name in present.teachers:
                say(f"the features of {teacher.name} are replaced: they were encoded with other settings")
    else:
        rows, tokens = class_token != "only", class_token != "none"
        wanted = [teacher._replace(rows=rows, class_token=tokens) for teacher in recipe.teachers]
    recipe = replace(recipe, teachers=tuple(wanted), latents=latents)
    kept = _kept(manifest, recipe, False)
    if recipe.hflip and kept and not manifest.hflip:
        raise UsageError(
            f"hflip: {', '.join(kept)} of {data} were encoded without the mirrored images; name them in the same call, "
            "so that every feature has its mirrored twin"
        )
    state = {"shards": [asdict(shard) for shard in manifest.shards], "recipe": asdict(replace(recipe, batch_size=None))}
    fingerprint = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    for teacher in recipe.teachers:
        check_weights(teacher.name, teacher.weights)
    if recipe.latents:
        check_vae(recipe.latents)
    job = Staging(manifest, target, recipe, fingerprint)
    job.renew = renew
    for folder in job.other_encodings():
        if job.can_resume(folder):
            say(f"{folder} is left from an encoding with other settings: finish that encoding, or delete the folder")
        elif not only_look:  # it was stopped before its first shard, or its shards have been replaced since
            shutil.rmtree(folder, ignore_errors=True)
    return job


def _kept(manifest, recipe, all_rows):
    """The features that the data set has and keeps: teachers whose rows are not rewritten, and "latents"."""
    new = [] if all_rows else [teacher.name for teacher in recipe.teachers if teacher.rows]
    kept = [name for name in manifest.teachers if name not in new]
    return kept + (["latents"] if manifest.latent and not recipe.latents else [])


def _check_rows(manifest, teachers, data):
    """Check that the data set has rows of these teachers, from the same weights; raises UsageError."""
    for name, weights, *_ in teachers:
        entry = manifest.teachers.get(name)
        if entry is None:
            raise UsageError(f"class_token only: {data} has no rows of {name!r} yet; omit --class-token")
        label = entry.get("weights", "default")
        if label != weights_label(weights):
            raise UsageError(
                f"class_token only: the rows of {name!r} were encoded with the weights {label}, these are "
                f"{weights_label(weights)}; give the same --weights"
            )


def _missing(present, recipe, class_token):
    """The features of a recipe that a data set does not have.

    Args:
        present: the `Manifest` of the data set.
        recipe: the requested features.
        class_token: "both", "only" or "none".

    Returns:
        (the `Wanted` of teachers that have to be run, names of teachers whose class tokens lack only principal
        components).
    """
    wanted, renew = [], []
    for teacher in recipe.teachers:
        entry = present.teachers.get(teacher.name)
        rows = class_token != "only" and not _same_rows(entry, teacher.weights, present.hflip, recipe)
        stored = None if rows else entry.get("class_token")
        tokens = class_token != "none" and stored is None
        if rows or tokens:
            wanted.append(teacher._replace(rows=rows, class_token=tokens))
        elif class_token != "none":
            components = stored.get("components") or {}
            asked = components.get("requested", len(components.get("basis", ())))
            renew += [teacher.name] if asked < recipe.class_components else []
    return wanted, renew


def _same_rows(entry, weights, hflip, recipe):
    """Whether the rows of a teacher's manifest entry have the settings of a recipe."""
    if entry is None:
        return False
    old = {key: entry.get(key, "none") for key in ("dtype", "normalize")} | {"hflip": hflip}
    old["grid"] = entry["grid"] if entry.get("resampled") else None
    grid = list(recipe.grid) if recipe.grid else None
    new = {"dtype": recipe.dtype, "normalize": recipe.normalize, "hflip": recipe.hflip, "grid": grid}
    return old == new and entry.get("weights", "default") == weights_label(weights)


def _renew_components(manifest, target, names, most, say):
    """Compute more principal components of stored class tokens; only the manifest changes."""
    teachers = manifest.teachers | _with_components(manifest, manifest.shard_path, names, most, say)
    replace(manifest, teachers=teachers).save(target)
    say(f"{target}: principal components of the class tokens of {', '.join(names)}; nothing else to do")


def estimate_bytes(manifest, recipe, latent, teachers):
    """Bytes of the new tar members for all samples.

    Args:
        manifest: of the data set.
        recipe: the features to add.
        latent, teachers: their manifest entries, see `FeatureMaker.entries`.
    """
    new = [latent] if latent else []
    for wanted in recipe.teachers:
        entry = teachers[wanted.name]
        new += [entry] if wanted.rows else []
        if wanted.class_token:
            new.append({"shape": [entry["class_token"]["dim"]], "dtype": entry["class_token"]["dtype"]})
    each = sum(map(entry_bytes, new))
    return manifest.num_samples * each * (2 if recipe.hflip else 1)


# The work


def _run(job, rank, world_size, workers, device, wait_seconds, dry_run, say):
    from maskalign.data.build.features import FeatureMaker

    started = time.monotonic()
    devices, workers, threads = _layout(device, workers)
    batch = job.recipe.batch_size or (64 if devices[0].startswith("cuda") else 8)
    job.recipe = replace(job.recipe, batch_size=batch)
    maker = FeatureMaker(job.recipe, job.manifest, devices[0], threads)
    latent, teachers = maker.entries()
    size = estimate_bytes(job.manifest, job.recipe, latent, teachers)
    _say_size(say, job, latent, teachers, size)
    if dry_run:
        return job.manifest
    if rank > 0:
        wait_for(lambda: os.path.exists(job.work) or job.finished(), wait_seconds, "rank 0 to begin")
    if job.finished():
        return Manifest.load(job.target)
    mine = list(range(rank, len(job.manifest.shards), world_size))
    todo = [number for number in mine if job.record(job.manifest.shards[number]) is None]
    if len(todo) < len(mine):
        say(f"resuming: {len(mine) - len(todo):,} of {len(mine):,} shards exist already")
    if rank == 0:
        _check_space(job, size)
    total = sum(job.manifest.shards[number].num_samples for number in todo)
    with _progress(total, say, "encode") as advance:
        if maker.in_need():
            maker.statistics = _statistics(job, maker, rank, wait_seconds, say)
            latent, teachers = maker.entries()
        workers = min(workers, max(1, len(todo)))
        if workers == 1:
            with maker:
                for number in todo:
                    _encode_shard(job, maker, number, advance)
        else:
            statistics, maker = maker.statistics, None
            _in_processes(job, todo, workers, devices, threads, statistics, advance)
    seconds = max(time.monotonic() - started, 1e-9)
    if rank > 0:
        wait_for(job.finished, wait_seconds, "rank 0 to put the result in place")
        return Manifest.load(job.target)
    new = replace(job.wait(wait_seconds), teachers=job.manifest.teachers | teachers)
    with_class = [wanted.name for wanted in job.recipe.teachers if wanted.class_token] + list(job.renew)
    teachers |= _with_components(new, job.path, with_class, job.recipe.class_components, say)
    manifest = job.commit(latent, teachers)
    say(
        f"{job.target}: {total:,} images encoded in {seconds:,.1f} s, {total / seconds:,.1f} images/s; "
        f"{manifest.bytes:,} bytes in {len(manifest.shards):,} shards"
    )
    return manifest


def _layout(device, workers):
    """(devices, processes, threads per process) of this process; torchrun starts one rank per GPU."""
    import torch

    local_rank, local_size = (
        int(os.environ.get(key, default)) for key, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and not gpus:
        raise UsageError(f"device is {device!r}, but torch sees no GPU here; give cpu or auto")
    if device == "cpu" or (device == "auto" and not gpus):
        devices = ["cpu"]
    elif ":" in device:
        devices = [device]
    elif "LOCAL_RANK" in os.environ:
        devices = [f"cuda:{local_rank % gpus}"]
    else:
        devices = [f"cuda:{number}" for number in range(gpus)]
    workers = workers or len(devices)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return devices, workers, max(1, cores // (workers * local_size))


def _say_size(say, job, latent, teachers, size):
    manifest, twice = job.manifest, " and mirrored" if job.recipe.hflip else ""
    parts = []
    for wanted in job.recipe.teachers:
        entry = teachers[wanted.name]
        rows = f"{entry['tokens']}x{entry['dim']} {entry['dtype']}" if wanted.rows else ""
        class_token = f"class token {entry['class_token']['dim']} float16" if wanted.class_token else ""
        parts.append(f"{wanted.name} {rows}{' and ' if rows and class_token else ''}{class_token}")
    parts += [f"moments {'x'.join(map(str, latent['shape']))} {latent['dtype']}"] if latent else []
    each = size // max(1, manifest.num_samples)
    say(
        f"encoding {manifest.num_samples:,} images in {len(manifest.shards):,} shards: {', '.join(parts)}{twice}: "
        f"{each:,} bytes per image, {_human(size)} in total (it would be {_human(each * IMAGENET_IMAGES)} for ImageNet)"
    )


def _check_space(job, size):
    present = sum(os.path.getsize(job.path(s)) for s in job.manifest.shards if job.record(s))
    needed = job.manifest.bytes + size - present
    free = shutil.disk_usage(job.work).free
    if needed > free:
        raise RunError(
            f"{job.target}: the new shards need {_human(needed)}, the disk has {_human(free)} free; "
            "free some space, or choose another folder with --out"
        )


def _statistics(job, maker, rank, wait_seconds, say):
    """The statistics of the first pass: rank 0 estimates them, and all ranks read them from the same file."""
    from maskalign.data.build.features import mean_sample

    path = os.path.join(job.work, "statistics.json")
    if rank == 0 and read_json(path) is None:
        count = sum(len(positions) for positions in mean_sample(job.manifest).values())
        if not count:
            raise UsageError(f"{job.target} has no samples to estimate statistics of its features from")
        with _progress(count, say, "statistics") as advance, maker:
            write_atomically(path, json.dumps(maker.estimate_statistics(advance)).encode())
    return wait_for(lambda: read_json(path), wait_seconds, "rank 0 to estimate statistics of the features")


def _with_components(manifest, path_of, names, most, say):
    """{teacher: manifest entry} with the principal components of the stored class tokens.

    Args:
        manifest: whose shards hold the class tokens.
        path_of: function from a `Shard` to its local path.
        names: the teachers.
        most: the maximum number of components.
        say: prints a line.
    """
    from maskalign.data.build.class_tokens import add_components, read_class_tokens

    entries = {}
    for name in names:
        entry, values = manifest.teachers[name], read_class_tokens(manifest, path_of, name)
        class_token = add_components(entry["class_token"], values, most)
        entries[name] = entry | {"class_token": class_token}
        count = len(class_token.get("components", {}).get("basis", ()))
        if count < most:
            images, dim = values.shape
            say(f"{name}: {images:,} class tokens of {dim} numbers have {count} principal components, not {most}")
    return entries


def _encode_shard(job, maker, number, advance):
    from maskalign.data.format.tar_shards import write_shard

    shard = job.manifest.shards[number]
    new = write_shard(job.path(shard), maker.samples(number, advance))
    write_atomically(f"{job.path(shard)}.json", json.dumps(asdict(new)).encode())


_worker = {}


def _set_up(job, devices, threads, statistics, counter, numbers):
    from maskalign.data.build.features import FeatureMaker

    with numbers.get_lock():
        device = devices[numbers.value % len(devices)]
        numbers.value += 1
    maker = FeatureMaker(job.recipe, job.manifest, device, threads)
    maker.statistics = statistics
    _worker.update(job=job, counter=counter, maker=maker.__enter__())


def _work(number):
    def advance(images):
        with _worker["counter"].get_lock():
            _worker["counter"].value += images

    _encode_shard(_worker["job"], _worker["maker"], number, advance)


def _in_processes(job, todo, workers, devices, threads, statistics, advance):
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # the same context as that of the pool
    counter, numbers = context.Value("Q", 0), context.Value("i", 0)
    shown = 0

    def show():
        nonlocal shown
        seen = counter.value
        advance(seen - shown)
        shown = seen

    shared = (job, devices, threads, statistics, counter, numbers)
    tasks = ((number,) for number in todo)
    with closing(in_processes(_work, tasks, workers, set_up=_set_up, shared=shared, meanwhile=show)) as done:
        for _ in done:
            show()


@contextmanager
def _progress(total, say, what):
    """Show a progress bar in images, only on a terminal; yields its `update`."""
    from tqdm import tqdm

    with tqdm(total=total, unit="img", desc=what, disable=True if say.quiet else None) as bar:
        yield bar.update


def _human(size):
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
