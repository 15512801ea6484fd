"""Growth: any ``nn.Module`` gets slots where seeds germinate, train in isolation, blend in, are fossilised or pruned."""

from morphogen.growth import blueprints as blueprints
from morphogen.growth.accounting import (
    count_flops as count_flops,
    count_parameters as count_parameters,
    flop_counter as flop_counter,
)
from morphogen.growth.config import GateConfig as GateConfig, GrowthConfig as GrowthConfig
from morphogen.growth.contribution import (
    Contribution as Contribution,
    ContributionResult as ContributionResult,
    measure_contributions as measure_contributions,
)
from morphogen.growth.events import GateRefused as GateRefused, StageChanged as StageChanged
from morphogen.growth.gates import Check as Check, GateResult as GateResult, SlotSensors as SlotSensors
from morphogen.growth.lifecycle import SlotState as SlotState, Sowing as Sowing, Stage as Stage
from morphogen.growth.model import GrowableModel as GrowableModel
from morphogen.growth.newborn import NewbornConfig as NewbornConfig, NewbornPolicy as NewbornPolicy
from morphogen.growth.points import GrowthPoint as GrowthPoint
from morphogen.growth.ramps import Ramp as Ramp
from morphogen.growth.shapley import ShapleyResult as ShapleyResult, measure_shapley as measure_shapley
from morphogen.growth.slots import SeedSlot as SeedSlot
from morphogen.growth.suggesting import SuggestedPoint as SuggestedPoint, suggest_points as suggest_points
from morphogen.growth.topology import with_fossils as with_fossils
