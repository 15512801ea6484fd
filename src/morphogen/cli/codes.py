"""Exit codes: 0 only if the job is done."""

DONE = 0
FAILED = 1
MISUSED = 2
INTERRUPTED = 130
