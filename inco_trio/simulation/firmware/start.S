/* QEMU jumps here in machine mode, with the address of the device tree in a1. */
    .section .text.start
    .globl _start
_start:
    la      sp, stack_top
    la      t0, trapped
    csrw    mtvec, t0
    la      t0, bss_start
    la      t1, bss_end
1:  bgeu    t0, t1, 2f
    sd      zero, 0(t0)
    addi    t0, t0, 8
    j       1b
2:  mv      a0, a1
    call    core1
    j       .

    .balign 4
trapped:
    csrr    a0, mcause
    csrr    a1, mepc
    call    trap
    j       .
