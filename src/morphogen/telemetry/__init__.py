"""What happened, and where it is shown: typed events, and sinks that cannot change a result."""
