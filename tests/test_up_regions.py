"""Regions with a nats-server each, on the real binary: what crosses between them, what does not, and a way that is cut."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nats
import psutil
import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError
from stack_support import eventually
from test_up import configuration, nearloop, processes_of
from test_up_secrets import greeted, mode_of

from gateway import regions_up
from gateway.cli_up import settle
from gateway.config import Config
from gateway.supervisor import PartFailed
from gateway.up import Stack

pytestmark = pytest.mark.stack

NAMES = ("home", "iad", "sjc")


@asynccontextmanager
async def servers(**options: object) -> AsyncIterator[Stack]:
    """A stack of servers alone."""
    given: dict[str, object] = {"regions": NAMES, "workers": [], "gateways": 0, "triton": False}
    async with Stack(configuration(), **(given | options)) as stack:  # type: ignore[arg-type]
        yield stack


@asynccontextmanager
async def clients(stack: Stack) -> AsyncIterator[dict[str, Client]]:
    async with AsyncExitStack() as exits:
        found = {}
        for region, url in stack.nats_urls.items():
            found[region] = await nats.connect(url, allow_reconnect=False)
            exits.push_async_callback(found[region].close)
        yield found


async def crosses(sender: Client, receiver: Client, subject: str = "test.cross") -> None:
    """Interest takes a moment to get through, so it is said until it is heard."""
    heard = await receiver.subscribe(subject)
    await receiver.flush()
    while True:
        await sender.publish(subject, b"hello")
        try:
            assert (await heard.next_msg(timeout=0.2)).data == b"hello"
            break
        except nats.errors.TimeoutError:
            continue
    await heard.unsubscribe()


async def test_what_crosses_between_regions_and_what_does_not() -> None:
    async with servers() as stack:
        assert stack.part_names == ("nats-home", "nats-iad", "nats-sjc")
        assert await stack.linked() == {"iad", "sjc"}
        assert stack.config.region_names == NAMES
        assert [section.domain for section in stack.config.regions] == list(NAMES)
        assert [stack.config.nats_urls(name)[0] for name in NAMES] == list(stack.nats_urls.values())
        async with clients(stack) as at, asyncio.timeout(30):
            for sender, receiver in (("iad", "home"), ("iad", "sjc"), ("home", "sjc")):
                await crosses(at[sender], at[receiver])
            for region in NAMES:
                answer = await at["home"].request(f"$JS.{region}.API.INFO", b"", timeout=5)
                assert json.loads(answer.data)["domain"] == region
                own = await at[region].request("$JS.API.INFO", b"", timeout=5)
                assert json.loads(own.data)["domain"] == region
            # a stream of the same name in two domains
            for region in ("home", "iad"):
                await at[region].jetstream().add_stream(name="SAME", subjects=[f"same.{region}"])
            with pytest.raises(NotFoundError):
                await at["sjc"].jetstream().stream_info("SAME")
            # a publish from elsewhere reaches the one that takes the subject, and its acknowledgement comes back
            ack = await at["sjc"].jetstream().publish("same.iad", b"x")
            assert (ack.stream, ack.domain) == ("SAME", "iad")
            counts = [(await at["home"].jetstream(domain=region).stream_info("SAME")).state.messages for region in ("home", "iad")]
            assert counts == [0, 1]


async def test_each_region_has_its_own_secret_files(tmp_path: Path) -> None:
    async with servers(state_dir=tmp_path, wan={"iad": 0.0}) as stack:
        secret = {path.name for path in tmp_path.iterdir() if path.is_file()}
        assert {f"nats-{name}{end}" for name in NAMES for end in (".conf", ".url")} < secret
        assert {mode_of(tmp_path / name) for name in secret} == {"600"}
        assert {mode_of(tmp_path / f"nats-{name}") for name in NAMES} == {"700"}
        written = json.loads((tmp_path / "addresses.json").read_text())
        assert {name: entry["nats"] for name, entry in written["regions"].items()} == stack.nats_urls
        for name, url in stack.nats_urls.items():
            assert (tmp_path / f"nats-{name}.url").read_text() == f"{url}\n"
        words = [url.split("/")[2].split("@")[0] for url in stack.nats_urls.values()]
        words += re.findall(r"//leaf:(\w+)@", (tmp_path / "nats-iad.conf").read_text())
        assert len(set(words)) == len(NAMES) + 1
        assert min(map(len, words)) >= 32
        told = [word for name in stack.part_names for word in psutil.Process(stack.part(name).pid).cmdline()]
        told += [path.read_text() for path in (tmp_path / "logs").iterdir()]
        assert not [text for text in told if any(word in text for word in words)]
        port = urlsplit(stack.nats_urls["iad"]).port or 0
        assert b"Authorization Violation" in await greeted(port, {"auth_token": words[0]})
        assert b"PONG" in await greeted(port, {"auth_token": words[1]})
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("how", ["cut", "hang_up"])
async def test_a_way_that_is_cut_is_noticed_and_comes_back(how: str) -> None:
    async with servers(wan={"iad": 0.04, "sjc": 0.0}) as stack:
        assert stack.part_names == ("nats-home", "wan-iad", "wan-sjc", "nats-iad", "nats-sjc")
        async with clients(stack) as at, asyncio.timeout(60):
            await crosses(at["iad"], at["home"])
            getattr(stack, how)("iad")
            await eventually(stack.linked, lambda linked: linked == {"sjc"}, 30, "the hub has noticed")
            stranded = await at["home"].subscribe("test.stranded")
            await at["home"].flush()
            await at["iad"].publish("test.stranded", b"nobody hears it")
            assert (await at["iad"].request("$JS.API.INFO", b"", timeout=5)).data  # it goes on by itself
            await crosses(at["sjc"], at["home"])
            stack.heal("iad")
            await eventually(stack.linked, lambda linked: linked == {"iad", "sjc"}, 30, "the link is back")
            await crosses(at["iad"], at["sjc"])
            assert stranded.pending_msgs == 0
        with pytest.raises(KeyError):
            stack.cut("home")


async def test_servers_that_die_find_each_other_again() -> None:
    async with servers(wan={"iad": 0.0}) as stack:
        for name in ("nats-iad", "nats-home", "wan-iad"):
            await stack.kill(name)
            await stack.wait_ready(name)
            await eventually(stack.linked, lambda linked: linked == {"iad", "sjc"}, 30, f"all are connected after {name} died")


@pytest.mark.parametrize(
    ("document", "names", "said"),
    [
        ({}, ["home", "Iad"], "'Iad' is not a region"),
        ({}, ["home", ""], "'' is not a region"),
        ({}, ["home", "iad", "iad"], "'iad' is there more than once"),
        ({}, ["iad", "home"], "the first one must be that of the gateway, which is 'home'"),
        ({"regions": [{"name": "home"}, {"name": "fra"}]}, ["home", "iad"], "says home, iad, the configuration says home, fra"),
        ({"nats": {"urls": ["nats://a"]}}, ["home", "iad"], "NATS servers are named already"),
        ({"regions": [{"name": "home", "nats_urls": ["nats://a"]}]}, ["home", "iad"], "NATS servers are named already"),
        ({"gateway": {"region": "iad"}, "regions": [{"name": "home"}, {"name": "iad"}]}, ["home", "iad"], "which is 'iad'"),
    ],
)
def test_regions_that_cannot_be(document: dict[str, object], names: list[str], said: str) -> None:
    with pytest.raises(PartFailed, match=said):
        Stack(configuration(**document), regions=names)


@pytest.mark.parametrize("region", ["home", "fra"])
def test_a_distance_from_nowhere(region: str) -> None:
    with pytest.raises(PartFailed, match=f"which '{region}' is not"):
        Stack(configuration(), regions=NAMES, wan={region: 0.1})


def test_what_the_configuration_says_of_regions_stays() -> None:
    config = configuration(regions=[{"name": "iad"}, {"name": "home", "round_trip_ms": {"iad": 80}}])
    found = regions_up.with_regions(config, ["home", "iad"])
    assert found.region_names == ("home", "iad")
    assert found.round_trip_s("home", "iad") == 0.08


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--wan-ms 80", "--wan-ms is the distance between regions"),
        ("--regions home --wan-ms 80", "--wan-ms is the distance between regions"),
        ("--regions home,iad --nats nats://a", "NATS servers are named already"),
        ("--regions home,", "'' is not a region"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv: str, said: str) -> None:
    done = nearloop("up", "--no-triton", *argv.split())
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_configuration_the_first_region_is_the_gateways() -> None:
    config = settle(Config(), True, "", "", "", lambda line: None, ("fra", "iad"))
    assert (config.gateway.region, config.triton.region) == ("fra", "fra")
    assert regions_up.with_regions(config, ("fra", "iad")).region_names == ("fra", "iad")
