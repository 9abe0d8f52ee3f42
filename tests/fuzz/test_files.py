"""Policies, networks, tables and data that were changed: one clear line, or exactly what was saved."""

import contextlib
import gzip
import importlib.resources
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from esper.exam.saved import load_headroom, save_headroom
from esper.kasmina import plain
from esper.leyline.config import PolicyConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import digest
from esper.scripts.errors import BAD_INPUT
from esper.scripts.main import main
from esper.simic.run_folder import HEADROOM
from esper.tamiyo.policy import saved
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import DESCRIPTION, WEIGHTS, policy_files, read_policy
from esper.tolaria.datasets import Dataset, load_digits
from helpers.exams import small_headroom
from helpers.fuzzing import cases, one_line
from helpers.mutations import ACCIDENTS, mutated

FOLDER = Path("FOLDER")


def policy_of(seed: int, **config: int) -> FactoredRecurrentActorCritic:
    policy = FactoredRecurrentActorCritic(PolicyConfig(width=4, attention_heads=1, hidden=2, **config))
    policy.initialise(torch.Generator().manual_seed(seed))
    return policy


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Equal, bit for bit; NaN is NaN."""

    def bits(state):
        return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in state.items()}

    return bits(one) == bits(two)


POLICIES = [policy_of(0), policy_of(1)]
FILES = [policy_files(policy) for policy in POLICIES]


def read(files: dict[str, bytes]) -> FactoredRecurrentActorCritic | None:
    """Give the policy, None where it is refused in one line."""
    try:
        return read_policy(files, FOLDER)
    except EsperError as error:
        said = one_line(error)
    assert said.startswith(f"policy: {FOLDER}")
    return None


def check_policy(files: dict[str, bytes]) -> None:
    """It is refused, or it is the first one."""
    found = read(files)
    if found is not None:
        assert found.config == POLICIES[0].config
        assert same_tensors(found.state_dict(), POLICIES[0].state_dict())


@cases(80, 1500, name=st.sampled_from([DESCRIPTION, WEIGHTS]), accidents=ACCIDENTS)
def test_a_policy(name, accidents):
    check_policy({**FILES[0], name: mutated(FILES[0][name], accidents)})


@cases(60, 1000, accidents=ACCIDENTS)
def test_the_configuration_of_a_policy(accidents):
    """Most of a description is names of columns: the few numbers in it are worth cases of their own."""
    numbers = re.compile(rb'(?<="config": )\{.*?\}', re.DOTALL)
    description = numbers.sub(lambda found: mutated(found[0], accidents), FILES[0][DESCRIPTION])
    assert numbers.search(FILES[0][DESCRIPTION])
    check_policy({**FILES[0], DESCRIPTION: description})


def test_files_of_two_policies():
    for name in (DESCRIPTION, WEIGHTS):
        assert read({**FILES[0], name: FILES[1][name]}) is None
        assert read({**FILES[0], DESCRIPTION: FILES[0][name], WEIGHTS: FILES[0][name]}) is None


def forged(weights: bytes, **config: object) -> dict[str, bytes]:
    """Files that fit each other, whatever they hold."""
    description = json.loads(FILES[0][DESCRIPTION])
    description["config"] |= config
    description["weights"] = digest(weights)
    description["seal"] = saved._seal(description)
    return {DESCRIPTION: json.dumps(description).encode(), WEIGHTS: weights}


@cases(60, 1000, accidents=ACCIDENTS)
def test_a_policy_whose_checksums_were_made_to_fit(accidents):
    """Nothing but a policy of that size with finite weights comes out."""
    found = read(forged(mutated(FILES[0][WEIGHTS], accidents)))
    assert found is None or all(p.isfinite().all() for p in found.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: t.double() if t.is_floating_point() else t for name, t in state.items()},
        lambda state: {name: t.int() for name, t in state.items()},
        lambda state: {name: t.bool() for name, t in state.items()},
        lambda state: dict(list(state.items())[1:]),
        lambda state: {**state, "somebody.weight": torch.zeros(2)},
        lambda state: {name: t[None] for name, t in state.items()},
        lambda state: {
            name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in state.items()
        },
        lambda state: {},
    ],
)
def test_weights_of_another_kind(change):
    assert read(forged(save(change(POLICIES[0].state_dict())))) is None


@pytest.mark.parametrize("config", [{"width": 8}, {"width": None}, {"hidden": "2" * 9}, {"layers": []}, {"depth": 1}])
def test_a_configuration_of_another_kind(config):
    assert read(forged(FILES[0][WEIGHTS], **config)) is None


@cases(2, 60, name=st.sampled_from([DESCRIPTION, WEIGHTS]), accidents=ACCIDENTS)
def test_a_command_with_such_a_policy(tmp_path_factory, name, accidents):
    folder = tmp_path_factory.mktemp("command")
    for file, content in {**FILES[0], name: mutated(FILES[0][name], accidents)}.items():
        (folder / file).write_bytes(content)
    task = ("--task", "mnist1d-mlp", "--horizon", "1", "--updates-per-decision", "1", "--batch-size", "2")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["grow", *task, "--controller", f"greedy:{folder}", "--out", str(folder / "run")])
    if code == BAD_INPUT:
        assert out.getvalue() == ""
        assert len(err.getvalue().splitlines()) == 1
        assert not (folder / "run").exists()
    else:
        assert (code, err.getvalue()) == (0, "")


# A network, as `model.py` loads it.


def network_of(width: int) -> dict[str, object]:
    linear = {"type": "Linear", "args": {"in_features": width, "out_features": 3}}
    grown = {"type": "Grown", "children": {"seed": linear}, "args": {"operator": "add", "alpha": 0.5, "axes": 0}}
    return {"type": "Sequential", "children": {"a": linear, "r0c0": grown, "b": {"type": "ReLU", "args": {}}}}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a saved network, its files and the network itself."""
    folder, description = tmp_path_factory.mktemp("network"), network_of(3)
    weights = save(plain.build(description).state_dict())
    told = {"network": description, "blake2b": plain.seal(description, weights)}
    files = {"model.json": json.dumps(told).encode(), "model.safetensors": weights}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder, files, plain.load(folder / "model.safetensors", folder / "model.json")


