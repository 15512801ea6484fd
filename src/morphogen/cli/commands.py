"""The commands and their flags. Importing this imports neither torch nor any recipe: ``--help`` is quick.

A flag left out keeps the config's value, so each default is declared once, in the config beside its user.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """List the built-in tasks, and whether their data is here or how to get it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grow:
    """Train a network that grows, beside the static host and the full-size reference."""

    task: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: mnist1d)")] = None
    """Which task; see `morphogen tasks`."""
    policy: Annotated[str | None, arg(metavar="NAME|RUN", help_behavior_hint="(default: heuristic)")] = None
    """Who decides: wait, random, periodic, heuristic, or a trained policy: its run directory, file or name."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Root seed of the first repeat."""
    repeats: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 5)")] = None
    """Runs of each arm."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the task's)")] = None
    """Training steps of a run."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cpu)")] = None
    """Where to train: cpu, cuda, cuda:1, mps."""
    inject: Annotated[tuple[str, ...], arg(metavar="FAULT@STEP"), tyro.conf.UseAppendAction] = ()
    """Inject a fault, for example nan@700, into the grown arm."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the next free one below runs/)")] = None
    """Run directory, new or empty."""
    config: Annotated[Path | None, arg(metavar="FILE.yaml", help_behavior_hint="")] = None
    """Every knob, as config.yaml of a run directory holds them; flags win over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a policy that learns when and where networks grow."""

    task: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: mnist1d)")] = None
    """What the networks are trained on; see `morphogen tasks`."""
    start: Annotated[str | None, arg(name="from", metavar="POLICY", help_behavior_hint="(default: an untrained one)")] = None
    """Policy to start from: a run directory, a file, or the name of one that comes with morphogen."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 40000)")] = None
    """Decisions, over all networks."""
    envs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 8)")] = None
    """Networks that are trained at a time."""
    executor: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: inline)")] = None
    """Who trains them: inline, or processes on all cores."""
    reward: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: shaped)")] = None
    """What is paid; see docs/train.md."""
    critic: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: scalar)")] = None
    """What the critic predicts: scalar, quantile or categorical."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Root of all chance."""
    settings: Annotated[
        tuple[str, ...], arg(name="set", metavar="NAME=VALUE", help_behavior_hint=""), tyro.conf.UseAppendAction
    ] = ()
    """Any other setting, for example ppo.epochs=4 or env.tick_steps=20; may come often."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the next free one below runs/)")] = None
    """Run directory, new or empty."""
    config: Annotated[Path | None, arg(metavar="FILE.yaml", help_behavior_hint="")] = None
    """Every knob, as config.yaml of a run directory holds them; flags win over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare a trained policy with others, on the same held-out episodes."""

    run: Positional[Annotated[str | None, arg(metavar="RUN", help_behavior_hint="")]] = None
    """Its run directory or file, or the name of a policy that comes with morphogen."""
    against: Annotated[str | None, arg(metavar="NAME,NAME", help_behavior_hint="(default: wait,random,periodic,heuristic)")] = (
        None
    )
    """Whom to compare with."""
    task: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the one it was trained on)")] = None
    """Which task to play; see `morphogen tasks`."""
    episodes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 30)")] = None
    """Episodes of each player."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Which held-out seeds."""
    deterministic: Annotated[bool, arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff] = False
    """Let the policy take its most probable choices instead of drawing them."""
    envs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 8)")] = None
    """Episodes played at the same time."""
    executor: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: inline)")] = None
    """Who trains the networks: inline, or processes on all cores."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as in training)")] = None
    """Training steps of an episode."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cpu)")] = None
    """Where to train: cpu, cuda, cuda:1, mps."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the next free one below runs/)")] = None
    """Run directory, new or empty."""
    config: Annotated[Path | None, arg(metavar="FILE.yaml", help_behavior_hint="")] = None
    """Every knob, as config.yaml of a run directory holds them; flags win over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO:
    """Train an agent by proximal policy optimisation, then evaluate it."""

    env: Annotated[str | None, arg(metavar="ID", help_behavior_hint="")] = None
    """Registered Gymnasium environment, for example CartPole-v1."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 100000)")] = None
    """Environment steps, over all environments."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Root of all chance."""
    num_envs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 8)")] = None
    """Environments that are stepped together."""
    memory: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: none)")] = None
    """Memory of the policy: none, lstm or gru."""
    critic: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: scalar)")] = None
    """What the critic predicts: scalar, quantile or categorical."""
    normalize: Annotated[bool, arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff] = False
    """Normalise observations and rewards."""
    settings: Annotated[
        tuple[str, ...], arg(name="set", metavar="NAME=VALUE", help_behavior_hint=""), tyro.conf.UseAppendAction
    ] = ()
    """Any setting of PPOConfig, for example gamma=0.98; may come often."""
    eval_episodes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 10)")] = None
    """Episodes of the evaluation."""
    video: Annotated[bool, arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff] = False
    """Record evaluation episodes; needs moviepy."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cpu)")] = None
    """Where the network is: cpu, cuda, cuda:1."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the next free one below runs/)")] = None
    """Run directory, new or empty."""
    config: Annotated[Path | None, arg(metavar="FILE.yaml", help_behavior_hint="")] = None
    """Every knob, as config.yaml of a run directory holds them; flags win over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PBT:
    """Train a population of agents and keep the best; or replay the best lineage of a run."""

    action: Positional[Annotated[tuple[str, ...], arg(metavar="[replay RUN]", help_behavior_hint="")]] = ()
    """Train the best lineage of a run again, alone, and say whether it comes to the same."""
    member: Annotated[str | None, arg(metavar="KIND", help_behavior_hint="(default: ppo)")] = None
    """ppo, or growth: what `morphogen train` trains."""
    env: Annotated[str | None, arg(metavar="ID", help_behavior_hint="")] = None
    """For ppo: registered Gymnasium environment, for example CartPole-v1."""
    task: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """For growth: what the networks are trained on; see `morphogen tasks`."""
    population: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 8)")] = None
    """Members."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 100000; growth: 40000)")] = None
    """Steps of each member."""
    interval: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 5000; growth: 2000)")] = None
    """Steps between two decisions about a member."""
    engine: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: inline)")] = None
    """Who runs members: inline, processes or ray."""
    envs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 8)")] = None
    """Environments of each member."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Root of all chance."""
    settings: Annotated[
        tuple[str, ...], arg(name="set", metavar="NAME=VALUE", help_behavior_hint=""), tyro.conf.UseAppendAction
    ] = ()
    """Any other setting, for example pbt.truncation_ratio=0.25; may come often."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the next free one below runs/)")] = None
    """Run directory, new or empty."""
    config: Annotated[Path | None, arg(metavar="FILE.yaml", help_behavior_hint="")] = None
    """Every knob, as config.yaml of a run directory holds them; flags win over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run that was interrupted or killed; on a CPU bit-identically."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Its directory."""
    accept_changes: bool = False
    """Of a population: go on although config.yaml was changed, as far as that is possible."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html of a run directory again, from its event log alone."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Its directory."""


Command = (
    Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Grow, tyro.conf.subcommand("grow")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[PPO, tyro.conf.subcommand("ppo")]
    | Annotated[PBT, tyro.conf.subcommand("pbt")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
