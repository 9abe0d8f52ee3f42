"""The stages: every transition, every derived set, and that no other module keeps a set of its own."""

import ast
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

import esper
from esper.leyline import stages
from esper.leyline.stages import Stage

PACKAGE = Path(esper.__file__).parent
AUTHORITY = PACKAGE / "leyline" / "stages.py"

# The arrows of the design, written out by hand. A seed is never resurrected (nothing leaves FOSSILIZED, nothing goes
# from the waiting room to anywhere but its next room), and an empty slot cannot be culled.
ARROWS = {
    ("DORMANT", "GERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("TRAINING", "BLENDING"),
    ("BLENDING", "PROBATIONARY"),
    ("PROBATIONARY", "FOSSILIZED"),
    ("PROBATIONARY", "BLENDING"),
    ("GERMINATED", "CULLED"),
    ("TRAINING", "CULLED"),
    ("BLENDING", "CULLED"),
    ("PROBATIONARY", "CULLED"),
    ("CULLED", "EMBARGOED"),
    ("EMBARGOED", "RESETTING"),
    ("RESETTING", "DORMANT"),
}


def named(text):
    return [Stage[name] for name in text.split()]


def test_values():
    # Recorded runs hold these numbers: none may ever change, and 5 stays retired.
    assert {stage.name: int(stage) for stage in Stage} == {
        "UNKNOWN": 0,
        "DORMANT": 1,
        "GERMINATED": 2,
        "TRAINING": 3,
        "BLENDING": 4,
        "PROBATIONARY": 6,
        "FOSSILIZED": 7,
        "CULLED": 8,
        "EMBARGOED": 9,
        "RESETTING": 10,
    }
    # One more than the largest value: tables are indexed by the value, holes included.
    assert stages.STAGE_COUNT == 11


@pytest.mark.parametrize(("source", "target"), list(product(Stage, Stage)), ids=lambda s: s.name)
def test_every_pair(source, target):
    allowed = (source.name, target.name) in ARROWS
    assert (target in stages.VALID_TRANSITIONS[source]) is allowed
    assert (source in stages.sources_of(target)) is allowed


def test_growth_order():
    # The chain of first steps from an empty slot, without the ways out (CULLED) and back (to BLENDING).
    expected = named("DORMANT GERMINATED TRAINING BLENDING PROBATIONARY FOSSILIZED")
    assert list(stages.GROWTH_ORDER) == expected


def test_waiting_stages():
    # What lies between a cull and an empty slot, in order.
    assert list(stages.WAITING_STAGES) == named("CULLED EMBARGOED RESETTING")


DERIVED = {
    # No arrow leaves it; UNKNOWN has none either but is no stage of a slot.
    "TERMINAL_STAGES": "FOSSILIZED",
    # The one arrow into GERMINATED comes from DORMANT.
    "GERMINABLE_STAGES": "DORMANT",
    # The four arrows into CULLED: a seed exists and is not committed.
    "CULLABLE_STAGES": "GERMINATED TRAINING BLENDING PROBATIONARY",
    # The one arrow into FOSSILIZED comes from PROBATIONARY.
    "FOSSILIZABLE_STAGES": "PROBATIONARY",
    # A seed exists and has a next stage that is neither its first (GERMINATE) nor its last (FOSSILIZE).
    "ADVANCABLE_STAGES": "GERMINATED TRAINING BLENDING",
    # A seed exists: everything in the growth order behind the empty slot.
    "OCCUPIED_STAGES": "GERMINATED TRAINING BLENDING PROBATIONARY FOSSILIZED",
    # The table of the design says "blended" of these three.
    "BLENDED_STAGES": "BLENDING PROBATIONARY FOSSILIZED",
    # Blended, and the growth controller still has a say.
    "RETARGETABLE_STAGES": "BLENDING PROBATIONARY",
    # Blended or in the incubator; a germinated seed exists but computes nothing.
    "ACTIVE_STAGES": "TRAINING BLENDING PROBATIONARY FOSSILIZED",
    # A seed exists and is not blended yet.
    "YOUNG_STAGES": "GERMINATED TRAINING",
}


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_derived_set(name):
    assert getattr(stages, name) == frozenset(named(DERIVED[name]))


def test_every_public_set_is_derived_by_hand_above():
    public = {n for n, v in vars(stages).items() if n.isupper() and isinstance(v, frozenset) and not n.startswith("_")}
    assert public == set(DERIVED)


def test_one_way_on():
    # Each advancable stage to the next of the growth order; each waiting stage along its one arrow.
    advance = dict(zip(named("GERMINATED TRAINING BLENDING"), named("TRAINING BLENDING PROBATIONARY"), strict=True))
    clock = dict(zip(named("CULLED EMBARGOED RESETTING"), named("EMBARGOED RESETTING DORMANT"), strict=True))
    assert advance == stages.ADVANCE_TARGET
    assert advance | clock == stages.STEP_TABLE
    assert Stage.TRAINING is stages.INCUBATED_STAGE


def test_next_stage_table():
    table = stages.next_stage_table()
    # Indexed by value 0 to 10; UNKNOWN, DORMANT, 5, PROBATIONARY and FOSSILIZED stay where they are.
    assert table.tolist() == [0, 1, 3, 4, 6, 5, 6, 7, 9, 10, 1]
    assert table.dtype == torch.int64


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_stage_table_is_membership(name):
    table = stages.stage_table(getattr(stages, name))
    assert table.shape == (11,)
    members = {value for value in range(11) if table[value]}
    assert members == {int(stage) for stage in named(DERIVED[name])}


def test_stage_table_of_no_stage():
    assert not stages.stage_table(frozenset()).any()


def changed(old, new):
    """`stages.py` as it would be with another transition table."""
    source = AUTHORITY.read_text()
    assert source.count(old) == 1
    module = ModuleType("changed_stages")
    exec(compile(source.replace(old, new), str(AUTHORITY), "exec"), vars(module))
    return module


def test_sets_follow_the_transitions():
    # If a germinated seed could not be culled ...
    other = changed("Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.CULLED})", "Stage.GERMINATED: {Stage.TRAINING}")
    names = {stage.name for stage in other.CULLABLE_STAGES}
    assert names == {"TRAINING", "BLENDING", "PROBATIONARY"}
    # ... and if the embargo were skipped.
    other = changed("Stage.CULLED: frozenset({Stage.EMBARGOED})", "Stage.CULLED: frozenset({Stage.RESETTING})")
    assert [stage.name for stage in other.WAITING_STAGES] == ["CULLED", "RESETTING"]
    assert other.STEP_TABLE[other.Stage.CULLED] is other.Stage.RESETTING


def is_stage(node):
    """`Stage.X`, however wrapped: `int(Stage.X)`, `Stage.X.value`, `stages.Stage.X`."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.func, ast.Name):
        return node.func.id == "int" and is_stage(node.args[0])
    if not isinstance(node, ast.Attribute):
        return False
    owner = node.value
    owner_name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
    return owner_name == "Stage" or (node.attr == "value" and is_stage(owner))


def stage_sets(source):
    """Lines of literals that list two or more stages."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Set | ast.Tuple | ast.List) and sum(map(is_stage, node.elts)) >= 2
    ]


