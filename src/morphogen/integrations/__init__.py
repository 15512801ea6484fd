"""The governor inside other people's training loops: one module per framework, each needing its extra.

``morphogen.integrations.lightning``, ``.huggingface`` and ``.stable_baselines3`` each have a ``GovernorCallback``. Importing
this package imports none of the frameworks.
"""
