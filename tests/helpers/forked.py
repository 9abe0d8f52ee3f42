"""The command in processes forked from one that has loaded everything: quick to start, to be killed, unprivileged."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_COMMANDS = ("esper.scripts.main", "esper.scripts.grow", "esper.scripts.train")
_LATE = ("sklearn.datasets", "torch._dynamo", "importlib.readers")
_CONTEXT.set_forkserver_preload([*_COMMANDS, *_LATE])
NOBODY = 65534


class Forked:
    """One command in a process of its own.

    Parameters
    ----------
    arguments
        Of the command.
    save_every_s
        Seconds between two checkpoints of a grow run.
    user
        Who runs it, where the tests may choose; None: who runs the tests.
    """

    def __init__(self, *arguments, save_every_s=0.0, user=None):
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._told = Path(name)
        self._process = _CONTEXT.Process(target=_run, args=(arguments, name, save_every_s, user))
        self._process.start()

    def wait(self, seconds=120.0):
        """Wait for the end, so long at most; give whether it ended."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self):
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()

    @property
    def code(self):
        """The exit code; negative: the signal that ended it."""
        return self._process.exitcode

    def told(self):
        """Give what it wrote, both streams together."""
        return self._told.read_text()


def _run(arguments, told, save_every_s, user):
    descriptor = os.open(told, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    from esper.scripts.main import main
    from esper.simic import grow_run

    grow_run.SAVE_EVERY_S = save_every_s
    if user is not None and os.getuid() == 0:
        os.setuid(user)
    sys.exit(main([str(argument) for argument in arguments]))
