/* See board.h. Addresses: QEMU, hw/riscv/virt.c. Card: "Virtual I/O Device (VIRTIO) Version 1.1", 2.6, 4.2 and 5.1. */

#include "board.h"

#include <stddef.h>

#define FINISHER 0x100000UL
#define FINISHER_FAIL 0x13333
#define MTIMECMP 0x2004000UL
#define MTIME 0x200bff8UL
#define TICKS_PER_MS 10000UL
#define UART 0x10000000UL
#define UART_STATUS (UART + 5)
#define UART_THR_EMPTY 0x20
#define VIRTIO_SLOT(n) (0x10001000UL + 0x1000UL * (n))
#define VIRTIO_SLOTS 8
#define MIE_MTIE (1UL << 7)

#define BYTE(address) (*(volatile uint8_t *)(address))
#define WORD(address) (*(volatile uint32_t *)(address))
#define LONG(address) (*(volatile uint64_t *)(address))
#define CARD(offset) WORD(card + (offset))
#define FENCE() __asm__ volatile("fence iorw, iorw" ::: "memory")

enum { /* registers of the card */
    MAGIC = 0x00, VERSION = 0x04, DEVICE_ID = 0x08, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30, QUEUE_NUM = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, STATUS = 0x70,
    QUEUE_DESC = 0x80, QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0, CONFIG = 0x100,
};

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

#define NET_F_MAC (1U << 5)
#define F_VERSION_1 (1U << 0) /* in the upper half */
#define DESC_F_WRITE 2

#define RING 16
#define HEADER 12 /* struct virtio_net_hdr, all zero */
#define ETHERNET 14
#define NAME_MAX 64
#define FRAME_MIN 60
#define FRAME_MAX 1514

struct queue {
    struct { uint64_t addr; uint32_t len; uint16_t flags, next; } desc[RING] __attribute__((aligned(16)));
    struct { uint16_t flags, idx, ring[RING]; } avail;
    struct { uint16_t flags, idx; struct { uint32_t id, len; } ring[RING]; } used __attribute__((aligned(4)));
};

enum { RX, TX };

static volatile struct queue queues[2];
static uint16_t seen[2]; /* the used.idx up to which entries were handled */
static uint8_t buffers[2][RING][HEADER + FRAME_MAX + 2];
static uintptr_t card;

uint64_t milliseconds(void)
{
    return LONG(MTIME) / TICKS_PER_MS;
}

void say(const char *words, const char *more)
{
    for (const char *parts[] = {words, more, "\n"}, **part = parts; part < parts + 3; part++)
        for (const char *c = *part; *c; c++) {
            while (!(BYTE(UART_STATUS) & UART_THR_EMPTY))
                ;
            BYTE(UART) = (uint8_t)*c;
        }
}

bool equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static void give(unsigned number, uint16_t id)
{
    volatile struct queue *queue = &queues[number];
    queue->avail.ring[queue->avail.idx % RING] = id;
    FENCE();
    queue->avail.idx++;
    FENCE();
    CARD(QUEUE_NOTIFY) = number;
}

static void open_queue(unsigned number)
{
    volatile struct queue *queue = &queues[number];
    CARD(QUEUE_SEL) = number;
    CARD(QUEUE_NUM) = RING;
    CARD(QUEUE_DESC) = (uint32_t)(uintptr_t)queue->desc;
    CARD(QUEUE_DRIVER) = (uint32_t)(uintptr_t)&queue->avail;
    CARD(QUEUE_DEVICE) = (uint32_t)(uintptr_t)&queue->used;
    CARD(QUEUE_READY) = 1;
    for (unsigned id = 0; id < RING; id++) {
        queue->desc[id].addr = (uintptr_t)buffers[number][id];
        queue->desc[id].len = sizeof buffers[number][id];
        queue->desc[id].flags = number == RX ? DESC_F_WRITE : 0;
    }
}

void link_open(void)
{
    for (unsigned slot = 0; slot < VIRTIO_SLOTS; slot++) {
        card = VIRTIO_SLOT(slot);
        if (CARD(MAGIC) == 0x74726976 && CARD(VERSION) == 2 && CARD(DEVICE_ID) == 1)
            break;
        card = 0;
    }
    if (!card) {
        say("no network card", "");
        WORD(FINISHER) = FINISHER_FAIL;
    }
    CARD(STATUS) = 0;
    CARD(STATUS) = ACKNOWLEDGE | DRIVER;
    CARD(DRIVER_FEATURES_SEL) = 0;
    CARD(DRIVER_FEATURES) = NET_F_MAC;
    CARD(DRIVER_FEATURES_SEL) = 1;
    CARD(DRIVER_FEATURES) = F_VERSION_1;
    CARD(STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    open_queue(RX);
    open_queue(TX);
    CARD(STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    for (uint16_t id = 0; id < RING; id++)
        give(RX, id);
    /* The CPU never takes an interrupt, but the timer interrupt ends a wfi each millisecond. */
    __asm__ volatile("csrw mie, %0" ::"r"(MIE_MTIE));
}

void link_send(const char *name)
{
    static uint16_t sent;
    while ((uint16_t)(sent - queues[TX].used.idx) == RING)
        sleep_a_while(); /* The ring is full: wait until QEMU has read a frame. */
    uint16_t id = sent++ % RING;
    uint8_t *frame = buffers[TX][id] + HEADER;
    size_t size = ETHERNET;
    for (int i = 0; i < 6; i++) {
        frame[i] = 0xff;
        frame[6 + i] = BYTE(card + CONFIG + i);
    }
    frame[12] = 0x88;
    frame[13] = 0x00;
    while (*name && size < ETHERNET + NAME_MAX)
        frame[size++] = (uint8_t)*name++;
    while (size < FRAME_MIN)
        frame[size++] = 0;
    queues[TX].desc[id].len = (uint32_t)(HEADER + size);
    give(TX, id);
}

const char *link_receive(void)
{
    static char name[NAME_MAX + 1];
    volatile struct queue *queue = &queues[RX];
    while (seen[RX] != queue->used.idx) {
        FENCE();
        uint16_t id = (uint16_t)queue->used.ring[seen[RX] % RING].id;
        size_t size = queue->used.ring[seen[RX] % RING].len - HEADER;
        const uint8_t *frame = buffers[RX][id] + HEADER;
        size_t length = 0;
        seen[RX]++;
        if (size > ETHERNET && frame[12] == 0x88 && frame[13] == 0x00)
            while (length < NAME_MAX && ETHERNET + length < size && frame[ETHERNET + length]) {
                name[length] = (char)frame[ETHERNET + length];
                length++;
            }
        name[length] = 0;
        give(RX, id);
        if (length)
            return name;
    }
    return NULL;
}

void sleep_a_while(void)
{
    LONG(MTIMECMP) = LONG(MTIME) + TICKS_PER_MS;
    __asm__ volatile("wfi" ::: "memory");
}
