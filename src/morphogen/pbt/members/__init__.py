"""Members of populations: any training run, a PPO agent, a plain function."""

from morphogen.pbt.members.function import FunctionMember as FunctionMember, Report as Report
from morphogen.pbt.members.knobs import Attribute as Attribute, LearningRate as LearningRate, Option as Option
from morphogen.pbt.members.ppo import PPOMember as PPOMember
from morphogen.pbt.members.state import Knob as Knob, StateMember as StateMember
