"""``python -m rq4lens`` is the command line."""

from rq4lens.cli import main

main()
