#!/usr/bin/env python3
"""Holds what deploy/ says against the server and against the programs it is written for.

    .venv/bin/python tests/deploy.py target/release/kiss-vdb

Metrics, labels, settings and the container's health check against the server; unit, rules and Caddyfile by systemd-analyze,
promtool and caddy; each alert with a history in which it fires and one in which it does not; each expression by a
Prometheus that scrapes a server with something to do; the dashboard by Grafana's own models. `make check-deploy` installs
all of them. The proxies' files are run by tests/clients.mjs.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
# What Prometheus itself and Grafana add.
FOREIGN = {"up"}
FOREIGN_LABELS = {"instance", "job", "le"}
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "offset", "bool", "group_left", "group_right"}


def served(base):
    """Names and labels of every series that this server has now."""
    with urllib.request.urlopen(f"{base}/v1/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    series = [re.match(r"([a-z_]+)(?:\{(.*)\})? ", line) for line in lines if not line.startswith("#")]
    labels = {name for match in series for name in re.findall(r'(\w+)="', match[2] or "")}
    return {match[1] for match in series}, labels


def used(expression):
    """Metrics and labels an expression names."""
    labels = {name for matchers in re.findall(r"\{([^}]*)\}", expression) for name in re.findall(r"(\w+)\s*[=!]", matchers)}
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]|offset \w+", " ", expression)
    for grouped in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", rest):
        labels |= {name.strip() for name in grouped.split(",")}
    rest = re.sub(r"\b(?:by|without)\s*\([^)]*\)", " ", rest)
    names = set(re.findall(r"\b[a-z_]+[a-z0-9_]*\b(?!\s*\()", rest)) - WORDS
    return names, labels


def rules():
    return [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def expressions():
    """Every expression in deploy/, with where it stands."""
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"grafana.json, {panel['title']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"grafana.json, {annotation['name']}", annotation["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
            yield f"grafana.json, {variable['name']}", f"{name}{{{label}=~'.*'}}"
    for rule in rules():
        yield f"alerts.yml, {rule['alert']}", rule["expr"]


def unknown(listed, names, labels):
    """What the expressions name and the server does not have."""
    found = []
    for where, expression in listed:
        metrics, matched = used(expression)
        if not metrics:
            found.append(f"{where}: no metric in {expression}")
        found += [f"{where}: the server has no {name}" for name in sorted(metrics - names - FOREIGN)]
        found += [f"{where}: the server has no label {name}" for name in sorted(matched - labels - FOREIGN_LABELS)]
    return found


def check_metrics(base):
    names, labels = served(base)
    listed = list(expressions())
    # The check must see a name that is wrong, or it proves nothing.
    for wrong in ("kiss_nothing", 'sum(rate(kiss_keyz_total{instance=~"a"}[5m]))', 'kiss_http_requests_total{stat="507"}', "sum by (rout) (kiss_http_requests_total)", "vector(0)"):
        assert len(unknown([("", wrong)], names, labels)) == 1, wrong
    document = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"`((?:kiss|process)_[a-z_]+)(?:\{[^`]*\})?`", document))
    return unknown(listed, names, labels) + [
        f"docs/operations.md: the server has no {name}"
        for name in sorted(documented)
        if not any(name + suffix in names for suffix in ("", "_count", "_total"))
    ]


def check_settings(binary):
    """The file that is installed is one the program reads, its comments show the true defaults."""
    text = (DEPLOY / "kiss-vdb.toml").read_text()
    listed = subprocess.run([binary, "config", "--config", DEPLOY / "kiss-vdb.toml"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    if listed.returncode:
        return [f"kiss-vdb.toml: {listed.stderr}"]
    settings = dict(line.split(None, 1) for line in listed.stdout.splitlines())
    found = []
    for name, value, note in re.findall(r'^# (\w+) = ("[^"]*"|\[.*\]|\S+)(.*)$', text, re.M):
        if name not in settings:
            found.append(f"kiss-vdb.toml: there is no setting {name}")
        elif "default: none" not in note and not re.match(re.escape(value.strip('"')) + r"\s+default$", settings[name]):
            found.append(f"kiss-vdb.toml: {name} is {settings[name]!r} by default, not {value}")
    return found


def check_container(port):
    """The health check of the Dockerfile, run as it stands there."""
    text = (DEPLOY / "Dockerfile").read_text()
    command = json.loads(re.search(r"HEALTHCHECK[^\[]*CMD (\[.*\])", text)[1])
    healthy = lambda at: subprocess.run(command, env={"PATH": os.environ["PATH"], "PORT_RUST_KISS_VDB": str(at)}, capture_output=True, timeout=20).returncode == 0
    found = [] if healthy(port) else ["Dockerfile: the health check fails on a server that is well"]
    # A port that nobody listens on; and an answer other than 200.
    if healthy(1):
        found.append("Dockerfile: the health check passes without a server")
    command[-1] = command[-1].replace("/v1/health", "/v1/nothing")
    if healthy(port):
        found.append("Dockerfile: the health check passes on a 404")
    return found


def check_tools(binary, folder):
    """What the tools these files are for say of them."""
    found = []
    # The unit names the installed program; here it is the one that was built.
    unit = (DEPLOY / "kiss-vdb.service").read_text().replace("/usr/bin/kiss-vdb", str(pathlib.Path(binary).resolve()))
    (folder / "kiss-vdb.service").write_text(unit)
    for tool, *arguments in (
        ("systemd-analyze", "verify", folder / "kiss-vdb.service"),
        ("systemd-analyze", "security", "--offline=true", "--threshold=20", folder / "kiss-vdb.service"),
        ("promtool", "check", "rules", DEPLOY / "alerts.yml"),
        ("caddy", "validate", "--adapter", "caddyfile", "--config", DEPLOY / "Caddyfile"),
    ):
        asked = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
        if asked.returncode:
            found.append(f"{tool} {arguments[0]}: {asked.stderr or asked.stdout}")
    return found


# Of each alert, over a value a minute in promtool's notation (a+bxn: n steps of b; _: absent): histories in which it fires, with
# the minute, and those in which it never does from a minute on.
REFUSED, WAITED = 'kiss_http_requests_total{status="507",STAND}', 'kiss_http_requests_total{status="503",STAND}'
SYNC = "kiss_fsync_duration_seconds_bucket"
HISTORIES = {
    "KissVdbDown": ([(3, {"up{STAND}": "1 0x9"})], [(0, {"up{STAND}": "1 0 1x9"})]),
    "KissVdbPoisoned": ([(1, {"kiss_poisoned{STAND}": "0 1x9"})], [(0, {"kiss_poisoned{STAND}": "0x9"})]),
    # Its first refusal brings the series; later ones raise it. A refusal of long ago is over.
    "KissVdbStorageFull": (
        [(10, {REFUSED: "_x9 1x9"}), (11, {REFUSED: "1x9 2x9"})],
        [(6, {REFUSED: "3x19"}), (0, {'kiss_http_requests_total{status="200",STAND}': "0+9x19"})],
    ),
    "KissVdbOverloaded": (
        [(12, {WAITED: "0+10x19"}), (12, {"kiss_connections_refused_total{STAND}": "0+10x19"})],
        [(0, {WAITED: "0 0 50x19", "kiss_connections_refused_total{STAND}": "0 0 50x19"})],
    ),
    "KissVdbSnapshotsFail": ([(3, {"kiss_snapshot_failures_total{STAND}": "0 0 1x9"})], [(0, {"kiss_snapshot_failures_total{STAND}": "1x19"})]),
    "KissVdbLogGrows": ([(11, {"kiss_log_bytes{STAND}": "1342177281x19"})], [(0, {"kiss_log_bytes{STAND}": "1342177280x19"})]),
    "KissVdbSlowSync": (
        [(12, {SYNC + '{le="0.08",STAND}': "0x19", SYNC + '{le="0.16",STAND}': "0+9x19", SYNC + '{le="+Inf",STAND}': "0+9x19"})],
        [(0, {SYNC + '{le="0.08",STAND}': "0+9x19", SYNC + '{le="0.16",STAND}': "0+9x19", SYNC + '{le="+Inf",STAND}': "0+9x19"})],
    ),
    "KissVdbStreamsReset": ([(2, {"kiss_stream_resets_total{STAND}": "0 1x9"})], [(0, {"kiss_stream_resets_total{STAND}": "4x19"})]),
    "KissVdbSlowReaders": ([(16, {"kiss_stream_ring_misses_total{STAND}": "0+660x29"})], [(0, {"kiss_stream_ring_misses_total{STAND}": "0+540x29"})]),
    "KissVdbIndexBehind": ([(11, {"kiss_vectors_pending{STAND}": "40001x19"})], [(0, {"kiss_vectors_pending{STAND}": "40000x19"})]),
    "KissVdbConnections": ([(6, {"kiss_connections{STAND}": "16001x19"})], [(0, {"kiss_connections{STAND}": "16000x19"})]),
    "KissVdbRestarts": ([(6, {"kiss_uptime_seconds{STAND}": "90 5 90 5 90 5 90"})], [(0, {"kiss_uptime_seconds{STAND}": "90 5 90 5 90x19"})]),
}


def check_alerts(folder):
    """Each alert fires when it should and is silent when it should, by promtool."""
    named = {rule["alert"]: rule for rule in rules()}
    found = [f"alerts.yml, {name}: no history to try it with" for name in named.keys() ^ HISTORIES.keys()]
    stand = 'instance="db:9917",job="kiss-vdb"'
    for name in named.keys() & HISTORIES.keys():
        rule = named[name]
        firing, silent = HISTORIES[name]
        summary = rule["annotations"]["summary"].replace("{{ $labels.instance }}", "db:9917")

        def test(series, minutes, expected):
            return {
                "interval": "1m",
                "input_series": [{"series": key.replace("STAND", stand), "values": values} for key, values in series.items()],
                "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected} for minute in minutes],
            }

        # What an expression keeps of the labels is its own affair, but not the instance.
        kept = {"instance": "db:9917"} | ({} if "by (instance" in rule["expr"] else {"job": "kiss-vdb"})
        for minute, series in firing:
            status = re.search(r'status="(\d+)"', next(iter(series)))
            labels = rule["labels"] | kept | ({"status": status[1]} if status and "job" in kept else {})
            found += promtool(folder, name, test(series, [minute], [{"exp_labels": labels, "exp_annotations": {"summary": summary}}]))
        for first, series in silent:
            found += promtool(folder, name, test(series, range(first, 30), []))
    return found


def promtool(folder, name, test):
    # JSON is YAML.
    (folder / "test.yml").write_text(json.dumps({"rule_files": [str(DEPLOY / "alerts.yml")], "evaluation_interval": "1m", "tests": [test]}))
    asked = subprocess.run(["promtool", "test", "rules", folder / "test.yml"], capture_output=True, text=True)
    return [f"alerts.yml, {name}: {asked.stdout}{asked.stderr}"] if asked.returncode else []


def check_dashboard():
    """Grafana's own models know every field, and what they make of it is what was written."""
    register_default_plugins()
    written = json.loads((DEPLOY / "grafana.json").read_text())

    def lost(mine, read, path=""):
        if isinstance(mine, dict) and isinstance(read, dict):
            for key, value in mine.items():
                if key in read:
                    yield from lost(value, read[key], f"{path}.{key}")
                # The Prometheus data source's own, which the models leave out.
                elif not (path.startswith(".annotations") and key == "titleFormat"):
                    yield f"grafana.json: {path}.{key} is unknown"
        elif isinstance(mine, list) and isinstance(read, list) and len(mine) == len(read):
            for place, pair in enumerate(zip(mine, read)):
                yield from lost(*pair, f"{path}[{place}]")
        elif mine != read:
            yield f"grafana.json: {path} is read as {read}"

    def read(dashboard):
        return list(lost(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))))

    # The check must see a word that is wrong, or it proves nothing.
    wrong = json.loads(json.dumps(written))
    wrong["panels"][0]["fieldConfig"]["defaults"]["units"] = "s"
    assert len(read(wrong)) == len(read(written)) + 1
    # Twenty-four columns; no panel upon another.
    taken = set()
    found = read(written)
    for panel in written["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        if cells & taken or at["x"] + at["w"] > 24:
            found.append(f"grafana.json, {panel['title']}: it lies upon another, or outside")
        taken |= cells
    if len({panel["id"] for panel in written["panels"]}) != len(written["panels"]):
        found.append("grafana.json: two panels have one id")
    return found


def fetch(base, method, path, body=None):
    """Status and body of an answer, refusals included."""
    request = urllib.request.Request(base + path, method=method, data=None if body is None else json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@contextlib.contextmanager
def serving(binary, *flags):
    server = subprocess.Popen([binary, "serve", "--log-level", "error", *map(str, flags)], stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"ready at (http://\S+?:(\d+))", server.stdout.readline()).groups()
    finally:
        server.terminate()
        server.wait(60)


def load(base, port, connections_max):
    """A little of everything that a panel shows, refusals included."""
    fetch(base, "POST", "/v1/vector/docs", {"dim": 3, "metric": "cosine"})
    fetch(base, "POST", "/v1/vector/docs/upsert", {"id": "a", "vector": [1, 2, 3]})
    fetch(base, "POST", "/v1/vector/docs/search", {"vector": [1, 2, 2], "k": 1})
    fetch(base, "PUT", "/v1/state/a", {"value": 1})
    fetch(base, "GET", "/v1/state/a")
    # Beyond MAX_MEMORY_MB.
    for place in range(4):
        fetch(base, "PUT", f"/v1/state/large:{place}", {"value": "x" * 1_000_000})
    with contextlib.ExitStack() as open_ones:
        for _ in range(connections_max + 2):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        # The last of them was told so before it is let go.
        last = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        last.recv(1)


def check_prometheus(binary, folder):
    """A Prometheus that scrapes a busy server answers every expression with numbers, and the legends with labels."""
    connections_max = 16
    # Of an alert, what it compares must be there; whether it then fires is for promtool.
    compared = re.compile(r"\s*(?:==|>|<)\s*[\d.]+(?:\s*\*\s*\d+)*")
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [(f"grafana.json, {panel['title']}", target["expr"], re.findall(r"{{(\w+)}}", target["legendFormat"])) for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [(f"grafana.json, {each['name']}", each["expr"], []) for each in dashboard["annotations"]["list"]]
    asked += [(f"alerts.yml, {rule['alert']}", compared.sub("", rule["expr"]), re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) for rule in rules()]
    with contextlib.ExitStack() as running:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            own = f"127.0.0.1:{free.getsockname()[1]}"
        flags = ("--data-dir", folder / "data", "--max-memory-mb", 2, "--max-connections", connections_max)
        with serving(binary, "--port", 0, *flags) as (base, port):
            target = base.removeprefix("http://")
            scrape = {"job_name": "kiss-vdb", "metrics_path": "/v1/metrics", "scrape_interval": "250ms", "scrape_timeout": "250ms", "static_configs": [{"targets": [target]}]}
            (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape], "rule_files": [str(DEPLOY / "alerts.yml")]}))
            log = running.enter_context(open(folder / "prometheus.log", "w"))
            prometheus = subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={own}"], stdout=log, stderr=log)
            running.callback(prometheus.wait, 30)
            running.callback(prometheus.terminate)
            ask = lambda path, **query: json.loads(fetch(f"http://{own}", "GET", f"/api/v1/{path}?{urllib.parse.urlencode(query)}")[1])["data"]
            until(lambda: up(ask), "Prometheus reaches the server", folder)
            load(base, int(port), connections_max)
            # An uptime that a restart lets fall.
            before = ask("query", query="kiss_uptime_seconds")["result"][0]["value"][1]
            until(lambda: float(ask("query", query="kiss_uptime_seconds")["result"][0]["value"][1]) > float(before) + 2, "the uptime grows", folder)
        with serving(binary, "--port", port, *flags) as (base, port):
            waiting, why = asked, {}

            def answered():
                nonlocal waiting
                load(base, int(port), connections_max)
                waiting = [each for each in waiting if not numbers(ask, *each, why)]
                return not waiting

            with contextlib.suppress(AssertionError):
                until(answered, "every expression is answered", folder)
            found = [f"{where}: {why[where, expression]}: {expression}" for where, expression, _ in waiting]
            for variable in dashboard["templating"]["list"]:
                if variable["type"] == "query":
                    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
                    if ask(f"label/{label}/values", **{"match[]": name}) != [target]:
                        found.append(f"grafana.json, {variable['name']}: not the one instance there is")
            # The rules as Prometheus itself runs them. Memory was full, so this one rings.
            until(lambda: any(alert["labels"]["alertname"] == "KissVdbStorageFull" for alert in ask("alerts")["alerts"]), "KissVdbStorageFull fires", folder)
            found += [f"alerts.yml, {rule['name']}: {rule['lastError']}" for group in ask("rules")["groups"] for rule in group["rules"] if rule["health"] == "err"]
            return found


