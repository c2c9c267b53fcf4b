"""From configuration to connections."""

from gateway.config import Config
from gateway.edge.link import Link

CONNECT_TIMEOUT_S = 10.0


def make_link(config: Config, name: str) -> Link:
    """To the servers that all regions share; the configuration refuses others."""
    return Link(config.nats, config.nats_urls(config.region_names[0]), name)
