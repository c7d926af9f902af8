"""The kvcompress command: arguments, progress and printing; the work is in the library."""
