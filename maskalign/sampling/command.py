"""The work of `maskalign sample`: a sheet by class with its single pictures, or a set of images for an evaluation."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from maskalign.errors import RunError, UsageError
from maskalign.sampling.drawing import INDICES_PER_CLASS, class_sheet, generate
from maskalign.sampling.noise import image_labels
from maskalign.sampling.npz import write_npz
from maskalign.sampling.pictures import LATENT_SCALE, load_decoder, to_uint8
from maskalign.sampling.settings import Sampling, parse_classes, spread_classes
from maskalign.training.export import load_any


def sample(
    run,
    out,
    *,
    classes=None,
    per_class=8,
    settings=None,
    npz=None,
    ema=True,
    vae=None,
    device="auto",
    progress=True,
):
    """The work of `maskalign sample`: a sheet and single pictures in `out`, or with `npz` a set for an evaluation.

    Args:
        run: a run folder, one of its checkpoints, or a REPA .pt or .safetensors file.
        out: folder for the pictures.
        classes: text as `parse_classes` reads it; by default up to ten classes, or with `npz` all.
        per_class: pictures per class on the sheet.
        settings: `Sampling`; its path is replaced by the run's.
        npz: number of images of the set, drawn to `out`/samples_<npz>.npz.
        ema: use the moving average of the weights.
        vae: decoder of latents, a hub name or a folder; by default the one that the data set's latents are from.
        device: auto, cpu or cuda.

    Returns:
        Path of the sheet or of the .npz.
    """
    settings = settings or Sampling()
    rank, world_size, barrier = _processes()
    if npz is not None and npz < 1:
        raise UsageError(f"--npz: {npz} must be at least 1")
    if not 1 <= per_class <= INDICES_PER_CLASS:
        raise UsageError(f"--per-class: {per_class} must be in 1 to {INDICES_PER_CLASS}")
    device = _device(device, rank)
    model, about = load(run, ema)
    settings = replace(settings, path=about["path"])
    model = model.to(device).eval().requires_grad_(False)
    names = about["class_names"] or [f"class {label}" for label in range(model.num_classes)]
    chosen = None if classes is None else parse_classes(classes, names)
    decoder = _decoder_for(model, about, vae, device)
    if npz is not None:
        return _sample_set(model, chosen, settings, npz, out, decoder, about, (rank, world_size, barrier), progress)
    if world_size > 1:
        raise UsageError("a sheet is drawn by one process; start maskalign sample without torchrun, or give --npz N")
    chosen = spread_classes(model.num_classes) if chosen is None else list(dict.fromkeys(chosen))
    title = f"{about['name']}, {settings.describe()}"
    with _bar(len(chosen) * per_class, progress) as bar:
        sheet, pictures = class_sheet(
            model, chosen, names, settings, per_class=per_class, decoder=decoder, title=title, on_images=bar.update
        )
    return _save(sheet, pictures, chosen, Path(out))


def _save(sheet, pictures, labels, out):
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        for label, row in zip(labels, pictures, strict=True):
            for k, picture in enumerate(row.numpy()):
                Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
                    out / "images" / f"{label:04d}_{k:03d}.png"
                )
        sheet.save(out / "grid.png")
    except OSError as error:
        raise RunError(f"cannot write pictures to {out} ({error.strerror or error}); choose another --out") from None
    return out / "grid.png"


def _sample_set(model, classes, settings, count, out, decoder, about, processes, progress):
    rank, world_size, barrier = processes
    # A decoder says its own size only by decoding.
    side = model.input_size
    probe = torch.zeros(1, model.in_channels, side, side, device=next(model.parameters()).device)
    channels, height, width = (decoder(probe) if decoder else probe).shape[1:]
    if channels != 3:
        raise UsageError(f"--npz holds RGB images; this model draws {channels} channels")

    def labels_of(indices):
        if classes is None:
            return image_labels(settings.seed, indices, model.num_classes)
        return torch.tensor([classes[index % len(classes)] for index in indices])

    def draw(indices):
        images = generate(model, labels_of(indices), settings, indices=indices)
        return to_uint8(decoder(images) if decoder else images, truncate=decoder is not None)

    record = {key: value for key, value in asdict(settings).items() if key != "batch_size"}
    record |= {"classes": classes, "model": about["name"], "step": about["step"], "ema": about["ema"], "images": count}
    mine = len(range(rank, count, world_size))
    with _bar(mine, progress and rank == 0) as bar:
        return write_npz(
            Path(out) / f"samples_{count}.npz",
            count,
            (height, width, 3),
            draw,
            settings=record,
            batch_size=settings.batch_size,
            rank=rank,
            world_size=world_size,
            barrier=barrier,
            on_done=bar.update,
        )


def load(run, ema=True):
    """A model to draw from, and what is known about it.

    Args:
        run: a run folder, one of its checkpoints, or a REPA .pt or .safetensors file.
        ema: take the moving average of the weights.

    Returns:
        (model, dict): name, step, ema, path, class_names (None where unknown), latent (the manifest's entry), vae.
    """
    model, facts = load_any(run, ema)
    step = facts["step"]
    name = facts["name"] if step is None else f"{facts['name']}, step {step}"
    return model, {**facts, "name": name, "ema": ema}


def _decoder_for(model, about, vae, device):
    latent = about["latent"]
    name = vae or about["vae"] or (latent or {}).get("name")
    if name is None:
        if model.in_channels in (1, 3):
            return None
        raise UsageError(
            f"the model draws latents of {model.in_channels} channels; name their decoder: --vae "
            "stabilityai/sd-vae-ft-mse, or a local folder"
        )
    if vae is None and latent is None and model.in_channels == 3:
        return None
    scale, bias = (latent["scale"], latent["bias"]) if latent else (LATENT_SCALE, 0.0)
    return load_decoder(name, scale=scale, bias=bias, device=device)


def _device(name, rank):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no GPU here; use --device cpu")
        if name == "cuda":
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    elif name != "cpu":
        raise UsageError(f"--device: {name!r} is not auto, cpu or cuda")
    return torch.device(name)


def _processes():
    """(rank, world_size, barrier) of this process, under torchrun or alone."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return 0, 1, None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), world_size, torch.distributed.barrier


def _bar(total, shown):
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=total, desc="sampling", unit=" images", bar_format=form, disable=not shown)
