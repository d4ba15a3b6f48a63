"""Convert a model's samples to uint8 images; latents are decoded by a VAE first."""

import torch

from maskalign.data.build.vae import load_vae, vae_scaling
from maskalign.errors import RunError, UsageError

# The scale of sd-vae-ft-mse.
LATENT_SCALE = 0.18215


def to_uint8(images, truncate=False):
    """Images in [-1, 1] as uint8, clipped.

    Args:
        images: (B, C, H, W) floating.
        truncate: cut off the fraction instead of rounding, as ADM and REPA do before an evaluation.

    Returns:
        (B, H, W, C) uint8 on the CPU; non-finite values are 0.
    """
    levels = (images.to(torch.float32).nan_to_num(-1, 1, -1) + 1) * 127.5
    levels = levels.clamp(0, 255)
    levels = levels if truncate else levels.round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


class Decoder:
    """A VAE's decoder. It runs in chunks, so that memory does not grow with the batch.

    Args:
        vae: a diffusers AutoencoderKL, or an object whose `decode(z)` returns images, or an object with `.sample`.
        scale, bias: a latent is `z * scale + bias`, with z a draw of the stored moments.
        chunk: images decoded at once.
        mean, std: lists of one number per channel, by which z was standardized before it was stored; None for none.
    """

    def __init__(self, vae, scale=LATENT_SCALE, bias=0.0, chunk=8, mean=None, std=None):
        self.vae = vae
        self.scale = scale
        self.bias = bias
        self.chunk = chunk
        self.statistics = None if mean is None else (mean, std)

    @torch.no_grad()
    def __call__(self, latents):
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in about [-1, 1], on the latents' device.

        Raises:
            RunError: the VAE gave non-finite numbers.
        """
        images = []
        for part in latents.to(torch.float32).split(self.chunk):
            z = (part - self.bias) / self.scale
            if self.statistics is not None:
                mean, std = (z.new_tensor(values).view(-1, 1, 1) for values in self.statistics)
                z = z * std + mean
            out = self.vae.decode(z)
            images.append(getattr(out, "sample", out).to(torch.float32))
        images = torch.cat(images)
        if not images.isfinite().all():
            raise RunError("the VAE decodes to non-finite numbers; check its weights and the latents' scale")
        return images


def load_decoder(name, *, scale=None, bias=0.0, latent=None, channels=None, device="cpu", chunk=8):
    """Load the decoder of a diffusers AutoencoderKL.

    Args:
        name: name on the model hub, or a local folder.
        scale, bias, chunk: as for `Decoder`.
        latent: the manifest's entry of the latents, with scale, bias and optionally mean and std. Without it, and
            without scale, the values of the VAE's own config are used.
        channels: number of channels of the latents to decode, if known.
        device: where the VAE runs.

    Returns:
        Decoder.

    Raises:
        UsageError: diffusers is not installed, the VAE cannot be loaded, or has another number of channels.
    """
    vae = load_vae(name, device=device)
    own = getattr(getattr(vae, "config", None), "latent_channels", channels)
    if channels is not None and own != channels:
        raise UsageError(f"--vae: {name} decodes latents of {own} channels, and these have {channels}; name their VAE")
    if scale is not None:
        return Decoder(vae, scale, bias, chunk)
    entry = vae_scaling(vae, name) if latent is None else latent
    return Decoder(vae, entry["scale"], entry["bias"], chunk, entry.get("mean"), entry.get("std"))
