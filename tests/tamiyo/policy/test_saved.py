"""Saved policies: what comes back is the same, and what cannot be used is refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from esper.leyline.config import PolicyConfig
from esper.leyline.errors import EsperError
from esper.tamiyo.policy import saved
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tamiyo.policy.saved import DESCRIPTION, WEIGHTS, load_policy, save_policy

SMALL = PolicyConfig(width=8, attention_heads=2, hidden=12)


def new_policy(config: PolicyConfig = SMALL, seed: int = 0) -> FactoredRecurrentActorCritic:
    policy = FactoredRecurrentActorCritic(config)
    policy.initialise(torch.Generator().manual_seed(seed))
    policy.statistics.update(torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)))
    return policy


@pytest.fixture
def folder(tmp_path):
    save_policy(new_policy(), tmp_path / "a policy")
    return tmp_path / "a policy"


def refusal(folder) -> str:
    with pytest.raises(EsperError) as caught:
        load_policy(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def rewrite(folder, **changes) -> None:
    """As another version would have written it."""
    description = {**json.loads((folder / DESCRIPTION).read_text()), **changes}
    (folder / DESCRIPTION).write_text(json.dumps({**description, "seal": saved._seal(description)}))


def test_it_comes_back_whole(folder):
    made, loaded = new_policy(), load_policy(folder)
    assert loaded.config == SMALL
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert sorted(p.name for p in folder.iterdir()) == [DESCRIPTION, WEIGHTS]


def test_a_later_policy_replaces_it(folder):
    save_policy(new_policy(seed=1), folder)
    assert torch.equal(load_policy(folder).op_head.weight, new_policy(seed=1).op_head.weight)


def test_nothing_there(tmp_path):
    assert refusal(tmp_path / "none") == (
        f"policy: cannot read {tmp_path / 'none'}: No such file or directory; name the folder of a saved policy"
    )


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
def test_half_of_it_there(folder, name):
    (folder / name).unlink()
    assert "cannot read" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "\x00", "[" * 100_000, "9" * 10_000])
def test_a_damaged_description(folder, content):
    (folder / DESCRIPTION).write_text(content)
    assert f"{folder / DESCRIPTION} is damaged" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "3", "{}"])
def test_another_programs_description(folder, content):
    (folder / DESCRIPTION).write_text(content)
    assert "its format is not that of this version (None instead of 3)" in refusal(folder)


@pytest.mark.parametrize("change", [{"layers": 2}, {"attention_heads": 4}, {}])
def test_a_description_that_was_changed(folder, change):
    """The same weights would make another policy of it, or the same one by luck."""
    description = json.loads((folder / DESCRIPTION).read_text())
    description["config"] |= change
    description |= {} if change else {"comment": "mine"}
    (folder / DESCRIPTION).write_text(json.dumps(description))
    assert f"{folder / DESCRIPTION} is damaged" in refusal(folder)


def test_a_description_that_is_only_written_otherwise(folder):
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(dict(reversed(description.items())), indent=7))
    assert load_policy(folder).config == SMALL


def test_a_policy_that_had_diverged(folder):
    policy = new_policy()
    policy.op_head.weight.detach()[0, 0] = torch.nan
    save_policy(policy, folder)
    assert "its weights are not all finite" in refusal(folder)


def test_a_name_that_no_folder_can_have():
    assert refusal(Path("a\0b")) == "policy: cannot read a\\x00b: embedded null byte; name the folder of a saved policy"


def test_damaged_weights(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    assert f"{folder / WEIGHTS} is damaged or of another policy" in refusal(folder)
    (folder / WEIGHTS).write_bytes(bytes(data[:100]))
    assert "is damaged or of another policy" in refusal(folder)


def test_weights_of_another_policy(folder, tmp_path):
    save_policy(new_policy(seed=1), tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).replace(folder / WEIGHTS)
    assert "is damaged or of another policy" in refusal(folder)


def test_another_version(folder):
    rewrite(folder, format=1)
    assert "its format is not that of this version (1 instead of 3)" in refusal(folder)


def test_a_policy_that_sees_something_else(folder):
    features = json.loads((folder / DESCRIPTION).read_text())["slot features"]
    rewrite(folder, **{"slot features": [f for f in features if f != "alpha"]})
    assert "its slot features is not that of this version (differing in 'alpha')" in refusal(folder)
    rewrite(folder, **{"slot features": [*features, "smell"]})
    assert "differing in 'smell'" in refusal(folder)
    rewrite(folder, **{"slot features": features[::-1]})
    assert "differing in their order" in refusal(folder)


def test_a_policy_that_does_something_else(folder):
    rewrite(folder, heads={"OP": 7})
    assert "its heads is not that of this version" in refusal(folder)


@pytest.mark.parametrize("config", [None, {"width": 16}, {"width": "wide"}, {**SMALL.model_dump(), "depth": 3}])
def test_weights_that_do_not_fit_the_configuration(folder, config):
    rewrite(folder, config=config)
    assert "its weights do not fit its configuration" in refusal(folder)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EsperError, match=r"cannot use .*: (Not a directory|File exists)"):
        save_policy(new_policy(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
