"""The work of `maskalign push`: upload a run to a repository of the Hub, with a model card."""

import shutil
from contextlib import suppress
from pathlib import Path

import yaml

from maskalign import __version__
from maskalign.checkpoints.loading import load
from maskalign.checkpoints.sources import EXPORT, PREFIX, parse_hub_name
from maskalign.checkpoints.weight_files import write_safetensors
from maskalign.data.format.manifest import Manifest
from maskalign.errors import RunError, UsageError, one_line
from maskalign.reporting.run import read_run
from maskalign.reporting.settings import flatten
from maskalign.runtime.files import write_atomically
from maskalign.runtime.hub import hub_answers, hub_url
from maskalign.runtime.outputs import make_folder

CARD, SETTINGS, SAMPLES = "README.md", "config.yaml", "samples.png"
METRICS = ("step", "loss", "velocity_loss", "align_loss", "images_per_second")
# Licenses of the parts, as their publishers state them.
PARTS = {
    "dinov2": "DINOv2 (teacher): Apache-2.0",
    "efficientnet": "EfficientNet-Lite0 (teacher): Apache-2.0",
    "timm": "the timm model (teacher): see its own model card",
    "stabilityai/sd-vae": "sd-vae (latents): MIT",
}


def push(run, repository, *, out=None, dry_run=False, private=False, ema=True, samples=None, license=None):
    """Write a run's weights, settings and model card to a folder, and upload it.

    Args:
        run: a run folder or one of its checkpoints.
        repository: USER/NAME on the Hub; the repository is created if it does not exist.
        out: the folder; by default RUN/hub.
        dry_run: write the folder, and upload nothing.
        private: make a new repository private.
        ema: use the moving average of the weights.
        samples: an image for the card; by default the newest sample sheet of the run.
        license: license of the weights for the card, e.g. apache-2.0.

    Returns:
        (Path of the folder, URL of the repository or None).

    Raises:
        UsageError: the run or the name is not valid, or there is no token or no network.
        RunError: the upload failed.
    """
    if parse_hub_name(PREFIX + repository) is None or "@" in repository or ":" in repository:
        raise UsageError(f"{repository}: not the name of a repository; write USER/NAME")
    if not Path(run).is_dir():
        raise UsageError(f"{run}: not a run; push takes a run folder of maskalign train, or one of its checkpoints")
    api = None if dry_run else _hub_client(repository)
    loaded = load(run, ema)
    folder = make_folder(out or loaded.folder / "hub")
    write_safetensors(folder / EXPORT, loaded.model, loaded.info)
    record = read_run(loaded.folder)
    settings = public_settings(record.settings)
    write_atomically(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
    picture = _samples(loaded.folder, samples)
    (folder / SAMPLES).unlink(missing_ok=True)
    if picture is not None:
        shutil.copyfile(picture, folder / SAMPLES)
    card = model_card(
        repository, loaded, settings, record, picture is not None, license, data_license(loaded.config.data.path)
    )
    write_atomically(folder / CARD, card.encode())
    if dry_run:
        return folder, None
    return folder, _upload(api, folder, repository, private, loaded.info.label)


def public_settings(settings):
    """The settings without paths of this machine: only the last part of a path is kept."""

    def last(value):
        if isinstance(value, dict):
            return {last(key): entry for key, entry in value.items()}
        return value.rstrip("/").rsplit("/", 1)[-1] if isinstance(value, str) else value

    places = {"": ("run_dir",), "data": ("path", "cache_dir"), "evaluate": ("data",), "preview": ("vae",)}
    places |= {"teacher": ("weights",), "training": ("init_from", "resume")}
    public = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for section, names in places.items():
        part = public if not section else public.get(section)
        for name in names:
            if not isinstance(part, dict) or name not in part:
                continue
            value = part[name]
            # USER/NAME of a hub is not a path of this machine.
            local = (
                not isinstance(value, str) or value.startswith(("/", ".", "~")) or section in ("", "data", "evaluate")
            )
            part[name] = last(value) if local else value
    return public


def data_license(path):
    """The license in the data set's manifest; None if it has none, or the data set cannot be read."""
    paths = [path] if isinstance(path, str) else list(path)
    found = []
    for one in paths:
        with suppress(UsageError, RunError, OSError):
            found.append(Manifest.load(one).license)
    return "; ".join(filter(None, found)) or None


def model_card(repository, loaded, settings, record, with_picture, license=None, data=None):
    """The text of the repository's README.md."""
    model, info = loaded.model, loaded.info
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    head = {"library_name": "maskalign", "pipeline_tag": "unconditional-image-generation"}
    head["tags"] = ["maskalign", "diffusion", "sit", "class-conditional"]
    if license:
        head["license"] = license
    sizes = f"{model.depth} blocks, width {model.width}, {model.heads} heads, patch {model.patch_size}"
    classes = info.class_names or []
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {repository.rpartition('/')[2]}", ""]
    lines += [
        f"A class-conditional diffusion transformer, trained with [maskalign](https://arxiv.org/abs/2606.08788) "
        f"{__version__}: {sizes}, {million:.1f} M parameters, {model.num_classes} classes, inputs of "
        f"{model.in_channels} x {model.input_size} x {model.input_size}"
        + (f", latents of {info.latent.get('name') or 'a VAE'}." if info.latent else ", pixels."),
        "",
        f"`{EXPORT}` holds the {'averaged ' if info.ema else ''}weights after {info.step} steps; "
        f"`{SETTINGS}` holds the settings.",
        "",
        *([f"![samples]({SAMPLES})", ""] if with_picture else []),
        "## Use",
        "",
        "```bash",
        f"maskalign sample {PREFIX}{repository} --out pictures",
        "```",
        "",
        "```python",
        "from maskalign.checkpoints import load_model",
        "from maskalign.sampling import Sampling, generate",
        "",
        f'model = load_model("{PREFIX}{repository}")',
        f'pictures = generate(model, [0, 1, 2], Sampling(steps=50, path="{info.path}"))',
        "```",
        "",
    ]
    if classes:
        shown = ", ".join(_plain(name) for name in classes[:20])
        lines += ["## Classes", "", shown + (f" and {len(classes) - 20} more" if len(classes) > 20 else "") + ".", ""]
    lines += ["## Metrics", "", *_metrics(record), "## Settings", "", *_settings(settings), "## License", ""]
    lines += [*_licenses(loaded, license, data), ""]
    return "\n".join(lines)


def _metrics(record):
    rows = [(name.replace("_", " "), record.last(name)) for name in METRICS if record.last(name) is not None]
    title = "At the end of training" if rows else None
    lines = (
        [f"{title}:", "", "| | |", "|-|-|", *(f"| {name} | {value:g} |" for name, value in rows), ""] if rows else []
    )
    found = record.evaluation.get("metrics")
    if isinstance(found, dict) and found:
        count = _plain(record.evaluation.get("samples", "?"))
        lines += [
            f"By `maskalign evaluate` with {count} samples:", "", "| | |", "|-|-|",
            *(f"| {_plain(name)} | {_plain(value)} |" for name, value in found.items()), "",
        ]  # fmt: skip
    return lines or ["None were recorded.", ""]


def _settings(settings):
    rows = flatten(settings)
    return ["| | |", "|-|-|", *(f"| `{name}` | {_plain(value)} |" for name, value in rows.items()), ""]


def _licenses(loaded, license, data):
    names = [*loaded.info.teachers, str(loaded.info.vae_name or "")]
    lines = [f"- The weights: {license or 'no license was given; ask their author'}."]
    lines.append(f"- The images of the training: {_plain(data) if data else 'see the license of the data set'}.")
    parts = {text: None for name in names for start, text in PARTS.items() if name.startswith(start)}
    return lines + [f"- {text}." for text in parts] + ["- The code, maskalign: Apache-2.0."]


def _plain(value):
    """A value as text without characters that are markup in a table or a page."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _samples(folder, asked):
    """Path of the image for the card, or None."""
    if asked is not None:
        if not Path(asked).is_file():
            raise UsageError(f"--samples: there is no picture {asked}")
        if Path(asked).suffix != ".png":
            raise UsageError(f"--samples: {asked} is not a .png file; maskalign sample writes one as grid.png")
        return Path(asked)
    found = [path for path in Path(folder, "samples").glob("step_*.png") if path.stem[5:].isdecimal()]
    return max(found, key=lambda path: int(path.stem[5:]), default=None)


def _hub_client(repository):
    """The Hub's client; checks first that there is a token and that the Hub answers."""
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError("push needs a package: pip install 'maskalign[hub]'") from None
    if huggingface_hub.get_token() is None:
        raise UsageError(
            "push needs a token that may write: set HF_TOKEN, or run hf auth login; --dry-run leaves the folder "
            "and needs none"
        )
    if not hub_answers(hub_url()):
        raise UsageError(f"{repository}: the hub {hub_url()} does not answer; --dry-run leaves the folder for later")
    return huggingface_hub.HfApi(endpoint=hub_url())


def _upload(api, folder, repository, private, label):
    from huggingface_hub import errors

    try:
        api.create_repo(repository, private=private, exist_ok=True)
        files = [name for name in (EXPORT, SETTINGS, CARD, SAMPLES) if (folder / name).is_file()]
        api.upload_folder(
            folder_path=folder, repo_id=repository, allow_patterns=files, commit_message=f"Upload {label} (maskalign)"
        )
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UsageError(
                f"{repository}: {hub_url()} refuses the token (status {status}); it has to be one that may write there"
            ) from None
        raise RunError(f"{repository}: the upload failed ({one_line(error)[:200]}); run the command again") from None
    except Exception as error:  # errors of the client, its HTTP library and the system
        raise RunError(f"{repository}: the upload failed ({one_line(error)[:200]}); run the command again") from None
    return f"{hub_url()}/{repository}"
