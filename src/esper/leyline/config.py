"""Validated, frozen configuration: the one definition of every default."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from esper.leyline.actions import Blueprint, SiteKind
from esper.leyline.starts import MOST_ROUNDS

SMALLEST, LARGEST = 1e-12, 1e9
"""Hosts and policies compute in single precision: far beyond these, numbers or their products are 0 or infinite."""
MOST = 2**20
"""Larger than any count that makes sense, and small enough for whatever is counted with it."""
LONGEST_LESSON = 2**12
"""Decisions of an episode that a policy learns from: random numbers of rounds to come are apart, and credit is a
matrix of decisions by decisions."""
MOST_DECISIONS_OF_ROUND = 2**22
"""A training round is kept in memory, somewhat less than a kilobyte for each decision of each host."""
MOST_VALUES = 64
"""Values of one setting of the contexts."""

Positive = Annotated[int, Field(ge=1, le=MOST)]
Rate = Annotated[float, Field(ge=SMALLEST, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HostConfig(Frozen):
    """A chain of segments with a site after each but the last, which is the classifying head."""

    kind: SiteKind
    """What flows through the host: vector (MLP), signal (1-D convolutions), image (2-D convolutions)."""
    widths: tuple[Positive, ...] = Field(min_length=1)
    """Width of each segment before the head."""
    depth: Positive = 1
    """Layers in each segment."""
    kernel: Annotated[int, Field(ge=1, le=15)] = 3
    """Kernel size of the convolutions; odd, so that they keep the extent."""
    norm: Literal["none", "group", "batch", "layer"] = "none"
    """Normalisation behind each layer (layer: vectors only; group: one group)."""
    activation: Literal["relu", "none"] = "relu"
    """Behind each layer; without one the host is linear, whatever its depth."""
    pooling: Literal["none", "average", "max"] = "none"
    """Halves the extent at the start of each segment after the first."""

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("an odd kernel is needed, so that a convolution keeps the extent")
        return kernel

    def scaled(self, width: float) -> Self:
        """The same with every segment so many times as wide, at least 1."""
        return self.model_copy(update={"widths": tuple(max(1, round(width * w)) for w in self.widths)})


class OptimizerConfig(Frozen):
    """Row-wise optimizer: every row and every seed has its own steps, state and clipping."""

    method: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of hosts and seeds."""
    learning_rate: Rate = 0.005
    """Peak learning rate."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the run's updates in which the rate rises linearly from 0."""
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the peak rate at the run's own last update, reached along a cosine."""
    weight_decay: NonNegative = 0.01
    """Weight decay of matrices and kernels, as in torch.optim: decoupled in AdamW, added to the gradient in SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD, or beta1 of AdamW."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Second beta of AdamW."""
    epsilon: Rate = 1e-8
    """Added to AdamW's denominator."""
    clip_norm: Rate = 1.0
    """Largest norm of the gradient of one host or one seed."""


class GateConfig(Frozen):
    """Limits of the gates."""

    min_training_decisions: Positive = 3
    """G2: decisions in TRAINING."""
    min_incubator_gain: Finite = 0.0
    """G2: incubator gain above this (nats),"""
    incubator_gain_errors: Finite = -2.0
    """plus so many of its standard errors: only a seed that clearly harms is kept back (docs/decisions/0016)."""
    min_gradient_ratio: NonNegative = 1e-3
    """G2: a gradient not above this, relative to the host's, is vanishing."""
    max_gradient_ratio: Rate = 1e3
    """G2: a gradient not below this, relative to the host's, is exploding."""
    min_probation_decisions: Positive = 3
    """G5: decisions in PROBATIONARY."""
    min_contribution: Finite = 0.0
    """G5: contribution above this (nats),"""
    contribution_errors: Finite = 2.0
    """plus so many of its standard errors: the test is repeated at every decision, and would pass noise."""

    @model_validator(mode="after")
    def _passable(self) -> Self:
        if self.min_gradient_ratio >= self.max_gradient_ratio:
            raise ValueError("min_gradient_ratio must be below max_gradient_ratio, or no seed can ever pass")
        return self


class GrowthConfig(Frozen):
    """Rules of the lifecycle."""

    gates: GateConfig = GateConfig()
    embargo: Positive = 5
    """Decisions that a slot stays EMBARGOED after a cull."""
    incubator: Literal["shadow", "straight-through"] = "shadow"
    """How a seed in TRAINING learns: docs/decisions/0003."""


