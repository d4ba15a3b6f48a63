"""Shards that replace others: written aside, then put in place together, by processes that may die at any moment.

DATA/.encode-ID holds, for every shard that is whole, the shard and NAME.json with its entry for the manifest. Once all
are there, commit.json gets the new manifest: from here on there is only forwards. The shards are renamed over the old
ones, manifest.json is written, the folder goes. A run that finds a commit.json ends what its writer began. Until then
readers have the old data set; between the first rename and the last, shards with the old members and the new ones.
"""

import hashlib
import json
import os
import shutil
from dataclasses import replace

from maskalign.data.build.processes import wait_for
from maskalign.data.format.manifest import FILE_NAME, Manifest, Shard
from maskalign.errors import RunError
from maskalign.runtime.files import sync_folder, write_atomically

PREFIX = ".encode-"
DONE = ".done"
COMMIT = "commit.json"
BASE = "base.txt"


class Staging:
    """The new shards of a data set on their way.

    Attributes:
        manifest: of the old data set.
        target: folder of the new one: the same, or another.
        recipe: what is added to the samples.
        renew: teachers whose stored class tokens get new principal components.
        work: folder for the new shards, named after `fingerprint`, which stands for the recipe and the old shards.
    """

    def __init__(self, manifest, target, recipe, fingerprint):
        self.manifest, self.target, self.recipe, self.fingerprint = manifest, target, recipe, fingerprint
        self.renew = []
        self.work = os.path.join(target, PREFIX + fingerprint)

    def path(self, shard):
        return os.path.join(self.work, shard.name)

    def record(self, shard):
        """The entry of the new shard, once it is whole; None before."""
        record = read_json(f"{self.path(shard)}.json")
        try:
            return Shard(**record) if os.path.getsize(self.path(shard)) == record["bytes"] else None
        except (TypeError, KeyError, FileNotFoundError):
            return None

    def finished(self):
        """Whether the target is the data set that this one was to become."""
        if not os.path.exists(os.path.join(self.target, FILE_NAME)):
            return False
        return Manifest.load(self.target).extra.get("encode") == self.fingerprint

    def strangers(self):
        """Folders of other encodings that were not finished."""
        names = sorted(os.listdir(self.target)) if os.path.isdir(self.target) else []
        paths = [os.path.join(self.target, name) for name in names if name.startswith(PREFIX)]
        return [path for path in paths if path != self.work]

    def begin(self):
        """Make the folder, and note in it which shards the new ones are made from."""
        os.makedirs(self.work, exist_ok=True)
        write_atomically(os.path.join(self.work, BASE), self._base().encode())

    def _base(self):
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    def can_go_on(self, folder=None):
        """Whether a folder of new shards (this one's by default) can be resumed.

        That is, one of them is whole (its record is written after it), and the data set is still the one that they were
        made from.
        """
        folder = folder or self.work
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if COMMIT in names:
            return True
        try:
            with open(os.path.join(folder, BASE), encoding="utf-8") as file:
                same = file.read() == self._base()
        except (OSError, ValueError):
            same = True  # nothing tells
        return same and any(name.endswith(".tar.json") for name in names)

    def wait(self, wait_seconds):
        """Wait until all shards are whole, those of other ranks too; returns the new manifest but for the features."""
        shards = []
        for shard in self.manifest.shards:
            what = f"{shard.name} of another rank"
            shards.append(wait_for(lambda shard=shard: self.record(shard), wait_seconds, what))
        return replace(self.manifest, shards=shards)

    def commit(self, latent, teachers):
        """Put the new shards, which are all there, and the new manifest in place of the old ones; returns it."""
        old = self.manifest
        if Manifest.load(old.root).to_json() != old.to_json():
            raise RunError(f"{old.root} was changed while it was encoded; run the same command again")
        manifest = replace(
            old,
            shards=[self.record(shard) for shard in old.shards],
            latent=latent or old.latent,
            teachers=old.teachers | teachers,
            hflip=self.recipe.hflip,
            extra=old.extra | {"encode": self.fingerprint},
            root=self.target,
        )
        write_atomically(os.path.join(self.work, COMMIT), manifest.validate().to_json().encode())
        finish_commits(self.target)
        return manifest


def finish_commits(target):
    """Put in place what is whole and noted as such: also by a run that was killed while it did so."""
    for name in sorted(os.listdir(target)) if os.path.isdir(target) else []:
        work = os.path.join(target, name)
        if not name.startswith(PREFIX):
            continue
        if name.endswith(DONE):
            shutil.rmtree(work)
            continue
        note = os.path.join(work, COMMIT)
        if not os.path.exists(note):
            continue
        with open(note, encoding="utf-8") as file:
            manifest = Manifest.from_json(file.read(), note)
        for shard in manifest.shards:
            staged = os.path.join(work, shard.name)
            if os.path.exists(staged):
                os.replace(staged, os.path.join(target, shard.name))
        sync_folder(target)
        # By way of the same folder, so that nothing half written is left in the data set either.
        staged = os.path.join(work, FILE_NAME)
        write_atomically(staged, manifest.to_json().encode())
        os.replace(staged, os.path.join(target, FILE_NAME))
        sync_folder(target)
        # Under a name that says so: half cleared, the folder would look like one that is not finished.
        os.rename(work, work + DONE)
        shutil.rmtree(work + DONE)


def read_json(path):
    """What a JSON file holds; None where it is not there or not whole."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None
