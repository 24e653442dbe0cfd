"""Exit statuses of the lpt-peft command."""

OK = 0
FAILED = 1
"""An error, explained on standard error."""
USAGE = 2
"""Wrong arguments."""
INCOMPLETE = 3
"""Finished, but some images were left out or need attention; standard error names and counts them."""
INTERRUPTED = 130
"""Ctrl-C, as in a shell: 128 + SIGINT."""
BROKEN_PIPE = 141
"""The reader of the output has gone, as after `| head`: 128 + SIGPIPE."""
