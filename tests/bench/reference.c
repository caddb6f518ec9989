/* The C program that inco-trio is compared with: one epoll loop over the link's socket and inotify.
 *
 * usage: reference TABLE DIR IFACE NOTIFICATION_FD RECEIVE_BUFFER [modify]
 *
 * With "modify" the triggers are watched for IN_MODIFY too, which keeps identical IN_CLOSE_WRITE events from merging.
 */
#include "common.h"
#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>

static struct side inbound, outbound;
static int directory, events, the_link;
static int *signal_of_watch; /* watch descriptors count up from 1 (inotify_add_watch(2)) */
static unsigned long received, unknown, failed, sent;

static void write_register(const struct signal *signal) {
    int file = openat(directory, signal->reg, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0644);
    if (file < 0) {
        failed++;
        return;
    }
    if (write(file, "1", 1) != 1)
        failed++;
    close(file);
}

static void receive_frames(void) {
    char frame[MAX_FRAME];
    ssize_t size;
    while ((size = recv(the_link, frame, sizeof frame, 0)) >= 0) {
        int index = find_frame(&inbound, frame, size);
        received++;
        if (index < 0)
            unknown++;
        else
            write_register(&inbound.signals[index]);
    }
    if (errno != EAGAIN)
        die("recv");
}

static void read_triggers(void) {
    static char buffer[65536] __attribute__((aligned(__alignof__(struct inotify_event))));
    ssize_t size = read(events, buffer, sizeof buffer);
    if (size < 0)
        die("read of inotify");
    for (char *at = buffer; at < buffer + size;) {
        const struct inotify_event *event = (struct inotify_event *)at;
        at += sizeof *event + event->len;
        if (event->mask & IN_Q_OVERFLOW)
            fprintf(stderr, "inotify queue overflow\n");
        if (!(event->mask & IN_CLOSE_WRITE))
            continue;
        const struct signal *signal = &outbound.signals[signal_of_watch[event->wd]];
        if (send(the_link, signal->frame, ETH_HLEN + signal->length, 0) < 0)
            failed++;
        else
            sent++;
    }
}

static void watch_triggers(const char *path, uint32_t mask) {
    char file[4096];
    if ((events = inotify_init1(IN_NONBLOCK | IN_CLOEXEC)) < 0)
        die("inotify_init1");
    signal_of_watch = calloc(outbound.count + 1, sizeof *signal_of_watch);
    for (int i = 0; i < outbound.count; i++) {
        snprintf(file, sizeof file, "%s/%s", path, outbound.signals[i].reg);
        close(open(file, O_RDONLY | O_CREAT | O_CLOEXEC, 0644));
        int watch = inotify_add_watch(events, file, mask);
        if (watch < 0 || watch > outbound.count)
            die(file);
        signal_of_watch[watch] = i;
    }
}

static void add(int epoll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

int main(int argc, char **argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: reference TABLE DIR IFACE NOTIFICATION_FD RECEIVE_BUFFER [modify]\n");
        return 2;
    }
    read_table(argv[1], &inbound, &outbound);
    directory = open(argv[2], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        die(argv[2]);
    the_link = open_link(argv[3], atoi(argv[5]), SOCK_NONBLOCK);
    encode_frames(&outbound, the_link, argv[3]);
    watch_triggers(argv[2], argc > 6 ? IN_CLOSE_WRITE | IN_MODIFY : IN_CLOSE_WRITE);

    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    int signals = signalfd(-1, &stop, SFD_CLOEXEC);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    add(epoll, the_link);
    add(epoll, events);
    add(epoll, signals);
    if (write(atoi(argv[4]), "\n", 1) != 1)
        die("write of readiness");
    close(atoi(argv[4]));

    for (bool running = true; running;) {
        struct epoll_event ready[3];
        int count = epoll_wait(epoll, ready, 3, -1);
        for (int i = 0; i < count; i++) {
            if (ready[i].data.fd == the_link)
                receive_frames();
            else if (ready[i].data.fd == events)
                read_triggers();
            else
                running = false;
        }
    }
    fprintf(stderr, "received=%lu dropped=%u unknown=%lu failed=%lu sent=%lu\n", received, link_drops(the_link),
            unknown, failed, sent);
    return 0;
}
