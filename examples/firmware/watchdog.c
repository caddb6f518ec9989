/* The hardware watchdog of core 0, as a program of core 1.
 *
 * It sleeps until core 0 sends redun_notify_irq for the first time. From then on core 0 has to send it again within
 * PATIENCE. Whoever has not, is warned by ihub_hwwd_irq; whoever has not for another PATIENCE is reset, by
 * ihub_reset_irq, and the watchdog sleeps again.
 */

#include "board.h"

#include <stddef.h>

#define PATIENCE 1000 /* ms */

enum state { ASLEEP, WATCHING, WARNED };

int main(void)
{
    enum state state = ASLEEP;
    uint64_t since = 0;
    link_open();
    say("watchdog: ready", "");
    for (;;) {
        const char *name = link_receive();
        if (name) {
            say("watchdog: received ", name);
            if (equal(name, "redun_notify_irq")) {
                state = WATCHING;
                since = milliseconds();
            }
        } else if (state != ASLEEP && milliseconds() - since >= PATIENCE) {
            const char *signal = state == WATCHING ? "ihub_hwwd_irq" : "ihub_reset_irq";
            state = state == WATCHING ? WARNED : ASLEEP;
            since = milliseconds();
            say("watchdog: sends ", signal);
            link_send(signal);
        } else {
            sleep_a_while();
        }
    }
}
