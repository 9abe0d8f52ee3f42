"""What is shown of a run: the panel of a terminal, lines elsewhere, events with their reasons, the table."""

import io
import re

import pytest
from rich.console import Console

from esper.leyline.config import RunConfig, TrainingConfig
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.scripts.display import PLAIN_EVERY, Display, event_text, failures_told, result_table
from esper.simic.grow import ArmResult, DecisionLine, SlotLine
from esper.simic.story import CheckResult, Event

CONFIG = RunConfig(task="digits", controller="random", seed=7, training=TrainingConfig(horizon=25))
EMPTY = SlotLine("r0c0", "DORMANT", None, None, 0.0, 0, None, None, None, None, None)
YOUNG = SlotLine("r0c1", "TRAINING", "conv_heavy", "gate", 0.0, 12_345, None, None, 0.0625, 0.5, 1.5)
GROWN = SlotLine("r0c2", "BLENDING", "mlp_small", "add", 1 / 3, 67, -0.125, 0.25, None, None, 1.5)
CHECKS = (
    CheckResult("GRADIENT_FINITE", 2.0, None, True),
    CheckResult("TRAINING_DECISIONS", 1.0, 3.0, False),
    CheckResult("INCUBATOR_GAIN", None, 0.0, False),
)


def line(decision=9, slots=(EMPTY, YOUNG, GROWN), loss=1.25, failure=None):
    return DecisionLine(decision, 20 * (decision + 1), 1.0, loss, 1.5, 0.4567, 65_432, failure, slots)


def event(**more):
    told = {
        "decision": 4,
        "slot": "r0c1",
        "actor": "controller",
        "what": "advance",
        "before": "TRAINING",
        "after": "BLENDING",
        "accepted": True,
        "refused_by": None,
        "detail": {},
        "checks": (),
        "panic": Panic.NONE,
        "harvested": False,
    }
    return Event(**{**told, **more})


