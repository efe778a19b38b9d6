"""Where the numbers are computed: one module an engine."""
