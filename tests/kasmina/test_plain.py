"""The plain module: it needs torch alone, reads its own weights, and builds nothing that it does not know."""

import ast
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from esper.kasmina import plain

SOURCE = Path(plain.__file__)


def leaf(kind, **args):
    return {"type": kind, "args": args}


def chain(*children):
    return {"type": "Sequential", "children": {str(number): child for number, child in enumerate(children)}}


def test_imports_torch_and_the_standard_library_only():
    roots = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a copied file has no package to import from"
            roots.add(node.module.partition(".")[0])
    assert "torch" in roots
    assert roots - {"torch"} <= set(sys.stdlib_module_names)


MIXED = {
    "double": torch.randn(3, 4, dtype=torch.float64),
    "single": torch.randn(5),
    "half": torch.randn(3).half(),
    "brain": torch.randn(2, 1, 3).bfloat16(),
    "integer": torch.tensor([-(2**62), 0, 2**62]),
    "scalar": torch.tensor(2.5),
    "scalar integer": torch.tensor(-7),
    "empty": torch.empty(0),
    "empty matrix": torch.empty(3, 0, 2, dtype=torch.float64),
    "special": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-42]),
}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize(
    ("names", "metadata"),
    [
        (list(MIXED), None),
        (list(MIXED), {"format": "pt", "note": "é"}),
        (["half"], None),
        (["scalar"], None),
        (["empty", "empty matrix"], None),
        ([], None),
    ],
)
def test_reads_what_safetensors_reads(tmp_path, names, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({name: MIXED[name] for name in names}, path, metadata)
    ours, theirs = plain.read_safetensors(path), load_file(path)
    assert {n: bits(t) for n, t in ours.items()} == {n: bits(t) for n, t in theirs.items()}


def test_reads_tensors_that_do_not_lie_aligned(tmp_path):
    # Another writer may put the short numbers first.
    path = tmp_path / "weights.safetensors"
    header = {
        "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F64", "shape": [2], "data_offsets": [2, 18]},
    }
    text = json.dumps(header).encode()
    body = struct.pack("<e2d", 0.5, 1.25, -3.0)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    ours = plain.read_safetensors(path)
    assert ours["a"].tolist() == [0.5]
    assert ours["b"].tolist() == [1.25, -3.0]
    # In memory they must: kernels expect it.
    assert ours["b"].data_ptr() % 8 == 0


def test_tensors_own_their_memory(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, path)
    state = plain.read_safetensors(path)
    path.unlink()
    state["a"].zero_()
    assert state["b"].tolist() == [1, 1, 1]
    assert {t.untyped_storage().nbytes() for t in state.values()} == {12}


ARGS = {
    "Linear": {"in_features": 3, "out_features": 2, "bias": False},
    "Embedding": {"num_embeddings": 4, "embedding_dim": 3},
    "Conv1d": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 2},
    "Conv2d": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1},
    "ReLU": {},
    "LayerNorm": {"normalized_shape": 4},
    "BatchNorm1d": {"num_features": 4},
    "BatchNorm2d": {"num_features": 4},
    "AvgPool1d": {"kernel_size": 2},
    "AvgPool2d": {"kernel_size": 2},
    "MaxPool1d": {"kernel_size": 2},
    "MaxPool2d": {"kernel_size": 2},
}

GROUPS = {"num_groups": 2, "num_channels": 4}


@pytest.mark.parametrize("kind", plain.LAYERS)
def test_build_makes_the_torch_module(kind):
    made, expected = plain.build(leaf(kind, **ARGS[kind])), getattr(nn, kind)(**ARGS[kind])
    assert type(made) is type(expected)
    assert repr(made) == repr(expected)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (1, 4)])
def test_group_norm_is_torchs(shape):
    made, expected = (m.requires_grad_(False) for m in (plain.build(leaf("GroupNorm", **GROUPS)), nn.GroupNorm(2, 4)))
    assert isinstance(made, nn.GroupNorm)
    assert repr(made) == repr(expected)
    for module in (made, expected):
        module.weight.copy_(torch.arange(4.0))
        module.bias.copy_(torch.arange(4.0) ** 2)
    x = torch.randn(shape)
    assert torch.equal(made(x), expected(x))


