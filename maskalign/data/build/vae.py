"""VAE moments of images, computed by diffusers' AutoencoderKL from the hub or a local folder.

As in REPA, the moments are mean and **standard deviation** of the posterior, so that training can draw a new latent in
every step: `(mean + std * n) * scale + bias`. Decoding is in `maskalign.sampling.pictures`.
"""

import logging
import math
import os

import torch

from maskalign.data.build.recipe import check_vae
from maskalign.errors import UsageError, one_line
from maskalign.runtime.hub import hub_answers, hub_url

# Images per pass on CPUs, the same as in `teachers.teacher`.
CPU_CHUNK = 2


def load_vae(name, *, device="cpu", dtype=torch.float32):
    """Load a frozen AutoencoderKL in eval mode.

    Args:
        name: repository on the hub, such as stabilityai/sd-vae-ft-mse, or a local folder with config.json and
            safetensors weights, or the folder of a pipeline with a folder `vae` in it.
        device, dtype: device and dtype of the VAE.

    Raises:
        UsageError: diffusers is not installed, there is no such VAE, or the hub does not answer.
    """
    name = os.fspath(name)
    source = check_vae(name)
    from diffusers import AutoencoderKL

    local = os.path.isdir(source) or not hub_answers(hub_url())
    # diffusers prints many lines on stderr about an error that is reported below in one.
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    try:
        # use_safetensors: a pickled .bin file is never loaded.
        vae = AutoencoderKL.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, local_files_only=local)
    except Exception as error:  # missing, damaged or incompatible files raise many types of errors
        reason = one_line(error)[:300]
        raise UsageError(f"vae {name}: {reason}") from None
    return vae.requires_grad_(False).eval().to(device)


def channel_statistics(vae, name="vae"):
    """The statistics with which a VAE's latents are standardized per channel.

    Args:
        vae: AutoencoderKL, or any object with its `config`.
        name: name of the VAE for messages.

    Returns:
        (mean, std), lists of one number per latent channel: the config's `latents_mean` and `latents_std`, which its
        model's pipelines use as `(z - mean) / std * scaling_factor`. None for a VAE without them, such as
        sd-vae-ft-mse.

    Raises:
        UsageError: the statistics are invalid.
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
            f"vae {name}: its config has both latents_mean and shift_factor, of which only one can apply; remove one "
            "from its config.json"
        )
    return tuple([float(value) for value in values] for values in found.values())


def vae_scaling(vae, name="vae"):
    """The scaling of a VAE's latents: a dict with scale and bias, and with mean and std if it standardizes channels.

    scale is the config's scaling_factor (0.18215 for sd-vae-ft-mse). bias is -shift_factor * scale, or 0 without a
    shift_factor.
    """
    scale = float(vae.config.scaling_factor)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
    statistics = channel_statistics(vae, name)
    entry = {"scale": scale, "bias": -shift * scale if shift else 0.0}
    return entry if statistics is None else entry | dict(zip(("mean", "std"), statistics, strict=True))


@torch.no_grad()
def vae_moments(vae, images):
    """Mean and standard deviation of the posterior, standardized per channel if the VAE's config has statistics.

    Args:
        vae: AutoencoderKL.
        images: (B, 3, H, W) uint8; H and W are multiples of the VAE's factor.

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
    """The manifest entry of latents: `vae_scaling`, shape (2C, h, w), dtype and the VAE's name.

    If it has mean and std, the stored moments are standardized with them, which must be undone before decoding.

    Raises:
        UsageError: the VAE's factor does not divide the resolution.
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
