"""Puts a trained policy among those that come with morphogen, with the command, the curve and the evaluation that speak for it.

python tools/ship_policy.py RUN EVALUATION NAME     # RUN of `morphogen train`, EVALUATION of `morphogen evaluate RUN`
python tools/ship_policy.py --table                 # what the policies there reach, as it stands in docs/evaluate.md
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from morphogen.recipes.train_config import TrainConfig

POLICIES = Path(__file__).parents[1] / "src" / "morphogen" / "policies"
_POINTS = 40  # of a curve
_CURVE = ("decisions", "return", "metric", "parameters")


def facts_of(run: Path, evaluation: Path, name: str) -> dict[str, Any]:
    """Return what speaks for the policy of ``run``, to be called ``name``."""
    config, given = yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "summary.json").read_text())
    found = json.loads((evaluation / "summary.json").read_text())
    if not given["finished"] or not found["finished"]:
        raise SystemExit("both the training and the evaluation must be finished")
    return {
        "command": command_of(config),
        "evaluation": f"morphogen evaluate {name} --episodes {found['rows'][0]['episodes']}",
        "decisions": given["num_steps"],
        "curve": {"columns": _CURVE, "rows": curve_of(run)},
        "rows": found["rows"],
        "differences": found["differences"],
        "sentences": found["sentences"],
    }


def command_of(config: dict[str, Any]) -> str:
    """Return the command that trains with ``config``."""
    start = f" --from {Path(config['start_from']).stem}" if config.get("start_from") else ""
    plain = TrainConfig(task=config["task"]).model_dump(mode="json")
    changed = [name for name, value in plain["ppo"].items() if name != "seed" and config["ppo"][name] != value]
    if any(config[name] != plain[name] for name in ("env", "checkpoint_every_updates")):
        raise SystemExit("only policies trained in the default environment are shipped")
    settings = "".join(f" --set 'ppo.{name}={json.dumps(config['ppo'][name])}'" for name in changed)
    steps, seed = config["total_steps"], config["ppo"]["seed"]
    return f"morphogen train --task {config['task']}{start} --steps {steps} --seed {seed}{settings}"


def curve_of(run: Path) -> list[list[float]]:
    """Return means over stretches of training: decisions at their end, return, metric and parameters of their episodes."""
    lines = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    episodes = [line for line in lines if line["event"] == "EpisodeFinished"]
    size = -(-len(episodes) // _POINTS)
    parts = [episodes[first : first + size] for first in range(0, len(episodes), size)]
    names = ("total_reward", "metric", "parameters")
    return [[part[-1]["step"], *(round(fmean(episode[name] for episode in part), 4) for name in names)] for part in parts]


def table() -> str:
    """Return what every policy reaches, as Markdown."""
    lines = [
        "| policy | player | return | test metric | parameters | FLOPs / host | learned - player, return |",
        "|---" * 7 + "|",
    ]
    for file in sorted(POLICIES.glob("*.json")):
        facts = json.loads(file.read_text())
        gaps = {gap["other"]: gap for gap in facts["differences"] if gap["quantity"] == "total_return"}
        lines += [_line(file.stem, row, gaps.get(row["player"])) for row in facts["rows"]]
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any], gap: dict[str, Any] | None) -> str:
    paid, metric = row["total_return"], row["test_metric"]
    difference = "" if gap is None else "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**gap["estimate"])
    fronts = [what for what, is_on in (("p", row["on_parameters_front"]), ("f", row["on_flops_front"])) if is_on]
    marks = f" ({', '.join(fronts)})" if fronts else ""
    return (
        f"| {name} | {row['player']}{marks} | {paid['mean']:.3f} [{paid['low']:.3f}, {paid['high']:.3f}] | "
        f"{metric['mean']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}] | {row['parameters']:,.0f} | "
        f"{row['relative_flops']:.2f} | {difference} |"
    )


def main() -> None:
    """Ship a policy, or print the table."""
    if sys.argv[1:] == ["--table"]:
        print(table(), end="")
        return
    run, evaluation, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    shutil.copyfile(run / "policy.safetensors", POLICIES / f"{name}.safetensors")
    (POLICIES / f"{name}.json").write_text(json.dumps(facts_of(run, evaluation, name), indent=1) + "\n")


if __name__ == "__main__":
    main()
