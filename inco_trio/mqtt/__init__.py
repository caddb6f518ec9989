"""The gateway to an MQTT broker: what it is told, its connection to the broker, and what it publishes."""
