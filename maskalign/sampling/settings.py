"""Settings of sampling. They are read and checked before torch is imported."""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, Optional, get_args

from maskalign.config.option import option
from maskalign.config.settings import PATHS
from maskalign.errors import UsageError


def parse_interval(text):
    """`LO,HI` as two floats."""
    parts = text.strip("[]() ").split(",")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        raise UsageError(f"--cfg-interval: {text!r} is not two numbers LO,HI, e.g. 0,0.7") from None
    return low, high


SamplerName = Literal["ode", "heun", "sde"]
Precision = Literal["auto", "fp32", "bf16"]
SAMPLERS, PRECISIONS = get_args(SamplerName), get_args(Precision)


@dataclass(frozen=True)
class Sampling:
    """Settings of a sampler.

    On 50,000 images, REPA's published evaluation is `Sampling("sde", 250, 1.8, (0.0, 0.7))` and REG's is
    `Sampling("sde", 250, 2.3, (0.0, 0.85))`.
    """

    sampler: SamplerName = option("ode", group="sampler")
    """Euler (ode), Heun, or Euler-Maruyama (sde)."""
    steps: int = option(50, group="sampler")
    """Steps of the sampler; Heun evaluates the model twice per step."""
    cfg_scale: float = option(1.0, group="sampler")
    """Classifier-free guidance scale; 1 is none."""
    cfg_interval: tuple = option((0.0, 1.0), group="sampler", parse=parse_interval, metavar="LO,HI")
    """Times between which guidance is applied, both included; 1 is noise, 0 is data."""
    path: str = option("linear", hidden=True)
    """The interpolant's path that the model was trained on."""
    seed: int = option(0, group="sampler")
    """Seed of the noise; an image depends only on this, its class and its number."""
    batch_size: int = option(64, group="sampler")
    """Images drawn at once."""
    precision: Precision = option("fp32", group="sampler")
    """fp32, bf16, or auto (bf16 if the processor supports it); the sampler's own state is float64."""
    cls_cfg_scale: Optional[float] = option(None, group="sampler")
    """Guidance scale of the class token, for models that have one; by default the image's scale, 0 is none."""

    def __post_init__(self):
        _require(self.sampler in SAMPLERS, "--sampler", self.sampler, f"is not one of {', '.join(SAMPLERS)}")
        _require(self.steps >= 1, "--steps", self.steps, "must be at least 1")
        rule = "must be a number of at least 0 (1 is no guidance)"
        _require(0 <= self.cfg_scale < float("inf"), "--cfg-scale", self.cfg_scale, rule)
        if self.cls_cfg_scale is not None:
            rule = "must be a number of at least 0 (0 is no guidance of the class token)"
            _require(0 <= self.cls_cfg_scale < float("inf"), "--cls-cfg-scale", self.cls_cfg_scale, rule)
        low, high = self.cfg_interval
        ordered = 0 <= low <= high <= 1
        _require(ordered, "--cfg-interval", f"{low},{high}", "must satisfy 0 <= low <= high <= 1")
        _require(self.path in PATHS, "path", self.path, f"is not one of {', '.join(PATHS)}")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "must be at least 1")
        _require(self.precision in PRECISIONS, "--precision", self.precision, f"is not one of {', '.join(PRECISIONS)}")

    def describe(self):
        """The settings in a few words for a title, e.g. `sde, 250 steps, guidance 1.8 on [0, 0.7]`.

        The class token's guidance is included if it differs from the image's: `guidance 1.8 (class token 0)`.
        """
        words = f"{self.sampler}, {self.steps} steps"
        class_scale = class_token_scale(self.cfg_scale, self.cls_cfg_scale)
        if self.cfg_scale != 1 or class_scale != 1:
            words += f", guidance {self.cfg_scale:g}"
            if class_scale != self.cfg_scale:
                words += f" (class token {self.cls_cfg_scale:g})"
            if tuple(self.cfg_interval) != (0.0, 1.0):
                words += " on [{:g}, {:g}]".format(*self.cfg_interval)
        return words


# The settings with which the papers draw their 50,000 images: `--preset paper`.
PAPER_PRESETS = {
    "reg": dict(sampler="sde", steps=250, cfg_scale=2.3, cls_cfg_scale=2.3, cfg_interval=(0.0, 0.85)),
    "repa": dict(sampler="sde", steps=250, cfg_scale=1.8, cfg_interval=(0.0, 0.7)),
    "sit": dict(sampler="sde", steps=250, cfg_scale=1.5, cfg_interval=(0.0, 1.0)),
}


def with_preset(settings, preset, given, *, class_token, aligned):
    """Replace settings by those of a preset, except the ones that the command line gives.

    Args:
        settings: `Sampling`.
        preset: `paper`, or None for unchanged settings.
        given: names of the settings that the command line gives.
        class_token: True if the model has a class token; it gets the published settings of REG and MaskAlign.
        aligned: True if the model has a projector; it gets the settings of REPA, and other models those of SiT.

    Returns:
        (`Sampling`, the name of the paper or None).
    """
    if preset is None:
        return settings, None
    paper = "reg" if class_token else "repa" if aligned else "sit"
    chosen = {name: value for name, value in PAPER_PRESETS[paper].items() if name not in given}
    return replace(settings, **chosen), paper


