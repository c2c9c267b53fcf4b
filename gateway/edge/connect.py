"""From configuration to connections."""

from gateway.config import Config
from gateway.edge.link import Link
from gateway.errors import Unavailable

CONNECT_TIMEOUT_S = 10.0


def make_link(config: Config, name: str) -> Link:
    """Raises Unavailable when a region has servers of its own."""
    for region in config.regions:
        if region.nats_urls:
            raise Unavailable(
                f"regions: {region.name} has nats_urls of its own; one set of servers for all regions is what this version"
                " supports: remove nats_urls from the region and use [nats] urls",
                reason="UNSUPPORTED",
            )
    return Link(config.nats, config.nats.urls, name)
