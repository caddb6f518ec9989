/* The hardware watchdog of core 0, as a program of core 1.
 *
 * The watchdog sleeps until core 0 sends redun_notify_irq for the first time. From then on, core 0 must send it again
 * within PATIENCE, or the watchdog warns core 0 by ihub_hwwd_irq. After another PATIENCE without redun_notify_irq, the
 * watchdog resets core 0 by ihub_reset_irq and sleeps again.
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
