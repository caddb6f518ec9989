#!/bin/sh
# Answer each watchdog interrupt of core 1: ./answer.sh IRQ_DIR
set -eu
inco-trio wait ihub_hwwd_irq --irq-dir "$1" --count 999999999999 --after "echo answering" | while read -r said; do
    echo "$said"
    [ "$said" = answering ] || echo 1 > "$1/message_6_trig"
done