class GovernorConfig(Frozen):
    """When a host is rolled back, and how it goes on.

    Losses are those on reward-validation, in units of the loss of guessing: ln(classes).
    """

    governor_window: Annotated[int, Field(ge=3, le=99)] = 5
    """Decisions whose losses are a host's history, an odd number; before the first they count as guessing."""
    diverged_guesses: Rate = 1.0
    """A host has diverged where its loss, in training too, is further above the median of its history than this,"""
    diverged_deviations: NonNegative = 6.0
    """and further than so many median absolute deviations of its history;"""
    diverged_at_once: Annotated[float, Field(ge=1, le=1e9)] = 10.0
    """or where it is so many times as far above, whatever it is in training."""
    learned_guesses: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """A host has learned something once the median of its history was below this."""
    collapsed_guesses: Rate = 0.95
    """It is back at chance where its loss is above this,"""
    collapsed_accuracy: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """and its accuracy has come no further than this share of the way from guessing to perfect,"""
    collapsed_decisions: Positive = 3
    """in so many decisions in a row."""
    most_skipped_updates: Positive = 64
    """A host has failed where it skipped so many updates more than it made: their gradients were not finite."""
    recovery_rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Growing one network, the learning rate of a host that failed is multiplied by this when it is restored,"""
    recovery_decisions: Positive = 10
    """until so many decisions have passed without a failure."""
    most_restorations: Annotated[int, Field(ge=0, le=99)] = 5
    """A host that fails once more before it has recovered from so many restorations is given up."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.governor_window % 2 == 0:
            raise ValueError("governor_window must be odd, so that one loss stands in the middle")
        if self.learned_guesses >= self.collapsed_guesses:
            raise ValueError("learned_guesses must be below collapsed_guesses, or what was learned counts as collapsed")
        return self


class TrainingConfig(Frozen):
    """Length and pace of an episode."""

    horizon: Positive = 60
    """Decisions of an episode. A seed that is not committed by the last one is not in the network."""
    updates_per_decision: Annotated[int, Field(ge=1, le=2**12)] = 20
    """Optimizer steps between two decisions."""
    batch_size: Annotated[int, Field(ge=2, le=2**12)] = 32
    """Examples in a minibatch of one row; two at least, for a batch norm compares them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the passes of an update compute in. Norms, losses, gradients, parameters and all that is measured stay
    float32."""


class PolicyConfig(Frozen):
    """Size of the policy network."""

    width: Annotated[int, Field(ge=4, le=1024, multiple_of=4)] = 48
    """Width of a token."""
    attention_heads: Literal[1, 2, 4] = 4
    """Heads of the attention over tokens; each is width / heads wide."""
    layers: Annotated[int, Field(ge=1, le=32)] = 1
    """Encoder layers."""
    hidden: Annotated[int, Field(ge=1, le=4096)] = 96
    """Width of the memory over decisions."""


class ContextConfig(Frozen):
    """What the hosts of a training round differ in; every combination is as likely."""

    prices: tuple[NonNegative, ...] = Field(default=(0.0, 0.02, 0.05, 0.1), min_length=1, max_length=MOST_VALUES)
    """Prices of added parameters (nats for each unit of ln(1 + added / host parameters)); the policy sees its own."""
    learning_rates: tuple[Rate, ...] = Field(default=(0.002, 0.005, 0.01), min_length=1, max_length=MOST_VALUES)
    """Peak learning rates of hosts and seeds."""
    label_noise: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        default=(0.0, 0.2), min_length=1, max_length=MOST_VALUES
    )
    """Shares of training labels that are wrong."""
    host_widths: tuple[Annotated[float, Field(gt=0, le=64)], ...] = Field(
        default=(1.0,), min_length=1, max_length=MOST_VALUES
    )
    """Widths of the hosts, as multiples of the task's; each is a population of its own."""
    other_tasks: tuple[str, ...] = Field(default=(), max_length=MOST_VALUES)
    """Tasks whose hosts, with the same kinds of sites, are among the contexts as well."""

    @property
    def hosts(self) -> int:
        """Hosts of different tasks and widths."""
        return (1 + len(self.other_tasks)) * len(self.host_widths)

    @property
    def twins(self) -> int:
        """Number of combinations of all but the price."""
        return len(self.learning_rates) * len(self.label_noise) * self.hosts

    @property
    def combinations(self) -> int:
        """Number of all contexts."""
        return self.twins * len(self.prices)


