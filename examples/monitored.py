"""A program that is driven by its monitor, from outside: `monitored.py unix:a.qmp`, and `monitored.py unix:b.qmp wait` for the
other side. Then, for instance: `migctl -m unix:b.qmp incoming unix:m`, `migctl -m unix:a.qmp migrate unix:m`.
"""

import sys
import threading
import time

from whimbrel import Kernel, Machine
from whimbrel_device import device, u64
from whimbrel_ram import RAMBlock


@device("counter", version_id=1)
class Counter:
    value: int = u64()


def work():
    while not time.sleep(0.001):  # for ever
        with still:
            counter.value += 1
            memory.buffer[counter.value % memory.size] = counter.value % 251


still, over = threading.Lock(), threading.Event()  # who holds the lock stops the work
machine = Machine("monitored-1.0", stop=still.acquire, start=still.release, quit=over.set)
memory = machine.add(RAMBlock("memory", 16 << 20))
counter = machine.add(Counter())
kernel = Kernel(machine)
if sys.argv[2:] == ["wait"] and still.acquire():
    kernel.defer_incoming()
monitor = kernel.monitor(sys.argv[1])
print("monitor at", *monitor.addresses, flush=True)
threading.Thread(target=work, daemon=True).start()
over.wait()  # until somebody says quit
monitor.close()
print(f"{machine.run_state} with the counter at {counter.value}", flush=True)
