"""The sections of gpu.py, each run as a process of its own: python gpu_sections.py SECTION FOLDER."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_record
import torch
from torch import Tensor, nn

import p2pfast

DEVICE = torch.device("cuda")
ROOT = Path(__file__).parents[1]
SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
Run = Callable[[], Any]


class Bench:
    """What a section gets: ``record`` for its rows, the scale, and when its time is over."""

    def __init__(
        self, record: gpu_record.Recorder, small: bool, seconds: float, compiles: bool = False
    ) -> None:
        self.record, self.small, self.end = record, small, time.monotonic() + seconds
        self.compiles = compiles  # only: nothing is timed

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def calls(run: Run, seconds: float = 1.0, most: int = 50) -> list[float]:
    """Seconds of a call, one number a batch of calls that fills the device; warmed up before."""
    for _ in range(3 if DEVICE.type == "cuda" else 0):  # compiles, chooses and captures
        run()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    if DEVICE.type != "cuda":
        return [once]
    batch = max(1, min(most, int(seconds / 5 / once)))
    found = []
    for _ in range(5):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(batch):
            run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) * 1e-3 / batch)
    return found


def captured(run: Run) -> Run:
    """A call as a CUDA graph, so that only the device is timed."""
    if DEVICE.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def forget() -> None:
    """Gives cached memory back, and starts the peak anew."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def relative(found: Tensor, expected: Tensor) -> float:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    return float(error)


# --- sections ---------------------------------------------------------------------------------------


def correctness(bench: Bench) -> None:
    """The tests that need a GPU, on many processes: most of their time is compiling. Where time is up, what
    passed and failed up to then is recorded; `pytest -m gpu` by itself runs them all."""
    log = bench.record.path.with_name("correctness-pytest.log")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--color=no"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes()), "--dist", "worksteal"]
    folders = ["tests/gpu_runtime", "tests/ops", "tests/native", "tests/gpu_kernels"]
    # A trial of this code skips them all.
    command += folders if DEVICE.type == "cuda" else ["tests/gpu_runtime/test_device.py"]
    status = status_within(bench.left - 3, command, log)
    lines = log.read_text(errors="replace").splitlines()
    counts, failed = outcomes(lines)
    summary = lines[-1] if lines else ""
    bench.record(what="pytest -m gpu", status=status, **counts, summary=summary, failures=failed[:50])
    if failed or status not in ("0", "5", "out of time"):  # 5: nothing to run
        raise SystemExit(1)


def status_within(
    seconds: float, command: list[str], log: Path, environment: dict[str, str] | None = None
) -> str:
    """How a command ended that writes to ``log``, or that it was stopped after so many seconds."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=max(0.5, seconds),
            )
        except subprocess.TimeoutExpired:
            return "out of time"
    return str(done.returncode)


def processes() -> int:
    """How many processes compile at the same time: one a processor, but for two that feed the device."""
    return max(1, min(14, (os.cpu_count() or 2) - 2)) if DEVICE.type == "cuda" else 1


def outcomes(lines: list[str]) -> tuple[dict[str, int], list[str]]:
    """How many tests passed, failed and so on by pytest's verbose output, and which failed."""
    # Not "error": a row with that has no measurement.
    counted = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
    counts = dict.fromkeys(counted.values(), 0)
    failed = []
    for text in lines:
        # "FILE::TEST PASSED [ 1%]"; of many processes "[gw0] [ 1%] PASSED FILE::TEST".
        if "::" not in text or (" " in text and text.split()[0] in ("FAILED", "ERROR", "SKIPPED")):
            continue  # the summary at the end names them again
        words = set(text.split())
        for outcome, name in counted.items():
            if outcome in words:
                counts[name] += 1
                if outcome in ("FAILED", "ERROR"):
                    failed.append(next(word for word in text.split() if "::" in word))
    return counts, failed


