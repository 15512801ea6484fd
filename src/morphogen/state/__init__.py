"""The ground floor: a training run as one object, and everything that keeps its parts together."""

from morphogen.state.ring import Generation as Generation, Ring as Ring
from morphogen.state.snapshot import Snapshot as Snapshot
from morphogen.state.streams import RandomStreams as RandomStreams, draw_from as draw_from
from morphogen.state.surgery import (
    copy_moments as copy_moments,
    rescale_moments as rescale_moments,
    reset_moments as reset_moments,
    sync_groups as sync_groups,
)
from morphogen.state.topology import DynamicModel as DynamicModel, TopologyChange as TopologyChange
from morphogen.state.training_state import TrainingState as TrainingState
