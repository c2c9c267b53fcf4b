"""The JetStream of each region, seen from one of them."""

from gateway.config import Config
from gateway.edge.jetstream import JetStream


class Sites:
    """A site is a group of regions with the same servers. `own` is that of the process, which alone it cannot do without."""

    def __init__(self, js: JetStream, config: Config, region: str) -> None:
        self.own = js
        self.own_regions = config.site(region)
        domains = {name: config.domain(name) for name in config.region_names if name not in self.own_regions}
        self.others = {domain: js.at(domain) for domain in domains.values()}
        self.silent_until_s: dict[str, float] = {}  # regions that did not answer lately, by the loop's clock
        self._by_region = {name: self.others[domain] for name, domain in domains.items()}

    def js_of(self, region: str) -> JetStream:
        return self._by_region.get(region, self.own)
