"""From what a model draws to uint8 pictures: pixels as they are, latents through a VAE's decoder."""

import torch

from maskalign.data.build.vae import load_vae
from maskalign.errors import RunError

# sd-vae-ft-mse's, for data sets that do not say otherwise.
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
    """A VAE's decoder, in chunks so that memory does not grow with the batch.

    Args:
        vae: a diffusers AutoencoderKL, or anything whose `decode(z)` gives images, or has them as `.sample`.
        scale, bias: a latent is `(mean + std * n) * scale + bias`.
        chunk: images decoded at once.
    """

    def __init__(self, vae, scale=LATENT_SCALE, bias=0.0, chunk=8):
        self.vae = vae
        self.scale = scale
        self.bias = bias
        self.chunk = chunk

    @torch.no_grad()
    def __call__(self, latents):
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in about [-1, 1], on the latents' device.

        Raises:
            RunError: the VAE gave non-finite numbers.
        """
        images = []
        for part in latents.to(torch.float32).split(self.chunk):
            out = self.vae.decode((part - self.bias) / self.scale)
            images.append(getattr(out, "sample", out).to(torch.float32))
        images = torch.cat(images)
        if not images.isfinite().all():
            raise RunError("the VAE decodes to non-finite numbers; check its weights and the latents' scale")
        return images


def load_decoder(name, *, scale=LATENT_SCALE, bias=0.0, device="cpu", chunk=8):
    """The decoder of a diffusers AutoencoderKL.

    Args:
        name: its name on the model hub, or a local folder.
        scale, bias, chunk: those of `Decoder`.

    Raises:
        UsageError: diffusers is not installed, or the VAE cannot be loaded.
    """
    vae = load_vae(name, device=device)
    return Decoder(vae, scale, bias, chunk)
