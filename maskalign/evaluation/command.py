"""The work of `maskalign evaluate`: draw or read images, compare them with real ones, and measure held-out losses."""

import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
from tqdm import tqdm

from maskalign.checkpoints.loading import load
from maskalign.config.teacher_names import parse_teachers
from maskalign.data.build.listing import tell_passed
from maskalign.data.format.manifest import Manifest, other_classes
from maskalign.errors import UsageError
from maskalign.evaluation.drawn import DrawnPictures
from maskalign.evaluation.features import load_features
from maskalign.evaluation.gap import MASK_RATIO, held_out_gap
from maskalign.evaluation.heldout import HeldOut, bin_names, choose_teachers, losses_by_time, teachers_of
from maskalign.evaluation.inception import InceptionFeatures, find_weights, inception_score
from maskalign.evaluation.measures import bias_note, distances, held_out_measures
from maskalign.evaluation.pictures import PictureDataSet
from maskalign.evaluation.reference import data_fingerprint, load_references
from maskalign.evaluation.report import write_report
from maskalign.evaluation.settings import EvaluationSettings
from maskalign.evaluation.subject import is_model, open_pictures
from maskalign.runtime.device import tune_host
from maskalign.runtime.outputs import make_folder
from maskalign.sampling.command import apply_preset, decoder_for
from maskalign.sampling.settings import Sampling, parse_classes

SAMPLES = 1000  # default number of samples; takes minutes on two CPU cores at 32 pixels


def evaluate(
    source,
    data,
    *,
    out=None,
    settings=None,
    sampling=None,
    preset=None,
    given=(),
    labels="reference",
    teacher="efficientnet-lite0",
    teacher_weights=None,
    inception=None,
    classes=None,
    held_out=None,
    ema=True,
    vae=None,
    device="auto",
    progress=True,
):
    """Evaluate a model or existing images.

    Args:
        source: a run, a checkpoint, a .pt or .safetensors file; or a folder of images, an .npz, a data set.
        data: the data set to compare with.
        out: folder for the report; by default the run's folder. Without either, no report is written.
        settings: `EvaluationSettings`.
        sampling: `Sampling`; its path is replaced by the run's.
        preset, given: a preset, and the names of the settings that it does not replace; see `with_preset`.
        labels: labels of the samples: `reference` (those of the real images in turn) or `uniform` (random).
        teacher: names of the teachers whose features are compared, separated by commas.
        teacher_weights: as for `load_teacher`, the same for all teachers.
        inception: path of torch-fidelity's Inception weights, or `download`; None for no FID and IS.
        classes: text as `parse_classes` reads it: compare only these classes.
        held_out: data set for the losses; by default `data`.
        ema: measure the moving average of the weights.
        vae: decoder of latents, as for `sample`.
        device: auto, cpu or cuda.
        progress: show progress bars.

    Returns:
        dict: the report, the same as in the file.

    Raises:
        UsageError: the request cannot be measured.
        RunError: the model gives numbers that are not finite.
    """
    from maskalign.runtime.device import find_device

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "maskalign evaluate runs in one process; draw with torchrun and maskalign sample --npz N, "
            "and give that file"
        )
    settings, sampling = settings or EvaluationSettings(), sampling or Sampling()
    teachers = parse_teachers(teacher) if settings.metrics else []
    if inception and not settings.metrics:
        settings = replace(settings, metrics=("frechet",))
    device = find_device(device, "--device")
    tune_host(device)
    if not settings.metrics and not settings.held_out_images:
        raise UsageError("--metrics none with --held-out-images 0 leaves nothing to measure; change one of them")
    manifest = Manifest.load(data)
    chosen = None if classes is None else parse_classes(classes, manifest.class_names)
    real = PictureDataSet(data, settings.reference, chosen) if settings.metrics else None
    out = None if out is None else make_folder(out)
    subject = pictures = images = training = None
    if is_model(source):
        subject = load(source, ema)
        _check_shape(subject, manifest, source, data)
        _check_classes(subject, manifest, source, data)
        subject.model.to(device)
        kind = subject.kind
        if settings.held_out_images:
            images, training = _held_out(subject, manifest, held_out or data, settings, device)
        if real:
            sampling = apply_preset(sampling, preset, given, subject.model, progress)
            pictures = _drawn(subject, settings.samples or SAMPLES, sampling, vae, labels)
    elif real:
        kind, pictures = open_pictures(source)
        if kind == "folder" and pictures.passed:
            print(f"skipped in {source}, not pictures: {tell_passed(pictures.passed)}", file=sys.stderr)
        pictures.count = min(pictures.count, settings.samples or pictures.count)
    else:
        raise UsageError(f"{source} is not a model, and --metrics none leaves nothing to measure of pictures")
    report = {
        "source": str(source),
        "kind": kind,
        "data": str(data),
        "samples": 0,
        "reference": 0,
        "metrics": {},
        "held_out": None,
        "settings": {
            "metrics": list(settings.metrics),
            "teachers": teachers,
            "classes": chosen,
            "data_fingerprint": data_fingerprint(manifest),
            "features_precision": "fp32",
        },
        "notes": [],
    }
    if subject:
        report["settings"] |= {"step": subject.info.step, "weights": "ema" if ema else "model"}
    if real:
        _check_size(pictures, real, source, data)
        networks = _networks(settings, real, pictures.count, teachers, teacher_weights, inception, device)
        _add_distances(report, pictures, real, networks, settings, progress)
    if images:
        _add_losses(report, subject, images, training, settings, progress)
    folder = out or (subject.folder if subject else None)
    if folder is not None:
        of_one = subject and not out and subject.kind == "checkpoint"
        stem = f"evaluation-{subject.source.resolve().name}" if of_one else "evaluation"
        write_report(report, folder / f"{stem}.json")
    return report


