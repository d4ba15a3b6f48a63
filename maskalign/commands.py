"""What each command takes: a thin function whose signature and docstring are its options and their help.

The work is done by one function of the room that owns it, imported inside: listing the commands stays quick.
"""

import sys
from pathlib import Path
from typing import List, Literal, Optional

from maskalign.errors import UsageError


def data_build(
    source: str,
    out: Path,
    size: int = 32,
    crop: Literal["adm", "resize"] = "adm",
    subset: Optional[str] = None,
    image_format: Literal["png", "webp", "jpg"] = "png",
    shard_size: Optional[int] = None,
    workers: Optional[int] = None,
    seed: int = 0,
    max_bad_fraction: float = 0.01,
    class_folders: Optional[Literal["top", "leaf", "path", "none"]] = None,
    class_names: Optional[Path] = None,
    holes: Optional[Literal["keep", "close"]] = None,
    exif: Literal["apply", "ignore"] = "apply",
    license: Optional[str] = None,
    root: Optional[Path] = None,
):
    """Build a data set of webdataset shards.

    Stopped at any moment and started again, it goes on; under torchrun the ranks share the work.

    Args:
        source: openmoji, a folder or .zip/.tar of images (top folder = class, or dataset.json has the labels),
            webdataset shards, torchvision:NAME.
        out: the folder for the shards and manifest.json.
        size: side of the stored square images in pixels.
        crop: adm is ADM's centre crop (as REPA), resize squeezes the whole image into the square.
        subset: part of the source to take, e.g. train; needed where it holds several.
        image_format: png and webp are lossless.
        shard_size: samples per shard; by default a 64th of the data set, between 64 and 2048.
        workers: processes; by default one per CPU core, and this one alone for few images.
        seed: of the order of the samples.
        max_bad_fraction: share of unusable images that is accepted; they are listed in bad.csv.
        class_folders: an image's class is its top folder (top, as torchvision), the folder it lies in (leaf), all its
            folders (path), or there is only one (none); by default the labels in dataset.json, else top.
        class_names: text file with a class name per line, for webdataset shards or dataset.json with integer labels.
        holes: keep numbers of classes that no image has as classes, or close the holes; without it such labels are
            refused, unless names tell what they are.
        exif: apply turns photos as their cameras say, ignore takes them as they are stored (ADM, REPA).
        license: licence of the images, for the manifest.
        root: folder where torchvision has, or puts, its files.
    """
    from maskalign.data.build.building import build, read_names

    build(
        source,
        out,
        size=size,
        crop=crop,
        subset=subset,
        image_format=image_format,
        shard_size=shard_size,
        workers=workers,
        seed=seed,
        max_bad_fraction=max_bad_fraction,
        class_folders=class_folders,
        class_names=None if class_names is None else read_names(class_names),
        holes=holes,
        exif=exif,
        license=license,
        root=root,
    )


def data_encode(
    data: str,
    teacher: Optional[str] = None,
    latents: Optional[str] = None,
    out: Optional[Path] = None,
    dtype: Literal["int8", "float16"] = "int8",
    normalize: Literal["none", "spatial", "mean"] = "none",
    grid: Optional[int] = None,
    hflip: bool = False,
    class_token: Literal["both", "only", "none"] = "both",
    class_components: int = 64,
    weights: Optional[str] = None,
    batch_size: Optional[int] = None,
    workers: Optional[int] = None,
    device: str = "auto",
    dry_run: bool = False,
):
    """Add teacher features, rows and class tokens, or VAE moments to the shards of a data set.

    ImageNet (1,281,167 images) with DINOv2-B takes 252 GB as int8 and 504 GB as float16. The command can be stopped at
    any moment and run again: it goes on. Under torchrun the ranks share the shards.

    Args:
        data: folder of the data set.
        teacher: dinov2-{s,b,l,g}, efficientnet-lite0[:16] or timm:MODEL; several with commas between them.
        latents: name or local folder of a diffusers AutoencoderKL, as stabilityai/sd-vae-ft-mse.
        out: another folder for the result; by default the shards are replaced, all at once, at the end.
        dtype: how teacher features are stored; DINOv2-B on ImageNet takes 252 GB as int8 and 504 GB as float16.
        normalize: none, spatial (iREPA, per image over its tokens) or mean (minus the data set's mean token).
        grid: side of the token grid to resample features to; by default the teacher's own.
        hflip: store features of the mirrored images too; training draws one of the two.
        class_token: both stores rows and class tokens, only adds class tokens to rows that are there, none omits them.
        class_components: principal components of the class tokens in the manifest, for model.class_token_dim; 0: none.
        weights: hub, random or a file, one for all teachers or one each with commas; by default the hub.
        batch_size: images at a time; by default 8 on CPUs and 64 on GPUs.
        workers: processes; by default one per GPU, or one that uses all CPU cores.
        device: auto, cpu, cuda or cuda:N.
        dry_run: only print the size to come.
    """
    from maskalign.data.build import encode

    encode(
        data,
        teacher=teacher,
        latents=latents,
        out=out,
        dtype=dtype,
        normalize=normalize,
        grid=grid,
        hflip=hflip,
        class_token=class_token,
        class_components=class_components,
        weights=weights,
        batch_size=batch_size,
        workers=workers,
        device=device,
        dry_run=dry_run,
    )


