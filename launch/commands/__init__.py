"""The commands that a user types: one file per command or group of commands. Only the entry point imports them."""
