"""Streams, events and callbacks, as the datasystem's client uses them."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    NULL,
    OUT_I32,
    OUT_POINTER,
    WITHIN_DEVICE,
    Scene,
    i32,
    pointer,
    size,
    u64,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, rows

ROWS, row = rows()
_WHEEL = "the datasystem's client"


@row(
    "S2",
    "aclrtCreateStream",
    "aclrtMemcpyAsync",
    "aclrtSynchronizeStream",
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtDestroyStream",
    "aclrtDestroyStreamForce",
    done="a copy in a stream, both waits, destroyed; destroyed again; another one by force",
    expected=(0, 0, 0, 0, REFUSED, 0),
    context="a thread with a device",
    owner="one destroy for each stream",
    source="acl_rt.h",
    needed_by=_WHEEL,
)
def stream(scene: Scene) -> object:
    process = scene.process()
    one, other = process.malloc(CHUNK), process.malloc(CHUNK)
    first, second = (pointer(process.value("aclrtCreateStream", OUT_POINTER)) for _ in range(2))
    copy = pointer(other), size(64), pointer(one), size(64), i32(WITHIN_DEVICE), first
    return (
        process.code("aclrtMemcpyAsync", *copy),
        process.code("aclrtSynchronizeStream", first),
        process.code("aclrtSynchronizeStreamWithTimeout", first, i32(1000)),
        process.code("aclrtDestroyStream", first),
        process.code("aclrtDestroyStream", first),
        process.code("aclrtDestroyStreamForce", second),
    )


@row(
    "S3",
    "aclrtCreateEvent",
    "aclrtRecordEvent",
    "aclrtSynchronizeEvent",
    "aclrtSynchronizeEventWithTimeout",
    "aclrtQueryEventStatus",
    "aclrtDestroyEvent",
    done="recorded, both waits, its status, destroyed",
    expected=(0, 0, 0, 1, 0),
    context="a thread with a device",
    owner="one destroy for each event",
    source="acl_rt.h",
    needed_by=_WHEEL,
)
def event(scene: Scene) -> object:
    process = scene.process()
    made = pointer(process.value("aclrtCreateEvent", OUT_POINTER))
    return (
        process.code("aclrtRecordEvent", made, pointer(process.value("aclrtCreateStream", OUT_POINTER))),
        process.code("aclrtSynchronizeEvent", made),
        process.code("aclrtSynchronizeEventWithTimeout", made, i32(1000)),
        process.value("aclrtQueryEventStatus", made, OUT_I32),
        process.code("aclrtDestroyEvent", made),
    )


@row(
    "S4",
    "aclrtSubscribeReport",
    "aclrtUnSubscribeReport",
    "aclrtLaunchCallback",
    "aclrtProcessReport",
    done="a thread subscribes, launches a callback and processes it; nothing more comes; unsubscribes",
    expected=(0, 0, 0, 107019, 0),
    context="callbacks run in the thread that subscribed, in aclrtProcessReport",
    source="acl_rt.h",
    needed_by=_WHEEL,
)
def callback(scene: Scene) -> object:
    process = scene.process()
    made = pointer(process.value("aclrtCreateStream", OUT_POINTER))
    thread = u64(process.code("pthread_self", pointer=True))
    return (
        process.code("aclrtSubscribeReport", thread, made),
        process.code("aclrtLaunchCallback", ("function", "getpid"), NULL, i32(0), made),
        process.code("aclrtProcessReport", i32(5000)),
        process.code("aclrtProcessReport", i32(100)),
        process.code("aclrtUnSubscribeReport", thread, made),
    )


@row(
    "S5",
    "rtNotifyCreate",
    "rtNotifyRecord",
    "rtNotifyWait",
    "rtNotifyDestroy",
    done="created, recorded and awaited in a stream, the stream is done, destroyed",
    expected=(0, 0, 0, 0, 0),
    context="a thread with a device",
    owner="one destroy for each",
    source="rt 9.0.0 inc/runtime/rt_inner_event.h",
    needed_by=_WHEEL,
)
def notify(scene: Scene) -> object:
    process = scene.process()
    made = process.call("rtNotifyCreate", i32(0), OUT_POINTER)
    flag, line = pointer(made.value), pointer(process.value("aclrtCreateStream", OUT_POINTER))
    return (
        made.code,
        process.code("rtNotifyRecord", flag, line),
        process.code("rtNotifyWait", flag, line),
        process.code("aclrtSynchronizeStreamWithTimeout", line, i32(5000)),
        process.code("rtNotifyDestroy", flag),
    )
