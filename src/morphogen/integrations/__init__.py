"""Other people's frameworks: the governor inside their training loops, and growth for their agents.

``morphogen.integrations.lightning``, ``.huggingface`` and ``.stable_baselines3`` each have a ``GovernorCallback`` and need
their extra. ``.maskable`` has growth for agents that know a single list of actions, such as MaskablePPO of sb3-contrib.
Importing this package imports none of the frameworks.
"""
