"""The table of features: what every column of an observation is. `docs/observation.md` is generated from it.

Everything that follows the column order (`observation`, the network's input widths, saved policies) reads it from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.leyline.actions import ALPHA_SPEEDS, Blueprint, Op, Operator, SiteKind
from esper.leyline.stages import Stage


@dataclass(frozen=True)
class Feature:
    """One column of a token.

    Attributes
    ----------
    meaning, unit
        Of the quantity before normalisation.
    normalisation
        How the column is made of the quantity x.
    low, high
        Range of the column.
    """

    name: str
    meaning: str
    unit: str
    normalisation: str
    low: float
    high: float


def _flag(name: str, meaning: str) -> Feature:
    return Feature(name, meaning, "", "1 or 0", 0.0, 1.0)


def _one_hot(group: str, values: list[str], of: str) -> list[Feature]:
    return [_flag(f"{group} {value}", f"{of} is {value}") for value in values]


INF = float("inf")
SYMLOG = "sign(x) ln(1 + abs(x)); 0 if not measured"
LOG10 = "log10(x) / 6, x clamped to [1e-6, 1e6]; 0 if not measured"
TIME = "ln(1 + x) / ln(1 + horizon)"
HISTORY = 3
"""Decisions over which improvements are seen."""
OBSERVED_STAGES = tuple(s for s in Stage if s is not Stage.UNKNOWN)

SLOT_FEATURES: tuple[Feature, ...] = (
    *_one_hot("stage", [s.name for s in OBSERVED_STAGES], "the stage of the slot"),
    *_one_hot("blueprint", [b.name for b in Blueprint], "the blueprint of the seed (NOOP: no seed)"),
    *_one_hot("operator", [o.name for o in Operator], "the operator of the seed (ADD where there is none)"),
    Feature("alpha", "share of the seed", "fraction", "x", 0.0, 1.0),
    Feature("alpha target", "where its ramp ends", "fraction", "x", 0.0, 1.0),
    Feature("ramp left", "decisions until alpha lands", "decisions", f"x / {max(ALPHA_SPEEDS)}", 0.0, 1.0),
    _flag("alpha up", "alpha is rising"),
    _flag("alpha down", "alpha is falling"),
    Feature("age", "decisions since germination", "decisions", TIME, 0.0, INF),
    Feature("stage age", "decisions in the present stage", "decisions", TIME, 0.0, INF),
    Feature("cooldown", "decisions of waiting left", "decisions", TIME, 0.0, INF),
    Feature("contribution", "loss without the seed less loss with it", "nats", SYMLOG, -INF, INF),
    Feature("contribution error", "its standard error", "nats", SYMLOG, 0.0, INF),
    Feature("incubator gain", "loss without the seed less loss if it were blended", "nats", SYMLOG, -INF, INF),
    Feature("incubator gain error", "its standard error", "nats", SYMLOG, 0.0, INF),
    Feature("gradient norm", "mean norm of the seed's gradient", "nats", LOG10, -1.0, 1.0),
    Feature("gradient ratio", "its root mean square over the host's", "", LOG10, -1.0, 1.0),
    _flag("contribution measured", "the contribution is a finite number"),
    _flag("incubator gain measured", "the incubator gain is a finite number"),
    _flag("gradient measured", "the gradient norm is a finite number"),
    Feature("parameters", "learned numbers of the seed over those of the host", "", "ln(1 + x)", 0.0, INF),
    _flag("gate open", "the gate in front of the next stage would pass"),
    *_one_hot("site", [k.name for k in SiteKind], "what flows through the site"),
    Feature("site width", "features or channels", "", "log2(x) / 10", 0.0, INF),
    Feature("site extent", "places of one example", "", "log2(x) / 10", 0.0, INF),
    Feature("site depth", "segments in front of the site over all sites", "fraction", "x", 0.0, 1.0),
)

RUNNING = "running mean and deviation, clamped to [-5, 5]; 0 if not measured"
RUNNING_FEATURES: tuple[Feature, ...] = (
    Feature("train loss", "mean training loss of the last decision over ln(classes)", "", RUNNING, -5.0, 5.0),
    Feature("validation loss", "reward-validation loss over ln(classes)", "", RUNNING, -5.0, 5.0),
    *(
        Feature(
            f"improvement {back}",
            f"validation loss {back} decisions ago less now, over ln(classes)",
            "",
            RUNNING,
            -5.0,
            5.0,
        )
        for back in range(1, HISTORY + 1)
    ),
)
"""The first columns of the run token: NaN where not measured, normalised by the policy's own frozen statistics."""
RUN_FEATURES: tuple[Feature, ...] = (
    *RUNNING_FEATURES,
    *(_flag(f"{f.name} measured", f"{f.name} is a finite number") for f in RUNNING_FEATURES),
    Feature("accuracy", "accuracy on reward-validation; 0 if not measured", "fraction", "x", 0.0, 1.0),
    Feature("progress", "decisions made over the horizon", "fraction", "x", 0.0, 1.0),
    Feature("decisions left", "decisions until the horizon", "decisions", TIME, 0.0, 1.0),
    Feature("occupied", "slots with a seed over all slots", "fraction", "x", 0.0, 1.0),
    Feature("committed", "slots with a committed seed over all slots", "fraction", "x", 0.0, 1.0),
    Feature("growth", "learned numbers of all seeds over those of the host", "", "ln(1 + x)", 0.0, INF),
    Feature("price", "price of one unit of growth", "nats", "ln(1 + x / 0.02)", 0.0, INF),
    Feature("cost", "price times growth", "nats", "ln(1 + x / 0.02)", 0.0, INF),
    *_one_hot("last op", [o.name for o in Op], "the operation of the last decision (none before the first)"),
    _flag("last accepted", "the last action was performed"),
    _flag("last refused by structure", "the last action was impossible"),
    _flag("last refused by gate", "a gate refused the last action"),
    Feature("classes", "classes of the task", "", "ln(x) / 5", 0.0, INF),
    Feature("host parameters", "learned numbers of the host", "", "log10(x) / 8", 0.0, INF),
    Feature("slots", "slots of the host", "", "log2(x) / 8", 0.0, INF),
)


def feature_table() -> str:
    """Give both tables as a Markdown page."""
    lines = [
        "# What a policy sees",
        "",
        "Written by `python -m esper.tamiyo.policy.features`; a test holds it to the code. One token for each slot,",
        "and one for the run. What was not measured is 0, with a flag of its own that says so.",
    ]
    for title, features in (("Slot token", SLOT_FEATURES), ("Run token", RUN_FEATURES)):
        lines += ["", f"## {title}", "", "| column | name | meaning | unit | normalisation | range |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for column, f in enumerate(features):
            limits = f"[{f.low:g}, {f.high:g}]".replace("[-inf", "(-inf").replace("inf]", "inf)")
            lines.append(f"| {column} | {f.name} | {f.meaning} | {f.unit} | {f.normalisation} | {limits} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(feature_table(), end="")
