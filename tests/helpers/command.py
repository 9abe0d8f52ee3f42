"""The command as a user runs it, and what is left of it on the disk."""

import errno
import os
import subprocess
import sys

from esper.scripts.main import main

COMMAND = [sys.executable, "-m", "esper.scripts.main"]
SHORT = ("--horizon", "6", "--updates-per-decision", "2")
# Random decides something in nearly every decision, whatever is learned.
LIVELY = ("--task", "digits-mlp", "--controller", "random", "--horizon", "12", "--updates-per-decision", "1")
RUN_FILES = ["checkpoints", "config.json", "model.json", "model.py", "model.safetensors", "run.sqlite"]
# Longer than any test: it ends because it is told to.
ENDLESS = ("--task", "digits-mlp", "--controller", "random", "--horizon", "4096", "--updates-per-decision", "8")
ARMS = ("grown", "host alone", "everything from the start")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def snapshot(folder):
    """Give every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def listed(folder):
    """Give the names in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


def in_process(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def process(*arguments, **more):
    """Run the command as a user does; give its exit code, output and complaints."""
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 120, "check": False, **more}
    run = subprocess.run([*COMMAND, *map(str, arguments)], **options)
    return run.returncode, run.stdout, run.stderr


def full_from(monkeypatch, write):
    """Let the disk be full from the given sync on."""
    fsync, count = os.fsync, [0]

    def full(number):
        count[0] += 1
        if count[0] >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
