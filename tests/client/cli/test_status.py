"""What `status` computes from a broker's answer."""

from __future__ import annotations

from weight_broker.cli.status import host_line
from weight_broker.v1 import resources_pb2 as pb


def test_an_age_is_the_brokers_also_if_it_is_none_and_the_clock_was_set() -> None:
    host = pb.Host(hostname="host")
    host.start_time.FromSeconds(1)  # 1970: the clock was wrong when the broker started
    host.uptime.FromSeconds(0)
    assert "up 0s;" in host_line(host)
    host.uptime.FromSeconds(61)
    assert "up 1m 1s;" in host_line(host)
