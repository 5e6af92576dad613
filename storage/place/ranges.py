"""What is asked of a store, and what it tells."""

Range = tuple[str, int, int]  # key, start, length in bytes; a start of -length means the end of the file
Stat = tuple[int, dict[str, str]]  # bytes of a file, and what tells its version
