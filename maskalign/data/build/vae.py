"""VAE moments of images, through diffusers' AutoencoderKL from the hub or a local folder.

As REPA stores them: mean and **standard deviation** of the posterior, so that training draws a fresh latent in every
step, `(mean + std * n) * scale + bias`. Decoding is in `maskalign.sampling.pictures`.
"""

import logging
import math
import os

import torch

from maskalign.data.build.recipe import check_vae
from maskalign.errors import UsageError, one_line
from maskalign.runtime.hub import hub_answers, hub_url

# Images per pass on CPUs, as in `teachers.teacher`.
CPU_CHUNK = 2


def load_vae(name, *, device="cpu", dtype=torch.float32):
    """A frozen AutoencoderKL in eval mode.

    Args:
        name: repository on the hub, as stabilityai/sd-vae-ft-mse, or a local folder with config.json and
            safetensors weights (a pipeline's folder with a `vae` folder in it will do).
        device, dtype: where it runs and in what precision.

    Raises:
        UsageError: diffusers is not installed, there is no such VAE, or the hub does not answer.
    """
    name = os.fspath(name)
    source = check_vae(name)
    from diffusers import AutoencoderKL

    local = os.path.isdir(source) or not hub_answers(hub_url())
    # diffusers says in many lines on stderr what the error says in one.
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    try:
        # Never a pickled .bin.
        vae = AutoencoderKL.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, local_files_only=local)
    except Exception as error:  # a missing, damaged or foreign file raises one of a dozen types
        reason = one_line(error)[:300]
        raise UsageError(f"vae {name}: {reason}") from None
    return vae.requires_grad_(False).eval().to(device)


def channel_statistics(vae, name="vae"):
    """The statistics by which a VAE's latents are standardized per channel.

    Args:
        vae: AutoencoderKL, or anything with its `config`.
        name: what to call it in a message.

    Returns:
        (mean, std), lists of one number per latent channel: the config's `latents_mean` and `latents_std`, which its
        model's pipelines use as `(z - mean) / std * scaling_factor`. None for a VAE that has none, as sd-vae-ft-mse.

    Raises:
        UsageError: they cannot be used as they are.
    """
    found = {key: getattr(vae.config, key, None) for key in ("latents_mean", "latents_std")}
    if all(values is None for values in found.values()):
        return None
    channels = vae.config.latent_channels
    for key, values in found.items():
        try:
            good = len(values) == channels and all(math.isfinite(value) for value in values)
        except TypeError:
            good = False
        if not good or (key == "latents_std" and min(values) <= 0):
            raise UsageError(
                f"vae {name}: {key} of its config is {values}, not {channels} finite numbers, one per latent channel"
                + (" and above 0" if key == "latents_std" else "")
                + "; correct its config.json, or use another VAE"
            )
    if getattr(vae.config, "shift_factor", None):
        raise UsageError(
            f"vae {name}: its config has both latents_mean and shift_factor, and does not say which one counts; remove "
            "one from its config.json"
        )
    return tuple([float(value) for value in values] for values in found.values())


def vae_scaling(vae, name="vae"):
    """How latents of a VAE are scaled: dict with scale and bias, and where it standardizes channels mean and std.

    scale is the config's scaling_factor (0.18215 for sd-vae-ft-mse), bias is -shift_factor * scale (0 without one).
    """
    scale = float(vae.config.scaling_factor)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
    statistics = channel_statistics(vae, name)
    entry = {"scale": scale, "bias": -shift * scale if shift else 0.0}
    return entry if statistics is None else entry | dict(zip(("mean", "std"), statistics, strict=True))


@torch.no_grad()
def vae_moments(vae, images):
    """Mean and standard deviation of the posterior, standardized per channel where the VAE's config says so.

    Args:
        vae: AutoencoderKL.
        images: (B, 3, H, W) uint8; sides that the VAE's factor divides.

    Returns:
        (B, 2C, h, w) float32: C means, then C standard deviations.
    """
    statistics = channel_statistics(vae)
    chunk = CPU_CHUNK if images.device.type == "cpu" else max(1, len(images))
    moments = []
    with torch.autocast(images.device.type, enabled=False):
        for part in images.split(chunk):
            posterior = vae.encode((part.to(torch.float32) / 127.5 - 1).to(vae.dtype)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            if statistics is not None:
                shift, width = (torch.tensor(values, device=mean.device).view(-1, 1, 1) for values in statistics)
                mean, std = (mean - shift) / width, std / width
            moments.append(torch.cat([mean, std], dim=1))
    return torch.cat(moments)


def latent_entry(vae, name, resolution, dtype="float16"):
    """What the manifest says of the latents: `vae_scaling`, shape (2C, h, w), dtype and the VAE's name.

    Where it has mean and std, the stored moments are standardized with them, and a decoder has to undo it.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise UsageError(
            f"vae {name}: images of {resolution} px cannot be encoded, its factor {factor} does not divide the side; "
            "build the data set in another size"
        )
    side = resolution // factor
    return {
        **vae_scaling(vae, name),
        "shape": [2 * vae.config.latent_channels, side, side],
        "dtype": dtype,
        "name": os.fspath(name),
    }
