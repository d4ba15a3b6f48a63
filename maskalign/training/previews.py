"""Sample grids drawn during training from the moving average of the weights."""

import logging

from maskalign.errors import RunError, UsageError
from maskalign.runtime.files import replacing
from maskalign.runtime.fonts import drawable_names
from maskalign.sampling.drawing import class_sheet
from maskalign.sampling.pictures import load_decoder
from maskalign.sampling.settings import Sampling

log = logging.getLogger(__name__)


class Previews:
    """Draws the same classes from the same noise each time, so that the grids of a run can be compared.

    Args:
        config: `Config`; its `preview` section and the interpolant's path are used.
        spec: the model's `ModelSpec`.
        device: where the model is.
        precision: `fp32` or `bf16`.
    """

    def __init__(self, config, spec, device, precision="fp32"):
        preview = config.preview
        self.latent = spec.latent
        self.per_class = preview.per_class
        self.classes = list(range(spec.num_classes))[: preview.classes]
        self.names = drawable_names(spec.class_names, self.classes)
        self.sampling = Sampling(
            sampler=preview.sampler,
            steps=preview.steps,
            cfg_scale=preview.cfg_scale,
            cls_cfg_scale=preview.cls_cfg_scale,
            path=config.objective.path,
            precision=precision,
        )
        self.decoder = self._load_decoder(preview.vae, device)

    def _load_decoder(self, asked, device):
        if self.latent is None:
            return None
        try:
            return load_decoder(asked or self.latent["name"], latent=self.latent, device=device)
        except (UsageError, RunError) as error:
            if asked:
                raise
            log.warning("samples show the first three channels of the latents: %s", error)
            return None

    def draw(self, model, step, path):
        """Draw one row of samples per class with `model` and write the sheet to `path`; returns the PIL.Image.

        If the model is sharded, all ranks draw the same sheet, and ranks whose path is None write nothing.
        """
        sheet, _ = class_sheet(
            model,
            self.classes,
            self.names,
            self.sampling,
            per_class=self.per_class,
            decoder=self.decoder,
            title=f"step {step}, EMA, {self.sampling.describe()}",
        )
        if path is not None:
            with replacing(path) as temporary:
                sheet.save(temporary)
        return sheet