class ObjectiveConfig(Frozen):
    """What growth is paid for."""

    preset: Literal[
        "paired", "shaped", "simplified", "basic", "drip", "escrow", "attribution", "sparse", "minimal", "loss"
    ] = "paired"
    """Terms of the reward; paired: lead over the twin less rent, as it changes."""
    utility: Literal["loss", "accuracy"] = "loss"
    """Measured on reward-validation: minus the loss (nats), or the accuracy (share)."""
    shaping_weight: NonNegative = 0.02
    """Worth of one committed seed's potential, where shaping is used."""
    shaping_gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of the potential: must be the learner's."""
    attribution_steepness: NonNegative = 10.0
    """How fast contributions are believed as the host gets ahead of its twin (1 / nats)."""
    escrow_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a contribution that is credited before the seed is committed."""
    intervention_charge: NonNegative = 0.001
    """Charge for each thing asked for, where interventions are charged."""
    rollback_penalty: NonNegative = 0.3
    """What a rollback costs, in the unit of the utility, whatever else is paid for."""


class PPOConfig(Frozen):
    """How a policy learns from a round: proximal policy optimization (Schulman et al. 2017)."""

    policy_rate: Rate = 1e-3
    """Learning rate of the policy in the first round."""
    policy_final_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of that rate in the last round, reached linearly."""
    epochs: Positive = 4
    """Passes over a round."""
    minibatches: Positive = 4
    """Parts into which the hosts of a round are dealt for each pass; a host's whole episode stays together."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far the probability of an action may move before it is no longer rewarded (share)."""
    ratio: Literal["joint", "per-head"] = "joint"
    """Whether the heads of one action are clipped together or each for itself."""
    target_kl: Rate = 0.05
    """KL divergence (nats, heads summed) from which on the rest of a round's steps is left out."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of one decision."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.97
    """How far an advantage looks beyond the next value."""
    advantage: Literal["gae", "group"] = "gae"
    """What an action is compared with: the critic, or the other hosts with the same start."""
    entropy_weight: NonNegative = 0.2
    """Weight, in the first round, of choosing as freely as a new policy: the entropy, 1 for a uniform choice, averaged
    over heads that had a choice, less the distance of the operation from what a new policy would do."""
    entropy_final_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of that weight in the last round, reached linearly: first look at everything, then decide."""
    uniform_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of a uniform choice over what is valid, mixed into every head while the first round is collected; falls
    linearly to 0 in the last round. A policy that is evaluated or used never has it."""
    value_weight: NonNegative = 0.5
    """Weight of the squared error of the critic, in standard deviations."""
    policy_clip_norm: Rate = 0.5
    """Largest norm of the gradient of the policy network."""
    record_layers: bool = False
    """Record gradients and activations of every layer of the policy network with each update."""


class RecordConfig(Frozen):
    """What is written down while a run goes on; no number of the run depends on it."""

    record: Literal["off", "lean", "full"] = "full"
    """How much goes into the run's store: off nothing, lean everything but single decisions, full everything."""
    record_error: Literal["stop", "continue"] = "stop"
    """What to do if the store cannot be written any more: stop the run, or continue without."""


