/* Core 1 of the simulation: firmware for QEMU's RISC-V machine `virt`, without an operating system.
 *
 * The firmware drives the virtio network card, receives the frames of the inter-core link (EtherType 0x8800, a signal's
 * name padded with NULs), and answers by the rules of its command line (see netns/core1/README.md). It reports its
 * actions on the serial line, and sleeps (wfi) while it is idle.
 *
 * No frame is lost: a receive buffer returns to the ring only after its frame was processed. If the transmit ring is
 * full, a frame waits. Then the receive ring fills up, too, and QEMU stops reading the link.
 *
 * Addresses: hw/riscv/virt.c. virtio: "Virtual I/O Device (VIRTIO) Version 1.1", sections 2.6 (split virtqueues), 4.2
 * (MMIO), 5.1 (network device). Interrupts: the RISC-V PLIC specification. Device tree: Devicetree Specification, 5.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The machine */

#define FINISHER 0x100000UL
#define FINISHER_FAIL 0x13333 /* QEMU ends with exit code 1 */
#define FINISHER_RESET 0x7777

#define MTIMECMP 0x2004000UL
#define MTIME 0x200bff8UL
#define TICKS_PER_SECOND 10000000UL

#define PLIC_PRIORITY(irq) (0xc000000UL + 4 * (irq))
#define PLIC_ENABLE 0xc002000UL /* of the first hart in machine mode, and so are the next two */
#define PLIC_THRESHOLD 0xc200000UL
#define PLIC_CLAIM 0xc200004UL

#define UART 0x10000000UL /* NS16550: data at 0, line status at 5 */
#define UART_THR_EMPTY 0x20

#define VIRTIO_SLOT(n) (0x10001000UL + 0x1000UL * (n))
#define VIRTIO_SLOTS 8
#define VIRTIO_IRQ(n) (1 + (n))

#define MIE_MTIE (1UL << 7)
#define MIE_MEIE (1UL << 11)

static uint32_t get(uintptr_t address)
{
    return *(volatile uint32_t *)address;
}

static void put(uintptr_t address, uint32_t value)
{
    *(volatile uint32_t *)address = value;
}

static void fence(void)
{
    __asm__ volatile("fence iorw, iorw" ::: "memory");
}

static uint64_t ticks(void)
{
    return *(volatile uint64_t *)MTIME;
}

/* GCC generates calls of these two functions. */
void *memset(void *to, int byte, size_t size)
{
    for (unsigned char *at = to; size--;)
        *at++ = (unsigned char)byte;
    return to;
}

void *memcpy(void *to, const void *from, size_t size)
{
    const unsigned char *source = from;
    for (unsigned char *at = to; size--;)
        *at++ = *source++;
    return to;
}

/* Text in the command line, without a terminating NUL */

struct text {
    const char *start;
    size_t length;
};

#define TEXT(literal) ((struct text){literal, sizeof(literal) - 1})

static bool equal(struct text a, struct text b)
{
    if (a.length != b.length)
        return false;
    for (size_t i = 0; i < a.length; i++)
        if (a.start[i] != b.start[i])
            return false;
    return true;
}

/* Split `text` at the first `separator`: return the part before, and leave the part after it in `text`. */
static struct text cut(struct text *text, char separator)
{
    struct text before = {text->start, 0};
    while (before.length < text->length && text->start[before.length] != separator)
        before.length++;
    size_t skipped = before.length < text->length ? before.length + 1 : before.length;
    text->start += skipped;
    text->length -= skipped;
    return before;
}

/* The serial line */

static void say_char(char c)
{
    while (!(*(volatile uint8_t *)(UART + 5) & UART_THR_EMPTY))
        ;
    *(volatile uint8_t *)UART = (uint8_t)c;
}

static void say_text(struct text text)
{
    for (size_t i = 0; i < text.length; i++)
        say_char(text.start[i]);
}

static void say(const char *words)
{
    while (*words)
        say_char(*words++);
}

static void say_number(uint64_t number, unsigned base, int digits)
{
    char reversed[20];
    int length = 0;
    do {
        reversed[length++] = "0123456789abcdef"[number % base];
        number /= base;
    } while (number || length < digits);
    while (length)
        say_char(reversed[--length]);
}

static void say_decimal(uint64_t number)
{
    say_number(number, 10, 1);
}

static void say_line(const char *words, struct text name)
{
    say("core1: ");
    say(words);
    say_text(name);
    say("\n");
}

