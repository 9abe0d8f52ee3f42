"""`esper query` and `esper runs`: tables, CSV, JSON, one line for every mistake, and a list that nothing spoils."""

import csv
import io
import json
import random
import re
import subprocess
import sys
import time

import pytest

from esper.karn.views import views
from esper.nissa.store import RunStore
from helpers.command import COMMAND, ENVIRONMENT, in_process, process, snapshot
from helpers.run_stores import RUN
from helpers.stored import column, stored
from helpers.stored_runs import changed, grow, grow_until_ctrl_c, mutated, only_begun, some_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is over."""
    code, store = grow(tmp_path_factory.mktemp("run") / "run", "--horizon", "20")
    assert code == 0
    return store


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    code, store = grow_until_ctrl_c(tmp_path_factory.mktemp("interrupted") / "run", "--seed", "4")
    assert code == 130
    return store


def lines(table):
    """Give the cells of the lines of a printed table, its head first."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip(" ─")]
    return rows[0], rows[1:]


def refused(result, *words):
    """Check that a command said in one line what was wrong, and nothing else."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("esper: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


# Answers.


def test_without_a_question(capsys, run):
    code, out, err = in_process(capsys, "query", run)
    assert (code, err) == (0, "")
    head, rows = lines(out)
    assert head == ["view", "question"]
    assert rows == [[view.name, view.question] for view in views().values()]
    listed = json.loads(in_process(capsys, "query", run, "--format", "json")[1])
    assert [row["view"] for row in listed] == list(views())


@pytest.mark.parametrize("view", sorted(views()))
def test_every_view(capsys, run, view):
    read = {}
    for form in ("table", "csv", "json"):
        code, read[form], err = in_process(capsys, "query", run.parent, "--view", view, "--format", form)
        assert (code, err) == (0, "")
    parsed = json.loads(read["json"])
    head, *rows = csv.reader(io.StringIO(read["csv"]))
    assert len(rows) == len(parsed) == len(lines(read["table"])[1])
    assert lines(read["table"])[0] == head
    for row in parsed:
        assert list(row) == head


def test_forms_of_one_answer(capsys, run):
    sql = (
        "SELECT round, arm, test_accuracy, twin_round, 1e300 AS large, -0.000012345678 AS small, "
        "'a,b' AS comma, 'say \"x\"' AS quote, 'one' || char(10) || 'two' AS folded, 'ü–😀' AS sign, 9e999 AS endless "
        "FROM round JOIN episode USING (round) ORDER BY round"
    )
    expected = [list(row.values()) for row in stored(run, sql)]
    assert len(expected) == 3
    code, out, err = in_process(capsys, "query", run, sql, "--format", "csv")
    assert (code, err) == (0, "")
    head, *rows = csv.reader(io.StringIO(out))
    assert head[:4] == ["round", "arm", "test_accuracy", "twin_round"]
    assert rows == [["" if value is None else str(value) for value in row] for row in expected]
    code, out, err = in_process(capsys, "query", run, sql, "--format", "json")
    assert (code, err) == (0, "")
    # What is no finite number becomes null, so that every reader of JSON can read it.
    answer = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert [list(row.values())[:-1] for row in answer] == [row[:-1] for row in expected]
    assert {row["endless"] for row in answer} == {None}
    assert answer[1]["twin_round"] is None


def test_a_table(capsys, run):
    columns = "arm, twin_round, test_accuracy, 'x [bold]y[/bold] :smile:' AS text"
    sql = f"SELECT {columns} FROM round JOIN episode USING (round) ORDER BY round"
    code, out, err = in_process(capsys, "query", run, sql)
    assert (code, err) == (0, "")
    head, rows = lines(out)
    assert head == ["arm", "twin_round", "test_accuracy", "text"]
    assert [row[:2] for row in rows] == [["grown", "1"], ["host alone", "·"], ["everything from the start", "1"]]
    accuracies = column(run, "SELECT test_accuracy FROM episode ORDER BY round")
    assert [row[2] for row in rows] == [f"{value:.6g}" for value in accuracies]
    # Nothing in a value is taken for a style.
    assert {row[3] for row in rows} == {"x [bold]y[/bold] :smile:"}
    assert "\x1b" not in out


@pytest.mark.parametrize("text", ["[bold]x", "[/]", "[/bold]", ":smile:", "blueprint GLOB '[a-m]*'"])
def test_the_name_of_a_column_is_no_style(capsys, run, text):
    quoted = text.replace('"', '""')
    code, out, err = in_process(capsys, "query", run, f'SELECT 1 AS "{quoted}"')
    assert (code, err) == (0, "")
    assert lines(out) == ([text], [["1"]])


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_bytes_can_be_shown(capsys, run, form):
    code, out, err = in_process(capsys, "query", run, "SELECT x'00ff' AS data, 1 AS one", "--format", form)
    assert (code, err) == (0, "")
    assert "data" in out
    assert "1" in out


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_no_rows(capsys, run, form):
    code, out, err = in_process(capsys, "query", run, "SELECT round, arm FROM round WHERE 0", "--format", form)
    assert (code, err) == (0, "")
    if form == "json":
        assert json.loads(out) == []
    else:
        assert re.split(r"[\s,]+", out.strip(" ─\n"))[:2] == ["round", "arm"]


def test_a_long_line_is_not_folded(run):
    long = "x" * 3000
    code, out, err = process("query", run, f"SELECT '{long}' AS text, 'end' AS last")
    assert (code, err) == (0, "")
    assert any(re.search(rf"{long} +end", line) for line in out.splitlines())


def test_the_limit_is_told(capsys, run):
    sql = "SELECT decision FROM decision WHERE round = 0 ORDER BY decision"
    for limit, rows in ((1, 1), (19, 19)):
        code, out, err = in_process(capsys, "query", run, sql, "--limit", limit, "--format", "csv")
        assert (code, out.split()) == (0, ["decision", *map(str, range(rows))])
        assert err == f"esper: only the first {limit} rows; --limit N for more\n"
    for limit in (20, 21, 2**31 - 1, 2**31, 10**30):
        code, out, err = in_process(capsys, "query", run, sql, "--limit", limit, "--format", "csv")
        assert (code, len(out.split()), err) == (0, 21, "")


def test_the_limit_without_being_asked(capsys, run):
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1500) SELECT i FROM n"
    code, out, err = in_process(capsys, "query", run, sql, "--format", "json")
    assert (code, len(json.loads(out))) == (0, 1000)
    assert err == "esper: only the first 1,000 rows; --limit N for more\n"


def test_the_other_run(capsys, run, tmp_path):
    copy = changed(run, tmp_path, "UPDATE run SET machine = 'elsewhere'")
    asked = ("query", run, "--view", "run_diff", "--format", "json")
    code, out, err = in_process(capsys, *asked, "--other", copy)
    assert (code, err) == (0, "")
    assert [(row["what"], row["other"]) for row in json.loads(out)] == [("machine", "elsewhere")]
    assert json.loads(in_process(capsys, *asked)[1]) == []
    # A question may reach into it.
    machine = "SELECT machine FROM other.run"
    assert (
        in_process(capsys, "query", run, machine, "--other", copy.parent, "--format", "csv")[1]
        == "machine\nelsewhere\n"
    )


# Mistakes.

MISTAKES = {
    "limit of 0": (["--view", "now", "--limit", "0"], "limit: at least 1 row; got 0"),
    "negative limit": (["--view", "now", "--limit", "-3"], "limit: at least 1 row; got -3"),
    "limit that is no number": (["--view", "now", "--limit", "many"], "limit"),
    "unknown view": (["--view", "nwo"], "unknown view 'nwo'; known: blueprint, data_health"),
    "two questions": (["SELECT 1", "--view", "now"], "ask one"),
    "unknown form": (["--view", "now", "--format", "xml"], "format"),
    "unknown table": (["SELECT * FROM decisions"], "no such table: decisions"),
    "no SQL": (["how is it?"], "syntax error"),
    "cut text": (["SELECT 'one\ntwo"], "unrecognized token"),
    "a change": (["DELETE FROM decision"], "a store is only read; use one SELECT"),
    "two statements": (["SELECT 1; SELECT 2"], "one statement"),
    "no other run": (["--view", "run_diff", "--other", "nowhere"], "no run at nowhere"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes(home, capsys, run, mistake):
    arguments, words = MISTAKES[mistake]
    before = snapshot(run.parent)
    refused(in_process(capsys, "query", run, *arguments), words)
    assert snapshot(home) == {}
    assert snapshot(run.parent) == before


def test_wrong_paths(home, capsys):
    refused(in_process(capsys, "query", "nowhere"), "no run at nowhere")
    refused(in_process(capsys, "query", home), f"no run at {home}")
    (home / "notes.txt").write_text("notes " * 99)
    refused(in_process(capsys, "query", "notes.txt", "SELECT 1"), "notes.txt: not a run store")
    refused(in_process(capsys, "query"), "run")


def test_text_that_is_none(run):
    # As a shell hands over bytes of another encoding.
    command = [*COMMAND, "query", str(run), b"SELECT '\xff' AS x"]
    asked = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert b"Traceback" not in asked.stderr
    assert asked.returncode in (0, 2)


def test_a_reader_that_goes_away(run):
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000) SELECT i FROM n"
    command = [*COMMAND, "query", str(run), sql, "--limit", "100000", "--format", "csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as asked:
        assert asked.stdout.readline() == b"i\n"
        asked.stdout.close()
        err = asked.stderr.read()
        assert asked.wait(timeout=120) == 141
    assert err == b""


@pytest.mark.parametrize("command", ["query", "runs"])
def test_help(home, capsys, command):
    for option in ("--help", "-h"):
        code, out, err = in_process(capsys, command, option)
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: esper {command}")
        assert ("--view" in out) == (command == "query")
    assert snapshot(home) == {}


def test_a_question_does_not_wait_for_torch(run):
    code = (
        "import sys; from esper.scripts.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules and 'it does') or 0)"
    )
    for arguments in (["query", run, "--view", "now"], ["runs", run.parent]):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT, timeout=60)


# The list of runs.


def begun(ago):
    """Let a run have begun some seconds ago."""
    now = time.time()
    return f"UPDATE run SET started_unix_s = {now - ago}, heartbeat_unix_s = {now - ago / 2}"


def test_runs(home, capsys, run, interrupted):
    folder = home / "results"
    changed(run, folder / "finished", begun(3 * 3600 + 60))
    changed(interrupted, folder / "deep" / "er" / "interrupted", begun(30.2))
    with pytest.raises(ZeroDivisionError), RunStore(folder / "x.sqlite", {**RUN, "config": some_config()}):
        raise ZeroDivisionError
    changed(folder / "x.sqlite", folder / "failed", begun(301))
    (folder / "x.sqlite").unlink()
    changed(run, folder / "lost", begun(2 * 86400 + 60), "UPDATE run SET status = 'running'")
    running = "UPDATE run SET status = 'running', heartbeat_late_s = 1e9, planned_decisions = 120"
    changed(run, folder / "running", begun(121), running)
    only_begun(folder / "early" / "run.sqlite", heartbeat_late_s=1e12, started_unix_s=time.time() - 180.5)
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "run.sqlite").write_text("text " * 99)
    (folder / "no run").mkdir()
    code, out, err = in_process(capsys, "runs", "results")
    assert (code, err) == (0, "")
    head, rows = lines(out)
    assert head == ["run", "status", "task", "controller", "seed", "test accuracy", "parameters", "incidents", "begun"]
    told = [row[:2] for row in rows]
    assert told[:-1] == [
        ["deep/er/interrupted", "interrupted"],
        ["running", "running, 50%"],
        ["early", "running, 0%"],
        ["failed", "failed"],
        ["finished", "finished"],
        ["lost", "lost"],
    ]
    assert told[-1][0] == "unreadable"
    assert told[-1][1].startswith("unreadable: not a run store")
    first, *later = [row[-1] for row in rows[:-1]]
    # A busy machine takes seconds from there to here.
    assert re.fullmatch(r"[34]\d s ago", first)
    assert later == ["2 min ago", "3 min ago", "5 min ago", "3 h ago", "2 d ago"]
    assert rows[0][2:5] == ["digits-mlp (impaired)", "heuristic", "4"]
    (grown,) = stored(run, "SELECT * FROM episode WHERE round = 0")
    assert rows[4][2:5] == ["digits-mlp (impaired)", "heuristic", "0"]
    parameters = grown["host_parameters"] + grown["added_parameters"]
    assert rows[4][5:7] == [f"{grown['test_accuracy'] * 100:.1f}%", f"{parameters:,}"]


def test_runs_lie_in_runs(home, capsys, run):
    refused(in_process(capsys, "runs"), "no folder runs")
    (home / "runs").mkdir()
    refused(in_process(capsys, "runs"), "no runs in runs; esper grow makes one")
    changed(run, home / "runs" / "a", begun(10))
    changed(run, home / "runs" / "b", begun(5))
    code, out, err = in_process(capsys, "runs")
    assert (code, err) == (0, "")
    assert [row[0] for row in lines(out)[1]] == ["b", "a"]
    refused(in_process(capsys, "runs", "elsewhere"), "no folder elsewhere")
    (home / "file").write_text("")
    refused(in_process(capsys, "runs", "file"), "no folder file")


def test_a_run_in_the_folder_itself(capsys, run):
    code, out, err = in_process(capsys, "runs", run.parent)
    assert (code, err) == (0, "")
    assert [row[1] for row in lines(out)[1]] == ["finished"]


@pytest.mark.parametrize("name", ["[bold]", "a [b] c", "x[/]", ":smile:", "ü–😀", "50%"])
def test_the_name_of_a_run_is_no_style(home, capsys, run, name):
    changed(run, home / "runs" / name, begun(10))
    code, out, err = in_process(capsys, "runs")
    assert (code, err) == (0, "")
    assert [row[:2] for row in lines(out)[1]] == [[name, "finished"]]


def test_damaged_runs_spoil_no_list(home, capsys, run):
    content = run.read_bytes()
    for number in range(150):
        folder = home / "runs" / f"{number:03}"
        folder.mkdir(parents=True)
        (folder / "run.sqlite").write_bytes(mutated(content, random.Random(number), most=20))
    code, out, err = in_process(capsys, "runs")
    assert (code, err) == (0, "")
    rows = lines(out)[1]
    assert sorted(row[0] for row in rows) == [f"{number:03}" for number in range(150)]
    assert {row[1].split(":")[0] for row in rows} >= {"finished", "unreadable"}


COLUMNS = {
    "run": ("task", "host", "controller", "seed", "status", "started_unix_s", "heartbeat_unix_s", "planned_decisions"),
    "episode": ("test_accuracy", "host_parameters", "added_parameters"),
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, names in COLUMNS.items() for name in names])
def test_values_that_cannot_be_spoil_no_list(home, capsys, run, table, name):
    # What damage leaves behind need not be of the type that the schema asks for.
    changed(run, home / "runs" / "good", begun(10))
    (definition,) = column(run, f"SELECT sql FROM sqlite_schema WHERE name = '{table}'")
    loose = re.sub(
        rf"(?m)^ +{name} .*$", f"{name},", definition.replace("STRICT, WITHOUT ROWID", "").replace("STRICT", "")
    )
    for at, value in enumerate(("'?'", "NULL", "9e999")):
        changed(
            run,
            home / "runs" / f"strange {at}",
            f"ALTER TABLE {table} RENAME TO old",
            loose,
            f"INSERT INTO {table} SELECT * FROM old",
            "DROP TABLE old",
            f"UPDATE {table} SET {name} = {value}",
        )
    code, out, err = in_process(capsys, "runs")
    assert (code, err) == (0, "")
    assert sorted(row[0] for row in lines(out)[1]) == ["good", "strange 0", "strange 1", "strange 2"]
