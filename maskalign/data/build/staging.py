"""Replace the shards of a data set: new ones are staged in a folder, then put in place together. Safe against crashes.

DATA/.encode-ID holds every complete new shard, and NAME.json with its entry for the manifest. When all shards are
complete, the new manifest is written to commit.json. From this point on, the change is only completed, never undone:
the shards are renamed over the old ones, manifest.json is written, and the folder is removed. A process that finds a
commit.json completes these steps. Readers see the old data set until the first rename. Between the first and the last
rename, they see shards with the old members and shards with the new ones.
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
    """The staged new shards of a data set.

    Attributes:
        manifest: `Manifest` of the old data set.
        target: folder of the new data set, which may be the same.
        recipe: `Recipe` of the features to add.
        renew: names of teachers whose stored class tokens get new principal components.
        work: folder of the new shards, named after `fingerprint`, which identifies the recipe and the old shards.
    """

    def __init__(self, manifest, target, recipe, fingerprint):
        self.manifest, self.target, self.recipe, self.fingerprint = manifest, target, recipe, fingerprint
        self.renew = []
        self.work = os.path.join(target, PREFIX + fingerprint)

    def path(self, shard):
        return os.path.join(self.work, shard.name)

    def record(self, shard):
        """The manifest entry (`Shard`) of the new shard, or None if it is not complete."""
        record = read_json(f"{self.path(shard)}.json")
        try:
            return Shard(**record) if os.path.getsize(self.path(shard)) == record["bytes"] else None
        except (TypeError, KeyError, FileNotFoundError):
            return None

    def finished(self):
        """Whether the target has the manifest of this encoding."""
        if not os.path.exists(os.path.join(self.target, FILE_NAME)):
            return False
        return Manifest.load(self.target).extra.get("encode") == self.fingerprint

    def other_encodings(self):
        """Folders of other, unfinished encodings."""
        names = sorted(os.listdir(self.target)) if os.path.isdir(self.target) else []
        paths = [os.path.join(self.target, name) for name in names if name.startswith(PREFIX)]
        return [path for path in paths if path != self.work]

    def begin(self):
        """Create the folder, and record in it the old shards from which the new ones are made."""
        os.makedirs(self.work, exist_ok=True)
        write_atomically(os.path.join(self.work, BASE), self._base().encode())

    def _base(self):
        return hashlib.sha256("".join(shard.sha256 for shard in self.manifest.shards).encode()).hexdigest()

    def can_resume(self, folder=None):
        """Whether the encoding in a folder of new shards (by default this one's) can be resumed.

        It can if at least one shard is complete (its record is written after it), and the data set still has the shards
        from which the new ones are made.
        """
        folder = folder or self.work
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if COMMIT in names:
            return True
        try:
            with open(os.path.join(folder, BASE), encoding="utf-8") as file:
                same = file.read() == self._base()
        except (OSError, ValueError):
            same = True  # not recorded
        return same and any(name.endswith(".tar.json") for name in names)

    def wait(self, wait_seconds):
        """Wait until the shards of all ranks are complete; returns the new manifest without the entries of features.

        Raises:
            RunError: no shard has appeared for `wait_seconds`.
        """
        shards = []
        for shard in self.manifest.shards:
            what = f"{shard.name} of another rank"
            shards.append(wait_for(lambda shard=shard: self.record(shard), wait_seconds, what))
        return replace(self.manifest, shards=shards)

    def commit(self, latent, teachers):
        """Replace the old shards and manifest by the new ones, which must be complete.

        Args:
            latent: manifest entry of new latents, or None.
            teachers: {name: manifest entry} of new or changed teachers.

        Returns:
            The new `Manifest`.

        Raises:
            RunError: the data set was changed during the encoding.
        """
        old = self.manifest
        if Manifest.load(old.root).to_json() != old.to_json():
            raise RunError(f"{old.root} was changed while it was being encoded; run the same command again")
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
    """Complete every encoding in `target` that has a commit.json, including those of processes that were killed."""
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
        # The manifest is first written to the work folder, so that no partial file is left in the data set.
        staged = os.path.join(work, FILE_NAME)
        write_atomically(staged, manifest.to_json().encode())
        os.replace(staged, os.path.join(target, FILE_NAME))
        sync_folder(target)
        # The folder is renamed before it is removed: a partly removed folder would look like an unfinished encoding.
        os.rename(work, work + DONE)
        shutil.rmtree(work + DONE)


def read_json(path):
    """The content of a JSON file, or None if it does not exist or is not complete."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None
