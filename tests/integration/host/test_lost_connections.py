"""The attach connection is lost while process and broker live: the broker keeps what the process has published."""

from __future__ import annotations

import numpy as np

from support.broker_process import BrokerProcess
from support.waiting import eventually
from weight_broker import BrokerClient, Publication, WeightSetKey


def published(client: BrokerClient) -> Publication:
    return client.publish(WeightSetKey("model"), {"w": np.ones(1000, np.float32)})


def lose_connection(client: BrokerClient) -> None:
    client._attachment.session().connection.break_off()


def test_a_publication_can_be_retracted(broker: BrokerProcess) -> None:
    with BrokerClient(broker.runtime_directory) as client:
        publication = published(client)
        lose_connection(client)
        publication.retract()
        assert broker.publications() == []


def test_a_publication_is_published_once_more_and_not_twice(broker: BrokerProcess) -> None:
    with BrokerClient(broker.runtime_directory) as client:
        publication = published(client)
        former = publication.id
        lose_connection(client)
        eventually(lambda: publication.id != former)
        assert [found.publication_id for found in broker.publications()] == [publication.id]
