"""Control: what to do with a slot. Actions, exact masks, observation, and policies."""

from morphogen.control.actions import Action as Action, Op as Op, execute as execute
from morphogen.control.baselines import Periodic as Periodic, Random as Random, Wait as Wait
from morphogen.control.heuristic import Heuristic as Heuristic
from morphogen.control.masks import ActionMask as ActionMask, action_mask as action_mask
from morphogen.control.observation import Observation as Observation, SlotView as SlotView, view_slots as view_slots
from morphogen.control.policies import Policy as Policy, make as make, names as names
