/* The load generator: acts as core 1 and as the consumer on core 0. Start it in core 1's network namespace.
 *
 * usage: load TABLE DIR IFACE PID IN_COUNT IN_RATE OUT_COUNT OUT_RATE GAP_US NAP_US QUIET_MS SAMPLES
 *
 * Inbound: send IN_COUNT frames, IN_RATE a second (0: as fast as possible), with the inbound signals of TABLE in turn,
 * and count the closes after writing of the state registers. Outbound: open, write and close OUT_COUNT triggers, and
 * count the frames that arrive. Both may run at the same time. From 8,000 a second on, frames are sent in batches;
 * waiting for each frame would keep a CPU busy. With GAP_US the loop is closed, and rates are ignored: each
 * notification is sent GAP_US after the previous one has arrived, and no process spins. Readers sleep NAP_US between
 * two reads, so that counting takes little CPU time from the program under test; use 0 for latencies. The run ends
 * when everything has arrived, or when nothing has arrived for QUIET_MS. PID is the program under test, whose CPU time
 * is measured.
 *
 * The program prints one line of JSON. SAMPLES ("-": none) receives one int64 for each inbound and then each outbound
 * notification: nanoseconds from just before send(2) or close(2) to the return of the reader's read, or -1 if it never
 * arrived. Notifications are matched in order within each signal.
 */
#include "common.h"
#include <inttypes.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>

#define BATCH 256
#define SEND_BATCH 64
#define SEND_EVERY_NS 250000     /* frames due within this time are sent together */
#define CORE1_BUFFER (64 << 20)  /* core 1 must never drop a frame */
#define SPIN_BELOW_NS 100000     /* spin before a deadline that is too close for a sleep */

struct flow {
    struct side side;
    long count, rate, at_once;
    void (*emit)(struct flow *, long, long);
    void *(*read)(void *);
    int64_t *sent_at, *seen_at;
    long *seen_of; /* per signal */
    sem_t arrived; /* posted for each arrival in a closed loop */
    atomic_long seen;
    atomic_bool invalid;
    _Atomic int64_t last_seen;
};

static struct flow inbound, outbound;
static int directory, the_link, events;
static long nap, gap;
static int64_t quiet;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct timespec timespec_of(int64_t ns) {
    return (struct timespec){ns / 1000000000, ns % 1000000000};
}

static void sleep_for(int64_t ns) {
    struct timespec t = timespec_of(ns);
    nanosleep(&t, NULL);
}

static void wait_until(int64_t deadline) {
    struct timespec t = timespec_of(deadline);
    if (deadline - now() > SPIN_BELOW_NS)
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    while (now() < deadline)
        ;
}

static void send_frames(struct flow *flow, long first, long count) {
    struct iovec vectors[SEND_BATCH];
    struct mmsghdr messages[SEND_BATCH];
    int64_t when = now();
    for (long i = 0; i < count; i++) {
        struct signal *signal = &flow->side.signals[(first + i) % flow->side.count];
        vectors[i] = (struct iovec){signal->frame, ETH_HLEN + signal->length};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
        flow->sent_at[first + i] = when;
    }
    for (long done = 0; done < count;) {
        int sent = sendmmsg(the_link, messages + done, count - done, 0);
        if (sent >= 0)
            done += sent;
        else if (errno != ENOBUFS)
            die("sendmmsg");
    }
}

static void pull_triggers(struct flow *flow, long first, long count) {
    for (long i = first; i < first + count; i++) {
        int file = openat(directory, flow->side.signals[i % flow->side.count].reg, O_WRONLY | O_CLOEXEC);
        if (file < 0 || write(file, "1", 1) != 1)
            die("trigger");
        flow->sent_at[i] = now();
        close(file);
    }
}

/* Wait until one more notification has arrived, then sleep for the gap. Return false if none arrives in time. */
static bool wait_for_arrival(struct flow *flow) {
    struct timespec deadline = timespec_of(now() + quiet);
    while (sem_clockwait(&flow->arrived, CLOCK_MONOTONIC, &deadline)) {
        if (errno == ETIMEDOUT)
            return false;
        if (errno != EINTR)
            die("sem_clockwait");
    }
    sleep_for(gap);
    return true;
}

