"""TOML -> frozen objects. All mistakes are reported at once and unknown keys are refused.

Every section has defaults, so an empty file is a working configuration of one region, `home`.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway import subjects
from gateway.errors import ConfigError
from gateway.types import Kind, Target

_REGION = re.compile(r"[a-z0-9][a-z0-9-]{0,15}")


def _check_id(text: str) -> str:
    if not subjects.is_id(text):
        raise ValueError(f"{text!r} is not an id: {subjects.ID_RULE}")
    return text


def _check_region(text: str) -> str:
    if not _REGION.fullmatch(text):
        raise ValueError(f"{text!r} is not a region: 1 to 16 lower-case letters, digits or '-'")
    return text


Id = Annotated[str, AfterValidator(_check_id)]
RegionName = Annotated[str, AfterValidator(_check_region)]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewaySection(Section):
    """The gRPC front. listen is `host:port`; port 0 takes a free one."""

    listen: str = "127.0.0.1:50051"
    name: str = ""  # default: made from host and process
    region: RegionName = "home"
    max_input_bytes: Annotated[int, Field(ge=1024, le=64 * 1024 * 1024)] = 1024 * 1024
    max_in_flight: PositiveInt = 20_000
    max_sessions: PositiveInt = 10_000  # one tenant gets half of them
    session_stall_s: Positive = 600.0  # a session whose reader takes nothing for so long is ended
    max_timeout_s: Positive = 3600.0
    drain_s: Positive = 10.0


class KeySection(Section):
    """An API key by the SHA-256 of its text; `nearloop key` makes one."""

    tenant: Id
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class AuthSection(Section):
    """Who may call. Without an anonymous tenant every call needs a key."""

    anonymous_tenant: str = ""
    keys: tuple[KeySection, ...] = ()

    @model_validator(mode="after")
    def _anonymous_is_id(self) -> "AuthSection":
        if self.anonymous_tenant:
            _check_id(self.anonymous_tenant)
        return self


class NatsSection(Section):
    """The transport. Without urls, `nearloop up` starts a nats-server of its own."""

    urls: tuple[str, ...] = ()
    credentials: str = ""  # path of a .creds file
    tls_ca: str = ""  # path of a CA bundle; turns TLS on
    replicas: Literal[1, 3, 5] = 1
    ack_wait_s: Annotated[float, Field(ge=1)] = 10.0
    publish_timeout_s: Positive = 5.0
    # In a region's stream. A job's record, which has no input, counts as well, until job_keep_s after its deadline.
    max_queue_messages: PositiveInt = 1_000_000
    max_queue_bytes: PositiveInt = 1024 * 1024 * 1024
    result_keep_s: Annotated[float, Field(ge=1)] = 300.0  # results of Execute, and the journals of runs after their deadline
    job_keep_s: Annotated[float, Field(ge=60)] = 86_400.0  # jobs and their results, after their deadline
    dead_keep_s: Annotated[float, Field(ge=60)] = 7 * 86_400.0


class RegionSection(Section):
    """A place with workers. Without nats_urls it shares the servers of [nats]. A region with servers of its own has a JetStream domain of
    its own (`jetstream { domain: iad }` in their configuration), and is connected with the others by leaf nodes."""

    name: RegionName
    nats_urls: tuple[str, ...] = ()
    domain: str = ""  # of JetStream; needed when regions have different servers
    round_trip_ms: dict[RegionName, Annotated[float, Field(ge=0)]] = {}


class TritonSection(Section):
    """Triton's gRPC address, or those of several that serve the same models. Without any, `nearloop up` starts a Triton of its own with
    the models of `repository`."""

    url: str = ""
    urls: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    repository: str = ""  # default: the models that Nearloop brings
    region: RegionName = "home"
    max_message_bytes: PositiveInt = 16 * 1024 * 1024

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of each replica, in order; empty without a Triton."""
        return tuple(url.removeprefix("grpc://") for url in self.urls or (self.url,) if url)

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> "TritonSection":
        if self.url and self.urls:
            raise ValueError("url and urls are both given: name all replicas in urls, or the only one as url")
        if len(set(self.addresses)) != len(self.urls or self.addresses):
            raise ValueError("urls: an address is empty or there more than once")
        return self


class TargetSection(Section):
    """Settings of a target. What is left out comes from the worker that announces it."""

    kind: Kind
    name: Id
    description: str = ""
    home_region: RegionName = "home"
    cost: Positive = 1.0
    slots: PositiveInt = 16
    timeout_s: Positive = 30.0
    read_only: bool = False
    idempotent: bool = False
    max_deliver: Annotated[int, Field(ge=1, le=100)] = 5
    regions: tuple[RegionName, ...] = ()  # in which its steps may be executed, and runs that call it; empty: any

    def target(self) -> Target:
        return Target(**self.model_dump())