/* Print the reason, and end QEMU with exit code 1. */
static _Noreturn void fail(const char *what, struct text where)
{
    say("core1: error: ");
    say(what);
    say_text(where);
    say("\n");
    for (;;)
        put(FINISHER, FINISHER_FAIL);
}

_Noreturn void trap(uint64_t mcause, uint64_t mepc)
{
    say("core1: error: trap, mcause 0x");
    say_number(mcause, 16, 1);
    say(", mepc 0x");
    say_number(mepc, 16, 1);
    say("\n");
    for (;;)
        put(FINISHER, FINISHER_FAIL);
}

/* The rules: the actions for each inbound name */

#define NAME_MAX 64
#define RULES_MAX 256

enum action { SEND, FLOOD, HANG, RESET, REPORT };

struct rule {
    enum action action;
    struct text on;     /* empty: at boot */
    struct text signal; /* of SEND and FLOOD */
    uint32_t count;     /* of FLOOD */
    uint64_t pending;   /* frames of FLOOD that are still to be sent */
};

static struct rule rules[RULES_MAX];
static size_t rule_count;
static bool verbose;

static struct text name_in(struct text name, struct text word)
{
    bool printable = true;
    for (size_t i = 0; i < name.length; i++)
        printable &= name.start[i] >= '!' && name.start[i] <= '~';
    if (name.length < 1 || name.length > NAME_MAX || !printable)
        fail("a name has 1 to 64 printable characters, not so in ", word);
    return name;
}

static uint32_t count_in(struct text digits, struct text word)
{
    uint32_t count = 0;
    if (digits.length < 1 || digits.length > 9)
        fail("a count is a number of 1 to 9 digits, not so in ", word);
    for (size_t i = 0; i < digits.length; i++) {
        if (digits.start[i] < '0' || digits.start[i] > '9')
            fail("a count is a number of 1 to 9 digits, not so in ", word);
        count = 10 * count + (uint32_t)(digits.start[i] - '0');
    }
    return count;
}

static void add_rule(struct rule rule, struct text word)
{
    if (rule_count == RULES_MAX)
        fail("more than 256 rules, the last is in ", word);
    rules[rule_count++] = rule;
}

/* Add the rules of one word, `KEY=VALUE,VALUE,...`. */
static void read_word(struct text word)
{
    struct text values = word;
    struct text key = cut(&values, '=');
    if (equal(word, TEXT("verbose"))) {
        verbose = true;
        return;
    }
    do {
        struct text rest = cut(&values, ',');
        struct rule rule = {.action = SEND};
        if (equal(key, TEXT("echo"))) {
            rule.on = name_in(cut(&rest, ':'), word);
            rule.signal = name_in(rest, word);
        } else if (equal(key, TEXT("boot"))) {
            rule.signal = name_in(rest, word);
        } else if (equal(key, TEXT("flood")) || equal(key, TEXT("flood_on"))) {
            rule.action = FLOOD;
            if (equal(key, TEXT("flood_on")))
                rule.on = name_in(cut(&rest, ':'), word);
            rule.count = count_in(cut(&rest, ':'), word);
            rule.signal = name_in(rest, word);
        } else {
            if (equal(key, TEXT("hang_on")))
                rule.action = HANG;
            else if (equal(key, TEXT("reset_on")))
                rule.action = RESET;
            else if (equal(key, TEXT("report_on")))
                rule.action = REPORT;
            else
                fail("unknown word on the command line: ", word);
            rule.on = name_in(rest, word);
        }
        add_rule(rule, word);
    } while (values.length);
}

static void read_command_line(struct text line)
{
    while (line.length) {
        struct text word = cut(&line, ' ');
        if (word.length)
            read_word(word);
    }
    if (!rule_count)
        read_word(TEXT("echo=redun_notify_irq:ihub_hwwd_irq"));
}

static uint32_t big_endian(const void *at)
{
    const uint8_t *byte = at;
    return (uint32_t)byte[0] << 24 | (uint32_t)byte[1] << 16 | (uint32_t)byte[2] << 8 | byte[3];
}