/* In an open loop, send at absolute deadlines, so that a late notification does not delay the next ones. */
static void *emit_all(void *argument) {
    struct flow *flow = argument;
    prctl(PR_SET_TIMERSLACK, 1);
    int64_t start = now();
    for (long i = 0, count; i < flow->count && !flow->invalid; i += count) {
        count = flow->count - i < flow->at_once ? flow->count - i : flow->at_once;
        if (flow->rate && !gap)
            wait_until(start + (i + count - 1) * 1000000000LL / flow->rate);
        flow->emit(flow, i, count);
        if (gap && !wait_for_arrival(flow))
            break;
    }
    return NULL;
}

static void note(struct flow *flow, int signal, int64_t when) {
    long i = flow->seen_of[signal]++ * flow->side.count + signal;
    if (i < flow->count)
        flow->seen_at[i] = when;
    atomic_fetch_add_explicit(&flow->seen, 1, memory_order_relaxed);
    atomic_store_explicit(&flow->last_seen, when, memory_order_relaxed);
    if (gap)
        sem_post(&flow->arrived);
}

/* Give the counting threads priority, so that the kernel's queue overflows less often; needs permission. */
static void be_preferred(void) {
    if (nap)
        setpriority(PRIO_PROCESS, gettid(), -10);
}

/* Consecutive events belong to different files, so the kernel merges none. After lost frames, two consecutive events may
 * be identical: a few in 100,000 merge, and the number of losses is slightly too high. A count of 0 is exact. */
static void *consume(void *argument) {
    struct flow *flow = argument;
    static char buffer[1 << 18] __attribute__((aligned(__alignof__(struct inotify_event))));
    be_preferred();
    for (;;) {
        ssize_t size = read(events, buffer, sizeof buffer);
        int64_t when = now();
        if (size < 0)
            die("read of inotify");
        for (char *at = buffer; at < buffer + size;) {
            const struct inotify_event *event = (struct inotify_event *)at;
            at += sizeof *event + event->len;
            if (event->mask & IN_CLOSE_WRITE)
                note(flow, event->wd - 1, when);
            else
                flow->invalid = true; /* IN_Q_OVERFLOW: the count is invalid */
        }
        if (nap)
            sleep_for(nap);
    }
    return NULL;
}

static void *receive(void *argument) {
    struct flow *flow = argument;
    static char frames[BATCH][MAX_FRAME];
    static struct iovec vectors[BATCH];
    static struct mmsghdr messages[BATCH];
    for (int i = 0; i < BATCH; i++) {
        vectors[i] = (struct iovec){frames[i], MAX_FRAME};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
    }
    for (;;) {
        int count = recvmmsg(the_link, messages, BATCH, MSG_WAITFORONE, NULL);
        int64_t when = now();
        if (count < 0)
            die("recvmmsg");
        for (int i = 0; i < count; i++) {
            int signal = find_frame(&flow->side, frames[i], messages[i].msg_len);
            if (signal >= 0)
                note(flow, signal, when);
            else
                flow->invalid = true;
        }
        if (nap && count < BATCH)
            sleep_for(nap);
    }
    return NULL;
}

static void watch_registers(const char *path) {
    char file[4096];
    if ((events = inotify_init1(IN_CLOEXEC)) < 0)
        die("inotify_init1");
    for (int i = 0; i < inbound.side.count; i++) {
        snprintf(file, sizeof file, "%s/%s", path, inbound.side.signals[i].reg);
        close(open(file, O_RDONLY | O_CREAT | O_CLOEXEC, 0644));
        if (inotify_add_watch(events, file, IN_CLOSE_WRITE) != i + 1)
            die(file);
    }
}

static void prepare(struct flow *flow, const char *count, const char *rate) {
    flow->count = atol(count);
    flow->rate = atol(rate);
    sem_init(&flow->arrived, 0, 0);
    flow->sent_at = calloc(flow->count + 1, sizeof *flow->sent_at);
    flow->seen_at = calloc(flow->count + 1, sizeof *flow->seen_at);
    flow->seen_of = calloc(flow->side.count + 1, sizeof *flow->seen_of);
    memset(flow->sent_at, 1, flow->count * sizeof *flow->sent_at); /* cause page faults before the run */
    memset(flow->seen_at, 0, flow->count * sizeof *flow->seen_at);
}

