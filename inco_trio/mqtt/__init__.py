"""The gateway and the bridge, which connect boards to an MQTT broker."""