def sanitizer(bench: Bench) -> None:
    """The tests of the CUDA C++ kernels under memcheck."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    tool = next((p for p in places if p and Path(p).exists()), None)
    if tool is None:
        bench.record(
            what="memcheck", error="compute-sanitizer is not installed: it comes with the CUDA toolkit"
        )
        return
    names = ("instance_edges", "label_conv", "image_uint8", "instance_pool", "gan_loss", "feature_matching")
    folders = ["tests/native", *(f"tests/ops/test_{name}.py" for name in names)]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *folders, "-p", "no:cacheprovider"]
    command = [tool, "--error-exitcode", "9", "--target-processes", "all"]
    known = subprocess.run([tool, "--help"], capture_output=True, text=True, timeout=20).stdout
    if "--kernel-regex" in known:
        command += ["--kernel-regex", "kns=p2pfast"]  # PyTorch's kernels are not watched
    # Every tensor in memory of its own: in a block that PyTorch shares out, what runs over hits no boundary.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = bench.record.path.with_name("sanitizer-memcheck.log")
    status = status_within(bench.left - 2, [*command, *tests], log, environment)
    text = log.read_text(errors="replace")
    errors = text.count("========= Invalid") + text.count("========= Program hit")
    ran = [t for t in text.splitlines() if " passed" in t or " failed" in t]
    bench.record(what="memcheck", status=status, errors=errors, tests=ran[-1].strip() if ran else "")
    if errors or status not in ("0", "out of time"):
        raise SystemExit(1)


def ceilings(bench: Bench) -> None:
    """What this device reaches with the library's simplest kernels."""
    size = (1 << 20) if bench.small else (1 << 30)
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = min(calls(captured(lambda: target.copy_(source))))
    bench.record(what="copy", ms=seconds * 1e3, gb_s=2e-9 * size / seconds)
    side = 256 if bench.small else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.backends.cuda.matmul.allow_tf32 = True
        a = torch.randn(side, side, device=DEVICE, dtype=dtype)
        out = torch.empty_like(a)
        seconds = min(calls(captured(lambda a=a, out=out: torch.mm(a, a, out=out))))
        bench.record(
            what=f"matmul {SHORT[dtype]}", ms=seconds * 1e3, tflop_s=2e-12 * side**3 / seconds, tf32=True
        )
    # Reads that stay in the second-level cache: the same few megabytes summed again and again.
    small = torch.ones(4 << 20, device=DEVICE)
    total = torch.empty((), device=DEVICE)

    def read() -> None:
        for _ in range(20):
            torch.sum(small, 0, out=total)

    seconds = min(calls(captured(read))) / 20
    bench.record(what="second-level cache read", ms=seconds * 1e3, gb_s=1e-9 * small.nbytes / seconds)


def network(bench: Bench, name: str, height: int, width: int, batch: int) -> tuple[nn.Module, Tensor, Any]:
    """A network on the device in evaluation mode, its dense input, and what p2pfast gets."""
    torch.manual_seed(0)
    with DEVICE:  # the flagship's 180 million weights take seconds to draw on a processor
        model = p2pfast.models.build(name, **({"ngf": 2} if bench.small else {})).eval()
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    if channels <= 3:
        x = torch.randn(batch, channels, height, width, device=DEVICE)
        return model, x, x
    from p2pfast.data.scenes import draw_scene

    scene = draw_scene(0, width=width, height=height, photo=False)
    maps = torch.from_numpy(scene.labels).to(torch.uint8), torch.from_numpy(scene.instances).int()
    # Others of a batch are shifted: to draw each would take longer than to run it.
    labels, instances = (torch.stack([m.roll(97 * i, 1) for i in range(batch)]) for m in maps)
    given = p2pfast.LabelMap(labels, instances, num_classes=35).to(DEVICE)
    return model, given.dense(torch.float32), given


def engines(model: nn.Module, x: Tensor, given: Any, dtype: torch.dtype) -> dict[str, Callable[[], Run]]:
    """Makers of what is timed; p2pfast starts from a label map where the network reads one."""

    def eager() -> Run:
        twin = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
        dense = x.to(dtype=dtype, memory_format=torch.channels_last)
        return lambda: twin(dense)

    def graphed() -> Run:
        return captured_network(eager())

    def fused(graphs: str) -> Run:
        os.environ["P2PFAST_CUDA_GRAPHS"] = graphs
        fast = p2pfast.optimize(model, dtype=dtype, backend="cuda")

        def run() -> Any:
            os.environ["P2PFAST_CUDA_GRAPHS"] = graphs
            return fast(given)

        return run

    return {
        "eager channels_last": eager,
        "eager channels_last, CUDA graph": graphed,
        "p2pfast": lambda: fused("on"),
        "p2pfast without CUDA graphs": lambda: fused("off"),
    }


def captured_network(run: Run) -> Run:
    results: list[Any] = []

    def keep() -> None:
        results[:] = [run()]

    replay = captured(keep)

    def call() -> Any:
        replay()
        return results[0]

    return call


