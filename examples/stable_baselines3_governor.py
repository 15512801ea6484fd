"""Stable-Baselines3: PPO on CartPole meets a reward of NaN and then damaged weights, with and without the governor.

Run: python examples/stable_baselines3_governor.py    (needs: pip install 'morphogen[stable-baselines3]')
"""

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from morphogen.integrations.stable_baselines3 import GovernorCallback
from morphogen.telemetry.events import Event

NAN_STEP, DAMAGED_STEP, STEPS = 4_000, 7_000, 18_000

torch.set_num_threads(1)


class SometimesNaN(gymnasium.RewardWrapper):
    """One reward of the run is NaN, as a division by zero in a simulator makes it."""

    steps = 0

    def reward(self, reward):
        self.steps += 1
        return np.nan if self.steps == NAN_STEP else reward


class Damage(BaseCallback):
    """All weights times ten, once, while a rollout is collected."""

    def _on_step(self) -> bool:
        if self.num_timesteps == DAMAGED_STEP:
            with torch.no_grad():
                for weight in self.model.policy.parameters():
                    weight *= 10
        return True


def return_after_training(*callbacks: BaseCallback, faulty: bool) -> str:
    env = gymnasium.make("CartPole-v1")
    env = Monitor(SometimesNaN(env) if faulty else env)
    model = PPO("MlpPolicy", env, n_steps=512, batch_size=64, n_epochs=5, learning_rate=1e-3, seed=0, device="cpu")
    try:
        model.learn(STEPS, callback=list(callbacks))
    except ValueError as error:
        return f"died of {str(error).split(':')[0][:40]}..."
    return f"{evaluate_policy(model, Monitor(gymnasium.make('CartPole-v1')), n_eval_episodes=20)[0]:.0f}"


def tell(event: Event) -> None:
    print(f"  update {event.step}: {type(event).__name__} {getattr(event, 'reason', '')}")


governor = GovernorCallback(emit=tell)
healthy = return_after_training(faulty=False)
ungoverned = return_after_training(Damage(), faulty=True)
print("With the governor:")
governed = return_after_training(Damage(), governor, faulty=True)
print(f"mean return of 20 episodes: no faults: {healthy}, faults and governor: {governed}, faults: {ungoverned}")
print(f"skipped {governor.governor.skipped_steps} update(s), rewound {governor.governor.rollbacks} time(s)")