def shown(*lines, width=80, terminal=True, events=(), told=0):
    """Show decisions of one arm; give what was written, without its control sequences."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, height=40, color_system="standard")
    with Display(console, CONFIG, 3 * CONFIG.training.horizon, told) as display:
        for one in lines:
            display.show("grown", one, list(events))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n")


@pytest.mark.parametrize("width", [60, 80, 100, 130, 200])
def test_the_panel_of_a_terminal_of_any_width(width):
    text = shown(line(), width=width)
    assert "digits (random), seed 7" not in text
    assert "digits (impaired), random, seed 7: grown" in text
    words = " ".join(text.split())
    for part in (
        "decision 10/25",
        "loss 1.250 train, 1.500 validation (nats)",
        "accuracy 45.7%",
        "65,432 parameters",
    ):
        assert part in words
    assert re.search(r"\d+\.\d decisions/s", words)
    assert re.search(r"\d+ s left", words)
    assert max(map(len, text.splitlines())) <= width


def test_the_slots_of_the_panel():
    text = shown(line(), width=100)
    assert re.search(r"^slot +stage +seed +alpha +parameters +worth \(nats\) *$", text, re.M)
    assert re.search(r"^r0c0 +DORMANT +0\.00 *$", text, re.M)
    assert re.search(r"^r0c1 +TRAINING +conv_heavy \(gate\) +0\.00 +12,345 +\+0\.062 ± 0\.500 *$", text, re.M)
    assert re.search(r"^r0c2 +BLENDING +mlp_small \(add\) +0\.33 +67 +-0\.125 ± 0\.250 *$", text, re.M)


def test_the_panel_shows_the_last_decision():
    text = shown(line(3, slots=(YOUNG,)), line(4, slots=(GROWN,)), width=200)
    assert "decision 5/25" in text
    assert re.search(r"^r0c2 +BLENDING", text, re.M)


def test_not_measured_is_said():
    text = shown(line(loss=None), width=200)
    assert "loss not measured train, 1.500 validation" in text


def test_lines_without_a_terminal():
    text = shown(*(line(decision) for decision in range(25)), terminal=False, width=200)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert PLAIN_EVERY == 10
    assert [re.match(r"grown: decision (\d+)/25  ", shown_line)[1] for shown_line in lines] == ["10", "20", "25"]
    assert all(re.search(r"  65,432 parameters  \d+\.\d decisions/s  \d+ s left$", text) for text in lines)


def test_the_time_left_counts_all_arms():
    # Of 3 arms of 25 decisions, 25 are made: twice the time so far is left, whatever that is.
    text = shown(*(line(decision) for decision in range(25)), terminal=False, width=200)
    rate, left = re.findall(r"(\d+\.\d) decisions/s  (\d+) s left", text)[-1]
    assert int(left) == pytest.approx(50 / float(rate), abs=1)


def test_the_time_left_of_a_run_that_goes_on():
    # The first 20 were made by another process: the rate is that of the 5 decisions of this one.
    text = shown(*(line(decision) for decision in range(20, 25)), terminal=False, width=200, told=20)
    rate, left = re.findall(r"(\d+\.\d) decisions/s  (\d+) s left", text)[-1]
    assert int(left) == pytest.approx(50 / float(rate), abs=1)


@pytest.mark.parametrize("terminal", [True, False])
def test_events_are_printed_as_they_come(terminal):
    text = shown(line(0), terminal=terminal, width=200, events=[event(), event(slot="r0c2")])
    assert len(re.findall(r"^   5  r0c[12]  advance  TRAINING → BLENDING *$", text, re.M)) == 2


def test_an_accepted_action():
    detail = {"blueprint": "norm", "style": "linear_add", "tempo": 3, "alpha_target": 1.0}
    told = event(what="germinate", before="DORMANT", after="GERMINATED", detail=detail)
    assert event_text(told).plain == "   5  r0c1  germinate norm linear_add 3 1.0  DORMANT → GERMINATED"


def test_a_passed_gate():
    told = event(checks=CHECKS[:1])
    assert event_text(told).plain == "   5  r0c1  advance  TRAINING → BLENDING  [gradient norm finite 2 passed]"


def test_a_refused_action_tells_the_decisive_check_first():
    told = event(after="TRAINING", accepted=False, refused_by="TRAINING_DECISIONS", checks=CHECKS)
    assert event_text(told).plain == (
        "   5  r0c1  advance refused in TRAINING  [decisions in TRAINING 1 (limit 3) refused; "
        "gradient norm finite 2 passed; incubator gain (nats) not measured (limit 0) refused]"
    )


def test_a_refusal_of_the_structure():
    told = event(what="fossilize", before="DORMANT", after="DORMANT", accepted=False, refused_by="STAGE")
    assert event_text(told).plain == (
        "   5  r0c1  fossilize refused in DORMANT  [the slot's stage or its moving alpha does not allow it]"
    )


def test_a_step_of_the_clock():
    told = event(actor="clock", what="clock", before="CULLED", after="EMBARGOED")
    assert event_text(told).plain == "   5  r0c1  CULLED → EMBARGOED"


def test_a_rollback():
    told = event(actor="governor", what="rollback", after="CULLED", panic=Panic.NOT_FINITE)
    why = PANIC_TEXT[Panic.NOT_FINITE]
    assert event_text(told).plain == f"   5  r0c1  rollback  TRAINING → CULLED  [{why}]"


def test_an_action_that_changes_no_stage():
    told = event(what="set_alpha_target", before="BLENDING", after="BLENDING", detail={"alpha_target": 0.5})
    assert event_text(told).plain == "   5  r0c1  set_alpha_target 0.5  BLENDING"


def test_brackets_in_a_reason_are_text():
    # Markup would swallow them.
    assert "[gradient norm finite" in shown(line(), terminal=False, width=200, events=[event(checks=CHECKS[:1])])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_is_told_when_it_happens(terminal):
    told = "restored, its learning rate multiplied by 0.3: [why]"
    assert f"   7  host  {told}" in shown(line(6, failure=told), terminal=terminal)
    assert "host" not in shown(line(6), terminal=terminal)


def test_what_went_wrong_is_told_in_the_end():
    results = [
        ArmResult("grown", 0.9, 0.25, 1234, 2.0, 60, 1234, 6, "the host had diverged"),
        ArmResult("host alone", 0.5, None, 110, 1.0, 60, 0, 0, None),
        ArmResult("everything from the start", 1.0, 0.5, 12_345, 123.4, 60, 1, 1, None),
    ]
    assert failures_told(results) == [
        "grown: 1,234 updates skipped, because a gradient was not finite.",
        "grown: the host was restored to its last good state 6 times.",
        "grown: given up in its last good state: the host had diverged.",
        "everything from the start: 1 update skipped, because a gradient was not finite.",
        "everything from the start: the host was restored to its last good state 1 time.",
    ]
    assert failures_told(results[1:2]) == []


def test_the_table():
    file = io.StringIO()
    results = [
        ArmResult("grown", 0.9123, 0.25, 1234, 2.0, 60, 0, 0, None),
        ArmResult("host alone", 0.5, None, 110, 1.0, 60, 0, 0, None),
        ArmResult("everything from the start", 1.0, 0.5, 12_345_678, 123.4, 60, 0, 0, None),
    ]
    Console(file=file, width=80).print(result_table(results))
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in file.getvalue().splitlines() if "│" in row]
    assert rows == [
        ["grown", "91.2%", "0.250", "1,234", "2.0"],
        ["host alone", "50.0%", "not measured", "110", "1.0"],
        ["everything from the start", "100.0%", "0.500", "12,345,678", "123.4"],
    ]
