"""Runs one program in a confined process: `python -I inside.py`, started by runner.py.

stdin: a line of JSON {"token", "folder", "seconds", "memory", "landlock", "seccomp"}, then the program. stdout: one line of JSON with the
token, the layers in force, and `error` (null: the program ran to its end). The program itself sees neither: its stdout and stdin are
/dev/null. A program that leaves early (sys.exit, os._exit) has not passed, since nobody writes the token then.
"""

import json
import os
import sys


def main() -> None:
    head, program = os.fdopen(0, "rb", closefd=False).read().split(b"\n", 1)
    order = json.loads(head)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import confine

    del sys.path[0]
    answers, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    layers = confine.confine(order["folder"], order["seconds"], order["memory"], landlock=order["landlock"], seccomp=order["seccomp"])
    error = None
    try:
        exec(compile(program.decode(), "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except BaseException as problem:  # SystemExit too: it left before its tests
        try:
            error = f"{type(problem).__name__}: {problem}"[:300]
        except BaseException:  # a message that cannot be printed
            error = type(problem).__name__
    answer = json.dumps({"token": order["token"], "layers": layers, "error": error})
    os.write(answers, answer.encode())
    os._exit(0)


main()
