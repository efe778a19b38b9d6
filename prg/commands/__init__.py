"""The commands of `prg`, a module each: its options, and what they ask for."""
