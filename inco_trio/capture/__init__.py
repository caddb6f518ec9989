"""Recordings: write pcapng files, read pcapng and pcap files, replay them, and plot them."""
