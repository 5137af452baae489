#!/usr/bin/env python3
"""Holds what deploy/ says against the server: metrics, labels, settings and the container's health check.

    .venv/bin/python tests/deploy.py target/release/kiss-vdb

The proxies' files are run by tests/clients.mjs. systemd-analyze, promtool and caddy are asked too where they are installed.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

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


def expressions():
    """Every expression in deploy/, with where it stands."""
    import yaml

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
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
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
        if not shutil.which(tool):
            print(f"     {tool} is not installed: not asked")
            continue
        asked = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
        if asked.returncode:
            found.append(f"{tool} {arguments[0]}: {asked.stderr or asked.stdout}")
    return found


def run(binary):
    server = subprocess.Popen([binary, "serve", "--ephemeral", "--port", "0", "--log-level", "warn"], stdout=subprocess.PIPE, text=True)
    try:
        base, port = re.search(r"ready at (http://\S+?:(\d+))", server.stdout.readline()).groups()
        # Some series are born with their first request.
        with urllib.request.urlopen(f"{base}/v1/health", timeout=10) as response:
            response.read()
        with tempfile.TemporaryDirectory() as folder:
            found = check_metrics(base) + check_settings(binary) + check_container(port) + check_tools(binary, pathlib.Path(folder))
        for finding in found:
            print(f"FINDING {finding}")
        if not found:
            print(f"ok   {len(list(expressions()))} expressions, settings, health check")
        return 1 if found else 0
    finally:
        server.kill()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(run(sys.argv[1]))
