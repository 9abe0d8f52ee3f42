"""Tiny runs of the real command, their stores with something changed, and the answers of the views."""

import contextlib
import functools
import io
import shutil
import signal
import sqlite3

import pytest

from esper.karn.reader import RunReader
from esper.karn.views import views
from esper.leyline.config import RunConfig
from esper.leyline.errors import EsperError
from esper.nissa.schema import create
from esper.scripts.main import main
from esper.simic.episode import Episode
from helpers.run_stores import RUN, insert

# Only the counts of decisions refuse, so that seeds are committed whatever was learned.
OPEN = (
    *("--min-training-decisions", "2", "--min-incubator-gain", "-100", "--min-gradient-ratio", "0"),
    *("--min-probation-decisions", "2", "--min-contribution", "-100", "--embargo", "2"),
)
TINY = ("--task", "digits-mlp", "--updates-per-decision", "1", *OPEN)
EVERYTHING = 1_000_000


def grow(folder, *options):
    """Run `esper grow` into a folder; give its exit code and the store."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["grow", *TINY, *options, "--out", str(folder)])
    return code, folder / "run.sqlite"


def grow_until_ctrl_c(folder, *options):
    """The same, with ctrl-C in decision 5 of the first arm."""
    advance = Episode.advance

    def watched(self, **how):
        if self.decision == 5:
            signal.raise_signal(signal.SIGINT)
        return advance(self, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Episode, "advance", watched)
        return grow(folder, *options)


@contextlib.contextmanager
def writing(path):
    """Open a store as nobody does but tests that change it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


def changed(path, folder, *statements):
    """Give a copy of a store in which some statements were executed."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = shutil.copy(path, folder / "run.sqlite")
    with writing(copy) as db:
        for statement in statements:
            assert db.execute(statement).rowcount != 0, f"nothing to change: {statement}"
    return copy


@functools.cache
def some_config():
    return RunConfig().model_dump_json()


def only_begun(path, **more):
    """Make a store in which nothing happened yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = {"id": 1, "status": "running", "started_unix_s": 1000.0, "heartbeat_unix_s": 1000.5}
    rest = {"config": some_config(), "heartbeat_late_s": 30.0, "flushes": 0, "stalls": 0, "stall_s": 0.0}
    with writing(path) as db:
        create(db)
        insert(db, "run", **{**RUN, **start, **rest, **more})
    return path


def ask(path, view, other=None):
    """Give every row of a view as a dict."""
    with RunReader(path, other) as reader:
        answer = reader.view(view, EVERYTHING)
    assert not answer.more
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def mutated(content, random, *, most=8):
    """Give the bytes of a file with some of them changed; half of the changes hit the head of a page."""
    data = bytearray(content)
    for _ in range(random.randint(1, most)):
        page = random.randrange(len(data) // 4096) * 4096
        at = page + random.randrange(random.choice((128, 4096)))
        data[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
    return bytes(data)


def count(run, table="round"):
    with RunReader(run) as reader:
        ((number,),) = reader.query(f"SELECT count(*) FROM {table}", 1).rows
    return number


def everything(run):
    """Give every table, and every view that does not look at the clock."""
    with RunReader(run) as reader:
        tables = [name for (name,) in reader.query("SELECT name FROM sqlite_schema WHERE type = 'table'", 99).rows]
        found = {name: reader.query(f"SELECT * FROM {name}", 10**6).rows for name in tables}
        return found | {name: reader.view(name, 10**6).rows for name in set(views()) - {"now", "incidents"}}


def look_at_everything(path):
    """Read all there is; count the answers and the complaints."""
    answers, complaints = 0, []
    try:
        with RunReader(path, path) as reader:
            for name in views():
                try:
                    reader.view(name, 50)
                    answers += 1
                except EsperError as error:
                    complaints.append(str(error))
    except EsperError as error:
        complaints.append(str(error))
    assert all("\n" not in line for line in complaints)
    return answers, complaints


def left_in(folder):
    """Give the files that lie in a folder: names, contents, times of change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}
