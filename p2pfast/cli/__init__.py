"""The ``p2pfast`` command."""

from __future__ import annotations

from p2pfast.cli.app import app, main

__all__ = ["app", "main"]
