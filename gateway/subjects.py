"""Every subject, stream, bucket and header name of Nearloop. Pure.

    nl.step.<region>.<kind>.<target>.<lane>.<id>   a step waiting for a worker       stream NL_STEPS_<REGION>
    nl.job.<region>.<tenant>.<id>                  the record of a submitted step    stream NL_STEPS_<REGION>
    nl.result.<region>.<tenant>.<id>               the one result of a step          stream NL_RESULTS
    nl.dead.<region>.<kind>.<target>.<id>          a step that was given up          stream NL_DEAD
    nl.run.<region>.<tenant>.<id>.accepted         the promise to execute a run      stream NL_RUNS
    nl.run.<region>.<tenant>.<id>.order            what was asked, until it ends     stream NL_RUNS
    nl.run.<region>.<tenant>.<id>.open             that it has not ended             stream NL_RUNS
    nl.run.<region>.<tenant>.<id>.journal          what its runner has done          stream NL_RUNS
    nl.reply.<mark>.<id>                           a result to the gateway that waits for it, core NATS
    nl.event.<tenant>.<id>                         started, tokens, progress, ended, core NATS
    nl.replay.<tenant>.<id>                        asks the executing worker for its events again, core NATS request
    nl.cancel.<tenant>.<id>                        tells the executing worker to stop, core NATS
    nl.ping.<region>                               answered by a worker of the region, core NATS request
    nl.live.<bucket>.<key>                         what was stored in a bucket that all regions follow, core NATS

Only ids that `is_id` accepts enter a subject, so no subject holds a wildcard, a space or a dot that is not ours.
A step and its job record share a stream, since an atomic batch cannot cross streams.

Servers of a region's own have a JetStream domain of its own, and streams of the same names. Each takes the subjects of its own regions
only; a message reaches the one stream that takes it from wherever it is published. `$KV` subjects and the JetStream API do not cross
between domains, so buckets are per domain. Those that all regions follow republish what is stored: to `nl.live`, which crosses.

The region in a result's subject is that of the id for jobs and runs (`<region>-<32 hex digits>`), else that of the step's queue: so
whoever knows id and queue knows which stream decides about the result.

A gateway listens on its mark, eight characters with which the ids of its steps begin. NL_RESULTS republishes each stored result to
`nl.reply.<first eight characters of the id>.<id>`: the server itself tells the gateway, as soon as the result is stored and only then.
"""

import hashlib
import re
from collections.abc import Iterable

from gateway.types import Kind, Lane

ID_RULE = "1 to 64 letters, digits, '-' or '_'"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REGIONAL_ID = re.compile(r"(.+)-[0-9a-f]{32}")

RESULTS_STREAM = "NL_RESULTS"
DEAD_STREAM = "NL_DEAD"
RUNS_STREAM = "NL_RUNS"
MARK_LENGTH = 8
RESULTS_REPUBLISH = {"src": "nl.result.*.*.*", "dest": f"nl.reply.{{{{left(3,{MARK_LENGTH})}}}}.{{{{wildcard(3)}}}}"}
TARGETS_BUCKET = "nl-targets"  # key <kind>.<target>: what workers say about a target, JSON
WORKERS_BUCKET = "nl-workers"  # key <region>.<worker>: heartbeats, JSON, gone when they stop
REGIONS_BUCKET = "nl-regions"  # key link.<from>.<to> or api.<region>.<kind>.<target>: a measured round trip, JSON
VALUES_BUCKET = "nl-values"  # what is too large for a message, each entry as long as it is needed
POLICY_BUCKET = "nl-policy"  # key <policy>.<parameter>: a value for it; status.<process>.<policy>.<parameter>: what became of it
HANDBACKS_BUCKET = "nl-handbacks"  # key <tenant>.<step id>: how often workers handed the step back, a number; gone after its deadline

# Headers of a step message; the body is the input as sent.
H_MSG_ID = "Nats-Msg-Id"
H_TENANT = "Nl-Tenant"
H_RUN = "Nl-Run"
H_DEADLINE = "Nl-Deadline-Ms"  # wall clock, milliseconds since 1970
H_CONTENT_TYPE = "Nl-Content-Type"
H_KEY = "Nl-Idempotency-Key"
H_REPLY = "Nl-Reply"  # subject that waits for the result
H_STREAM = "Nl-Stream"  # "1": publish tokens as they come
H_CLIENT_REGION = "Nl-Client-Region"
H_REGIONS = "Nl-Regions"  # in which the step may be executed, with commas between; left out for all
H_DIGEST = "Nl-Digest"  # of a job's kind, target and input
H_TRACEPARENT = "traceparent"
H_TRACESTATE = "tracestate"
# Headers of a result message; the body is the output.
H_STATUS = "Nl-Status"
H_ATTEMPT = "Nl-Attempt"
H_REGION = "Nl-Region"
H_WORKER = "Nl-Worker"
H_QUEUE_US = "Nl-Queue-Us"
H_SERVICE_US = "Nl-Service-Us"
H_WORKER_WAIT_US = "Nl-Worker-Wait-Us"  # left out when 0
H_CODE = "Nl-Code"
H_REASON = "Nl-Reason"
H_MESSAGE = "Nl-Message"
# Headers of an event message; the body is a token.
H_EVENT = "Nl-Event"
H_SEQUENCE = "Nl-Sequence"
H_FRACTION = "Nl-Fraction"


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def steps_stream(region: str) -> str:
    return f"NL_STEPS_{region.upper().replace('-', '_')}"


