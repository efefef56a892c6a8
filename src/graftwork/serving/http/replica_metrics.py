"""/metrics of all replicas as one: every sample gets the label `replica`; the router's own beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families


class RouterMetrics:
    """replicas: by number, with `client`, `open` and `starts`."""

    def __init__(self, replicas: Mapping[int, Any]):
        self.replicas, self.registry = replicas, CollectorRegistry()
        self.requests = Counter("graftwork_router_requests", "Requests sent to a replica, by why it was chosen (affinity, overflow, least, "
                                "first: the first that lives, again: another one had ended)", ["replica", "why"], registry=self.registry)
        self.answers = Counter("graftwork_router_responses", "Responses to clients, by status", ["status"], registry=self.registry)

    def text(self, texts: Mapping[int, str]) -> bytes:
        """texts: what each replica says at /metrics."""
        return generate_latest(_All([*self.registry.collect(), *self._gauges(), *merged(texts)]))

    def _gauges(self) -> Iterator[Metric]:
        for name, text, value in (
                ("graftwork_replica_up", "1 while the replica answers", lambda replica: int(replica.client is not None)),
                ("graftwork_replica_requests_open", "Requests that the router has at the replica", lambda replica: replica.open),
                ("graftwork_replica_starts", "How often the replica was started", lambda replica: replica.starts)):
            family = GaugeMetricFamily(name, text, labels=["replica"])
            for number, replica in self.replicas.items():
                family.add_metric([str(number)], value(replica))
            yield family


def merged(texts: Mapping[int, str]) -> list[Metric]:
    """Families of several exports, in the order of the first that has them."""
    families: dict[str, Metric] = {}
    for number, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {**sample.labels, "replica": str(number)}, sample.value)
    return list(families.values())


class _All:
    """What `generate_latest` takes as a registry."""

    def __init__(self, families: list[Metric]):
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families
