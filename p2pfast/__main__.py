"""``python -m p2pfast`` is the ``p2pfast`` command."""

from p2pfast.cli import main

main()
