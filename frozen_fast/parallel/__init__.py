"""One process, DDP, ZeRO and FSDP2 behind one class."""