/* Return the property `bootargs` of the device tree, which only the node `chosen` has, or an empty text. */
static struct text bootargs(const char *tree)
{
    enum { BEGIN_NODE = 1, END_NODE, PROP, NOP, END = 9 };
    const char *at = tree + big_endian(tree + 8);
    const char *strings = tree + big_endian(tree + 12);
    for (;;) {
        uint32_t token = big_endian(at);
        at += 4;
        if (token == END)
            return TEXT("");
        if (token == BEGIN_NODE) {
            size_t length = 1;
            while (at[length - 1])
                length++;
            at += (length + 3) & ~3UL;
        } else if (token == PROP) {
            uint32_t size = big_endian(at);
            const char *name = strings + big_endian(at + 4);
            size_t length = 0;
            while (name[length])
                length++;
            at += 8;
            if (size && equal((struct text){name, length}, TEXT("bootargs")))
                return (struct text){at, size - 1};
            at += (size + 3) & ~3UL;
        }
    }
}

/* The network card */

#define RING 128
#define RX 0
#define TX 1
#define FLOOD_ROOM 32 /* buffers that a flood leaves free for answers to frames that arrive meanwhile */

#define HEADER 12 /* struct virtio_net_hdr, all zero: no offload was negotiated */
#define FRAME_MIN 60
#define FRAME_MAX 1514
#define ETHERNET 14
#define SEND_MAX (ETHERNET + NAME_MAX)

#define VIRTQ_DESC_F_WRITE 2
#define VIRTQ_AVAIL_F_NO_INTERRUPT 1
#define VIRTQ_USED_F_NO_NOTIFY 1

enum { /* registers, 4.2.2 */
    MAGIC = 0x00, VERSION = 0x04, DEVICE_ID = 0x08, DEVICE_FEATURES = 0x10, DEVICE_FEATURES_SEL = 0x14,
    DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30, QUEUE_NUM_MAX = 0x34, QUEUE_NUM = 0x38,
    QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, STATUS = 0x70,
    QUEUE_DESC = 0x80, QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0, CONFIG = 0x100,
};

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

#define VIRTIO_NET_F_MAC (1U << 5)
#define VIRTIO_F_VERSION_1 (1U << 0) /* of the upper half */

struct queue {
    struct { uint64_t addr; uint32_t len; uint16_t flags, next; } desc[RING] __attribute__((aligned(16)));
    struct { uint16_t flags, idx, ring[RING]; } avail;
    struct { uint16_t flags, idx; struct { uint32_t id, len; } ring[RING]; } used __attribute__((aligned(4)));
    uint16_t seen; /* the part of used.idx that was processed */
};

static volatile struct queue queues[2];
static uint8_t rx_buffer[RING][HEADER + FRAME_MAX + 2];
static uint8_t tx_buffer[RING][HEADER + SEND_MAX];
static uint16_t tx_free[RING];
static unsigned tx_room;
static uint64_t tx_progress; /* when the transmit ring last moved */
static bool tx_stall_said;

static uintptr_t card;
static uint32_t card_irq;
static uint8_t mac[6];

static struct { uint64_t received, known, unknown, malformed, foreign, sent; } counters;

static void make_available(unsigned number, uint16_t id)
{
    volatile struct queue *queue = &queues[number];
    queue->avail.ring[queue->avail.idx % RING] = id;
    fence();
    queue->avail.idx++;
}

/* Notify the card of available buffers, unless it has disabled notifications. */
static void notify(unsigned number)
{
    fence();
    if (!(queues[number].used.flags & VIRTQ_USED_F_NO_NOTIFY))
        put(card + QUEUE_NOTIFY, number);
}

/* Take back the buffers of sent frames. */
static void reclaim(void)
{
    volatile struct queue *queue = &queues[TX];
    if (queue->seen == queue->used.idx)
        return;
    fence();
    while (queue->seen != queue->used.idx)
        tx_free[tx_room++] = (uint16_t)queue->used.ring[queue->seen++ % RING].id;
    tx_progress = ticks();
    tx_stall_said = false;
}

/* Sleep until the card has received a frame or, with `for_room`, has sent one.
 *
 * The firmware never takes interrupts: wfi ends when one is pending, and the interrupt stays pending until it is claimed
 * here. So no event is missed if the caller checks the rings between this function and the next wfi.
 */
static void sleep(bool for_room)
{
    queues[TX].avail.flags = for_room ? 0 : VIRTQ_AVAIL_F_NO_INTERRUPT;
    fence();
    if (for_room && queues[TX].seen != queues[TX].used.idx)
        return;
    uint64_t deadline = for_room && !tx_stall_said ? tx_progress + 2 * TICKS_PER_SECOND : UINT64_MAX;
    *(volatile uint64_t *)MTIMECMP = deadline;
    __asm__ volatile("wfi" ::: "memory");
    uint32_t irq = get(PLIC_CLAIM);
    if (irq) {
        put(card + INTERRUPT_ACK, get(card + INTERRUPT_STATUS));
        put(PLIC_CLAIM, irq);
    }
    if (deadline != UINT64_MAX && ticks() >= deadline && queues[TX].seen == queues[TX].used.idx) {
        say_line("no room to send for 2 s", TEXT(""));
        tx_stall_said = true;
    }
}

