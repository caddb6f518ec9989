/* What QEMU's RISC-V machine `virt` has for us: a serial line, a clock, and the inter-core link on its network card. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Start the link; ends QEMU with exit code 1 if there is no network card. */
void link_open(void);

/* Send the signal of this wire name, of at most 64 characters. */
void link_send(const char *name);

/* The wire name of the next signal that has come, valid until the next call; NULL if there is none. */
const char *link_receive(void);

/* Sleep for a millisecond, or until a frame has come. */
void sleep_a_while(void);

/* Milliseconds since the machine was started. */
uint64_t milliseconds(void);

/* Write a line to the serial line. */
void say(const char *words, const char *more);

bool equal(const char *a, const char *b);
