"""The work of `maskalign evaluate`: draw or read pictures, compare them with real ones, and measure held-out losses."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskalign.data.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.evaluation.drawn import DrawnPictures, labels_like
from maskalign.evaluation.features import load_features
from maskalign.evaluation.heldout import HeldOut, bin_names, choose_teachers, losses_by_time
from maskalign.evaluation.inception import InceptionFeatures, find_weights, inception_score
from maskalign.evaluation.measures import bias_note, distances
from maskalign.evaluation.pictures import PictureDataSet
from maskalign.evaluation.reference import load_reference
from maskalign.evaluation.report import write_report
from maskalign.evaluation.settings import EvaluationSettings
from maskalign.evaluation.subject import is_model, load_subject, open_pictures
from maskalign.sampling.settings import Sampling, parse_classes
from maskalign.teachers.names import parse_teachers
from maskalign.training.parallel import tune_host

SAMPLES = 2000  # drawn from a model where nobody says how many


def evaluate(
    source,
    data,
    *,
    out=None,
    settings=None,
    sampling=None,
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
    """Evaluate a model or pictures.

    Args:
        source: a run, a checkpoint, a .pt or .safetensors file; or a folder of pictures, an .npz, a data set.
        data: the data set to compare with.
        out: folder for the report; by default the run's, and none where the source is no run.
        settings: `EvaluationSettings`. sampling: `Sampling`; its path is replaced by the run's.
        teacher: whose features; several with commas. teacher_weights: as for `load_teacher`, one for all.
        inception: path of torch-fidelity's Inception weights, or `download`; None leaves FID and IS out.
        classes: text as `parse_classes` reads it: compare only these.
        held_out: data set for the losses; by default `data`.
        ema: measure the moving average of the weights.
        vae: decoder of latents, as for `sample`.
        device: auto, cpu or cuda.

    Returns:
        dict: the report, as it is written.

    Raises:
        UsageError: what was asked for cannot be measured. RunError: the model draws numbers that are not finite.
    """
    from maskalign.sampling.command import find_device

    settings, sampling = settings or EvaluationSettings(), sampling or Sampling()
    teachers = parse_teachers(teacher) if settings.metrics else []
    if inception and not settings.metrics:
        settings = replace(settings, metrics=("frechet",))
    device = find_device(device)
    tune_host(device)
    if settings.metrics:
        real = PictureDataSet(data, settings.reference)
        chosen = None if classes is None else parse_classes(classes, real.manifest.class_names)
    else:
        real, chosen = None, None
    manifest = real.manifest if real else Manifest.load(data)
    subject = kind = pictures = None
    if is_model(source):
        subject = load_subject(source, ema)
        kind, count = subject.kind, settings.samples or SAMPLES
        _check_shape(subject, manifest, source, data)
        subject.model.to(device)
    elif not settings.metrics:
        raise UsageError(f"{source} is no model, and --metrics none leaves nothing to measure of pictures")
    else:
        kind, pictures = open_pictures(source)
        if settings.samples:
            pictures.count = min(pictures.count, settings.samples)
        count = pictures.count
        _check_size(pictures, real, source, data)
    networks = _networks(settings, real, count, teachers, teacher_weights, inception, device)
    references = {}
    for network in networks:
        with _bar(real.count, f"reference, {network.name}", progress) as bar:
            found = load_reference(real, network, batch_size=settings.batch_size, on_images=bar.update)
        references[network.name] = _of_classes(found, chosen, network, settings, count)
    metrics, notes, report_settings = {}, [], {}
    if networks:
        labels = references[networks[0].name][1]
        if subject:
            pictures, report_settings = _draw(subject, labels_like(labels, count), sampling, vae)
        with _bar(count, "samples", progress) as bar:
            if subject:
                pictures.on_images = bar.update
            features, logits = _features(pictures, networks, settings.batch_size, None if subject else bar.update)
        for network in networks:
            reference = references[network.name][0]
            metrics |= distances(features[network.name], reference, network.name, settings.metrics)
            note = bias_note(count, len(reference), network.name, network.dim)
            notes += [note] if note and "frechet" in settings.metrics else []
        if logits is not None:
            metrics["inception_score"], metrics["inception_score_std"] = inception_score(logits, min(10, count))
    losses = None
    if subject and settings.held_out_images:
        losses, about_losses = _losses(subject, manifest, held_out or data, settings, device, progress)
        report_settings |= about_losses
        for name, values in losses.items():
            metrics[f"held_out_{name}"] = float(np.mean(list(values.values())))
        if about_losses["held_out_was_trained_on"]:
            notes.append("the losses are of images that the run was trained on; --held-out DIR names others")
    report = {
        "source": str(source),
        "kind": kind,
        "data": str(data),
        "samples": count if networks else 0,
        "reference": len(references[networks[0].name][0]) if networks else 0,
        "metrics": metrics,
        "held_out": losses,
        "settings": {
            "metrics": list(settings.metrics),
            "teachers": teachers,
            "classes": chosen,
            "data_digest": manifest.digest(),
            "features_precision": "fp32",
            **({"step": subject.about["step"], "weights": "ema" if ema else "model"} if subject else {}),
            **report_settings,
        },
        "notes": notes,
    }
    folder = Path(out) if out else (subject.folder if subject else None)
    if folder is not None:
        stem = "evaluation" if out or not subject else subject.stem
        write_report(report, folder / f"{stem}.json")
    return report


def _check_shape(subject, manifest, source, data):
    """A checkpoint of another shape than the data set is refused before anything is drawn."""
    model = subject.model
    if subject.about["latent"] is None and model.in_channels == 3 and model.input_size != manifest.resolution:
        raise UsageError(
            f"{source} draws pictures of {model.input_size}x{model.input_size}, but those of {data} are "
            f"{manifest.resolution}x{manifest.resolution}; give the data set that it was trained on, or its like"
        )
    if model.num_classes != manifest.num_classes:
        raise UsageError(
            f"{source} has {model.num_classes} classes, but {data} has {manifest.num_classes}; give the data set that "
            "it was trained on, or its like"
        )


def _check_size(pictures, real, source, data):
    if tuple(pictures.size) != tuple(real.size):
        (height, width), (h, w) = pictures.size, real.size
        raise UsageError(
            f"{source} holds pictures of {width}x{height}, but those of {data} are {w}x{h}; compare with a data set of "
            f"their size (maskalign data build --size {width})"
        )


def _networks(settings, real, count, teachers, weights, inception, device):
    """The networks that give features, after a look at the numbers of pictures."""
    networks = [load_features(name, weights, device) for name in teachers]
    if inception:
        networks.append(InceptionFeatures(find_weights(inception)).to(device).eval())
    for network in networks:
        settings.check_counts(count, real.count, network.name, network.dim)
    return networks


def _of_classes(reference, chosen, network, settings, count):
    """(features, labels) of the real pictures, of the chosen classes alone."""
    if chosen is None:
        return reference.features, reference.labels
    keep = np.isin(reference.labels, chosen)
    settings.check_counts(count, int(keep.sum()), network.name, network.dim)
    return reference.features[keep], reference.labels[keep]


def _draw(subject, labels, sampling, vae):
    """(pictures of the model, the settings that they are drawn with)."""
    from maskalign.sampling.command import _decoder_for
    from maskalign.sampling.network import Network

    sampling = replace(sampling, path=subject.about["path"])
    network = Network(subject.model, sampling.precision)
    pictures = DrawnPictures(network, labels, sampling, _decoder_for(network, subject.about, vae))
    return pictures, {key: value for key, value in asdict(sampling).items()} | {"precision": network.precision}


def _features(pictures, networks, batch_size, on_images):
    """dict from network to (n, D) float32 features, and Inception's logits (None without it)."""
    parts, logits = {network.name: [] for network in networks}, []
    for batch in pictures.batches(batch_size):
        for network in networks:
            if isinstance(network, InceptionFeatures):
                found, scores = network.both(batch)
                logits.append(scores)
            else:
                found = network(batch)
            parts[network.name].append(found.numpy())
        if on_images:
            on_images(len(batch))
    stacked = {name: np.concatenate(found) for name, found in parts.items()}
    return stacked, np.concatenate([part.numpy() for part in logits]) if logits else None