static void send(struct text name)
{
    reclaim();
    for (; !tx_room; reclaim())
        sleep(true);
    if (tx_room == RING)
        tx_progress = ticks();
    uint16_t id = tx_free[--tx_room];
    uint8_t *frame = tx_buffer[id] + HEADER;
    memset(tx_buffer[id], 0, sizeof tx_buffer[id]);
    memset(frame, 0xff, 6);
    memcpy(frame + 6, mac, 6);
    frame[12] = 0x88;
    memcpy(frame + ETHERNET, name.start, name.length);
    size_t size = ETHERNET + name.length;
    queues[TX].desc[id].len = (uint32_t)(HEADER + (size < FRAME_MIN ? FRAME_MIN : size));
    make_available(TX, id);
    notify(TX);
    counters.sent++;
    if (verbose)
        say_line("sent ", name);
}

/* Wait until the card has sent all frames. */
static void flush(void)
{
    for (reclaim(); tx_room < RING; reclaim())
        sleep(true);
}

/* Send pending frames of the floods, one flood after the other, while there is room. Return whether frames are left. */
static bool flood(void)
{
    for (struct rule *rule = rules; rule < rules + rule_count; rule++) {
        if (!rule->pending)
            continue;
        for (reclaim(); rule->pending && tx_room > FLOOD_ROOM; rule->pending--)
            send(rule->signal);
        if (rule->pending)
            return true;
        say_line("flood ended: ", rule->signal);
    }
    return false;
}

static void report(void)
{
    say("core1: counters received=");
    say_decimal(counters.received);
    say(" known=");
    say_decimal(counters.known);
    say(" unknown=");
    say_decimal(counters.unknown);
    say(" malformed=");
    say_decimal(counters.malformed);
    say(" foreign=");
    say_decimal(counters.foreign);
    say(" sent=");
    say_decimal(counters.sent);
    say("\n");
}

static void apply(struct rule *rule)
{
    switch (rule->action) {
    case SEND:
        send(rule->signal);
        break;
    case FLOOD:
        if (rule->count) {
            say("core1: floods: ");
            say_decimal(rule->count);
            say(" ");
            say_text(rule->signal);
            say("\n");
        }
        rule->pending += rule->count;
        break;
    case REPORT:
        report();
        break;
    case HANG:
        say_line("hangs on ", rule->on);
        __asm__ volatile("csrw mie, zero");
        for (;;)
            __asm__ volatile("wfi");
    case RESET:
        /* First send all frames, so that an observer can count them. */
        flush();
        say_line("resets itself on ", rule->on);
        for (;;)
            put(FINISHER, FINISHER_RESET);
    }
}

/* Return the name in a frame, or an empty text if the frame is malformed. */
static struct text name_of(const uint8_t *frame, size_t size)
{
    struct text name = {(const char *)frame + ETHERNET, size - ETHERNET};
    while (name.length && !name.start[name.length - 1])
        name.length--;
    for (size_t i = 0; i < name.length; i++)
        if (name.length > NAME_MAX || name.start[i] < '!' || name.start[i] > '~')
            return TEXT("");
    return name;
}

static bool is_broadcast(const uint8_t *frame)
{
    for (int i = 0; i < 6; i++)
        if (frame[i] != 0xff)
            return false;
    return true;
}

static void handle(const uint8_t *frame, size_t size)
{
    counters.received++;
    if (size < ETHERNET || !is_broadcast(frame) || frame[12] != 0x88 || frame[13] != 0x00) {
        counters.foreign++;
        return;
    }
    struct text name = name_of(frame, size);
    if (!name.length) {
        counters.malformed++;
        return;
    }
    if (verbose)
        say_line("received ", name);
    bool known = false;
    for (size_t i = 0; i < rule_count; i++)
        known |= equal(rules[i].on, name);
    /* Count the frame first, so that a report includes the frame that requested it. */
    if (known)
        counters.known++;
    else
        counters.unknown++;
    for (size_t i = 0; i < rule_count; i++)
        if (equal(rules[i].on, name))
            apply(&rules[i]);
}