def test_group_norm_of_a_single_value_is_its_bias():
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.GroupNorm(1, 1)(torch.tensor([[3.0]]))
    made = plain.build(leaf("GroupNorm", num_groups=1, num_channels=1))
    nn.init.constant_(made.bias, 0.5)
    assert made(torch.tensor([[3.0]])).item() == pytest.approx(0.5, abs=1e-3)


def test_build_keeps_names_and_order():
    description = {"type": "Sequential", "children": {"b": leaf("ReLU"), "a": chain(leaf("ReLU")), "r0c0": chain()}}
    network = plain.build(description)
    assert [name for name, _ in network.named_children()] == ["b", "a", "r0c0"]
    x = torch.tensor([-1.0, 2.0])
    assert network(x).tolist() == [0, 2]


@pytest.mark.parametrize(
    "description",
    [
        leaf("Bilinear", in1_features=1, in2_features=1, out_features=1),  # torch has it, no layer is one
        leaf("Module"),
        leaf("Parameter"),
        leaf("build"),
        leaf("linear"),
        leaf(""),
        chain(leaf("ReLU"), chain(leaf("Sigmoid"))),
    ],
)
def test_build_refuses_what_it_does_not_know(description):
    with pytest.raises(ValueError, match="unknown module"):
        plain.build(description)


def test_the_refusal_names_the_module():
    with pytest.raises(ValueError, match="'Transformer'"):
        plain.build(leaf("Transformer"))


EXTENTS = {"vector": (), "signal": (7,), "image": (4, 5)}
extents = pytest.mark.parametrize("extent", list(EXTENTS.values()), ids=list(EXTENTS))


def grown(operator, alpha, extent):
    conv = {0: nn.Linear(3, 3), 1: nn.Conv1d(3, 3, 1), 2: nn.Conv2d(3, 3, 1)}[len(extent)]
    gate = nn.Linear(3, 1) if operator == "gate" else None
    return plain.Grown(conv, operator=operator, alpha=alpha, axes=len(extent), gate=gate)


@extents
@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
def test_operators(operator, extent):
    module, h = grown(operator, 0.3, extent), torch.randn(4, 3, *extent)
    delta = module.seed(h)
    if operator == "add":
        expected = h + 0.3 * delta
    elif operator == "multiply":
        expected = h * (1 + 0.3 * delta.tanh())
    else:
        pooled = h.reshape(4, 3, -1).mean(2)
        share = 1 / (1 + (-module.gate(pooled)).exp())
        expected = h + 0.3 * share.view(4, 1, *[1] * len(extent)) * delta
    torch.testing.assert_close(module(h), expected)


@extents
@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
def test_every_operator_is_the_identity_at_alpha_0(operator, extent):
    h = torch.randn(4, 3, *extent)
    assert torch.equal(grown(operator, 0.0, extent)(h), h)


def test_a_grown_module_says_how_it_joins():
    assert "operator=multiply, alpha=0.7" in repr(grown("multiply", 0.7, ()))


# One of each kind of thing that a grown network holds: running statistics, a seed with a gate, an excitation.
NETWORK = chain(
    chain(leaf("Conv1d", in_channels=1, out_channels=4, kernel_size=3, padding=1, bias=False)),
    leaf("BatchNorm1d", num_features=4),
    {
        "type": "Grown",
        "children": {
            "seed": {
                "type": "Excite",
                "args": {"axes": 1},
                "children": {
                    "squeeze": chain(
                        leaf("Linear", in_features=4, out_features=2),
                        leaf("ReLU"),
                        leaf("Linear", in_features=2, out_features=4),
                    ),
                },
            },
            "gate": leaf("Linear", in_features=4, out_features=1),
        },
        "args": {"operator": "gate", "alpha": 0.7, "axes": 1},
    },
    leaf("GlobalMean"),
    leaf("Linear", in_features=4, out_features=3),
)
# By hand: 1*4*3, a scale and a shift for 4, 4*2 + 2 and 2*4 + 4, 4 + 1, 4*3 + 3.
PARAMETERS = 12 + 8 + 10 + 12 + 5 + 15


def describe(path, network, weights):
    """Write down which network the weights are of, as a run does."""
    path.write_text(json.dumps({"network": network, "blake2b": plain.seal(network, weights.read_bytes())}))


