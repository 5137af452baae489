"""Our vector index beside hnswlib: build time and the curve of recall against queries a second.

Both work on the same vectors in one run, so that a noisy machine does not decide. hnswlib (M 16, ef_construction 200,
built with all cores) searches before and after ours and the best of all its rounds counts, which favours it; cosine is
done as the inner product of vectors normalised beforehand, its fastest way. Both search one query after another on one
thread, k = 10, in process. The data set is a folder whose dataset.json names its metric and its files (.npy, or
gzipped IDX of bytes): the base, the queries and the exact truth.

Needs `pip install hnswlib numpy matplotlib` (hnswlib is compiled for this machine) and a release build. An example:

    python benches/peers.py --dataset DIR --svg docs/recall.svg --csv recall.csv -- --seconds 2

What follows `--` goes to `kiss-vdb bench`; where it prints an ef more than once, the best counts, as for hnswlib.
"""

import argparse
import gzip
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import hnswlib
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

K, M, EF_CONSTRUCTION = 10, 16, 200
TARGETS = (0.90, 0.95, 0.99)
EFS = "10,12,16,20,24,32,40,50,64,80,100,128,160,200,256,320,400"


class Point(NamedTuple):
    recall: float
    rates: list[float]


Curve = dict[int, Point]


def read_array(path: Path) -> np.ndarray:
    """A .npy file, or a gzipped IDX file of bytes: type and rank, then the big-endian shape, then the numbers."""
    if path.suffix != ".gz":
        return np.asarray(np.load(path))
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape[0], -1)


def read_vectors(path: Path, metric: str) -> np.ndarray:
    vectors = np.ascontiguousarray(read_array(path), dtype=np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def build_hnswlib(base: np.ndarray, metric: str, threads: int) -> tuple[hnswlib.Index, float]:
    index = hnswlib.Index(space="l2" if metric == "l2" else "ip", dim=base.shape[1])
    index.init_index(max_elements=len(base), M=M, ef_construction=EF_CONSTRUCTION)
    started = time.perf_counter()
    index.add_items(base, num_threads=threads)
    return index, time.perf_counter() - started


def sweep_hnswlib(index: hnswlib.Index, queries: np.ndarray, truth: np.ndarray, curve: Curve, efs: list[int]) -> None:
    """One round over every ef, added to the curve. One call takes all queries: the loop over them runs in C++."""
    for ef in efs:
        index.set_ef(ef)
        started = time.perf_counter()
        found, _ = index.knn_query(queries, k=K, num_threads=1)
        rate = len(queries) / (time.perf_counter() - started)
        recall = float((found[:, :, None] == truth[:, None, :K]).sum() / found.size)
        curve.setdefault(ef, Point(recall, [])).rates.append(rate)


def run_ours(command: str, dataset: Path, efs: list[int], extra: list[str]) -> tuple[Curve, float, int]:
    """Runs our bench and reads its lines: the curve, the seconds of the build and its threads."""
    flags = ["--only", "index", "--dataset", str(dataset), "--json", "--ef", ",".join(map(str, efs)), *extra]
    words = [*shlex.split(command), "bench", *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(words)} ended with {done.returncode}")
    build: dict[str, float] = {}
    curve: Curve = {}
    for line in map(json.loads, done.stdout.splitlines()):
        if line.get("step") == "index.build":
            build = line
        elif line.get("step") == "index.search":
            curve.setdefault(line["ef"], Point(line["recall"], [])).rates.append(line["qps"])
    if not build or not curve.keys() >= set(efs):
        sys.exit(f"{shlex.join(words)} did not print index.build and an index.search for every ef")
    return curve, build["seconds"], int(build["threads"])


def rate_at(curve: Curve, target: float) -> tuple[float, bool] | None:
    """The best rate at a recall, log-linear between points; true where even the fastest point has more recall."""
    recalls, rates = np.array(sorted((point.recall, max(point.rates)) for point in curve.values())).T
    rates = np.maximum.accumulate(rates[::-1])[::-1]
    if target > recalls[-1]:
        return None
    return float(np.exp(np.interp(target, recalls, np.log(rates)))), bool(target < recalls[0])


def print_tables(ours: Curve, peer: Curve, seconds: tuple[float, float], threads: tuple[int, int]) -> None:
    print("| ef | ours: recall | best q/s | median | hnswlib: recall | best q/s | median |")
    print("| --: | --: | --: | --: | --: | --: | --: |")
    for ef in sorted(peer):
        cells = [f"{p.recall:.4f} | {max(p.rates):,.0f} | {median(p.rates):,.0f}" for p in (ours[ef], peer[ef])]
        print(f"| {ef} | {' | '.join(cells)} |")
    print("\n| | ours | hnswlib | ours / hnswlib |\n| --- | --: | --: | --: |")
    for target in TARGETS:
        found = [rate_at(curve, target) for curve in (ours, peer)]
        cells = [f"{rate[0]:,.0f}{'*' if rate[1] else ''}" if rate else "not reached" for rate in found]
        ratio = f"{found[0][0] / found[1][0]:.2f}" if found[0] and found[1] else ""
        print(f"| q/s at recall {target:.2f} | {cells[0]} | {cells[1]} | {ratio} |")
    cells = [f"{taken:.1f} s, {count} threads" for taken, count in zip(seconds, threads, strict=True)]
    print(f"| build (less is better) | {cells[0]} | {cells[1]} | {seconds[0] / seconds[1]:.2f} |")
    print("\n\\* marks the fastest point measured, where even that one has a higher recall.")


def write_csv(path: Path, curves: dict[str, Curve]) -> None:
    rows = ["index,ef,recall,qps_best,qps_median"]
    for name, curve in curves.items():
        for ef, (recall, rates) in sorted(curve.items()):
            rows.append(f"{name},{ef},{recall:.4f},{max(rates):.1f},{median(rates):.1f}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def draw(path: Path, title: str, curves: dict[str, Curve]) -> None:
    # Letters as outlines, so that no font is needed to show them; no date and fixed ids, so that a diff means a change.
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "peers", "font.size": 10})
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour, marker in zip(curves.items(), ("#0b6bcb", "#d9730d"), "os", strict=True):
        points = sorted((point.recall, max(point.rates)) for point in curve.values() if point.recall >= 0.85)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=name)
    axes.set(xlim=(0.85, 1.002), yscale="log", xlabel=f"recall@{K}", ylabel="queries a second, one thread (log)")
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.xaxis.set_major_locator(MultipleLocator(0.025))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, format="svg", metadata={"Date": None})