def race(bench: Bench, what: str, model: nn.Module, x: Tensor, given: Any, dtype: torch.dtype) -> None:
    """Times all engines on one case, each validated against float32 eager first."""
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        expected = model(x)
        for engine, make in engines(model, x, given, dtype).items():
            try:
                forget()
                run = make()
                error = relative(run(), expected)
                seconds = calls(run)
                bench.record(
                    what=what,
                    engine=engine,
                    dtype=SHORT[dtype],
                    ms=gpu_record.median_ms(seconds),
                    least_ms=1e3 * min(seconds),
                    relative_l2=error,
                    peak_mb=peak_bytes() * 1e-6,
                )
            except Exception as reason:  # the others are still worth their time
                bench.record(
                    what=what, engine=engine, dtype=SHORT[dtype], error=f"{type(reason).__name__}: {reason}"
                )
            forget()


def flagship(bench: Bench) -> None:
    height, width = (64, 128) if bench.small else (1024, 2048)
    for batch in (1,) if bench.small else (1, 8):
        for dtype in (torch.bfloat16,) if bench.small else (torch.bfloat16, torch.float16):
            if bench.left < 8:
                return
            model, x, given = network(bench, "pix2pixhd-local", height, width, batch)
            race(bench, f"pix2pixhd-local {width}x{height} batch {batch}", model, x, given, dtype)
            if batch == 1 and dtype == torch.bfloat16:
                with torch.inference_mode():
                    fast = p2pfast.optimize(model, dtype=dtype, backend="cuda")
                    fast(given)
                    fast(given)
                print(p2pfast.explain(fast))
            del model, x, given
            forget()


def tuned(bench: Bench) -> None:
    """The flagship with everything measured, after its candidates have been compiled on all processors; what
    was measured before time is up stays in the cache."""
    side_by_side(bench, "tuned", 0.6 * bench.left)
    os.environ["P2PFAST_TUNE"] = "on"
    height, width = (64, 128) if bench.small else (1024, 2048)
    model, x, given = network(bench, "pix2pixhd-local", height, width, 1)
    with torch.inference_mode():
        expected = model(x)
        fast = p2pfast.optimize(model, dtype=torch.bfloat16, backend="cuda")
        start = time.monotonic()
        error = relative(fast(given), expected)
        first = time.monotonic() - start
        seconds = calls(lambda: fast(given))
    bench.record(
        what=f"pix2pixhd-local {width}x{height} batch 1",
        engine="p2pfast tuned",
        dtype="bfloat16",
        ms=gpu_record.median_ms(seconds),
        relative_l2=error,
        first_s=first,
    )
    print(p2pfast.explain(fast))


def tuned_share(bench: Bench) -> None:
    """One process of those that compile what ``tuned`` will time: it plans the flagship with clocks that
    always say 0, so that every form of every layer is asked for."""
    from p2pfast.ops.conv.gpu import choice
    from p2pfast.runtime.gpu import measure

    def compile_them(problem: Any, worth: list[Any], device: torch.device) -> None:
        for candidate in worth:
            for launch in choice._kernels(problem, candidate, torch.device("meta")):
                launch.run()

    for module, name, value in (
        (choice, "_compile", compile_them),
        (choice, "runner", lambda problem, candidate, device: None),
        (choice, "graph_seconds", lambda run, device: 0.0),
        (choice, "_remember", lambda signature, found: None),
        (measure, "graph_seconds", lambda run, device: 0.0),
        (measure, "_write", lambda entries: None),
    ):
        setattr(module, name, value)
    os.environ["P2PFAST_TUNE"] = "force"  # asks although an earlier run may know the answers
    height, width = (64, 128) if bench.small else (1024, 2048)
    model, _, given = network(bench, "pix2pixhd-local", height, width, 1)
    planned(model, given, torch.bfloat16)


def compile(bench: Bench) -> None:  # noqa: A001 - a section's name
    """Fills Triton's cache with the kernels that are timed later, on all processors."""
    if side_by_side(bench, "compile", bench.left - 2):
        raise SystemExit(1)