def class_token_scale(scale, class_scale):
    """The guidance scale of a class token; 1 is no guidance.

    Args:
        scale: guidance scale of the image.
        class_scale: the setting: None for the image's scale, 0 for no guidance as in REG's sampler, else the scale.
    """
    if class_scale is None:
        return scale
    return class_scale or 1.0


def parse_classes(text, class_names):
    """`--classes` as a list of labels.

    A word that is both the name of one class and the label of another, such as "2" if label 1 is named "2", is an
    error; "name:2" and "label:2" (or "label:2-5") are unambiguous.

    Args:
        text: labels, ranges of labels and class names, separated by commas or spaces: `0,3,7`, `0-9`, `Flags`.
        class_names: name of every label.

    Raises:
        UsageError: a class does not exist, no class is given, or a word is ambiguous.
    """
    names = [str(name) for name in class_names]
    text = text.strip("[]() ")
    words = text.split(",") if "," in text else text.split()
    words = [word.strip(" '\"") for word in words]
    if len(words) > 1 and (whole := _by_name(text, names)) is not None:
        try:
            apart = [label for word in words for label in _labels_of(word, names)]
        except UsageError:
            return [whole]  # a name that contains a comma or a space
        raise UsageError(
            f"--classes: {text!r} is the name of label {whole}, and also the labels "
            f"{', '.join(map(str, apart))}; write name:... or label:... before each"
        )
    if len(words) > 1 and text.startswith("name:"):
        whole = _by_name(text.removeprefix("name:"), names)
        if whole is not None:
            return [whole]
    labels = [label for word in words for label in _labels_of(word, names)]
    if not labels:
        raise UsageError(f"--classes: none given; the model has labels 0 to {len(names) - 1}")
    return labels


def _labels_of(word, names):
    """list of the labels that a word stands for; it may be a range."""
    kind, _, rest = word.partition(":")
    if kind in ("name", "label") and rest and _by_name(word, names) is None:
        if kind == "label":
            labels = _by_label(rest, len(names))
            if labels is None:
                raise UsageError(f"--classes: {rest!r} is not a label; give one of 0 to {len(names) - 1}, or a range")
            return labels
        named = _by_name(rest, names)
        if named is None:
            raise _no_class(rest, names)
        return [named]
    named, number = _by_name(word, names), len(names)
    as_label = _readable_label(word)
    inside = as_label is not None and max(as_label) < number
    if named is not None:
        if inside and list(as_label) != [named]:
            raise UsageError(_two_readings(word, f"label {named}", as_label, names))
        return [named]
    if inside:
        ends = [_by_name(str(end), names) for end in as_label] if len(as_label) <= number else []
        other = [end for end, label in zip(ends, as_label, strict=False) if end is not None and end != label]
        if other and "-" in word:  # 2-5 is ambiguous if the classes are called 1, 2, ...
            first, _, last = word.partition("-")
            raise UsageError(_two_readings(word, f"the classes {first!r} to {last!r}", as_label, names))
    labels = _by_label(word, number)
    if labels is None:
        raise _no_class(word, names)
    return labels


def _two_readings(word, named, labels, names):
    low, high = labels[0], labels[-1]
    label = f"label {low} ({names[low]!r})" if low == high else f"the labels {low} ({names[low]!r}) to {high}"
    remedy = f"label:{word}, or the names one by one (name:{low},...)"
    if not named.startswith("the classes"):
        remedy = f"name:{word} or label:{word}"
    return f"--classes: {word!r} may be the name of {named}, or {label}; write {remedy}"


def _by_name(word, names):
    """The label of a class name, which may differ in upper and lower case; None if there is no such class."""
    for spelled in (str, str.lower):
        found = [label for label, name in enumerate(names) if spelled(name) == spelled(word)]
        if len(found) > 1:
            labels = " and ".join(f"label:{label}" for label in found[:3])
            raise UsageError(f"--classes: {word!r} is the name of several classes; write {labels}")
        if found:
            return found[0]
    return None


def _readable_label(word):
    """The labels that a word such as "3" or "0-9" gives, even if they do not exist; None if it is not a number."""
    first, dash, last = word.partition("-")
    last = last if dash else first
    if re.fullmatch("[0-9]{1,9}", first) and re.fullmatch("[0-9]{1,9}", last) and int(first) <= int(last):
        return range(int(first), int(last) + 1)
    return None


def _by_label(word, number):
    """The labels that "3" or "0-9" stands for; None if it is not a number, UsageError if a label does not exist."""
    labels = _readable_label(word)
    if labels is None:
        if re.fullmatch("-?[0-9]+", word):
            _label(int(word), number)
        return None
    _label(labels[-1], number)
    return list(labels)


def _no_class(word, names):
    near = get_close_matches(word.lower(), [name.lower() for name in names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; give names, or labels 0 to {len(names) - 1}"
    return UsageError(f"--classes: there is no class {word!r}{hint}")


def spread_classes(number, most=10):
    """At most `most` labels, evenly spread over `number` classes."""
    count = min(number, most)
    return [index * number // count for index in range(count)]


def _label(label, number):
    if not 0 <= label < number:
        raise UsageError(f"--classes: label {label} is outside the model's classes 0 to {number - 1}")
    return label


def _require(condition, what, value, rule):
    if not condition:
        raise UsageError(f"{what}: {value} {rule}")
