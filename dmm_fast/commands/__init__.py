"""The `dmm-fast` command: `main` reads the words, and each module here is one command.

`add(commands)` describes a command and must stay cheap; `run(arguments)` imports what it needs, and calls the room that does
the work.
"""
