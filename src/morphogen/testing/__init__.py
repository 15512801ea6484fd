"""Conformance suites, shipped: for blueprints, hosts, critics and the like of your own.

May import all of morphogen; nothing imports it.
"""

from morphogen.testing.action_cases import ActionCase as ActionCase, action_cases as action_cases
from morphogen.testing.actions import ACTION_CHECKS as ACTION_CHECKS, check_actions as check_actions
from morphogen.testing.blueprints import (
    CHECKS as CHECKS,
    BlueprintCase as BlueprintCase,
    blueprint_cases as blueprint_cases,
    check_blueprint as check_blueprint,
)
from morphogen.testing.critics import (
    CRITIC_CHECKS as CRITIC_CHECKS,
    CriticCase as CriticCase,
    check_critic as check_critic,
    critic_cases as critic_cases,
)
from morphogen.testing.detectors import (
    DETECTOR_CHECKS as DETECTOR_CHECKS,
    DetectorCase as DetectorCase,
    check_detector as check_detector,
    healthy_traces as healthy_traces,
)
from morphogen.testing.engines import (
    ENGINE_CHECKS as ENGINE_CHECKS,
    EngineCase as EngineCase,
    check_engine as check_engine,
)
from morphogen.testing.hosts import (
    LENIENT as LENIENT,
    HostCase as HostCase,
    check_host as check_host,
    host_cases as host_cases,
    lead_to as lead_to,
    same_bits as same_bits,
)
from morphogen.testing.policies import (
    check_policy as check_policy,
    reachable_situations as reachable_situations,
    some_sowings as some_sowings,
)