def _check_shape(subject, manifest, source, data):
    """Raise a UsageError if model and data set differ in size or number of classes, before anything is drawn."""
    model = subject.model
    if subject.info.latent is None and model.in_channels == 3 and model.input_size != manifest.resolution:
        raise UsageError(
            f"{source} draws pictures of {model.input_size}x{model.input_size}, but those of {data} are "
            f"{manifest.resolution}x{manifest.resolution}; give the data set that it was trained on, or a similar one"
        )
    if model.num_classes != manifest.num_classes:
        raise UsageError(
            f"{source} has {model.num_classes} classes, but {data} has {manifest.num_classes}; give the data set that "
            "it was trained on, or a similar one"
        )


def _check_classes(subject, manifest, source, data):
    """Raise a UsageError if model and data set do not have the same classes in the same order."""
    difference = other_classes(subject.info.class_names, manifest.class_names)
    if difference:
        raise UsageError(
            f"{source} was trained with other classes than {data} has: {difference}; give the data set that it was "
            "trained on, or one with the same classes in the same order"
        )


def _check_size(pictures, real, source, data):
    if tuple(pictures.size) != tuple(real.size):
        (height, width), (h, w) = pictures.size, real.size
        raise UsageError(
            f"{source} holds pictures of {width}x{height}, but those of {data} are {w}x{h}; compare with a data set of "
            f"their size (maskalign data build --size {width})"
        )


def _networks(settings, real, count, teachers, weights, inception, device):
    """Load the feature networks, and check that there are enough images for them."""
    networks = [load_features(name, weights, device) for name in teachers]
    if inception:
        networks.append(InceptionFeatures(find_weights(inception)).to(device).eval())
    for network in networks:
        settings.check_counts(count, real.count, network.name, network.dim)
    return networks


