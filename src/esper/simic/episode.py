"""An episode: a population and a controller, decision by decision.

Shapes: R rows, S slots, C gate checks, H heads, O operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from esper.kasmina.population import Population
from esper.kasmina.snapshot import Snapshot
from esper.kasmina.topology import Topology, rebuild, state_of, topology_of
from esper.leyline.actions import HEAD_COUNT, Blueprint, SiteKind
from esper.leyline.checks import GateReport, Outcome
from esper.leyline.clock import PhaseClock
from esper.leyline.config import Frozen, PopulationConfig
from esper.leyline.panics import Panic
from esper.leyline.slots import EMPTY_SLOT, NOT_MEASURED, Structure, legal_ops
from esper.leyline.state import Tensors, below, under
from esper.leyline.transfer import Parcel
from esper.leyline.view import Controller, PopulationView, Scores, check_actions
from esper.simic.contexts import Contexts, noisy_labels
from esper.simic.step import Step, step_of
from esper.tamiyo.controllers.registry import make_controller
from esper.tamiyo.policy.distribution import raise_flag
from esper.tolaria.batches import BatchOrder
from esper.tolaria.datasets import Split
from esper.tolaria.evaluation import evaluate, measure
from esper.tolaria.governor import Governor
from esper.tolaria.harvest import MEMORY, harvest
from esper.tolaria.tasks import Task
from esper.tolaria.training import Trainer

STATIC_BLUEPRINT = {
    SiteKind.VECTOR: Blueprint.MLP_LARGE,
    SiteKind.SIGNAL: Blueprint.CONV_HEAVY,
    SiteKind.IMAGE: Blueprint.CONV_HEAVY,
}
"""What fills every slot of the static network with everything from the start: the largest that fits."""


_STRUCTURES = ("structure", "acted")
"""See `Step`."""


class EpisodeFacts(Frozen):
    """The plain values of an episode's state."""

    seed: int
    start_ids: tuple[int, ...]
    """What every random stream is drawn by, of the run and of each row, beside its own coordinates."""
    decision: Annotated[int, Field(ge=1)]
    """Decisions made."""
    update: Annotated[int, Field(ge=1)]
    """Updates made: with the seed and a row's start id they say where in its data the row is."""
    topology: Topology
    """What grew where."""


class _Losses(NamedTuple):
    """Measured after a decision; see `PopulationView`."""

    train_loss_R: Tensor
    val_loss_R: Tensor
    val_accuracy_R: Tensor


