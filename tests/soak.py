#!/usr/bin/env python3
"""Hours in minutes: a mixed load of constant size, under which nothing may grow.

    python3 tests/soak.py target/release/kiss-vdb

Puts, patches and deletes over a fixed set of keys, keys that expire, batches, vectors that replace each other, searches, streams
that come and go, snapshots, a log that rotates. Every ten seconds memory, files, threads and disk are read from outside.
The first third warms up. Then the last third must be like the middle one: the median of memory at most a tenth and 8 MiB
above, files and threads the same, the disk within its settings. Streams are closed while a sample is
taken, so that what is open then is the server's own.

KISS_SOAK_MINUTES (default 30) says how long, KISS_SOAK_RATE (default 400) how many operations a second.
"""

import http.client
import json
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MINUTES = float(os.environ.get("KISS_SOAK_MINUTES", "30"))
RATE = float(os.environ.get("KISS_SOAK_RATE", "400"))
SAMPLE_S = 10
KEYS, VECTORS, DIM = 2000, 3000, 64
MAX_LOG_MB = 8
MIB = 1 << 20
WORKERS = 4

# Log: MAX_LOG_MB and a segment, and one being made. Snapshots: three of at most 2 MiB here. Vectors: rows in chunks,
# slots.log twice, the graph with its predecessor. Generous; what leaks passes it, and the slope is judged apart.
DATA_FILES_MAX = 40
DISK_MIB_MAX = MAX_LOG_MB + 2 * 1 + 3 * 2 + 2 * 32 + 8 + 8


def start(binary, data):
    settings = ["--port", "0", "--data-dir", str(data), "--max-log-mb", str(MAX_LOG_MB), "--snapshot-interval", "15"]
    with open(f"{data}.log", "w") as log:
        server = subprocess.Popen([binary, "serve", *settings, "--log-level", "warn"], stdout=subprocess.PIPE, stderr=log, text=True)
    port = int(re.search(r"ready at http://\S+?:(\d+)", server.stdout.readline())[1])
    return server, port


class Load:
    """What the workers share: the rate, what they did, what went wrong."""

    def __init__(self, port):
        self.port = port
        self.is_over = threading.Event()
        self.rest = threading.Event()  # asks for a pause in which streams are closed
        self.resting = threading.Barrier(WORKERS + 1)
        self.counts, self.errors = {}, []
        self.lock = threading.Lock()

    def did(self, name):
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1


