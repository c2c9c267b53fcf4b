"""From configuration to connections."""

from gateway.config import Config
from gateway.edge.link import Link

CONNECT_TIMEOUT_S = 10.0


def make_link(config: Config, name: str, region: str) -> Link:
    """To the region's servers; the rest of the world is reached through them."""
    return Link(config.nats, config.nats_urls(region), name)