def side_by_side(bench: Bench, section: str, seconds: float) -> int:
    """Runs ``section`` as processes that share its work, for ``seconds`` at most; how many of them failed."""
    count, start = processes(), time.monotonic()
    command = [sys.executable, __file__, section, str(bench.record.path.parent)]
    command += ["--scale", "small" if bench.small else "full", *([] if DEVICE.type == "cuda" else ["--cpu"])]
    workers = [subprocess.Popen([*command, "--worker", f"{i}/{count}"]) for i in range(count)]
    late = 0
    for worker in workers:
        try:
            worker.wait(max(0.1, seconds - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            worker.kill()
            late += 1
    failed = sum(worker.wait() != 0 for worker in workers)
    bench.record(what="compile", processes=count, failed=failed, late=late, seconds=time.monotonic() - start)
    return failed


def only_compile(number: int, count: int) -> None:
    """From now on Triton kernels are compiled instead of launched: each ``count``-th different one, from
    ``number``. Processes that ask for the same kernels in the same order share them evenly."""
    from p2pfast.ops.gpu import Launch

    seen: set[str] = set()

    def run(launch: Launch) -> None:
        key = repr(launch.shipped(""))
        if key in seen:
            return
        seen.add(key)
        if (len(seen) - 1) % count != number:
            return
        try:
            launch.kernel.warmup(grid=launch.grid, **launch.options)
        except Exception as reason:  # what does not compile is told where it is timed
            print(f"{type(reason).__name__}: {reason}", flush=True)

    if DEVICE.type == "cuda":  # the interpreter compiles nothing
        Launch.run = run  # type: ignore[method-assign]


def compile_share(bench: Bench) -> None:
    """One process of ``compile``: plans what is timed later and goes through its steps; what is most wanted
    comes first."""
    if bench.small:
        walk(bench, "unet_256", 256, 256, torch.bfloat16)
        return
    walk(bench, "pix2pixhd-local", 1024, 2048, torch.bfloat16)
    kernels(bench)
    walk(bench, "pix2pixhd-local", 1024, 2048, torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("resnet_9blocks", "unet_256"):
            for side in (256, 1024):
                walk(bench, name, side, side, dtype)


def walk(bench: Bench, name: str, height: int, width: int, dtype: torch.dtype) -> None:
    """Goes through the steps of a network's plan once."""
    from p2pfast.runtime.gpu.plan import DURING

    model, _, given = network(bench, name, height, width, 1)
    engine = planned(model, given, dtype)
    (prepared,) = engine.plans.values()
    with torch.no_grad():
        for constant in prepared.plan.constants:
            engine._refresh(constant)
        frame = engine._take_frame(prepared.plan)
        for step in prepared.plan.steps:
            if step.phase == DURING:
                step.run(frame)
    synchronize()


def planned(model: nn.Module, given: Any, dtype: torch.dtype) -> Any:
    """The engine of an optimised network, which has planned one call and run nothing."""
    fast = p2pfast.optimize(model, dtype=dtype, backend="cuda")
    engine = fast.__dict__["_p2pfast"]._engine()
    with torch.no_grad():
        key, tensors, arguments = engine.source.bind((given,), {}, engine.device)
        engine._first(key, tensors, arguments)
    return engine


def networks(bench: Bench) -> None:
    for name in ("resnet_9blocks", "unet_256"):
        for side in (256,) if bench.small else (256, 1024):
            for dtype in (torch.bfloat16,) if bench.small else (torch.bfloat16, torch.float16):
                if bench.left < 5:
                    return
                model, x, given = network(bench, name, side, side, 1)
                race(bench, f"{name} {side}x{side}", model, x, given, dtype)


def compiled(bench: Bench) -> None:
    """torch.compile, cheapest first: the longest compilations may not end in time."""
    cases = [("resnet_9blocks", 256, 256), ("unet_256", 256, 256), ("pix2pixhd-local", 1024, 2048)]
    cases += [("resnet_9blocks", 1024, 1024), ("unet_256", 1024, 1024)]
    torch.backends.cudnn.benchmark = True
    for name, height, width in (
        [(n, 64, 128) if n[0] == "p" else (n, 256, 256) for n, *_ in cases] if bench.small else cases
    ):
        what = f"{name} {width}x{height}" + (" batch 1" if name.startswith("pix2pixhd") else "")
        torch._dynamo.reset()
        model, x, _ = network(bench, name, height, width, 1)
        with torch.inference_mode():
            expected = model(x)
            twin = copy.deepcopy(model).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
            dense = x.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
            start = time.monotonic()
            fast = torch.compile(twin, mode="max-autotune")
            error = relative(fast(dense), expected)
            took = time.monotonic() - start
            if error > 0.2:
                bench.record(what=what, engine="torch.compile", dtype="bfloat16", error=f"wrong: {error:.3g}")
                continue
            seconds = calls(lambda fast=fast, dense=dense: fast(dense))
        bench.record(
            what=what,
            engine="torch.compile max-autotune",
            dtype="bfloat16",
            ms=gpu_record.median_ms(seconds),
            relative_l2=error,
            compile_s=took,
        )


def timed(bench: Bench, what: str, dtype: str, run: Run, moved: float, work: float = 0.0) -> None:
    """Records a kernel's time as a CUDA graph; ``moved`` bytes, ``work`` multiply-adds. Errors are rows too,
    as the others are worth their time."""
    if bench.compiles:
        with contextlib.suppress(Exception):  # to be told where it is timed
            run()
        return
    try:
        seconds = min(calls(captured(run), 0.3))
    except Exception as reason:
        bench.record(what=what, dtype=dtype, error=f"{type(reason).__name__}: {reason}")
        return
    row = {"ms": seconds * 1e3, "gb_s": 1e-9 * moved / seconds}
    if work:
        row["tflop_s"] = 2e-12 * work / seconds
    bench.record(what=what, dtype=dtype, **row)


def kernels(bench: Bench) -> None:
    """Single kernels at sizes of the flagship, as CUDA graphs of one launch."""
    from p2pfast.ops.conv.gpu.configs import describable
    from p2pfast.runtime.gpu.kernels import Operand, Sizes, Window, fused_kernels

    fused = fused_kernels(DEVICE)
    scale = 32 if bench.small else 1
    most = 64 if bench.small else 1024  # channels: the interpreter is slow
    for dtype in (torch.bfloat16, torch.float32):
        size = torch.empty((), dtype=dtype).element_size()

        def timed_here(
            what: str, run: Run, moved: float, work: float = 0.0, short: str = SHORT[dtype]
        ) -> None:
            timed(bench, what, short, run, moved, work)

        for c, h, w in ((64, 512, 1024), (1024, 32, 64)):
            h, w = max(4, h // scale), max(8, w // scale)
            x = torch.randn(1, h, w, c, device=DEVICE).to(dtype)
            out, (s, t) = torch.empty_like(x), torch.ones(2, 1, c, device=DEVICE)
            nbytes = x.numel() * size
            timed_here(f"statistics {c}x{h}x{w}", lambda x=x: fused.statistics(x), nbytes)
            apply = Operand(x, s, t, "relu")
            timed_here(
                f"apply {c}x{h}x{w}",
                lambda a=apply, o=out: fused.apply(a, o, None, "none", 0.0, (0, 0, 0, 0), "zeros"),
                2 * nbytes,
            )
        layers = (
            ("3x3 1024", 1024, 1024, 32, 64, 3, 1, False),
            ("3x3 64", 64, 64, 512, 1024, 3, 1, False),
            ("3x3 s2 32-64", 32, 64, 1024, 2048, 3, 2, False),
            ("3x3 s2 512-1024", 512, 1024, 64, 128, 3, 2, False),
            ("up 1024-512", 1024, 512, 32, 64, 3, 2, True),
            ("up 64-32", 64, 32, 512, 1024, 3, 2, True),
            ("7x7 32-3", 32, 3, 1024, 2048, 7, 1, False),
        )
        for what, c, k, h, w, side, stride, up in layers:
            h, w, c, k = max(4, h // scale), max(8, w // scale), min(c, most), min(k, most)
            oh, ow = (h * 2, w * 2) if up else (h // stride, w // stride)
            window = Window((side, side), stride, (side // 2, side // 2), "zeros", up)
            x = torch.randn(1, h, w, c, device=DEVICE).to(dtype)
            weight = (
                torch.randn(c, k, side, side, device=DEVICE)
                if up
                else torch.randn(k, c, side, side, device=DEVICE)
            )
            out = torch.empty(1, oh, ow, k, device=DEVICE, dtype=dtype)
            s, t = torch.ones(2, 1, c, device=DEVICE)
            work = float(side * side * c * k * (h * w if up else oh * ow))
            moved = float((x.numel() + out.numel()) * size)
            for kind, source in (("plain", Operand(x)), ("prologue", Operand(x, s, t, "relu"))):
                sizes = Sizes(1, (h, w), (oh, ow), (c,), k, kind == "prologue", True)
                tiles = fused.tiles(window, sizes, dtype, DEVICE)
                packed = fused.pack(weight * 0.02, dtype, window, sizes, tiles)
                parts = fused.parts(packed, (oh, ow), tiles)
                partial = torch.empty(1, parts, 2, k, device=DEVICE)
                count = torch.empty(parts, device=DEVICE)
                ways = [tiles]
                if what in ("3x3 1024", "3x3 64") and size == 2 and describable(packed, tiles.config):
                    described = replace(tiles.config, descriptor=True)
                    ways.append(replace(tiles, config=described))
                for way in ways:
                    timed_here(
                        f"conv {what} {kind} {way.name}",
                        functools.partial(
                            fused.conv, [source], packed, way, None, out, window, "none", 0.0, partial, count
                        ),
                        moved,
                        work,
                    )
            image = x.permute(0, 3, 1, 2)
            native = weight.to(dtype).contiguous(memory_format=torch.channels_last)
            torch.backends.cudnn.benchmark = True

            def library(
                i: Tensor = image, n: Tensor = native, up: bool = up, st: int = stride, p: int = side // 2
            ) -> Tensor:
                if up:
                    return nn.functional.conv_transpose2d(i, n, None, st, p, st - 1)
                return nn.functional.conv2d(i, n, None, st, p)

            timed_here(f"conv {what} cuDNN", library, moved, work)
            if dtype == torch.bfloat16 and what in ("3x3 1024", "3x3 s2 32-64", "7x7 32-3"):
                gradients(bench, what, image, out.permute(0, 3, 1, 2), native, stride, moved, work)
    for part in (labels, losses_and_norms):
        try:
            part(bench, 8 if bench.small else 1)
        except Exception as reason:  # the others are still worth their time
            bench.record(what=part.__name__, error=f"{type(reason).__name__}: {reason}")


def gradients(
    bench: Bench, what: str, x: Tensor, grad: Tensor, weight: Tensor, stride: int, moved: float, work: float
) -> None:
    """A layer's two gradients, by the library and by the tile of the own kernels that the model prefers."""
    from p2pfast.ops.conv_norm_act import convolution
    from p2pfast.ops.conv_norm_act.geometry import Geometry

    geometry = Geometry(stride, weight.shape[2] // 2, 0, False, "zeros")
    with torch.no_grad():
        found = {
            "weight": convolution.weight_gradient_ways(grad, x, weight, geometry),
            "data": convolution.data_gradient_ways(grad, x.shape, weight, geometry),
        }
        for kind, ways in found.items():
            for way in (ways[0], ways[-1]):
                timed(bench, f"{kind} gradient {what} {way.__name__}", SHORT[x.dtype], way, moved, work)


def labels(bench: Bench, scale: int) -> None:
    """The first layer from labels, edges and 8-bit pixels."""
    from p2pfast.functional import image_to_uint8, instance_edges
    from p2pfast.runtime.gpu.kernels import fused_kernels

    fused = fused_kernels(DEVICE)
    _, _, given = network(bench, "pix2pixhd-local", 1024 // scale, 2048 // scale, 1)
    ids = given.labels[:, 0].to(torch.uint8).contiguous()
    edges = instance_edges(given.instances[:, 0])
    n, h, w = ids.shape
    timed(bench, "instance_edges", "int32", lambda: instance_edges(given.instances[:, 0]), 5.0 * n * h * w)
    for level, cout in ((0, 32), (1, 64)):
        shape = {
            "batch": n,
            "height": h,
            "width": w,
            "classes": 35,
            "has_edges": True,
            "cout": cout,
            "kernel": 7,
            "pool_levels": level,
            "reflect": True,
            "band_rows": 0,
        }
        packed = fused.label_pack(shape, torch.randn(cout, 36, 7, 7, device=DEVICE), None)
        out = torch.empty(n, h >> level, w >> level, cout, device=DEVICE, dtype=torch.bfloat16)
        parts = fused.label_parts(shape)
        partial, count = torch.empty(n, parts, 2, cout, device=DEVICE), torch.empty(parts, device=DEVICE)
        scratch = torch.empty(max(1, fused.label_scratch(shape)), dtype=torch.uint8, device=DEVICE)

        def run(
            sh: Any = shape,
            p: Tensor = packed,
            s: Tensor = scratch,
            o: Tensor = out,
            a: Tensor = partial,
            c: Tensor = count,
        ) -> None:
            fused.label_conv(sh, ids, edges, p, s, o, a, c)

        timed(bench, f"label_conv 7x7 level {level}", "bfloat16", run, out.nbytes + 2.0 * ids.numel())
    image = torch.rand(1, 3, h, w, device=DEVICE, dtype=torch.bfloat16) * 2 - 1
    timed(bench, "image_uint8", "bfloat16", lambda: image_to_uint8(image), 3.0 * image.numel())


def training(bench: Bench) -> None:
    """Steps of generator and discriminator under autocast, forward and backward, and their peak memory:
    pix2pixHD with feature matching over two scales, pix2pix with L1."""
    from p2pfast.models import MultiscaleDiscriminator, NLayerDiscriminator, norm_layer_of

    torch.backends.cudnn.benchmark = True
    hd = (64, 128) if bench.small else (512, 1024)
    ndf = 4 if bench.small else 64
    for name, (height, width) in (("pix2pixhd-global", hd), ("unet_256", (256, 256))):
        what = f"training step {name} {width}x{height}"
        generator, x, _ = network(bench, name, height, width, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        target = torch.rand(1, 3, height, width, device=DEVICE) * 2 - 1
        channels = x.shape[1] + 3
        judge: nn.Module = NLayerDiscriminator(channels, ndf)
        if name.startswith("pix2pixhd"):
            judge = MultiscaleDiscriminator(
                channels, ndf, 3, norm_layer_of("instance"), num_D=2, getIntermFeat=True
            )
        for engine in ("eager AMP", "p2pfast AMP", "torch.compile AMP"):
            if bench.left < 8:
                return
            made = []
            for module in (generator, judge):
                net: Any = copy.deepcopy(module).to(DEVICE, memory_format=torch.channels_last).train()
                if engine.startswith("p2pfast"):
                    net = p2pfast.optimize(net, mode="train")
                made.append(torch.compile(net) if engine.startswith("torch.compile") else net)
            try:
                train(bench, what, engine, made[0], made[1], x, target)
            except Exception as reason:
                text = f"{type(reason).__name__}: {reason}"
                bench.record(what=what, engine=engine, dtype="bfloat16", error=text)
            del made, net
            forget()


def eager_gan(prediction: Any, real: bool) -> Tensor:
    """Least squares over scales, whose last features are the prediction, as the published code writes it."""
    scales = prediction if isinstance(prediction, (list, tuple)) else [[prediction]]
    last = [scale[-1].float() for scale in scales]
    return sum((nn.functional.mse_loss(p, torch.full_like(p, float(real))) for p in last), torch.zeros(()))


def eager_features(fake: Any, real: Any) -> Tensor:
    total = torch.zeros((), device=DEVICE)
    for f, r in zip(fake, real, strict=True):
        for a, b in zip(f[:-1], r[:-1], strict=True):
            total = total + 10.0 / len(fake) * nn.functional.l1_loss(a.float(), b.float().detach())
    return total


def train(
    bench: Bench, what: str, engine: str, g: nn.Module, d: nn.Module, x: Tensor, target: Tensor
) -> None:
    from p2pfast.nn import FeatureMatchingLoss, GANLoss, L1Loss

    fused = engine.startswith("p2pfast")
    gan: Any = GANLoss("lsgan") if fused else eager_gan
    features: Any = FeatureMatchingLoss() if fused else eager_features
    l1: Any = L1Loss(100.0) if fused else lambda y, t: 100.0 * nn.functional.l1_loss(y, t)

    def step() -> Tensor:
        for net in (g, d):
            net.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            fake = g(x)
            on_real, on_fake = d(torch.cat([x, target], 1)), d(torch.cat([x, fake.detach()], 1))
            of_judge = gan(on_real, True) + gan(on_fake, False)
        of_judge.backward()
        for p in d.parameters():
            p.requires_grad_(False)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            on_real = d(torch.cat([x, target], 1))
            on_fake = d(torch.cat([x, fake], 1))
            of_g = gan(on_fake, True)
            of_g = of_g + (
                features(on_fake, on_real) if isinstance(on_fake, list) else l1(fake.float(), target)
            )
        of_g.backward()
        for p in d.parameters():
            p.requires_grad_(True)
        return (of_judge + of_g).detach()

    first = float(step())
    synchronize()
    step()
    forget()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    seconds = calls(step)
    bench.record(
        what=what,
        engine=engine,
        dtype="bfloat16",
        ms=gpu_record.median_ms(seconds),
        loss=first,
        step_mb=(peak_bytes() - before) * 1e-6,
    )


def losses_and_norms(bench: Bench, scale: int) -> None:
    """Training's kernels: instance norm with ReLU forward and backward, losses with their gradient."""
    from p2pfast.nn import FeatureMatchingLoss, GANLoss
    from p2pfast.ops.norm_act.op import norm_act, norm_act_backward

    for dtype in (torch.bfloat16, torch.float32):
        for c, h, w in ((64, 512, 1024), (1024, 32, 64)):
            h, w = h // scale, w // scale
            x = torch.randn(1, c, h, w, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
            name = f"instance norm + relu {c}x{h}x{w}"
            run = functools.partial(norm_act, x, act="relu")
            timed(bench, f"{name} forward", SHORT[dtype], run, 3.0 * x.nbytes)
            _, mean, variance = norm_act(x, act="relu")
            numbers = (mean, variance, False, 1e-5, "relu", 0.0, None, False)
            back = functools.partial(norm_act_backward, x, x, None, None, *numbers)
            timed(bench, f"{name} backward", SHORT[dtype], back, 5.0 * x.nbytes)
        shapes = [(1, 64 << min(i, 3), 512 // scale >> i, 1024 // scale >> i) for i in range(1, 4)]
        fake = [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]
        real = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]
        nbytes = sum(t.nbytes for t in real)
        matching, gan = FeatureMatchingLoss(), GANLoss("lsgan")

        def match(fake: Any = fake, real: Any = real, loss: Any = matching) -> Any:
            return loss([[*fake, fake[-1]]], [[*real, real[-1]]])

        timed(bench, "feature matching, with its gradient", SHORT[dtype], match, 3.0 * nbytes)
        judged = functools.partial(gan, [[t] for t in fake], True)
        timed(bench, "lsgan, with its gradient", SHORT[dtype], judged, 2.0 * nbytes)


def translate(bench: Bench) -> None:
    """Label maps in files to JPEG files."""
    from p2pfast.data.images import write_image
    from p2pfast.data.scenes import draw_scene
    from p2pfast.pipeline import network as networks_of
    from p2pfast.pipeline import sizes
    from p2pfast.pipeline import translate as pipeline
    from p2pfast.pipeline.files import Item

    height, width, count = (64, 128, 4) if bench.small else (1024, 2048, 96)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        items = []
        for i in range(min(4, count)):
            scene = draw_scene(i, width=width, height=height, photo=False)
            write_image(root / f"label{i}.png", scene.labels.astype("uint8"))
        for i in range(count):
            items.append(Item(f"{i}", root / f"label{i % 4}.png", None, root / f"out{i}.jpg"))
        model = p2pfast.models.build(
            "pix2pixhd-local", input_nc=35, **({"ngf": 2} if bench.small else {})
        ).eval()
        net = networks_of.prepare(model, torch.bfloat16, DEVICE)
        job = pipeline.Job(net, 35, sizes.SizePolicy("original"))
        pipeline.translate(job, items[:3])
        report = pipeline.translate(job, items)
        bench.record(
            what=f"translate {width}x{height} to JPEG",
            dtype="bfloat16",
            images_s=report.done / report.seconds,
            failures=len(report.failures),
            cores=os.cpu_count(),
        )


SECTIONS = {f.__name__: f for f in (correctness, sanitizer, ceilings, flagship, kernels, networks, compiled)}
SECTIONS |= {f.__name__: f for f in (training, translate, tuned, compile)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=sorted(SECTIONS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--cpu", action="store_true", help="try the code in Triton's interpreter, with --scale small"
    )
    parser.add_argument("--worker", help="N/M: one of M processes that compile for a section")
    options = parser.parse_args()
    os.environ.setdefault("P2PFAST_TUNE", "off")
    if options.cpu:
        from p2pfast.runtime.gpu import engine

        global DEVICE
        DEVICE, engine.on_cpu = torch.device("cpu"), {}
    if options.worker:
        name = f"{options.section}-{options.worker.replace('/', '-of-')}"
        small = options.scale == "small"
        bench = Bench(gpu_record.Recorder(options.folder, name), small, options.seconds, compiles=True)
        only_compile(*(int(part) for part in options.worker.split("/")))
        (tuned_share if options.section == "tuned" else compile_share)(bench)
        return
    record = gpu_record.Recorder(options.folder, options.section)
    SECTIONS[options.section](Bench(record, options.scale == "small", options.seconds))


if __name__ == "__main__":
    main()
