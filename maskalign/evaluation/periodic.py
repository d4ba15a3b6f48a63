"""The cheap evaluation during training: held-out losses and distances of a few samples, with the averaged weights."""

import logging

import numpy as np

from maskalign.data.format.manifest import Manifest
from maskalign.evaluation.distances import enough_for_covariance
from maskalign.evaluation.drawn import DrawnPictures, labels_like
from maskalign.evaluation.features import load_features
from maskalign.evaluation.gap import held_out_gap
from maskalign.evaluation.heldout import HeldOut, bin_names, choose_teachers, losses_by_time, teachers_of
from maskalign.evaluation.measures import distances, held_out_measures
from maskalign.evaluation.pictures import PictureDataSet
from maskalign.evaluation.reference import load_reference
from maskalign.sampling.settings import Sampling

log = logging.getLogger(__name__)

BINS = 10


class PeriodicEvaluation:
    """Measures the same images, noise and samples each time, so that the numbers of a run can be compared.

    Args:
        config: `Config`; its `evaluate` section and the interpolant's path are used.
        spec: the model's `ModelSpec`.
        manifest: `Manifest` of the training data.
        device: where the model is.
        precision: precision of the sampling, `fp32` or `bf16`.
        decoder: latents -> images; None for pixels. For latents without a decoder no distances are measured.
    """

    def __init__(self, config, spec, manifest, device, precision="fp32", decoder=None):
        settings = config.evaluate
        self.settings, self.path, self.decoder = settings, config.objective.path, decoder
        data = settings.data or manifest.root
        held_out = Manifest.load(data)
        self.held_out = None
        if settings.images:
            own = dict(normalize=config.teacher.normalize, weights=config.teacher.weights, device=device)
            names, components = teachers_of(spec.teachers, config, spec.class_dim)
            teachers = choose_teachers(names, manifest, held_out, **own, class_tokens=spec.class_dim is not None)
            self.held_out = HeldOut(data, settings.images, teachers, class_components=components)
        self.sampling = Sampling(
            "ode",
            settings.steps,
            cfg_scale=settings.cfg_scale,
            cls_cfg_scale=settings.cls_cfg_scale,
            path=self.path,
            precision=precision,
        )
        self.real = self.network = self.reference = None
        visible = spec.latent is None or decoder is not None
        if settings.samples and visible and held_out.image_format is not None:
            self.real = PictureDataSet(data, settings.reference)
            self.network = load_features(settings.teacher, device=device)
        elif settings.samples:
            log.warning("evaluate.samples: no distances, since there is no decoder or %s has no pictures", data)

    def measure(self, model, main=True):
        """Measure a model. If it is sharded, all ranks call this together; ranks other than `main` get only the losses.

        Returns:
            dict from name, as in evaluation.json, to number; losses by time are `velocity_loss[0.0-0.1]` and so on.
        """
        row = {}
        if self.held_out is not None:
            by_time = losses_by_time(model, self.held_out, bins=BINS, path=self.path)
            row = held_out_measures(by_time, held_out_gap(model, self.held_out, path=self.path))
            for name, values in by_time.items():
                row |= {f"{name}[{place}]": value for place, value in zip(bin_names(BINS), values, strict=True)}
        if self.network is not None:
            row |= self._distances(model, main)
        return row

    def _distances(self, model, main):
        if self.reference is None:
            # All ranks need the labels. The other ranks of a machine read the cache that the first one writes.
            self.reference = load_reference(self.real, self.network)
        drawn = DrawnPictures(model, self.settings.samples, self.sampling, self.decoder)
        drawn.labels = labels_like(self.reference.labels, drawn.count)
        features = []
        for pictures in drawn.batches(self.sampling.batch_size):
            if main:
                features.append(self.network(pictures).numpy())
        if not main:
            return {}
        features, real = np.concatenate(features), self.reference.features
        # With a singular covariance the distance could not be compared with a result of `maskalign evaluate`.
        enough = enough_for_covariance(min(len(features), len(real)), self.network.dim)
        return distances(features, real, self.network.name, ("frechet", "kernel") if enough else ("kernel",))