class Worker(threading.Thread):
    """One client with a connection of its own and up to four streams."""

    def __init__(self, load, seed):
        super().__init__(daemon=True)
        self.load, self.seed, self.random = load, seed, random.Random(seed)
        self.http = http.client.HTTPConnection("127.0.0.1", load.port, timeout=30)
        self.streams = []

    def call(self, method, path, body=None, good=(200, 201)):
        self.http.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        response = self.http.getresponse()
        text = response.read()
        if response.status not in good:
            raise AssertionError(f"{method} {path}: {response.status} {text[:200]}")
        return json.loads(text)

    def vector(self):
        return [self.random.uniform(-1, 1) for _ in range(DIM)]

    def item(self):
        n = self.random.randrange(VECTORS)
        return {"id": f"v{n}", "vector": self.vector(), "meta": {"lang": ["es", "en", "de"][n % 3], "n": self.random.randrange(100)}}

    def key(self):
        return f"key:{self.random.randrange(KEYS)}"

    def value(self):
        return {"n": self.random.randrange(1000), "text": "x" * 200}

    # What it does, with its share.

    def put(self):
        self.call("PUT", f"/v1/state/{self.key()}", {"value": self.value(), "meta": {"tags": ["a"]}})

    def patch(self):
        self.call("PATCH", f"/v1/state/{self.key()}", {"n": self.random.randrange(1000)})

    def delete(self):
        self.call("DELETE", f"/v1/state/{self.key()}", good=(200, 404))

    def expire(self):
        self.call("PUT", f"/v1/state/ttl:{self.random.randrange(KEYS)}", {"value": self.value(), "ttl_ms": self.random.randrange(100, 3000)})

    def read(self):
        self.call("GET", f"/v1/state/{self.key()}", good=(200, 404))

    def list(self):
        self.call("GET", "/v1/state?prefix=key:1&limit=100")

    def batch(self):
        ops = [{"op": "put", "key": self.key(), "value": self.value()} for _ in range(8)]
        ops += [{"op": "event", "type": "progress", "data": {"n": 1}}, {"op": "vector_upsert", "collection": "docs", **self.item()}]
        self.call("POST", "/v1/batch", {"ops": ops})

    def upsert(self):
        self.call("POST", "/v1/vector/docs/upsert", {"items": [self.item() for _ in range(4)]})

    def search(self):
        filters = {"filters": {"lang": "es"}} if self.random.random() < 0.5 else {}
        self.call("POST", "/v1/vector/docs/search", {"vector": self.vector(), "k": 10, "include_meta": True, **filters})

    def history(self):
        self.http.request("GET", f"/v1/events?since={max(0, self.head() - 200)}&limit=100", headers={"Accept": "application/json"})
        self.http.getresponse().read()

    def head(self):
        return self.call("GET", "/v1/health")["revision"]

    def stream(self):
        query = self.random.choice(["", "prefix=key:1", "key=key:7", "types=progress", "collection=docs", "prefix=key:12&snapshot=true", "since"])
        if query == "since":
            query = f"since={max(1, self.head() - self.random.randrange(2000))}"
        http_ = http.client.HTTPConnection("127.0.0.1", self.load.port, timeout=30)
        http_.request("GET", f"/v1/events?heartbeat_ms=1000&{query}", headers={"Accept": "text/event-stream"})
        response = http_.getresponse()
        assert response.status == 200 and response.readline().startswith(b"retry")
        self.streams.append((http_, response))
        if len(self.streams) > 4:
            self.leave(self.streams.pop(0))

    def leave(self, stream):
        # Some streams are read for a while first, the others are left with what the kernel holds.
        http_, response = stream
        if self.random.random() < 0.5:
            response.read1(64 << 10)
        response.close()
        http_.close()

    SHARES = {"put": 25, "patch": 15, "delete": 6, "expire": 12, "read": 15, "list": 3, "batch": 5, "upsert": 6, "search": 8, "history": 2, "stream": 3}

    def run(self):
        names, shares = list(self.SHARES), list(self.SHARES.values())
        due = time.monotonic()
        while not self.load.is_over.is_set():
            try:
                if self.load.rest.is_set():
                    while self.streams:
                        self.leave(self.streams.pop())
                    self.load.resting.wait(60)  # all are at rest
                    self.load.resting.wait(60)  # the sample is taken
                    due = time.monotonic()
                name = self.random.choices(names, shares)[0]
                getattr(self, name)()
                self.load.did(name)
            except Exception as error:  # any failure ends the run, with its reason
                self.load.errors.append(f"{type(error).__name__}: {error}")
                self.load.is_over.set()
                self.load.resting.abort()
                return
            due = max(due + WORKERS / RATE, time.monotonic() - 1)
            self.load.is_over.wait(max(0, due - time.monotonic()))