@pytest.mark.parametrize(
    "source",
    [
        "A = {Stage.BLENDING, Stage.PROBATIONARY}",
        "A = frozenset({Stage.BLENDING, Stage.PROBATIONARY})",
        "A = frozenset([Stage.BLENDING, x, Stage.PROBATIONARY])",
        "ok = stage in (Stage.BLENDING, Stage.PROBATIONARY)",
        "A = [int(Stage.BLENDING), int(Stage.PROBATIONARY)]",
        "A = (Stage.BLENDING.value, Stage.PROBATIONARY.value)",
        "A = (stages.Stage.BLENDING, stages.Stage.PROBATIONARY)",
    ],
)
def test_the_search_finds(source):
    assert stage_sets(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "A = {Stage.TRAINING: Gate.G1, Stage.BLENDING: Gate.G2}",
        "A = (Stage.TRAINING, Gate.G1)",
        "a, b = Stage.TRAINING, 1",
        "A = [(Stage.TRAINING, 1), (Stage.BLENDING, 2)]",
    ],
)
def test_the_search_leaves_alone(source):
    assert stage_sets(source) == []


def test_no_other_module_repeats_a_stage_set():
    others = [path for path in sorted(PACKAGE.rglob("*.py")) if path != AUTHORITY]
    assert len(others) > 20, "the search must see the package"
    found = [f"{path.relative_to(PACKAGE)}:{line}" for path in others for line in stage_sets(path.read_text())]
    assert found == []
