"""All networks of the zoo by name."""

from __future__ import annotations

from zoo import codes, hierarchical, noise, translation
from zoo.entry import Entry

ZOO: dict[str, Entry] = {**noise.ENTRIES, **hierarchical.ENTRIES, **codes.ENTRIES, **translation.ENTRIES}
