"""Proof that the service holds: load, faults and strangers against a running service, one table.

Each part is a module, with a docstring that says what it does and one function, `run(engine) -> list[Row]`. `engine`
is "embedded" or "triton"; a part starts its own services with `stage.staged`, on a tiny model whose answers show which
image and which weights they are of. A `Row` is one thing that was done, its figure, its limit, and whether it passed;
one that can't be done here has the reason as its figure and passed=None. A new part is a new module and a line in
`__main__.PARTS`. Each part also runs alone: `python -m benchmarks.trust.drain --engine triton`.

`python -m benchmarks.trust` (`make trust`) runs all parts, prints the table, and writes it into docs/.
"""
