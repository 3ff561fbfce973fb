"""The guard: judge every step, leave out bad updates, diagnose bad steps and report them. `train` imports it."""