@pytest.fixture
def saved(tmp_path):
    """A folder as a run leaves it: the file, the description and the weights; and the network that was saved."""
    network = plain.build(NETWORK).double()
    network[1].running_mean.uniform_(-1, 1)
    network[1].running_var.uniform_(1, 2)
    state = {n: t for n, t in network.state_dict().items() if "num_batches" not in n}
    save_file(state, tmp_path / "model.safetensors")
    describe(tmp_path / "model.json", NETWORK, tmp_path / "model.safetensors")
    shutil.copy(SOURCE, tmp_path / "model.py")
    return tmp_path, network


def run_alone(*arguments):
    """A Python that sees neither the source tree nor this package's installation."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['esper', 'safetensors', 'numpy']))"
    code, *rest = arguments
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{blocked}\n{code}", *map(str, rest)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_in_a_python_without_esper(saved):
    folder, network = saved
    x = torch.randn(6, 1, 9, dtype=torch.float64)
    torch.save(x, folder / "x.pt")
    run_alone(
        """
import torch
folder = sys.argv[1]
sys.path.insert(0, folder)
from model import load
network = load(folder + "/model.safetensors", folder + "/model.json")
assert not network.training
assert not [name for name in sys.modules if name.startswith("esper.")]
torch.save(network(torch.load(folder + "/x.pt")).detach(), folder + "/y.pt")
""",
        folder,
    )
    assert torch.equal(torch.load(folder / "y.pt"), network.eval()(x))


def test_the_copied_file_prints_the_network(saved):
    folder, _ = saved
    code = "import runpy; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    printed = run_alone(code, folder / "model.py")
    assert "operator=gate, alpha=0.7" in printed
    assert printed.splitlines()[-1] == f"{PARAMETERS} parameters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_load_takes_the_dtype_of_the_weights(tmp_path, dtype):
    network = plain.build(chain(leaf("Linear", in_features=3, out_features=2))).to(dtype)
    save_file(network.state_dict(), tmp_path / "w")
    describe(tmp_path / "d", chain(leaf("Linear", in_features=3, out_features=2)), tmp_path / "w")
    loaded = plain.load(tmp_path / "w", tmp_path / "d")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("change", ["missing", "unexpected", "size"])
def test_load_refuses_weights_of_another_network(saved, change):
    folder, _ = saved
    state = plain.read_safetensors(folder / "model.safetensors")
    if change == "missing":
        del state["4.bias"]
    elif change == "unexpected":
        state["5.bias"] = torch.ones(1)
    else:
        state["4.bias"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not belong together, or one of them is damaged"):
        plain.load(folder / "model.safetensors", folder / "model.json")
    # Not even where somebody says that they belong together.
    describe(folder / "model.json", NETWORK, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"4\.bias|5\.bias"):
        plain.load(folder / "model.safetensors", folder / "model.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"3", b"\xff", b"[" * 10**5, b'{"network": {}}'])
def test_load_refuses_a_damaged_description(saved, content):
    folder, _ = saved
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json and .*model\.safetensors do not belong together, or one"):
        plain.load(folder / "model.safetensors", folder / "model.json")


def test_the_copied_file_says_in_one_line_what_is_damaged(saved):
    folder, _ = saved
    (folder / "model.json").write_text("{}")
    done = subprocess.run([sys.executable, folder / "model.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("model.py: ")
    assert len(done.stderr.splitlines()) == 1


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        *(F32 | {"shape": shape} for shape in ([3], [1], [-2], [-1, -2], [10**15], ["2"], 2, None, [[2]], [2.0])),
        *(F32 | {"data_offsets": at} for at in ([0, 16], [8, 0], [-8, 0], [4, 12], [0], [0.0, 8.0], [0, 10**30], None)),
        *(F32 | {"shape": [0, 10**15], "data_offsets": at} for at in ([8, 8], [9, 9])),
        *(F32 | {"dtype": dtype} for dtype in ("F64", "F8", "float32", None, ["F32"])),
        *({}, [], 3, None),
    ],
)
def test_a_header_that_lies_is_no_header(tmp_path, header):
    text = json.dumps({"a": header}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + struct.pack("<2f", 0.5, 1.5))
    if header == F32 | {"shape": [0, 10**15], "data_offsets": [8, 8]}:
        assert plain.read_safetensors(path)["a"].numel() == 0
        return
    with pytest.raises(ValueError, match="is damaged: its header does not describe what it holds"):
        plain.read_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"\x02", b"\xff" * 50, b"\x02\0\0\0\0\0\0\0[]", b"\x02" + b"\0" * 40])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        plain.read_safetensors(tmp_path / "weights")