def machine_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with a dataset.json")
    parser.add_argument("--ours", default="target/release/kiss-vdb", help="our command")
    parser.add_argument("--ef", default=EFS, help="values of ef, for both")
    parser.add_argument("--rounds", type=int, default=3, help="hnswlib's rounds before ours, and again after")
    parser.add_argument("--machine", default=machine_name(), help="the machine's name in the title")
    parser.add_argument("--svg", type=Path, help="draws the curve into this file")
    parser.add_argument("--csv", type=Path, help="writes the points into this file")
    parser.add_argument("extra", nargs="*", help="after --: further flags for our command")
    options = parser.parse_args()
    efs = sorted({int(ef) for ef in options.ef.split(",")})
    about = json.loads((options.dataset / "dataset.json").read_text(encoding="utf-8"))
    base, queries = (read_vectors(options.dataset / about[part], about["metric"]) for part in ("base", "queries"))
    truth = np.load(options.dataset / about["gt"])
    threads = os.cpu_count() or 1
    title = f"{about['name']}: {len(base):,} x {base.shape[1]}, {about['metric']} ({options.machine})"
    index, peer_seconds = build_hnswlib(base, about["metric"], threads)
    peer: Curve = {}
    for _ in range(options.rounds):
        sweep_hnswlib(index, queries, truth, peer, efs)
    ours, seconds, our_threads = run_ours(options.ours, options.dataset, efs, options.extra)
    for _ in range(options.rounds):
        sweep_hnswlib(index, queries, truth, peer, efs)

    print(f"{title}\n{len(queries):,} queries, one thread, k = {K}. hnswlib: M {M}, ef_construction {EF_CONSTRUCTION},")
    print(f"the best of {options.rounds} rounds before and {options.rounds} after ours, which favours it.\n")
    print_tables(ours, peer, (seconds, peer_seconds), (our_threads, threads))
    curves = {"KISS VDB": ours, "hnswlib": peer}
    if options.csv:
        write_csv(options.csv, curves)
    if options.svg:
        draw(options.svg, title, curves)


if __name__ == "__main__":
    main()
