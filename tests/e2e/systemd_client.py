"""One instance beside a broker under systemd: `systemd_client.py ACTION`, prints one JSON line. Runs as any user."""

from __future__ import annotations

import json
import sys

import grpc
import numpy as np

from weight_broker.client import BrokerClient
from weight_broker.connection.attach import AttachConnection
from weight_broker.errors import BrokerError
from weight_broker.key import WeightSetKey
from weight_broker.runtime_directory import runtime_directory
from weight_broker.v1 import administration_service_pb2, administration_service_pb2_grpc

KEY = WeightSetKey(model="systemd", revision="1", checkpoint_digest="0" * 64, dtype="float32")
ELEMENTS = 100_000


def publish() -> str:
    """Publishes, says so, and stays until standard input ends."""
    client = BrokerClient(name="publisher")
    with client.publish(KEY, {"weight": np.arange(ELEMENTS, dtype=np.float32)}):
        print(json.dumps("published"), flush=True)
        sys.stdin.read()
    client.close()
    return "retracted"


def acquire() -> dict[str, object]:
    """Fills a tensor and says whether the bytes are the publisher's."""
    client = BrokerClient(name="receiver")
    weight = np.zeros(ELEMENTS, dtype=np.float32)
    report = client.acquire(KEY, {"weight": weight}, timeout=20, wait=False)
    client.close()
    same = bool(np.array_equal(weight, np.arange(ELEMENTS, dtype=np.float32)))
    return {"equal": same, "size_bytes": report.size_bytes}


def evict() -> str:
    """Evicts a publication that does not exist: the status code says whether the caller may administer."""
    attachment = AttachConnection(runtime_directory() / "attach.sock", "administrator")
    token = attachment.connect().session_token
    with grpc.insecure_channel(f"unix:{runtime_directory() / 'broker.sock'}") as channel:
        stub = administration_service_pb2_grpc.AdministrationServiceStub(channel)
        try:
            stub.Evict(
                administration_service_pb2.EvictRequest(publication_id="absent"),
                metadata=(("weight-broker-session-bin", token),),
                timeout=10,
            )
        except grpc.RpcError as error:
            return str(error.code().name)
        finally:
            attachment.close()
    return "OK"


def main() -> None:
    """Runs the action named on the command line."""
    action = {"publish": publish, "acquire": acquire, "evict": evict}[sys.argv[1]]
    try:
        result: object = action()
    except BrokerError as error:
        result = {"error": type(error).__name__, "reason": error.reason, "message": error.message}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
