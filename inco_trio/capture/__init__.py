"""Recordings: the pcapng files that are written, what is read of them and of any pcap, and how they are played."""
