"""Collecting experience: the policy acts in every environment at once, and what it saw, did and said is kept.

Shapes: T steps, N environments, D observation, M mask, A outputs of the actor, H action heads, Q critics, K outputs of a
critic, S parts of the memory's state, C towers, W its width.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphogen.rl.assembly import Assembly
from morphogen.rl.vector import Step

EPISODES_AVERAGED = 100
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Rows of experience; those where ``valid_TN`` is False hold nothing and must not be looked at.

    Attributes:
        observation_TND: As the policy saw them, normalised.
        mask_TNM: Allowed actions, or None.
        action_TN: Actions as the distribution drew them; trailing dimensions are the action's.
        log_prob_TNH: Their log-probabilities at that moment, by head.
        actor_TNA: The actor's outputs.
        critic_QTNK: The critics' outputs for each row's state.
        next_critic_QTNK: Those for the state it led to: of the true final observation where an episode was truncated.
        reward_TN: Rewards, normalised.
        terminated_TN: The state a row led to is terminal: its value is 0.
        continues_TN: The next row of that environment goes on with the same episode.
        start_TN: The row is the first of an episode.
        valid_TN: The row is experience, not the filler of a vector environment that resets in the next step.
        state_TSCNW: The memory's state before each row, or None without memory.
    """

    observation_TND: Tensor
    mask_TNM: Tensor | None
    action_TN: Tensor
    log_prob_TNH: Tensor
    actor_TNA: Tensor
    critic_QTNK: Tensor
    next_critic_QTNK: Tensor
    reward_TN: NDArray[np.float32]
    terminated_TN: NDArray[np.bool_]
    continues_TN: NDArray[np.bool_]
    start_TN: NDArray[np.bool_]
    valid_TN: NDArray[np.bool_]
    state_TSCNW: Tensor | None

    @property
    def num_valid(self) -> int:
        """How many rows are experience."""
        return int(self.valid_TN.sum())


@dataclasses.dataclass(frozen=True)
class _Truncation:
    """Episodes cut off in one step: where, what was seen last, and what the memory held then."""

    step: int
    envs: NDArray[np.intp]
    observation_ND: NDArray[np.float32]
    state_SCNW: Tensor | None