def _losses(subject, manifest, held_out, settings, device, progress):
    """({metric: {bin: value}}, settings to report) of a model on held-out images."""
    config, about = subject.config, subject.about
    there = manifest if str(held_out) == manifest.root else Manifest.load(held_out)
    training = None
    if config is not None:
        try:
            path = config.data.path  # or several with weights
            training = Manifest.load(path if isinstance(path, str) else next(iter(path)))
        except (UsageError, OSError):
            training = None  # trained elsewhere
    names = about.get("teachers") or []
    own = {"normalize": config.teacher.normalize, "weights": config.teacher.weights} if config else {}
    teachers = choose_teachers(names, training, there, device=device, **own)
    images = HeldOut(held_out, settings.held_out_images, teachers, settings.batch_size)
    _check_input(subject.model, there, held_out)
    with _bar(images.count, "held-out losses", progress) as bar:
        found = losses_by_time(subject.model, images, bins=settings.bins, path=about["path"], on_images=bar.update)
    bins = bin_names(settings.bins)
    seen = training is not None and training.digest() == there.digest()
    facts = {"held_out_data": str(held_out), "held_out_images": images.count, "held_out_was_trained_on": seen}
    return {name: dict(zip(bins, values, strict=True)) for name, values in found.items()}, facts


def _check_input(model, manifest, path):
    """The model must take what the data set holds."""
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


def _bar(total, name, shown):
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=total, desc=name, unit=" images", bar_format=form, disable=not shown)