static void receive(void)
{
    volatile struct queue *queue = &queues[RX];
    bool refilled = false;
    while (queue->seen != queue->used.idx) {
        fence();
        uint32_t id = queue->used.ring[queue->seen % RING].id;
        uint32_t len = queue->used.ring[queue->seen % RING].len;
        queue->seen++;
        handle(rx_buffer[id] + HEADER, len - HEADER);
        make_available(RX, (uint16_t)id);
        refilled = true;
    }
    if (refilled)
        notify(RX);
}

static void start_queue(uint32_t number)
{
    volatile struct queue *queue = &queues[number];
    for (uint16_t id = 0; id < RING; id++) {
        queue->desc[id].addr = (uintptr_t)(number == RX ? rx_buffer[id] : tx_buffer[id]);
        queue->desc[id].len = sizeof rx_buffer[id];
        queue->desc[id].flags = number == RX ? VIRTQ_DESC_F_WRITE : 0;
        if (number == RX)
            make_available(RX, id);
        else
            tx_free[tx_room++] = id;
    }
    put(card + QUEUE_SEL, number);
    if (get(card + QUEUE_NUM_MAX) < RING)
        fail("the card's rings have less room than 128 frames", TEXT(""));
    put(card + QUEUE_NUM, RING);
    /* The memory ends below 4 GiB, so the upper halves are 0. */
    put(card + QUEUE_DESC, (uint32_t)(uintptr_t)&queue->desc);
    put(card + QUEUE_DRIVER, (uint32_t)(uintptr_t)&queue->avail);
    put(card + QUEUE_DEVICE, (uint32_t)(uintptr_t)&queue->used);
    put(card + QUEUE_DESC + 4, 0);
    put(card + QUEUE_DRIVER + 4, 0);
    put(card + QUEUE_DEVICE + 4, 0);
    put(card + QUEUE_READY, 1);
}

static void find_card(void)
{
    for (unsigned slot = 0; slot < VIRTIO_SLOTS; slot++) {
        card = VIRTIO_SLOT(slot);
        card_irq = VIRTIO_IRQ(slot);
        if (get(card + MAGIC) == 0x74726976 && get(card + DEVICE_ID) == 1) {
            if (get(card + VERSION) != 2)
                fail("the card is a legacy one: QEMU needs -global virtio-mmio.force-legacy=false", TEXT(""));
            return;
        }
    }
    fail("no network card: QEMU needs -device virtio-net-device", TEXT(""));
}

static void start_card(void)
{
    put(card + STATUS, 0);
    put(card + STATUS, ACKNOWLEDGE);
    put(card + STATUS, ACKNOWLEDGE | DRIVER);
    put(card + DEVICE_FEATURES_SEL, 0);
    uint32_t has_mac = get(card + DEVICE_FEATURES) & VIRTIO_NET_F_MAC;
    put(card + DRIVER_FEATURES_SEL, 0);
    put(card + DRIVER_FEATURES, has_mac);
    put(card + DRIVER_FEATURES_SEL, 1);
    put(card + DRIVER_FEATURES, VIRTIO_F_VERSION_1);
    put(card + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!has_mac || !(get(card + STATUS) & FEATURES_OK))
        fail("the card has no MAC address, or refuses", TEXT(""));
    for (unsigned i = 0; i < sizeof mac; i++)
        mac[i] = *(volatile uint8_t *)(card + CONFIG + i);
    start_queue(RX);
    start_queue(TX);
    put(PLIC_PRIORITY(card_irq), 1);
    put(PLIC_ENABLE, 1U << card_irq);
    put(PLIC_THRESHOLD, 0);
    *(volatile uint64_t *)MTIMECMP = UINT64_MAX;
    __asm__ volatile("csrw mie, %0" ::"r"(MIE_MEIE | MIE_MTIE));
    put(card + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    notify(RX);
}

_Noreturn void core1(const char *device_tree)
{
    read_command_line(bootargs(device_tree));
    find_card();
    start_card();
    say("core1: ready, ");
    say_decimal(rule_count);
    say(" rules, mac ");
    for (unsigned i = 0; i < sizeof mac; i++) {
        say(i ? ":" : "");
        say_number(mac[i], 16, 2);
    }
    say("\n");
    for (size_t i = 0; i < rule_count; i++) {
        if (!rules[i].on.length) {
            if (rules[i].action == SEND)
                say_line("sends at boot ", rules[i].signal);
            apply(&rules[i]);
        }
    }
    for (;;) {
        receive();
        sleep(flood());
    }
}