static int64_t cpu_time(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t))
        die("CPU time of the program under test");
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void report(const char *name, struct flow *flow) {
    long lost = 0, extra = 0;
    for (int i = 0; i < flow->side.count; i++) {
        long sent = flow->count / flow->side.count + (i < flow->count % flow->side.count);
        if (flow->seen_of[i] < sent)
            lost += sent - flow->seen_of[i];
        else
            extra += flow->seen_of[i] - sent;
    }
    int64_t first = flow->count ? flow->sent_at[0] : 0, last = flow->count ? flow->sent_at[flow->count - 1] : 0;
    printf("\"%s\": {\"sent\": %ld, \"seen\": %ld, \"lost\": %ld, \"extra\": %ld, \"invalid\": %s, "
           "\"send_s\": %.9f, \"total_s\": %.9f}, ",
           name, flow->count, (long)flow->seen, lost, extra, flow->invalid ? "true" : "false", (last - first) / 1e9,
           flow->seen ? (flow->last_seen - first) / 1e9 : 0.0);
}

static void write_samples(FILE *file, const struct flow *flow) {
    for (long i = 0; i < flow->count; i++) {
        int64_t ns = flow->seen_at[i] ? flow->seen_at[i] - flow->sent_at[i] : -1;
        fwrite(&ns, sizeof ns, 1, file);
    }
}

int main(int argc, char **argv) {
    if (argc != 13) {
        fprintf(stderr, "usage: load TABLE DIR IFACE PID IN_COUNT IN_RATE OUT_COUNT OUT_RATE GAP_US NAP_US QUIET_MS "
                        "SAMPLES\n");
        return 2;
    }
    read_table(argv[1], &inbound.side, &outbound.side);
    prepare(&inbound, argv[5], argv[6]);
    prepare(&outbound, argv[7], argv[8]);
    inbound.emit = send_frames, inbound.read = consume;
    outbound.emit = pull_triggers, outbound.read = receive;
    long together = inbound.rate * SEND_EVERY_NS / 1000000000;
    inbound.at_once = together < 1 ? 1 : together > SEND_BATCH ? SEND_BATCH : together;
    outbound.at_once = 1;
    gap = atol(argv[9]) * 1000;
    nap = atol(argv[10]) * 1000;
    quiet = atol(argv[11]) * 1000000LL;
    if ((directory = open(argv[2], O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
        die(argv[2]);
    the_link = open_link(argv[3], CORE1_BUFFER, 0);
    encode_frames(&inbound.side, the_link, argv[3]);
    watch_registers(argv[2]);
    clockid_t clock;
    if (clock_getcpuclockid((pid_t)atol(argv[4]), &clock))
        die("clock_getcpuclockid");

    struct flow *flows[] = {&inbound, &outbound};
    pthread_t readers[2], emitters[2];
    int64_t cpu = cpu_time(clock);
    for (int i = 0; i < 2; i++)
        pthread_create(&readers[i], NULL, flows[i]->read, flows[i]);
    for (int i = 0; i < 2; i++)
        pthread_create(&emitters[i], NULL, emit_all, flows[i]);
    for (int i = 0; i < 2; i++)
        pthread_join(emitters[i], NULL);
    int64_t emitted = now();
    for (;;) {
        int64_t last = emitted;
        bool all = true;
        for (int i = 0; i < 2; i++) {
            all = all && flows[i]->seen >= flows[i]->count;
            last = flows[i]->last_seen > last ? (int64_t)flows[i]->last_seen : last;
        }
        if (all || now() - last > quiet)
            break;
        sleep_for(1000000);
    }
    cpu = cpu_time(clock) - cpu;
    for (int i = 0; i < 2; i++) {
        pthread_cancel(readers[i]); /* they block in read and recvmmsg, which are cancellation points */
        pthread_join(readers[i], NULL);
    }
    outbound.invalid = outbound.invalid || link_drops(the_link);
    printf("{");
    report("inbound", &inbound);
    report("outbound", &outbound);
    printf("\"cpu_s\": %.9f}\n", cpu / 1e9);
    if (strcmp(argv[12], "-")) {
        FILE *file = fopen(argv[12], "wb");
        if (!file)
            die(argv[12]);
        write_samples(file, &inbound);
        write_samples(file, &outbound);
        if (fclose(file))
            die(argv[12]);
    }
    return 0;
}
