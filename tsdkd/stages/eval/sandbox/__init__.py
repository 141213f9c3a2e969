"""Judges an untrusted program: a model's response to MBPP.

`verdict` starts `supervisor` for each program. The supervisor starts two processes, both confined by `confinement`:
`program` runs the program, `judge` runs the tests. They exchange values of built-in types through a `channel` with
the `codec`. The program's process never holds the tests or the verdict. The modules of these processes import little,
because each program pays for their start.
"""
