"""List the files of a folder or an archive by name, with a reason for every picture that cannot be read.

Building and evaluation use the same code, so both find the same pictures. No file is opened or decoded here.
"""

import os
from collections import Counter
from dataclasses import dataclass, field

from maskalign.data.build.images import ENDINGS
from maskalign.errors import UsageError

REPLACED = "replaced by a later file of the same name"


@dataclass
class Listing:
    """The files of one source.

    Attributes:
        files: (name, position) of all files that are not hidden. The parts of a name are separated by "/" and are not
            empty, "." or "..". The position is what the reader needs to find the file.
        rejected: (name, reason) of pictures that cannot be read.
        folders: names of all folders that the source lists.
        hidden: number of hidden folders and hidden pictures, without the ._ and __MACOSX files of macOS.
    """

    files: list = field(default_factory=list)
    rejected: list = field(default_factory=list)
    folders: list = field(default_factory=list)
    hidden: int = 0

    @property
    def images(self):
        """(name, position) of the files with a picture's extension."""
        return [entry for entry in self.files if has_image_ending(entry[0])]

    @property
    def passed(self):
        """Counter of skipped files, by extension (".heic"), "no ending" and "hidden"."""
        count = Counter(ending_of(name) for name, _ in self.files if not has_image_ending(name))
        if self.hidden:
            count["hidden"] += self.hidden
        return count

    def add(self, name, place, seen=None):
        """Add a file, unless its name is hidden or leads out of the source.

        Args:
            name: the name in the source; it may be "./a//b" or have backslashes (in archives).
            place: the position, for the reader.
            seen: a set of hidden folders that are counted already, so that each is counted once.
        """
        clean = clean_name(name)
        if clean is None:
            if has_image_ending(name):
                self.rejected.append((name, "its name leads out of the source"))
            return
        hidden = hidden_part(clean)
        if hidden is not None:
            self.hide(hidden, clean, seen)
        elif clean:
            self.files.append((clean, place))

    def hide(self, hidden, name, seen=None):
        """Count a hidden folder once, or a hidden picture; the ._ and __MACOSX files of macOS are not counted."""
        last = hidden.rpartition("/")[2]
        if last == "__MACOSX" or last.startswith("._") or seen is not None and hidden in seen:
            return
        if hidden != name or has_image_ending(name):
            self.hidden += 1
            if seen is not None:
                seen.add(hidden)

    def reject(self, name, reason):
        """Record that a picture cannot be read; files of other kinds and hidden files are ignored."""
        clean = clean_name(name)
        if has_image_ending(name) and (clean is None or hidden_part(clean) is None):
            self.rejected.append((name if clean is None else clean, reason))

    def settle(self):
        """Of files with the same name, keep the last, as unpacking does, and reject the others; returns self."""
        last = {name: number for number, (name, _) in enumerate(self.files)}
        if len(last) < len(self.files):
            kept = []
            for number, (name, place) in enumerate(self.files):
                if last[name] == number:
                    kept.append((name, place))
                else:
                    self.reject(name, REPLACED)
            self.files = kept
        return self


def ending_of(name):
    """The extension of a name for messages: ".png" for "a/b.PNG", "no ending" where there is none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem and ending else "no ending"


def has_image_ending(name):
    """Whether a file name has the extension of a supported picture format."""
    return ending_of(name)[1:] in ENDINGS


def clean_name(name):
    """A member's name with "/" between its parts and without empty or "." parts. None if it contains "..".

    Zips from Windows programs have backslashes. A leading slash is ignored.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return None if ".." in parts else "/".join(parts)


def hidden_part(name):
    """The topmost hidden folder or file of a clean name, as a path; None where no part is hidden."""
    parts = name.split("/")
    for number, part in enumerate(parts):
        if part.startswith(".") or part == "__MACOSX":
            return "/".join(parts[: number + 1])
    return None


def walk_folder(root):
    """List the files below a folder. The `Listing` does not depend on the order on disk.

    Links to files and folders are followed, but each folder is listed once: under its own name where it lies below
    `root`, else under the name of the first link to it. Hidden folders are not entered. A position is the file's path
    below `root`, or None where it is the same as the name.

    Raises:
        UsageError: the folder itself cannot be read.
    """
    listing, seen = Listing(), set()
    root = os.fspath(root)
    waiting, links = [""], []
    while waiting or links:
        if not waiting:  # links come after all real folders, so that a folder is listed under its own name
            links.sort(reverse=True)
            waiting.append(links.pop())
        relative = waiting.pop()
        path = os.path.join(root, relative) if relative else root
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
            if identity in seen:  # a link to a folder that is listed already
                continue
            seen.add(identity)
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not relative:
                raise UsageError(f"{root}: cannot be read ({error.strerror})") from None
            listing.rejected.append((relative, f"the folder cannot be read ({error.strerror})"))
            continue
        if relative:
            listing.folders.append(relative)
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            _sort_entry(listing, entry, name, waiting, links)
    listing.files.sort(key=lambda entry: entry[0])
    listing.rejected.sort()
    listing.folders.sort()
    return listing.settle()


def _sort_entry(listing, entry, name, waiting, links):
    try:
        folder = entry.is_dir()
        regular = not folder and entry.is_file()
        link = entry.is_symlink()
    except OSError as error:  # for example, a loop of links
        listing.reject(name, f"cannot be read ({error.strerror})")
        return
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        if folder or regular:
            listing.hide(name, f"{name}/" if folder else name)
    elif folder:
        (links if link else waiting).append(name)
    elif not regular:
        listing.reject(name, "a link that leads nowhere" if link else "not a regular file")
    elif "\\" in entry.name and has_image_ending(entry.name):
        listing.add(name, name)  # unpacked from a zip with backslashes by a program that does not convert them
    else:
        listing.files.append((name, None))


def tell_passed(passed, most=8):
    """A Counter of extensions as text, such as ".heic 12, .jfif 2", with the most frequent first."""
    entries = sorted(passed.items(), key=lambda entry: (-entry[1], entry[0]))
    text = ", ".join(f"{ending} {count:,}" for ending, count in entries[:most])
    return text + (f" and {len(entries) - most} other endings" if len(entries) > most else "")
