"""Population-based training that keeps a run whole."""

from morphogen.pbt.config import PBTConfig as PBTConfig
from morphogen.pbt.history import (
    Exploit as Exploit,
    MemberReport as MemberReport,
    lineage as lineage,
    success_by_strategy as success_by_strategy,
)
from morphogen.pbt.member import HyperparameterMismatch as HyperparameterMismatch, Member as Member, Trained as Trained
from morphogen.pbt.members import (
    Attribute as Attribute,
    FunctionMember as FunctionMember,
    LearningRate as LearningRate,
    Option as Option,
    PPOMember as PPOMember,
    StateMember as StateMember,
)
from morphogen.pbt.records import Decision as Decision, MemberRecord as MemberRecord, Source as Source
from morphogen.pbt.scheduler import PBTScheduler as PBTScheduler
from morphogen.pbt.spaces import (
    Categorical as Categorical,
    Float as Float,
    Int as Int,
    LogFloat as LogFloat,
    Logit as Logit,
    Ordered as Ordered,
)
from morphogen.pbt.trainer import (
    PopulationLost as PopulationLost,
    PopulationResult as PopulationResult,
    PopulationTrainer as PopulationTrainer,
)
