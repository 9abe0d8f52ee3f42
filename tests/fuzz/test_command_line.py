"""The same through the command: a configuration file or options that are wrong end in one line, and nothing is done."""

import contextlib
import io
import json

import pytest
from hypothesis import strategies as st

from esper.leyline.config import HeadroomConfig, RunConfig, TrainConfig
from esper.scripts import grow, headroom, train
from esper.scripts.errors import BAD_INPUT
from esper.scripts.main import main
from helpers.config_values import INTEGERS, NUMBERS, OTHERS, leaves, nested, set_in, some_settings
from helpers.fuzzing import cases

COMMANDS = {("grow",): RunConfig, ("train",): TrainConfig, ("exam", "headroom"): HeadroomConfig}
commands = st.sampled_from(sorted(COMMANDS))
TEXTS = [repr(n) for n in (*INTEGERS, *NUMBERS)] + [t for t in OTHERS if isinstance(t, str) and "\0" not in t]


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """Configurations that commands were begun with; nothing is computed, and nobody writes into the folder."""
    seen, folder = [], tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, name in ((grow, "grow"), (train, "train"), (headroom, "headroom")):
            patch.setattr(module, name, lambda config, **_: seen.append(config) or 0)
        yield seen
    assert list(folder.iterdir()) == []


def run(began, *arguments: str):
    """Give the configuration that a command began with, None where it was refused in one line."""
    began.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    assert out.getvalue() == ""
    if code == 0:
        assert err.getvalue() == ""
        (config,) = began
        return config
    assert (code, began) == (BAD_INPUT, [])
    (line,) = err.getvalue().splitlines()
    assert line.startswith("esper: ")
    assert line.isprintable()
    return None


@cases(12, 200, command=commands, bad=st.booleans(), data=st.data())
def test_a_file(tmp_path_factory, began, command, bad, data):
    kind = COMMANDS[command]
    settings = data.draw(some_settings(kind, bad=bad))
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(nested(settings)))
    config = run(began, *command, "--config", str(path))
    if config is not None:
        dumped = json.loads(config.model_dump_json())
        assert {name: set_in(dumped, name) for name in settings} == settings


@cases(15, 300, command=commands, text=st.sampled_from(TEXTS), data=st.data())
def test_an_option(began, command, text, data):
    """A number is taken as it was written, or not at all."""
    kind = COMMANDS[command]
    name = data.draw(st.sampled_from([n for n, schema in leaves(kind).items() if schema["type"] != "boolean"]))
    config = run(began, *command, f"--{name.rpartition('.')[2].replace('_', '-')}={text}")
    if config is not None:
        value = set_in(json.loads(config.model_dump_json()), name)
        (taken,) = value if isinstance(value, list) else [value]
        assert type(taken)(text) == taken


WORDS = st.lists(st.text(st.characters(exclude_characters="\0"), max_size=9), max_size=4)


@cases(8, 100, command=commands, words=WORDS)
def test_any_words(began, command, words):
    """Whatever stands behind a command; help goes to the output and is asked for by name."""
    if not {"-h", "--help"} & set(words):
        run(began, *command, *words)
