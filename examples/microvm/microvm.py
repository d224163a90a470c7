"""QEMU's microvm, run by an emulator of a dozen instructions: it moves into a real QEMU, and back.

It counts: 00000001, 00000002, ... on its serial port, which is the standard output here.

    qemu-system-x86_64 -machine microvm,pic=off,pit=off,rtc=off,acpi=off -accel tcg -cpu 486 -m 1 -nodefaults \
        -display none -serial stdio -incoming unix:/tmp/qemu.sock
    python examples/microvm/microvm.py go unix:/tmp/qemu.sock       # runs here, then goes on in that QEMU

    python examples/microvm/microvm.py wait unix:/tmp/here.sock     # and the other way round:
    (qemu) migrate unix:/tmp/here.sock
"""

import contextlib
import sys
import threading

from devices import Cpu, CpuCommon, FwCfg, IoApic, Segment, Serial, Timer

from whimbrel import Kernel, Machine, MigrationError
from whimbrel_ram import RAMBlock

AX, DX, SI, DI = 0, 2, 6, 7
ZERO_FLAG = 0x40
LINE_STATUS, TRANSMIT = 0x3FD, 0x3F8
PROGRAM = bytes.fromhex(
    "bf2d7c"  # 7c00 next:  mov di, last digit
    "fe05"  #   7c03 carry: inc byte [di]
    "803d3a"  # 7c05        cmp byte [di], '9' + 1
    "7506"  #   7c08        jne print
    "c60530"  # 7c0a        mov byte [di], '0'
    "4f"  #     7c0d        dec di
    "ebf3"  #   7c0e        jmp carry
    "be267c"  # 7c10 print: mov si, text
    "bafd03"  # 7c13 wait:  mov dx, line status
    "ec"  #     7c16 poll:  in al, dx
    "a820"  #   7c17        test al, may transmit
    "74fb"  #   7c19        jz poll
    "baf803"  # 7c1b        mov dx, transmit
    "ac"  #     7c1e        lodsb
    "ee"  #     7c1f        out dx, al
    "3c0a"  #   7c20        cmp al, newline
    "75ef"  #   7c22        jne wait
    "ebda"  #   7c24        jmp next
)
TEXT = b"00000000\n"  # 7c26


class MicroVM:
    """The machine: memory and devices as QEMU has them, and what runs them."""

    def __init__(self):
        self.turn = threading.Lock()  # who holds it, and nobody else, touches the machine
        self.machine = Machine("microvm", stop=self.turn.acquire, start=self.turn.release)
        memory = self.machine.add(RAMBlock("microvm.ram", 1 << 20))
        self.machine.add(RAMBlock("pc.bios", 64 << 10))  # empty: the program needs none
        self.memory = memory.buffer
        self.machine.add(Timer())
        self.machine.add(FwCfg())
        self.machine.add(CpuCommon())
        self.cpu = self.machine.add(Cpu())
        self.machine.add(IoApic(ioredtbl=[1 << 16] * 24))  # every line masked
        self.serial = self.machine.add(Serial())

    def boot(self):
        """As a BIOS leaves it: in real mode, with the program at 7c00."""
        code, data = Segment(flags=0x9B00), Segment(flags=0x9300)
        self.cpu.segs = [data, code, data, data, data, data]  # ES, CS, SS, DS, FS, GS
        self.cpu.ldt, self.cpu.tr = Segment(flags=0x8200), Segment(flags=0x8B00)
        self.cpu.eip = 0x7C00
        self.memory[0x7C00 : 0x7C00 + len(PROGRAM + TEXT)] = PROGRAM + TEXT

    def run(self):
        while True:
            with self.turn:
                for _ in range(100):
                    self.step()

    def step(self):
        """One instruction."""
        cpu, memory, at = self.cpu, self.memory, self.cpu.eip
        opcode, low = memory[at], memory[at + 1]
        short = at + 2 + (low ^ 0x80) - 0x80  # where a jump goes
        word = low | memory[at + 2] << 8
        di, al = cpu.regs[DI] & 0xFFFF, cpu.regs[AX] & 0xFF
        match opcode:
            case 0xBA | 0xBE | 0xBF:  # mov dx/si/di, word
                cpu.regs[opcode - 0xB8], cpu.eip = word, at + 3
            case 0xFE:  # inc byte [di]
                memory[di] = (memory[di] + 1) & 0xFF
                self.flag(memory[di] == 0, at + 2)
            case 0x80:  # cmp byte [di], byte
                self.flag(memory[di] == memory[at + 2], at + 3)
            case 0xC6:  # mov byte [di], byte
                memory[di], cpu.eip = memory[at + 2], at + 3
            case 0x4F:  # dec di
                cpu.regs[DI] = (di - 1) & 0xFFFF
                self.flag(cpu.regs[DI] == 0, at + 1)
            case 0xA8:  # test al, byte
                self.flag(al & low == 0, at + 2)
            case 0x3C:  # cmp al, byte
                self.flag(al == low, at + 2)
            case 0xAC:  # lodsb
                si = cpu.regs[SI] & 0xFFFF
                self.al(memory[si], at + 1)
                cpu.regs[SI] = (si + 1) & 0xFFFF
            case 0xEC if cpu.regs[DX] & 0xFFFF == LINE_STATUS:  # in al, dx
                self.al(self.serial.state.lsr, at + 1)
            case 0xEE if cpu.regs[DX] & 0xFFFF == TRANSMIT:  # out dx, al
                self.transmit(al)
                cpu.eip = at + 1
            case 0xEB:  # jmp
                cpu.eip = short
            case 0x74 | 0x75:  # jz, jnz
                zero = bool(cpu.eflags & ZERO_FLAG)
                cpu.eip = short if zero == (opcode == 0x74) else at + 2
            case _:
                raise NotImplementedError(f"instruction {opcode:#04x} at {at:#06x}")

    def flag(self, zero, next_at):
        """The one flag that the program looks at."""
        self.cpu.eflags = self.cpu.eflags & ~ZERO_FLAG | ZERO_FLAG * zero
        self.cpu.eip = next_at

    def al(self, value, next_at):
        self.cpu.regs[AX] = self.cpu.regs[AX] & ~0xFF | value
        self.cpu.eip = next_at

    def transmit(self, character):
        sys.stdout.write(chr(character))
        sys.stdout.flush()


def main(command, uri):
    vm = MicroVM()
    kernel = Kernel(vm.machine)
    vm.turn.acquire()
    if command == "wait":
        migration = kernel.incoming(uri)
        print("waiting at", *migration.addresses, file=sys.stderr, flush=True)
    else:
        vm.boot()
        vm.turn.release()
    threading.Thread(target=vm.run, daemon=True).start()
    if command == "go":
        migration = kernel.migrate(uri)
    with contextlib.suppress(MigrationError):  # the kernel has said why, and the machine runs on
        migration.wait()
    print(f"{vm.machine.run_state} at {vm.cpu.eip:#06x}", file=sys.stderr, flush=True)
    threading.Event().wait(None if vm.machine.is_running else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
