"""One clear line out of a validation or of the parser's boxes."""

import pytest
from pydantic import ValidationError

from esper.leyline.config import GateConfig, RunConfig
from esper.scripts.errors import parse_line, validation_line


def invalid(values, model=RunConfig):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    return caught.value


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"seed": -1}, "seed: input should be greater than or equal to 0; got -1"),
        ({"seed": "x"}, "seed: input should be a valid integer, unable to parse string as an integer; got 'x'"),
        ({"host": "huge"}, "host: input should be 'impaired' or 'ample'; got 'huge'"),
        ({"training": {"horizon": 0}}, "training.horizon: input should be greater than or equal to 1; got 0"),
        ({"governor": {"learned_guesses": 0}}, "governor.learned_guesses: input should be greater than 0; got 0"),
        ({"sed": 3}, "sed: unknown key; remove it or correct its spelling"),
        ({"growth": {"gates": {"x": 1}}}, "growth.gates.x: unknown key; remove it or correct its spelling"),
        ({"task": None}, "task: input should be a valid string; got None"),
    ],
)
def test_validation(values, line):
    assert validation_line(invalid(values)) == line


def test_a_rule_of_our_own_says_what_came_itself():
    line = validation_line(invalid({"blueprints": ["lora"]}))
    assert line.startswith("blueprints: unknown blueprint 'lora'; known: norm, ")
    assert "got" not in line


def test_a_place_in_a_list_is_left_out():
    assert validation_line(invalid({"blueprints": ["norm", 3]})) == "blueprints: input should be a valid string; got 3"


def test_only_the_first_of_several_complaints():
    assert validation_line(invalid({"seed": -1, "host": "huge"})).startswith("host: ")
    assert "\n" not in validation_line(invalid({"seed": -1, "host": "huge"}))


def test_a_rule_about_a_whole_model_has_no_place():
    line = validation_line(invalid({"min_gradient_ratio": 5, "max_gradient_ratio": 2}, GateConfig))
    assert line == "min_gradient_ratio must be below max_gradient_ratio, or no seed can ever pass"


def test_json_that_is_cut():
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate_json('{"task": ')
    line = validation_line(caught.value)
    assert line.startswith("invalid JSON: EOF while parsing")
    assert "got" not in line


def test_any_other_error_in_one_line():
    assert validation_line(ValueError("first\n  second\tthird")) == "first second third"


# The parser's boxes, as it draws them on a terminal and where the encoding has no such signs.


def boxed(title, *sections, ascii_only):
    """Draw a box as the parser does; a section is one or several lines."""
    inner = max(len(line) for section in sections for line in section.split("\n")) + 2
    rule = "-" if ascii_only else "─"
    lines = f"\n{rule * (inner - 2)}\n".join(sections).split("\n")
    if ascii_only:
        return "\n".join([f" {title} ", f" {rule * inner} ", *(f"  {line:<{inner}}" for line in lines), ""])
    top = f"╭─ {title} ".ljust(inner + 1, "─") + "╮"
    return "\n".join([top, *(f"│ {line:<{inner - 2}} │" for line in lines), f"╰{'─' * inner}╯", ""])


HELP = "For full helptext, run esper --help"
INVALID_SEED = """Error parsing __tyro-dummy-inner__.config: 1 validation
error for RunConfig
seed
  Input should be greater than or equal to 0
[type=greater_than_equal, input_value=-1,
input_type=int]
    For further information visit
https://errors.pydantic.dev/2.14/v/greater_than_equal"""
UNKNOWN_BLUEPRINT = """Error parsing __tyro-dummy-inner__.config: 1 validation
error for RunConfig
blueprints
  Value error, unknown blueprint 'a'; known: norm,
lora_small [type=value_error, input_value=('a',),
input_type=tuple]"""
IMPASSABLE = """Error parsing __tyro-dummy-inner__.config.growth.gates:
1 validation error for GateConfig
  Value error, min_gradient_ratio must be below
max_gradient_ratio [type=value_error,
input_value={'min_training_decisions'...'contribution_errors': 2.0},
input_type=dict]"""
PERHAPS = "Perhaps you meant:\n    --horizon INT\n        Decisions of an episode. (default: 60)"
BOXES = {
    "misspelt": (
        ("Unrecognized options", "Unrecognized options: --horizont, 3", PERHAPS, HELP),
        "unrecognized options: --horizont, 3; perhaps you meant --horizon; see esper --help",
    ),
    "unknown option": (
        ("Unrecognized options", "Unrecognized options: --nope", HELP),
        "unrecognized options: --nope; see esper --help",
    ),
    "unknown command": (
        ("Unrecognized options", "Unrecognized options: prune", "Available subcommands: grow, tasks, doctor", HELP),
        "unrecognized options: prune; commands: grow, tasks, doctor; see esper --help",
    ),
    "folded": (
        ("Value error", "Error parsing --seed: invalid literal for int()\nwith base 10: 'x'", HELP),
        "error parsing --seed: invalid literal for int() with base 10: 'x'; see esper --help",
    ),
    "invalid": (
        ("Value error", INVALID_SEED, HELP),
        "seed: input should be greater than or equal to 0; got -1",
    ),
    "rule of our own": (
        ("Value error", UNKNOWN_BLUEPRINT, HELP),
        "blueprints: unknown blueprint 'a'; known: norm, lora_small",
    ),
    "rule about a whole model": (
        ("Value error", IMPASSABLE, HELP),
        "min_gradient_ratio must be below max_gradient_ratio",
    ),
}


@pytest.mark.parametrize("ascii_only", [False, True], ids=["boxes", "ascii"])
@pytest.mark.parametrize("case", BOXES)
def test_boxes(case, ascii_only):
    (title, *sections), line = BOXES[case]
    assert parse_line(boxed(title, *sections, ascii_only=ascii_only)) == line


def test_text_without_a_box():
    assert parse_line("Something went wrong\nin two lines\n") == "something went wrong in two lines; see esper --help"
