"""`morphogen tasks`."""

from __future__ import annotations

from rich.table import Table

from morphogen import tasks
from morphogen.cli.codes import DONE
from morphogen.cli.commands import Tasks
from morphogen.cli.printing import result_console


def show_tasks(command: Tasks) -> int:
    """Print every task and whether its data is here; nothing is loaded or generated."""
    sheet = Table(title="tasks", title_justify="left", box=None, pad_edge=False)
    for column in ("task", "metric", "steps", "slots", "data"):
        sheet.add_column(column, justify="right" if column == "steps" else "left", overflow="fold")
    known = {name: tasks.get(name) for name in tasks.names()}
    for name, task in known.items():
        here = "comes with morphogen" if task.source is None else str(task.source.locate() or "not here")
        sheet.add_row(name, task.metric_name, f"{task.total_steps:,}", str(len(task.points)), here)
    console = result_console()
    console.print(sheet)
    for name, task in known.items():
        console.print(f"{name}: {task.summary}", highlight=False, soft_wrap=True)
    for source in dict.fromkeys(task.source for task in known.values() if task.source):
        if source.locate() is None:
            console.print(f"To get {source.name}: {source.how_to_get}", highlight=False, soft_wrap=True)
    return DONE
