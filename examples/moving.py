"""A program that moves itself: `moving.py wait tcp::4444` there, then `moving.py go tcp:THERE:4444` here."""

import mmap
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
    while not time.sleep(0.0001):  # for ever
        with still:
            memory[counter.value % len(memory)] = counter.value % 251
            counter.value += 1


memory, still = mmap.mmap(-1, 16 << 20), threading.Lock()  # who holds the lock stops the work
machine = Machine("moving-1.0", stop=still.acquire, start=still.release)
machine.add(RAMBlock("memory", memory=memory))
counter = machine.add(Counter())
kernel = Kernel(machine)
waits = sys.argv[1] == "wait" and still.acquire()
threading.Thread(target=work, daemon=True).start()
m = kernel.incoming(sys.argv[2]) if waits else kernel.migrate(sys.argv[2])
if waits:
    print("waiting at", *m.addresses, flush=True)
m.wait()
print(f"{machine.run_state} with the counter at {counter.value}", flush=True)
threading.Event().wait(None if machine.is_running else 0)  # it goes on there; here it ends
