"""A sandbox for programs that a model wrote: runner.py starts a process, inside.py runs in it, confine.py takes its rights away."""
