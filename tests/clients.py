#!/usr/bin/env python3
"""Python's SSE clients, and curl, against a real server that is killed, shortened and replaced under them.

    .venv/bin/pip install -r tests/requirements.txt
    .venv/bin/python tests/clients.py target/release/kiss-vdb

httpx-sse, sseclient-py and curl know nothing of reconnecting: each is used in the loop its manual shows, which keeps the
last id and sends it as Last-Event-ID. The oracle is what was acknowledged to the writers. tests/clients.mjs does the same
with clients that come back by themselves.
"""

import http.client
import json
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import httpx
import requests
import sseclient
from httpx_sse import connect_sse

BANNER = re.compile(r"ready at (http://\S+)")
DEADLINE_S = 20


def until(what, check, seconds=DEADLINE_S):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := check():
            return value
        time.sleep(0.02)
    raise AssertionError(f"never: {what() if callable(what) else what}")


def free_port():
    """A free port below those the kernel gives to connections: nobody takes it while its server is down."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def call(base, method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data=data, method=method, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


class Server:
    """A server that can be killed and started again on its port."""

    def __init__(self, binary, port, data):
        self.binary, self.port, self.data = binary, port, data
        self.url = f"http://127.0.0.1:{port}"
        self.up = threading.Event()

    def start(self):
        settings = ["--data-dir", str(self.data), "--max-log-mb", "2", "--snapshot-interval", "0", "--log-level", "warn"]
        command = [self.binary, "serve", "--port", str(self.port), *settings]
        with open(f"{self.data}.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        if not BANNER.search(self.process.stdout.readline()):
            raise AssertionError(f"the server did not start: {pathlib.Path(log.name).read_text()[-2000:]}")
        self.up.set()
        return self

    def kill(self):
        self.up.clear()
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.up.clear()
        self.process.terminate()
        assert self.process.wait(30) == 0, "an orderly stop"

    def compact(self, revision):
        """Writes what no client watches until the log no longer reaches back to `revision`."""
        for n in range(40):
            if call(self.url, "GET", "/v1/health")["oldest"] > revision:
                return
            for i in range(4):
                call(self.url, "PUT", f"/v1/state/bulk:{i}", {"value": "x" * 400_000 + str(n)})
            call(self.url, "POST", "/v1/admin/snapshot")
        raise AssertionError("the log is not shortened")


class Writer:
    """Writes the sequence and knows what of it was acknowledged."""

    def __init__(self, server):
        self.server = server
        self.acked = {}  # revision -> value
        self.unsure = set()  # sent, and not answered because the server died
        self.next = 0
        self.lock = threading.Lock()

    @property
    def last(self):
        with self.lock:
            return max(self.acked)

    def step(self):
        with self.lock:
            n, self.next = self.next, self.next + 1
        while True:
            try:
                revision = call(self.server.url, "PUT", f"/v1/state/seq:{n}", {"value": n})["revision"]
                with self.lock:
                    self.acked[revision] = n
                return
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException, ValueError):  # refused, reset, or cut within the answer
                with self.lock:
                    self.unsure.add(n)
                assert self.server.up.wait(DEADLINE_S)

    def write(self, count):
        """Four at a time, so that the log orders what was sent at once. Returns the threads."""
        threads = [threading.Thread(target=lambda: [self.step() for _ in range(count // 4)], daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        return threads


def check(events, after, last, acked, unsure, others=frozenset()):
    """The oracle: every acknowledged revision after `after`, once, in order, as it was written.

    `others` are the revisions of other writers. What was sent and never answered may be there, once for each time.
    """
    seen, before = set(), after
    for event_id, data in events:
        assert event_id == data["revision"], f"id {event_id}, revision {data['revision']}"
        assert event_id > before, f"{event_id} after {before}: twice or out of order"
        if event_id in acked:
            assert data["value"] == acked[event_id], f"revision {event_id} is {data}"
        else:
            assert data["value"] in unsure, f"{data} was never written"
        seen.add(event_id)
        before = event_id
    missing = set(range(after + 1, last + 1)) - seen - others
    assert not missing, f"missing: {sorted(missing)[:5]}"
    assert not events or before == last, "there is something beyond the last"


def check_the_oracle(events, *facts):
    """The oracle must see through these, or it proves nothing."""
    half = len(events) // 2
    one, two = events[half], events[half + 1]
    for name, broken in {
        "dropped": events[:half] + events[half + 1 :],
        "first dropped": events[1:],
        "last dropped": events[:-1],
        "doubled": events[:half] + [one] + events[half:],
        "swapped": events[:half] + [two, one] + events[half + 2 :],
        "altered": events[:half] + [(one[0], one[1] | {"value": -1})] + events[half + 1 :],
    }.items():
        try:
            check(broken, *facts)
        except AssertionError:
            continue
        raise SystemExit(f"the oracle does not see an event {name}")


class Client:
    """A stream, opened again with the last id each time it ends. `frames` yields (type, id, data, retry)."""

    def __init__(self, name, url, frames, takes_bare_ids, since=None):
        self.name, self.url, self.frames, self.takes_bare_ids = name, url, frames, takes_bare_ids
        self.last, self.retry_s, self.opens, self.is_over = "", 1.0, 0, False
        self.log, self.positions, self.errors = [], [], []
        if since is not None:
            self.url += f"&since={since}"
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.is_over:
            headers = {"Last-Event-ID": self.last} if self.last else {}
            try:
                for kind, event_id, data, retry in self.frames(self.url, headers, self):
                    if event_id:
                        self.last = event_id
                        self.positions.append(int(event_id))
                    if retry:
                        self.retry_s = int(retry) / 1000
                    if data:
                        self.log.append((kind, int(event_id or 0), json.loads(data)))
                self.errors.append("ended")
            except (httpx.HTTPError, requests.RequestException, OSError) as error:
                self.errors.append(repr(error))
            time.sleep(self.retry_s)

    @property
    def events(self):
        return [(i, data) for kind, i, data in self.log if kind != "reset"]

    @property
    def resets(self):
        return [(i, data) for kind, i, data in self.log if kind == "reset"]

    @property
    def at(self):
        return self.log[-1][1] if self.log else 0


def by_httpx_sse(url, headers, client):
    with httpx.Client(timeout=httpx.Timeout(5, read=30)) as http, connect_sse(http, "GET", url, headers=headers) as source:
        source.response.raise_for_status()
        client.opens += 1
        for sse in source.iter_sse():
            yield sse.event, sse.id, sse.data, sse.retry


def by_sseclient(url, headers, client):
    with requests.get(url, headers=headers | {"Accept": "text/event-stream"}, stream=True, timeout=(5, 30)) as response:
        response.raise_for_status()
        client.opens += 1
        for event in sseclient.SSEClient(response).events():
            yield event.event, event.id, event.data, event.retry


def by_curl(url, headers, client):
    options = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    with subprocess.Popen(["curl", "-sS", "-N", "--fail", *options, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        fields = {}
        for line in process.stdout:
            if "retry" in line:
                client.opens += 1
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                fields[name] = value
                continue
            # Only an empty line makes a frame: a torn one is none.
            yield fields.get("event"), fields.get("id"), fields.get("data"), fields.get("retry")
            fields = {}
        process.wait()
        raise OSError(f"curl ended with {process.returncode}")


def step(name, test):
    started = time.monotonic()
    test()
    print(f"ok   {name} ({round((time.monotonic() - started) * 1000)} ms)", flush=True)


def run(binary, folder):
    server = Server(binary, free_port(), folder / "data").start()
    url = server.url
    first = call(url, "PUT", "/v1/state/before", {"value": 0})["revision"]
    writer, others = Writer(server), set()
    kinds = [("httpx-sse", by_httpx_sse, True), ("sseclient-py", by_sseclient, False), ("curl", by_curl, True)]
    # sseclient-py keeps frames without data to itself, ids included. So it begins at a known revision, or it would
    # come back without any id if the server went before its first event, and start at the head.
    make = lambda key, who: [
        Client(f"{who}{name}", f"{url}/v1/events?heartbeat_ms=1000&{key}", frames, bare, None if bare else first)
        for name, frames, bare in kinds
    ]
    loud, quiet = make("prefix=seq:", ""), make("key=quiet", "quiet ")
    clients = loud + quiet
    states = lambda: "\n".join(f"{c.name}: at {c.at}, {c.opens} times open, {c.errors[-2:]}" for c in clients)
    each = lambda what, who, holds: until(lambda: f"{what}\n{states()}", lambda: all(holds(c) for c in who))
    each("open", clients, lambda c: c.opens == 1)

    def settled():
        last = writer.last
        each("everything", loud, lambda c: c.at >= last)
        for client in loud:
            after = client.resets[-1][0] if client.resets else first
            events = [(i, data) for i, data in client.events if i > after]
            facts = (after, last, writer.acked, writer.unsure, others)
            try:
                check(events, *facts)
            except AssertionError as error:
                raise AssertionError(f"{client.name}: {error}") from error
            check_the_oracle(events, *facts)

    def forget():
        for client in clients:
            client.log.clear()

    def kills():
        for round_ in (1, 2):
            goal = len(writer.acked) + 100
            threads = writer.write(200)
            each("some", loud, lambda c: c.events)
            until("half", lambda: len(writer.acked) >= goal)
            server.kill()
            server.start()
            for thread in threads:
                thread.join(DEADLINE_S)
            each("open again", clients, lambda c: c.opens == round_ + 1)
        settled()
        assert len(writer.acked) == 400 and not any(c.resets for c in clients) and not any(c.events for c in quiet)
        assert all(len(c.errors) >= 2 for c in clients), "each client noticed"
        print(f"     {len(writer.acked)} acknowledged, {len(writer.unsure)} unsure, {len(loud)} clients")

    def heartbeats():
        nonlocal first
        first = writer.last
        forget()
        server.compact(first)
        head = call(url, "GET", "/v1/health")["revision"]
        others.update(range(first + 1, head + 1))
        sees_ids = [c for c in clients if c.takes_bare_ids]
        each("a heartbeat", sees_ids, lambda c: c.positions[-1] >= head)
        server.kill()
        server.start()
        each("open again", clients, lambda c: c.opens == 4 and (c.takes_bare_ids or c.resets))
        for client in clients:
            reasons = [data["reason"] for _, data in client.resets]
            assert reasons == ([] if client.takes_bare_ids else ["compacted"]), f"{client.name}: {client.resets}"
        others.add(call(url, "PUT", "/v1/state/quiet", {"value": "hush"})["revision"])
        for thread in writer.write(40):
            thread.join(DEADLINE_S)
        settled()
        each("hush", quiet, lambda c: [d["value"] for _, d in c.events] == ["hush"])

    def compacted():
        nonlocal first
        first = writer.last
        at = {c: c.at for c in clients}
        forget()
        server.stop()
        elsewhere = Server(binary, free_port(), server.data).start()
        elsewhere.compact(first)
        elsewhere.stop()
        server.start()
        health = call(url, "GET", "/v1/health")
        others.update(range(first + 1, health["revision"] + 1))
        each("reset", clients, lambda c: c.resets)
        for client in clients:
            (event_id, reset), = client.resets
            expected = ("compacted", health["oldest"], health["revision"], health["revision"])
            assert (reset["reason"], reset["oldest"], reset["head"], event_id) == expected, f"{client.name}: {reset}"
            assert at[client] <= reset["requested"] <= first, f"{client.name}: {reset}"
        for thread in writer.write(40):
            thread.join(DEADLINE_S)
        settled()

    def future():
        forget()
        server.kill()
        server.data = folder / "another"
        server.start()
        each("reset", clients, lambda c: c.resets)
        for client in clients:
            (event_id, reset), = client.resets
            assert (reset["reason"], reset["head"], event_id) == ("future", 0, 0), f"{client.name}: {reset}"
        writer.acked.clear()
        writer.unsure.clear()
        others.clear()
        for thread in writer.write(40):
            thread.join(DEADLINE_S)
        settled()

    def by_hand():
        # What a person types: the rest of the log after an id, and a word about an id that is none.
        def typed(*options):
            command = ["curl", "-sS", "-N", "--max-time", "1", *options, f"{url}/v1/events"]
            return subprocess.run(command, capture_output=True, text=True).stdout

        last = writer.last
        text = typed("-H", f"Last-Event-ID: {last - 3}")
        assert text.startswith(f"retry: 1000\nid: {last - 3}\n\nevent: state_updated\nid: {last - 2}\ndata: "), text
        assert re.findall(r"^id: (\d+)$", text, re.M) == [str(last - n) for n in (3, 2, 1, 0)], text
        assert '"code":"invalid_argument"' in typed("-H", "Last-Event-ID: yesterday")

    try:
        step("killed twice in the midst of writes: nothing lost, nothing twice", kills)
        step("heartbeats move the id, so a quiet client does not fall behind the log", heartbeats)
        step("an orderly stop, and a log that no longer reaches back: reset, compacted", compacted)
        step("another database at the same address: reset, future", future)
        step("curl -N by hand", by_hand)
        server.stop()
    finally:
        for client in clients:
            client.is_over = True
        server.process.kill()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="kiss-clients-"))
    try:
        run(sys.argv[1], temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