@cases(80, 1500, name=st.sampled_from(["model.json", "model.safetensors"]), accidents=ACCIDENTS)
def test_a_network(network, name, accidents):
    folder, files, whole = network
    (folder / f"changed {name}").write_bytes(mutated(files[name], accidents))
    paths = {file: folder / (f"changed {file}" if file == name else file) for file in files}
    try:
        found = plain.load(paths["model.safetensors"], paths["model.json"])
    except ValueError as error:
        said = one_line(error)
        assert said.endswith("do not belong together, or one of them is damaged")
        return
    assert repr(found) == repr(whole)
    assert same_tensors(found.state_dict(), whole.state_dict())


@cases(60, 1000, accidents=ACCIDENTS)
def test_tensors_whose_header_may_lie(network, accidents):
    """Without a checksum: tensors, or one line; nothing is allocated that is not in the file."""
    folder, files, _ = network
    path = folder / "lying.safetensors"
    path.write_bytes(mutated(files["model.safetensors"], accidents))
    try:
        tensors = plain.read_safetensors(path)
    except ValueError as error:
        said = one_line(error)
        assert "is damaged" in said
        return
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        assert (list(tensor.shape), tensor.nbytes) == (header[name]["shape"], end - begin)


# What a search found, and what it is to try.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    save_headroom(folder, small_headroom())
    return (folder / HEADROOM).rename(folder / "whole")


@cases(60, 800, accidents=ACCIDENTS)
def test_a_table(table, accidents):
    folder = table.parent
    (folder / HEADROOM).write_bytes(mutated(table.read_bytes(), accidents))
    try:
        found = load_headroom(folder)
    except EsperError as error:
        said = one_line(error)
        assert (
            said
            == f"headroom: {folder / HEADROOM} is damaged, or of an earlier version; run `esper exam headroom` again"
        )
        return
    whole = small_headroom()
    assert (found.plans, found.slot_ids, found.hosts) == (whole.plans, whole.slot_ids, whole.hosts)
    assert found.conditions == whole.conditions
    np.testing.assert_array_equal(found.chosen_VWCP, whole.chosen_VWCP)
    np.testing.assert_array_equal(found.net_VWKCP, whole.net_VWKCP)


# The digits.


class Digits:
    """Where scikit-learn now reads its digits, the file as it was, and the data."""

    def __init__(self, path: Path, file: bytes, whole: Dataset) -> None:
        self.path, self.file, self.whole = path, file, whole

    def check(self, content: bytes) -> bool:
        """Whether they are read from such a file, and then they are the digits."""
        self.path.write_bytes(content)
        try:
            found = load_digits(0)
        except EsperError as error:
            said = one_line(error)
            assert said.startswith("digits data file ")
            assert said.endswith("reinstall scikit-learn (pip install --force-reinstall scikit-learn)")
            return False
        for part in ("train", "reward_validation", "selection", "test"):
            assert torch.equal(getattr(found, part).x, getattr(self.whole, part).x)
            assert torch.equal(getattr(found, part).y, getattr(self.whole, part).y)
        return True


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder, package = tmp_path_factory.mktemp("digits"), Path(sklearn.datasets.__file__).parent
    shutil.copy(package / "descr" / "digits.rst", folder)
    with pytest.MonkeyPatch.context() as patch:
        whole = load_digits(0)
        patch.setattr(importlib.resources, "files", lambda module: folder)
        yield Digits(folder / "digits.csv.gz", (package / "data" / "digits.csv.gz").read_bytes(), whole)


@cases(25, 400, accidents=ACCIDENTS)
def test_the_digits(digits, accidents):
    digits.check(mutated(digits.file, accidents))


@cases(10, 200, accidents=ACCIDENTS)
def test_digits_that_were_packed_again(digits, accidents):
    """Whose checksum is right: other digits are not taken for them."""
    digits.check(gzip.compress(mutated(gzip.decompress(digits.file), accidents), compresslevel=1))


def test_the_digits_as_they_are(digits):
    assert digits.check(digits.file)
