#!/usr/bin/env python3
"""Holds a running server against openapi.yaml, with generated requests.

    python -m venv .venv && .venv/bin/pip install schemathesis
    .venv/bin/python tests/openapi.py target/release/kiss-vdb [examples for each operation]

Starts the binary in memory on a free port, fills in a little data, then
  1. opens the endless event stream with one plain request and looks at its first bytes,
  2. runs schemathesis over every operation: no 5xx, no undocumented status or content type, no answer that its schema
     does not allow. Answers are checked more strictly than the contract promises to clients: an undocumented field fails.
The seed is fixed; the run takes about a minute. Ends with status 0 only when there was no finding.

Schemathesis loads this same file as its hooks (SCHEMATHESIS_HOOKS), for what the contract cannot say to a generator:
the stream is asked for as JSON and for a short wait, and half of the vector requests go to a collection that exists.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEED = 9917
EXAMPLES = 60
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"
DEADLINE_S = 300
BANNER = re.compile(r"(http://[0-9.:\[\]a-f]+)")


# Hooks: only when schemathesis loads this file.


def register_hooks():
    import random

    import schemathesis

    coin = random.Random(SEED)

    @schemathesis.hook
    def before_call(context, case, kwargs):
        path, method = case.operation.path, case.operation.method.upper()
        if path == "/v1/events" and method == "GET":
            # Without this the answer never ends.
            case.headers["Accept"] = "application/json"
            for name in ("snapshot", "heartbeat_ms"):
                case.query.pop(name, None)
            if str(case.query.get("wait_ms", "0")).isdigit():
                case.query["wait_ms"] = min(int(case.query.get("wait_ms", 0)), 20)
            if coin.random() < 0.5:
                case.query["since"] = "0"
                case.headers.pop("Last-Event-ID", None)
            # The largest lists of the longest keys do not fit in a request head, which ends at 64 KiB.
            for name, value in case.query.items():
                if isinstance(value, list) and sum(len(str(v)) for v in value) > 4000:
                    case.query[name] = value[:3]
        # `one` has vectors of a single number, which generators hit by themselves. Nothing deletes it.
        if path.startswith("/v1/vector/{collection}/") and coin.random() < 0.5:
            case.path_parameters["collection"] = "one"
        # An update needs an id that exists.
        if path == "/v1/vector/{collection}/update" and isinstance(case.body, dict) and coin.random() < 0.5:
            case.path_parameters["collection"] = "one"
            if "id" in case.body:
                case.body["id"] = f"v{coin.randrange(30)}"
        # Keys that exist, so that reads, conditions and deletes find something.
        if path == "/v1/state/{key}" and method != "DELETE" and coin.random() < 0.3:
            case.path_parameters["key"] = "job:123"

    @schemathesis.check
    def plain_reads_answer_an_entry(ctx, response, case):
        # The contract must allow any JSON there because of `raw=true`; without it, the answer is an entry.
        if case.operation.path != "/v1/state/{key}" or case.method.upper() != "GET" or response.status_code != 200:
            return
        if "raw" in (case.query or {}):
            return
        entry = json.loads(response.content)
        known = {"key", "value", "value_base64", "content_type", "revision", "created_revision", "expires_at_ms", "meta"}
        assert set(entry) <= known, f"undocumented fields: {set(entry) - known}"
        assert ("value" in entry) != ("value_base64" in entry), "an entry has a value or bytes"
        assert response.headers["etag"] == [f'"{entry["revision"]}"'], "the ETag is the revision"


if os.environ.get("SCHEMATHESIS_HOOKS") and __name__ != "__main__":
    register_hooks()


# The script.


def strict(document):
    """Closes every schema of an object with fields that the contract leaves open to grow."""
    for schema in document["components"]["schemas"].values():
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return document


def call(base, method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data=data, method=method, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def fill(base):
    """Data for the examples of the contract and for generated requests to find."""
    call(base, "POST", "/v1/vector/docs", {"dim": 3, "metric": "cosine"})
    call(base, "POST", "/v1/vector/one", {"dim": 1, "metric": "l2"})
    items = [{"id": f"v{n}", "vector": [n / 7], "meta": {"lang": "es" if n % 2 else "en", "n": n}} for n in range(40)]
    call(base, "POST", "/v1/vector/one/upsert", {"items": items})
    call(base, "POST", "/v1/vector/one/delete", {"ids": ["v39", "none"]})
    call(base, "PUT", "/v1/state/job:123", {"value": {"progress": 1}, "ttl_ms": 3_600_000, "meta": {"job_id": "123", "tags": ["a"]}})
    call(base, "PATCH", "/v1/state/job:123", {"progress": 2})
    call(base, "PUT", "/v1/state/gone", {"value": None})
    call(base, "DELETE", "/v1/state/gone")
    call(base, "POST", "/v1/events", {"type": "progress", "key": "job:123", "data": [1, None], "meta": {"tags": ["a"]}})


def check_stream(base):
    """The stream opens at once, as event-stream, and starts with what the contract says."""
    url = f"{base}/v1/events?since=0&heartbeat_ms=1000"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/event-stream"}), timeout=10) as stream:
        found = []
        if stream.headers["Content-Type"] != "text/event-stream":
            found.append(f"content type {stream.headers['Content-Type']}")
        if stream.headers["Cache-Control"] != "no-store, no-transform" or stream.headers["X-Accel-Buffering"] != "no":
            found.append("Cache-Control or X-Accel-Buffering is not as documented")
        lines = [stream.readline().decode().rstrip("\n") for _ in range(6)]
    if lines[0] != "retry: 1000" or not re.fullmatch(r"id: \d+", lines[1]) or lines[2] != "":
        found.append(f"it opens with {lines[:3]}")
    if not re.fullmatch(r"event: [a-z_]+", lines[3]) or not re.fullmatch(r"id: \d+", lines[4]) or not lines[5].startswith("data: {"):
        found.append(f"its first event is {lines[3:]}")
    return found


def check_statuses(base):
    """What generators rarely hit: 304, 405 with Allow, unknown routes, 415, and a body that is too large."""
    host, port = base.removeprefix("http://").rsplit(":", 1)
    found = []
    for name, head, status, code in [
        ("unknown route", "GET /nowhere HTTP/1.1", 404, "route_not_found"),
        ("empty key", "GET /v1/state/ HTTP/1.1", 400, "invalid_argument"),
        ("other method", "PUT /v1/health HTTP/1.1", 405, "method_not_allowed"),
        ("other type", "POST /v1/batch HTTP/1.1\r\nContent-Type: text/plain", 415, "unsupported_media_type"),
        ("too large", "PUT /v1/state/big HTTP/1.1\r\nContent-Length: 99999999999", 413, "payload_too_large"),
        ("not modified", "GET /v1/state/job:123 HTTP/1.1\r\nIf-None-Match: *", 304, None),
        ("precondition", "PUT /v1/state/job:123 HTTP/1.1\r\nIf-Match: \"1\"\r\nContent-Length: 11\r\n\r\n{\"value\":1}", 412, "precondition_failed"),
    ]:
        first, _, rest = head.partition("\r\n")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"{first}\r\nHost: x\r\nConnection: close\r\n{rest}" + ("" if "\r\n\r\n" in rest else "\r\n\r\n" if rest else "\r\n")
            connection.sendall(head.encode())
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        headers, _, body = answer.decode().partition("\r\n\r\n")
        got = int(headers.split()[1])
        if got != status or (code and json.loads(body)["code"] != code):
            found.append(f"{name}: {got} {body}, not {status} {code}")
        if status == 405 and "allow:" not in headers.lower():
            found.append(f"{name}: no Allow header")
    return found


def check_not_held_back(base):
    """Bytes that follow a request (a stray line end, half of the next request) must not hold back its answer."""
    host, port = base.removeprefix("http://").rsplit(":", 1)
    found = []
    for name, head in [
        ("a line end after the body", b"PUT /v1/state/held HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{\"value\":1}\r\n"),
        ("half of the next request", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/hea"),
        ("a line end after a stream's request", b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n\r\n"),
    ]:
        with socket.create_connection((host, int(port)), timeout=3) as connection:
            connection.sendall(head)
            try:
                answer = connection.recv(16)
            except TimeoutError:
                answer = b""
        if not answer.startswith(b"HTTP/1.1 20"):
            found.append(f"{name}: no answer within 3 s")
    return found


def never_succeeded(base, document):
    """Operations that no request of this run got a 2xx from: there the checks above looked at errors only."""
    with urllib.request.urlopen(f"{base}/v1/metrics", timeout=10) as response:
        text = response.read().decode()
    line = re.compile(r'^kiss_http_requests_total\{route="([^"]+)",method="([A-Z]+)",status="2\d\d"\}', re.M)
    succeeded = set(line.findall(text))
    operations = [(path, method.upper()) for path, item in document["paths"].items() for method in item if method != "parameters"]
    # The metrics' own request is counted after it is answered.
    return [f"{method} {path}: no generated request succeeded" for path, method in operations
            if (path, method) not in succeeded and path != "/v1/metrics"]


def run(binary, examples):
    import yaml

    server = subprocess.Popen(
        [binary, "serve", "--ephemeral", "--port", "0", "--log-level", "warn"], stdout=subprocess.PIPE, text=True
    )
    try:
        base = BANNER.search(server.stdout.readline())[1]
        fill(base)
        found = [f"GET /v1/events: {f}" for f in check_stream(base)]
        found += check_statuses(base) + check_not_held_back(base)
        for finding in found:
            print(f"FINDING {finding}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            contract = pathlib.Path(folder) / "openapi.json"
            document = yaml.safe_load((ROOT / "openapi.yaml").read_text())
            contract.write_text(json.dumps(strict(document)))
            environment = os.environ | {"SCHEMATHESIS_HOOKS": "openapi", "PYTHONPATH": str(ROOT / "tests")}
            command = [
                sys.executable, "-m", "schemathesis.cli", "run", str(contract), "--url", base, "--checks",
                f"{CHECKS},plain_reads_answer_an_entry", "--phases", "examples,coverage,fuzzing", "--max-examples", str(examples),
                "--seed", str(SEED), "--continue-on-failure", "--request-timeout", "10", "--warnings", "off",
                "--suppress-health-check", "all",
            ]
            status = subprocess.run(command, cwd=folder, env=environment, timeout=DEADLINE_S).returncode
        if server.poll() is not None:
            print("FINDING the server ended by itself")
            return 1
        for finding in (missed := never_succeeded(base, document)):
            print(f"FINDING {finding}")
        return 1 if found or missed or status else 0
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            print("FINDING the server did not stop within 20 s")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(run(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else EXAMPLES))
