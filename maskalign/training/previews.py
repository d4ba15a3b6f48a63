"""Sample grids drawn during training from the moving average of the weights."""

import logging

import torch

from maskalign.errors import RunError, UsageError
from maskalign.sampling.grids import class_grid
from maskalign.sampling.guidance import Guided
from maskalign.sampling.noise import ImageNoise
from maskalign.sampling.pictures import load_decoder, to_uint8
from maskalign.sampling.samplers import euler, euler_maruyama, heun

log = logging.getLogger(__name__)


class Previews:
    """Draws the same classes from the same noise each time, so that grids of one run can be compared.

    Args:
        config: `Config`; its `preview` section and the interpolant's path are used.
        facts: the model's facts, see `checkpoint.load_model`.
        device: where to sample.
    """

    def __init__(self, config, facts, device):
        self.settings = config.preview
        self.path = config.objective.path
        self.facts = facts
        self.device = device
        self.classes = list(range(facts["num_classes"]))[: self.settings.classes]
        self.decoder = self._decoder()

    def _decoder(self):
        latent = self.facts["latent"]
        if latent is None:
            return None
        name = self.settings.vae or latent.get("name")
        try:
            return load_decoder(name, scale=latent["scale"], bias=latent["bias"], device=self.device)
        except (UsageError, RunError) as error:
            if self.settings.vae:
                raise
            log.warning("samples show the latents' first three channels: %s", error)
            return None

    @torch.no_grad()
    def draw(self, model, step, path):
        """Sample a row per class with `model` (in eval mode) and write the grid to `path`."""
        settings = self.settings
        labels = torch.tensor(self.classes, device=self.device).repeat_interleave(settings.per_class)
        shape = (self.facts["in_channels"], self.facts["input_size"], self.facts["input_size"])
        stream = ImageNoise(0, range(len(labels)), shape, self.device)
        noise = stream.draw()
        velocity = Guided(model, labels, null_label=self.facts["num_classes"], scale=settings.cfg_scale)
        if settings.sampler == "sde":
            x = euler_maruyama(velocity, noise, settings.steps, path=self.path, randn=stream)
        else:
            x = (heun if settings.sampler == "heun" else euler)(velocity, noise, settings.steps)
        x = x[:, :3] / 3 if self.decoder is None and shape[0] != 3 else x
        x = self.decoder(x) if self.decoder is not None else x
        rows = to_uint8(x).unflatten(0, (len(self.classes), settings.per_class))
        names = [self.facts["class_names"][label] for label in self.classes]
        title = f"step {step}, EMA, {settings.sampler} {settings.steps} steps, guidance {settings.cfg_scale:g}"
        class_grid(list(rows.numpy()), names, title=title).save(path)
