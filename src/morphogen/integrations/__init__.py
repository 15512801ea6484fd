"""Other people's frameworks: the governor inside their training loops, growth for their agents, members for their schedules.

``morphogen.integrations.lightning``, ``.huggingface`` and ``.stable_baselines3`` each have a ``GovernorCallback`` and need
their extra. ``.maskable`` has growth for agents that know a single list of actions, such as MaskablePPO of sb3-contrib.
``.ray_tune`` makes members of a population Trainables of Ray Tune; it needs the extra ``ray``.
Importing this package imports none of the frameworks.
"""
