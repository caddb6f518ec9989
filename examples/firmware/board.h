/* The devices of QEMU's RISC-V machine `virt`: a serial line, a clock, and a network card, which is the link. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Open the link; end QEMU with exit code 1 if it has no network card. */
void link_open(void);

/* Send the signal with this wire name (at most 64 characters). */
void link_send(const char *name);

/* Return the wire name of the next received signal, or NULL. The name is valid until the next call. */
const char *link_receive(void);

/* Sleep for a millisecond, or until a frame arrives. */
void sleep_a_while(void);

/* Return the milliseconds since the machine started. */
uint64_t milliseconds(void);

/* Write `words` and `more` as one line to the serial line. */
void say(const char *words, const char *more);

bool equal(const char *a, const char *b);
