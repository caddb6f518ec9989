#!/bin/sh
# Test answer.sh with a real proxy: `inco-trio wait` plays core 1. Needs no privilege.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
home=$(mktemp -d)
core0="unix:$home/core0,peer=$home/core1" core1="unix:$home/core1,peer=$home/core0"
trap 'kill $proxy; kill -- -$answer; wait; cat "$home/log"; rm -r "$home"' EXIT

inco-trio run "$core0" --irq-dir "$home/irq" --control none 2> "$home/log" &
proxy=$!
# These loops poll, and the timeout below only stops a hang: no time decides the result.
until [ -e "$home/irq/message_6_trig" ]; do sleep 0.1; done
# Start a new session, so that the trap ends all of its processes.
setsid "$here/answer.sh" "$home/irq" > "$home/said" &
answer=$!
until [ -s "$home/said" ]; do sleep 0.1; done

for try in 1 2 3; do
    echo "watchdog $try"
    inco-trio wait redun_notify_irq --as core1 "$core1" --send ihub_hwwd_irq --timeout 300
done
echo "answer.sh works"