def data_check(data: str, workers: Optional[int] = None, decode: bool = False):
    """Verify every shard of a data set against its manifest; exit status 1 and a list where one is bad.

    Args:
        data: folder or URL prefix of the data set.
        workers: processes; by default one per CPU core.
        decode: decode every image whole, instead of reading its header.
    """
    from maskalign.data.build.checking import check, report

    report(check(data, workers=workers, decode=decode), data)


def data_show(data: str, out: Path, columns: int = 8, rows: int = 12):
    """Write a contact sheet PNG of a data set, with its labels and the teachers' features as colours.

    Args:
        data: folder or URL prefix of the data set.
        out: the PNG file to write.
        columns: samples per class.
        rows: classes to show.
    """
    from maskalign.data.build import show

    show(data, out, columns=columns, rows=rows)


def sample(
    run: Path,
    out: Path,
    classes: Optional[str] = None,
    per_class: int = 8,
    sampler: Literal["ode", "heun", "sde"] = "ode",
    steps: int = 50,
    cfg_scale: Optional[float] = None,
    cls_cfg_scale: Optional[float] = None,
    cfg_interval: str = "0,1",
    npz: Optional[int] = None,
    interpolate: Literal["none", "noise", "class", "both"] = "none",
    strip: bool = False,
    animate: Literal["none", "gif", "webp", "apng"] = "none",
    frames: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    weights: Literal["ema", "model"] = "ema",
    vae: Optional[str] = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
):
    """Draw pictures from a trained model: a sheet by class, or a set of images for an evaluation.

    Under torchrun the ranks share the work, and the pictures are the same on any number of them.

    Args:
        run: a run folder, one of its checkpoints, or a REPA .pt file.
        out: folder for the pictures.
        classes: labels, ranges or class names, e.g. 0,3,5-8 or Flags (name:2, label:2 where it could be either); by
            default up to ten classes, with --npz all.
        per_class: pictures per class on the sheet.
        sampler: Euler (ode), Heun, or Euler-Maruyama (sde).
        steps: steps of the sampler.
        cfg_scale: classifier-free guidance, 1 is none; by default 2 for a sheet and 1 for --npz.
        cls_cfg_scale: guidance of the class token, for models that denoise one: by default as the image's, 0 is none.
        cfg_interval: LO,HI, the times between which guidance is applied; 1 is noise, 0 is data.
        npz: draw this many images into OUT/samples_N.npz, as ADM's evaluator reads it; run again to go on after a stop.
        interpolate: also write interpolation.png, rows from one noise, class or both to another.
        strip: also write strip.png, each class's first picture on its way from noise to image.
        animate: also write the sheet on that way, as denoising.gif, denoising.webp or an animated denoising.png.
        frames: columns of the strip.
        seed: seed of the noise; a picture depends on this, its class and its number alone.
        batch_size: images drawn at once.
        weights: the moving average (ema) or the weights themselves (model).
        vae: decoder of latents, a hub name or a folder; by default the one that the data set was encoded with.
        device: auto, cpu or cuda.
        precision: fp32, bf16, or bf16 where the processor has it (auto); the sampler's own state is float64.
    """
    from maskalign.sampling.settings import Sampling, parse_interval

    if not run.exists():
        raise UsageError(f"{run} does not exist; give a run folder, a checkpoint or a .pt file")
    settings = Sampling(
        sampler=sampler,
        steps=steps,
        cfg_scale=(2.0 if npz is None else 1.0) if cfg_scale is None else cfg_scale,
        cls_cfg_scale=cls_cfg_scale,
        cfg_interval=parse_interval(cfg_interval),
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    from maskalign.sampling.command import sample as draw

    paths = draw(
        run,
        out,
        classes=classes,
        per_class=per_class,
        settings=settings,
        npz=npz,
        interpolation=None if interpolate == "none" else interpolate,
        strip=strip,
        animation=None if animate == "none" else animate,
        frames=frames,
        ema=weights == "ema",
        vae=vae,
        device=device,
    )
    for path in paths:
        print(path)


def analyze(
    checkpoints: List[Path],
    data: str,
    out: Path,
    images: int = 256,
    times: str = "0.1,0.3,0.5,0.7,0.9",
    draws: int = 4,
    keep_ratio: Optional[float] = None,
    top: float = 0.1,
    most: int = 8,
    weights: Literal["ema", "model"] = "ema",
    teacher: Optional[str] = None,
    batch_size: int = 32,
    permutations: int = 1000,
    mask_ratio: float = 0.25,
    subsets: int = 4,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
):
    """Measure where the alignment loss pulls on the patches, how stable that is, and the stability gap of subsets.

    Writes outcome.md, tables (shares, gap, positions, stability, concentration, agreement .csv) and pictures.

    Args:
        checkpoints: run folders (all their kept checkpoints), single checkpoints or REPA .pt files, one or several.
        data: folder or URL prefix of the data set.
        out: folder for the tables, the pictures and outcome.md.
        images: images to look at.
        times: times between 0 (data) and 1 (noise).
        draws: draws of noise and of a subset for every image.
        keep_ratio: share of tokens in a subset; by default the run's own, or 0.5 where it keeps all tokens.
        top: share of an image's tokens that counts as the largest.
        most: checkpoints of a run, evenly spread, the last one among them.
        weights: the moving average (ema) or the weights themselves (model).
        teacher: teachers with commas between them, for files that do not name their own.
        batch_size: images at a time, and images behind one gradient of the trunk.
        permutations: random permutations behind an interval of chance.
        mask_ratio: share of the patches that is dropped for the stability gap.
        subsets: random subsets of every image behind the stability gap.
        seed: of the order of the images, of noise, subsets and permutations.
        device: auto, cpu or cuda.
        progress: show progress bars.
    """
    from maskalign.analysis.settings import AnalysisSettings, parse_times

    for path in checkpoints:
        if not path.exists():
            raise UsageError(f"{path} does not exist; give a run folder, a checkpoint or a .pt file")
    if most < 1:
        raise UsageError(f"--most: {most} must be at least 1")
    settings = AnalysisSettings(
        images=images,
        times=parse_times(times),
        draws=draws,
        keep_ratio=keep_ratio,
        top=top,
        batch_size=batch_size,
        seed=seed,
        permutations=permutations,
        mask_ratio=mask_ratio,
        subsets=subsets,
    )
    from maskalign.config.teacher_names import parse_teachers

    teachers = tuple(parse_teachers(teacher)) if teacher else ()
    from maskalign.analysis.command import analyze as measure

    print(
        measure(
            checkpoints,
            data,
            out,
            settings=settings,
            ema=weights == "ema",
            most=most,
            teachers=teachers,
            device=device,
            progress=progress,
        )
    )


def report(runs: List[Path], out: Path = Path("report.html"), title: Optional[str] = None):
    """Compare runs on one HTML page that needs no network.

    It shows the settings that differ, curves, sample grids side by side, and what RUN/evaluation.json and RUN/analysis/
    hold.

    Args:
        runs: run folders.
        out: the HTML file to write.
        title: heading of the page.
    """
    from maskalign.reporting.command import report as write_report

    path, notes = write_report(runs, out, title=title)
    for note in notes:
        print(f"maskalign: left out: {note}", file=sys.stderr)
    print(path)


def evaluate(
    source: Path,
    data: str,
    out: Optional[Path] = None,
    samples: Optional[int] = None,
    reference: int = 5000,
    metrics: str = "frechet,kernel,neighbours",
    teacher: str = "efficientnet-lite0",
    teacher_weights: Optional[str] = None,
    inception: Optional[str] = None,
    classes: Optional[str] = None,
    held_out: Optional[str] = None,
    held_out_images: int = 1000,
    bins: int = 10,
    sampler: Literal["ode", "heun", "sde"] = "ode",
    steps: int = 50,
    cfg_scale: float = 1.0,
    cls_cfg_scale: Optional[float] = None,
    cfg_interval: str = "0,1",
    seed: int = 0,
    batch_size: int = 64,
    weights: Literal["ema", "model"] = "ema",
    vae: Optional[str] = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    allow_singular: bool = False,
    device: str = "auto",
    progress: bool = True,
):
    """Compare what a model draws, or pictures that are there, with real ones; and measure a model's held-out losses.

    Prints a table and, for a run or with --out, writes evaluation.json and evaluation-table.csv. Published numbers are
    of 50,000 samples and all real images: --samples 50000 --reference 0. Features of the real images are kept in the
    user's cache folder (MASKALIGN_CACHE).

    Args:
        source: a run, checkpoint or weights file to draw from; or pictures: a folder, an .npz, a data set.
        data: folder or URL prefix of the data set with the real images.
        out: folder for the report; by default the run's.
        samples: pictures to draw, by default 2000; of pictures that are there the first so many, by default all.
        reference: real images to compare with, 0 for all; the distances depend on this number, so keep it.
        metrics: of frechet, kernel, neighbours (precision, recall, density, coverage); or none.
        teacher: whose features; several with commas. dinov2-l gives the field's FDD.
        teacher_weights: hub, random (for tests) or a file.
        inception: torch-fidelity's weights file for FID, sFID and Inception score, or download; else left out.
        classes: labels, ranges or class names: compare these alone, on both sides.
        held_out: data set for the velocity loss and the alignment cosine by time; by default --data.
        held_out_images: how many of its images; 0 leaves the losses out.
        bins: of the time.
        sampler: Euler (ode), Heun, or Euler-Maruyama (sde).
        steps: steps of the sampler.
        cfg_scale: classifier-free guidance, 1 is none.
        cls_cfg_scale: guidance of the class token, for models that denoise one: by default as the image's, 0 is none.
        cfg_interval: LO,HI, the times between which guidance is applied; 1 is noise, 0 is data.
        seed: seed of the samples.
        batch_size: pictures at a time.
        weights: the moving average (ema) or the weights themselves (model).
        vae: decoder of latents, a hub name or a folder; by default the one that the data set was encoded with.
        precision: of the samples: fp32, bf16, or bf16 where the processor has it (auto). Features are always fp32.
        allow_singular: give Frechet distances of no more pictures than features have dimensions, which are too large.
        device: auto, cpu or cuda.
        progress: show progress bars.
    """
    from maskalign.evaluation.settings import EvaluationSettings, parse_metrics
    from maskalign.sampling.settings import Sampling, parse_interval

    if not source.exists():
        raise UsageError(f"{source} does not exist; give a run, a checkpoint, a folder of pictures or an .npz")
    settings = EvaluationSettings(
        metrics=parse_metrics(metrics),
        samples=samples,
        reference=reference,
        held_out_images=held_out_images,
        bins=bins,
        allow_singular=allow_singular,
        batch_size=batch_size,
    )
    sampling = Sampling(
        sampler=sampler,
        steps=steps,
        cfg_scale=cfg_scale,
        cls_cfg_scale=cls_cfg_scale,
        cfg_interval=parse_interval(cfg_interval),
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    from maskalign.config.teacher_names import parse_teachers

    parse_teachers(teacher)
    from maskalign.evaluation.command import evaluate as measure
    from maskalign.evaluation.report import table

    report = measure(
        source,
        data,
        out=out,
        settings=settings,
        sampling=sampling,
        teacher=teacher,
        teacher_weights=teacher_weights,
        inception=inception,
        classes=classes,
        held_out=held_out,
        ema=weights == "ema",
        vae=vae,
        device=device,
        progress=progress,
    )
    print(table(report))


def convert(
    src: Path,
    dst: Path,
    to: Optional[Literal["repa", "reg", "safetensors"]] = None,
    weights: Literal["ema", "model"] = "ema",
):
    """Convert checkpoints: REPA's, REG's and SiT's .pt, ours, safetensors.

    Args:
        src: the checkpoint to read: a run or checkpoint folder, a .pt or a .safetensors file.
        dst: the file to write.
        to: the layout to write; by default that of dst's ending, with .pt REG's for a model with a class token.
        weights: the set of weights that safetensors holds, averaged (ema) or not (model); a .pt holds both.
    """
    if not src.exists():
        raise UsageError(f"{src} does not exist; give a run folder, a checkpoint or a .pt file")
    from maskalign.checkpoints.command import convert as convert_checkpoint

    print(convert_checkpoint(src, dst, to=to, weights=weights))


def plan(
    config,
    world_size: int,
    device: str = "h100",
    out: Optional[Path] = None,
    efficiency: float = 0.4,
    link_efficiency: float = 0.8,
    headroom: float = 0.1,
    image_size: Optional[int] = None,
    num_classes: Optional[int] = None,
):
    """Estimate memory, time, GPU-hours and energy of a run, without its hardware and without its data.

    Args:
        config: the tree of settings of `maskalign train`.
        world_size: number of ranks, one accelerator each.
        device: a100, h100, h200, b200, mi300x, or a .yaml file with the fields of planning/devices.py.
        out: folder for plan.csv, plan.png and plan.txt.
        efficiency: share of the device's peak that matrix products reach.
        link_efficiency: share of the links' bandwidth that collectives reach.
        headroom: share of the device's memory that is left to the driver, communication and fragmentation.
        image_size: side of the images in pixels, where data.path is not there; by default ImageNet's 256.
        num_classes: number of classes, where data.path is not there; by default ImageNet's 1000.
    """
    from maskalign.planning.command import plan as plan_run

    plan_run(
        config,
        device=device,
        out=out,
        world_size=world_size,
        efficiency=efficiency,
        link_efficiency=link_efficiency,
        headroom=headroom,
        image_size=image_size,
        num_classes=num_classes,
    )


# The arguments that are given by position; all the others are options.
POSITIONAL = {
    "data build": ["source"],
    "data check": ["data"],
    "data show": ["data"],
    "sample": ["run"],
    "report": ["runs"],
    "analyze": ["checkpoints"],
    "evaluate": ["source"],
    "convert": ["src", "dst"],
}
COMMANDS = {
    "data build": data_build,
    "data encode": data_encode,
    "data check": data_check,
    "data show": data_show,
    "train": None,  # its options are the tree in config/settings.py
    "sample": sample,
    "report": report,
    "analyze": analyze,
    "evaluate": evaluate,
    "plan": plan,  # takes the settings of train besides
    "convert": convert,
}
SUMMARIES = {
    "data build": "build a data set of webdataset shards from images",
    "data encode": "add teacher features or VAE latents to a data set",
    "data check": "verify every shard against the manifest",
    "data show": "write a contact sheet of a data set",
    "train": "train a model, or go on with a run",
    "sample": "draw pictures from a run or a checkpoint",
    "report": "compare runs on one HTML page",
    "analyze": "measure where the alignment loss pulls on the patches, and how stable that is",
    "evaluate": "compare samples with real images, and measure held-out losses",
    "plan": "estimate memory, time and energy of a run without its hardware",
    "convert": "convert checkpoints from and to the layouts of REPA and REG",
}
