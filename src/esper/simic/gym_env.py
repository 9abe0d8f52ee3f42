"""Growth as a problem of gymnasium: the rows of a population as a vector environment, or one host by itself.

The only module that needs gymnasium, which comes with the extra `gym`.

Shapes: N rows, S slots, F features, H heads, O operations, C choices.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.leyline.actions import Head, head_sizes
from esper.leyline.checks import Check
from esper.leyline.config import ContextConfig, ObjectiveConfig, RunConfig, TrainingConfig
from esper.leyline.errors import EsperError
from esper.leyline.starts import MOST_ROUNDS
from esper.leyline.transfer import Parcel, deliver
from esper.simic.environment import GrowthEnvironment, Payment, Situation
from esper.tamiyo.policy.action_masks import ActionMasks
from esper.tamiyo.policy.features import RUN_FEATURES, RUNNING_FEATURES, SLOT_FEATURES, Feature
from esper.tolaria.tasks import load_task

try:
    import gymnasium
    from gymnasium.error import InvalidAction, ResetNeeded
    from gymnasium.spaces import Box, Dict, MultiDiscrete
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise EsperError("gymnasium is needed for esper.simic.gym_env; run: pip install 'esper-grow[gym]'") from error

Observed = dict[str, NDArray[np.float32]]
Info = dict[str, Any]

LIMIT = 10.0
"""What has no bounds of its own is clipped to plus and minus this."""
MOST_SEEDS = 2**63
"""Seeds are those of a run: smaller than this."""


class GrowthVectorEnv(VectorEnv[Observed, NDArray[np.int64], NDArray[Any]]):
    """Every row of a growth environment as one environment of a vector.

    Observations are float32: `slots` [N, S, F] and `run` [N, F], with the columns of `docs/observation.md`. The running
    features of `run` are raw, 0 where not measured (a flag of their own says so); everything is clipped to the bounds
    of the space. An action has one choice for each of the eight heads. What is impossible in the present state is
    refused and changes nothing.

    All rows begin and end together, and an end is a termination: nothing comes after the horizon, so that nothing is
    truncated. Autoreset is `NEXT_STEP`: the step after the last ignores its actions, begins the next episode and pays
    0. Between the two the grown population is still there, in `environment.episode`, without the seeds that were not
    committed: the last reward is paid for what is left. A row whose episode breaks off before (see `over`) cannot begin
    another one by itself: it waits for the others and is paid 0, and what it does there is to be left out of what is
    learned.

    Every info, also that of a reset, has the same arrays:

    `action_mask_op` bool [N, O], `action_mask_slot` bool [N, O, S]
        Operations that are possible; slots that each of them may name (for WAIT, which names none, slot 0).
    `action_mask_flat` bool [N, sum of the heads' choices]
        Choices of some possible action that uses the head, head after head: for a policy whose heads do not know of
        each other. It can express every possible action, and still combine choices to what is impossible.
    `accepted` bool [N], `refused_by` int64 [N]
        Whether the last action was performed, and the `Check` that refused it (0: none did).
    `parts_<term>` float32 [N]
        Terms of the objective, which sum to the reward.
    `over` bool [N]
        The row's episode broke off with this step or earlier, because the governor rolled the row back, or its twin.
    `twin` bool [N]
        Rows that never grow, whatever their actions: what the others of their group are compared with.
    `episode_number` int64 [N]
        Number of the episode among those of its seed, the same for every row.

    Parameters
    ----------
    environment
        What to play in: it and the number of an episode decide everything that is drawn.

    Examples
    --------
    >>> env = GrowthVectorEnv(growth_environment("digits-mlp", groups=2, size=3, horizon=4))
    >>> observation, info = env.reset(seed=1)
    >>> info["twin"].tolist()
    [True, False, False, True, False, False]
    >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    """

    def __init__(self, environment: GrowthEnvironment) -> None:
        self.environment = environment
        self.num_envs = environment.rows
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
        self._boxes = {"slots": _box(SLOT_FEATURES, environment.slots), "run": _box(RUN_FEATURES)}
        self.single_observation_space = Dict([*self._boxes.items()])
        self.single_action_space = MultiDiscrete([*head_sizes(environment.slots).values()])
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.number = -1
        self._begun = self._over = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observed, Info]:
        """Begin an episode.

        Parameters
        ----------
        seed
            Begin with episode 0 of a run with this seed: no two seeds share a start, and none reaches those that are
            reserved for evaluations. Without one, the episode after the present one begins.
        options
            `{"episode": number}` begins this one instead.

        Raises
        ------
        ValueError
            No seed, or no number of an episode, or this was the last of the seed.
        EsperError
            An unknown option.
        """
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < MOST_SEEDS):
            raise ValueError(f"reset: seed must be an integer from 0 to {MOST_SEEDS - 1}, got {seed!r}")
        options = dict(options or {})
        number = options.pop("episode", self.number + 1 if seed is None else 0)
        if options:
            raise EsperError(f"reset: unknown option {min(options)!r}; known: episode")
        _check_number(number)
        super().reset(seed=seed)
        if seed is not None:
            self.environment.reseed(seed)
        observation, _, info = self._report(self._begin(int(number)), None)
        return observation, info

    def _begin(self, number: int) -> Situation:
        self.number, self._begun, self._over = number, True, False
        return self.environment.reset(number)

    def step(self, actions: NDArray[np.int64]) -> tuple[Observed, NDArray[Any], NDArray[Any], NDArray[Any], Info]:
        """Perform one decision for each row, or begin the next episode if the last one is over.

        Parameters
        ----------
        actions
            Integers [N, H].

        Raises
        ------
        gymnasium.error.ResetNeeded
            No episode was begun.
        gymnasium.error.InvalidAction
            The actions are not in the action space.
        ValueError
            The last episode of the seed is over.
        """
        if not self._begun:
            raise ResetNeeded("call reset() before step()")
        payment = None
        if self._over:
            _check_number(self.number + 1)
            situation = self._begin(self.number + 1)
        else:
            payment = self.environment.step(self._checked(actions))
            situation = self.environment.situation()
        self._over = payment is not None and payment.done
        observation, reward, info = self._report(situation, payment)
        return observation, reward, np.full(self.num_envs, self._over), np.zeros(self.num_envs, dtype=np.bool_), info

    def _checked(self, actions: NDArray[np.int64]) -> Tensor:
        given = _array(actions)
        if not (np.issubdtype(given.dtype, np.integer) and self.action_space.contains(given)):
            wanted, got = f"[{self.num_envs}, {len(Head)}] in {self.single_action_space}", list(given.shape)
            raise InvalidAction(f"actions must be integers {wanted}; got {given.dtype} {got}")
        return torch.from_numpy(given.astype(np.int64)).to(self.environment.contexts.grows_R.device)

    def _report(self, situation: Situation, payment: Payment | None) -> tuple[Observed, NDArray[np.float32], Info]:
        """Observation, reward and info as arrays, brought to the host in one transfer."""
        environment, masks = self.environment, situation.masks
        last, grows_N = environment.episode.view().last, environment.contexts.grows_R
        nothing_N = torch.zeros(self.num_envs, device=grows_N.device)
        parts = dict.fromkeys(environment.objective.parts, nothing_N) if payment is None else payment.parts
        tensors = {
            "slots": situation.observation.slot_RSF,
            "run": situation.observation.run_RF,
            "reward": nothing_N if payment is None else payment.reward_R,
            "action_mask_op": masks.op_RO,
            "action_mask_slot": masks.slot_ROS,
            "action_mask_flat": marginal_masks(masks),
            "accepted": torch.ones_like(grows_N) if last is None else last.accepted,
            "refused_by": torch.full_like(grows_N, Check.NONE, dtype=torch.int64) if last is None else last.refused_by,
            **{f"parts_{name}": part_N for name, part_N in parts.items()},
            "over": torch.zeros_like(grows_N) if payment is None else payment.over_R,
            "twin": ~grows_N,
            "episode_number": torch.full_like(grows_N, self.number, dtype=torch.int64),
        }
        (info,) = deliver(Parcel.pack(tensors))
        raw = ((name, np.nan_to_num(info.pop(name)), box) for name, box in self._boxes.items())
        return {name: np.clip(values, box.low, box.high) for name, values, box in raw}, info.pop("reward"), info


class GrowthEnv(gymnasium.Env[Observed, NDArray[np.int64]]):
    """One host that grows, compared with a twin that never does and is not shown.

    Spaces and infos are those of one row of `GrowthVectorEnv` (without `twin`), but an episode that breaks off
    terminates at once; `action_masks` is what sb3-contrib asks for. Environments that learn side by side need
    different seeds.

    Parameters
    ----------
    environment
        Of one group of two; anything else is an `EsperError`.

    Examples
    --------
    >>> env = GrowthEnv(growth_environment("digits-mlp", horizon=4))
    >>> observation, info = env.reset(seed=1)
    >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    """

    def __init__(self, environment: GrowthEnvironment) -> None:
        self._pair = GrowthVectorEnv(environment)
        self._mask: NDArray[np.bool_] | None = None
        self._over = False
        if self._pair.num_envs != 2:
            raise EsperError(f"GrowthEnv: needs an environment of one group of 2, got {self._pair.num_envs} rows")
        self.metadata = {"render_modes": []}
        self.observation_space = self._pair.single_observation_space
        self.action_space = self._pair.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observed, Info]:
        """Begin an episode; see `GrowthVectorEnv.reset`."""
        super().reset(seed=seed)
        observation, info = self._pair.reset(seed=seed, options=options)
        self._over = False
        return self._grower(observation, info)

    def step(self, action: NDArray[np.int64]) -> tuple[Observed, float, bool, bool, Info]:
        """Perform one decision; see `GrowthVectorEnv.step`. After the last one only `reset` is possible."""
        if self._over:
            raise ResetNeeded("the episode is over: call reset()")
        given = _array(action)
        # The twin waits, which is all zeros.
        observation, reward, terminated, truncated, info = self._pair.step(np.stack((np.zeros_like(given), given)))
        seen, told = self._grower(observation, info)
        self._over = bool(terminated[1]) or told["over"]
        return seen, float(reward[1]), self._over, bool(truncated[1]), told

    def action_masks(self) -> NDArray[np.bool_]:
        """Bool [sum of the heads' choices]: `action_mask_flat` of the present state."""
        if self._mask is None:
            raise ResetNeeded("call reset() before action_masks()")
        return self._mask.copy()

    def _grower(self, observation: Observed, info: Info) -> tuple[Observed, Info]:
        """What concerns the second row: scalars as numbers of Python, which vector environments know how to batch."""
        info.pop("twin")
        told = {name: array[1] if array.ndim > 1 else array[1].item() for name, array in info.items()}
        self._mask = told["action_mask_flat"].copy()
        return {name: array[1] for name, array in observation.items()}, told


def marginal_masks(masks: ActionMasks) -> Tensor:
    """Bool [N, sum of the heads' choices]: see `GrowthVectorEnv`; 0 alone in a head that no possible action uses."""
    of_rows, (rows, ops, slots) = (masks.op_RO, masks.slot_ROS, masks.gradual_RS), masks.slot_ROS.shape
    # Every pair of operation and slot as a row of its own.
    pairs, device = ops * slots, masks.op_RO.device
    op_PO, slot_POS, gradual_PS = (mask.repeat_interleave(pairs, 0) for mask in of_rows)
    every = ActionMasks(op_PO, slot_POS, gradual_PS, masks.fits_SB, masks.heads_OHC)
    op = torch.arange(ops, device=device).repeat_interleave(slots).repeat(rows)
    slot = torch.arange(slots, device=device).repeat(rows * ops)
    # Where an operation does not use a head, its choice is 0 and means nothing.
    used_OH = masks.heads_OHC[:, :, 1:].any(2)
    chosen = every.chosen(op, slot) & masks.slot_ROS.reshape(-1, 1, 1) & used_OH[op][:, :, None]
    mask_NHC = chosen.view(rows, pairs, *chosen.shape[1:]).any(1)
    mask_NHC[:, :, 0] |= ~mask_NHC.any(2)
    return torch.cat([mask_NHC[:, head, :size] for head, size in head_sizes(slots).items()], 1)


def growth_environment(
    task: str,
    host: Literal["impaired", "ample"] = "impaired",
    *,
    groups: int = 1,
    size: int = 2,
    seed: int = 0,
    device: str = "cpu",
    **training: int,
) -> GrowthEnvironment:
    """Make what both environments are made of; everything that is not named here has its default.

    Parameters
    ----------
    task, host
        Names of the task (see `esper tasks`) and of its host.
    groups, size
        Groups, and rows of each, the first of which is the twin of the others.
    seed, device
        Of the run: with another seed, also one given to `reset`, every episode is another.
    training
        Fields of `TrainingConfig`: horizon, updates_per_decision, batch_size.
    """
    config = RunConfig(task=task, host=host, seed=seed, device=device, training=TrainingConfig.model_validate(training))
    return GrowthEnvironment(
        config, load_task(task, host, device), ContextConfig(), ObjectiveConfig(), groups=groups, size=size
    )


def _check_number(number: object) -> None:
    """Refuse what is no number of an episode."""
    if not (isinstance(number, int | np.integer) and 0 <= number < MOST_ROUNDS):
        asked = f"reset: episode must be an integer from 0 to {MOST_ROUNDS - 1}, got {number!r}"
        raise ValueError(f"{asked}; another seed has others")


def _array(actions: object) -> NDArray[Any]:
    """Give actions as an array; one of rows of several lengths is none, and in no space."""
    try:
        return np.asarray(actions)
    except ValueError:
        return np.array(None)


def _box(features: tuple[Feature, ...], slots: int | None = None) -> Box[np.float32]:
    """Space of one token, or of one for each slot."""
    bounds = [(-LIMIT, LIMIT) if f in RUNNING_FEATURES else (max(f.low, -LIMIT), min(f.high, LIMIT)) for f in features]
    low, high = np.tile(np.array(bounds, dtype=np.float32).T[:, None], (1, slots or 1, 1))
    return Box(low, high, dtype=np.float32) if slots else Box(low[0], high[0], dtype=np.float32)
