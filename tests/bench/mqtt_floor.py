"""The floor of the gateway: the shortest Trio program that publishes the same messages with the mqtt5 codec.

usage: mqtt_floor.py PORT COUNT PAUSE

The program publishes COUNT messages at QoS 1, waits PAUSE seconds before each message, and prints the CPU time in
seconds. It obeys Receive Maximum, but gives none of the gateway's guarantees: no checks, no reconnects, no pings.
"""

import sys
import time

import mqtt5
import trio

TOPIC = "lab/floor/inbound/ihub_hwwd_irq"


async def main(port: int, count: int, pause: float) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(mqtt5.ConnectPacket("floor").write())
    connack = mqtt5.read(memoryview(bytes(await stream.receive_some(1000))))[0]
    assert isinstance(connack, mqtt5.ConnAckPacket)
    window = trio.Semaphore(connack.receive_max)
    begin = time.process_time()

    async def receive() -> None:
        left, data = count, b""
        while left:
            data += await stream.receive_some(65_536)
            while len(data) >= 4:
                data = data[mqtt5.read(memoryview(data))[1] :]
                left -= 1
                window.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        for sequence in range(1, count + 1):
            if pause:
                await trio.sleep(pause)  # Limit the message rate.
            await window.acquire()
            body = (
                f'{{"sequence": {sequence}, "boot": "{0:016x}", "time": {time.time()!r}, '
                f'"monotonic_ns": {time.monotonic_ns()}}}'
            )
            packet_id = sequence % 65_535 + 1
            qos = mqtt5.QoS.AT_LEAST_ONCE
            await stream.send_all(mqtt5.PublishPacket(TOPIC, body.encode(), qos=qos, packet_id=packet_id).write())
    sys.stdout.write(f"{time.process_time() - begin}\n")


trio.run(main, int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