class Collector:
    """Where the agent is in its environments; goes on where the last rollout ended.

    Its state stays with the run: another run that takes over the weights keeps its own environments.

    Args:
        parts: The environments, the policy, and the normalisers, which are updated here.
    """

    belongs_to_run = True

    def __init__(self, parts: Assembly) -> None:
        """Touch no environment yet."""
        self._stepper, self._policy, self._distribution = parts.stepper, parts.policy, parts.policy.distribution
        self._observations, self._rewards = parts.observation_normalizer, parts.reward_normalizer
        self._generator, self._seed = parts.streams.acting, parts.streams.environments
        self._device = next(parts.policy.parameters()).device
        self._now: Step | None = None
        self._state_SCNW = parts.policy.initial_state(parts.stepper.num_envs)
        self.recent_returns: collections.deque[float] = collections.deque(maxlen=EPISODES_AVERAGED)
        self.recent_lengths: collections.deque[int] = collections.deque(maxlen=EPISODES_AVERAGED)
        self.num_episodes = 0

    @property
    def memory_state(self) -> Tensor | None:
        """The memory's state before the next step, [S, C, num_envs, W]; None without memory. Live: do not change it."""
        return self._state_SCNW

    def forget(self) -> None:
        """Reset the memory's state: that of other weights means nothing to new ones."""
        self._state_SCNW = self._policy.initial_state(self._stepper.num_envs)

    def reseed(self, seed: int) -> None:
        """Leave the episodes under way; new ones begin with the next rollout, from ``seed``, and recent ones are forgotten."""
        self._now, self._seed = None, seed % 2**31
        self.forget()
        self.recent_returns.clear()
        self.recent_lengths.clear()
        self.num_episodes = 0
        if self._rewards is not None:
            self._rewards.begin_anew()

    @torch.no_grad()
    def collect(self, steps: int, gamma: float) -> Rollout:
        """Act for ``steps`` steps of every environment; ``gamma`` is the reward normaliser's discount.

        Raises:
            EnvironmentFault: An environment failed; what was learned so far is whole.
        """
        now = self._started()
        noise = self._distribution.noise((steps, self._stepper.num_envs), self._generator).to(self._device)
        rows, given, states, cut = list[tuple[Tensor, ...]](), list[Step](), list[Tensor](), list[_Truncation]()
        critics = list[Tensor]()
        starts, masks = list[NDArray[np.bool_]](), list[NDArray[np.bool_]]()
        for index in range(steps):
            observation, mask = self._seen(now.observation_ND), None
            if now.mask_NM is not None:
                masks.append(now.mask_NM)
                mask = torch.from_numpy(now.mask_NM).to(self._device)
            starts.append(now.start_N)
            actor_NA = self._act(observation, now.start_N, states, critics)
            actions = self._distribution.draw(actor_NA, noise[index], mask)
            rows.append((observation, actions, actor_NA))
            now = self._stepper.step(self._distribution.to_env(actions))
            given.append(self._received(now, gamma))
            cut += self._truncated(index, now)
        self._now = now
        observation_TND, action_TN, actor_TNA = (torch.stack(column) for column in zip(*rows, strict=True))
        critic_QTNK = torch.stack(critics, dim=1) if critics else self._all_critics(observation_TND)
        mask_TNM = torch.from_numpy(np.stack(masks)).to(self._device) if masks else None
        ended_TN = np.stack([step.terminated_N | step.truncated_N for step in given])
        valid_TN = np.stack([step.valid_N for step in given])
        return Rollout(
            observation_TND=observation_TND,
            mask_TNM=mask_TNM,
            action_TN=action_TN,
            log_prob_TNH=self._log_prob(actor_TNA, action_TN, mask_TNM),
            actor_TNA=actor_TNA,
            critic_QTNK=critic_QTNK,
            next_critic_QTNK=self._next_critic(critic_QTNK, now, cut),
            reward_TN=np.stack([step.reward_N for step in given]),
            terminated_TN=np.stack([step.terminated_N for step in given]),
            continues_TN=valid_TN & ~ended_TN,
            start_TN=np.stack(starts),
            valid_TN=valid_TN,
            state_TSCNW=torch.stack(states) if states else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return environments, memory and recent episodes; nothing before the first rollout."""
        if self._now is None:
            return {"started": False, "seed": self._seed}
        return {
            "started": True,
            "environments": self._stepper.state_dict(),
            "memory": None if self._state_SCNW is None else self._state_SCNW.clone(),
            "recent_returns": list(self.recent_returns),
            "recent_lengths": list(self.recent_lengths),
            "num_episodes": self.num_episodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; where episodes under way cannot be taken up again, start new ones without memory of the old."""
        if not state["started"]:
            self._now, self._seed = None, state.get("seed", self._seed)
            self.forget()
            return
        self._now = self._stepper.load_state_dict(state["environments"])
        self.forget()
        if self._state_SCNW is not None and self._stepper.resumed != "fresh":
            self._state_SCNW.copy_(state["memory"])
        self.recent_returns.clear()
        self.recent_returns.extend(state["recent_returns"])
        self.recent_lengths.clear()
        self.recent_lengths.extend(state["recent_lengths"])
        self.num_episodes = state["num_episodes"]

    # -- one step ---------------------------------------------------------------------------------------------------

    def _started(self) -> Step:
        if self._now is None:
            self._now = self._stepper.reset(self._seed)
            if self._observations is not None:
                self._observations.update(self._now.observation_ND)
        return self._now

    def _seen(self, observation_ND: NDArray[np.float32]) -> Tensor:
        if self._observations is not None:
            observation_ND = self._observations.normalize(observation_ND)
        return torch.from_numpy(observation_ND).to(self._device)

    def _act(self, observation_ND: Tensor, start_N: NDArray[np.bool_], states: list[Tensor], critics: list[Tensor]) -> Tensor:
        """Return the actor's outputs; with memory, note its state before and the critics' outputs as well.

        Without memory, critics wait until the rollout is over: one large batch costs less than many small ones.
        """
        if self._state_SCNW is None:
            return self._policy.act(observation_ND)
        if start_N.any():
            self._state_SCNW = self._state_SCNW.masked_fill(torch.from_numpy(start_N).to(self._device)[:, None], 0.0)
        states.append(self._state_SCNW)
        outputs, self._state_SCNW = self._policy(observation_ND[None], self._state_SCNW)
        critics.append(outputs.critic[:, 0])
        return outputs.actor[0]

    def _received(self, step: Step, gamma: float) -> Step:
        """Update the normalisers and the episode statistics; return the step with its rewards normalised."""
        for episode in step.episodes:
            self.recent_returns.append(episode.total_reward)
            self.recent_lengths.append(episode.length)
        self.num_episodes += len(step.episodes)
        ended_N = step.terminated_N | step.truncated_N
        if self._observations is not None:
            # The last observation of an episode is only ever looked at, never acted on.
            self._observations.update(step.observation_ND, _unless_all(step.start_N | (step.valid_N & ~ended_N)))
        if self._rewards is None:
            return step
        reward_N = self._rewards.update_and_normalize(step.reward_N, ended_N, gamma, _unless_all(step.valid_N))
        return dataclasses.replace(step, reward_N=reward_N)

    def _truncated(self, index: int, step: Step) -> Sequence[_Truncation]:
        envs = np.flatnonzero(step.truncated_N & ~step.terminated_N & step.valid_N)
        if not len(envs):
            return ()
        state_SCNW = None if self._state_SCNW is None else self._state_SCNW[:, :, envs]
        return (_Truncation(index, envs, self._final(step, envs), state_SCNW),)

    def _final(self, step: Step, envs: NDArray[np.intp]) -> NDArray[np.float32]:
        final_ND = step.final_ND[envs]
        return final_ND if self._observations is None else self._observations.normalize(final_ND)

    def _log_prob(self, actor_TNA: Tensor, action_TN: Tensor, mask_TNM: Tensor | None) -> Tensor:
        """Return the log-probabilities of all actions at once: by the same operations as the update will, so the ratio is 1."""
        mask_BM = None if mask_TNM is None else mask_TNM.flatten(0, 1)
        evaluation = self._distribution.evaluate(actor_TNA.flatten(0, 1), action_TN.flatten(0, 1), mask_BM)
        return evaluation.log_prob_BH.unflatten(0, actor_TNA.shape[:2])

    # -- what comes after -------------------------------------------------------------------------------------------

    def _next_critic(self, critic_QTNK: Tensor, last: Step, cut: list[_Truncation]) -> Tensor:
        last_QNK = self._critic(self._seen(last.observation_ND), self._state_SCNW)
        next_QTNK = torch.cat((critic_QTNK[:, 1:], last_QNK[:, None]), dim=1)
        if cut:
            observation = torch.from_numpy(np.concatenate([item.observation_ND for item in cut])).to(self._device)
            states = [item.state_SCNW for item in cut if item.state_SCNW is not None]
            final_QBK = self._critic(observation, torch.cat(states, dim=2) if states else None)
            steps = np.concatenate([np.full(len(item.envs), item.step) for item in cut])
            next_QTNK[:, steps, np.concatenate([item.envs for item in cut])] = final_QBK
        return next_QTNK

    def _all_critics(self, observation_TND: Tensor) -> Tensor:
        batches = observation_TND.flatten(0, 1).split(_ROWS_AT_ONCE)
        critic_QBK = torch.cat([self._critic(observation_BD, None) for observation_BD in batches], dim=1)
        return critic_QBK.unflatten(1, observation_TND.shape[:2])

    def _critic(self, observation_BD: Tensor, state_SCBW: Tensor | None) -> Tensor:
        """Return the critics' outputs [Q, B, K] for single steps, with the memory as it was carried there."""
        if state_SCBW is None:
            return self._policy(observation_BD)[0].critic
        return self._policy(observation_BD[None], state_SCBW)[0].critic[:, 0]


def _unless_all(rows_N: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return None if rows_N.all() else rows_N