def sample(server, data, port):
    """Memory in MiB, files, threads, disk in MiB, seconds of processor."""
    proc = pathlib.Path(f"/proc/{server.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    disk = 0
    for folder, _, files in os.walk(data):
        for name in files:
            try:
                disk += os.stat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:  # dropped meanwhile
                continue
    # Segments and snapshots come and go with the log; all else that is open must stay.
    links = []
    for descriptor in os.listdir(proc / "fd"):
        try:
            links.append(os.readlink(proc / "fd" / descriptor))
        except FileNotFoundError:  # closed meanwhile
            continue
    data_files = sum(link.startswith(str(data)) for link in links)
    ticks = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    # What one request knows: how many streams and connections the server still counts.
    http_ = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    http_.request("GET", "/v1/metrics", headers={"Connection": "close"})
    metrics = http_.getresponse().read().decode()
    gauge = lambda name: float(re.search(rf"^{name} (\S+)$", metrics, re.M)[1])
    return {
        # Of the mapped rows only what is touched is resident, so they are counted: they too must not grow.
        "rss": int(status["VmRSS"].split()[0]) / 1024,
        "anonymous": int(status["RssAnon"].split()[0]) / 1024,
        "files": len(links) - data_files,
        "data_files": data_files,
        "threads": int(status["Threads"]),
        "disk": disk / MIB,
        "cpu": (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK"),
        "streams": gauge("kiss_streams"),
        "revision": gauge("kiss_revision"),
        "oldest": gauge("kiss_oldest_revision"),
        "keys": gauge("kiss_keys"),
    }


def judge(samples):
    """What grew from the middle third to the last; nothing, if all is well."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    found = []
    of = lambda part, name: [s[name] for s in part]
    for name in ("rss", "anonymous"):
        before, after = statistics.median(of(middle, name)), statistics.median(of(last, name))
        if after > before * 1.1 + 8:
            found.append(f"{name}: median {before:.1f} MiB, then {after:.1f} MiB")
    for name in ("files", "threads"):
        # The median: threads for blocking work come and go.
        before, after = statistics.median(of(middle, name)), statistics.median(of(last, name))
        if after != before:
            found.append(f"{name}: median {before}, then {after}")
    if (most := max(of(samples, "data_files"))) > DATA_FILES_MAX:
        found.append(f"files of data: {most}, more than {DATA_FILES_MAX}")
    if (most := max(of(samples, "disk"))) > DISK_MIB_MAX:
        found.append(f"disk: {most:.1f} MiB, more than {DISK_MIB_MAX}")
    before, after = statistics.median(of(middle, "disk")), statistics.median(of(last, "disk"))
    if after > before * 1.1 + 2:
        found.append(f"disk: median {before:.1f} MiB, then {after:.1f} MiB")
    if any(of(samples, "streams")):
        found.append("streams are counted after all were closed")
    if samples[-1]["oldest"] <= middle[0]["revision"]:
        found.append("the log did not rotate: the run is too short to say anything")
    return found


def check_the_judge(samples):
    """It must see what leaks, or a pass means nothing."""
    leak = lambda name, by: [s | {name: s[name] + by * i} for i, s in enumerate(samples)]
    total = len(samples)
    for name, by in {"rss": 150 / total, "anonymous": 150 / total, "files": 12 / total, "threads": 12 / total, "data_files": 60 / total, "disk": 60 / total}.items():
        assert judge(leak(name, by)), f"the judge does not see a leak of {name}"


def rest_and_sample(load, server, data):
    load.rest.set()
    load.resting.wait(60)
    load.rest.clear()
    try:
        # Closed connections are noticed within moments; then everything is at rest.
        end = time.monotonic() + 10
        while (taken := sample(server, data, load.port))["streams"] and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        load.resting.wait(60)
    return taken


def run(binary, data):
    server, port = start(binary, data)
    try:
        load = Load(port)
        workers = [Worker(load, seed) for seed in range(WORKERS)]
        workers[0].call("POST", "/v1/vector/docs", {"dim": DIM, "metric": "cosine"})
        for n in range(0, VECTORS, 500):
            items = [{"id": f"v{i}", "vector": workers[0].vector(), "meta": {"lang": "es"}} for i in range(n, n + 500)]
            workers[0].call("POST", "/v1/vector/docs/upsert", {"items": items})
        for worker in workers:
            worker.start()
        samples, started = [], time.monotonic()
        while time.monotonic() - started < MINUTES * 60 and not load.is_over.wait(SAMPLE_S):
            try:
                taken = rest_and_sample(load, server, data)
            except threading.BrokenBarrierError:
                break
            taken["at"] = time.monotonic() - started
            samples.append(taken)
            print("{at:6.0f} s  {rss:6.1f} MiB ({anonymous:.1f} anonymous)  {files} + {data_files} files  {threads} threads  disk {disk:5.1f} MiB"
                  "  cpu {cpu:.0f} s  keys {keys:.0f}  log {oldest:.0f} to {revision:.0f}".format(**taken), flush=True)
        load.is_over.set()
        for worker in workers:
            worker.join(60)
        assert not load.errors, f"{load.errors}, and the server says: {pathlib.Path(f'{data}.log').read_text()[-2000:]}"
        assert len(samples) >= 9, f"{len(samples)} samples are too few to tell; KISS_SOAK_MINUTES is 2 at the least"
        print("did " + ", ".join(f"{count} {name}" for name, count in sorted(load.counts.items())))
        if found := judge(samples):
            print("\n".join(f"GREW {finding}" for finding in found))
            return 1
        check_the_judge(samples)
        print("nothing grew")
        server.terminate()
        assert server.wait(60) == 0, "an orderly stop"
        subprocess.run([binary, "check", str(data)], check=True)
        return 0
    finally:
        server.kill()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = tempfile.mkdtemp(prefix="kiss-soak-")
    try:
        sys.exit(run(sys.argv[1], os.path.join(folder, "data")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
