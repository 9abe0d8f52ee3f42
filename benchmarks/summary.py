"""Write docs/benchmarks.md from the results of the other scripts.

python benchmarks/summary.py
"""

import ast
import json
from pathlib import Path

from common import RESULTS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
ORDER = (
    *("headroom", "population", "kernels", "lifecycle", "contributions", "leave_one_out", "optimizer"),
    *("incubators", "leaving_the_incubator", "idle_seeds", "operator_jump", "operators", "layout", "products"),
    *("decisions", "recording", "learning", "critic"),
    *("growing_cost", "late_seeds", "soak", "false_alarms", "precision"),
)
HEAD = """# Benchmarks

Written by `benchmarks/summary.py` from `benchmarks/results/`; `make bench` makes them anew.

Times are medians, the sides of a comparison take turns in one process; what counts are the ratios.
"At least" and "at most" are what was asked for.
"""


def cell(value: object) -> str:
    """One value as text."""
    return {True: "yes", False: "**no**"}[value] if isinstance(value, bool) else str(value)


def section(name: str) -> str:
    """One benchmark: its docstring, its settings and its table."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    doc = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    title, _, rest = doc.partition("\n")
    settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    machine = result["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = f"{result['date']}, {machine['processor']}, {threads}, torch {machine['torch']}; {settings}."
    columns = list(result["rows"][0])
    lines = [columns, ["---"] * len(columns), *[[cell(row[c]) for c in columns] for row in result["rows"]]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## {title}\n{rest}\n\n{where}\n\n{table}\n"


def main() -> None:
    made = [name for name in ORDER if (RESULTS / f"{name}.json").exists()]
    PAGE.write_text("\n".join([HEAD, *[section(name) for name in made]]))
    print(f"wrote {PAGE.name}: {', '.join(made)}")


if __name__ == "__main__":
    main()