class HttpToolSection(Section):
    """A tool that is one HTTP request. `{name}` in the url's path is replaced by the input's field, encoded as one segment.

    Other fields go into the query (GET, DELETE) or the JSON body. Headers may name environment variables as `${NAME}`.
    """

    name: Id
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "GET"
    url: Annotated[str, Field(pattern="^https?://")]
    headers: dict[str, str] = {}
    input_schema: dict[str, Any] = {"type": "object"}
    max_response_bytes: PositiveInt = 1024 * 1024
    probe: bool = True  # a HEAD request to the root of its server each minute, to know how far away it is; without the headers


class ToolsSection(Section):
    """Tools. modules are importable Python modules with `@tool` functions."""

    modules: tuple[str, ...] = ()
    http: tuple[HttpToolSection, ...] = ()
    egress_allow: tuple[str, ...] = ()  # host names, `*.example.com`, or networks such as 127.0.0.0/8
    slots: PositiveInt = 128


class CollectionSection(Section):
    """A vector collection: a target of kind retrieve. One with shards has no points of its own: they are other collections, of this
    configuration or of other workers, and `missing` says what becomes of a query when one of them does not answer."""

    name: Id
    dimensions: PositiveInt = 384
    embed_target: Id = "embed"
    shards: Annotated[tuple[Id, ...], Field(max_length=64)] = ()
    missing: Literal["fail", "partial"] = "fail"

    @model_validator(mode="after")
    def _shards_are_others(self) -> "CollectionSection":
        if len(set(self.shards)) < len(self.shards):
            raise ValueError(f"collection {self.name!r}: a shard is named more than once")
        if self.name in self.shards:
            raise ValueError(f"collection {self.name!r} is among its own shards")
        if self.missing == "partial" and not self.shards:
            raise ValueError(f"collection {self.name!r}: missing is about shards, and it has none")
        return self


class RetrieveSection(Section):
    """The vector store. Without a url it is embedded in the worker, kept in `path` or, when that is empty, in memory."""

    url: str = ""
    path: str = ""
    api_key_env: str = ""
    collections: tuple[CollectionSection, ...] = ()
    slots: PositiveInt = 16

    @model_validator(mode="after")
    def _shards_fit(self) -> "RetrieveSection":
        known = {section.name: section for section in self.collections}
        for whole in self.collections:
            for shard in (known[name] for name in whole.shards if name in known):  # another worker may serve one that is not here
                if shard.shards:
                    raise ValueError(f"collection {whole.name!r}: its shard {shard.name!r} has shards itself")
                for word in ("dimensions", "embed_target"):
                    if getattr(shard, word) != getattr(whole, word):
                        raise ValueError(f"collection {whole.name!r}: its shard {shard.name!r} has another {word}")
        return self


class WorkerSection(Section):
    """All workers. far_regions lets a worker take steps from other regions when no near worker is free."""

    heartbeat_s: Positive = 2.0
    drain_s: Positive = 20.0
    far_regions: bool = True
    runs: PositiveInt = 256  # that a runner executes at a time
    near_calls: Annotated[int, Field(ge=0)] = 4  # a runner with no more under way makes HTTP calls here that may be repeated itself


class TelemetrySection(Section):
    """OTLP over gRPC; no endpoint, no export."""

    otlp_endpoint: str = ""
    service_name: str = "nearloop"


class PolicySection(BaseModel):
    """One policy instance: `use` names the type, the other keys are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str
    name: str = ""
    on_error: Literal["", "admit", "reject"] = ""
    shadow: bool = False  # decides and is counted, has no effect

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


DEFAULT_POLICIES = (
    PolicySection(use="token_bucket"),
    PolicySection(use="cinnamon"),
    PolicySection(use="vegas"),
    PolicySection(use="vtc"),
    PolicySection(use="bounded_wait"),
    PolicySection(use="breakwater"),
    PolicySection(use="nearest_region"),
    PolicySection(use="passthrough"),
    PolicySection(use="marginal"),
    PolicySection(use="parent_ratio"),
)


class Config(Section):
    """The whole configuration."""

    gateway: GatewaySection = GatewaySection()
    auth: AuthSection = AuthSection()
    nats: NatsSection = NatsSection()
    regions: tuple[RegionSection, ...] = (RegionSection(name="home"),)
    triton: TritonSection = TritonSection()
    targets: tuple[TargetSection, ...] = ()
    tools: ToolsSection = ToolsSection()
    retrieve: RetrieveSection = RetrieveSection()
    worker: WorkerSection = WorkerSection()
    telemetry: TelemetrySection = TelemetrySection()
    plugins: tuple[str, ...] = ()
    policies: tuple[PolicySection, ...] = DEFAULT_POLICIES

    @property
    def region_names(self) -> tuple[str, ...]:
        return tuple(region.name for region in self.regions)

    def round_trip_s(self, one: str, other: str) -> float:
        """Configured round trip between two regions, seconds; 0 within a region or when nothing is known."""
        found = self.round_trips_s
        return found.get((one, other), found.get((other, one), 0.0))

    @property
    def round_trips_s(self) -> Mapping[tuple[str, str], float]:
        """Configured round trips, seconds, by the two regions as they were given."""
        return {(region.name, other): ms / 1000 for region in self.regions for other, ms in region.round_trip_ms.items()}

    def target_section(self, kind: Kind, name: str) -> TargetSection | None:
        return next((section for section in self.targets if (section.kind, section.name) == (kind, name)), None)

    def nats_urls(self, region: str) -> tuple[str, ...]:
        own = next((section.nats_urls for section in self.regions if section.name == region), ())
        return own or self.nats.urls

    def domain(self, region: str) -> str:
        """The JetStream domain of the region's servers; empty when all regions share them."""
        return next((section.domain for section in self.regions if section.name == region), "")

    def site(self, region: str) -> tuple[str, ...]:
        """The regions that share the region's servers, itself included."""
        domain = self.domain(region)
        return tuple(section.name for section in self.regions if section.domain == domain)


