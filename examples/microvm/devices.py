"""The devices of QEMU's microvm with a 486 and a serial port, the same from QEMU 7.2 to 10.0.

Names, types and order are those of the vmdescription at the end of QEMU's stream. To see that of a machine of yours:

    migctl receive unix:/tmp/here.sock look.mig         # and in QEMU's monitor: migrate unix:/tmp/here.sock
    python -c 'import whimbrel_qemu; print(whimbrel_qemu.load("look.mig").tail.vmdescription.decode())'
"""

from whimbrel_device import (
    array,
    device,
    i32,
    i64,
    struct,
    subsection,
    tmp,
    u8,
    u16,
    u32,
    u64,
    unused,
    vmstate,
)


@device("timer", version_id=2)
class Timer:
    cpu_ticks_offset: int = i64()
    unused: None = unused(8)
    cpu_clock_offset: int = i64()


@vmstate("fw_cfg/dma", version_id=0)
class FwCfgDma:
    dma_addr: int = u64()


@device("fw_cfg", version_id=2)
class FwCfg:
    cur_entry: int = u16()
    cur_offset: int = u32(name="cur_offset[1]")
    dma: FwCfgDma = subsection(FwCfgDma)


@device("cpu_common")
class CpuCommon:
    halted: int = u32()
    interrupt_request: int = u32()


@vmstate("fpreg_tmp", version_id=0)
class FloatTmp:
    mantissa: int = u64(name="tmp_mant")
    exponent: int = u16(name="tmp_exp")

    def pre_save(self):
        self.mantissa, self.exponent = self.parent.value

    def post_load(self, version_id):
        self.parent.value = self.mantissa, self.exponent


@vmstate("fpreg", version_id=0)
class Float:
    value: tuple[int, int] = (0, 0)  # its own; what is sent is the tmp
    tmp: None = tmp(FloatTmp)


@vmstate("segment")
class Segment:
    selector: int = u32()
    base: int = u64()
    limit: int = u32(default=0xFFFF)
    flags: int = u32()


@vmstate("xmm_reg")
class Xmm:
    low: int = u64(name="_q_ZMMReg[0]")
    high: int = u64(name="_q_ZMMReg[1]")


@vmstate("ymmh_reg")
class Ymm:
    low: int = u64(name="_q_ZMMReg[2]")
    high: int = u64(name="_q_ZMMReg[3]")


@vmstate("mtrr_var")
class Mtrr:
    base: int = u64()
    mask: int = u64()


@vmstate("cpu/poll_control_msr")
class PollControl:
    value: int = u64(name="env.poll_control_msr")


