"""How a command ends, for the shell and for scripts."""

DONE, FAILED, WRONG, HUNG_UP, INTERRUPTED, TERMINATED = 0, 1, 2, 129, 130, 143
EXIT_CODES = {
    DONE: "done",
    FAILED: "it failed, or what it checks is not in order",
    WRONG: "the command line or the settings are wrong, and nothing was done",
    HUNG_UP: "stopped by SIGHUP, as the terminal is gone",
    INTERRUPTED: "stopped by Ctrl-C",
    TERMINATED: "stopped by SIGTERM",
}
