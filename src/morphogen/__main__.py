"""``python -m morphogen`` is the command line."""

from morphogen.cli.main import main

main()