@device("cpu", version_id=12)
class Cpu:
    regs: list[int] = array(u64, 16, name="env.regs")
    eip: int = u64(name="env.eip")
    eflags: int = u64(name="env.eflags", default=0x2)
    hflags: int = u32(name="env.hflags", default=0x40)
    fpuc: int = u16(name="env.fpuc", default=0x37F)
    fpus: int = u16(name="env.fpus_vmstate")
    fptag: int = u16(name="env.fptag_vmstate")
    fpregs_format: int = u16(name="env.fpregs_format_vmstate")
    fpregs: list[Float] = array(Float, 8, name="env.fpregs")
    segs: list[Segment] = array(Segment, 6, name="env.segs")
    ldt: Segment = struct(Segment, name="env.ldt")
    tr: Segment = struct(Segment, name="env.tr")
    gdt: Segment = struct(Segment, name="env.gdt")
    idt: Segment = struct(Segment, name="env.idt")
    sysenter_cs: int = u32(name="env.sysenter_cs")
    sysenter_esp: int = u64(name="env.sysenter_esp")
    sysenter_eip: int = u64(name="env.sysenter_eip")
    cr0: int = u64(name="env.cr[0]", default=0x60000010)
    cr2: int = u64(name="env.cr[2]")
    cr3: int = u64(name="env.cr[3]")
    cr4: int = u64(name="env.cr[4]")
    dr: list[int] = array(u64, 8, name="env.dr")
    a20_mask: int = i32(name="env.a20_mask", default=-1)
    mxcsr: int = u32(name="env.mxcsr", default=0x1F80)
    xmm: list[Xmm] = array(Xmm, 16, name="env.xmm_regs[0]")
    efer: int = u64(name="env.efer")
    star: int = u64(name="env.star")
    lstar: int = u64(name="env.lstar")
    cstar: int = u64(name="env.cstar")
    fmask: int = u64(name="env.fmask")
    kernelgsbase: int = u64(name="env.kernelgsbase")
    smbase: int = u32(name="env.smbase", default=0x30000)
    pat: int = u64(name="env.pat", default=0x0007040600070406)
    hflags2: int = u32(name="env.hflags2", default=0x101)
    vm_hsave: int = u64(name="env.vm_hsave")
    vm_vmcb: int = u64(name="env.vm_vmcb")
    tsc_offset: int = u64(name="env.tsc_offset")
    intercept: int = u64(name="env.intercept")
    intercept_cr_read: int = u16(name="env.intercept_cr_read")
    intercept_cr_write: int = u16(name="env.intercept_cr_write")
    intercept_dr_read: int = u16(name="env.intercept_dr_read")
    intercept_dr_write: int = u16(name="env.intercept_dr_write")
    intercept_exceptions: int = u32(name="env.intercept_exceptions")
    v_tpr: int = u8(name="env.v_tpr")
    mtrr_fixed: list[int] = array(u64, 11, name="env.mtrr_fixed")
    mtrr_deftype: int = u64(name="env.mtrr_deftype")
    mtrr_var: list[Mtrr] = array(Mtrr, 8, name="env.mtrr_var")
    interrupt_injected: int = i32(name="env.interrupt_injected", default=-1)
    mp_state: int = u32(name="env.mp_state")
    tsc: int = u64(name="env.tsc")
    exception_nr: int = i32(name="env.exception_nr", default=-1)
    soft_interrupt: int = u8(name="env.soft_interrupt")
    nmi_injected: int = u8(name="env.nmi_injected")
    nmi_pending: int = u8(name="env.nmi_pending")
    has_error_code: int = u8(name="env.has_error_code")
    sipi_vector: int = u32(name="env.sipi_vector")
    mcg_cap: int = u64(name="env.mcg_cap")
    mcg_status: int = u64(name="env.mcg_status")
    mcg_ctl: int = u64(name="env.mcg_ctl")
    mce_banks: list[int] = array(u64, 40, name="env.mce_banks")
    tsc_aux: int = u64(name="env.tsc_aux")
    system_time_msr: int = u64(name="env.system_time_msr")
    wall_clock_msr: int = u64(name="env.wall_clock_msr")
    xcr0: int = u64(name="env.xcr0", default=1)
    xstate_bv: int = u64(name="env.xstate_bv")
    ymm: list[Ymm] = array(Ymm, 16, name="env.xmm_regs[1]")
    poll_control: PollControl = subsection(PollControl)


@device("ioapic", version_id=3)
class IoApic:
    id: int = u8()
    ioregsel: int = u8()
    unused: None = unused(8)
    irr: int = u32()
    ioredtbl: list[int] = array(u64, 24)


@vmstate("serial", version_id=3)
class Uart:
    divider: int = u16(default=12)
    rbr: int = u8()
    ier: int = u8()
    iir: int = u8(default=1)
    lcr: int = u8()
    mcr: int = u8(default=8)
    lsr: int = u8(default=0x60)  # ready for the next character
    msr: int = u8(default=0xB0)
    scr: int = u8()
    fcr: int = u8(name="fcr_vmstate")


@device("serial", version_id=3)
class Serial:
    state: Uart = struct(Uart)
