#!/usr/bin/env bash
# The core of KISS VDB in curl alone: every command can be pasted on its own.
#
#     make run                     # in one terminal
#     bash demo/demo.sh            # in another; KISS_URL says where, if not at http://127.0.0.1:9917
#
# Needs bash and curl, nothing else. It ends with a failing status at the first step that does not do what its line says,
# so it is a smoke test of a running server, too. Run it as often as you like: it cleans up its keys and its collection.
set -euo pipefail

KISS_URL=${KISS_URL:-http://127.0.0.1:9917}
JSON='content-type: application/json'
stream=$(mktemp)
trap 'rm -f "$stream"' EXIT

say() { printf '\n# %s\n' "$*"; }

# Runs a command, prints its output, and ends the script unless that holds the text.
expect() {
  local text=$1
  shift
  answer=$("$@") || { printf 'FAILED (status %s): %s\n' "$?" "$*" >&2; exit 1; }
  printf '%s\n' "$answer"
  [[ $answer == *"$text"* ]] || { printf 'FAILED: no %s in the answer to: %s\n' "$text" "$*" >&2; exit 1; }
}

# The first revision in the last answer.
revision() {
  [[ $answer =~ \"revision\":([0-9]+) ]] || { echo "FAILED: no revision in $answer" >&2; exit 1; }
  echo "${BASH_REMATCH[1]}"
}

# curl, for a stream: that its time was over (status 28) is how it ends.
listen() { curl -sN "$@" || [[ $? == 28 ]]; }

# Waits until the stream in the background has written a text.
await() {
  for _ in {1..100}; do
    if grep -q "$1" "$stream"; then return; fi
    sleep 0.05
  done
  echo "FAILED: the stream did not show $1" >&2
  exit 1
}

# Leftovers of a run that was cut; 404 is fine here.
for leftover in state/demo:job state/demo:seats state/demo:session vector/demo-fruit; do
  curl -s -o "$stream" -X DELETE "$KISS_URL/v1/$leftover" || { echo "FAILED: no server at $KISS_URL; start one with: make run" >&2; exit 1; }
done

say "0. Is it there?"
expect '"status":"ok"' curl -sS "$KISS_URL/v1/health"

say "1. A stream watches a job (curl -N shows events as they happen) while the job's key is written and patched"
: >"$stream"
listen --max-time 3 "$KISS_URL/v1/events?job_id=demo-1" > >(tee "$stream") &
watcher=$!
await '^id: '
expect '"created":true' curl -sS -X PUT "$KISS_URL/v1/state/demo:job" -H "$JSON" \
  -d '{"value":{"progress":0,"status":"running"},"meta":{"job_id":"demo-1"}}'
expect '"progress":50' curl -sS -X PATCH "$KISS_URL/v1/state/demo:job" -H "$JSON" -d '{"progress":50}'
expect '"progress":100' curl -sS -X PATCH "$KISS_URL/v1/state/demo:job" -H "$JSON" -d '{"progress":100,"status":"done"}'
await '"patch":{"progress":50}'
await '"patch":{"progress":100,"status":"done"}'
wait "$watcher"
expect '"value":{"progress":100,"status":"done"}' curl -sS "$KISS_URL/v1/state/demo:job"

say "2. Compare-and-set: a write that names the revision it saw wins; the second to name the same one is told 409"
expect '"created":true' curl -sS -X PUT "$KISS_URL/v1/state/demo:seats" -H "$JSON" -d '{"value":5}'
seen=$(revision)
expect '"created":false' curl -sS -X PUT "$KISS_URL/v1/state/demo:seats" -H "$JSON" -d "{\"value\":2,\"if_revision\":$seen}"
now=$(revision)
expect "\"expected\":$seen,\"actual\":$now" curl -sS -X PUT "$KISS_URL/v1/state/demo:seats" -H "$JSON" \
  -d "{\"value\":3,\"if_revision\":$seen}"
expect '"created":false' curl -sS -X PUT "$KISS_URL/v1/state/demo:seats" -H "$JSON" -d "{\"value\":0,\"if_revision\":$now}"

say "3. A key with a time to live: there now, gone a moment later, and its end is an event"
: >"$stream"
listen --max-time 3 "$KISS_URL/v1/events?key=demo:session" > >(tee "$stream") &
watcher=$!
await '^id: '
expect '"expires_at_ms"' curl -sS -X PUT "$KISS_URL/v1/state/demo:session" -H "$JSON" -d '{"value":"ana","ttl_ms":700}'
expect '"value":"ana"' curl -sS "$KISS_URL/v1/state/demo:session"
await '"reason":"expired"'
expect '"code":"key_not_found"' curl -sS "$KISS_URL/v1/state/demo:session"
wait "$watcher"

say "4. Vectors: a collection, three points, the nearest two, and the nearest with a filter"
expect '"dim":3' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit" -H "$JSON" -d '{"dim":3,"metric":"cosine"}'
expect '"results"' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/upsert" -H "$JSON" -d '{"items":[
  {"id":"apple","vector":[0.9,0.1,0.0],"meta":{"kind":"fruit"}},
  {"id":"pear", "vector":[0.8,0.3,0.0],"meta":{"kind":"fruit"}},
  {"id":"truck","vector":[0.0,0.1,0.9],"meta":{"kind":"vehicle"}}]}'
expect '"hits":[{"id":"apple"' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/search" -H "$JSON" -d '{"vector":[1,0,0],"k":2}'
expect '"hits":[{"id":"truck"' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/search" -H "$JSON" \
  -d '{"vector":[1,0,0],"k":2,"filters":{"kind":"vehicle"}}'

say "5. What was just added is found at once, what was just deleted is not"
expect '"created":true' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/add" -H "$JSON" -d '{"id":"plum","vector":[1,0,0]}'
expect '"hits":[{"id":"plum"' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/search" -H "$JSON" -d '{"vector":[1,0,0],"k":1}'
expect '"deleted":true' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/delete" -H "$JSON" -d '{"id":"plum"}'
expect '"hits":[{"id":"apple"' curl -sS -X POST "$KISS_URL/v1/vector/demo-fruit/search" -H "$JSON" -d '{"vector":[1,0,0],"k":1}'

say "6. A stream resumes where it was cut: Last-Event-ID brings what was written since, in order"
expect '"revision"' curl -sS -X POST "$KISS_URL/v1/events" -H "$JSON" -d '{"type":"step","key":"demo:run","data":"one"}'
last=$(revision)
expect '"revision"' curl -sS -X POST "$KISS_URL/v1/events" -H "$JSON" -d '{"type":"step","key":"demo:run","data":"two"}'
expect '"revision"' curl -sS -X POST "$KISS_URL/v1/events" -H "$JSON" -d '{"type":"step","key":"demo:run","data":"three"}'
expect '"data":"three"' listen --max-time 1 "$KISS_URL/v1/events?key=demo:run" -H "Last-Event-ID: $last"
[[ $answer == *'"data":"two"'*'"data":"three"'* && $answer != *'"data":"one"'* ]] || { echo "FAILED: not what followed $last" >&2; exit 1; }

say "7. Clean up"
expect '"deleted":true' curl -sS -X DELETE "$KISS_URL/v1/state/demo:job"
expect '"deleted":true' curl -sS -X DELETE "$KISS_URL/v1/state/demo:seats"
expect '"deleted":true' curl -sS -X DELETE "$KISS_URL/v1/vector/demo-fruit"

say "All steps did what they say. Watch everything: curl -N $KISS_URL/v1/events"
