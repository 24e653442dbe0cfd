"""One phase of training: its start, steps, loop and optimizer."""
