"""A small classifier of the training images. Its features are used for the distances of samples from real images.

A model that denoises the teacher's class token is trained on the teacher's features of an image, so distances in these
features would favor it. This classifier is trained by the benchmark once per data set, and no model uses it.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from maskalign.data import ShardStream
from maskalign.data.format.manifest import Manifest
from maskalign.errors import RunError

EPOCHS, BATCH, RATE, FEATURES = 8, 128, 0.01, 128


class Classifier(nn.Module):
    """Five 3x3 convolutions with batch norm, two of them residual, over images of any size.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.down = _convolution(3, 32, 2), _convolution(32, 64, 2)
        self.first = _convolution(64, 64)
        self.narrow = _convolution(64, FEATURES, 2)
        self.second = _convolution(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images):
        """(B, 3, H, W) uint8 -> (B, 128) float32, the averages over the last feature map."""
        x = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        x = self.down(self.stem(x))
        x = x + self.first(x)
        x = self.narrow(x)
        x = x + self.second(x)
        return x.mean(dim=(2, 3)).float()

    def forward(self, images):
        """Logits (B, num_classes)."""
        return self.head(self.features(images))


def _convolution(width_in, width_out, stride=1):
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU())


def load_images(path, most=None):
    """(images (n, 3, H, W) uint8, labels (n,)) of a data set, the first `most` of a fixed order."""
    images, labels, count = [], [], 0
    most = min(most or Manifest.load(path).num_samples, Manifest.load(path).num_samples)
    for part in ShardStream(path, min(32, most), seed=0, epochs=1, streams=1, fields=["image"]):
        images.append(part["image"].clone())
        labels.append(part["label"].clone())
        count += len(labels[-1])
        if count >= most:
            break
    return torch.cat(images)[:most], torch.cat(labels)[:most]


def train_classifier(train, test, path, *, epochs=EPOCHS, images=None, say=print):
    """Train the classifier and write it to a file, unless the file exists.

    Args:
        train, test: folders of the two parts of the data; the accuracy is measured on the test part.
        path: path of the file.
        epochs: passes over the training images, which are mirrored and shifted at random.
        images: number of training images to use; None for all.
        say: function that prints a line of progress.

    Returns:
        dict with accuracy (on held-out images), epochs, images and seconds (CPU time).
    """
    path = Path(path)
    if path.is_file():
        return torch.load(path, weights_only=True)["about"]
    (x, y), start = load_images(train, images), time.process_time()
    classes = len(Manifest.load(train).class_names)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(classes).to(memory_format=torch.channels_last)
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    batch = min(BATCH, len(x))
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, RATE, total_steps=max(steps, 2))
    for epoch in range(epochs):
        order, total = torch.randperm(len(x), generator=generator), 0.0
        for rows in order[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(_jittered(x[rows], generator)), y[rows], label_smoothing=0.1)
            loss.backward()
            adamw.step()
            adamw.zero_grad()
            schedule.step()
            total += float(loss.detach()) * batch / len(x)
        say(f"classifier: epoch {epoch + 1}/{epochs}, loss {total:.3f}")
    model.eval()
    x, y = load_images(test)
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True))
    measured = {
        "accuracy": right / len(y), "epochs": epochs, "images": int(steps * batch / epochs),
        "seconds": time.process_time() - start,
    }  # fmt: skip
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save({"state": model.state_dict(), "classes": classes, "about": measured}, temporary)
    temporary.rename(path)
    return measured


def _jittered(images, generator):
    """Mirror a batch or not, and shift it by up to three pixels, with one random draw for all of its images."""
    draw = torch.randint(0, 7, (2,), generator=generator).tolist()
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(3)
    padded = F.pad(images.float(), (3, 3, 3, 3), mode="reflect")
    height, width = images.shape[2:]
    return padded[:, :, draw[0] : draw[0] + height, draw[1] : draw[1] + width]


def load_classifier(path):
    """Load the classifier from a file, in eval mode.

    Raises:
        RunError: the file does not exist.
    """
    if not Path(path).is_file():
        raise RunError(f"{path} does not exist; the same command trains the classifier again")
    saved = torch.load(path, weights_only=True)
    model = Classifier(saved["classes"])
    model.load_state_dict(saved["state"])
    return model.eval().to(memory_format=torch.channels_last)