def until(check, what, folder, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return
        time.sleep(0.2)
    raise AssertionError(f"never: {what}\n{(folder / 'prometheus.log').read_text()[-2000:]}")


def up(ask):
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return any(float(one["value"][1]) == 1 for one in ask("query", query="up")["result"])


def numbers(ask, where, expression, labels, why):
    """Whether there is a number for each series of the answer, and a label for each word of the legend."""
    expression_asked = expression.replace("$__rate_interval", "5s").replace("$instance", ".*")
    try:
        answer = ask("query", query=expression_asked)["result"]
    except KeyError:
        why[where, expression] = "Prometheus cannot read it"
        return False
    if not any(math.isfinite(float(one["value"][1])) for one in answer):
        why[where, expression] = "no number on a busy server"
    elif missing := [label for label in labels if not all(label in one["metric"] for one in answer)]:
        why[where, expression] = f"no label {', '.join(missing)} for the legend"
    else:
        return True
    return False


def run(binary):
    with tempfile.TemporaryDirectory() as name, serving(binary, "--ephemeral", "--port", 0) as (base, port):
        folder = pathlib.Path(name)
        # Some series are born with their first request.
        fetch(base, "GET", "/v1/health")
        found = check_metrics(base) + check_settings(binary) + check_container(port) + check_tools(binary, folder)
        found += check_alerts(folder) + check_dashboard() + check_prometheus(binary, folder)
        for finding in found:
            print(f"FINDING {finding}")
        if not found:
            print(f"ok   {len(list(expressions()))} expressions, {len(HISTORIES)} alerts, dashboard, settings, health check")
        return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(run(sys.argv[1]))
