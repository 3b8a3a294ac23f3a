"""Which files belong together: label map and instance map of a picture, and the output it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from p2pfast.errors import UsageError

EXTENSIONS = frozenset({".png", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".gif", ".webp", ".jpg", ".jpeg"})
LABEL_SUFFIXES = ("_gtFine_labelIds", "_gtCoarse_labelIds")
INSTANCE_SUFFIXES = ("_gtFine_instanceIds", "_gtCoarse_instanceIds")


@dataclass(frozen=True)
class Item:
    """One picture to make; ``name`` is its path below the input folder, without extension."""

    name: str
    source: Path
    instances: Path | None
    output: Path


@dataclass(frozen=True)
class Failure:
    """An input that could not be translated, and why."""

    name: str
    reason: str


def _strip(stem: str, suffixes: tuple[str, ...]) -> str:
    for suffix in suffixes:
        if stem.endswith(suffix):
            return stem[: -len(suffix)]
    return stem


def _listing(
    where: Path, suffixes: tuple[str, ...], option: str, leave_out: Path | None
) -> tuple[dict[str, Path], list[Failure]]:
    """Image files at ``where`` by name.

    A folder is searched with its subfolders; where names carry one of ``suffixes`` (Cityscapes keeps all
    kinds of maps in one folder), only those are taken.
    """
    if where.is_file():
        return {_strip(where.stem, suffixes): where}, []
    if not where.is_dir():
        raise UsageError(f"{option} {where}: no such file or folder")
    files = sorted(
        path
        for path in where.rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")
    )
    if leave_out is not None:
        files = [path for path in files if leave_out not in path.resolve().parents]
    marked = [path for path in files if suffixes and path.stem.endswith(suffixes)]
    found: dict[str, Path] = {}
    failures = []
    for path in marked or files:
        name = (path.parent.relative_to(where) / _strip(path.stem, suffixes)).as_posix()
        if name in found:
            failures.append(
                Failure(str(path), f"has the same name as {found[name].name}; rename one of them")
            )
        else:
            found[name] = path
    return found, failures


def find_items(
    source: Path, instances: Path | None, output: Path, extension: str, *, labels: bool
) -> tuple[list[Item], list[Failure]]:
    """Match inputs by name, in sorted order; ``labels`` says whether ``source`` holds label maps or images.

    A label map without its instance map is a Failure. Raises UsageError if nothing is found, if a path does
    not exist, or if the output folder is the input folder.
    """
    option = "--labels" if labels else "--images"
    resolved = output.resolve()
    for given, flag in ((source, option), (instances, "--instances")):
        if given is not None and given.is_dir() and given.resolve() == resolved:
            raise UsageError(f"--output {output} is also the {flag} folder; choose another for the results")
    sources, failures = _listing(source, LABEL_SUFFIXES if labels else (), option, resolved)
    if not sources:
        raise UsageError(f"{option} {source}: no images found; looked for {', '.join(sorted(EXTENSIONS))}")
    partners: dict[str, Path] | None = None
    if instances is not None:
        partners, more = _listing(instances, INSTANCE_SUFFIXES, "--instances", resolved)
        failures += more
        if (
            source.is_file() and instances.is_file()
        ):  # two files given by hand belong together whatever their names
            partners = {next(iter(sources)): instances}
    items = []
    for name, path in sources.items():
        partner = None if partners is None else partners.get(name)
        if partners is not None and partner is None:
            failures.append(Failure(str(path), f"no instance map named {Path(name).name} in {instances}"))
        else:
            items.append(Item(name, path, partner, output / f"{name}.{extension}"))
    return items, failures
