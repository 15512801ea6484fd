"""Another library's agent in the growth environment: MaskablePPO of sb3-contrib decides where a small network grows.

The run is far too short to learn much; it shows how the two fit together.

Run it: pip install 'morphogen[stable-baselines3]' && python examples/growth_with_maskable_ppo.py
"""

import numpy as np
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.vec_env import DummyVecEnv

from morphogen.envs import GrowthEnvConfig
from morphogen.integrations.maskable import MaskableGrowthEnv

ENVS, STEPS = 2, 256


def make_env() -> MaskableGrowthEnv:
    """Return a short run on the digits: 12 decisions, 4 training steps apart."""
    return MaskableGrowthEnv("digits", total_steps=48, tick_steps=4)


def play(agent: MaskablePPO, seed: int) -> tuple[float, list[str]]:
    """Return what one episode came to, and what was done in it. A masked action would be a SlotError."""
    env, done, actions, value = make_env(), False, [], 0.0
    observation, _ = env.reset(seed=seed)
    while not done:
        action, _ = agent.predict(observation, action_masks=env.action_masks())
        actions.append(env.actions.names[int(action)])
        observation, reward, done, _, _ = env.step(np.int64(action))
        value += reward
    env.close()
    return value, actions


def main() -> None:
    """Train, and play on a seed that was not trained on."""
    envs = DummyVecEnv([make_env] * ENVS)
    envs.seed(0)
    settings = {"n_steps": 64, "batch_size": 64, "gamma": GrowthEnvConfig().reward.gamma, "seed": 0, "device": "cpu"}
    agent = MaskablePPO("MlpPolicy", envs, **settings).learn(STEPS)
    possible = get_action_masks(envs).mean()
    value, actions = play(agent, seed=1000)
    print(f"{agent.num_timesteps} decisions in {ENVS} environments, {envs.action_space.n} actions, {possible:.0%} possible now")
    done = [action for action in actions if action != "wait"]
    print(f"return on a new seed {value:.2f}, {len(actions) - len(done)} times wait and: {', '.join(done)}")


if __name__ == "__main__":
    main()
