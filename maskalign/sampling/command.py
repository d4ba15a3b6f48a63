"""The work of `maskalign sample`: a sheet by class and the other requested images, or a set for an evaluation."""

import sys
from dataclasses import replace

from PIL import Image
from tqdm import tqdm

from maskalign.checkpoints.loading import load
from maskalign.errors import RunError, UsageError
from maskalign.runtime.device import find_device
from maskalign.runtime.fonts import drawable_names
from maskalign.runtime.outputs import make_folder
from maskalign.runtime.ranks import torchrun_ranks
from maskalign.sampling.denoising import ANIMATIONS, MOST_FRAMES, Trajectory, denoising_strip, save_animation
from maskalign.sampling.drawing import INDICES_PER_CLASS, check_class_guidance, class_sheet
from maskalign.sampling.interpolation import KINDS, interpolate, plan_rows
from maskalign.sampling.network import Network
from maskalign.sampling.pictures import load_decoder
from maskalign.sampling.sets import draw_set
from maskalign.sampling.settings import Sampling, parse_classes, spread_classes, with_preset

PAPER_NAMES = {"reg": "REG and MaskAlign", "repa": "REPA", "sit": "SiT"}


def sample(
    run,
    out,
    *,
    classes=None,
    per_class=8,
    settings=None,
    preset=None,
    given=(),
    npz=None,
    labels=None,
    interpolation=None,
    strip=False,
    animation=None,
    frames=10,
    ema=True,
    vae=None,
    device="auto",
    progress=True,
):
    """Draw images into the folder `out`, in this process or on all ranks of torchrun; the work of `maskalign sample`.

    Args:
        run: a run folder, one of its checkpoints, or a REPA .pt or .safetensors file.
        out: folder for the pictures.
        classes: text as `parse_classes` reads it; by default up to ten classes, or with `npz` all.
        per_class: pictures per class on the sheet, and in a row of interpolations.
        settings: `Sampling`; its path is replaced by the run's.
        preset, given: a preset, and the names of the settings that it does not replace; see `with_preset`.
        npz: number of images of a set, drawn to `out`/samples_<npz>.npz instead of a sheet.
        labels: how the labels of a set are chosen: `balanced`, `uniform`, or None; see `draw_set`.
        interpolation: `noise`, `class` or `both`: also write interpolation.png.
        strip: also write strip.png, the states from noise to image.
        animation: `gif`, `webp` or `apng`: also write the denoising sheet as denoising.gif, .webp or .png.
        frames: columns of the strip.
        ema: use the moving average of the weights.
        vae: decoder of latents, a hub name or a folder; by default the VAE that encoded the data set.
        device: auto, cpu or cuda.

    Returns:
        list of the paths of the files, the sheet or the .npz first; empty on other ranks than 0 for sheets.
    """
    settings = settings or Sampling()
    _check_numbers(npz, per_class, frames, interpolation, strip, animation)
    if labels is not None and npz is None:
        raise UsageError("--labels applies to sets; add --npz N, or choose the rows of the sheet with --classes")
    with torchrun_ranks() as ranks:
        loaded = load(run, ema)
        model, info = loaded.model, loaded.info
        del loaded
        settings = replace(settings, path=info.path)
        settings = apply_preset(settings, preset, given, model, progress and ranks.rank == 0)
        network = Network(model.to(find_device(device, "--device")).eval().requires_grad_(False), settings.precision)
        del model  # in bf16 the network holds its own copy
        check_class_guidance(network, settings)
        names = info.class_names or [f"class {label}" for label in range(network.num_classes)]
        chosen = None if classes is None else parse_classes(classes, names)
        decoder = decoder_for(network, info, vae)
        out = make_folder(out)
        if npz is not None:
            with _bar(npz, progress and ranks.rank == 0) as bar:
                return [
                    draw_set(
                        network, npz, out, settings, info, ranks, classes=chosen, labels=labels, decoder=decoder,
                        on_images=_of_all(bar, ranks),
                    )
                ]  # fmt: skip
        chosen = spread_classes(network.num_classes) if chosen is None else list(dict.fromkeys(chosen))
        names = drawable_names(names, chosen)
        return _sheets(
            network, out, settings, info, ranks, chosen, names, decoder, per_class=per_class,
            interpolation=interpolation, strip=strip, animation=animation, frames=frames, progress=progress,
        )  # fmt: skip


def apply_preset(settings, preset, given, model, told):
    """The settings with those of a preset, see `with_preset`; if `told`, prints the preset's settings."""
    aligned = len(model.projectors) > 0
    settings, paper = with_preset(settings, preset, given, class_token=model.class_dim is not None, aligned=aligned)
    if paper and told:
        print(f"preset {preset}, as published for {PAPER_NAMES[paper]}: {settings.describe()}", file=sys.stderr)
    return settings


