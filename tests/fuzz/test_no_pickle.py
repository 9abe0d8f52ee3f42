"""No file can make Esper execute anything: nothing is unpickled and nothing is evaluated, anywhere."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import esper
from esper.exam.saved import load_headroom
from esper.kasmina import plain
from esper.leyline.config import PolicyConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import digest
from esper.simic.run_folder import HEADROOM
from esper.tamiyo.policy import saved
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import DESCRIPTION, WEIGHTS, load_policy, save_policy
from esper.tolaria.checkpoints import FOLDER, Checkpoint, Checkpoints
from helpers.fuzzing import one_line

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in (Path(esper.__file__).parent, REPOSITORY / "benchmarks", REPOSITORY / "examples")
    for path in folder.rglob("*.py")
)
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "copyreg"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
"""By their bare name: `re.compile` and `network.eval()` are something else."""
METHODS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "runpy.run_path", "importlib.import_module"}


def faults(source: str) -> list[str]:
    """What in a module could execute a file."""
    found: list[str] = []
    names: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {root: root}
                found += [alias.name] if root in MODULES else []
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if (node.module or "").partition(".")[0] in MODULES else []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(node.arg)
        if isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in names:
            found.append(node.id)
        if isinstance(node, ast.Attribute | ast.Name):
            first, *rest = ast.unparse(node).split(".")
            whole = ".".join((names.get(first, first), *rest))
            found += [whole] if whole in METHODS else []
    return found


def test_the_sources_are_found():
    assert {"main.py", "plain.py", "summary.py", "known_answers.py"} <= {path.name for path in SOURCES}
    assert len(SOURCES) > 80


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_executes_files(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "import numpy, dill as d", "from joblib import load", "from marshal import loads as l"),
        *("import torch\ntorch.load('x')", "import torch as t\nt.save(1, 'x')", "from torch import load as l\nl('x')"),
        *("import numpy as np\nnp.load('x', allow_pickle=True)", "eval('1')", "exec(text)", "f = eval", "import yaml"),
        *("compile(text, 'x', 'exec')", "__import__(name)", "import importlib\nimportlib.import_module(name)"),
    ],
)
def test_each_of_them_would_be_found(source):
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import re\nre.compile('x')",
            "network.eval()",
            "import torch\ntorch.zeros(3)",
            "json.loads('1')",
        ),
        *("from safetensors.torch import load\nload(b'')", "import numpy as np\nnp.loadtxt('x')"),
    ],
)
def test_what_is_harmless(source):
    assert faults(source) == []


# Live: files that are pickles in truth, which would leave a trace when loaded.


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture(params=["pickle", "torch"])
def bomb(request, tmp_path):
    """A file that would create another one, in both formats that torch knows, and the trace."""
    trace, path = tmp_path / "trace", tmp_path / "bomb"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save({"op_head.weight": Bomb(trace)}, path)
    yield path.read_bytes()
    assert not trace.exists()
    # It would have worked.
    if request.param == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


def refused(load, *arguments) -> str:
    with pytest.raises((EsperError, ValueError)) as caught:
        load(*arguments)
    return one_line(caught.value)


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with checksums made to fit"])
@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
def test_a_policy(tmp_path, bomb, name, sealed):
    policy = FactoredRecurrentActorCritic(PolicyConfig(width=4, hidden=2))
    policy.initialise(torch.Generator().manual_seed(0))
    folder = tmp_path / "policy"
    save_policy(policy, folder)
    (folder / name).write_bytes(bomb)
    if sealed and name == WEIGHTS:
        description = json.loads((folder / DESCRIPTION).read_text()) | {"weights": digest(bomb)}
        (folder / DESCRIPTION).write_text(json.dumps({**description, "seal": saved._seal(description)}))
    assert refused(load_policy, folder).startswith("policy: ")


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_network(tmp_path, bomb, name):
    network = {
        "type": "Sequential",
        "children": {"a": {"type": "Linear", "args": {"in_features": 2, "out_features": 2}}},
    }
    weights = save(plain.build(network).state_dict())
    files = {"model.json": json.dumps({"network": network, "blake2b": plain.seal(network, weights)}).encode()}
    for file, content in {**files, "model.safetensors": weights, name: bomb}.items():
        (tmp_path / file).write_bytes(content)
    assert "damaged" in refused(plain.load, tmp_path / "model.safetensors", tmp_path / "model.json")
    assert "damaged" in refused(plain.read_safetensors, tmp_path / name)


def test_a_table(tmp_path, bomb):
    (tmp_path / HEADROOM).write_bytes(bomb)
    assert "damaged" in refused(load_headroom, tmp_path)


def test_a_checkpoint(tmp_path, bomb):
    Checkpoints(tmp_path).save(Checkpoint(1, {}, {"learner.safetensors": b"x", "learner.json": b"{}"}))
    for file in (tmp_path / FOLDER / "00000001").iterdir():
        kept = file.read_bytes()
        file.write_bytes(bomb)
        said: list[str] = []
        assert Checkpoints(tmp_path).load(said.append) is None
        assert len(said) == 1
        file.write_bytes(kept)
    shutil.rmtree(tmp_path / FOLDER)
