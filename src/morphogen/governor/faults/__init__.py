"""Faults to inject into a run, so that a test or a benchmark can see what a governor makes of them.

Every kind in ``KINDS`` works on any model and any training loop, whose code stays as it is::

    with faults.inject("nan_input", state):
        step()                                   # one step of your loop

    schedule = faults.Schedule(["nan_input@300", "label_shuffle@500+40"], state, generator)
    for step in range(1000):
        with schedule.at(step) as fault:
            loss = loss_of(model(inputs), fault.labels(labels))
            ...
"""

from morphogen.governor.faults.injection import Injection as Injection
from morphogen.governor.faults.kinds import ALIASES as ALIASES, FAMILIES as FAMILIES, KINDS as KINDS, FaultKind as FaultKind
from morphogen.governor.faults.schedule import (
    Fault as Fault,
    Injections as Injections,
    Schedule as Schedule,
    inject as inject,
    kind_named as kind_named,
)