def _check_numbers(npz, per_class, frames, interpolation, strip, animation):
    if npz is not None and npz < 1:
        raise UsageError(f"--npz: {npz} must be at least 1")
    if npz is not None and (interpolation or strip or animation):
        raise UsageError(
            "--npz cannot be combined with --interpolate, --strip or --animate; draw those in a second call"
        )
    if not 1 <= per_class <= INDICES_PER_CLASS:
        raise UsageError(f"--per-class: {per_class} must be in 1 to {INDICES_PER_CLASS}")
    if not 2 <= frames <= 100:
        raise UsageError(f"--frames: {frames} must be in 2 to 100")
    if interpolation is not None and interpolation not in KINDS:
        raise UsageError(f"--interpolate: {interpolation!r} is not one of {', '.join(KINDS)}")
    if animation is not None and animation not in ANIMATIONS:
        raise UsageError(f"--animate: {animation!r} is not one of {', '.join(ANIMATIONS)}")
    if interpolation and per_class < 2:
        raise UsageError(f"--per-class: {per_class} must be at least 2 with --interpolate, for its two ends")


def _sheets(
    network, out, settings, info, ranks, classes, names, decoder, *, per_class, interpolation, strip, animation,
    frames, progress,
):  # fmt: skip
    """Draw and write the sheet, interpolations, strip and animation; rank 0 writes."""
    rows = len(plan_rows(interpolation, classes)) if interpolation else 0
    if interpolation and not rows:
        raise UsageError(f"--interpolate {interpolation} needs two classes or more; add some to --classes")
    title = f"{info.label}, {settings.describe()}"
    trajectory = None
    if strip or animation:
        trajectory = Trajectory(settings.steps, MOST_FRAMES if animation else frames, settings.path)
    with _bar((len(classes) + rows) * per_class, progress and ranks.rank == 0) as bar:
        drawn = {"decoder": decoder, "title": title, "on_images": _of_all(bar, ranks), "ranks": ranks}
        sheet, pictures = class_sheet(
            network, classes, names, settings, per_class=per_class, record=trajectory, **drawn
        )
        between = None
        if interpolation:
            between, _ = interpolate(network, interpolation, classes, names, settings, columns=per_class, **drawn)
    if trajectory:
        trajectory.gather(ranks)
    if ranks.rank:
        return []
    shared = {"decoder": decoder, "title": title}
    try:
        paths = [_save(sheet, pictures, classes, out)]
        if between:
            between.save(out / "interpolation.png")
            paths.append(out / "interpolation.png")
        if strip:
            picture = denoising_strip(trajectory, classes, names, per_class, frames=frames, **shared)
            picture.save(out / "strip.png")
            paths.append(out / "strip.png")
        if animation:
            path = out / f"denoising{ANIMATIONS[animation]}"
            paths.append(save_animation(path, trajectory, classes, names, per_class, **shared))
    except OSError as error:
        raise RunError(f"cannot write pictures to {out} ({error.strerror or error}); choose another --out") from None
    return paths


def _save(sheet, pictures, labels, out):
    (out / "images").mkdir(parents=True, exist_ok=True)
    for label, row in zip(labels, pictures, strict=True):
        for k, picture in enumerate(row.numpy()):
            image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
            image.save(out / "images" / f"{label:04d}_{k:03d}.png")
    sheet.save(out / "grid.png")
    return out / "grid.png"


def decoder_for(network, info, vae):
    """The decoder of a model's latents; None if the model draws pixels.

    Args:
        network: `Network`.
        info: `ModelInfo` of the model.
        vae: name or folder of an AutoencoderKL; by default the VAE of the data set.

    Raises:
        UsageError: the decoder is not known or cannot be loaded.
    """
    name = vae or info.vae_name
    if name is None:
        if network.in_channels in (1, 3):
            return None
        raise UsageError(
            f"the model draws latents of {network.in_channels} channels; name their decoder: --vae "
            "stabilityai/sd-vae-ft-mse, or a local folder"
        )
    if vae is None and info.latent is None and network.in_channels == 3:
        return None
    return load_decoder(name, latent=info.latent, channels=network.in_channels, device=network.device)


def _of_all(bar, ranks):
    """Update the bar by this rank's images times the number of ranks. This needs no communication, and all ranks draw
    equally fast.
    """
    return lambda images: bar.update(min(images * ranks.world_size, bar.total - bar.n))


def _bar(total, shown):
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=total, desc="sampling", unit=" images", bar_format=form, disable=not shown)
