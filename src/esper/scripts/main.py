"""The command line: `esper grow`, `train`, `exam`, `runs`, `query`, `tasks`, `doctor`."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from esper.leyline.config import CONFIG, RUN_FOLDER, HeadroomConfig, RunConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.scripts.configs import read_config
from esper.scripts.errors import exit_code, parse_line
from esper.scripts.query import Format, query, runs

Commands = dict[str, Callable[..., int]]
_GROUPS = {"exam": "Measure how much there is to gain by deciding, and who decides best."}


def _commands(run: RunConfig, training: TrainConfig, table: HeadroomConfig) -> dict[str, Callable[..., int] | Commands]:
    """Commands by name, those of a group together.

    What computes is imported by the command that needs it: help and questions should not wait.
    """

    def grow_command(
        config: RunConfig = run,
        out: Path | None = None,
        replace: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
        resume: Path | None = None,
    ) -> int:
        """Grow one network, then train its controls: the host alone, and the host with every slot filled.

        Parameters
        ----------
        config
            The run. --config FILE starts from the config.json of an earlier one.
        out
            Folder of the run; by default named after the run, in runs/.
        replace
            Overwrite an earlier run in that folder.
        resume
            Folder of a run that was stopped or killed: go on where it was.
        """
        from esper.scripts.grow import grow

        return grow(config, out=out, replace=replace, resume=resume)

    def train_command(
        config: TrainConfig = training,
        out: Path | None = None,
        replace: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
        resume: Path | None = None,
    ) -> int:
        """Train a policy that decides about growth, over populations of hosts.

        Parameters
        ----------
        config
            The run. --config FILE starts from the config.json of an earlier one.
        out
            Folder of the run; by default named after the run, in runs/.
        replace
            Overwrite an earlier run in that folder.
        resume
            Folder of a run that was stopped or killed: go on after its last whole round.
        """
        from esper.scripts.train import train

        return train(config, out=out, replace=replace, resume=resume)

    def headroom_command(
        config: HeadroomConfig = table,
        out: Path | None = None,
        replace: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
        resume: Path | None = None,
    ) -> int:
        """Search for the best fixed plans: how much there is to gain, and how much of it by choosing for each context.

        Parameters
        ----------
        config
            The run. --config FILE starts from the config.json of an earlier one.
        out
            Folder of the search; by default named after the run, in runs/.
        replace
            Overwrite an earlier one in that folder.
        resume
            Folder of a search that was stopped or killed: go on after its last whole cell.
        """
        from esper.scripts.headroom import headroom

        return headroom(config, out=out, replace=replace, resume=resume)

    def compare_command(
        headroom: Path,
        policies: tuple[Path, ...] = (),
        starts: int = 24,
        first_start: int = 0,
        out: Path | None = None,
        replace: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    ) -> int:
        """Compare policies with growing never, at random, by the clock, by rule and by the best fixed plans.

        Parameters
        ----------
        headroom
            Folder of `esper exam headroom`: its best plans and its contexts are compared with.
        policies
            Folders of `esper train`, trained in the same contexts; without one only the others are compared.
        starts
            Starts (initialisation, data order, wrong labels) that every arm plays in every context.
        first_start
            Number of the first of them: a later comparison can take starts at which nobody has looked.
        out
            Folder of the comparison; by default named after the run, in runs/.
        replace
            Overwrite an earlier one in that folder.
        """
        from esper.scripts.exam import comparison

        return comparison(headroom, policies, starts, first_start, out=out, replace=replace)

    def tasks_command() -> int:
        """List the tasks with their hosts."""
        from esper.scripts.tasks import tasks

        return tasks()

    def doctor_command() -> int:
        """Check whether this machine does what Esper needs; give 0 if all passed, 2 if not."""
        try:
            from esper.scripts.doctor import doctor
        except (ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            raise EsperError(f"doctor: cannot load what Esper needs: {reason}; install Esper again") from error
        return doctor()

    def query_command(
        run: tyro.conf.Positional[Path],
        sql: tyro.conf.Positional[str] = "",
        /,
        *,
        view: str = "",
        other: Path | None = None,
        format: Format = "table",
        limit: int = 1000,
    ) -> int:
        """Ask what a run recorded; without a question, list those that have a name.

        Parameters
        ----------
        run
            Folder of the run, or its run.sqlite.
        sql
            One SELECT over the tables and views.
        view
            A named question instead.
        other
            A second run, for --view run_diff.
        format
            How to print the answer.
        limit
            Rows at most.
        """
        return query(run, sql, view, other, format, limit)

    def runs_command(folder: tyro.conf.Positional[Path] = RUN_FOLDER, /) -> int:
        """List the runs below a folder, the latest first.

        Parameters
        ----------
        folder
            Where to look.
        """
        return runs(folder)

    return {
        "grow": grow_command,
        "train": train_command,
        "exam": {"headroom": headroom_command, "compare": compare_command},
        "runs": runs_command,
        "query": query_command,
        "tasks": tasks_command,
        "doctor": doctor_command,
    }


def _take_config(arguments: list[str]) -> tuple[RunConfig, TrainConfig, HeadroomConfig]:
    """Take `--config FILE` out of the arguments: it gives the defaults of the command's other arguments.

    So does `--resume FOLDER`, which stays.
    """
    run, training, table = RunConfig(), TrainConfig(), HeadroomConfig()
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        resumable = arguments[:1] in (["grow"], ["train"]) or arguments[:2] == ["exam", "headroom"]
        if name == "--resume" and resumable and (equals or at + 1 < len(arguments)):
            path = Path(value if equals else arguments[at + 1]) / CONFIG
            if arguments[:1] == ["train"]:
                training = read_config(path, TrainConfig)
            elif arguments[:1] == ["exam"]:
                table = read_config(path, HeadroomConfig)
            else:
                run = read_config(path, RunConfig)
            break
        if name != "--config":
            continue
        if not equals and at + 1 == len(arguments):
            raise EsperError("--config: a file is missing behind it; name the config.json of a run")
        path = Path(value if equals else arguments[at + 1])
        del arguments[at : at + (1 if equals else 2)]
        if arguments[:1] == ["train"]:
            training = read_config(path, TrainConfig)
        elif arguments[:1] == ["exam"]:
            table = read_config(path, HeadroomConfig)
        else:
            run = read_config(path, RunConfig)
        break
    return run, training, table


def _parse_and_run(arguments: list[str]) -> int:
    defaults = _take_config(arguments)
    complaint = io.StringIO()
    chosen: list[Callable[[], int]] = []

    def later(command: Callable[..., int]) -> Callable[..., None]:
        """Keep the command for after parsing, so that only the parser's own messages are captured."""

        @functools.wraps(command)
        def keep(*args: object, **kwargs: object) -> None:
            chosen.append(lambda: command(*args, **kwargs))

        return keep

    commands = {
        name: _group(name, {inner: later(f) for inner, f in command.items()})
        if isinstance(command, dict)
        else later(command)
        for name, command in _commands(*defaults).items()
    }
    try:
        with contextlib.redirect_stderr(complaint):
            tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="esper",
                description="Grow neural networks while they train.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return 0
        raise EsperError(parse_line(complaint.getvalue())) from None
    return chosen[0]()


def _group(name: str, commands: dict[str, Callable[..., None]]) -> Callable[..., None]:
    """Give a command whose one argument is which of these to run, in the form that tyro reads."""

    def choose(which: object) -> None:
        """The chosen one has been called to make the argument."""

    kinds = (Annotated[Any, tyro.conf.subcommand(inner, constructor=f)] for inner, f in commands.items())
    choose.__annotations__ = {"which": Union[tuple(kinds)]}  # noqa: UP007
    choose.__doc__ = _GROUPS[name]
    return choose


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 0, 2 for bad input, 130 for ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _parse_and_run(given))


if __name__ == "__main__":
    sys.exit(main())