def steps_stream_subjects(region: str) -> list[str]:
    return [f"nl.step.{region}.>", f"nl.job.{region}.>"]


def step(region: str, kind: Kind, target: str, lane: Lane, step_id: str) -> str:
    return f"nl.step.{region}.{kind.value}.{target}.{lane.value}.{step_id}"


def queue_filter(region: str, kind: Kind, target: str, lane: Lane) -> str:
    return f"nl.step.{region}.{kind.value}.{target}.{lane.value}.*"


def consumer(kind: Kind, target: str, lane: Lane) -> str:
    """Durable name of the consumer for a lane of a queue; the stream gives the region."""
    return f"{kind.value}-{target}-{lane.value}"


def job(region: str, tenant: str, step_id: str) -> str:
    return f"nl.job.{region}.{tenant}.{step_id}"


def result(region: str, tenant: str, step_id: str) -> str:
    return f"nl.result.{region}.{tenant}.{step_id}"


def result_region(step_id: str, queue_region: str) -> str:
    """The region whose results stream decides about a step that waits in queue_region."""
    found = _REGIONAL_ID.fullmatch(step_id)
    return found[1] if found else queue_region


def of_regions(what: str, regions: Iterable[str]) -> list[str]:
    """Subjects of a stream that takes what is of these regions, of "" any; `what` is result, dead or run."""
    return [f"nl.{what}.{region}.>" if region else f"nl.{what}.>" for region in regions]


def run_accepted(region: str, tenant: str, run_id: str) -> str:
    return f"nl.run.{region}.{tenant}.{run_id}.accepted"


def run_order(region: str, tenant: str, run_id: str) -> str:
    return f"nl.run.{region}.{tenant}.{run_id}.order"


def run_open(region: str, tenant: str, run_id: str) -> str:
    return f"nl.run.{region}.{tenant}.{run_id}.open"


def run_journal(region: str, tenant: str, run_id: str) -> str:
    return f"nl.run.{region}.{tenant}.{run_id}.journal"


def ping(region: str) -> str:
    return f"nl.ping.{region}"


def live(bucket: str) -> str:
    return f"nl.live.{bucket}.>"


def bucket_key(bucket: str, key: str) -> str:
    return f"$KV.{bucket}.{key}"


def bucket_republish(bucket: str) -> dict[str, str]:
    return {"src": f"$KV.{bucket}.>", "dest": f"nl.live.{bucket}.>"}


def hand_backs(tenant: str, step_id: str) -> str:
    return bucket_key(HANDBACKS_BUCKET, f"{tenant}.{step_id}")


def dead(region: str, kind: Kind, target: str, step_id: str) -> str:
    return f"nl.dead.{region}.{kind.value}.{target}.{step_id}"


def reply(mark: str, step_id: str) -> str:
    return f"nl.reply.{mark}.{step_id}"


def replies(mark: str) -> str:
    return f"nl.reply.{mark}.*"


def is_republished(reply_to: str, step_id: str) -> bool:
    """True when the results stream tells the gateway that waits on reply_to."""
    return reply_to == reply(step_id[:MARK_LENGTH], step_id)


def event(tenant: str, step_id: str) -> str:
    return f"nl.event.{tenant}.{step_id}"


def replay(tenant: str, step_id: str) -> str:
    return f"nl.replay.{tenant}.{step_id}"


def cancel(tenant: str, step_id: str) -> str:
    return f"nl.cancel.{tenant}.{step_id}"


def job_id(region: str, tenant: str, kind: Kind, target: str, key: str) -> str:
    """The id of the job for an idempotency key, always the same: `<region>-<32 hex digits>`.

    The key is scoped to tenant and target. The region says which stream holds the record; it is the target's home region, so that
    every gateway finds the same job.
    """
    words = "\x00".join((tenant, kind.value, target, key))
    return f"{region}-{hashlib.sha256(words.encode()).hexdigest()[:32]}"


def job_region(step_id: str) -> str:
    """The region in a job's id; empty when it has none."""
    return step_id.rpartition("-")[0]
