/* Code shared by the reference and the load generator: the signal table, its lookup by wire name, and the link. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define ETHERTYPE 0x8800
#define MAX_NAME 64
#define MAX_FRAME 1514

struct signal {
    char name[MAX_NAME + 1];
    char reg[256];
    int length;                           /* of the name */
    unsigned char frame[ETH_HLEN + MAX_NAME]; /* ready to send */
};

/* The signals of one direction. `slots` is an open-addressed hash: 1 + index, or 0. */
struct side {
    struct signal *signals;
    int count;
    uint32_t *slots;
    uint32_t mask;
};

static inline void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline uint32_t hash(const char *name, int length) {
    uint32_t h = 2166136261u; /* FNV-1a */
    for (int i = 0; i < length; i++)
        h = (h ^ (unsigned char)name[i]) * 16777619u;
    return h;
}

/* Return the index of the signal with this wire name, or -1. */
static inline int find(const struct side *side, const char *name, int length) {
    for (uint32_t at = hash(name, length) & side->mask; side->slots[at]; at = (at + 1) & side->mask) {
        const struct signal *signal = &side->signals[side->slots[at] - 1];
        if (signal->length == length && !memcmp(signal->name, name, length))
            return (int)side->slots[at] - 1;
    }
    return -1;
}

/* Return the index of the signal in a received frame, or -1. NUL padding may follow the name. */
static inline int find_frame(const struct side *side, const char *frame, ssize_t size) {
    int length = (int)size - ETH_HLEN;
    while (length > 0 && frame[ETH_HLEN + length - 1] == '\0')
        length--;
    return length > 0 ? find(side, frame + ETH_HLEN, length) : -1;
}

/* Read lines of "name inbound|outbound register". */
static inline void read_table(const char *path, struct side *inbound, struct side *outbound) {
    FILE *file = fopen(path, "r");
    if (!file)
        die(path);
    struct signal signal = {0};
    char direction[16];
    while (fscanf(file, "%64s %15s %255s", signal.name, direction, signal.reg) == 3) {
        struct side *side = strcmp(direction, "inbound") ? outbound : inbound;
        signal.length = (int)strlen(signal.name);
        side->signals = realloc(side->signals, (side->count + 1) * sizeof signal);
        side->signals[side->count++] = signal;
    }
    fclose(file);
    for (struct side *side = inbound;; side = outbound) {
        uint32_t size = 4;
        while (size < 2 * (uint32_t)side->count)
            size *= 2;
        side->mask = size - 1;
        side->slots = calloc(size, sizeof *side->slots);
        for (int i = 0; i < side->count; i++) {
            uint32_t at = hash(side->signals[i].name, side->signals[i].length) & side->mask;
            while (side->slots[at])
                at = (at + 1) & side->mask;
            side->slots[at] = i + 1;
        }
        if (side == outbound)
            break;
    }
}

/* Prepare the frames of one side, with the MAC of the interface as their source. */
static inline void encode_frames(struct side *side, int link, const char *interface) {
    struct ifreq request = {0};
    strncpy(request.ifr_name, interface, IFNAMSIZ - 1);
    if (ioctl(link, SIOCGIFHWADDR, &request))
        die("SIOCGIFHWADDR");
    for (int i = 0; i < side->count; i++) {
        struct signal *signal = &side->signals[i];
        struct ether_header *header = (struct ether_header *)signal->frame;
        memset(header->ether_dhost, 0xff, ETH_ALEN);
        memcpy(header->ether_shost, request.ifr_hwaddr.sa_data, ETH_ALEN);
        header->ether_type = htons(ETHERTYPE);
        memcpy(signal->frame + ETH_HLEN, signal->name, signal->length);
    }
}

/* Open an AF_PACKET socket on the interface. Protocol 0 until bind keeps other frames out of the queue (packet(7)). */
static inline int open_link(const char *interface, int buffer, int flags) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 12),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ETHERTYPE, 0, 4),
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, (uint32_t)(SKF_AD_OFF + SKF_AD_PKTTYPE)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OTHERHOST, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, MAX_FRAME),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    struct sock_fprog filter = {sizeof code / sizeof *code, code};
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE), .sll_ifindex = (int)if_nametoindex(interface)};
    int one = 1;
    int link = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | flags, 0);
    if (link < 0)
        die("socket");
    if (setsockopt(link, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) ||
        setsockopt(link, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one) ||
        (setsockopt(link, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer) &&
         setsockopt(link, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer)))
        die("setsockopt");
    if (bind(link, (struct sockaddr *)&address, sizeof address))
        die(interface);
    return link;
}

/* Return how many frames the kernel dropped because the queue was full; this resets the count (packet(7)). */
static inline unsigned link_drops(int link) {
    struct tpacket_stats stats = {0};
    socklen_t size = sizeof stats;
    if (getsockopt(link, SOL_PACKET, PACKET_STATISTICS, &stats, &size))
        die("PACKET_STATISTICS");
    return stats.tp_drops;
}
