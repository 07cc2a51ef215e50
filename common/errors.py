"""What ends a program with one clear line; `runtime.launch` prints it."""


class RunError(Exception):
    """A fault the user can mend; `launch` prints its one line and exits with code 1."""


class DataError(RunError):
    """Data that are missing, damaged or not what the flags say; the message names the file."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived and the state is saved; args: a message and the exit status."""