class Episode:
    """One population from initialisation to its last update.

    Parameters
    ----------
    config
        The run.
    task
        Its task, loaded.
    controller
        Name of the controller.
    row_ids_R
        Int64: a row's id decides its initialisation and its data order.
    static
        Fill every slot with a committed seed before the first update.
    contexts
        How the rows differ; by default each has a start of its own, and growth costs nothing.
    recovers
        A row that fails goes on from its last good state, with a lower learning rate; otherwise it waits for the end
        (see `Governor`).
    dtype
        Of the parameters.

    Attributes
    ----------
    clock
        What the phases of its decisions took.
    reward
        Parts of the reward for the last decision, [R] by term, for its record; whoever pays puts them here.

    Raises
    ------
    EsperError
        No such controller, or no allowed blueprint fits the host.
    """

    def __init__(
        self,
        config: PopulationConfig,
        task: Task,
        controller: str,
        row_ids_R: Tensor,
        *,
        static: bool = False,
        contexts: Contexts | None = None,
        recovers: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.task = config, task
        row_ids_R = row_ids_R.to(config.device)
        self.contexts = contexts = contexts or Contexts.alone(config, row_ids_R)
        self.population = Population(
            task.host,
            config.growth,
            config.seed,
            contexts.start_id_R,
            allowed=config.allowed_blueprints(),
            device=config.device,
            dtype=dtype,
        )
        population = self.population
        self.controller: Controller = make_controller(
            controller,
            rows=population.rows,
            slots=population.slots.slots,
            seed=config.seed,
            row_ids_R=row_ids_R,
            device=config.device,
        )
        if static:
            kind = STATIC_BLUEPRINT[task.host.kind]
            population.plant(torch.full((population.rows, population.slots.slots), int(kind)))
        training = config.training
        train = task.data.train
        order = BatchOrder(config.seed, contexts.start_id_R, len(train.y), training.batch_size)
        updates = training.horizon * training.updates_per_decision
        labels_RN = noisy_labels(train.y, task.data.classes, contexts, config.seed)
        precision = torch.bfloat16 if training.precision == "bfloat16" else None
        self.trainer = Trainer(population, train, order, config.optimizer, updates, labels_RN, precision)
        self.decision = 0
        unmeasured_R = torch.full((population.rows,), NOT_MEASURED, device=population.device)
        self.governor = Governor(
            config.governor, task.data.classes, population.rows, population.device, recovers=recovers
        )
        self._set_rates()
        self._snapshot = Snapshot(population)
        self._measured = _Losses(unmeasured_R, unmeasured_R, unmeasured_R)
        """Of the last decision, as they came."""
        self._good = self._seen = self._measured
        """Of the last good state of each row; what is seen of it: that, where it was put back to it."""
        self._panic_R = self._skipped_R = torch.zeros_like(unmeasured_R, dtype=torch.int64)
        self._culled_RS = self._harvested_RS = torch.zeros_like(population.slots.stage, dtype=torch.bool)
        """Seeds that the last decision cost: by a rollback, and because the episode is over."""
        self._lost_R = torch.full_like(self._panic_R, -MEMORY)
        """Number of the update before which a seed last left the forward pass."""
        self._last: Outcome | None = None
        self._structure = self._acted = population.structure
        """Before the last action, and after it and the clock."""
        self._legal_RO = legal_ops(population.slots, population.fits_SB).any(2)
        self._no_scores = Scores(unmeasured_R[:, None].expand(-1, HEAD_COUNT), unmeasured_R)
        self._action_RH: Tensor | None = None
        self._gates: GateReport | None = None
        self._restored: Tensors | None = None
        """The record of the last decision, if that was made before the episode was restored."""
        self.clock = PhaseClock()
        self.reward: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """All decisions of the episode are made."""
        return self.decision >= self.config.training.horizon

    def advance(self, *, record: bool = False) -> Step | None:
        """Make one decision, its updates and the measurements after them.

        After the updates of the last decision the population is harvested: seeds that are not committed are culled, and
        what is measured is what is left.

        Parameters
        ----------
        record
            Give the record of the decision before this one, None before the first: it travels with this one's transfer.

        Raises
        ------
        InvalidStateMachineError, EsperError
            The controller's masks or logits were found bad (see `Controller.flag`).
        ValueError
            Its actions have another shape or dtype.
        """
        population, phase = self.population, self.clock.phase
        before, structures = self.decision - 1, (self._structure, self._acted)
        with phase("pack"):
            parcels = [Parcel.pack(self._record())] if record and self.decision else []
            self._restored = None
        with phase("observe"):
            view = self.view()
            self._gates = view.gates
            self._legal_RO = legal_ops(population.slots, population.fits_SB).any(2)
            self.controller.observe(view)
        with phase("act"):
            # A twin waits, and whose episode is over does, whatever the controller wants: WAIT is all zeros.
            acts_R = self.contexts.grows_R & ~self.governor.retired_R
            self._action_RH = check_actions(self.controller.act(), population.rows) * acts_R[:, None]
        with phase("apply"):
            flag = self.controller.flag
            news = {"culled_RS": self._culled_RS} | ({} if flag is None else {"flag": flag})
            known, blended_RS = population.structure, population.slots.blended_RS()
            self._last, cargo = population.decide(self._action_RH, self._gates, *parcels, Parcel.pack(news))
            # Of a rollback after the decision before, the host hears only now.
            self._structure, self._acted = known.without(cargo[-1]["culled_RS"]), population.structure
            if flag is not None:
                raise_flag(int(cargo[-1]["flag"]))
            self._lose((blended_RS & ~population.slots.blended_RS()).any(1))
        with phase("train"):
            train_loss_R = self.trainer.run(self.config.training.updates_per_decision)
        self.decision += 1
        split = self.task.data.reward_validation
        with phase("measure"):
            evaluation = (evaluate if self.done else measure)(population, split)
        with phase("govern"):
            self._govern(_Losses(train_loss_R, evaluation.loss_R, evaluation.accuracy_R))
        if self.done:
            with phase("harvest"):
                self._harvest(split)
        return step_of(cargo[0], before, *structures) if parcels else None

    def _govern(self, measured: _Losses) -> None:
        """Roll back the rows that failed, before anybody sees them, and keep the others.

        A row that is over trains on with the rest, as the kernels are shared, and is put back each time.
        """
        governor, trainer = self.governor, self.trainer
        self._skipped_R = trainer.skipped_R.masked_fill(governor.retired_R, 0)
        verdict = governor.judge(
            *measured,
            finite_R=self.population.finite(),
            skipped_R=self._skipped_R,
            updates=self.config.training.updates_per_decision,
        )
        self._panic_R, self._measured = verdict.panic_R, measured
        back_R = governor.retired_R | (verdict.panic_R != int(Panic.NONE))
        self._culled_RS = self._snapshot.restore(back_R)
        self._lose(back_R & self._snapshot.forgoes_R)
        self._snapshot.take(verdict.good_R)
        self._good = _chosen(verdict.good_R, measured, self._good)
        self._seen = _chosen(back_R, self._good, measured)
        self._set_rates()

    def _set_rates(self) -> None:
        """Let each row train with its own learning rate, or with the share of it that the governor allows."""
        self.trainer.rate_R.copy_(self.contexts.rate_R * self.governor.rate_share_R)

    def _lose(self, lost_R: Tensor) -> None:
        """Remember which rows (bool) lose a seed from the forward pass before the next update."""
        self._lost_R = torch.where(lost_R, self.trainer.update, self._lost_R)

    def _harvest(self, split: Split) -> None:
        """Cull what is not committed, and measure what is left.

        The governor has judged before: a host that is worth little without a seed on trial has not failed, and is not
        paid for the state that still had it.
        """
        self._harvested_RS = harvest(self.trainer, self.trainer.update - self._lost_R < MEMORY)
        left = measure(self.population, split)
        self._seen = self._seen._replace(val_loss_R=left.loss_R, val_accuracy_R=left.accuracy_R)

    def view(self) -> PopulationView:
        """Give the state before the next decision, as controllers see it."""
        population = self.population
        return PopulationView(
            decision=self.decision,
            horizon=self.config.training.horizon,
            slots=population.slots,
            slot_config=self.task.host.slot_config,
            fits_SB=population.fits_SB,
            seed_parameters_SBO=population.lifecycle.parameter_counts,
            gates=population.gate_report(self._seen.val_loss_R),
            **self._seen._asdict(),
            host_parameters=population.hosts.layer.parameter_count,
            classes=self.task.data.classes,
            price_R=self.contexts.price_R,
            last=self._last,
            last_action_RH=self._action_RH,
        )

    def step(self) -> Step:
        """Copy the last decision to the host, in a transfer of its own: for the end of an episode.

        It brings the population in line with its slots, so that seeds that a rollback culled are gone from it.

        Raises
        ------
        RuntimeError
            No decision was made yet.
        """
        (cargo,) = self.population.settle(Parcel.pack(self._record()))
        return step_of(cargo, self.decision - 1, self._structure, self._acted)

    def state(self) -> tuple[EpisodeFacts, Tensors]:
        """Give all that the decisions to come, and the record of the last one, depend on.

        All else follows from the configuration: random numbers are drawn by seed and coordinates alone.

        Raises
        ------
        RuntimeError
            No decision was made yet.
        """
        record = self._record()
        parts = {
            "population": state_of(self.population),
            "kept": self._snapshot.state(),
            "governor": self.governor.state(),
            "controller": self.controller.state(),
            "good": self._good._asdict(),
            "seen": self._seen._asdict(),
            **{name: _tensors(getattr(self, f"_{name}")) for name in _STRUCTURES},
            "lost": {"lost_R": self._lost_R},
            "record": record,
        }
        facts = EpisodeFacts(
            **self._identity, decision=self.decision, update=self.trainer.update, topology=topology_of(self.population)
        )
        return facts, {name: t for part, tensors in parts.items() for name, t in under(part, tensors).items()}

    def restore(self, facts: EpisodeFacts, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; this episode must be new, of the same configuration.

        Raises
        ------
        ValueError, KeyError
            The state is of something else.
        """
        found = facts.model_dump(include=set(self._identity))
        if found != self._identity:
            raise ValueError(f"its random numbers are those of {found}, not of {self._identity}")
        rebuild(self.population, facts.topology, below("population", saved))
        self._snapshot.put_back(below("kept", saved))
        self.governor.restore(below("governor", saved), facts.decision)
        self._set_rates()
        self.controller.restore(below("controller", saved))
        self._good, self._seen = (_Losses(**self._here(part, saved)) for part in ("good", "seen"))
        self._structure, self._acted = (
            Structure(**{name: tensor.numpy() for name, tensor in below(part, saved).items()}) for part in _STRUCTURES
        )
        self._lost_R = self._here("lost", saved)["lost_R"]
        self._restored = record = self._here("record", saved)
        self._action_RH, self._culled_RS = record["action_RH"], record["culled_RS"]
        self._last = Outcome(**{f.name: record[f"{f.name}_R"] for f in fields(Outcome)})
        self.trainer.update, self.decision = facts.update, facts.decision

    @property
    def _identity(self) -> dict[str, Any]:
        """What its random numbers are drawn by; see `EpisodeFacts`."""
        return {"seed": self.config.seed, "start_ids": tuple(self.contexts.start_id_R.tolist())}

    def _here(self, part: str, saved: Mapping[str, Tensor]) -> Tensors:
        """Give one part of a saved state on the device."""
        return {name: tensor.to(self.population.device) for name, tensor in below(part, saved).items()}

    def _record(self) -> Tensors:
        """The record of the last decision."""
        if self._restored is not None:
            return self._restored
        if self._action_RH is None or self._gates is None or self._last is None:
            raise RuntimeError("no decision was made yet: call advance() first")
        scores = self.controller.scores or self._no_scores
        told = _chosen(self._panic_R != int(Panic.NONE), self._measured, self._seen)
        return {
            "action_RH": self._action_RH,
            "legal_RO": self._legal_RO,
            "log_prob_RH": scores.log_prob_RH,
            "value_R": scores.value_R,
            **{f"{f.name}_R": getattr(self._last, f.name) for f in fields(Outcome)},
            **{f.name: getattr(self._gates, f.name) for f in fields(GateReport)},
            **told._asdict(),
            "panic_R": self._panic_R,
            "over_R": self.governor.retired_R,
            "skipped_R": self._skipped_R,
            "rate_share_R": self.governor.rate_share_R,
            "culled_RS": self._culled_RS,
            "harvested_RS": self._harvested_RS,
            **{f"slots.{name}": getattr(self.population.slots, name) for name in EMPTY_SLOT},
            **{f"reward.{name}": part_R for name, part_R in self.reward.items()},
        }


def _tensors(structure: Structure) -> Tensors:
    """Its arrays, by name."""
    return {name: torch.from_numpy(array) for name, array in vars(structure).items()}


def _chosen(first_R: Tensor, first: _Losses, second: _Losses) -> _Losses:
    """The first where the mask holds, the second elsewhere."""
    return _Losses(*(torch.where(first_R, one, other) for one, other in zip(first, second, strict=True)))
