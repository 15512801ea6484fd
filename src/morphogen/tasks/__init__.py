"""Tasks: data, host, loss, metric and growth points, each a small object in a registry."""

from morphogen.tasks.base import BuiltTask as BuiltTask, Task as Task
from morphogen.tasks.data import Split as Split, TaskData as TaskData
from morphogen.tasks.devices import resolve_device as resolve_device
from morphogen.tasks.registry import get as get, names as names