def _drawn(subject, count, sampling, vae, labels):
    """`DrawnPictures` of a model; their labels are set later."""
    from maskalign.sampling.drawing import check_class_guidance
    from maskalign.sampling.network import Network

    network = Network(subject.model, sampling.precision)
    check_class_guidance(network, sampling)
    sampling = replace(sampling, path=subject.info.path, precision=network.precision)
    return DrawnPictures(network, count, sampling, decoder_for(network, subject.info, vae), labels)


def _add_distances(report, pictures, real, networks, settings, progress):
    """Compare images with real ones in the features of all networks."""
    count, references = pictures.count, {}
    for network in networks:
        kinds = _kinds(network, settings)
        with _bar(real.count, f"reference, {network.name}", progress) as bar:
            found = load_references(
                real, kinds, lambda batch, network=network: _kinds_of(network, batch, settings)[0],
                batch_size=settings.batch_size, on_images=bar.update,
            )  # fmt: skip
        references |= {kind.name: reference.features for kind, reference in zip(kinds, found, strict=True)}
        labels = found[0].labels
        settings.check_counts(count, len(labels), network.name, network.dim)
    if isinstance(pictures, DrawnPictures) and progress:
        said = f"drawing {count:,} samples ({pictures.settings.describe()}) takes {in_words(pictures.seconds())}"
        print(f"maskalign: {said}; --samples and --steps change it", file=sys.stderr, flush=True)
    with _bar(count, "samples", progress) as bar:
        on_images = bar.update
        if isinstance(pictures, DrawnPictures):  # drawing takes most of the time
            pictures.choose_labels(labels)
            pictures.on_images, on_images = _up_to_total(bar), None
            report["settings"] |= asdict(pictures.settings) | {"labels": pictures.label_choice}
        features, logits = _features(pictures, networks, settings, on_images)
    for network in networks:
        for kind in _kinds(network, settings):
            # The spatial features are used only for sFID, which is a Frechet distance.
            metrics = settings.metrics if kind is network else ("frechet",)
            reference = references[kind.name]
            report["metrics"] |= distances(features[kind.name], reference, kind.name, metrics)
            note = bias_note(count, len(reference), kind.name, kind.dim)
            report["notes"] += [note] if note and "frechet" in metrics else []
    if logits is not None:
        mean, deviation = inception_score(logits, min(10, count))
        report["metrics"] |= {"inception_score": mean, "inception_score_std": deviation}
    report |= {"samples": count, "reference": len(labels)}


