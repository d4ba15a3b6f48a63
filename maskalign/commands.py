"""What each command takes: a thin function whose signature and docstring are its options and their help.

The work is done by one function of the room that owns it, imported inside: listing the commands stays quick.
"""

from pathlib import Path
from typing import Literal, Optional

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
    class_names: Optional[Path] = None,
    license: Optional[str] = None,
    root: Optional[Path] = None,
):
    """Build a data set of webdataset shards.

    Stopped at any moment and started again, it goes on; under torchrun the ranks share the work.

    Args:
        source: openmoji, a folder or .zip/.tar of images (folder name = class), webdataset shards, torchvision:NAME.
        out: the folder for the shards and manifest.json.
        size: side of the stored square images in pixels.
        crop: adm is ADM's centre crop (as REPA), resize squeezes the whole image into the square.
        subset: part of the source to take, e.g. train; needed where it holds several.
        image_format: png and webp are lossless.
        shard_size: samples per shard; by default a 64th of the data set, between 64 and 2048.
        workers: processes; by default one per CPU core, and this one alone for few images.
        seed: of the order of the samples.
        max_bad_fraction: share of unusable images that is accepted; they are listed in bad.csv.
        class_names: text file with a class name per line, for webdataset shards with integer labels.
        license: licence of the images, for the manifest.
        root: folder where torchvision has, or puts, its files.
    """
    from maskalign.data.build import build, read_names

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
        class_names=None if class_names is None else read_names(class_names),
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
    weights: Optional[str] = None,
    batch_size: Optional[int] = None,
    workers: Optional[int] = None,
    device: str = "auto",
    dry_run: bool = False,
):
    """Add teacher features or VAE moments to the shards of a data set.

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
        weights: hub, random or a file, one for all teachers or one each with commas; by default the hub.
        batch_size: images at a time; by default 8 on CPUs and 64 on GPUs.
        workers: processes; by default one per GPU, or one that uses all CPU cores.
        device: auto, cpu, cuda or cuda:N.
        dry_run: only print the size to come.
    """
    from maskalign.data.encode import encode

    encode(
        data,
        teacher=teacher,
        latents=latents,
        out=out,
        dtype=dtype,
        normalize=normalize,
        grid=grid,
        hflip=hflip,
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
    from maskalign.data.check import check, report

    report(check(data, workers=workers, decode=decode), data)


def data_show(data: str, out: Path, columns: int = 8, rows: int = 12):
    """Write a contact sheet PNG of a data set, with its labels and the teachers' features as colours.

    Args:
        data: folder or URL prefix of the data set.
        out: the PNG file to write.
        columns: samples per class.
        rows: classes to show.
    """
    from maskalign.data.show import show

    show(data, out, columns=columns, rows=rows)


def sample(
    run: Path,
    out: Path,
    classes: Optional[str] = None,
    per_class: int = 8,
    sampler: Literal["ode", "heun", "sde"] = "ode",
    steps: int = 50,
    cfg_scale: Optional[float] = None,
    cfg_interval: str = "0,1",
    npz: Optional[int] = None,
    seed: int = 0,
    batch_size: int = 64,
    weights: Literal["ema", "model"] = "ema",
    vae: Optional[str] = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
):
    """Draw pictures from a trained model: a sheet by class, or a set of images for an evaluation.

    Args:
        run: a run folder, one of its checkpoints, or a REPA .pt file.
        out: folder for the pictures.
        classes: labels, ranges or class names, e.g. 0,3,5-8 or Flags; by default up to ten classes, with --npz all.
        per_class: pictures per class on the sheet.
        sampler: Euler (ode), Heun, or Euler-Maruyama (sde).
        steps: steps of the sampler.
        cfg_scale: classifier-free guidance, 1 is none; by default 2 for a sheet and 1 for --npz.
        cfg_interval: LO,HI, the times between which guidance is applied; 1 is noise, 0 is data.
        npz: draw this many images into OUT/samples_N.npz, as ADM's evaluator reads it; run again to go on after a stop.
        seed: seed of the noise; a picture depends on this, its class and its number alone.
        batch_size: images drawn at once.
        weights: the moving average (ema) or the weights themselves (model).
        vae: decoder of latents, a hub name or a folder; by default the one that the data set was encoded with.
        device: auto, cpu or cuda.
        precision: fp32 or bf16.
    """
    from maskalign.sampling.settings import Sampling, parse_interval

    if not run.exists():
        raise UsageError(f"{run} does not exist; give a run folder, a checkpoint or a .pt file")
    settings = Sampling(
        sampler=sampler,
        steps=steps,
        cfg_scale=(2.0 if npz is None else 1.0) if cfg_scale is None else cfg_scale,
        cfg_interval=parse_interval(cfg_interval),
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    from maskalign.sampling.command import sample as draw

    path = draw(
        run,
        out,
        classes=classes,
        per_class=per_class,
        settings=settings,
        npz=npz,
        ema=weights == "ema",
        vae=vae,
        device=device,
    )
    print(path)


def convert(
    src: Path,
    dst: Path,
    to: Optional[Literal["repa", "safetensors"]] = None,
    weights: Literal["ema", "model"] = "ema",
):
    """Convert checkpoints: REPA's and SiT's .pt, ours, safetensors.

    Args:
        src: the checkpoint to read: a run or checkpoint folder, a .pt or a .safetensors file.
        dst: the file to write.
        to: the layout to write; taken from the ending of dst where it is left out.
        weights: the set of weights that safetensors holds, averaged (ema) or not (model); REPA's layout holds both.
    """
    if not src.exists():
        raise UsageError(f"{src} does not exist; give a run folder, a checkpoint or a .pt file")
    from maskalign.training.export import convert as convert_checkpoint

    print(convert_checkpoint(src, dst, to=to, weights=weights))


# The arguments that are given by position; all the others are options.
POSITIONAL = {
    "data build": ["source"],
    "data check": ["data"],
    "data show": ["data"],
    "sample": ["run"],
    "convert": ["src", "dst"],
}
COMMANDS = {
    "data build": data_build,
    "data encode": data_encode,
    "data check": data_check,
    "data show": data_show,
    "train": None,  # its options are the tree of settings in config.py
    "sample": sample,
    "convert": convert,
}
SUMMARIES = {
    "data build": "build a data set of webdataset shards from images",
    "data encode": "add teacher features or VAE latents to a data set",
    "data check": "verify every shard against the manifest",
    "data show": "write a contact sheet of a data set",
    "train": "train a model, or go on with a run",
    "sample": "draw pictures from a run or a checkpoint",
    "convert": "convert checkpoints from and to REPA's layout",
}
