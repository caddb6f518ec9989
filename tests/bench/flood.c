/* Send one frame repeatedly through a Unix datagram socket.
 *
 * usage: flood PATH TO RATE HEX
 *
 * The program binds its socket at PATH and sends the frame HEX to TO, RATE times a second. While TO has no room, it
 * waits; then it catches up. It prints a line when it starts. On SIGTERM it prints the number of frames per second
 * and exits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define EVERY_NS 200000 /* frames due within this time are sent together */

static volatile sig_atomic_t ended;

static void end(int number) {
    (void)number;
    ended = 1;
}

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static struct sockaddr_un address(const char *path) {
    struct sockaddr_un made = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof made.sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(made.sun_path, path);
    return made;
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv) {
    unsigned char frame[1514];
    int length = 0;
    if (argc != 5)
        return 2;
    for (const char *at = argv[4]; length < (int)sizeof frame && sscanf(at, "%2hhx", &frame[length]) == 1; at += 2)
        length++;
    struct sockaddr_un from = address(argv[1]), to = address(argv[2]);
    int link = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (link < 0 || bind(link, (struct sockaddr *)&from, sizeof from) || connect(link, (struct sockaddr *)&to, sizeof to))
        die(argv[1]);
    struct sigaction action = {.sa_handler = end}; /* no SA_RESTART: SIGTERM interrupts send(2) */
    sigaction(SIGTERM, &action, NULL);
    puts("begun");
    fflush(stdout);
    int64_t begin = now(), sent = 0, rate = atoll(argv[3]);
    while (!ended) {
        int64_t due = (now() - begin) * rate / 1000000000;
        for (; sent < due && !ended; sent++)
            if (send(link, frame, length, 0) < 0 && errno != EINTR)
                die(argv[2]);
        nanosleep(&(struct timespec){0, EVERY_NS}, NULL);
    }
    printf("%lld\n", (long long)(sent * 1000000000 / (now() - begin)));
    return 0;
}
