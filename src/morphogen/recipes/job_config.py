"""What the configs of all jobs have in common."""

from __future__ import annotations

from morphogen.config import Config


class JobConfig(Config):
    """Base of every job's config. A subclass has a field ``job`` whose one value says which recipe resumes the job."""

    @property
    def run_name(self) -> str:
        """What a run directory is called where no other name is given, without its number; safe as a file name."""
        raise NotImplementedError