class PopulationConfig(Frozen):
    """What decides the numbers of hosts that train and grow, and what is recorded of it."""

    task: str = "digits"
    """Task to learn: see `esper tasks`."""
    host: Literal["impaired", "ample"] = "impaired"
    """Host to start from: impaired has clear room to grow, ample has little."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random stream of the run."""
    blueprints: tuple[str, ...] = tuple(b.name.lower() for b in Blueprint if b is not Blueprint.NOOP)
    """Blueprints that may be germinated, of those that fit the host."""
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    growth: GrowthConfig = GrowthConfig()
    governor: GovernorConfig = GovernorConfig()
    recording: RecordConfig = RecordConfig()
    device: str = "cpu"
    """Device of the tensors: cpu or cuda."""

    @field_validator("blueprints")
    @classmethod
    def _known_blueprints(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [b.name.lower() for b in Blueprint if b is not Blueprint.NOOP]
        for name in names:
            if name not in known:
                raise ValueError(f"unknown blueprint {name!r}; known: {', '.join(known)}")
        return names

    def allowed_blueprints(self) -> frozenset[Blueprint]:
        """Give `blueprints` as values of the enumeration."""
        return frozenset(Blueprint[name.upper()] for name in self.blueprints)


class RunConfig(PopulationConfig):
    """One `esper grow` run."""

    controller: str = "heuristic"
    """Who decides: never, random, periodic, heuristic, or a saved policy (policy:FOLDER draws, greedy:FOLDER not)."""
    price: NonNegative = 0.0
    """What added parameters cost (nats for each unit of ln(1 + added / host parameters)): the dial of a policy."""


class TrainConfig(PopulationConfig):
    """One `esper train` run."""

    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 100
    """Rounds: one episode of every host, then one update of the policy."""
    rows: Annotated[int, Field(ge=2, le=2**13)] = 64
    """Hosts that train at once."""
    group_size: Annotated[int, Field(ge=2, le=2**13)] = 8
    """Hosts that share a start and a context; the first of them is the twin that never grows."""
    price_warmup: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the rounds in which prices rise from 0: first learn to grow, then to economise."""
    select_every: Positive = 10
    """Rounds between two evaluations on the selection split, greedy; the best policy is kept."""
    selection_starts: Annotated[int, Field(ge=1, le=2**12)] = 2
    """Starts of such an evaluation, each with one host in every context; the same whatever the seed."""
    judgement_starts: Annotated[int, Field(ge=1, le=2**12)] = 8
    """The same of the final evaluation on the test split; these starts are used for nothing else."""
    contexts: ContextConfig = ContextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    ppo: PPOConfig = PPOConfig()
    policy: PolicyConfig = PolicyConfig()

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.rows % self.group_size:
            raise ValueError(f"rows must be a multiple of group_size; got {self.rows} and {self.group_size}")
        if self.groups % self.contexts.hosts:
            raise ValueError(
                f"each of {self.contexts.hosts} hosts (task and other_tasks, in all host_widths) needs as many groups; "
                f"{self.rows} rows are {self.groups} groups of {self.group_size}"
            )
        if self.training.horizon > LONGEST_LESSON:
            raise ValueError(
                f"horizon must not exceed {LONGEST_LESSON:,} to train a policy; got {self.training.horizon}"
            )
        if self.rows * self.training.horizon > MOST_DECISIONS_OF_ROUND:
            raise ValueError(
                f"rows times horizon must not exceed {MOST_DECISIONS_OF_ROUND:,}, for a round is kept in memory; "
                f"got {self.rows} and {self.training.horizon}"
            )
        for name in ("selection_starts", "judgement_starts"):
            hosts = getattr(self, name) * (self.contexts.combinations + self.contexts.twins)
            if hosts * self.training.horizon > MOST_DECISIONS_OF_ROUND:
                raise ValueError(
                    f"{name}: an evaluation in every context would be {hosts:,} hosts of {self.training.horizon} "
                    f"decisions, and hosts times decisions must not exceed {MOST_DECISIONS_OF_ROUND:,}; "
                    "take fewer starts, prices, learning_rates, label_noise, host_widths or other_tasks, "
                    "or a shorter horizon"
                )
        return self

    @property
    def groups(self) -> int:
        """Groups of a round."""
        return self.rows // self.group_size


class HeadroomConfig(PopulationConfig):
    """One `esper exam headroom` run."""

    contexts: ContextConfig = ContextConfig()
    episodes: Annotated[int, Field(ge=1, le=2**24)] = 6400
    """Episodes that the search for the best plans may take; by default as many as `esper train` does."""
    starts: Annotated[int, Field(ge=2, le=2**12)] = 24
    """Fresh starts (initialisation, data order, wrong labels) on which the plans that were chosen are scored."""
    plans_of: tuple[str, ...] = ()
    """Folders of `esper train` and `esper exam headroom`: what policies do most often, and what was found there, is
    tried as well."""
    recording: RecordConfig = RecordConfig(record="off")


class CompareConfig(PopulationConfig):
    """One `esper exam compare` run: population and contexts are those of the search that it compares with."""

    contexts: ContextConfig = ContextConfig()
    headroom: str
    """Folder of `esper exam headroom`, whose plans are compared with."""
    policies: tuple[str, ...] = ()
    """Folders of `esper train` runs; without one only the other arms are played."""
    starts: Annotated[int, Field(ge=2, le=2**12)] = 24
    """Starts (initialisation, data order, wrong labels) that every arm plays in every context."""
    first_start: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Number of the first of them: a later comparison can take starts at which nobody has looked."""
    recording: RecordConfig = RecordConfig(record="lean")


class TaskConfig(Frozen):
    """A data set with an ample and an impaired host."""

    name: str
    summary: str
    dataset: Literal["digits", "mnist1d"]
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Decides which examples go to which split."""
    impaired: HostConfig
    ample: HostConfig

    def host_config(self, which: Literal["impaired", "ample"]) -> HostConfig:
        """Host by name."""
        return self.impaired if which == "impaired" else self.ample


RUN_FOLDER = Path("runs")
"""Where runs go unless told otherwise."""
CONFIG = "config.json"
"""Name of the configuration in the folder of a run."""
