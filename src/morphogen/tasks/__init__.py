"""Tasks: data, host, objective and growth points, each a small object in a registry."""

from morphogen.tasks.base import BuiltTask as BuiltTask, Task as Task
from morphogen.tasks.data import Split as Split, TaskData as TaskData
from morphogen.tasks.devices import resolve_device as resolve_device
from morphogen.tasks.hosts import ConvHost as ConvHost, MLPHost as MLPHost, TransformerHost as TransformerHost
from morphogen.tasks.objectives import (
    Classification as Classification,
    LanguageModelling as LanguageModelling,
    Objective as Objective,
)
from morphogen.tasks.registry import get as get, names as names
from morphogen.tasks.sources import Source as Source
