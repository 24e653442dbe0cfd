"""Training of a phase: initialization, loop, step, optimizer, schedule, criteria."""
