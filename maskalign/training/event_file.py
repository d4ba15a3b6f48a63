"""TensorBoard's event files, written immediately and in the calling thread.

torch's SummaryWriter writes in another thread, where a full disk causes a traceback, and later an error in another
call.
"""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar


class EventFile:
    """One file of events in a folder.

    Args:
        folder: the folder, which is created if it does not exist.
        purge_step: TensorBoard discards events of this step and later ones in earlier files of the folder.
    """

    def __init__(self, folder, purge_step):
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        # Unbuffered, so that closing the file does not try again to write data that could not be written.
        self.file = open(Path(folder, name), "ab", buffering=0)
        self.writer = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag, value, step):
        """Write a number of a step."""
        self._add(Event(summary=scalar(tag, value), step=step))

    def add_scalars(self, values, step):
        """Write numbers of a step: dict from tag to number."""
        for tag, value in values.items():
            self.add_scalar(tag, value, step)

    def add_image(self, tag, pixels, step):
        """Write a picture of a step: pixels (H, W, C), uint8."""
        self._add(Event(summary=image(tag, pixels, dataformats="HWC"), step=step))

    def close(self):
        self.file.close()

    def _add(self, event):
        event.wall_time = time.time()
        self.writer.write(event.SerializeToString())
