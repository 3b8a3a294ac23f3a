"""Everything there is to measure on an NVIDIA GPU, in under eight minutes, into one folder.

    python benchmarks/gpu.py results/h100            all sections
    python benchmarks/gpu.py out --sections flagship kernels
    python benchmarks/gpu.py out --dry-run           what would run; needs no GPU
    python benchmarks/gpu.py out --cpu               runs all of its code on the CPU: no measurement

Every section is a process of its own with its own limit of time: one that fails, hangs or spoils the device
does not stop the others, and its rows up to then are kept. Written are SECTION.jsonl and SECTION.log,
gpu.json (device, versions, state of every section, all rows, comparisons) and gpu.md, its tables.

All but the section "tuned" take forms and tiles by their estimate (P2PFAST_TUNE=off): to compile and time
every candidate takes longer than there is. Peers are validated against float32 eager before they are timed.
``--scale small`` runs the same code on tiny inputs, to find out whether it works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_record
from gpu_record import Section

SECTIONS = (
    Section("ceilings", 10, "copy, matrix products, reads of the second-level cache"),
    Section("compile", 80, "Triton kernels of what is timed below, on all processors at once"),
    Section(
        "flagship", 55, "pix2pixHD 2048x1024, batch 1 and 8: eager, p2pfast with and without CUDA graphs"
    ),
    Section("kernels", 35, "single kernels at the flagship's sizes, with their share of the ceilings"),
    Section("correctness", 35, "pytest -m gpu on many processes, as many tests as fit"),
    Section("networks", 30, "resnet_9blocks and unet_256 at 256 and 1024: eager and p2pfast"),
    Section("translate", 25, "files to files, images a second"),
    Section("training", 40, "steps of pix2pixHD and pix2pix 256x256, their memory: eager, p2pfast, compiled"),
    Section("sanitizer", 25, "compute-sanitizer on the CUDA kernels"),
    Section("tuned", 80, "the flagship with forms and tiles chosen by measurement"),
    Section("compiled", 53, "torch.compile max-autotune of the networks above"),
)
BUDGET = 470  # seconds of everything


def run_section(section: Section, folder: Path, given: list[str], limit: float) -> dict[str, object]:
    """Runs a section as a process; what became of it."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_sections.py")), section.name, str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if "--cpu" in given else None
    start = time.monotonic()
    with (folder / f"{section.name}.log").open("w") as log:
        command += [*given, "--seconds", str(int(limit))]
        # A session of its own, so that its workers can be stopped with it: they would go on using the device.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
            result = "done" if status == 0 else f"failed with status {status}: see {section.name}.log"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s; rows up to then are kept"
        finally:
            end_session(process)
    wrong = sum("error" in row for row in gpu_record.read_rows(folder, [section.name]))
    if wrong:
        result += f"; {wrong} of its rows are errors: see {section.name}.jsonl"
    return {"result": result, "seconds": time.monotonic() - start}


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and all that it has started there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def allowance(own: float, left: float, later: float) -> float:
    """Seconds of a section: its own, and what those before it have not used; ``later`` ones keep theirs."""
    return min(left, max(own, left - later))


def summarise(folder: Path, states: dict[str, dict[str, object]], given: list[str]) -> None:
    rows = gpu_record.shares(gpu_record.read_rows(folder, [s.name for s in SECTIONS]))
    summary = {
        **gpu_record.environment(),
        "command": " ".join(["python", "benchmarks/gpu.py", *given]),
        "date": time.strftime("%Y-%m-%d"),
        "sections": states,
        "compared": gpu_record.compared(rows),
        "rows": rows,
    }
    (folder / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "gpu.md").write_text(gpu_record.markdown(summary))


def missing() -> str | None:
    """Why nothing can be measured here."""
    from p2pfast.runtime.gpu.require import device_reason, kernels_reason

    reason = device_reason()
    if reason is None:
        import torch

        reason = kernels_reason(torch.device("cuda", 0))
    return reason


def main(arguments: list[str] | None = None) -> int:
    names = [s.name for s in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="SECTION")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"seconds of everything ({BUDGET})")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument(
        "--cpu", action="store_true", help="try all code on the CPU, small and interpreted: no measurement"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would run")
    options = parser.parse_args(arguments)
    wanted = [s for s in SECTIONS if s.name in options.sections]
    if options.dry_run:
        for section in wanted:
            print(f"{section.name:12} {section.seconds:4} s  {section.about}")
        print(f"at most {min(options.budget, sum(s.seconds for s in wanted))} s")
        return 0
    reason = None if options.cpu else missing()
    if reason is not None:
        print(f"no GPU to measure: {reason}", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    slower = 8 if options.cpu else 1
    end = time.monotonic() + options.budget * slower
    given = ["--scale", "small", "--cpu"] if options.cpu else ["--scale", options.scale]
    shown = list(sys.argv[1:] if arguments is None else arguments)
    states: dict[str, dict[str, object]] = {}
    for number, section in enumerate(wanted):
        left = end - time.monotonic()
        if left < 5:
            states[section.name] = {"result": "left out: no time left", "seconds": 0.0}
            continue
        print(f"== {section.name}: {section.about}", flush=True)
        later = sum(s.seconds for s in wanted[number + 1 :])
        limit = allowance(section.seconds * slower, left, later * slower)
        states[section.name] = run_section(section, options.folder, given, limit)
        print(f"   {states[section.name]['result']} ({states[section.name]['seconds']:.0f} s)", flush=True)
        try:
            summarise(options.folder, states, shown)  # after each: an interrupted run is not lost
        except Exception as error:  # the rows are on disk, and the other sections worth their time
            print(f"   no summary: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 0 if all(s["result"] == "done" for s in states.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through end_session
    sys.exit(main())
