"""The pure part of the kernel: decisions and bookkeeping. No asyncio, no clock, no random globals, no I/O, no logging."""
