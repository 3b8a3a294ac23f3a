"""Training pictures in the published folder conventions: what is there and what belongs together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from p2pfast.errors import UsageError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
#: Ends of names by which data sets tell a picture's maps apart.
SUFFIXES = (
    "_gtFine_labelIds",
    "_gtCoarse_labelIds",
    "_gtFine_instanceIds",
    "_gtCoarse_instanceIds",
    "_leftImg8bit",
    "_label",
    "_inst",
    "_img",
)


def pictures(folder: Path) -> list[Path]:
    """All pictures below ``folder``, sorted. Raises UsageError if there is no such folder or none in it."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder{_alternatives(folder.parent)}")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")
    )
    if not found:
        raise UsageError(f"{folder}: no pictures in it; looked for {', '.join(sorted(EXTENSIONS))}")
    return found


def _alternatives(parent: Path) -> str:
    if not parent.is_dir():
        return ""
    names = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    return f"; {parent} holds the folders {', '.join(names[:8])}" if names else f"; {parent} holds no folders"


def _name(path: Path, folder: Path) -> str:
    """The path below ``folder`` without extension and suffix. Only the name of a picture in a flat folder."""
    stem = path.stem
    for suffix in SUFFIXES:
        if stem.endswith(suffix) and stem != suffix:
            stem = stem[: -len(suffix)]
            break
    return (path.parent.relative_to(folder) / stem).as_posix()


def _named(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files = pictures(folder)
    # Cityscapes keeps colour pictures and polygons beside the maps.
    marked = [path for path in files if path.stem.endswith(suffixes)] if suffixes else []
    named: dict[str, Path] = {}
    for path in marked or files:
        name = _name(path, folder)
        if name in named:
            raise UsageError(
                f"{path} and {named[name].name} have the same name up to the extension; keep one of them"
            )
        named[name] = path
    return named


def matched(folders: dict[Path, tuple[str, ...]]) -> Iterator[tuple[Path, ...]]:
    """Files of the same name in several folders, in sorted order.

    ``folders`` maps each folder to the ends of names that mark its files where others lie beside them.

    Raises UsageError that names files without a partner.
    """
    listings = {folder: _named(folder, suffixes) for folder, suffixes in folders.items()}
    first, *_ = listings
    for folder in listings:
        for here, there in ((first, folder), (folder, first)):
            alone = sorted(set(listings[here]) - set(listings[there]))
            if alone:
                shown = ", ".join(listings[here][name].name for name in alone[:3])
                more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
                raise UsageError(
                    f"unpaired files in {here}: {shown}{more} have no partner of the same name in {there}"
                )
    for name in sorted(listings[first]):
        yield tuple(named[name] for named in listings.values())