def in_words(seconds):
    """A duration in words: `about 40 seconds`, `about 12 minutes`, `about 3.5 hours`."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} second{'s' if seconds >= 1.5 else ''}"
    return f"about {round(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def _kinds(network, settings):
    """The kinds of features of a network: its own, and for Inception the spatial ones if sFID is measured."""
    spatial = isinstance(network, InceptionFeatures) and "frechet" in settings.metrics
    return [network, network.spatial] if spatial else [network]


def _kinds_of(network, batch, settings):
    """(features of a batch for each of `_kinds`, Inception's logits or None)."""
    if not isinstance(network, InceptionFeatures):
        return [network(batch)], None
    out = network.outputs(batch)
    return [out.pooled, out.spatial][: len(_kinds(network, settings))], out.logits


def _features(pictures, networks, settings, on_images):
    """dict from the name of a kind to (n, D) float32 features, and Inception's logits (None without it)."""
    parts, logits = {}, []
    for batch in pictures.batches(settings.batch_size):
        for network in networks:
            found, scores = _kinds_of(network, batch, settings)
            logits += [] if scores is None else [scores]
            for kind, features in zip(_kinds(network, settings), found, strict=True):
                parts.setdefault(kind.name, []).append(features.numpy())
        if on_images:
            on_images(len(batch))
    stacked = {name: np.concatenate(found) for name, found in parts.items()}
    return stacked, np.concatenate([part.numpy() for part in logits]) if logits else None


def _held_out(subject, manifest, held_out, settings, device):
    """(`HeldOut` for a model, the `Manifest` of its training data or None if it cannot be read)."""
    config, class_dim = subject.config, subject.model.class_dim
    other = manifest if str(held_out) == manifest.root else Manifest.load(held_out)
    _check_input(subject.model, other, held_out)
    _check_classes(subject, other, subject.info.label, held_out)
    training, own = None, {}
    if config is not None:
        own = {"normalize": config.teacher.normalize, "weights": config.teacher.weights}
        path = config.data.path if isinstance(config.data.path, str) else next(iter(config.data.path))
        with suppress(UsageError, OSError):  # trained on another machine
            training = Manifest.load(path)
    names, components = teachers_of(subject.info.teachers, config, class_dim)
    teachers = choose_teachers(names, training, other, device=device, class_tokens=class_dim is not None, **own)
    if class_dim is not None:
        _check_class_token(class_dim, components, teachers[0], training, config)
    return HeldOut(held_out, settings.held_out_images, teachers, settings.batch_size, components), training


def _check_class_token(class_dim, components, teacher, training, config):
    """Raise a UsageError if the class tokens of the held-out data do not fit those that the model was trained on."""
    there = teacher.network.class_dim if teacher.network is not None else teacher.class_tokens.stored["dim"]
    if components is None and there == class_dim:
        return
    if training is None:
        where = "" if config is None else f" at {config.data.path}"
        raise UsageError(
            f"the model denoises {class_dim} principal components of the class token of {teacher.name}, which are in "
            f"the manifest of its training data{where}, and that cannot be read; put it back, or leave the losses out: "
            "--held-out-images 0"
        )
    if components is None:
        raise UsageError(
            f"the class token of {teacher.name} has {there} numbers, and that of the model {class_dim}; give "
            "--held-out a data set like that of its training, or leave the losses out: --held-out-images 0"
        )


def _add_losses(report, subject, images, training, settings, progress):
    """Measure a model on held-out images."""
    path, there = subject.info.path, images.manifest
    with _bar(images.count, "held-out losses", progress) as bar:
        found = losses_by_time(subject.model, images, bins=settings.bins, path=path, on_images=bar.update)
    bins = bin_names(settings.bins)
    report["held_out"] = {name: dict(zip(bins, values, strict=True)) for name, values in found.items()}
    gap = held_out_gap(subject.model, images, path=path)
    report["metrics"] |= held_out_measures(found, gap)
    seen = training is not None and (training.digest(), training.source) == (there.digest(), there.source)
    report["settings"] |= {"mask_ratio": MASK_RATIO} if gap else {}
    report["settings"] |= {
        "held_out_data": str(images.path),
        "held_out_images": images.count,
        "held_out_was_trained_on": seen,
    }
    if subject.model.class_dim is not None:
        report["notes"].append(
            "the model is given the noised class token of each held-out image; do not compare its losses with those of "
            "models without a class token"
        )
    if seen:
        report["notes"].append("the losses are of images that the run was trained on; --held-out DIR names others")


def _check_input(model, manifest, path):
    """Raise a UsageError if the data set has another input shape or number of classes than the model."""
    if manifest.latent is not None:
        channels, side = manifest.latent["shape"][0] // 2, manifest.latent["shape"][1]
    else:
        channels, side = manifest.channels, manifest.resolution
    if (model.in_channels, model.input_size) != (channels, side):
        raise UsageError(
            f"the model takes {model.in_channels} x {model.input_size} x {model.input_size}, but {path} holds "
            f"{channels} x {side} x {side}; give the data set that it was trained on, or --held-out-images 0"
        )
    if manifest.num_classes != model.num_classes:
        raise UsageError(f"the model has {model.num_classes} classes, but {path} has {manifest.num_classes}")


def _up_to_total(bar):
    """Update a bar by fractions of images. Their rounded sum may exceed the total, which makes tqdm warn."""
    return lambda images: bar.update(min(images, bar.total - bar.n))


def _bar(total, name, shown):
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=total, desc=name, unit=" images", bar_format=form, disable=not shown)
