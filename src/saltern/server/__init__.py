"""The server's shell: performs what the core decides, on sockets, memory and a log."""