def _problems_across(config: Config) -> list[str]:
    """Mistakes that no section can see alone."""
    problems = []
    names = config.region_names
    uses = [("gateway.region", config.gateway.region), ("triton.region", config.triton.region)]
    uses += [(f"targets.{index}.home_region", section.home_region) for index, section in enumerate(config.targets)]
    uses += [(f"targets.{index}.regions", region) for index, section in enumerate(config.targets) for region in section.regions]
    uses += [(f"regions.{index}.round_trip_ms", other) for index, r in enumerate(config.regions) for other in r.round_trip_ms]
    for where, region in uses:
        if region not in names:
            problems.append(f"{where}: there is no region {region!r} in [[regions]]{_nearest(region, names)}")
    for index, section in enumerate(config.targets):
        if section.regions and section.home_region not in section.regions:
            problems.append(f"targets.{index}.regions: its home_region {section.home_region!r} is not among them")
    problems += _server_problems(config)
    scopes = [f"targets: {section.kind.value} {section.name}" for section in config.targets]
    tools = [f"tools.http: {tool.name}" for tool in config.tools.http]
    for twice in {item for items in (list(names), scopes, tools) for item in items if items.count(item) > 1}:
        problems.append(f"{twice}: is there more than once")
    return problems


def _server_problems(config: Config) -> list[str]:
    """Streams of different servers are told apart by their domain alone, so each group of servers needs one, and one only."""
    problems, servers = [], {region.name: frozenset(config.nats_urls(region.name)) for region in config.regions}
    apart = len(set(servers.values())) > 1
    by_domain: dict[str, frozenset[str]] = {}
    by_servers: dict[frozenset[str], str] = {}
    for index, region in enumerate(config.regions):
        where = f"regions.{index}.domain"
        if region.domain and not subjects.is_id(region.domain):
            problems.append(f"{where}: {region.domain!r} is not a domain: {subjects.ID_RULE}")
        elif region.domain and not region.nats_urls:
            problems.append(f"{where}: a region with a domain needs nats_urls, the servers of this domain")
        elif apart and not region.domain:
            own = "its servers" if region.nats_urls else "the servers of [nats], which it shares,"
            problems.append(
                f"{where}: region {region.name!r} needs nats_urls and a domain, since regions have different servers:"
                f" without a domain the others cannot reach the streams of {own}"
            )
        elif by_domain.setdefault(region.domain, servers[region.name]) != servers[region.name]:
            problems.append(f"{where}: {region.domain!r} is the domain of a region with other servers already")
        elif by_servers.setdefault(servers[region.name], region.domain) != region.domain:
            problems.append(f"{where}: a region with the same servers has another domain; they are one domain")
    return problems


def _nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            if isinstance(part, str) and hasattr(section, "model_fields") and part in section.model_fields:
                kinds = [
                    section.model_fields[part].annotation,
                    *getattr(section.model_fields[part].annotation, "__args__", ()),
                ]
                section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
        return f"{where}: unknown key{_nearest(str(error['loc'][-1]), list(section.model_fields))}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def parse(document: dict[str, Any], source: str = "configuration") -> Config:
    """Raises ConfigError with every mistake."""
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(source, [_sentence(item) for item in error.errors()]) from None
    problems = _problems_across(config)
    if problems:
        raise ConfigError(source, problems)
    return config


def load(path: str | Path | None) -> Config:
    """Reads a TOML file; None gives the defaults. Raises ConfigError."""
    if path is None:
        return parse({})
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    return loads(text, str(path))


def loads(text: str, source: str) -> Config:
    """Parses TOML; `source` names it in errors. Raises ConfigError."""
    try:
        return parse(tomllib.loads(text), source)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, [f"is not TOML: {error}"]) from None
